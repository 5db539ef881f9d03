//! The only writer of the tables: takes the newest snapshot, has it planned, does what the plan says.
//!
//! Nothing waits for quiet: a snapshot is planned as soon as the one before is done, those between are skipped. An
//! operation that is refused stays with its service as status and is tried again; the other services do not notice.
//! What a plan unpublishes is cleared when no program can read it any more; later plans do not wait for that.
//! May touch: the tables through [`Maps`]. Chooses nothing: the plan says what and in which order.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use proxy_common::addr::Addr;

use super::backlog::Backlog;
use super::backoff::Backoff;
use super::maps::{self, Maps};
use super::progress::Reporter;
use super::sys;
use crate::drain::Drain;
use crate::error::chain;
use crate::model::{Reader, ServiceKey, Snapshot, SourceId};
use crate::planner::{Epoch, Op, Plan, Problem, Stage, State, Subject};

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
    problems: BTreeMap<ServiceKey, Vec<Problem>>,
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
            problems: BTreeMap::new(),
            plans: 0,
        }
    }

    /// Makes the tables say what `snapshot` wants. Returns how many operations that took.
    pub fn advance(&mut self, snapshot: &Arc<Snapshot>) -> usize {
        self.plan(|state| state.advance(snapshot))
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
        self.supersede(&plan);
        self.apply_now(&plan);
        self.note_problems(plan.problems);
        let ops = plan.groups.into_iter().flat_map(|group| {
            let subject = group.subject;
            group.after_grace.into_iter().map(move |op| (subject.clone(), op))
        });
        self.retiring.push_back(Retiring { epoch: plan.epoch, ops: ops.collect() });
    }

    fn supersede(&mut self, plan: &Plan) {
        if self.backlog.is_empty() {
            return;
        }
        let ops = plan.groups.iter().flat_map(|group| group.now.iter().chain(&group.after_grace));
        ops.for_each(|op| self.backlog.supersede(op));
    }

    fn apply_now(&mut self, plan: &Plan) {
        let mut staged: Vec<(Stage, &Subject, &Op)> = Vec::new();
        for group in &plan.groups {
            staged.extend(group.now.iter().map(|op| (group.stage(op), &group.subject, op)));
        }
        staged.sort_by_key(|(stage, ..)| *stage);
        let ops: Vec<_> = staged.into_iter().map(|(_, subject, op)| (subject, op)).collect();
        self.apply_ops(&ops);
    }

    /// Does operations in order; a refused one goes to the backlog, and so do those that must wait behind it.
    fn apply_ops(&mut self, mut ops: &[(&Subject, &Op)]) {
        while let Some((subject, op)) = ops.first() {
            if self.backlog.blocks(subject) {
                self.backlog.push(subject, (*op).clone(), None);
                ops = &ops[1..];
                continue;
            }
            let free = ops.iter().take_while(|(subject, _)| !self.backlog.blocks(subject)).count();
            let batch: Vec<&Op> = ops[..free].iter().map(|(_, op)| *op).collect();
            ops = match self.maps.apply(&batch) {
                Ok(()) => &ops[free..],
                Err(refused) => {
                    let (subject, op) = ops[refused.done];
                    let error = chain(&refused.source);
                    warn!(?subject, %error, "a table refused an operation, it will be tried again");
                    self.backlog.push(subject, op.clone(), Some(error));
                    &ops[refused.done + 1..]
                }
            };
        }
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

    /// Plans whose freed entries are not cleared yet.
    pub fn retiring(&self) -> usize {
        self.retiring.len()
    }

    /// Clears what the `count` oldest such plans freed: no program that ran at their end runs any more. True if services
    /// that found no room should be tried again.
    ///
    /// Also for services with refused operations: those rest on tables that can be full, which is never true of the
    /// arrays that sets live in, so what is cleared here has been replaced.
    pub fn retire(&mut self, count: usize) -> bool {
        let mut is_roomier = false;
        for Retiring { epoch, ops } in self.retiring.drain(..count).collect::<Vec<_>>() {
            for (subject, op) in &ops {
                if let Err(refused) = self.maps.apply(&[op]) {
                    self.backlog.push(subject, op.clone(), Some(chain(&refused.source)));
                }
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

    /// Tries again what was refused.
    pub fn retry(&mut self) {
        let maps = &mut self.maps;
        self.backlog.retry(|op| maps.apply(&[op]).map_err(|refused| chain(&refused.source)));
    }

    /// What could not be done.
    fn failures(&self) -> Vec<Failure> {
        let failure = |(subject, waiting): (&Subject, &super::backlog::Waiting)| Failure {
            subject: subject.clone(),
            error: waiting.error.clone(),
            attempts: waiting.attempts,
            waiting: waiting.ops.len(),
        };
        self.backlog.iter().map(failure).collect()
    }

    /// The tables.
    pub fn maps(&self) -> &M {
        &self.maps
    }
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
    /// How many sources are configured.
    pub sources: usize,
    /// Sources that had not listed in the snapshot that was planned last.
    pub pending: Arc<[SourceId]>,
    /// To whom it tells what it is at.
    pub reporter: Reporter,
}

impl<M: Maps> Task<M> {
    /// Follows the snapshots until the drain; then does the last one and leaves the tables as they are.
    pub async fn run(mut self, mut drain: Drain) {
        let mut grace = Grace::default();
        let mut backoff = Backoff::default();
        let mut retry_at = None;
        // The first snapshot is there from the start.
        self.snapshots.mark_changed();
        loop {
            tokio::select! {
                changed = self.snapshots.changed() => match changed {
                    Ok(()) => self.advance(),
                    Err(_) => break,
                },
                Some(unused) = self.unused.recv() => self.prune(unused),
                count = grace.passed() => if self.work(|reconciler| reconciler.retire(count)) { self.advance() },
                () = until(retry_at) => {
                    self.work(Reconciler::retry);
                    retry_at = None;
                }
                () = drain.wait() => break,
            }
            grace.start(self.reconciler.retiring());
            if !self.reconciler.has_failures() {
                backoff = Backoff::default();
                retry_at = None;
            } else if retry_at.is_none() {
                retry_at = Some(Instant::now() + backoff.next_wait());
            }
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
        let (backlog, elapsed) = (&self.reconciler.backlog, (done > 0).then(|| start.elapsed()));
        self.reporter.applied(elapsed, snapshot.changes, |service| backlog.blocks(&Subject::Service(service.clone())));
        debug!(operations = done, elapsed = ?start.elapsed(), "reconciled");
    }

    fn prune(&mut self, unused: Vec<Addr>) {
        self.work(|reconciler| unused.into_iter().for_each(|addr| reconciler.prune_address(addr)));
    }

    /// Does what may take long.
    fn work<T>(&mut self, work: impl FnOnce(&mut Reconciler<M>) -> T) -> T {
        self.reporter.begin();
        let result = blocking(|| work(&mut self.reconciler));
        self.reporter.end();
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

    use proxy_common::addr::Port;

    use super::*;
    use crate::datapath::fake::Faulty;
    use crate::model::{
        ByFamily, Conditions, Endpoint, EndpointGroup, EndpointPort, EndpointSubset, Endpoints, GroupKind, Name,
        NodeFacts, Protocol, Service, ServicePort, TrafficPolicy,
    };
    use crate::planner::{Limits, SnatPorts, Tables};

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
            restricted: ByFamily::default(),
        }
    }

    /// `count` endpoints of service `number`, the first of them being endpoint `first`.
    fn endpoints(number: u8, first: u8, count: u8) -> Endpoints {
        let port =
            |name: &str, port| EndpointPort { name: Name::from(name), protocol: Protocol::Tcp, port: Port(port) };
        let endpoint = |last| Endpoint {
            addr: addr(number, last),
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
        let mut snapshot = Snapshot::empty(Arc::new(NodeFacts::named(Name::from("n"))), []);
        for (number, (first, count)) in (1..).zip(sets) {
            if first > 0 {
                snapshot.services.insert(key(number), Arc::new(service(number)));
                snapshot.endpoints.insert(key(number), Arc::new(endpoints(number, first, count)));
            }
        }
        Arc::new(snapshot)
    }

    /// What a history of snapshots passes through: new, scaled, moved, without endpoints, gone, back.
    fn history() -> Vec<Arc<Snapshot>> {
        let sets = [
            [(1, 2), (1, 1), (0, 0)],
            [(1, 2), (1, 3), (1, 2)],
            [(2, 2), (1, 3), (1, 2)],
            [(2, 2), (1, 0), (1, 2)],
            [(0, 0), (7, 2), (1, 2)],
            [(5, 4), (7, 2), (3, 1)],
        ];
        sets.into_iter().map(snapshot).collect()
    }

    fn state() -> State {
        State::restore(LIMITS, SnatPorts(10000..=10063), &Tables::default())
    }

    fn reconciler<M: Maps>(maps: M) -> Reconciler<M> {
        Reconciler::new(maps, state())
    }

    /// Reconciles the history as far as it goes, clearing after each step.
    fn run<M: Maps>(reconciler: &mut Reconciler<M>, history: &[Arc<Snapshot>]) {
        for snapshot in history {
            reconciler.advance(snapshot);
            reconciler.retire(reconciler.retiring());
        }
    }

    /// Tables without what nothing can read: slots outside published ranges.
    fn visible(tables: &Tables) -> Tables {
        use proxy_common::abi::service::Range;
        let ranges = |tables: &Tables| {
            let packed = tables.services.values().flat_map(|record| [record.cluster, record.local]);
            packed.map(Range::unpack).map(|range| range.base..range.base + range.count).collect::<Vec<_>>()
        };
        let ranges = ranges(tables);
        let mut tables = tables.clone();
        tables.slots.retain(|position, _| ranges.iter().any(|range| range.contains(position)));
        tables
    }

    /// Entries of one service that a client can reach.
    fn entries_of(tables: &Tables, number: u8) -> String {
        let ours = |name: &str| name.contains(&format!("/s{number}:"));
        let ids: Vec<_> = tables.names.iter().filter(|(_, name)| ours(name)).map(|(id, _)| *id).collect();
        let mut lines = Vec::new();
        for (at, value) in tables.frontends.iter().filter(|(_, value)| ids.iter().any(|id| id.0 == value.service)) {
            let record = tables.services[&crate::planner::ServiceId(value.service)];
            let range = proxy_common::abi::service::Range::unpack(record.cluster);
            let slots = (range.base..range.base + range.count).map(|position| tables.slots[&position].backend);
            let backends =
                slots.map(|id| tables.backends.get(&crate::planner::BackendId(id)).map(|b| (b.addr, b.port)));
            lines.push(format!("{at} {:?}", backends.collect::<Vec<_>>()));
        }
        lines.join("\n")
    }

    #[test]
    fn a_history_leads_to_the_tables_of_its_end() {
        let mut reconciler = reconciler(Tables::default());
        run(&mut reconciler, &history());
        assert!(!reconciler.has_failures());
        let tables = reconciler.maps();
        assert_eq!(tables.names.len(), 6);
        for number in 1..=3 {
            assert_eq!(entries_of(tables, number).lines().count(), 3, "two ClusterIP ports and a NodePort");
        }
    }

    /// Every operation of the history is refused once, each in a run of its own: afterwards the tables are as if nothing
    /// had been refused, and while it waits no other service is any different.
    #[test]
    fn any_operation_may_be_refused_once_and_harms_only_its_own_service() {
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
        assert!(count > 60, "the history does {count} operations");
        for refused in 0..count {
            refuse_one(refused);
        }
    }

    fn refuse_one(refused: usize) {
        let tried = RefCell::new(0);
        let refuses = |_: &Op| {
            *tried.borrow_mut() += 1;
            *tried.borrow() == refused + 1
        };
        let mut faulty = reconciler(Faulty { tables: Tables::default(), refuses });
        let mut sound = reconciler(Tables::default());
        for snapshot in history() {
            faulty.advance(&snapshot);
            sound.advance(&snapshot);
            let hurt: Vec<Subject> = faulty.failures().into_iter().map(|failure| failure.subject).collect();
            assert!(hurt.len() <= 1, "one refusal, one subject: {hurt:?}");
            for number in 1..=3 {
                let seen = entries_of(&faulty.maps().tables, number);
                assert!(!seen.contains("None"), "published without its backends, refusal {refused}: {seen}");
            }
            for number in (1..=3).filter(|number| !hurt.contains(&Subject::Service(key(*number)))) {
                let (seen, wanted) = (entries_of(&faulty.maps().tables, number), entries_of(sound.maps(), number));
                // Sets are emptied with the leftovers, after frontends that leave have left: one that waits still serves.
                let keeps_serving = hurt == [Subject::Leftovers]
                    && seen.lines().zip(wanted.lines()).all(|(seen, wanted)| seen == wanted || wanted.ends_with(" []"));
                assert!(
                    seen == wanted || keeps_serving,
                    "service {number} after the refusal of operation {refused}: {hurt:?}\n{seen}\nbut\n{wanted}"
                );
            }
            faulty.retry();
            assert!(!faulty.has_failures(), "refused once, operation {refused} is done at the second try");
            faulty.retire(faulty.retiring());
            sound.retire(sound.retiring());
            faulty.retry();
            assert_eq!(visible(&faulty.maps().tables), visible(sound.maps()), "operation {refused}");
        }
    }

    /// A table that never takes a certain frontend: its service waits, the others go on, and what makes it void ends it.
    #[test]
    fn a_refusal_that_lasts_is_a_status_until_it_is_void() {
        let refuses = |op: &Op| matches!(op, Op::PutFrontend { at, .. } if at.addr == addr(0, 2));
        let mut reconciler = reconciler(Faulty { tables: Tables::default(), refuses });
        run(&mut reconciler, &history()[..3]);
        for _ in 0..3 {
            reconciler.retry();
        }
        let failures = reconciler.failures();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].subject, Subject::Service(key(2)));
        assert!(failures[0].attempts >= 4, "{failures:?}");
        assert!(failures[0].error.contains("cannot write fake: "), "{failures:?}");
        assert_eq!(entries_of(&reconciler.maps().tables, 3).lines().count(), 3);
        reconciler.advance(&snapshot([(2, 2), (0, 0), (1, 2)]));
        reconciler.retire(reconciler.retiring());
        reconciler.retry();
        assert!(!reconciler.has_failures(), "{:?}", reconciler.failures());
        assert_eq!(reconciler.maps().tables.names.len(), 4);
    }
}
