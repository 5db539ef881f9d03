//! Session affinity: which backend a client of a service had last.

use super::abi;

abi! {
    /// A client of a service port; shared by all frontends of the port.
    pub struct AffinityKey [24] {
        /// The client's address for packets; the network namespace cookie in the first two words for sockets.
        pub client: [u32; 4],
        /// Service id.
        pub service: u32,
        /// 0: `client` is an address, 1: a namespace cookie.
        pub is_cookie: u32,
    }
}

abi! {
    /// The backend last used, and when.
    pub struct AffinityValue [8] {
        /// Backend id.
        pub backend: u32,
        /// [`crate::lb::flow::Seconds`] of the newest connection.
        pub seen: u32,
    }
}
