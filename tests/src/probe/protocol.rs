//! What clients and servers say to each other: one line a command, one line an answer.
//!
//! | command | answer |
//! |---|---|
//! | `who` | [`Identity`] as JSON |
//! | `seq N` | `N NAME` |
//! | `sink N`, then N bytes of [`pattern`] | `NAME`, or `NAME differs at POSITION` |
//! | `source N` | `NAME`, then N bytes of [`pattern`] |
//!
//! A UDP answer is an [`Identity`] as JSON, a line break, and the datagram itself.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// A server, and the two ends of the conversation as it sees them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    pub server: String,
    pub peer: SocketAddr,
    pub local: SocketAddr,
}

/// What a client was about when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Making or binding the socket.
    Socket,
    /// Connecting.
    Connect,
    /// Sending.
    Send,
    /// Waiting for the answer.
    Receive,
    /// The answer is not what it should be.
    Wrong,
}

/// Why one attempt failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whom it was for.
    pub to: SocketAddr,
    /// What the client was about.
    pub stage: Stage,
    /// The errno's name (`ECONNREFUSED`), `timeout`, `eof`, or what is wrong with the answer.
    pub reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.kind(), self.to)
    }
}

impl Failure {
    /// Stage and reason, as counted: `connect ECONNREFUSED`.
    pub fn kind(&self) -> String {
        let stage = match self.stage {
            Stage::Socket => "socket",
            Stage::Connect => "connect",
            Stage::Send => "send",
            Stage::Receive => "receive",
            Stage::Wrong => "wrong",
        };
        format!("{stage} {}", self.reason)
    }

    pub(super) fn wrong(to: SocketAddr, reason: impl Into<String>) -> Self {
        Self { to, stage: Stage::Wrong, reason: reason.into() }
    }

    /// For `map_err`: an I/O error of `stage` towards `to`.
    pub(super) fn at(stage: Stage, to: SocketAddr) -> impl Fn(io::Error) -> Self {
        move |error| Self { to, stage, reason: reason(&error) }
    }
}

/// A short name of an I/O error: of its errno, if it has one.
fn reason(error: &io::Error) -> String {
    match (error.kind(), error.raw_os_error()) {
        // What a read with a time limit gives.
        (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, _) => "timeout".into(),
        (io::ErrorKind::UnexpectedEof, _) => "eof".into(),
        (_, Some(code)) => format!("{:?}", Errno::from_raw(code)),
        _ => error.to_string(),
    }
}

/// An address without the IPv4-mapped form.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The address as an IPv6 socket dials it.
pub fn mapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), addr.port()),
        IpAddr::V6(_) => addr,
    }
}

/// Length of the repeated pattern: prime, so that a shift by any packet or page size shows.
const PATTERN_BYTES: usize = 65521;

/// The bytes that bulk transfers repeat.
pub fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // xorshift64 (Marsaglia 2003): noise that is the same everywhere.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..PATTERN_BYTES).map(|_| next()).collect()
}

/// Compares a stream, chunk by chunk, with the repeated pattern.
pub struct Checker {
    pattern: Vec<u8>,
    position: u64,
}

impl Checker {
    pub fn new() -> Self {
        Self { pattern: pattern(), position: 0 }
    }

    /// Takes the next bytes; the position of the first that differs as an error.
    pub fn take(&mut self, mut bytes: &[u8]) -> Result<(), u64> {
        while !bytes.is_empty() {
            let offset = (self.position % PATTERN_BYTES as u64) as usize;
            let length = bytes.len().min(PATTERN_BYTES - offset);
            let expected = &self.pattern[offset..offset + length];
            if &bytes[..length] != expected {
                let within = bytes.iter().zip(expected).take_while(|(a, b)| a == b).count();
                return Err(self.position + within as u64);
            }
            self.position += length as u64;
            bytes = &bytes[length..];
        }
        Ok(())
    }

    pub fn position(&self) -> u64 {
        self.position
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checker_finds_the_first_wrong_byte_across_the_seam() {
        let mut stream = pattern().repeat(3);
        let mut checker = Checker::new();
        for chunk in stream.chunks(1000) {
            checker.take(chunk).expect("the stream is the pattern");
        }
        assert_eq!(checker.position(), stream.len() as u64);
        stream[PATTERN_BYTES + 7] ^= 1;
        let mut checker = Checker::new();
        assert_eq!(checker.take(&stream), Err(PATTERN_BYTES as u64 + 7));
    }

    #[test]
    fn failures_are_counted_by_stage_and_errno() {
        let to = SocketAddr::from(([192, 0, 2, 1], 80));
        let refused = Failure::at(Stage::Connect, to)(io::Error::from_raw_os_error(libc::ECONNREFUSED));
        assert_eq!(refused.to_string(), "connect ECONNREFUSED to 192.0.2.1:80");
        assert_eq!(Failure::at(Stage::Receive, to)(io::ErrorKind::WouldBlock.into()).kind(), "receive timeout");
    }
}
