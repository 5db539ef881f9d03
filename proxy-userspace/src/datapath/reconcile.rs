//! The only writer of the tables: takes the newest snapshot, has it planned, does what the plan says.
//!
//! Nothing waits for quiet: a snapshot is planned as soon as the one before is done, those between are skipped. An
//! operation that is refused stays with its service as status and is tried again; neither the other services nor the
//! other frontends of this one notice ([`super::backlog`] says what rests on what).
//! What a plan unpublishes is cleared when no program can read it any more; later plans do not wait for that.
//! May touch: the tables through [`Maps`]. Chooses nothing: the plan says what and in which order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

use proxy_common::abi::config::MAX_CIDRS;
use proxy_common::addr::Addr;

use super::audit::{self, Found, Teller};
use super::backlog::Backlog;
use super::maps::{self, Maps};
use super::progress::Reporter;
use super::{stale, sys};
use crate::drain::Drain;
use crate::error::chain;
use crate::model::{Reader, ServiceKey, Snapshot, SourceId};
use crate::planner::{
    Epoch, FrontendAddr, HealthChecks, Link, Lost, Op, Place, Plan, Problem, ServiceId, Stage, Standing, State, Subject,
};

/// What was done, and what could not be done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Plans that had something to do.
    pub plans: u64,
    /// At least one source has listed everything, and what it listed is programmed.
    pub is_serving: bool,
    /// All sources have, and it is.
    pub is_ready: bool,
    /// Sources whose first list is not complete.
    pub pending: Vec<SourceId>,
    /// Operations that were refused and wait to be tried again.
    pub failures: Vec<Failure>,
    /// What services ask for and do not get.
    pub problems: BTreeMap<ServiceKey, Vec<Problem>>,
}

/// Refused operations of one subject.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// For whom they are.
    pub subject: Subject,
    /// What the kernel said the last time.
    pub error: String,
    /// How often the first was tried.
    pub attempts: u32,
    /// How many operations wait.
    pub waiting: usize,
}

/// Planning and applying, without time or tasks.
pub struct Reconciler<M> {
    maps: M,
    /// Taken only while planning.
    state: Option<State>,
    backlog: Backlog,
    retiring: VecDeque<Retiring>,
    /// How many of them, from the first on, no program can read any more.
    unread: usize,
    problems: BTreeMap<ServiceKey, Vec<Problem>>,
    /// Prefixes that did not fit: kind and number.
    left_out: Vec<(&'static str, usize)>,
    /// What plans may have left behind since it was taken.
    lost: Vec<Lost>,
    plans: u64,
}

/// What follows when the programs that ran at the end of a plan have ended.
#[derive(Debug)]
struct Retiring {
    epoch: Epoch,
    ops: Vec<(Subject, Op)>,
}

impl<M: Maps> Reconciler<M> {
    /// Goes on from `state`, which is what `maps` hold.
    pub fn new(maps: M, state: State) -> Self {
        Self {
            maps,
            state: Some(state),
            backlog: Backlog::default(),
            retiring: VecDeque::new(),
            unread: 0,
            problems: BTreeMap::new(),
            left_out: Vec::new(),
            lost: Vec::new(),
            plans: 0,
        }
    }

    /// Makes the tables say what `snapshot` wants. Returns how many operations that took.
    pub fn advance(&mut self, snapshot: &Arc<Snapshot>) -> usize {
        let count = self.plan(|state| state.advance(snapshot));
        self.note_left_out();
        count
    }

    /// Tells which prefixes of this node's configuration did not fit, when that changes.
    fn note_left_out(&mut self) {
        let node = self.state.as_ref().and_then(State::node);
        let left_out = node.map(|node| node.cidrs_left_out.clone()).unwrap_or_default();
        if left_out == self.left_out {
            return;
        }
        for (kind, count) in &left_out {
            warn!(kind, count, most = MAX_CIDRS, "there are more prefixes than fit; the last ones are left out");
        }
        self.left_out = left_out;
    }

    /// Forgets an address that no flow uses any more.
    pub fn prune_address(&mut self, addr: Addr) {
        self.plan(|state| state.prune_address(addr));
    }

    fn plan(&mut self, plan: impl FnOnce(State) -> (State, Plan)) -> usize {
        let state = self.state.take().expect("the state is put back after each planning");
        let (state, plan) = plan(state);
        self.state = Some(state);
        let count = plan.groups.iter().map(|group| group.now.len() + group.after_grace.len()).sum();
        if !plan.is_empty() {
            self.apply(plan);
        }
        count
    }

