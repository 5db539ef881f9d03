//! Where a process runs: a network namespace and a control group.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::process::Command;

/// A namespace and a control group under a name. Cheap to clone: clones share both.
#[derive(Clone, Debug)]
pub struct Place {
    name: String,
    ns: Arc<Netns>,
    cgroup: Option<Arc<Cgroup>>,
}

impl Place {
    /// A place whose processes run in `ns` and, if one is given, in `cgroup`.
    pub fn new(name: &str, ns: Arc<Netns>, cgroup: Option<Arc<Cgroup>>) -> Self {
        Self { name: name.to_owned(), ns, cgroup }
    }

    /// Its name; servers started here answer with it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    pub fn ns(&self) -> &Arc<Netns> {
        &self.ns
    }

    /// Its control group.
    pub fn cgroup(&self) -> Option<&Arc<Cgroup>> {
        self.cgroup.as_ref()
    }

    /// The same namespace outside the control group: sockets made there meet no socket hook.
    pub fn unhooked(&self) -> Self {
        Self { cgroup: None, ..self.clone() }
    }

    /// The same namespace and group under another name.
    pub fn named(&self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self.clone() }
    }

    /// What `work` returns, run by a thread in the namespace. The thread stays in the test's control group, so what it
    /// opens meets no socket hook of this place.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.ns.run(work)
    }

    /// A command to be run here.
    #[track_caller]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.ns.command(program);
        if let Some(cgroup) = &self.cgroup {
            cgroup.join(&mut command);
        }
        command
    }
}
