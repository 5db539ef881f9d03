//! The node, clients, backends and services that the tests of this suite share, in both families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use shunt_tests::nat::{At, Backend, Facts, Frontend, Prefix, Service, Set};
use shunt_tests::packet::proto;
use shunt_tests::topology::{Addrs, CLUSTER, Cidrs, FAR, Family, SERVICES, UNDERLAY, VIPS};

/// The port that every service has.
pub const PORT: u16 = 80;
/// The port that every backend listens on.
pub const TARGET: u16 = 8080;
/// A port that no frontend has.
pub const NO_PORT: u16 = 81;

/// Outside of the cluster.
pub fn outside(number: u16) -> Addrs {
    FAR.host(number)
}

/// The node itself.
pub fn node() -> Addrs {
    UNDERLAY.host(10)
}

/// A pod of the node, reached by its own device.
pub fn pod(number: u16) -> Addrs {
    CLUSTER_OF_NODE.host(9 + number)
}

/// A pod of another node, reached by `eth0`.
pub fn remote_pod(number: u16) -> Addrs {
    CLUSTER.host(256 * 77 + number)
}

/// Pods of the node.
const CLUSTER_OF_NODE: Cidrs = Cidrs {
    first: Addrs { v4: Ipv4Addr::new(10, 244, 1, 0), v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0) },
    v4_length: 24,
    v6_length: 64,
};

fn prefixes(cidrs: Cidrs) -> Vec<Prefix> {
    vec![
        Prefix { first: cidrs.first.v4.into(), bits: cidrs.v4_length },
        Prefix { first: cidrs.first.v6.into(), bits: cidrs.v6_length },
    ]
}

/// The node's address on its pods' links.
pub fn gateway() -> Addrs {
    CLUSTER_OF_NODE.host(1)
}

fn sources() -> Vec<(Prefix, IpAddr)> {
    let to_pods = prefixes(CLUSTER_OF_NODE).into_iter().zip([gateway().v4.into(), gateway().v6.into()]);
    let everywhere = [IpAddr::from([0; 4]), IpAddr::from([0; 16])].map(|first| Prefix { first, bits: 0 });
    to_pods.chain(everywhere.into_iter().zip([node().v4.into(), node().v6.into()])).collect()
}

/// What the node knows.
pub fn facts() -> Facts {
    Facts {
        cluster: prefixes(CLUSTER),
        pods: prefixes(CLUSTER_OF_NODE),
        services: prefixes(SERVICES),
        node: vec![node().v4.into(), node().v6.into(), gateway().v4.into(), gateway().v6.into()],
        sources: sources(),
        bridge: None,
        snat_ports: 10000..=29999,
        local_ports: 32768..=60999,
    }
}

/// The services, by name; each exists in both families, and for TCP and UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// One local backend.
    Local,
    /// One remote backend.
    Remote,
    /// Two local and two remote backends.
    Mixed,
    /// The same backend as `Local`, a second VIP for it.
    Twin,
    /// The same backend as `Remote`.
    RemoteTwin,
    /// Nobody.
    Empty,
    /// Remote backends only, and a local policy outside.
    LocalPolicy,
    /// As `Mixed`, but for its external address: [`allowed`] clients alone may dial that.
    Restricted,
}

/// A client outside, a pod, and pods 2 and 3 of other nodes.
pub fn allowed(family: Family) -> Vec<Prefix> {
    let host = if family == Family::V4 { 32 } else { 128 };
    let prefixes = [(outside(1), host), (pod(1), host), (remote_pod(2), host - 1)];
    prefixes.map(|(first, bits)| Prefix { first: first.get(family), bits }).into()
}

impl Name {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Local,
        Self::Remote,
        Self::Mixed,
        Self::Twin,
        Self::RemoteTwin,
        Self::Empty,
        Self::LocalPolicy,
        Self::Restricted,
    ];

    /// Its ClusterIP.
    pub fn cluster_ip(self) -> Addrs {
        SERVICES.host(10 + self as u16)
    }

    /// Its external address.
    pub fn vip(self) -> Addrs {
        VIPS.host(10 + self as u16)
    }

    /// Its NodePort.
    pub fn node_port(self) -> u16 {
        30000 + self as u16
    }

    /// Its frontends of a family: ClusterIP, external address, NodePort on the node's address.
    pub fn frontends(self, family: Family) -> [SocketAddr; 3] {
        let node_port = node().port(family, self.node_port());
        [self.cluster_ip().port(family, PORT), self.vip().port(family, PORT), node_port]
    }

    fn backends(self) -> Vec<(Addrs, bool)> {
        match self {
            Self::Local | Self::Twin => vec![(pod(1), true)],
            Self::Remote | Self::RemoteTwin | Self::LocalPolicy => vec![(remote_pod(1), false)],
            Self::Mixed | Self::Restricted => {
                vec![(pod(1), true), (remote_pod(1), false), (pod(2), true), (remote_pod(2), false)]
            }
            Self::Empty => vec![],
        }
    }

    fn service(self, family: Family, proto: u8) -> Service {
        let backend = |(addrs, is_local): (Addrs, bool)| Backend { addr: addrs.port(family, TARGET), is_local };
        let backends: Vec<_> = self.backends().into_iter().map(backend).collect();
        let local: Vec<_> = backends.iter().copied().filter(|backend| backend.is_local).collect();
        let set = |of: Vec<Backend>, otherwise| if of.is_empty() { otherwise } else { Set::Of(of) };
        let external = Frontend {
            at: At::Addr(self.vip().port(family, PORT)),
            is_cluster_ip: false,
            is_local_inside: false,
            is_local_outside: self == Self::LocalPolicy,
            is_restricted: self == Self::Restricted,
        };
        let cluster_ip = Frontend {
            at: At::Addr(self.cluster_ip().port(family, PORT)),
            is_cluster_ip: true,
            is_local_outside: false,
            is_restricted: false,
            ..external
        };
        let at = At::NodePort { is_v4: family == Family::V4, port: self.node_port() };
        let frontends = vec![cluster_ip, external, Frontend { at, is_restricted: false, ..external }];
        let sources = if self == Self::Restricted { allowed(family) } else { vec![] };
        Service { proto, frontends, cluster: set(backends, Set::Reject), local: set(local, Set::Drop), sources }
    }
}

/// All services of the node.
pub fn services() -> Vec<Service> {
    let mut services = Vec::new();
    for name in Name::ALL {
        for family in Family::ALL {
            for proto in [proto::TCP, proto::UDP] {
                services.push(name.service(family, proto));
            }
        }
    }
    services
}
