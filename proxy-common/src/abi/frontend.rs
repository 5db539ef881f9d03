//! Frontends: what clients dial.

use super::abi;
use crate::addr::{Addr, Be16};

abi! {
    /// What clients dial. NodePorts are stored under the wildcard address of their family; a VIP for every port under port 0.
    pub struct FrontendKey [20] {
        /// VIP, or [`Addr::wildcard`].
        pub addr: Addr,
        /// Port, or zero for every port.
        pub port: Be16,
        /// [`crate::addr::Proto`] number.
        pub proto: u8,
        /// Zero.
        pub reserved: u8,
    }
}

abi! {
    /// The service port behind a frontend, and which of its two sets whom.
    pub struct FrontendValue [8] {
        /// Service id; never 0.
        pub service: u32,
        /// See the constants of this type.
        pub flags: u32,
    }
}

impl FrontendValue {
    /// Clients inside get the local set, not the cluster set.
    pub const INSIDE_LOCAL: u32 = 1;
    /// Clients outside get the local set, not the cluster set.
    pub const OUTSIDE_LOCAL: u32 = 1 << 1;
    /// A ClusterIP (the others are external: NodePort, externalIP, load-balancer address).
    pub const CLUSTER_IP: u32 = 1 << 2;
    /// Left to the packet path by the socket hooks.
    pub const PACKETS_ONLY: u32 = 1 << 3;
    /// Only clients in the service's source ranges may dial it (core/v1, loadBalancerSourceRanges).
    pub const RESTRICTED: u32 = 1 << 4;
    /// The node's own address is in none of those ranges: the socket hooks leave it alone for its processes too.
    pub const CLOSED_TO_NODE: u32 = 1 << 5;

    /// True if any of `flags` is set.
    #[inline(always)]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }
}
