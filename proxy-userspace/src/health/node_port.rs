//! Health-check NodePorts: how many endpoints of a service this node has, as external load balancers ask for it
//! (healthCheckNodePort, for services of type LoadBalancer with externalTrafficPolicy Local).
//!
//! Status 200 if there is a ready one and the proxy is healthy, else 503; the rest is kube-proxy's answer to the letter,
//! for any path and method. A port is opened on the addresses that answer NodePorts, and on loopback, in the families in
//! which its service is served. Like kube-proxy, a family counts its own endpoints.
//!
//! What is told follows the tables, never ahead of them. "Healthy" is the word of `/healthz` without the node's
//! eligibility: a node that is about to go drains by `/healthz` alone. That includes what kube-proxy leaves out, the first
//! full load.
//!
//! A port that cannot be had (something on this node listens there) is the problem of its service alone: shown, and tried
//! again. May touch: its sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use hyper::header::{HeaderName, HeaderValue};
use imbl::ordmap::DiffItem;
use proxy_common::addr::{Addr, Port};
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::{Health, status_code};
use crate::drain::{self, Drain};
use crate::model::{Family, ServiceKey};
use crate::planner::{HealthCheck, HealthChecks};
use crate::telemetry::event::notice::Alarm;
use crate::telemetry::http::{Answer, BIND_RETRY, Handler, Question, Server};

/// After the first failure; doubled up to [`BIND_RETRY`]. A port that changes hands is free a moment later, and so is an
/// IPv6 address that the kernel has yet to see unused.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// Connections that may wait to be accepted, as many as Go and std allow.
const BACKLOG: i32 = 4096;
/// What load balancers that weigh nodes read.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// Why a service's health is not served at an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// Which service.
    pub service: ServiceKey,
    /// Where.
    pub address: SocketAddr,
    /// The kernel's answer.
    pub error: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (port, address, error) = (self.address.port(), self.address, &self.error);
        write!(f, "healthCheckNodePort {port}: cannot listen on {address} ({error}); it is tried again")
    }
}

/// All of them.
pub type Refusals = BTreeMap<SocketAddr, Refusal>;

/// What kube-proxy answers.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceHealth<'a> {
    service: ServiceName<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct ServiceName<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// The answer for a service with so many endpoints here.
fn answer(service: &ServiceKey, local_endpoints: usize, service_proxy_healthy: bool) -> Answer {
    let name = ServiceName { namespace: service.namespace.as_str(), name: service.name.as_str() };
    let health = ServiceHealth { service: name, local_endpoints, service_proxy_healthy };
    let mut body = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut body, PrettyFormatter::with_indent(b"\t"));
    health.serialize(&mut serializer).expect("strings, numbers and booleans have a JSON form");
    let body = String::from_utf8(body).expect("JSON is UTF-8");
    let status = status_code(local_endpoints > 0 && service_proxy_healthy);
    Answer { header: Some((WEIGHT, HeaderValue::from(local_endpoints))), ..Answer::json(status, body) }
}

/// Who answers at a port in one family.
struct Probe {
    port: Port,
    family: Family,
    checks: watch::Receiver<HealthChecks>,
    health: Arc<Health>,
}

impl Probe {
    fn check(&self) -> Option<Arc<HealthCheck>> {
        self.checks.borrow().by_port.get(&self.port).cloned()
    }
}

impl Handler for Probe {
    fn takes(&self, _: &Method) -> bool {
        true
    }

    async fn answer(&self, _: Question<'_>) -> Answer {
        match self.check() {
            Some(check) => {
                let count = check.local_endpoints.get(self.family).unwrap_or_default();
                answer(&check.service, count, self.health.is_healthy())
            }
            // The listener is about to close.
            None => Answer::text(status_code(false), "the service is gone\n"),
        }
    }
}

/// A socket that gets the connections to an address of its own family only.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // The wildcard of IPv4 has a socket of its own.
        socket.set_only_v6(true)?;
    }
    // Connections of an earlier listener may still be ending.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// One address of one port.
struct Listener {
    address: SocketAddr,
    probe: Arc<Probe>,
    refusals: watch::Sender<Refusals>,
}

