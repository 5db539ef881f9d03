//! What the programs tell `shunt monitor`, while somebody watches.

use super::abi;
use crate::addr::{Addr, Be16};

/// What happened.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    /// A process dialled a frontend and goes to a backend.
    Socket = 0,
    /// A UDP socket whose datagrams to a frontend went to one backend goes to another.
    SocketMoved,
    /// A process dialled a frontend and was refused.
    SocketRefused,
    /// A packet opened a flow.
    Flow,
    /// A packet was dropped or refused.
    Drop,
}

impl EventKind {
    /// All of them, by number.
    pub const ALL: [Self; 5] = [Self::Socket, Self::SocketMoved, Self::SocketRefused, Self::Flow, Self::Drop];

    /// As bit of [`Watch::kinds`].
    #[inline(always)]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}

abi! {
    /// One event.
    pub struct EventRecord [112] {
        /// CLOCK_MONOTONIC_COARSE, nanoseconds.
        pub time: u64,
        /// Who dialled; of sockets unspecified, they have no address yet.
        pub client: Addr,
        /// What was dialled.
        pub frontend: Addr,
        /// Who serves it, or unspecified.
        pub backend: Addr,
        /// The rewritten source, or unspecified.
        pub nat: Addr,
        /// Name of the process, filled up with zeros; empty for packets.
        pub comm: [u8; 16],
        /// Port of `client`.
        pub client_port: Be16,
        /// Port of `frontend`.
        pub frontend_port: Be16,
        /// Port of `backend`.
        pub backend_port: Be16,
        /// [`crate::addr::Proto`] number.
        pub proto: u8,
        /// [`EventKind`] number.
        pub kind: u8,
        /// Service id; 0 of sockets and of what is refused, where the program does not know it.
        pub service: u32,
        /// [`crate::verdict::DropReason`] number, of drops and refusals.
        pub reason: u32,
        /// Interface index, of packets.
        pub ifindex: u32,
        /// Process id, of sockets.
        pub process: u32,
    }
}

abi! {
    /// What is told: nothing, unless somebody has said lately that he watches.
    pub struct Watch [32] {
        /// Told until this second ([`crate::lb::flow::Seconds`]).
        pub until: u32,
        /// Bits of [`EventKind`].
        pub kinds: u32,
        /// Only what has this address at one of its ends; unspecified: everything.
        pub addr: Addr,
        /// Zero.
        pub reserved: u32,
        /// Events that found no room since this was set, about.
        pub lost: u32,
    }
}

impl Watch {
    /// True if an event with these ends is wanted.
    #[inline(always)]
    pub fn wants(&self, event: &EventRecord) -> bool {
        self.addr == Addr::UNSPECIFIED_V6
            || self.addr == event.client
            || self.addr == event.frontend
            || self.addr == event.backend
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_wanted_at_any_end() {
        let at = |last: u32| Addr([0, 0, 0xffff_0000, last]);
        let event = EventRecord { client: at(1), frontend: at(2), backend: at(3), ..EventRecord::ZERO };
        assert!(Watch::ZERO.wants(&event));
        for last in 1..=4 {
            assert_eq!(Watch { addr: at(last), ..Watch::ZERO }.wants(&event), last != 4, "{last}");
        }
    }
}
