//! What an agent's tables say, as `shunt services -o json` tells it: with the agent running or without.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use serde_json::Value;

use crate::agent::Agent;
use crate::manifests::Service;
use crate::topology::Family;
use crate::wait;

/// A service port of one family.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ServicePort {
    /// As in `manifests/default/web:tcp-80/TCP/IPv4`.
    pub name: String,
    /// Who takes the connections of clients that are not bound to local endpoints.
    pub cluster: Set,
    /// Who takes those of the others.
    pub local: Set,
    /// Connections that the socket hooks opened.
    pub sockets: u64,
    /// Connections that packets opened.
    pub flows: u64,
    /// Packets translated, both directions.
    pub packets: u64,
    /// Connections that found no backend.
    pub refused: u64,
}

/// A set of endpoints, or what clients get because it is empty.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Set {
    /// As in `10.244.1.10:8080/TCP`.
    Endpoints(Vec<String>),
    /// `reject` or `drop`.
    Empty(String),
}

impl Set {
    /// The endpoints; none if it is empty.
    pub fn endpoints(&self) -> &[String] {
        match self {
            Self::Endpoints(endpoints) => endpoints,
            Self::Empty(_) => &[],
        }
    }

    /// The addresses of its endpoints.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        let address = |text: &String| Some(text.split_once('/')?.0.parse::<SocketAddr>().ok()?.ip());
        self.endpoints().iter().filter_map(address).collect()
    }

    /// True if `endpoint` is in it.
    pub fn has(&self, endpoint: SocketAddr) -> bool {
        let with_proto = format!("{endpoint}/");
        self.endpoints().iter().any(|text| text.starts_with(&with_proto))
    }
}

/// What went through some services together, by the hook that took it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Connections that the socket hooks opened.
    pub sockets: u64,
    /// Connections that packets opened, and that were answered.
    pub flows: u64,
    /// Packets translated.
    pub packets: u64,
    /// Connections that found no backend.
    pub refused: u64,
}

impl std::ops::Sub for Opened {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            sockets: self.sockets - earlier.sockets,
            flows: self.flows - earlier.flows,
            packets: self.packets - earlier.packets,
            refused: self.refused - earlier.refused,
        }
    }
}

impl Agent {
    /// All service ports that are programmed on its node.
    #[track_caller]
    pub fn services(&self) -> Vec<ServicePort> {
        let text = self.shunt(["services", "-o", "json"]);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("`shunt services` cannot be read: {error}\n{text}"))
    }

    /// The ports of the service `default/SERVICE`, both families.
    #[track_caller]
    pub fn ports_of(&self, service: &str) -> Vec<ServicePort> {
        let begin = format!("manifests/default/{service}:");
        self.services().into_iter().filter(|port| port.name.starts_with(&begin)).collect()
    }

    /// The service port `default/SERVICE:PORT`, where PORT is named as in `tcp-80`; `None` if it is not programmed.
    #[track_caller]
    pub fn port_of(&self, service: &str, port: &str, family: Family) -> Option<ServicePort> {
        let begin = format!("{port}/");
        let end = if family == Family::V4 { "/IPv4" } else { "/IPv6" };
        let is_it = |name: &str| name.split_once(':').is_some_and(|(_, rest)| rest.starts_with(&begin));
        self.ports_of(service).into_iter().find(|port| is_it(&port.name) && port.name.ends_with(end))
    }

    /// What went through all services on its node so far. A service takes its counts with it when it goes.
    #[track_caller]
    pub fn opened(&self) -> Opened {
        self.services().iter().fold(Opened::default(), |sum, port| Opened {
            sockets: sum.sockets + port.sockets,
            flows: sum.flows + port.flows,
            packets: sum.packets + port.packets,
            refused: sum.refused + port.refused,
        })
    }

    /// Waits until every port of a service, both families, is as `is_so` says.
    #[track_caller]
    pub fn wait_service(&self, service: &str, what: &str, is_so: impl Fn(&ServicePort) -> bool) {
        wait::until(&format!("{service} with {what}"), || {
            let ports = self.ports_of(service);
            !ports.is_empty() && ports.iter().all(&is_so)
        });
    }

    /// Waits until the endpoints of a service, all of them ready and used, are programmed, and no others.
    #[track_caller]
    pub fn wait_applied(&self, service: &Service) {
        let objects = service.objects();
        let name = objects[0]["metadata"]["name"].as_str().expect("a service has a name").to_owned();
        let listed = objects[1..].iter().flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        let text = |endpoint: &Value| endpoint["addresses"][0].as_str().map(str::to_owned);
        let wanted: BTreeSet<IpAddr> = listed.filter_map(text).filter_map(|addr| addr.parse().ok()).collect();
        self.wait_service(&name, "its endpoints", |port| {
            let is_v4 = port.name.ends_with("/IPv4");
            let of_family = wanted.iter().filter(|addr| addr.is_ipv4() == is_v4);
            port.cluster.addresses() == of_family.copied().collect()
        });
    }

    /// Waits until nothing at this address is a backend any more: sockets that stay with theirs have left it then.
    #[track_caller]
    pub fn wait_backend_gone(&self, addr: SocketAddr) {
        let text = format!("\"{addr}/");
        wait::until(&format!("the end of backend {addr}"), || !self.shunt(["backends", "-o", "json"]).contains(&text));
    }

    /// Waits until a service has so many endpoints for clients of the cluster.
    #[track_caller]
    pub fn wait_endpoints(&self, service: &str, count: usize) {
        self.wait_service(service, &format!("{count} endpoints"), |port| port.cluster.endpoints().len() == count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_lists_or_say_why_they_are_empty() {
        let set: Set = serde_json::from_str(r#"["10.0.0.1:80/TCP", "[fd00::1]:80/TCP"]"#).expect("a list");
        assert!(set.has("10.0.0.1:80".parse().expect("an address")));
        assert!(set.has("[fd00::1]:80".parse().expect("an address")));
        assert_eq!(set.addresses().len(), 2);
        assert!(!set.has("10.0.0.1:8".parse().expect("an address")));
        let set: Set = serde_json::from_str(r#""reject""#).expect("a word");
        assert_eq!(set, Set::Empty("reject".to_owned()));
        assert!(set.endpoints().is_empty());
    }
}
