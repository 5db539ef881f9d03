//! A cluster with an agent on each node, services with one backend each, clients of all kinds, and the counters that
//! their traffic must move.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};

use serde_json::Value;
use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Endpoint, Manifests, Service, service};
use shunt_tests::place::Place;
use shunt_tests::probe::{Answer, Failure};
use shunt_tests::topology::{Addrs, Cluster, Family, Node, Plan, SERVICES, VIPS};
use shunt_tests::traffic::{Ports, Server};
use shunt_tests::wait;

/// Where servers listen.
pub const TARGET: u16 = 8080;
/// Where services listen.
pub const PORT: u16 = 80;

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    Tcp,
    Udp,
}

impl Proto {
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// One conversation from `place` with whom it finds at `to`.
    #[track_caller]
    pub fn ask(self, place: &Place, to: SocketAddr) -> Result<Answer, Failure> {
        match self {
            Self::Tcp => place.tcp(to),
            Self::Udp => place.udp(to),
        }
    }
}

/// A cluster that is served.
#[derive(Debug)]
pub struct Rig {
    _servers: Vec<Server>,
    pub agents: Vec<Agent>,
    pub manifests: Manifests,
    pub cluster: Cluster,
}

impl Rig {
    /// Servers in all pods and on all nodes, an agent on each node; no service yet.
    #[track_caller]
    pub fn build(plan: Plan) -> Self {
        Self::build_with(plan, |agent| agent)
    }

    /// The same with options for the agents.
    #[track_caller]
    pub fn build_with(plan: Plan, options: impl Fn(Agent) -> Agent) -> Self {
        let cluster = Cluster::build(plan);
        let manifests = Manifests::of(&cluster);
        let ports = Ports { tcp: &[TARGET], udp: &[TARGET] };
        let places = cluster.pods().map(|pod| &pod.place).chain(cluster.nodes.iter().map(|node| &node.place));
        // Where they listen, no socket hook is asked: answers must not depend on it.
        let servers = places.map(|place| place.unhooked().serve(ports)).collect();
        let mut agents: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| options(Agent::new(&cluster, node).with("--manifests", manifests.dir())))
            .collect();
        agents.iter_mut().for_each(Agent::spawn);
        agents.iter().for_each(|agent| drop(agent.wait_log("first plan applied")));
        Self { _servers: servers, agents, manifests, cluster }
    }

    /// Writes services and waits until every node serves them.
    #[track_caller]
    pub fn apply(&self, services: &[&Service]) {
        services.iter().for_each(|service| self.manifests.apply(service));
        self.settle();
    }

    /// Waits until every node has taken in what was written before.
    #[track_caller]
    pub fn settle(&self) {
        static NUMBER: AtomicU16 = AtomicU16::new(0);
        let name = format!("settled-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let marker = service(&name).cluster_ips(SERVICES.host(60_000)).tcp(1, 1);
        let is_there = |agent: &Agent| {
            services_of(agent).iter().any(|row| row["name"].as_str().is_some_and(|row| row.contains(&name)))
        };
        // It may become visible with others of the same plan. Its removal is another plan, applied after that one.
        self.manifests.apply(&marker.endpoints(Vec::<Endpoint>::new()));
        self.agents.iter().for_each(|agent| wait::until("a service", || is_there(agent)));
        self.manifests.delete(&name);
        self.agents.iter().for_each(|agent| wait::until("the removal of a service", || !is_there(agent)));
    }

    pub fn node(&self, number: usize) -> &Node {
        &self.cluster.nodes[number]
    }

    /// Counters of the agent on a node.
    #[track_caller]
    pub fn counters(&self, node: usize) -> Counters {
        Counters::read(&self.agents[node])
    }

    /// What the counters of a node moved by while `work` ran.
    #[track_caller]
    pub fn counted<T>(&self, node: usize, work: impl FnOnce() -> T) -> (T, Counters) {
        let before = self.counters(node);
        let result = work();
        (result, self.counters(node).since(&before))
    }

    /// Packets that the firewall of a node called invalid; zero without such rules.
    pub fn invalid_packets(&self, node: usize) -> u64 {
        if !self.cluster.plan().drops_invalid {
            return 0;
        }
        let rules = self.node(node).place.ns().output(["nft", "-j", "list", "chain", "inet", "firewall", "forward"]);
        let rules: Value = serde_json::from_str(&rules).expect("nft prints JSON");
        let packets = rules["nftables"].as_array().expect("a list").iter().find_map(|rule| {
            rule["rule"]["expr"].as_array()?.iter().find_map(|expr| expr["counter"]["packets"].as_u64())
        });
        packets.expect("the rule counts")
    }
}