impl Listener {
    async fn run(self, mut drain: Drain) {
        let bound = tokio::select! {
            listener = self.bind() => Some(listener),
            () = drain.wait() => None,
        };
        let was_refused = self.refusals.send_if_modified(|refusals| refusals.remove(&self.address).is_some());
        let Some(listener) = bound else { return };
        match was_refused {
            true => info!(address = %self.address, "listening on a healthCheckNodePort at last"),
            false => debug!(address = %self.address, "listening on a healthCheckNodePort"),
        }
        // The address is there: there is nothing to tell.
        let (name, address, alarm) = ("health-check NodePort", self.address, Alarm::default());
        Server { name, address, handler: self.probe, alarm }.serve(listener, drain).await;
    }

    async fn bind(&self) -> TcpListener {
        let mut wait = FIRST_RETRY;
        loop {
            match listen(self.address) {
                Ok(listener) => return listener,
                Err(error) => self.note(&error),
            }
            sleep(wait).await;
            wait = (2 * wait).min(BIND_RETRY);
        }
    }

    /// Shows that the address cannot be had; tells it once for each cause.
    fn note(&self, error: &io::Error) {
        let Some(check) = self.probe.check() else { return };
        let refusal = Refusal { service: check.service.clone(), address: self.address, error: error.to_string() };
        let is_new = self.refusals.send_if_modified(|refusals| {
            let known = refusals.insert(self.address, refusal.clone());
            known.as_ref() != Some(&refusal)
        });
        if is_new {
            let Refusal { service, address, error } = refusal;
            let port = address.port();
            warn!(%service, port, %address, error, "cannot listen on a healthCheckNodePort, trying again");
        }
    }
}

/// All health-check NodePorts, as a part of the agent.
pub struct Task {
    checks: watch::Receiver<HealthChecks>,
    health: Arc<Health>,
    refusals: watch::Sender<Refusals>,
    /// What the listeners are for.
    known: HealthChecks,
    open: BTreeMap<(Port, Addr), drain::Trigger>,
    listeners: JoinSet<()>,
}

impl Task {
    /// Follows `checks`; what they call healthy is the word of `health`.
    pub fn new(checks: watch::Receiver<HealthChecks>, health: Arc<Health>) -> Self {
        Self {
            checks,
            health,
            refusals: watch::Sender::default(),
            known: HealthChecks::default(),
            open: BTreeMap::new(),
            listeners: JoinSet::new(),
        }
    }

    /// Which addresses cannot be had.
    pub fn refusals(&self) -> watch::Receiver<Refusals> {
        self.refusals.subscribe()
    }

    /// Serves until the drain; requests under way are answered then.
    pub async fn run(mut self, mut drain: Drain) {
        let mut is_followed = true;
        self.checks.mark_changed();
        loop {
            tokio::select! {
                changed = self.checks.changed(), if is_followed => match changed {
                    Ok(()) => self.follow(),
                    // The reconciler has ended. What it told last holds until the agent is gone.
                    Err(_) => is_followed = false,
                },
                Some(_) = self.listeners.join_next() => {}
                () = drain.wait() => break,
            }
        }
        self.open.clear();
        while self.listeners.join_next().await.is_some() {}
    }

    /// Opens and closes what differs; the work is in proportion to that.
    fn follow(&mut self) {
        let next = self.checks.borrow_and_update().clone();
        for port in changed_ports(&self.known, &next) {
            self.settle(port, &next);
        }
        self.known = next;
    }

    fn settle(&mut self, port: Port, next: &HealthChecks) {
        let wanted: BTreeSet<Addr> = next.addresses_of(port).collect();
        let of_port = (port, Addr::default())..;
        let open = self.open.range(of_port).map(|(key, _)| *key).take_while(|(other, _)| *other == port);
        let stale: Vec<_> = open.filter(|(_, addr)| !wanted.contains(addr)).collect();
        for key in stale {
            self.open.remove(&key);
        }
        for addr in wanted {
            if !self.open.contains_key(&(port, addr)) {
                let trigger = self.start(port, addr);
                self.open.insert((port, addr), trigger);
            }
        }
    }

    fn start(&mut self, port: Port, addr: Addr) -> drain::Trigger {
        let (checks, health) = (self.checks.clone(), self.health.clone());
        let probe = Probe { port, family: Family::of(&addr), checks, health };
        let address = SocketAddr::new(IpAddr::from(addr), port.0);
        let listener = Listener { address, probe: Arc::new(probe), refusals: self.refusals.clone() };
        let (trigger, drain) = drain::channel();
        self.listeners.spawn(listener.run(drain));
        trigger
    }
}