    /// Does a plan, up to what has to wait for programs to end.
    pub fn apply(&mut self, plan: Plan) {
        self.plans += 1;
        self.apply_now(&plan);
        self.note_problems(plan.problems);
        self.lost.extend(plan.lost);
        let ops = plan.groups.into_iter().flat_map(|group| {
            let subject = group.subject;
            group.after_grace.into_iter().map(move |op| (subject.clone(), op))
        });
        self.retiring.push_back(Retiring { epoch: plan.epoch, ops: ops.collect() });
    }

    fn apply_now(&mut self, plan: &Plan) {
        let mut staged: Vec<(Stage, &Subject, &Op)> = Vec::new();
        for group in &plan.groups {
            staged.extend(group.now.iter().map(|op| (group.stage(op), &group.subject, op)));
        }
        staged.sort_by_key(|(stage, ..)| *stage);
        let (subjects, ops): (Vec<_>, Vec<_>) = staged.into_iter().map(|(_, subject, op)| (subject, op)).unzip();
        self.apply_ops(&subjects, &ops);
    }

    /// Operations that are handed over together: enough for batches, few enough for a full table, where each refusal begins
    /// a new one.
    const AT_ONCE: usize = 4096;

    /// Does operations in order, each for the subject at its place; a refused one goes to the backlog, and so do those that
    /// must wait behind it.
    fn apply_ops(&mut self, subjects: &[&Subject], ops: &[&Op]) {
        let mut next = 0;
        while let Some(op) = ops.get(next) {
            if self.backlog.blocks(op) {
                self.backlog.put(subjects[next], Op::clone(op), None);
                next += 1;
                continue;
            }
            let free = ops[next..].iter().take(Self::AT_ONCE).take_while(|op| !self.backlog.blocks(op)).count();
            let result = self.maps.apply(&ops[next..next + free]);
            let done = next + result.as_ref().map_or_else(|refused| refused.done, |()| free);
            ops[next..done].iter().for_each(|op| self.backlog.forget(op));
            next = done;
            if let Err(refused) = result {
                self.keep_refused(subjects[next], ops[next], &refused.source);
                next += 1;
            }
        }
    }

    fn keep_refused(&mut self, subject: &Subject, op: &Op, error: &maps::Error) {
        let error = chain(error);
        warn!(?subject, %error, "a table refused an operation, it will be tried again");
        self.backlog.put(subject, op.clone(), Some(error));
    }

    fn note_problems(&mut self, problems: Vec<(ServiceKey, Vec<Problem>)>) {
        for (service, problems) in problems {
            for problem in &problems {
                warn!(%service, %problem, "a service does not get all it asks for");
            }
            match problems.is_empty() {
                true => self.problems.remove(&service),
                false => self.problems.insert(service, problems),
            };
        }
    }

    /// Plans whose freed entries programs may still read.
    pub fn retiring(&self) -> usize {
        self.retiring.len() - self.unread
    }

    /// Clears what the `count` oldest such plans freed: no program that ran at their end runs any more. True if services
    /// that found no room should be tried again.
    pub fn retire(&mut self, count: usize) -> bool {
        self.unread += count;
        self.clear_unread()
    }

    /// Clears what plans freed, in their order, up to one that has to wait for a refused operation.
    fn clear_unread(&mut self) -> bool {
        let mut is_roomier = false;
        while self.unread > 0
            && let Some(retiring) =
                self.retiring.pop_front_if(|retiring| !is_pointed_to(retiring, &self.backlog, &self.maps))
        {
            self.unread -= 1;
            let Retiring { epoch, ops } = retiring;
            for (subject, op) in &ops {
                self.apply_ops(&[subject], &[op]);
            }
            let state = self.state.take().expect("the state is put back after each planning");
            let (state, again) = state.grace_passed(epoch);
            self.state = Some(state);
            is_roomier |= again;
        }
        is_roomier
    }

