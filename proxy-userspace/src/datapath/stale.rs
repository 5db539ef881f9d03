//! Ends connections whose endpoint is gone: sockets that went through a frontend which does not lead there any more.
//!
//! | what | when | who is told |
//! |---|---|---|
//! | UDP, packets | with the next one (`lb::packet`, `lb::socket`) | nobody: it goes to another endpoint |
//! | UDP, connected sockets | [`UDP_GRACE`] after the plan that took the endpoint away | their owner: ECONNABORTED, then EDESTADDRREQ |
//! | TCP, sockets | by policy, when the endpoint has not been listed for so long | their owner: ECONNABORTED; the endpoint: a reset |
//! | TCP, packets | likewise, and up to [`FLOWS_GAP`] later | their client, by a reset in answer to its next segment |
//!
//! The planner tells which backends a step took from which frontends; only sockets towards these are looked for, in every
//! network namespace, by what the hooks keep with them. The reconciler, when asked, says what holds of each [`Link`] that
//! was found. A socket is closed by its cookie and its ends, after a second look at both: what was connected anew, what dialled
//! the endpoint itself, and what dialled it by another frontend is not touched.
//!
//! UDP sockets are known by a descriptor that their owner is asked for ([`socket_owner`](super::socket_owner)).
//! Namespaces are entered by a thread made for one look, which is thrown away: no other part of the agent ever leaves its own.
//! After a start everything is looked at once, when all sources have listed.
//! May touch: the socket storage's descriptor; what [`sock_diag`](super::sock_diag) and [`namespaces`] offer; entries of
//! flows, of which it sets [`FlowValue::STALE`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use proxy_common::abi::flow::{FlowKey, FlowValue};
use proxy_common::addr::Proto;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::kernel::{self, MapFds};
use super::maps::{self, Table, Walk};
use super::namespaces::{self, Namespace};
use super::reconcile::Status;
use super::sock_diag::{Diag, Found};
use crate::config::raw::SocketLb;
use crate::drain::Drain;
use crate::error::chain;
use crate::model::StalePolicy;
use crate::planner::{BackendAddr, FrontendAddr, Link, Lost, Standing};

/// How long a connected UDP socket keeps an endpoint that is gone. An answer that is under way still arrives, and who asks one
/// question by a socket never meets the error.
pub const UDP_GRACE: Duration = Duration::from_secs(1);
/// After the first look for sockets towards lost backends comes a second: a program that ran when the tables were changed may
/// have sent a socket there since.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// How often it is asked whether an endpoint that drains is gone.
const RECHECK: Duration = Duration::from_millis(500);
/// How often connections are to be ended before what cannot be is let be.
const TRIES: u32 = 5;
/// Between two looks: a burst of changes is worth one.
const GAP: Duration = Duration::from_millis(250);
/// Between two walks through the table of flows, which takes looking at all of them.
pub const FLOWS_GAP: Duration = Duration::from_secs(5);
/// So many sockets are closed, or namespaces entered, between two pauses.
const BATCH: usize = 128;
const PAUSE: Duration = Duration::from_millis(1);

/// What the reconciler is asked: what holds of connections that were found.
#[derive(Debug)]
pub struct Question {
    /// The connections.
    pub links: Vec<Link>,
    /// Where the answers go, in the same order.
    pub answer: oneshot::Sender<Vec<Standing>>,
}

/// Which backends to look for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// None.
    #[default]
    Nothing,
    /// These.
    Backends(BTreeSet<BackendAddr>),
    /// All.
    Everything,
}

impl Scope {
    fn of(backends: BTreeSet<BackendAddr>) -> Self {
        if backends.is_empty() { Self::Nothing } else { Self::Backends(backends) }
    }

    fn has(&self, backend: &BackendAddr) -> bool {
        match self {
            Self::Nothing => false,
            Self::Backends(backends) => backends.contains(backend),
            Self::Everything => true,
        }
    }

    /// For sockets of a protocol: which backends, or `None` for all.
    fn of_protocol(&self, proto: Proto) -> Option<Vec<BackendAddr>> {
        match self {
            Self::Nothing => Some(Vec::new()),
            Self::Backends(backends) => {
                Some(backends.iter().copied().filter(|backend| backend.proto == proto).collect())
            }
            Self::Everything => None,
        }
    }
}

/// Where to look for what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scopes {
    /// Sockets, of all namespaces.
    pub sockets: Scope,
    /// Flows of TCP.
    pub flows: Scope,
}