/// An agent whose programs run in filters, as on kernels without tcx.
pub fn by_filters(agent: Agent) -> Agent {
    agent.with("--attach", "clsact")
}

fn services_of(agent: &Agent) -> Vec<Value> {
    serde_json::from_str(&agent.shunt(["services", "-o", "json"])).expect("a list")
}

/// What a node's programs have counted, all services together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Conversations that the socket hooks sent to a backend.
    pub sockets: u64,
    /// Flows that packets opened and proved.
    pub flows: u64,
    /// Packets translated.
    pub packets: u64,
    /// New connections without a backend.
    pub refused: u64,
    /// Drops by reason, none that are zero.
    pub drops: BTreeMap<String, u64>,
}

impl Counters {
    #[track_caller]
    fn read(agent: &Agent) -> Self {
        let services = services_of(agent);
        let sum = |field: &str| services.iter().map(|row| row[field].as_u64().expect("a counter")).sum();
        let status: Value = serde_json::from_str(&agent.shunt(["status", "-o", "json"])).expect("an object");
        let drops = status["drops"].as_object().expect("drops by reason");
        let drops = drops.iter().map(|(reason, count)| (reason.clone(), count.as_u64().expect("a counter")));
        Self {
            sockets: sum("sockets"),
            flows: sum("flows"),
            packets: sum("packets"),
            refused: sum("refused"),
            drops: drops.filter(|(_, count)| *count > 0).collect(),
        }
    }

    fn since(&self, before: &Self) -> Self {
        let drops = self.drops.iter().map(|(reason, count)| (reason.clone(), count - before.drops(reason)));
        Self {
            sockets: self.sockets - before.sockets,
            flows: self.flows - before.flows,
            packets: self.packets - before.packets,
            refused: self.refused - before.refused,
            drops: drops.filter(|(_, count)| *count > 0).collect(),
        }
    }

    /// Drops for a reason.
    pub fn drops(&self, reason: &str) -> u64 {
        self.drops.get(reason).copied().unwrap_or_default()
    }
}

/// A service with every kind of frontend, both protocols, and a place among the others.
#[derive(Clone, Debug)]
pub struct Offer {
    number: u16,
    name: &'static str,
}

impl Offer {
    /// `number`, 1 to 99, tells its addresses and ports from those of others.
    pub const fn new(number: u16, name: &'static str) -> Self {
        Self { number, name }
    }

    pub fn cluster_ip(&self) -> Addrs {
        SERVICES.host(self.number)
    }

    pub fn external_ip(&self) -> Addrs {
        VIPS.host(self.number)
    }

    pub fn load_balancer(&self) -> Addrs {
        VIPS.host(100 + self.number)
    }

    pub const fn node_port(&self) -> u16 {
        30_000 + self.number
    }

    /// The service, without endpoints.
    pub fn service(&self) -> Service {
        self.service_to(TARGET)
    }

    /// The same for endpoints at another port.
    pub fn service_to(&self, target: u16) -> Service {
        service(self.name)
            .cluster_ips(self.cluster_ip())
            .external_ips(self.external_ip())
            .load_balancer(self.load_balancer())
            .tcp(PORT, target)
            .node_port(self.node_port())
            .udp(PORT, target)
            .node_port(self.node_port())
    }

    /// The service with one endpoint.
    pub fn to(&self, endpoint: impl Into<Endpoint>) -> Service {
        self.service().endpoints([endpoint.into()])
    }

    /// Where a frontend is; `node` has the NodePort.
    pub fn at(&self, frontend: Frontend, node: &Node, family: Family) -> SocketAddr {
        match frontend {
            Frontend::ClusterIp => self.cluster_ip().port(family, PORT),
            Frontend::External => self.external_ip().port(family, PORT),
            Frontend::LoadBalancer => self.load_balancer().port(family, PORT),
            Frontend::NodePort => node.addrs.port(family, self.node_port()),
        }
    }
}

/// Kinds of frontends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frontend {
    ClusterIp,
    NodePort,
    External,
    LoadBalancer,
}

impl Frontend {
    pub const ALL: [Self; 4] = [Self::ClusterIp, Self::NodePort, Self::External, Self::LoadBalancer];
}