    /// True if operations wait to be tried again.
    pub fn has_failures(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// When operations that were refused are to be tried again; from now on that is settled.
    pub fn retry_at(&mut self, now: Instant) -> Option<Instant> {
        self.backlog.next_due(now)
    }

    /// Tries again what was refused and is due. True if services that found no room should be tried again.
    pub fn retry(&mut self, now: Instant) -> bool {
        let maps = &mut self.maps;
        self.backlog.retry(now, |op| maps.apply(&[op]).map_err(|refused| chain(&refused.source)));
        self.clear_unread()
    }

    /// Looks at the part of the tables that begins at `place`, and writes again what somebody else has changed. What was
    /// wrong; nothing is looked at while a plan is under way: then more may be there than is known.
    pub fn audit(&mut self, place: &Place) -> Result<Found, maps::Error> {
        let Some(state) = self.state.as_ref().filter(|state| state.node().is_some() && self.retiring.is_empty()) else {
            return Ok(Found { rest: Some(place.clone()), ..Found::default() });
        };
        let found = audit::look(state, &self.maps, &self.backlog, place)?;
        let (subjects, ops): (Vec<_>, Vec<_>) = found.ops.iter().map(|(subject, op)| (subject, op)).unzip();
        self.apply_ops(&subjects, &ops);
        Ok(found)
    }

    /// Writes again what the node itself fixes. True if it was other.
    pub fn repair_node(&mut self) -> Result<bool, maps::Error> {
        self.maps.repair_node()
    }

    /// What could not be done.
    fn failures(&self) -> Vec<Failure> {
        let failure = |(subject, waiting): (&Subject, &super::backlog::Waiting)| Failure {
            subject: subject.clone(),
            error: waiting.error.clone(),
            attempts: waiting.attempts,
            waiting: waiting.count(),
        };
        self.backlog.iter().map(failure).collect()
    }

    /// What load balancers are told of services.
    pub fn health_checks(&self) -> HealthChecks {
        self.state.as_ref().map(State::health_checks).unwrap_or_default()
    }

    /// What is to become of a connection that was found.
    pub fn standing(&self, link: &Link) -> Standing {
        self.state.as_ref().expect("the state is put back after each planning").standing(link)
    }

    /// The tables.
    pub fn maps(&self) -> &M {
        &self.maps
    }
}

/// True if a frontend that could not be changed or removed still names a service that retires: the id would become another
/// service's, and so its clients.
fn is_pointed_to(retiring: &Retiring, backlog: &Backlog, maps: &impl Maps) -> bool {
    let retired = retiring.ops.iter().filter_map(|(_, op)| match op {
        Op::RetireService { id } => Some(*id),
        _ => None,
    });
    let retired: BTreeSet<ServiceId> = retired.collect();
    let names_one = |at: &FrontendAddr| match maps.service_at(at) {
        Ok(service) => service.is_some_and(|id| retired.contains(&id)),
        // It may be anybody's.
        Err(_) => true,
    };
    !retired.is_empty() && backlog.frontends().any(names_one)
}

/// The reconciler as a part of the agent.
pub struct Task<M> {
    /// What it does.
    pub reconciler: Reconciler<M>,
    /// Desired state.
    pub snapshots: Reader,
    /// Addresses that no flow uses any more.
    pub unused: mpsc::Receiver<Vec<Addr>>,
    /// Where the status goes.
    pub status: watch::Sender<Arc<Status>>,
    /// Where it goes what load balancers are told of services: never before the tables are so.
    pub health_checks: watch::Sender<HealthChecks>,
    /// How many sources are configured.
    pub sources: usize,
    /// Sources that had not listed in the snapshot that was planned last.
    pub pending: Arc<[SourceId]>,
    /// To whom it tells what plans may have left behind, and who asks about it.
    pub stale: stale::Ends,
    /// To whom it tells what it is at.
    pub reporter: Reporter,
    /// To whom it tells what somebody else has changed.
    pub teller: Teller,
}

impl<M: Maps> Task<M> {
    /// Follows the snapshots until the drain; then does the last one and leaves the tables as they are.
    pub async fn run(mut self, mut drain: Drain) {
        let mut grace = Grace::default();
        let mut audit = tokio::time::interval_at(Instant::now() + audit::INTERVAL, audit::INTERVAL);
        audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut place = Place::default();
        // The first snapshot is there from the start.
        self.snapshots.mark_changed();
        loop {
            let retry_at = self.reconciler.retry_at(Instant::now());
            tokio::select! {
                changed = self.snapshots.changed() => match changed {
                    Ok(()) => self.advance(),
                    Err(_) => break,
                },
                Some(unused) = self.unused.recv() => self.prune(unused),
                Some(question) = self.stale.questions.recv() => self.answer(question),
                count = grace.passed() => if self.work(|reconciler| reconciler.retire(count)) { self.advance() },
                _ = audit.tick() => place = self.audit(place),
                () = until(retry_at) => if self.work(|reconciler| reconciler.retry(Instant::now())) { self.advance() },
                () = drain.wait() => break,
            }
            grace.start(self.reconciler.retiring());
            self.publish();
        }
        self.advance();
        info!("the tables stay as they are");
    }

