//! The destination class: the one small look-up that traffic which is not ours pays.

use super::abi;
use crate::addr::Port;

abi! {
    /// What this node knows about an address: an or of the flags below.
    pub struct AddressClass [4] {
        /// See the constants of this type.
        pub flags: u32,
    }
}

impl AddressClass {
    /// Some frontend has exactly this address.
    pub const FRONTEND: u32 = 1;
    /// A ClusterIP: unknown ports of it are rejected. Never set together with [`Self::NODE`].
    pub const CLUSTER_IP: u32 = 1 << 1;
    /// Bound to a device of this node.
    pub const NODE: u32 = 1 << 2;
    /// Matches the NodePort wildcard; implies [`Self::NODE`].
    pub const NODE_PORT: u32 = 1 << 3;
    /// Address of some backend.
    pub const BACKEND: u32 = 1 << 4;
    /// Flows to it are looked up although no frontend has it (any more): a removed VIP, or a backend that a clash made an alias for.
    pub const FLOWS: u32 = 1 << 5;
    /// Answers on every port: its frontends are stored under port 0.
    pub const ANY_PORT: u32 = 1 << 6;

    /// True if any of `flags` is set.
    #[inline(always)]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }
}

abi! {
    /// What 32 consecutive ports of this node's addresses are used for, two bits a port, lowest port in the lowest bits.
    pub struct PortWord [8] {
        /// See [`port_index`] and [`PortUse`].
        pub bits: u64,
    }
}

/// Words of the `ports` array.
pub const PORT_WORDS: u32 = 65536 / 32;

/// What a port of this node's addresses may carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortUse(pub u64);

impl PortUse {
    /// A NodePort is programmed on it.
    pub const NODE_PORT: u64 = 1;
    /// Replies to a rewritten source may arrive on it.
    pub const SNAT: u64 = 2;

    /// True if any of `uses` is set.
    #[inline(always)]
    pub const fn has(&self, uses: u64) -> bool {
        self.0 & uses != 0
    }
}

/// Words of the `kept_ports` array that hold marks: four bits a port, its [`PortUse`] in each of two generations. One more
/// word says in which of them (0 or 1) marks are set. Marks of either count; the agent turns the generation, carries over
/// what flows still use, and clears the other one: no mark is missing at any moment.
pub const KEPT_WORDS: u32 = 65536 / 16;

/// Bits from the uses of a port in generation 0 to those in generation 1.
pub const KEPT_GENERATION: u32 = 2;

/// Position of a port in the `kept_ports` array: word, and shift of its uses in generation 0.
#[inline(always)]
pub const fn kept_index(port: Port) -> (u32, u32) {
    (port.0 as u32 >> 4, (port.0 as u32 & 15) << 2)
}

/// Position of a port in the `ports` array: word and shift.
#[inline(always)]
pub const fn port_index(port: Port) -> (u32, u32) {
    (port.0 as u32 >> 5, (port.0 as u32 & 31) << 1)
}
