//! What addresses and ports are used for, counted over all users, and what the tables say of them.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use proxy_common::abi::address::{AddressClass, PORT_WORDS, PortUse, PortWord, port_index};
use proxy_common::addr::{Addr, Port};

/// Ports for rewritten sources (`--snat-ports`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnatPorts(pub RangeInclusive<u16>);

impl SnatPorts {
    /// The SNAT bits of one word.
    pub fn word(&self, index: u32) -> u64 {
        let ports = (index * 32..(index + 1) * 32).map(|port| port as u16);
        let bits = ports.filter(|port| self.0.contains(port)).map(|port| PortUse::SNAT << port_index(Port(port)).1);
        bits.fold(0, |word, bit| word | bit)
    }
}

/// The SNAT bits of all ports of a word.
const SNAT_BITS: u64 = 0xaaaa_aaaa_aaaa_aaaa;
const _: () = assert!(SNAT_BITS & 0b11 == PortUse::SNAT);

/// Users of one address, and its class in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct AddressUse {
    /// Frontends with this address.
    pub frontends: u32,
    /// ClusterIPs among them.
    pub cluster_ips: u32,
    /// Frontends of it that stand for every port.
    pub any_ports: u32,
    /// Backends with this address.
    pub backends: u32,
    /// NODE and NODE_PORT, or zero.
    pub node: u32,
    /// Flags in the table; 0: no entry.
    pub programmed: u32,
}

impl AddressUse {
    /// The flags its users want.
    fn wanted(&self) -> u32 {
        let flag = |count: u32, flag: u32| if count > 0 { flag } else { 0 };
        let flags = self.node
            | flag(self.frontends, AddressClass::FRONTEND)
            | flag(self.cluster_ips, AddressClass::CLUSTER_IP)
            | flag(self.any_ports, AddressClass::ANY_PORT)
            | flag(self.backends, AddressClass::BACKEND);
        without_cluster_ip_on_node(flags)
    }

    /// The flags it should have in the end: flows to an address that was a frontend or backend may live on.
    fn target(&self) -> u32 {
        let wanted = self.wanted();
        let lost = self.programmed & !wanted & (AddressClass::FRONTEND | AddressClass::BACKEND) != 0;
        let lingers = lost || self.programmed & AddressClass::FLOWS != 0;
        wanted | if lingers { AddressClass::FLOWS } else { 0 }
    }
}

/// An address of this node is never rejected on unknown ports, whatever else it is.
const fn without_cluster_ip_on_node(flags: u32) -> u32 {
    if flags & AddressClass::NODE != 0 { flags & !AddressClass::CLUSTER_IP } else { flags }
}