    /// Plans of so many operations leave much freed memory behind.
    const LARGE: usize = 10_000;

    fn advance(&mut self) {
        let snapshot = self.snapshots.borrow_and_update().clone();
        // Services of sources that have not listed are kept as the tables have them, so there is nothing to wait for.
        let start = Instant::now();
        let done = self.work(|reconciler| reconciler.advance(&snapshot));
        if done >= Self::LARGE {
            sys::trim_heap();
        }
        self.pending = snapshot.pending.clone();
        if self.pending.is_empty() {
            let (backlog, elapsed) = (&self.reconciler.backlog, (done > 0).then(|| start.elapsed()));
            self.reporter
                .applied(elapsed, snapshot.changes, |service| backlog.holds(&Subject::Service(service.clone())));
        }
        debug!(operations = done, elapsed = ?start.elapsed(), "reconciled");
    }

    /// Looks at a part of the tables, and at all the rest if something is wrong there. Where the next look begins.
    fn audit(&mut self, place: Place) -> Place {
        let teller = std::mem::take(&mut self.teller);
        let next = blocking(|| audit_on(&mut self.reconciler, place, &teller));
        self.teller = teller;
        next.unwrap_or_else(|error| {
            self.teller.tell_error(&error);
            Place::default()
        })
    }

    fn answer(&self, question: stale::Question) {
        let standings = question.links.iter().map(|link| self.reconciler.standing(link)).collect();
        // Who asked may be gone: the agent ends.
        let _ = question.answer.send(standings);
    }

    fn prune(&mut self, unused: Vec<Addr>) {
        self.work(|reconciler| unused.into_iter().for_each(|addr| reconciler.prune_address(addr)));
    }

    /// Does what may take long.
    fn work<T>(&mut self, work: impl FnOnce(&mut Reconciler<M>) -> T) -> T {
        self.reporter.begin();
        let result = blocking(|| work(&mut self.reconciler));
        self.reporter.end();
        let lost = std::mem::take(&mut self.reconciler.lost);
        if !lost.is_empty() {
            // Nobody takes it any more if the agent ends.
            let _ = self.stale.lost.send(lost);
        }
        result
    }

    fn publish(&self) {
        let status = Status {
            plans: self.reconciler.plans,
            is_serving: self.pending.len() < self.sources,
            is_ready: self.pending.is_empty(),
            pending: self.pending.to_vec(),
            failures: self.reconciler.failures(),
            problems: self.reconciler.problems.clone(),
        };
        self.status.send_if_modified(|known| {
            let is_new = **known != status;
            if is_new {
                *known = Arc::new(status);
            }
            is_new
        });
        let health_checks = self.reconciler.health_checks();
        self.health_checks.send_if_modified(|known| {
            let is_new = !known.is_same(&health_checks);
            *known = health_checks;
            is_new
        });
    }
}

fn audit_on<M: Maps>(reconciler: &mut Reconciler<M>, mut place: Place, teller: &Teller) -> Result<Place, maps::Error> {
    if reconciler.repair_node()? {
        teller.tell_config();
    }
    loop {
        let found = reconciler.audit(&place)?;
        let is_clean = found.ops.is_empty();
        if !is_clean {
            teller.tell(&found.ops);
        }
        match found.rest {
            Some(rest) if !is_clean => place = rest,
            rest => return Ok(rest.unwrap_or_default()),
        }
    }
}

/// Runs work that takes long when there is much to do, without holding up other tasks of this thread.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// A wait, outside the task, for the programs that ran when it was started.
#[derive(Default)]
struct Grace {
    waiting: Option<(tokio::task::JoinHandle<()>, usize)>,
}

impl Grace {
    /// Starts waiting on behalf of the `count` plans that are done now, unless a wait is under way.
    fn start(&mut self, count: usize) {
        if count > 0 && self.waiting.is_none() {
            self.waiting = Some((tokio::task::spawn_blocking(maps::wait_for_programs), count));
        }
    }