impl Scopes {
    /// There is nothing to look for.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Connections as a look finds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links {
    /// Of sockets.
    pub sockets: BTreeSet<Link>,
    /// Of flows.
    pub flows: BTreeSet<Link>,
}

/// Where connections by a link were found.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    in_sockets: bool,
    in_flows: bool,
    /// Since when its endpoint has been gone.
    gone_since: Option<Instant>,
}

/// What is known of connections left behind: pure, without sockets.
#[derive(Debug)]
pub struct Watch {
    /// Where services say nothing.
    default: StalePolicy,
    /// Every socket is to be looked at.
    everything: bool,
    /// When sockets towards a backend are to be looked for, and how often from then on.
    looks: BTreeMap<BackendAddr, (Instant, u32)>,
    /// Backends that flows are to be looked for of.
    flow_looks: BTreeSet<BackendAddr>,
    /// When; `None` if there are none.
    flows_at: Option<Instant>,
    /// When flows were last looked at.
    walked: Option<Instant>,
    /// Connections that were found.
    found: BTreeMap<Link, Seen>,
    /// What services asked for that lost these frontends.
    policies: BTreeMap<FrontendAddr, StalePolicy>,
}

impl Watch {
    /// Knows nothing.
    pub fn new(default: StalePolicy) -> Self {
        Self {
            default,
            everything: false,
            looks: BTreeMap::new(),
            flow_looks: BTreeSet::new(),
            flows_at: None,
            walked: None,
            found: BTreeMap::new(),
            policies: BTreeMap::new(),
        }
    }

    /// Sockets that were there before the start are to be looked at.
    pub fn begin(&mut self) {
        self.everything = true;
    }

    /// Takes what a plan may have left behind.
    pub fn note(&mut self, lost: &Lost, now: Instant) {
        self.looks.extend(lost.backends.iter().map(|at| (*at, (now, 2))));
        self.flow_looks.extend(lost.backends.iter().filter(|at| at.proto == Proto::TCP));
        if !self.flow_looks.is_empty() {
            let earliest = self.walked.map_or(now, |walked| walked + FLOWS_GAP);
            self.flows_at.get_or_insert(earliest.max(now + SECOND_LOOK));
        }
        for at in &lost.frontends {
            // One that asked for nothing leaves nothing of who had the frontend before.
            match lost.policy {
                Some(policy) => _ = self.policies.insert(*at, policy),
                None => _ = self.policies.remove(at),
            }
        }
    }

    /// What is to be looked for now.
    pub fn scopes(&mut self, now: Instant) -> Scopes {
        if std::mem::take(&mut self.everything) {
            self.walked = Some(now);
            return Scopes { sockets: Scope::Everything, flows: Scope::Everything };
        }
        let mut due = BTreeSet::new();
        for (at, (when, left)) in &mut self.looks {
            if *when <= now {
                due.insert(*at);
                *when = now + SECOND_LOOK;
                *left -= 1;
            }
        }
        self.looks.retain(|_, (_, left)| *left > 0);
        let mut flows = BTreeSet::new();
        if self.flows_at.take_if(|at| *at <= now).is_some() {
            self.walked = Some(now);
            flows = std::mem::take(&mut self.flow_looks);
        }
        Scopes { sockets: Scope::of(due), flows: Scope::of(flows) }
    }

    /// Takes what a look came upon.
    pub fn take(&mut self, links: Links) {
        links.sockets.into_iter().for_each(|link| self.found.entry(link).or_default().in_sockets = true);
        links.flows.into_iter().for_each(|link| self.found.entry(link).or_default().in_flows = true);
    }

    /// The connections that were found.
    pub fn links(&self) -> Vec<Link> {
        self.found.keys().copied().collect()
    }

    /// Takes what holds of connections, and says which are to be ended now.
    pub fn judge(&mut self, standings: impl IntoIterator<Item = (Link, Standing)>, now: Instant) -> BTreeSet<Link> {
        let mut due = BTreeSet::new();
        for (link, standing) in standings {
            let is_udp = link.frontend.proto == Proto::UDP;
            let wait = match standing {
                Standing::Served => None,
                Standing::Unserving | Standing::Gone(_) if is_udp => Some(UDP_GRACE),
                Standing::Unserving => {
                    self.found.entry(link).and_modify(|seen| seen.gone_since = None);
                    continue;
                }
                Standing::Gone(policy) => {
                    match policy.or_else(|| self.asked_by(&link.frontend)).unwrap_or(self.default) {
                        StalePolicy::Keep => None,
                        StalePolicy::ResetAfter(wait) => Some(wait),
                    }
                }
            };
            let Some(wait) = wait else {
                self.found.remove(&link);
                continue;
            };
            let Some(seen) = self.found.get_mut(&link) else { continue };
            if *seen.gone_since.get_or_insert(now) + wait <= now {
                due.insert(link);
            }
        }
        due
    }

