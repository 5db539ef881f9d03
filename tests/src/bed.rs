//! What one test owns on the machine: a unique name, a directory, file systems mounted in it.
//!
//! Everything that outlives a process carries the name of its [`Bed`], which holds the process id: what a killed test run
//! left behind is removed by the next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Once};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{cgroup, netns};

static NUMBER: AtomicU32 = AtomicU32::new(0);
static SWEEP: Once = Once::new();

/// The characters of a test's name that go into the names of what it makes.
const NAME_LENGTH: usize = 40;

/// A test's place on the machine; dropped last, it removes its directory and what is mounted there.
#[derive(Debug)]
pub struct Bed {
    id: String,
    dir: PathBuf,
}

impl Bed {
    /// A fresh one, named after the running test. Panics without root.
    #[track_caller]
    pub fn new() -> Arc<Self> {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes network namespaces and needs root: sudo cargo xtask test"
        );
        SWEEP.call_once(sweep);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let id = format!("shunt-{}-p{}-{number}", test_name(), std::process::id());
        let dir = std::env::temp_dir().join(&id);
        fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("cannot create {}: {error}", dir.display()));
        Arc::new(Self { id, dir })
    }

    /// The beginning of every name this test gives, unique on the machine.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The test's own directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A directory below the test's own, made if it is not there.
    #[track_caller]
    pub fn subdir(&self, name: &str) -> PathBuf {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).unwrap_or_else(|error| panic!("cannot create {}: {error}", dir.display()));
        dir
    }

    /// A BPF file system of its own, mounted below the test's directory; what is pinned in it goes with it.
    #[track_caller]
    pub fn bpffs(&self, name: &str) -> PathBuf {
        let dir = self.subdir(name);
        mount(Some("bpf"), &dir, Some("bpf"), MsFlags::empty(), None::<&str>)
            .unwrap_or_else(|error| panic!("cannot mount a BPF file system at {}: {error}", dir.display()));
        dir
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if !keeps_remains() {
            remove_dir(&self.dir);
        }
    }
}

/// True if a failed test shall leave everything in place, for a person to look at: `SHUNT_TESTS_KEEP=1`.
pub(crate) fn keeps_remains() -> bool {
    thread::panicking() && std::env::var_os("SHUNT_TESTS_KEEP").is_some()
}

/// The running test's name, shortened to letters, digits, `_` and `.`.
fn test_name() -> String {
    let current = thread::current();
    let name = current.name().unwrap_or("thread").replace("::", ".");
    name.chars().filter(|c| c.is_ascii_alphanumeric() || "_.".contains(*c)).take(NAME_LENGTH).collect()
}

/// True for a name that a [`Bed`] of an ended process gave.
pub(crate) fn is_orphan(name: &str) -> bool {
    let mut fields = name.split('-');
    let is_ours = fields.next() == Some("shunt") && fields.next().is_some();
    let pid = fields.next().and_then(|field| field.strip_prefix('p')?.parse::<u32>().ok());
    is_ours && pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Removes what earlier runs left because they were killed.
fn sweep() {
    netns::sweep();
    cgroup::sweep();
    for name in names_in(&std::env::temp_dir()).filter(|name| is_orphan(name)) {
        remove_dir(&std::env::temp_dir().join(name));
    }
}

/// The names of the entries of a directory; none if it cannot be read.
pub(crate) fn names_in(dir: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok())
}

fn remove_dir(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // Later mounts may lie inside earlier ones.
    for point in
        mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).filter(|point| Path::new(point).starts_with(dir))
    {
        if let Err(error) = umount2(point, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {point}: {error}");
        }
    }
    if let Err(error) = fs::remove_dir_all(dir) {
        eprintln!("cannot remove {}: {error}", dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ended_processes_are_orphans() {
        // Process ids end at 4194304 (kernel, PID_MAX_LIMIT).
        assert!(is_orphan("shunt-bridge.drops-p4194305-0-node"));
        assert!(!is_orphan(&format!("shunt-x-p{}-0-node", std::process::id())));
        for foreign in ["shunt-x-4194305-0", "shunt-x", "other-x-p4194305-0", "shunt"] {
            assert!(!is_orphan(foreign), "{foreign}");
        }
    }
}
