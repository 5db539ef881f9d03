//! Servers and load generators, as `shunt-probe` runs them. They never retry: each failure is reported with its errno.
//!
//! | job | does |
//! |---|---|
//! | [`Job::Serve`] | TCP and UDP servers that say who they are and whom they saw |
//! | [`Job::TcpOnce`], [`Job::TcpBlocking`], [`Job::TcpMultipath`], [`Job::UdpOnce`] | one conversation, every address of it reported |
//! | [`Job::TcpLoop`], [`Job::UdpLoop`] | new connections at a rate |
//! | [`Job::LongLived`] | connections that stay, each answer checked against its number |
//! | [`Job::Bulk`] | many bytes one way, each of them checked |
//! | [`Job::Survey`] | many destinations: who answers, or how it fails |
//!
//! May touch: sockets, standard input and output. Knows nothing of namespaces and topologies.

mod bulk;
mod client;
mod load;
mod protocol;
mod server;
mod survey;
mod tcp_info;
mod udp;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use client::{tcp_blocking, tcp_once};
pub use protocol::{Failure, Stage, pattern};
pub use udp::udp_once;

/// How long a connect, a read or a write may take before it counts as failed.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// What a probe is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Job {
    /// See [`Serve`].
    Serve(Serve),
    /// See [`TcpOnce`].
    TcpOnce(TcpOnce),
    /// See [`TcpOnce`]; the connect call waits. All others connect without blocking, and poll.
    TcpBlocking(TcpOnce),
    /// See [`TcpOnce`]; by a socket of Multipath TCP.
    TcpMultipath(TcpOnce),
    /// See [`UdpOnce`].
    UdpOnce(UdpOnce),
    /// See [`TcpLoop`].
    TcpLoop(TcpLoop),
    /// See [`UdpLoop`].
    UdpLoop(UdpLoop),
    /// See [`LongLived`].
    LongLived(LongLived),
    /// See [`Bulk`].
    Bulk(Bulk),
    /// See [`Survey`].
    Survey(Survey),
}

/// Servers, all answering with one name, until standard input ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Serve {
    /// What they answer.
    pub name: String,
    /// Where TCP servers listen; `[::]` serves both families.
    pub tcp: Vec<SocketAddr>,
    /// Where UDP servers listen; `[::]` serves both families.
    pub udp: Vec<SocketAddr>,
}

/// One TCP connection: who answers, and the addresses that both ends see.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TcpOnce {
    /// Whom to dial.
    pub to: SocketAddr,
    /// The address and port to bind to first.
    #[serde(default)]
    pub bind: Option<SocketAddr>,
    /// Dial an IPv4 address through an IPv6 socket, as an IPv4-mapped one.
    #[serde(default)]
    pub mapped: bool,
}

/// One UDP socket that sends to several destinations in turn and waits for each answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UdpOnce {
    /// Whom to send to; one datagram each, in this order.
    pub to: Vec<SocketAddr>,
    /// The address and port to bind to first.
    #[serde(default)]
    pub bind: Option<SocketAddr>,
    /// Connect the socket to each destination before sending.
    #[serde(default)]
    pub is_connected: bool,
    /// Use an IPv6 socket and IPv4-mapped addresses for IPv4.
    #[serde(default)]
    pub mapped: bool,
    /// Bytes to send, and to get back.
    #[serde(default)]
    pub payload: usize,
}

/// New TCP connections at a rate, each asking who answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TcpLoop {
    /// Whom to dial, in turn.
    pub to: Vec<SocketAddr>,
    /// Connections begun per second, all workers together; 0: one after the other without a pause.
    pub rate: u32,
    /// Connections open at a time, at most.
    pub workers: u32,
    /// End after so many; `None`: when standard input ends.
    pub count: Option<u64>,
}

/// Datagrams at a rate, each waiting for its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UdpLoop {
    /// Whom to send to, in turn.
    pub to: Vec<SocketAddr>,
    /// Datagrams per second, all workers together; 0: one after the other without a pause.
    pub rate: u32,
    /// Sockets in use at a time, at most.
    pub workers: u32,
    /// End after so many; `None`: when standard input ends.
    pub count: Option<u64>,
    /// Which sockets are used.
    pub sockets: UdpSockets,
}

/// Which sockets a [`UdpLoop`] uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UdpSockets {
    /// A new connected one for each datagram.
    ConnectedEach,
    /// A new unconnected one for each datagram.
    UnconnectedEach,
    /// One unconnected one per worker for all datagrams.
    UnconnectedKept,
    /// One connected one per worker; after a failure another.
    ConnectedKept,
}

/// TCP connections that stay open and exchange numbered lines; one that fails is not opened again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LongLived {
    /// Whom to dial.
    pub to: SocketAddr,
    /// How many connections.
    pub connections: u32,
    /// Milliseconds between two lines of one connection.
    pub interval_ms: u64,
}