    /// What a service asked for that lost a frontend, be it as a NodePort.
    fn asked_by(&self, at: &FrontendAddr) -> Option<StalePolicy> {
        let node_port = FrontendAddr { addr: at.addr.wildcard(), ..*at };
        self.policies.get(at).or_else(|| self.policies.get(&node_port)).copied()
    }

    /// Where connections by these links are.
    pub fn places(&self, links: &BTreeSet<Link>) -> Scopes {
        let backends = |is_there: fn(&Seen) -> bool| {
            let there = links.iter().filter(|link| self.found.get(link).is_some_and(is_there));
            Scope::of(there.map(|link| link.backend).collect())
        };
        Scopes { sockets: backends(|seen| seen.in_sockets), flows: backends(|seen| seen.in_flows) }
    }

    /// The connections by these links are ended, as far as they can be.
    pub fn ended(&mut self, links: &BTreeSet<Link>) {
        links.iter().for_each(|link| _ = self.found.remove(link));
    }

    /// When there is something to do again.
    pub fn next(&mut self, now: Instant) -> Option<Instant> {
        let is_over = self.looks.is_empty() && self.flows_at.is_none() && self.found.is_empty() && !self.everything;
        if is_over {
            self.policies.clear();
        }
        let look = self.looks.values().map(|(when, _)| *when).min();
        let everything = self.everything.then_some(now);
        let recheck = (!self.found.is_empty()).then(|| now + RECHECK);
        [look, self.flows_at, everything, recheck].into_iter().flatten().min()
    }
}

/// What one look came to.
#[derive(Debug, Default)]
struct Outcome {
    links: Links,
    closed: BTreeMap<Proto, u64>,
    /// Flows whose client will be reset.
    marked: u64,
    namespaces: u64,
    /// What was refused, by kind: how often, and the first time why.
    failures: BTreeMap<Reason, (u64, String)>,
}

/// Why something could not be looked at or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    /// The kernel has no such thing.
    Unsupported,
    /// The namespaces of the node are not to be seen.
    Namespaces,
    /// A namespace may not be entered.
    Enter,
    /// Its sockets cannot be listed.
    List,
    /// The sockets of a process may not be looked at.
    Owner,
    /// A socket may not be closed.
    Close,
    /// The table of flows cannot be read or written.
    Flows,
}

impl Reason {
    const ALL: [Self; 7] =
        [Self::Unsupported, Self::Namespaces, Self::Enter, Self::List, Self::Owner, Self::Close, Self::Flows];

    const fn name(self) -> &'static str {
        match self {
            Self::Unsupported => "unsupported",
            Self::Namespaces => "namespaces",
            Self::Enter => "enter",
            Self::List => "list",
            Self::Owner => "owner",
            Self::Close => "close",
            Self::Flows => "flows",
        }
    }

    const fn advice(self) -> &'static str {
        match self {
            Self::Unsupported => "the kernel is built without CONFIG_INET_DIAG_DESTROY, by which sockets are closed",
            Self::Namespaces => {
                "/proc does not show the processes of this node and their namespaces, which takes CAP_SYS_PTRACE"
            }
            Self::Enter => "network namespaces of pods cannot be entered, which takes CAP_SYS_ADMIN",
            Self::List => "sockets cannot be listed, which takes CONFIG_INET_TCP_DIAG and CONFIG_INET_UDP_DIAG",
            Self::Owner => {
                "UDP sockets of some processes cannot be looked at, which takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"
            }
            Self::Close => "sockets cannot be closed, which takes CAP_NET_ADMIN",
            Self::Flows => "the table of flows cannot be read or written",
        }
    }
}

impl Outcome {
    fn fail(&mut self, reason: Reason, error: &dyn std::error::Error) {
        self.failures.entry(reason).or_insert_with(|| (0, chain(error))).0 += 1;
    }
}

/// One look: what is there, and what of it is ended.
struct Look {
    /// What it may touch.
    reach: Arc<Reach>,
    scopes: Scopes,
    doomed: BTreeSet<Link>,
    stop: Arc<AtomicBool>,
}

/// What looks need.
struct Reach {
    /// The socket storage; `None` if no socket is translated.
    storage: Option<OwnedFd>,
    /// Or only the agent's own.
    in_all_namespaces: bool,
    flows: Table<FlowKey, FlowValue>,
}

