//! A node with an agent on files, pods that serve, and the kinds of sockets by which they are asked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Endpoint, Manifests, Service, service};
use shunt_tests::place::Place;
use shunt_tests::probe::{Answer, Failure, TcpLoop, TcpOnce, UdpLoop, UdpOnce, UdpSockets};
use shunt_tests::tables::Opened;
use shunt_tests::topology::{Addrs, Cluster, Family, Node, Plan, Pod, SERVICES};
use shunt_tests::traffic::{Ports, Server};

/// Where pods serve TCP.
pub const TCP_TARGET: u16 = 8080;
/// Where pods serve UDP.
pub const UDP_TARGET: u16 = 5353;
/// Where services listen, by TCP.
pub const TCP_PORT: u16 = 80;
/// Where services listen, by UDP.
pub const UDP_PORT: u16 = 53;

const SERVED: Ports<'_> = Ports { tcp: &[TCP_TARGET], udp: &[UDP_TARGET] };

/// A node that is served. Fields are dropped in this order.
#[derive(Debug)]
pub struct Rig {
    pub agent: Agent,
    pub servers: Vec<Server>,
    pub manifests: Manifests,
    pub cluster: Cluster,
}

impl Rig {
    /// One node with so many pods, all serving, and an agent that knows no service yet.
    #[track_caller]
    pub fn build(pods: u16) -> Self {
        Self::build_with(Plan { pods, ..Plan::default() }, |agent| agent)
    }

    /// The same on any cluster, with an agent that has more arguments. The agent is on the first node.
    #[track_caller]
    pub fn build_with(plan: Plan, arguments: impl FnOnce(Agent) -> Agent) -> Self {
        let cluster = Cluster::build(plan);
        let manifests = Manifests::of(&cluster);
        let servers = cluster.pods().map(|pod| pod.place.serve(SERVED)).collect();
        let mut agent = arguments(Agent::new(&cluster, &cluster.nodes[0]).with("--manifests", manifests.dir()));
        agent.start();
        Self { agent, servers, manifests, cluster }
    }

    /// The node of the agent.
    pub fn node(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    /// A pod of that node, counted from 0.
    pub fn pod(&self, index: usize) -> &Pod {
        &self.node().pods[index]
    }

    /// The pods of that node as endpoints.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.node().pods.iter().map(Endpoint::from).collect()
    }

    /// Who dials: a process of the node, and one of a pod.
    pub fn clients(&self) -> [&Place; 2] {
        [&self.node().place, &self.pod(0).place]
    }

    /// Writes a service whose endpoints are all used, and waits until it is programmed as written.
    #[track_caller]
    pub fn apply(&self, service: &Service) {
        self.manifests.apply(service);
        self.agent.wait_applied(service);
    }

    /// Writes the service `web`, which all pods of the node serve, and waits until it is programmed. Its addresses.
    #[track_caller]
    pub fn apply_web(&self) -> Addrs {
        self.apply(&web().endpoints(self.endpoints()));
        web_ip()
    }

    /// What `work` returns, and the connections that were opened meanwhile.
    #[track_caller]
    pub fn count<T>(&self, work: impl FnOnce() -> T) -> (T, Opened) {
        let before = self.agent.opened();
        let result = work();
        (result, self.agent.opened() - before)
    }
}

/// The ClusterIPs of [`web`].
pub fn web_ip() -> Addrs {
    SERVICES.host(10)
}

/// A service `web` with a TCP and a UDP port, without endpoints.
pub fn web() -> Service {
    plain("web", web_ip())
}

/// A service with a TCP and a UDP port, without endpoints.
pub fn plain(name: &str, cluster_ips: Addrs) -> Service {
    service(name).cluster_ips(cluster_ips).tcp(TCP_PORT, TCP_TARGET).udp(UDP_PORT, UDP_TARGET)
}

/// A way to open a socket and dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// TCP; connect returns at once, the outcome is polled for.
    Tcp,
    /// TCP; connect waits.
    TcpBlocking,
    /// TCP through an IPv6 socket, to an IPv4-mapped address.
    TcpMapped,
    /// Multipath TCP; the servers are of plain TCP.
    TcpMultipath,
    /// UDP, connected.
    UdpConnected,
    /// UDP, not connected.
    Udp,
    /// UDP, connected, to an IPv4-mapped address.
    UdpConnectedMapped,
    /// UDP, not connected, to an IPv4-mapped address.
    UdpMapped,
}

