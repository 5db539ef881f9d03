//! Control groups (version 2): below the root, never the root itself, removed on drop.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bed::{self, Bed};
use crate::process::{self, Command};
use crate::wait;

/// A control group; dropped, what still runs in it is killed and it is removed.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
    procs: File,
    _parent: Option<Arc<Cgroup>>,
    _bed: Arc<Bed>,
}

impl Cgroup {
    /// A fresh one right below the root.
    #[track_caller]
    pub fn new(bed: &Arc<Bed>, name: &str) -> Arc<Self> {
        Self::create(root().join(format!("{}-{name}", bed.id())), None, bed)
    }

    /// A fresh one below this one: what is attached to this one holds for it as well.
    #[track_caller]
    pub fn child(self: &Arc<Self>, name: &str) -> Arc<Self> {
        Self::create(self.dir.join(name), Some(self.clone()), &self._bed)
    }

    #[track_caller]
    fn create(dir: PathBuf, parent: Option<Arc<Self>>, bed: &Arc<Bed>) -> Arc<Self> {
        let open = || {
            fs::create_dir(&dir)?;
            File::options().write(true).open(dir.join("cgroup.procs"))
        };
        let procs = open().unwrap_or_else(|error| panic!("cannot make control group {}: {error}", dir.display()));
        Arc::new(Self { dir, procs, _parent: parent, _bed: bed.clone() })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The command's process will run in this group.
    #[track_caller]
    pub fn join(&self, command: &mut Command) {
        let procs = self.procs.try_clone().unwrap_or_else(|error| panic!("cannot copy a file handle: {error}"));
        process::join_cgroup(command, procs.into());
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// Where control groups version 2 are mounted; hybrid systems have them aside.
#[track_caller]
pub fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("the mount table can be read");
    let mut fields = mounts.lines().map(|line| line.split(' '));
    let dir = fields.find_map(|mut line| {
        let dir = line.nth(1)?;
        (line.next()? == "cgroup2").then_some(dir)
    });
    dir.expect("control groups version 2 are not mounted").into()
}

fn remove(dir: &Path) {
    // Refused before Linux 5.14; guards of processes have run before this one.
    let _ = fs::write(dir.join("cgroup.kill"), "1");
    let is_empty = || fs::read_to_string(dir.join("cgroup.events")).is_ok_and(|events| events.contains("populated 0"));
    wait::came_true(is_empty);
    if let Err(error) = fs::remove_dir(dir) {
        eprintln!("cannot remove {}: {error}", dir.display());
    }
}

/// Removes the control groups of test processes that have ended.
pub(crate) fn sweep() {
    for name in bed::names_in(&root()).filter(|name| bed::is_orphan(name)) {
        remove_tree(&root().join(name));
    }
}

fn remove_tree(dir: &Path) {
    for name in bed::names_in(dir).filter(|name| dir.join(name).is_dir()) {
        remove_tree(&dir.join(name));
    }
    remove(dir);
}
