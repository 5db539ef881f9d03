//! Other network namespaces: what is attached by netlink can be taken off only from within its own.
//!
//! May touch: namespaces that processes of this machine run in, or that are bound where `ip netns` binds them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::sys;

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
    let entered = File::open(path).and_then(|file| sys::enter_netns(&file));
    entered.and_then(|()| sys::netns_cookie()).is_ok_and(|found| found == cookie)
}
