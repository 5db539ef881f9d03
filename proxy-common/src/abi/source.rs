//! Source ranges: who may dial the restricted frontends of a service (core/v1, loadBalancerSourceRanges).

use super::abi;
use crate::addr::Addr;

abi! {
    /// A prefix of allowed client addresses, as a longest-prefix-match trie takes it.
    pub struct SourceRangeKey [24] {
        /// Leading bits of `range` that count: see [`SourceRangeKey::new`].
        pub bits: u32,
        /// What they are of.
        pub range: SourceRange,
    }
}

abi! {
    /// What of the key is matched; all of `service` always is.
    pub struct SourceRange [20] {
        /// Service id.
        pub service: u32,
        /// First address of the prefix, host bits zero; or the address that is looked up.
        pub addr: Addr,
    }
}

impl SourceRangeKey {
    /// The first `length` bits of an address as it lies in the table, 0 to 128: an IPv4 address has 96 more than its own.
    pub const fn new(service: u32, addr: Addr, length: u32) -> Self {
        Self { bits: u32::BITS + length, range: SourceRange { service, addr } }
    }

    /// What was given to [`Self::new`]; 0 if it cannot have been.
    pub const fn length(&self) -> u32 {
        self.bits.saturating_sub(u32::BITS)
    }
}
