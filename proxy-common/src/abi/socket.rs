//! What the socket hooks must undo; it dies with the socket.

use super::abi;
use crate::addr::{Addr, Be16};

abi! {
    /// One translation of a socket.
    pub struct SocketEntry [44] {
        /// What the application dialled.
        pub frontend: Addr,
        /// Where it was sent.
        pub backend: Addr,
        /// Port of `frontend`.
        pub frontend_port: Be16,
        /// Port of `backend`.
        pub backend_port: Be16,
        /// The fingerprint of the service's sets when the backend was last known to be in them, with its lowest bit set; 0: no
        /// entry.
        pub stamp: u32,
        /// Backend id.
        pub backend_id: u32,
    }
}

/// Frontends that one unconnected UDP socket can talk to before the oldest is forgotten.
pub const SOCKET_ENTRIES: usize = 8;

abi! {
    /// Translations of an unconnected UDP socket.
    pub struct SocketTable [356] {
        /// Used entries have a stamp.
        pub entries: [SocketEntry; SOCKET_ENTRIES],
        /// Position of the entry that is replaced next.
        pub next: u32,
    }
}
