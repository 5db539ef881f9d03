//! What the kernel knows of a TCP connection.

use std::mem;
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;

/// Segments this end has sent again since the connection began; 0 if the kernel does not say.
pub fn retransmits(stream: &TcpStream) -> u32 {
    // SAFETY: the type is plain integers, for which zero bits are a value.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `info`, both live until the call returns.
    let result = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &mut length)
    };
    if result == 0 { info.tcpi_total_retrans } else { 0 }
}
