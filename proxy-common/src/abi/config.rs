//! What the programs know about this node: one record, rewritten as a whole.

use super::abi;
use crate::addr::Addr;
use crate::lb::flow::Seconds;

/// Prefixes of one kind that fit into [`Config`].
pub const MAX_CIDRS: usize = 8;

abi! {
    /// An address prefix; an address is inside if `addr & mask == self.addr`. Mask all ones in the IPv4-mapped part for IPv4.
    pub struct Cidr [32] {
        /// First address, host bits zero.
        pub addr: Addr,
        /// Mask in wire order.
        pub mask: Addr,
    }
}

impl Cidr {
    /// True if `addr` is inside. A zero record (unused) contains nothing but `::`.
    #[inline(always)]
    pub const fn contains(&self, addr: &Addr) -> bool {
        let (a, m, n) = (&addr.0, &self.mask.0, &self.addr.0);
        (a[0] & m[0]) ^ n[0] | (a[1] & m[1]) ^ n[1] | (a[2] & m[2]) ^ n[2] | (a[3] & m[3]) ^ n[3] == 0
    }
}

abi! {
    /// Configuration of the programs.
    pub struct Config [816] {
        /// Key of the pick hash; drawn once and kept over restarts, so that picks are stable.
        pub hash_key: [u64; 2],
        /// SO_NETNS_COOKIE of the node's network namespace.
        pub node_netns: u64,
        /// See the flags of this type.
        pub flags: u32,
        /// First port used for rewritten sources, host order.
        pub snat_first: u16,
        /// Last port used for rewritten sources, host order.
        pub snat_last: u16,
        /// First port of net.ipv4.ip_local_port_range, host order.
        pub local_first: u16,
        /// Last port of net.ipv4.ip_local_port_range, host order.
        pub local_last: u16,
        /// How many of `service_cidrs` count.
        pub service_cidr_count: u8,
        /// How many of `cluster_cidrs` count.
        pub cluster_cidr_count: u8,
        /// How many of `pod_cidrs` count.
        pub pod_cidr_count: u8,
        /// Zero.
        pub reserved: u8,
        /// Until this second ([`Seconds`]) flows are neither opened nor removed: the tables are being handed over to another
        /// layout. Zero otherwise. It ends by itself, so that an agent that dies meanwhile leaves nobody waiting.
        pub settles_at: u32,
        /// Zero.
        pub unused: u32,
        /// ServiceCIDRs of the cluster.
        pub service_cidrs: [Cidr; MAX_CIDRS],
        /// `--cluster-cidr`.
        pub cluster_cidrs: [Cidr; MAX_CIDRS],
        /// Pod CIDRs of this node.
        pub pod_cidrs: [Cidr; MAX_CIDRS],
    }
}

impl Config {
    /// Socket hooks serve the node's own namespace only (`--socket-lb host`).
    pub const SOCKETS_HOST_ONLY: u32 = 1;
    /// Socket hooks serve nobody (`--socket-lb off`).
    pub const SOCKETS_OFF: u32 = 1 << 1;
    /// Whoever dials a ClusterIP is seen by the backend as this node (`--masquerade-all`).
    pub const MASQUERADE_ALL: u32 = 1 << 2;

    /// True while flows are neither opened nor removed.
    #[inline(always)]
    pub const fn is_settling(&self, now: Seconds) -> bool {
        now.0 < self.settles_at
    }

    /// True if any of `flags` is set.
    #[inline(always)]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }

    /// True if `addr` lies in a ServiceCIDR.
    #[inline(always)]
    pub fn is_service_address(&self, addr: &Addr) -> bool {
        contains(&self.service_cidrs, self.service_cidr_count, addr)
    }

    /// True if `addr` lies in `--cluster-cidr`.
    #[inline(always)]
    pub fn is_cluster_address(&self, addr: &Addr) -> bool {
        contains(&self.cluster_cidrs, self.cluster_cidr_count, addr)
    }

    /// True if `addr` lies in a pod CIDR of this node.
    #[inline(always)]
    pub fn is_own_pod_address(&self, addr: &Addr) -> bool {
        contains(&self.pod_cidrs, self.pod_cidr_count, addr)
    }
}

#[inline(always)]
fn contains(cidrs: &[Cidr; MAX_CIDRS], count: u8, addr: &Addr) -> bool {
    for (position, cidr) in cidrs.iter().enumerate() {
        if position >= count as usize {
            return false;
        }
        if cidr.contains(addr) {
            return true;
        }
    }
    false
}
