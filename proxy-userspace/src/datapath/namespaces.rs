//! The network namespaces that processes of this node are in.
//!
//! Found by /proc: so the agent has to see the node's processes (hostPID in a pod). A namespace in which no process lives has no
//! sockets of a process that was started there; one that a process opened elsewhere and took along is not found.
//! What is attached to a device by netlink can be taken off only from within the device's own: [`within`].
//! May touch: /proc/PID/ns/net, and where `ip netns` binds namespaces; the namespace of the calling thread.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::sys;

/// One namespace, and processes in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its inode number.
    inode: u64,
    /// Any of them shows the way.
    paths: Vec<PathBuf>,
}

/// Every namespace once, that of the calling thread first; and whether most processes may not be asked for theirs (a few that
/// are guarded in some way are nothing to worry about).
pub fn list(proc: &Path) -> io::Result<(Vec<Namespace>, bool)> {
    let mut found: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    let (mut seen, mut denied) = (0, 0);
    for entry in fs::read_dir(proc)? {
        let name = entry?.file_name();
        if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let path = proc.join(name).join("ns/net");
        match fs::metadata(&path) {
            Ok(metadata) => {
                seen += 1;
                found.entry(metadata.ino()).or_default().push(path);
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => denied += 1,
            // A process may end at any moment, and one that is ending has no namespace.
            Err(_) => {}
        }
    }
    let own = own(proc).ok();
    let rank = |inode: u64| (own.as_ref().is_none_or(|own| own.inode != inode), inode);
    let mut all: Vec<_> = found.into_iter().map(|(inode, paths)| Namespace { inode, paths }).collect();
    all.sort_by_key(|namespace| rank(namespace.inode));
    Ok((all, denied > seen))
}

/// That of the calling thread.
fn own(proc: &Path) -> io::Result<Namespace> {
    let path = proc.join("thread-self/ns/net");
    Ok(Namespace { inode: fs::metadata(&path)?.ino(), paths: vec![path] })
}

impl Namespace {
    /// The directories of /proc of its processes.
    pub fn processes(&self) -> impl Iterator<Item = &Path> {
        self.paths.iter().filter_map(|path| path.parent()?.parent())
    }

    /// Moves the calling thread there. False if no process is in it any more.
    pub fn enter(&self) -> io::Result<bool> {
        for path in &self.paths {
            let Ok(file) = File::open(path) else { continue };
            // The number may be another process's by now.
            if file.metadata().is_ok_and(|metadata| metadata.ino() == self.inode) {
                return sys::enter_netns(file.as_fd()).map(|()| true);
            }
        }
        Ok(false)
    }
}

/// Where `ip netns` binds namespaces.
const BOUND: &str = "/run/netns";

/// What `work` returns, run in the network namespace with this cookie; none if there is no such namespace, or none that can be
/// seen from here.
pub fn within<T: Send>(cookie: u64, work: impl FnOnce() -> T + Send) -> io::Result<Option<T>> {
    if sys::netns_cookie()? == cookie {
        return Ok(Some(work()));
    }
    // A thread of its own: it enters one after the other, and never comes back.
    std::thread::scope(|scope| {
        let search = std::thread::Builder::new().name("namespace".to_owned()).spawn_scoped(scope, || {
            let found = candidates().into_iter().find(|path| is_entered(path, cookie));
            found.map(|_| work())
        })?;
        Ok(search.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Files that stand for namespaces.
fn candidates() -> Vec<PathBuf> {
    let list = |directory: &str| fs::read_dir(directory).into_iter().flatten().flatten();
    let of_processes = list("/proc").map(|process| process.path().join("ns/net"));
    list(BOUND).map(|bound| bound.path()).chain(of_processes).collect()
}

/// Enters a namespace; true if it is the wanted one.
fn is_entered(path: &Path, cookie: u64) -> bool {
    // A process may have ended, a file may be no namespace.
    let entered = File::open(path).and_then(|file| sys::enter_netns(file.as_fd()));
    entered.and_then(|()| sys::netns_cookie()).is_ok_and(|found| found == cookie)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_of_this_thread_is_found_once_and_comes_first() {
        let proc = Path::new("/proc");
        let (own, (all, _)) = (own(proc).unwrap(), list(proc).unwrap());
        assert_eq!(all[0].inode, own.inode);
        assert_eq!(all.iter().filter(|namespace| namespace.inode == own.inode).count(), 1);
        let mine = proc.join(std::process::id().to_string()).join("ns/net");
        assert!(all[0].paths.contains(&mine), "{:?}", all[0]);
    }

    #[test]
    fn a_namespace_whose_processes_have_ended_is_not_entered() {
        let gone = Namespace { inode: 1, paths: vec!["/proc/0/ns/net".into(), "/proc/self/ns/net".into()] };
        assert!(!gone.enter().unwrap());
    }
}