impl Socket {
    const ALL: [Self; 8] = [
        Self::Tcp,
        Self::TcpBlocking,
        Self::TcpMapped,
        Self::TcpMultipath,
        Self::UdpConnected,
        Self::Udp,
        Self::UdpConnectedMapped,
        Self::UdpMapped,
    ];

    /// Every socket of this kernel that can dial an address of a family, with that family.
    pub fn of_both_families() -> impl Iterator<Item = (Self, Family)> {
        let is_there = |socket: &Self| *socket != Self::TcpMultipath || Path::new("/proc/sys/net/mptcp").exists();
        let sockets = Self::ALL.into_iter().filter(is_there);
        let all = sockets.flat_map(|socket| Family::ALL.map(|family| (socket, family)));
        all.filter(|(socket, family)| !socket.is_mapped() || *family == Family::V4)
    }

    /// It is TCP.
    pub fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp | Self::TcpBlocking | Self::TcpMapped | Self::TcpMultipath)
    }

    /// It is connected before something is sent.
    pub fn is_connected(self) -> bool {
        self.is_tcp() || matches!(self, Self::UdpConnected | Self::UdpConnectedMapped)
    }

    fn is_mapped(self) -> bool {
        matches!(self, Self::TcpMapped | Self::UdpConnectedMapped | Self::UdpMapped)
    }

    /// What it shows as its peer after dialling. For Multipath TCP the kernel asks the hooks for the address of a path, and
    /// shows that of the connection: the two sockets share no memory.
    pub fn shown(self, dialled: SocketAddr, answer: &Answer) -> SocketAddr {
        if self == Self::TcpMultipath { answer.seen_server } else { dialled }
    }

    /// Where services listen for it.
    pub fn port(self) -> u16 {
        if self.is_tcp() { TCP_PORT } else { UDP_PORT }
    }

    /// Where pods listen for it.
    pub fn target(self) -> u16 {
        if self.is_tcp() { TCP_TARGET } else { UDP_TARGET }
    }

    /// The name of a service's port for it, as the tables show it.
    pub fn port_name(self) -> String {
        let proto = if self.is_tcp() { "tcp" } else { "udp" };
        format!("{proto}-{}", self.port())
    }

    /// One conversation with whoever answers at `to`.
    #[track_caller]
    pub fn ask(self, from: &Place, to: SocketAddr) -> Result<Answer, Failure> {
        self.ask_bound(from, to, None)
    }

    /// So many conversations, each by a new socket; every one of them gets its answer. Not for mapped ones.
    #[track_caller]
    pub fn ask_often(self, from: &Place, to: SocketAddr, count: u64) -> BTreeMap<String, u64> {
        let (to, count) = (vec![to], Some(count));
        let sockets = if self.is_connected() { UdpSockets::ConnectedEach } else { UdpSockets::UnconnectedEach };
        let mut load = match self {
            Self::Tcp => from.tcp_loop(TcpLoop { to, rate: 0, workers: 2, count }),
            Self::Udp | Self::UdpConnected => from.udp_loop(UdpLoop { to, rate: 0, workers: 2, count, sockets }),
            _ => panic!("{self:?} has no loop"),
        };
        load.wait_for("the last of them", |stats| Some(stats.sent) == count);
        load.finish_clean().by_server
    }

    /// One conversation by a socket that is bound first.
    #[track_caller]
    pub fn ask_bound(self, from: &Place, to: SocketAddr, bind: Option<SocketAddr>) -> Result<Answer, Failure> {
        let mapped = self.is_mapped();
        let tcp = TcpOnce { to, bind, mapped };
        let udp = UdpOnce { to: vec![to], bind, is_connected: self.is_connected(), mapped, payload: 100 };
        match self {
            Self::Tcp | Self::TcpMapped => from.tcp_with(tcp),
            Self::TcpBlocking => from.tcp_blocking(tcp),
            Self::TcpMultipath => from.tcp_multipath(tcp),
            _ => from.udp_with(udp).pop().expect("one destination has one outcome"),
        }
    }
}

/// A row of a case table, as it is shown when it fails.
pub fn case(from: &Place, socket: Socket, to: SocketAddr) -> String {
    format!("{socket:?} from {} to {to}", from.name())
}
