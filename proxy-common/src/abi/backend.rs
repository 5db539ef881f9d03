//! Backends by id.

use super::abi;
use crate::addr::{Addr, Be16};

abi! {
    /// One backend. Memory-mapped by userspace: a new one is written with state 0 first, its state last.
    pub struct BackendRecord [24] {
        /// Where packets go.
        pub addr: Addr,
        /// Where packets go.
        pub port: Be16,
        /// [`crate::addr::Proto`] number.
        pub proto: u8,
        /// One of the `STATE_` constants.
        pub state: u8,
        /// See the flags of this type.
        pub flags: u32,
    }
}

impl BackendRecord {
    /// Nothing is stored under this id, or the backend is gone.
    pub const STATE_NONE: u8 = 0;
    /// Listed by its service.
    pub const STATE_LIVE: u8 = 1;
    /// The backend runs on this node: replies return by themselves.
    pub const LOCAL: u32 = 1;

    /// True while the backend is listed; a cheap test for packets of a known flow.
    #[inline(always)]
    pub const fn is_live(&self) -> bool {
        self.state != Self::STATE_NONE
    }

    /// True if the backend runs on this node.
    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        self.flags & Self::LOCAL != 0
    }
}