/// One TCP connection that carries many bytes, each compared with what it should be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bulk {
    /// Whom to dial.
    pub to: SocketAddr,
    /// How many bytes.
    pub bytes: u64,
    /// Which way.
    pub direction: Direction,
}

/// Many destinations, asked side by side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Survey {
    /// Each gives one [`Met`].
    pub asks: Vec<Ask>,
}

/// Short conversations one after the other, each from a new socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ask {
    /// Whom to ask, in turn; at least one.
    pub to: Vec<SocketAddr>,
    /// By which protocol.
    pub proto: Proto,
    /// Ends when so many servers have answered. It ends at the first failure, too.
    pub enough: usize,
    /// Ends after so many.
    pub tries: usize,
}

/// The protocol of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proto {
    /// A connection.
    Tcp,
    /// A datagram of a connected socket, and its answer.
    Udp,
}

impl Proto {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];
}

/// What an [`Ask`] met.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Met {
    /// Who answered, and how.
    pub answers: BTreeSet<Sighting>,
    /// Failures by stage and errno, as in `connect ECONNREFUSED`.
    pub failures: BTreeSet<String>,
}

/// One way in which a conversation went well.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Sighting {
    /// The name of the server that answered.
    pub server: String,
    /// The client's address as the server sees it.
    pub source: IpAddr,
    /// The server's address as the client sees it, if it is not the one that was dialled.
    pub peer: Option<SocketAddr>,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// To the server.
    Up,
    /// From the server.
    Down,
}

/// A line that a probe prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// All servers of a [`Serve`] listen.
    Ready,
    /// One attempt of a load failed, now.
    Failed(Failure),
    /// Asked for, or at the end of a load.
    Stats(Stats),
    /// The outcome of a [`TcpOnce`].
    Tcp(Result<Answer, Failure>),
    /// The outcomes of a [`UdpOnce`], one a destination.
    Udp(Vec<Result<Answer, Failure>>),
    /// The outcome of a [`Bulk`].
    Bulk(Result<Transfer, Failure>),
    /// The outcomes of a [`Survey`], one an ask.
    Survey(Vec<Met>),
}

/// One conversation as both ends saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The name of the server that answered.
    pub server: String,
    /// The client's own address (getsockname).
    pub local: SocketAddr,
    /// The server's address as the client sees it: getpeername for TCP and connected UDP, the datagram's source otherwise.
    pub peer: SocketAddr,
    /// The client's address as the server sees it.
    pub seen_client: SocketAddr,
    /// The server's own address as the server sees it.
    pub seen_server: SocketAddr,
}

/// A finished [`Bulk`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Transfer {
    /// The name of the server at the other end.
    pub server: String,
    /// Bytes that arrived, all as sent.
    pub bytes: u64,
    /// From the first byte to the last.
    pub seconds: f64,
    /// Segments this end sent again.
    pub retransmits: u32,
}

/// What a load has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Attempts begun (connections of a loop, datagrams, lines of long-lived connections).
    pub sent: u64,
    /// Attempts that got the right answer.
    pub answered: u64,
    /// Attempts that failed, by stage and errno, as in `connect ECONNREFUSED`.
    pub failed: BTreeMap<String, u64>,
    /// Answers by the name of the server.
    pub by_server: BTreeMap<String, u64>,
    /// TCP connections in which this end had to send a segment again: loss that TCP would hide.
    pub retransmitted: u64,
    /// Long-lived connections that are open.
    pub open: u64,
}

impl Stats {
    /// All failures.
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }

    /// The sum of two loads.
    pub fn plus(mut self, other: &Self) -> Self {
        self.sent += other.sent;
        self.answered += other.answered;
        self.retransmitted += other.retransmitted;
        self.open += other.open;
        for (what, count) in &other.failed {
            *self.failed.entry(what.clone()).or_default() += count;
        }
        for (server, count) in &other.by_server {
            *self.by_server.entry(server.clone()).or_default() += count;
        }
        self
    }
}

/// Does `job` to its end and prints what it reports.
pub fn run(job: Job) {
    match job {
        Job::Serve(serve) => server::run(&serve),
        Job::TcpOnce(once) => load::print(&Report::Tcp(client::tcp_once(&once))),
        Job::TcpBlocking(once) => load::print(&Report::Tcp(client::tcp_blocking(&once))),
        Job::TcpMultipath(once) => load::print(&Report::Tcp(client::tcp_multipath(&once))),
        Job::UdpOnce(once) => load::print(&Report::Udp(udp::udp_once(&once))),
        Job::TcpLoop(tcp) => load::run(client::TcpAttempts::new(&tcp)),
        Job::UdpLoop(udp) => load::run(udp::UdpAttempts::new(&udp)),
        Job::LongLived(long) => load::run(client::Conversations::new(&long)),
        Job::Bulk(bulk) => load::print(&Report::Bulk(bulk::run(&bulk))),
        Job::Survey(survey) => survey::run(&survey),
    }
}
