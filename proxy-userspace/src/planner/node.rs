//! This node as planning needs it: zone, addresses, which of them answer NodePorts, prefixes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::address::AddressClass;
use proxy_common::abi::config::{Cidr, MAX_CIDRS};
use proxy_common::addr::Addr;

use super::plan::Cidrs;
use crate::model::{ByFamily, Endpoint, Family, Name, NodeFacts, NodePortAddresses, Snapshot};

/// What plans depend on, of the node they are for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeView {
    /// Its name.
    pub name: Name,
    /// Its zone.
    pub zone: Option<Name>,
    /// Addresses bound to its devices that packets can be sent to, and their class: NODE, NODE_PORT for some.
    pub addresses: BTreeMap<Addr, u32>,
    /// Where a socket listens that is reached as NodePorts are: the wildcard of a family in which every address answers
    /// them, else those that do; and loopback.
    pub node_port_sockets: Arc<[Addr]>,
    /// Its main address of each family.
    pub primary: ByFamily<Option<Addr>>,
    /// Prefixes for the configuration.
    pub cidrs: Cidrs,
    /// Prefixes that did not fit into it: kind and number.
    pub cidrs_left_out: Vec<(&'static str, usize)>,
}

impl NodeView {
    /// The node of a snapshot.
    pub fn of(snapshot: &Snapshot) -> Self {
        let mut left_out = Vec::new();
        let own = snapshot.own_node();
        let mut fit = |what, cidrs: Vec<Cidr>| fit(what, cidrs, &mut left_out);
        let service = snapshot.service_cidrs.values().flat_map(|object| object.cidrs.iter());
        let cidrs = Cidrs {
            service: fit("ServiceCIDRs", records(service)),
            cluster: fit("cluster CIDRs", records(snapshot.facts.cluster_cidrs.iter())),
            pod: fit("pod CIDRs", records(own.iter().flat_map(|node| node.pod_cidrs.iter()))),
        };
        Self {
            name: snapshot.facts.name.clone(),
            zone: own.and_then(|node| node.zone.clone()),
            addresses: address_classes(snapshot),
            node_port_sockets: node_port_sockets(snapshot),
            primary: ByFamily { v4: primary(snapshot, Family::V4), v6: primary(snapshot, Family::V6) },
            cidrs,
            cidrs_left_out: left_out,
        }
    }

    /// True if the endpoint runs here: its node name says so, or, without one, its address is bound here.
    pub fn is_local(&self, endpoint: &Endpoint) -> bool {
        match &endpoint.node {
            Some(node) => *node == self.name,
            None => self.addresses.contains_key(&endpoint.addr),
        }
    }

    /// True if every plan may differ between the two.
    pub fn plans_differ(&self, other: &Self) -> bool {
        (&self.name, &self.zone, self.primary) != (&other.name, &other.zone, other.primary)
    }

    /// Addresses that only one of the two has: plans differ by endpoints without a node name that have one of them.
    pub fn other_addresses<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = Addr> + 'a {
        let only =
            |a: &'a Self, b: &'a Self| a.addresses.keys().filter(|addr| !b.addresses.contains_key(addr)).copied();
        only(self, other).chain(only(other, self))
    }
}

/// Prefixes as records, each once, in order.
fn records<'a>(cidrs: impl Iterator<Item = &'a IpNet>) -> Vec<Cidr> {
    let mut nets: Vec<IpNet> = cidrs.map(IpNet::trunc).collect();
    nets.sort();
    nets.dedup();
    nets.iter().map(record).collect()
}

/// The record of a prefix; the mask of an IPv4 prefix covers the mapped part too.
pub fn record(net: &IpNet) -> Cidr {
    let mask = match net {
        IpNet::V4(v4) => Addr([u32::MAX, u32::MAX, u32::MAX, Addr::from(v4.netmask()).v4_word()]),
        IpNet::V6(v6) => Addr::from(v6.netmask()),
    };
    Cidr { addr: Addr::from(net.network()), mask }
}

fn fit(what: &'static str, mut cidrs: Vec<Cidr>, left_out: &mut Vec<(&'static str, usize)>) -> Vec<Cidr> {
    if cidrs.len() > MAX_CIDRS {
        left_out.push((what, cidrs.len() - MAX_CIDRS));
        cidrs.truncate(MAX_CIDRS);
    }
    cidrs
}

/// Classes of the node's addresses. Loopback is left to the socket hooks (every network namespace has its own), and
/// IPv6 link-local addresses pass without look-up.
fn address_classes(snapshot: &Snapshot) -> BTreeMap<Addr, u32> {
    let local = snapshot.facts.addresses.iter().map(|local| local.addr);
    let usable = local.filter(|addr| !addr.is_loopback() && !addr.is_v6_link_local());
    let class = |addr: Addr| match answers_node_ports(snapshot, &addr) {
        true => (addr, AddressClass::NODE | AddressClass::NODE_PORT),
        false => (addr, AddressClass::NODE),
    };
    usable.map(class).collect()
}

/// True if NodePorts are served on this address of the node.
fn answers_node_ports(snapshot: &Snapshot, addr: &Addr) -> bool {
    let family = Family::of(addr);
    match &snapshot.facts.node_ports {
        NodePortAddresses::All => true,
        NodePortAddresses::Primary => primary(snapshot, family).as_ref() == Some(addr),
        NodePortAddresses::Within(nets) => {
            let mut same_family = of_family(nets, family).peekable();
            same_family.peek().is_none() || same_family.any(|net| record(net).contains(addr))
        }
    }
}

/// True if NodePorts are served on every address of a family, those to come included.
fn is_unrestricted(node_ports: &NodePortAddresses, family: Family) -> bool {
    match node_ports {
        NodePortAddresses::All => true,
        NodePortAddresses::Primary => false,
        NodePortAddresses::Within(nets) => {
            let mut same_family = of_family(nets, family).peekable();
            same_family.peek().is_none() || same_family.any(|net| net.prefix_len() == 0)
        }
    }
}

fn of_family(nets: &[IpNet], family: Family) -> impl Iterator<Item = &IpNet> {
    nets.iter().filter(move |net| Family::of(&net.addr().into()) == family)
}

/// A family without any address has no sockets.
fn node_port_sockets(snapshot: &Snapshot) -> Arc<[Addr]> {
    let sockets = |family: Family| {
        let bound = snapshot.facts.addresses.iter().map(|local| local.addr);
        let bound = bound.filter(|addr| Family::of(addr) == family && !addr.is_v6_link_local());
        match is_unrestricted(&snapshot.facts.node_ports, family) {
            true => bound.map(|addr| addr.wildcard()).collect::<BTreeSet<_>>(),
            false => bound.filter(|addr| addr.is_loopback() || answers_node_ports(snapshot, addr)).collect(),
        }
    };
    Family::ALL.into_iter().flat_map(sockets).collect()
}

/// The main address of a family: as configured, else as the Node object says, else as routing sees it.
fn primary(snapshot: &Snapshot, family: Family) -> Option<Addr> {
    let facts: &NodeFacts = &snapshot.facts;
    let object = snapshot.own_node().and_then(|node| *node.addresses.get(family));
    facts.prescribed.get(family).or(object).or(*facts.routed.get(family))
}