impl Look {
    fn run(&self) -> Outcome {
        let mut outcome = Outcome::default();
        if self.scopes.flows != Scope::Nothing
            && let Err(error) = self.walk_flows(&mut outcome)
        {
            outcome.fail(Reason::Flows, &error);
        }
        if let Some(storage) = self.reach.storage.as_ref().filter(|_| self.scopes.sockets != Scope::Nothing) {
            match self.namespaces(&mut outcome) {
                Ok(listed) => self.visit_all(&listed, storage, &mut outcome),
                Err(error) => outcome.fail(Reason::Namespaces, &error),
            }
        }
        outcome
    }

    fn namespaces(&self, outcome: &mut Outcome) -> io::Result<Vec<Namespace>> {
        let (mut listed, is_blind) = namespaces::list(Path::new("/proc"))?;
        if !self.reach.in_all_namespaces {
            // The agent's own is the first.
            listed.truncate(1);
        } else if is_blind {
            outcome.fail(Reason::Namespaces, &io::Error::from(io::ErrorKind::PermissionDenied));
        }
        Ok(listed)
    }

    fn has_to_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn walk_flows(&self, outcome: &mut Outcome) -> Result<(), maps::Error> {
        let table = &self.reach.flows;
        let mut walk = Walk::new(table);
        while !self.has_to_stop()
            && let Some((keys, values)) = walk.next(table)?
        {
            for (key, value) in keys.iter().zip(values) {
                let Some(link) = link_of(key, value).filter(|link| self.scopes.flows.has(&link.backend)) else {
                    continue;
                };
                if !self.doomed.contains(&link) {
                    outcome.links.flows.insert(link);
                } else if table.replace(key, &FlowValue { flags: value.flags | FlowValue::STALE, ..*value })? {
                    outcome.marked += 1;
                }
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn visit_all(&self, listed: &[Namespace], storage: &OwnedFd, outcome: &mut Outcome) {
        for (number, namespace) in listed.iter().enumerate() {
            if self.has_to_stop() {
                return;
            }
            if number % BATCH == BATCH - 1 {
                thread::sleep(PAUSE);
            }
            match namespace.enter() {
                Ok(true) => self.visit(namespace, storage, outcome),
                Ok(false) => {}
                Err(error) => outcome.fail(Reason::Enter, &error),
            }
        }
    }

    /// The namespace that the thread is in.
    fn visit(&self, namespace: &Namespace, storage: &OwnedFd, outcome: &mut Outcome) {
        outcome.namespaces += 1;
        let diag = match Diag::open() {
            Ok(diag) => diag,
            Err(error) => return outcome.fail(Reason::List, &error),
        };
        for proto in [Proto::TCP, Proto::UDP] {
            let backends = self.scopes.sockets.of_protocol(proto);
            if backends.as_ref().is_some_and(Vec::is_empty) {
                continue;
            }
            match diag.sockets(proto, backends.as_deref(), storage.as_fd(), namespace.processes()) {
                Ok((sockets, refused)) => {
                    refused.iter().for_each(|error| outcome.fail(Reason::Owner, error));
                    self.meet(&diag, sockets, outcome);
                }
                Err(error) => outcome.fail(Reason::List, &error),
            }
        }
    }

    fn meet(&self, diag: &Diag, sockets: Vec<Found>, outcome: &mut Outcome) {
        let (doomed, others): (Vec<_>, Vec<_>) =
            sockets.into_iter().partition(|socket| self.doomed.contains(&socket.link));
        let is_wanted = |link: &Link| self.scopes.sockets.has(&link.backend);
        outcome.links.sockets.extend(others.iter().map(|socket| socket.link).filter(is_wanted));
        for batch in doomed.chunks(BATCH) {
            for socket in batch {
                match diag.close(socket) {
                    Ok(true) => *outcome.closed.entry(socket.link.frontend.proto).or_default() += 1,
                    Ok(false) => {}
                    Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                        outcome.fail(Reason::Unsupported, &error);
                    }
                    Err(error) => outcome.fail(Reason::Close, &error),
                }
            }
            thread::sleep(PAUSE);
        }
    }
}

/// The connection that an entry of the flows is of, if it is a client's to a frontend by TCP whose end it does not know yet.
fn link_of(key: &FlowKey, value: &FlowValue) -> Option<Link> {
    let proto = Proto(key.proto);
    let is_one = key.kind == FlowKey::FRONT && proto == Proto::TCP && !value.has(FlowValue::DIRECT | FlowValue::STALE);
    is_one.then(|| Link {
        frontend: FrontendAddr { addr: key.b, port: key.b_port.host(), proto },
        backend: BackendAddr { addr: value.peer, port: value.peer_port.host(), proto },
    })
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByProtocol {
    protocol: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

/// What is counted.
#[derive(Clone, Debug, Default)]
struct Metrics {
    closed: Family<ByProtocol, Counter>,
    flows: Counter,
    failures: Family<ByReason, Counter>,
    namespaces: Counter,
}

impl Metrics {
    fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("shunt");
        let help = "Sockets closed because the endpoint they were connected to by a service is gone";
        registry.register("sockets_closed", help, self.closed.clone());
        let help = "Connections by packets whose client is reset with its next segment because their endpoint is gone";
        registry.register("flows_reset", help, self.flows.clone());
        let help = "What kept connections whose endpoint is gone from being found or ended";
        registry.register("stale_failures", help, self.failures.clone());
        let help = "Network namespaces entered to look for such sockets";
        registry.register("namespaces_entered", help, self.namespaces.clone());
        // Series that are there from the start show the first event as one.
        for proto in [Proto::TCP, Proto::UDP] {
            self.closed(proto).inc_by(0);
        }
        Reason::ALL.into_iter().for_each(|reason| _ = self.failed(reason).inc_by(0));
    }

    fn closed(&self, proto: Proto) -> Counter {
        self.closed.get_or_create(&ByProtocol { protocol: proto.to_string() }).clone()
    }

    fn failed(&self, reason: Reason) -> Counter {
        self.failures.get_or_create(&ByReason { reason: reason.name() }).clone()
    }
}

/// The ending of stale connections as a part of the agent.
pub struct Task {
    watch: Watch,
    reach: Arc<Reach>,
    lost: mpsc::UnboundedReceiver<Vec<Lost>>,
    questions: mpsc::Sender<Question>,
    metrics: Metrics,
    stop: Arc<AtomicBool>,
    /// Each is told once; the counter tells the rest.
    told: BTreeSet<Reason>,
    /// Endings in a row that failed in part.
    failed: u32,
}

/// The reconciler's ends: where it tells what a plan may have left behind, and where it is asked.
#[derive(Debug)]
pub struct Ends {
    /// Takes what plans lost, after they are done.
    pub lost: mpsc::UnboundedSender<Vec<Lost>>,
    /// Questions to be answered.
    pub questions: mpsc::Receiver<Question>,
}

impl Task {
    /// Takes what it needs of `maps`; whose sockets are looked at follows from whose are translated.
    pub fn open(maps: &MapFds, default: StalePolicy, sockets: SocketLb) -> Result<(Self, Ends), kernel::Error> {
        let (lost_sender, lost) = mpsc::unbounded_channel();
        let (questions, asked) = mpsc::channel(1);
        let storage = if sockets == SocketLb::Off { None } else { Some(maps.duplicate("sockets")?) };
        let in_all_namespaces = sockets == SocketLb::All;
        let reach = Reach { storage, in_all_namespaces, flows: Table::open(maps, "flows")? };
        let task = Self {
            watch: Watch::new(default),
            reach: Arc::new(reach),
            lost,
            questions,
            metrics: Metrics::default(),
            stop: Arc::default(),
            told: BTreeSet::new(),
            failed: 0,
        };
        Ok((task, Ends { lost: lost_sender, questions: asked }))
    }

    /// Makes its metrics known.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }

    /// Follows what plans leave behind until the drain.
    pub async fn run(mut self, mut status: watch::Receiver<Arc<Status>>, mut drain: Drain) {
        let mut is_begun = false;
        loop {
            let next = if is_begun { self.watch.next(Instant::now()) } else { None };
            tokio::select! {
                Some(lost) = self.lost.recv() => self.note(&lost),
                result = status.wait_for(|status| status.is_ready), if !is_begun => {
                    // Without a sender the agent ends.
                    let Ok(_) = result else { break };
                    is_begun = true;
                    self.watch.begin();
                }
                () = until(next) => {}
                () = drain.wait() => break,
            }
            while let Ok(lost) = self.lost.try_recv() {
                self.note(&lost);
            }
            // Before all sources have listed nobody knows what is gone.
            if !is_begun {
                continue;
            }
            tokio::select! {
                () = self.step() => {}
                () = drain.wait() => break,
            }
        }
        self.stop.store(true, Ordering::Relaxed);
    }

    fn note(&mut self, lost: &[Lost]) {
        lost.iter().for_each(|lost| self.watch.note(lost, Instant::now()));
    }

    async fn step(&mut self) {
        let scopes = self.watch.scopes(Instant::now());
        let has_looked = !scopes.is_nothing();
        let start = Instant::now();
        if has_looked {
            let outcome = self.look(scopes, BTreeSet::new()).await;
            self.watch.take(outcome.links);
        }
        self.end_due().await;
        if has_looked {
            // However long looks take here, they are a small part of the time.
            tokio::time::sleep((start.elapsed() * 10).clamp(GAP, FLOWS_GAP)).await;
        }
    }

    async fn end_due(&mut self) {
        let links = self.watch.links();
        if links.is_empty() {
            return;
        }
        let (answer, answered) = oneshot::channel();
        // Without a reconciler the agent ends.
        let Ok(()) = self.questions.send(Question { links: links.clone(), answer }).await else { return };
        let Ok(standings) = answered.await else { return };
        let due = self.watch.judge(links.into_iter().zip(standings), Instant::now());
        if !due.is_empty() {
            let outcome = self.look(self.watch.places(&due), due.clone()).await;
            self.failed = if outcome.failures.is_empty() { 0 } else { self.failed + 1 };
            // What failed for a moment (memory, descriptors) is tried again; what is not allowed stays so.
            if self.failed == 0 || self.failed >= TRIES {
                self.failed = 0;
                self.watch.ended(&due);
            }
        }
    }

    /// Looks for connections, and ends those by `doomed` links.
    async fn look(&mut self, scopes: Scopes, doomed: BTreeSet<Link>) -> Outcome {
        let look = Look { reach: self.reach.clone(), scopes, doomed, stop: self.stop.clone() };
        let (sender, receiver) = oneshot::channel();
        let start = Instant::now();
        let spawned = thread::Builder::new().name("stale".to_owned()).spawn(move || {
            // Nobody waits if the agent ends.
            let _ = sender.send(look.run());
        });
        let outcome = match spawned {
            Ok(_) => receiver.await.unwrap_or_default(),
            Err(error) => {
                let mut outcome = Outcome::default();
                outcome.fail(Reason::List, &error);
                outcome
            }
        };
        self.tell(&outcome, start.elapsed());
        outcome
    }

    fn tell(&mut self, outcome: &Outcome, elapsed: Duration) {
        self.metrics.namespaces.inc_by(outcome.namespaces);
        let (sockets, flows) = (outcome.links.sockets.len(), outcome.links.flows.len());
        debug!(namespaces = outcome.namespaces, sockets, flows, ?elapsed, "looked for stale connections");
        for (proto, count) in &outcome.closed {
            self.metrics.closed(*proto).inc_by(*count);
            info!(%proto, count, "sockets closed whose endpoint is gone");
        }
        if outcome.marked > 0 {
            self.metrics.flows.inc_by(outcome.marked);
            info!(count = outcome.marked, "connections by packets will be reset, their endpoint is gone");
        }
        for (reason, (count, error)) in &outcome.failures {
            self.metrics.failed(*reason).inc_by(*count);
            if self.told.insert(*reason) {
                warn!(error, "stale connections may stay: {}", reason.advice());
            }
        }
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The kernel can close sockets for others; told by name if not.
pub fn probe() {
    let answer = Diag::open().and_then(|diag| diag.can_close());
    match answer {
        Ok(true) => {}
        Ok(false) => warn!("stale connections stay: {}", Reason::Unsupported.advice()),
        Err(error) => warn!(%error, "stale connections may stay: {}", Reason::Close.advice()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proxy_common::addr::Port;

    use super::*;
    use crate::model::{Name, ServiceKey, SourceId};

    const SECOND: Duration = Duration::from_secs(1);

    fn backend(last: u8, proto: Proto) -> BackendAddr {
        BackendAddr { addr: Ipv4Addr::new(10, 244, 1, last).into(), port: Port(8080), proto }
    }

    fn frontend(last: u8, proto: Proto) -> FrontendAddr {
        FrontendAddr { addr: Ipv4Addr::new(10, 96, 0, last).into(), port: Port(80), proto }
    }

    /// From the frontend with this number to the backend with this number.
    fn link(number: u8, proto: Proto) -> Link {
        Link { frontend: frontend(number, proto), backend: backend(number, proto) }
    }

    fn lost(number: u8, proto: Proto, policy: Option<StalePolicy>) -> Lost {
        Lost {
            service: ServiceKey {
                source: SourceId::Manifests,
                namespace: Name::from("default"),
                name: Name::from("web"),
            },
            policy,
            frontends: vec![frontend(number, proto)],
            backends: vec![backend(number, proto)],
        }
    }

    fn reset_after(seconds: u64) -> StalePolicy {
        StalePolicy::ResetAfter(Duration::from_secs(seconds))
    }

    /// A watch that has found one connection.
    fn watch(link: Link) -> Watch {
        let mut watch = Watch::new(reset_after(10));
        watch.take(in_sockets(link));
        watch
    }

    fn in_sockets(link: Link) -> Links {
        Links { sockets: [link].into(), ..Links::default() }
    }

    fn in_flows(link: Link) -> Links {
        Links { flows: [link].into(), ..Links::default() }
    }

    fn backends<const N: usize>(backends: [BackendAddr; N]) -> Scope {
        Scope::of(backends.into())
    }

    /// Seconds after the first judgement in which a connection is ended, of the first ten or so.
    fn ended(mut watch: Watch, link: Link, standing: Standing) -> Option<u32> {
        let start = Instant::now();
        let is_due = |watch: &mut Watch, second| !watch.judge([(link, standing)], start + SECOND * second).is_empty();
        (0..=12).find(|second| is_due(&mut watch, *second))
    }

    #[test]
    fn tcp_waits_as_its_service_asks_and_udp_for_an_answer_under_way() {
        let (tcp, udp) = (link(1, Proto::TCP), link(1, Proto::UDP));
        let cases = [
            (tcp, Standing::Gone(None), Some(10)),
            (tcp, Standing::Gone(Some(reset_after(3))), Some(3)),
            (tcp, Standing::Gone(Some(reset_after(0))), Some(0)),
            (tcp, Standing::Gone(Some(StalePolicy::Keep)), None),
            (tcp, Standing::Unserving, None),
            (tcp, Standing::Served, None),
            (udp, Standing::Gone(None), Some(1)),
            (udp, Standing::Gone(Some(StalePolicy::Keep)), Some(1)),
            (udp, Standing::Unserving, Some(1)),
            (udp, Standing::Served, None),
        ];
        for (link, standing, expected) in cases {
            assert_eq!(ended(watch(link), link, standing), expected, "{link}: {standing}");
        }
    }

    #[test]
    fn a_deleted_service_is_remembered_for_what_it_asked_for() {
        let tcp = link(1, Proto::TCP);
        let now = Instant::now();
        for (policy, expected) in [(StalePolicy::Keep, None), (reset_after(4), Some(4))] {
            let mut watch = watch(tcp);
            watch.note(&lost(1, Proto::TCP, Some(policy)), now);
            assert_eq!(ended(watch, tcp, Standing::Gone(None)), expected);
        }
        let mut of_node_port = watch(tcp);
        let wildcard = FrontendAddr { addr: tcp.frontend.addr.wildcard(), ..tcp.frontend };
        of_node_port.note(&Lost { frontends: vec![wildcard], ..lost(1, Proto::TCP, Some(reset_after(4))) }, now);
        assert_eq!(ended(of_node_port, tcp, Standing::Gone(None)), Some(4));
        let mut watch = watch(tcp);
        watch.note(&lost(2, Proto::TCP, Some(StalePolicy::Keep)), now);
        assert_eq!(ended(watch, tcp, Standing::Gone(None)), Some(10), "another's word is not its own");
    }

    #[test]
    fn an_endpoint_that_comes_back_in_time_keeps_its_connections() {
        let tcp = link(1, Proto::TCP);
        for standing in [Standing::Unserving, Standing::Served] {
            let (mut watch, start) = (watch(tcp), Instant::now());
            assert!(watch.judge([(tcp, Standing::Gone(None))], start).is_empty());
            assert!(watch.judge([(tcp, standing)], start + SECOND * 9).is_empty());
            watch.take(in_sockets(tcp));
            assert!(watch.judge([(tcp, Standing::Gone(None))], start + SECOND * 11).is_empty(), "it begins anew");
            assert!(!watch.judge([(tcp, Standing::Gone(None))], start + SECOND * 21).is_empty());
        }
    }

    #[test]
    fn sockets_of_lost_backends_are_looked_for_twice_and_then_no_more() {
        let mut watch = Watch::new(StalePolicy::DEFAULT);
        let start = Instant::now();
        assert_eq!(watch.next(start), None);
        watch.note(&lost(1, Proto::UDP, None), start);
        watch.note(&lost(2, Proto::UDP, None), start);
        let both = Scopes { sockets: backends([backend(1, Proto::UDP), backend(2, Proto::UDP)]), ..Scopes::default() };
        assert_eq!(watch.next(start), Some(start));
        assert_eq!(watch.scopes(start), both);
        assert!(watch.scopes(start).is_nothing());
        assert_eq!(watch.next(start), Some(start + SECOND_LOOK));
        assert_eq!(watch.scopes(start + SECOND_LOOK), both);
        assert_eq!(watch.next(start + SECOND_LOOK), None);
    }

    #[test]
    fn flows_are_looked_for_once_and_not_too_often() {
        let mut watch = Watch::new(StalePolicy::DEFAULT);
        let start = Instant::now();
        let flows_at = |watch: &mut Watch, seconds| watch.scopes(start + SECOND * seconds).flows;
        watch.note(&lost(1, Proto::TCP, None), start);
        assert_eq!(flows_at(&mut watch, 0), Scope::Nothing);
        assert_eq!(flows_at(&mut watch, 1), backends([backend(1, Proto::TCP)]));
        for number in [2, 3] {
            watch.note(&lost(number, Proto::TCP, None), start + SECOND * u32::from(number));
            assert_eq!(flows_at(&mut watch, 5), Scope::Nothing);
        }
        assert_eq!(flows_at(&mut watch, 6), backends([backend(2, Proto::TCP), backend(3, Proto::TCP)]));
        assert_eq!(flows_at(&mut watch, 20), Scope::Nothing);
        assert_eq!(watch.next(start), None);
    }

    #[test]
    fn after_a_start_everything_is_looked_at_once() {
        let mut watch = Watch::new(StalePolicy::DEFAULT);
        let start = Instant::now();
        watch.begin();
        assert_eq!(watch.next(start), Some(start));
        assert_eq!(watch.scopes(start), Scopes { sockets: Scope::Everything, flows: Scope::Everything });
        assert!(watch.scopes(start).is_nothing());
    }

    #[test]
    fn connections_are_ended_where_they_were_found() {
        let (one, two) = (link(1, Proto::TCP), link(2, Proto::TCP));
        let mut watch = watch(one);
        watch.take(in_flows(one));
        watch.take(in_flows(two));
        let scope = |links: &[Link]| backends_of(links);
        assert_eq!(watch.places(&[one, two].into()), Scopes { sockets: scope(&[one]), flows: scope(&[one, two]) });
        assert_eq!(watch.places(&[two].into()), Scopes { sockets: Scope::Nothing, flows: scope(&[two]) });
    }

    fn backends_of(links: &[Link]) -> Scope {
        Scope::of(links.iter().map(|link| link.backend).collect())
    }

    #[test]
    fn only_front_entries_of_tcp_that_are_not_marked_yet_tell_a_link() {
        let link = link(1, Proto::TCP);
        let key = FlowKey {
            a: Ipv4Addr::new(203, 0, 113, 5).into(),
            b: link.frontend.addr,
            a_port: Port(5000).be(),
            b_port: link.frontend.port.be(),
            proto: Proto::TCP.0,
            kind: FlowKey::FRONT,
            reserved: 0,
        };
        let value = FlowValue { peer: link.backend.addr, peer_port: link.backend.port.be(), ..FlowValue::ZERO };
        assert_eq!(link_of(&key, &value), Some(link));
        for kind in [FlowKey::PLAIN, FlowKey::SNAT] {
            assert_eq!(link_of(&FlowKey { kind, ..key }, &value), None);
        }
        assert_eq!(link_of(&FlowKey { proto: Proto::UDP.0, ..key }, &value), None);
        for flags in [FlowValue::DIRECT, FlowValue::STALE] {
            assert_eq!(link_of(&key, &FlowValue { flags, ..value }), None);
        }
    }

    #[test]
    fn what_was_ended_is_forgotten() {
        let tcp = link(1, Proto::TCP);
        let (mut watch, start) = (watch(tcp), Instant::now());
        watch.note(&lost(1, Proto::TCP, Some(reset_after(0))), start);
        assert!(!watch.scopes(start).is_nothing() && !watch.scopes(start + SECOND_LOOK).is_nothing());
        let due = watch.judge([(tcp, Standing::Gone(None))], start);
        assert_eq!(due, [tcp].into());
        assert!(watch.next(start).is_some());
        watch.ended(&due);
        assert_eq!(watch.links(), []);
        assert_eq!(watch.next(start), None);
        assert!(watch.policies.is_empty());
    }
}
