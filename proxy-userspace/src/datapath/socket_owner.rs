//! What the hooks keep with sockets, by way of the processes that hold them.
//!
//! The kernel lists the storage of TCP sockets only (`inet_sk_diag_fill` of net/ipv4/inet_diag.c leaves out what comes last for
//! sockets without a connection's state; Linux 6.18). Whoever has a descriptor of a socket can read its storage, and the agent
//! takes one for a moment (pidfd_getfd, Linux 5.6), of those sockets alone that are connected to a backend in question.
//! May touch: /proc/PID/fd, descriptors of other processes, socket storage for reading.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use proxy_common::abi::socket::SocketEntry;

use super::sys;

/// Entries by the socket's cookie.
pub type Entries = BTreeMap<u64, SocketEntry>;

/// The storage entries of sockets (`wanted`: inode number to cookie) that one of these processes holds; each is a directory of
/// /proc. What ends meanwhile is passed over. With the last refusal, if there was one: it takes CAP_SYS_PTRACE.
pub fn entries<'a>(
    processes: impl IntoIterator<Item = &'a Path>,
    wanted: &BTreeMap<u32, u64>,
    storage: BorrowedFd<'_>,
) -> (Entries, Option<io::Error>) {
    let (mut found, mut seen, mut refused) = (Entries::new(), BTreeSet::new(), None);
    for process in processes {
        if seen.len() == wanted.len() {
            break;
        }
        match of_process(process, wanted, storage, &mut seen, &mut found) {
            Ok(()) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => refused = Some(error),
        }
    }
    (found, refused)
}

fn of_process(
    process: &Path,
    wanted: &BTreeMap<u32, u64>,
    storage: BorrowedFd<'_>,
    seen: &mut BTreeSet<u64>,
    found: &mut Entries,
) -> io::Result<()> {
    let mut handle: Option<OwnedFd> = None;
    for entry in fs::read_dir(process.join("fd"))? {
        let entry = entry?;
        let Some(inode) = fs::read_link(entry.path()).ok().and_then(|link| parse_socket(link.to_str()?)) else {
            continue;
        };
        let Some(cookie) = wanted.get(&inode).filter(|cookie| !seen.contains(cookie)) else { continue };
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if handle.is_none() {
            handle = Some(open(process)?);
        }
        let Some(handle) = &handle else { continue };
        let socket = match sys::take_descriptor(handle.as_fd(), number) {
            Ok(socket) => socket,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        // The number may be another socket's by now, or no socket's.
        if !sys::socket_cookie(socket.as_fd()).is_ok_and(|found| found == *cookie) {
            continue;
        }
        seen.insert(*cookie);
        let mut value = [SocketEntry::ZERO];
        if sys::map_lookup(storage, &socket.as_raw_fd(), &mut value)? {
            found.insert(*cookie, value[0]);
        }
    }
    Ok(())
}

fn open(process: &Path) -> io::Result<OwnedFd> {
    let id = process.file_name().and_then(|name| name.to_str()?.parse().ok());
    sys::open_process(id.ok_or(io::ErrorKind::NotFound)?)
}

/// The inode number in `socket:[1234]`.
fn parse_socket(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// A process or a descriptor has ended.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EBADF))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_sockets_tell_their_inode() {
        assert_eq!(parse_socket("socket:[4026]"), Some(4026));
        for other in ["pipe:[4026]", "socket:[]", "socket:[4026", "/dev/null"] {
            assert_eq!(parse_socket(other), None, "{other}");
        }
    }
}
