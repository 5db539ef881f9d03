//! A file that nobody can open for now.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

/// uapi/asm-generic/fcntl.h
const F_SETSIG: libc::c_int = 10;

/// Holds up whoever opens a file until it is dropped (fcntl(2), file leases; the kernel gives up after
/// /proc/sys/fs/lease-break-time, 45 s).
#[derive(Debug)]
pub struct Lease {
    _file: File,
}

impl Lease {
    /// Of a file that nobody has open.
    #[track_caller]
    pub fn on(path: &Path) -> Self {
        let open = || {
            let file = File::open(path)?;
            // The default signal would end the process; this one is ignored.
            // SAFETY: both commands take an integer, and the descriptor is open.
            let result = unsafe {
                libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG)
                    | libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK)
            };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(Self { _file: file }) }
        };
        open().unwrap_or_else(|error| panic!("cannot hold {}: {error}", path.display()))
    }
}