    /// How many plans have waited long enough; never if none waits.
    async fn passed(&mut self) -> usize {
        let Some((handle, count)) = &mut self.waiting else { return std::future::pending().await };
        let count = *count;
        handle.await.expect("the wait does not panic");
        self.waiting = None;
        count
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::net::Ipv4Addr;

    use proxy_common::abi::frontend::FrontendValue;
    use proxy_common::abi::service::{Range, Slot};
    use proxy_common::addr::{Port, Proto};

    use super::*;
    use crate::datapath::fake::Faulty;
    use crate::model::{
        ByFamily, Conditions, Endpoint, EndpointGroup, EndpointPort, EndpointSubset, Endpoints, GroupKind, Name,
        NodeFacts, Protocol, Service, ServicePort, TrafficPolicy,
    };
    use crate::planner::{BackendId, Limits, SnatPorts, Tables};

    const LIMITS: Limits = Limits { services: 64, backends: 256, slots: 1024 };

    fn addr(third: u8, last: u8) -> Addr {
        Addr::from(Ipv4Addr::new(10, 96, third, last))
    }

    fn key(number: u8) -> ServiceKey {
        let name = Name::from(format!("s{number}").as_str());
        ServiceKey { source: SourceId::Manifests, namespace: Name::from("default"), name }
    }

    /// Service `number` with two ports, one of them a NodePort.
    fn service(number: u8) -> Service {
        let port = |name: &str, port, node_port| ServicePort {
            name: Name::from(name),
            protocol: Protocol::Tcp,
            port: Port(port),
            node_port,
        };
        Service {
            created: None,
            cluster_ips: ByFamily { v4: Some(addr(0, number)), v6: None },
            ports: [port("a", 80, None), port("b", 81, Some(Port(30000 + u16::from(number))))].into(),
            external_ips: Box::default(),
            load_balancer_ips: Box::default(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity: None,
            health_check: None,
            source_ranges: ByFamily::default(),
            stale: None,
        }
    }

    /// The external address that a service may have besides.
    const EXTERNAL: [u8; 4] = [203, 0, 113, 7];

    /// Pods from this number on are the same for all services.
    const SHARED: u8 = 200;

    /// `count` endpoints of service `number`, the first of them being pod `first`.
    fn endpoints(number: u8, first: u8, count: u8) -> Endpoints {
        let port =
            |name: &str, port| EndpointPort { name: Name::from(name), protocol: Protocol::Tcp, port: Port(port) };
        let endpoint = |last| Endpoint {
            addr: addr(if last < SHARED { number } else { SHARED }, last),
            node: None,
            hints: None,
            conditions: Conditions::new(None, None, None),
        };
        let subset = EndpointSubset {
            ports: [port("a", 8080), port("b", 8081)].into(),
            endpoints: (first..first + count).map(endpoint).collect(),
        };
        let group = EndpointGroup { kind: GroupKind::Slice, name: Name::from("e"), subsets: [subset].into() };
        Endpoints::default().with(Arc::new(group))
    }

    /// Services 1 to 3 with the given endpoints; (0, 0) leaves a service out.
    fn snapshot(sets: [(u8, u8); 3]) -> Arc<Snapshot> {
        Arc::new(plain_snapshot(sets))
    }

    /// The same, and service 1 has an external address.
    fn external_snapshot(sets: [(u8, u8); 3]) -> Arc<Snapshot> {
        let mut snapshot = plain_snapshot(sets);
        let external_ips = Box::new([Addr::from(Ipv4Addr::from(EXTERNAL))]);
        snapshot.services.insert(key(1), Arc::new(Service { external_ips, ..service(1) }));
        Arc::new(snapshot)
    }

    fn plain_snapshot(sets: [(u8, u8); 3]) -> Snapshot {
        let mut snapshot = Snapshot::empty(Arc::new(NodeFacts::named(Name::from("n"))), []);
        for (number, (first, count)) in (1..).zip(sets) {
            if first > 0 {
                snapshot.services.insert(key(number), Arc::new(service(number)));
                snapshot.endpoints.insert(key(number), Arc::new(endpoints(number, first, count)));
            }
        }
        snapshot
    }

    /// What a history of snapshots passes through: new, scaled, moved, without endpoints, with shared pods, gone, back.
    fn history() -> Vec<Arc<Snapshot>> {
        let sets = [
            [(1, 2), (1, 1), (0, 0)],
            [(1, 2), (1, 3), (1, 2)],
            [(2, 2), (1, 3), (1, 2)],
            [(2, 2), (1, 0), (1, 2)],
            [(SHARED, 2), (SHARED, 1), (1, 2)],
            [(SHARED + 1, 2), (SHARED + 2, 1), (0, 0)],
            [(0, 0), (7, 2), (1, 2)],
            [(5, 4), (7, 2), (3, 1)],
        ];
        let plain = sets.into_iter().map(snapshot);
        plain.chain([external_snapshot([(5, 4), (SHARED, 1), (3, 1)]), snapshot([(6, 1), (0, 0), (3, 1)])]).collect()
    }

    fn state() -> State {
        State::restore(LIMITS, SnatPorts(10000..=10063), &Tables::default())
    }

    fn reconciler<M: Maps>(maps: M) -> Reconciler<M> {
        Reconciler::new(maps, state())
    }

    /// Reconciles snapshots, clearing after each step.
    fn run<M: Maps>(reconciler: &mut Reconciler<M>, history: &[Arc<Snapshot>]) {
        for snapshot in history {
            reconciler.advance(snapshot);
            reconciler.retire(reconciler.retiring());
        }
    }

    /// Tables without what nothing can read: slots outside published ranges.
    fn visible(tables: &Tables) -> Tables {
        let ranges = |tables: &Tables| {
            let packed = tables.services.values().flat_map(|record| [record.cluster, record.local]);
            packed.map(Range::unpack).map(|range| range.base..range.base + range.count).collect::<Vec<_>>()
        };
        let ranges = ranges(tables);
        let mut tables = tables.clone();
        tables.slots.retain(|position, _| ranges.iter().any(|range| range.contains(position)));
        tables
    }

    /// Whom a client gets by each frontend: address and port, or `None` for a backend that is not there.
    fn served(tables: &Tables) -> BTreeMap<FrontendAddr, Vec<Option<(Addr, u16)>>> {
        let of = |value: &FrontendValue| {
            let Some(record) = tables.services.get(&ServiceId(value.service)) else { return Vec::new() };
            let range = Range::unpack(record.cluster);
            let slots = (range.base..range.base + range.count).map(|position| tables.slots[&position]);
            let backend = |slot: Slot| {
                assert_eq!(slot.owner, value.service, "a slot of another service");
                tables.backends.get(&BackendId(slot.backend)).map(|record| (record.addr, record.port.host().0))
            };
            slots.map(backend).collect()
        };
        tables.frontends.iter().map(|(at, value)| (*at, of(value))).collect()
    }

    /// Frontends of one service.
    fn frontends_of(tables: &Tables, number: u8) -> Vec<FrontendAddr> {
        let ours =
            |id: u32| tables.names.get(&ServiceId(id)).is_some_and(|name| name.contains(&format!("/s{number}:")));
        tables.frontends.iter().filter(|(_, value)| ours(value.service)).map(|(at, _)| *at).collect()
    }

    #[test]
    fn a_history_leads_to_the_tables_of_its_end() {
        let mut reconciler = reconciler(Tables::default());
        run(&mut reconciler, &history());
        assert!(!reconciler.has_failures());
        let tables = reconciler.maps();
        assert_eq!(tables.names.len(), 4);
        for number in [1, 3] {
            assert_eq!(frontends_of(tables, number).len(), 3, "two ClusterIP ports and a NodePort");
        }
    }

    #[test]
    fn what_somebody_else_takes_out_of_the_tables_is_written_again() {
        let mut reconciler = reconciler(Tables::default());
        run(&mut reconciler, &history());
        let before = reconciler.maps().clone();
        assert!(reconciler.audit(&Place::default()).unwrap().ops.is_empty(), "nothing is wrong");
        let at = *before.frontends.keys().next().unwrap();
        reconciler.maps.frontends.remove(&at);
        assert_eq!(reconciler.audit(&Place::default()).unwrap().ops.len(), 1);
        assert_eq!(reconciler.maps().frontends, before.frontends);
        reconciler.maps = Tables::default();
        let found = reconciler.audit(&Place::default()).unwrap();
        assert!(found.ops.len() > 20 && found.rest.is_none(), "{found:?}");
        let written = reconciler.maps();
        assert_eq!((&written.frontends, &written.services), (&before.frontends, &before.services));
        assert_eq!((&written.names, &written.backends), (&before.names, &before.backends));
        assert!(reconciler.audit(&Place::default()).unwrap().ops.is_empty(), "all is well again");
    }

    #[test]
    fn what_was_refused_is_not_taken_for_somebody_elses_doing_and_nothing_is_looked_at_meanwhile() {
        let mut reconciler = without_external();
        run(&mut reconciler, &[external_snapshot([(1, 1), (0, 0), (0, 0)])]);
        assert!(reconciler.has_failures());
        assert!(reconciler.audit(&Place::default()).unwrap().ops.is_empty());
        // A plan under way: what it frees is still there.
        reconciler.advance(&external_snapshot([(2, 1), (0, 0), (0, 0)]));
        reconciler.maps.tables = Tables::default();
        assert!(reconciler.retiring() > 0);
        assert!(reconciler.audit(&Place::default()).unwrap().ops.is_empty());
    }

    /// Every operation of the history that can be refused is refused once, each in a run of its own: afterwards the tables
    /// are as if nothing had been refused, and while it waits every frontend but those it is about serves as it should.
    #[test]
    fn any_operation_may_be_refused_once_and_harms_only_its_own_frontends() {
        let count = {
            let tried = RefCell::new(0);
            let mut counting = reconciler(Faulty {
                tables: Tables::default(),
                refuses: |_: &Op| {
                    *tried.borrow_mut() += 1;
                    false
                },
            });
            run(&mut counting, &history());
            tried.into_inner()
        };
        assert!(count > 80, "the history does {count} operations that can be refused");
        for refused in 0..count {
            refuse_one(refused);
        }
    }

    fn refuse_one(refused: usize) {
        let (tried, hurt) = (RefCell::new(0), RefCell::new(None));
        let refuses = |op: &Op| {
            *tried.borrow_mut() += 1;
            let is_refused = *tried.borrow() == refused + 1;
            if is_refused {
                *hurt.borrow_mut() = Some(op.clone());
            }
            is_refused
        };
        let mut faulty = reconciler(Faulty { tables: Tables::default(), refuses });
        let mut sound = reconciler(Tables::default());
        for snapshot in history() {
            *hurt.borrow_mut() = None;
            faulty.advance(&snapshot);
            sound.advance(&snapshot);
            // A later operation of the same plan may have made the refused one void.
            assert!(faulty.failures().len() <= usize::from(hurt.borrow().is_some()), "one refusal, one subject");
            check_harm(&faulty.maps().tables, sound.maps(), hurt.borrow().as_ref());
            faulty.retire(faulty.retiring());
            sound.retire(sound.retiring());
            check_harm(&faulty.maps().tables, sound.maps(), hurt.borrow().as_ref());
            faulty.retry(Instant::now());
            assert!(!faulty.has_failures(), "refused once, operation {refused} is done at the second try");
            assert_eq!(visible(&faulty.maps().tables), visible(sound.maps()), "operation {refused}");
        }
    }

    /// Frontends serve as they should, but for those that the refused operation is about.
    fn check_harm(seen: &Tables, wanted: &Tables, refused: Option<&Op>) {
        let is_hurt = |at: &FrontendAddr| match refused {
            Some(Op::PutFrontend { at: hurt, .. } | Op::DeleteFrontend { at: hurt }) => at == hurt,
            Some(Op::PutName { id, .. }) => wanted.frontends.get(at).is_some_and(|value| value.service == id.0),
            _ => false,
        };
        for (at, backends) in served(seen) {
            assert!(!backends.contains(&None), "{at} is published without its backends after {refused:?}");
            let id = ServiceId(seen.frontends[&at].service);
            assert!(seen.names.contains_key(&id), "{at} belongs to a service without a name after {refused:?}");
        }
        let others = |tables| served(tables).into_iter().filter(|(at, _)| !is_hurt(at)).collect::<Vec<_>>();
        assert_eq!(others(seen), others(wanted), "left: after {refused:?}, right: without it");
    }

    /// A reconciler whose tables take no frontend at the external address.
    fn without_external() -> Reconciler<Faulty<impl FnMut(&Op) -> bool>> {
        let external = Addr::from(Ipv4Addr::from(EXTERNAL));
        let refuses = move |op: &Op| matches!(op, Op::PutFrontend { at, .. } if at.addr == external);
        reconciler(Faulty { tables: Tables::default(), refuses })
    }

    fn cluster_ip(number: u8) -> FrontendAddr {
        FrontendAddr { addr: addr(0, number), port: Port(80), proto: Proto::TCP }
    }

    fn pods(third: u8, lasts: impl IntoIterator<Item = u8>) -> Vec<Option<(Addr, u16)>> {
        lasts.into_iter().map(|last| Some((addr(third, last), 8080))).collect()
    }

    #[test]
    fn a_service_with_a_refused_frontend_follows_its_endpoints_by_the_others() {
        let mut reconciler = without_external();
        run(&mut reconciler, &[snapshot([(1, 1), (0, 0), (0, 0)]), external_snapshot([(1, 1), (0, 0), (0, 0)])]);
        assert!(reconciler.has_failures());
        // The pod is replaced, then another service gets one, with the id that is free again.
        run(
            &mut reconciler,
            &[external_snapshot([(2, 1), (0, 0), (0, 0)]), external_snapshot([(2, 1), (1, 1), (0, 0)])],
        );
        let served = served(&reconciler.maps().tables);
        assert_eq!(served[&cluster_ip(1)], pods(1, [2]));
        assert_eq!(served[&cluster_ip(2)], pods(2, [1]));
    }

    #[test]
    fn a_pod_that_a_service_with_a_refused_frontend_lists_first_is_there_for_others() {
        let mut reconciler = without_external();
        let snapshots =
            [external_snapshot([(1, 1), (1, 1), (0, 0)]), external_snapshot([(SHARED, 1), (SHARED, 1), (0, 0)])];
        run(&mut reconciler, &snapshots);
        assert!(reconciler.has_failures());
        for number in [1, 2] {
            assert_eq!(served(&reconciler.maps().tables)[&cluster_ip(number)], pods(SHARED, [SHARED]));
        }
    }

    #[test]
    fn a_service_is_deleted_while_one_of_its_frontends_is_refused() {
        let mut reconciler = without_external();
        run(&mut reconciler, &[external_snapshot([(1, 1), (0, 0), (0, 0)])]);
        assert!(reconciler.has_failures());
        run(&mut reconciler, &[snapshot([(0, 0), (0, 0), (0, 0)])]);
        assert!(!reconciler.has_failures(), "{:?}", reconciler.failures());
        assert_eq!(reconciler.maps().tables.frontends, BTreeMap::new());
        assert_eq!(reconciler.maps().tables.names, BTreeMap::new());
    }

    /// Its clients would be another service's.
    #[test]
    fn the_id_of_a_deleted_service_is_not_used_while_a_frontend_still_names_it() {
        let is_refusing = RefCell::new(true);
        let refuses = |op: &Op| *is_refusing.borrow() && matches!(op, Op::DeleteFrontend { .. });
        let mut reconciler = reconciler(Faulty { tables: Tables::default(), refuses });
        run(&mut reconciler, &[snapshot([(1, 1), (0, 0), (0, 0)]), snapshot([(0, 0), (2, 1), (0, 0)])]);
        run(&mut reconciler, &[snapshot([(0, 0), (2, 1), (3, 1)])]);
        let tables = &reconciler.maps().tables;
        assert_eq!((frontends_of(tables, 1).len(), tables.names.len()), (3, 6));
        assert_eq!(served(tables)[&cluster_ip(1)], pods(1, [1]));
        *is_refusing.borrow_mut() = false;
        reconciler.retry(Instant::now());
        let tables = &reconciler.maps().tables;
        assert_eq!((frontends_of(tables, 1).len(), tables.names.len(), tables.backends.len()), (0, 4, 4));
    }

    /// A table that never takes a certain frontend: it waits, all else goes on, and what makes it void ends it.
    #[test]
    fn a_refusal_that_lasts_is_a_status_until_it_is_void() {
        let refuses = |op: &Op| matches!(op, Op::PutFrontend { at, .. } if at.addr == addr(0, 2));
        let mut reconciler = reconciler(Faulty { tables: Tables::default(), refuses });
        run(&mut reconciler, &history()[..3]);
        for _ in 0..3 {
            reconciler.retry(Instant::now());
        }
        let failures = reconciler.failures();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].subject, Subject::Service(key(2)));
        assert!(failures[0].attempts >= 4, "{failures:?}");
        assert!(failures[0].error.contains("cannot use fake: "), "{failures:?}");
        assert_eq!(frontends_of(&reconciler.maps().tables, 3).len(), 3);
        assert_eq!(frontends_of(&reconciler.maps().tables, 2).len(), 1, "its NodePort");
        reconciler.advance(&snapshot([(2, 2), (0, 0), (1, 2)]));
        reconciler.retire(reconciler.retiring());
        reconciler.retry(Instant::now());
        assert!(!reconciler.has_failures(), "{:?}", reconciler.failures());
        assert_eq!(reconciler.maps().tables.names.len(), 4);
    }
}
