//! Nodes, ServiceCIDRs, and what was read about this node elsewhere.

use ipnet::IpNet;
use proxy_common::addr::Addr;

use super::name::Name;
use super::service::ByFamily;

/// A node as its control plane knows it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// Label `topology.kubernetes.io/zone`, if not empty.
    pub zone: Option<Name>,
    /// spec.podCIDRs, host bits zero.
    pub pod_cidrs: Box<[IpNet]>,
    /// First InternalIP of each family, else the first ExternalIP.
    pub addresses: PrimaryAddresses,
    /// It is being deleted, or the cluster autoscaler is about to. What is programmed does not depend on it.
    pub is_leaving: bool,
}

/// One range of service addresses of the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceCidr {
    /// spec.cidrs, host bits zero.
    pub cidrs: Box<[IpNet]>,
}

/// The node's main address of each family.
pub type PrimaryAddresses = ByFamily<Option<Addr>>;

/// An address bound to a device of this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LocalAddress {
    /// The address.
    pub addr: Addr,
    /// Name of the device.
    pub device: Name,
}

/// Which of the node's addresses answer NodePorts (`--nodeport-addresses`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    /// The primary address of each family.
    #[default]
    Primary,
    /// Every address. (Loopback answers the node's own processes, whatever is chosen.)
    All,
    /// Addresses inside one of these. A family without a prefix here is not restricted.
    Within(Box<[IpNet]>),
}

/// What this node is, from configuration and netlink; an input like any other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeFacts {
    /// Its name in the control plane (`--node-name`).
    pub name: Name,
    /// `--cluster-cidr`: where pods have their addresses.
    pub cluster_cidrs: Box<[IpNet]>,
    /// Addresses bound to its devices, loopback included, IPv6 link-local left out; any order.
    pub addresses: Box<[LocalAddress]>,
    /// Primary addresses that configuration prescribes (`--node-ip`); they beat those of the Node object.
    pub prescribed: PrimaryAddresses,
    /// Primary addresses as routing sees them; used where the Node object names none.
    pub routed: PrimaryAddresses,
    /// Which addresses answer NodePorts.
    pub node_ports: NodePortAddresses,
}

impl NodeFacts {
    /// A node of which only the name is known.
    pub fn named(name: Name) -> Self {
        Self {
            name,
            cluster_cidrs: Box::default(),
            addresses: Box::default(),
            prescribed: ByFamily::default(),
            routed: ByFamily::default(),
            node_ports: NodePortAddresses::default(),
        }
    }
}
