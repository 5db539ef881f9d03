//! A service under test: its objects, and where clients dial it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::Value;
use shunt_tests::manifests::{Endpoint, Service, service};
use shunt_tests::probe::Proto;
use shunt_tests::topology::{Addrs, Cluster, Family, SERVICES, VIPS};

use crate::pair::{PORT, TARGET};

/// The first NodePort; the one of an offer is so many after it.
const NODE_PORTS: u16 = 30_000;

/// Where a service is dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// As it stands in the lists: `cluster-ip`, `node-port@node-1`, `load-balancer`.
    pub frontend: String,
    pub family: Family,
    pub proto: Proto,
    pub to: Vec<SocketAddr>,
    /// Of the node itself: nobody else can mean it.
    pub is_loopback: bool,
}

/// What is to be found out about one service.
#[derive(Clone, Debug)]
pub struct Offer {
    pub name: &'static str,
    pub service: Service,
    number: u16,
    /// How many servers may answer.
    pub servers: usize,
    /// Clients shall stay with one server, whichever it is.
    pub is_sticky: bool,
}

impl Offer {
    /// With every kind of frontend. `number`, 1 to 99, tells its addresses and ports from those of others.
    pub fn new(number: u16, name: &'static str) -> Self {
        let offer = Self { name, service: service(name), number, servers: 1, is_sticky: false };
        let all = service(name)
            .cluster_ips(offer.cluster_ip())
            .external_ips(offer.external_ip())
            .load_balancer(offer.load_balancer())
            .tcp(PORT, TARGET)
            .node_port(offer.node_port())
            .udp(PORT, TARGET)
            .node_port(offer.node_port());
        Self { service: all, ..offer }
    }

    pub fn with(self, change: impl FnOnce(Service) -> Service) -> Self {
        Self { service: change(self.service), ..self }
    }

    pub fn spec(self, field: &str, value: Value) -> Self {
        self.with(|service| service.spec(field, value))
    }

    pub fn to(self, endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        let endpoints: Vec<_> = endpoints.into_iter().collect();
        let servers = endpoints.len().max(1);
        Self { servers, ..self.with(|service| service.endpoints(endpoints)) }
    }

    pub fn cluster_ip(&self) -> Addrs {
        // The first is that of the service `kubernetes`.
        SERVICES.host(100 + self.number)
    }

    pub fn external_ip(&self) -> Addrs {
        VIPS.host(self.number)
    }

    pub fn load_balancer(&self) -> Addrs {
        VIPS.host(100 + self.number)
    }

    pub fn node_port(&self) -> u16 {
        NODE_PORTS + self.number
    }

    /// All frontends, by both protocols and families. A service without one of them has nobody there, which is a finding too.
    pub fn destinations(&self, cluster: &Cluster) -> Vec<Destination> {
        let mut found = Vec::new();
        for family in Family::ALL {
            let mut at = |frontend: &str, to: Vec<SocketAddr>, is_loopback: bool| {
                for proto in Proto::ALL {
                    found.push(Destination {
                        frontend: frontend.to_owned(),
                        family,
                        proto,
                        to: to.clone(),
                        is_loopback,
                    });
                }
            };
            let vips =
                [self.cluster_ip(), self.external_ip(), self.load_balancer()].map(|addrs| addrs.port(family, PORT));
            for (frontend, to) in ["cluster-ip", "external-ip", "load-balancer"].into_iter().zip(vips) {
                at(frontend, vec![to], false);
            }
            for node in &cluster.nodes {
                at(&format!("node-port@{}", node.name()), vec![node.addrs.port(family, self.node_port())], false);
            }
            at("node-port@loopback", vec![SocketAddr::new(loopback(family), self.node_port())], true);
            if self.is_sticky {
                at("any", vips.to_vec(), false);
            }
        }
        found
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
    }
}

/// A single place that no service of a list has, or has with other words.
pub fn place(frontend: &str, addrs: Addrs, port: u16) -> Vec<Destination> {
    let mut found = Vec::new();
    for family in Family::ALL {
        for proto in Proto::ALL {
            let to = vec![addrs.port(family, port)];
            found.push(Destination { frontend: frontend.to_owned(), family, proto, to, is_loopback: false });
        }
    }
    found
}