/// Ports that may need other sockets than before.
fn changed_ports(old: &HealthChecks, new: &HealthChecks) -> BTreeSet<Port> {
    if old.addresses != new.addresses {
        return old.by_port.keys().chain(new.by_port.keys()).copied().collect();
    }
    let port = |item| match item {
        DiffItem::Add(port, _) | DiffItem::Remove(port, _) => *port,
        DiffItem::Update { new: (port, _), .. } => *port,
    };
    old.by_port.diff(&new.by_port).map(port).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;
    use crate::datapath::progress::Progress;
    use crate::health::Watched;
    use crate::model::{ByFamily, Name, NodeFacts, Snapshot, SourceId};

    fn service() -> ServiceKey {
        ServiceKey { source: SourceId::Kubernetes, namespace: Name::from("shop"), name: Name::from("web") }
    }

    #[test]
    fn only_a_healthy_proxy_with_endpoints_gets_traffic() {
        for (count, is_healthy, status) in [(3, true, 200), (0, true, 503), (3, false, 503), (0, false, 503)] {
            let answer = answer(&service(), count, is_healthy);
            assert_eq!(answer.status.as_u16(), status);
            assert_eq!(answer.header, Some((WEIGHT, HeaderValue::from(count))), "whatever the status");
            let body = format!(
                "{{\n\t\"service\": {{\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t}},\n\
                 \t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {is_healthy}\n}}"
            );
            assert_eq!(answer.body, body);
        }
    }

    fn checks(counts: &[(u16, usize)], addresses: &[&str]) -> HealthChecks {
        let check = |count| HealthCheck { service: service(), local_endpoints: ByFamily { v4: Some(count), v6: None } };
        let by_port = counts.iter().map(|(port, count)| (Port(*port), Arc::new(check(*count))));
        let addresses = addresses.iter().map(|text| text.parse::<IpAddr>().unwrap().into());
        HealthChecks { by_port: by_port.collect(), addresses: addresses.collect() }
    }

    #[test]
    fn what_does_not_differ_is_not_looked_at() {
        let old = checks(&[(1, 0), (2, 0), (3, 0)], &["192.0.2.1"]);
        let mut new = old.clone();
        assert!(new.is_same(&old));
        new.by_port.extend(checks(&[(2, 5), (4, 0)], &[]).by_port);
        new.by_port.remove(&Port(3));
        assert!(!new.is_same(&old));
        let ports = |old, new| changed_ports(old, new).into_iter().map(|port| port.0).collect::<Vec<_>>();
        assert_eq!(ports(&old, &new), [2, 3, 4]);
        let moved = HealthChecks { addresses: checks(&[], &["192.0.2.2"]).addresses, ..new.clone() };
        assert_eq!(ports(&new, &moved), [1, 2, 4]);
    }

    async fn ask(address: SocketAddr) -> String {
        let mut stream = loop {
            match TcpStream::connect(address).await {
                Ok(stream) => break stream,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        stream.write_all(b"DELETE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_last_word_of_the_reconciler_is_answered_until_the_agent_is_gone() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (sender, receiver) = watch::channel(checks(&[(free.port(), 1)], &["127.0.0.1"]));
        let (_status, status) = watch::channel(Arc::default());
        let (_attached, attached) = watch::channel(true);
        let (_progress, progress) = watch::channel(Progress::default());
        let facts = Arc::new(NodeFacts::named(Name::from("n")));
        let (_snapshots, snapshots) = watch::channel(Arc::new(Snapshot::empty(facts, [])));
        let (trigger, drain) = drain::channel();
        let watched = Watched { snapshots, status, progress, attached, drain: drain.clone() };
        let health = Health::new(watched, true, false);
        let task = tokio::spawn(Task::new(receiver, Arc::new(health)).run(drain));
        assert!(ask(free).await.contains("X-Load-Balancing-Endpoint-Weight: 1\r\n"));
        sender.send_replace(checks(&[(free.port(), 2)], &["127.0.0.1"]));
        drop(sender);
        assert!(ask(free).await.contains("X-Load-Balancing-Endpoint-Weight: 2\r\n"));
        trigger.begin();
        task.await.unwrap();
        listen(free).expect("the port is free");
    }
}
