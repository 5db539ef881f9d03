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

    /// Makes the tables say what `snapshot` wants.
    pub fn advance(&mut self, snapshot: &Arc<Snapshot>) {
        self.plan(|state| state.advance(snapshot));
    }

    /// Forgets an address that no flow uses any more.
    pub fn prune_address(&mut self, addr: Addr) {
        self.plan(|state| state.prune_address(addr));
    }

    fn plan(&mut self, plan: impl FnOnce(State) -> (State, Plan)) {
        let state = self.state.take().expect("the state is put back after each planning");
        let (state, plan) = plan(state);
        self.state = Some(state);
        if !plan.is_empty() {
            self.apply(plan);
        }
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
                count = grace.passed() => if blocking(|| self.reconciler.retire(count)) { self.advance() },
                () = until(retry_at) => {
                    blocking(|| self.reconciler.retry());
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

    fn advance(&mut self) {
        let snapshot = self.snapshots.borrow_and_update().clone();
        // Services of sources that have not listed are kept as the tables have them, so there is nothing to wait for.
        let start = Instant::now();
        blocking(|| self.reconciler.advance(&snapshot));
        self.pending = snapshot.pending.clone();
        debug!(elapsed = ?start.elapsed(), "reconciled");
    }

    fn prune(&mut self, unused: Vec<Addr>) {
        blocking(|| unused.into_iter().for_each(|addr| self.reconciler.prune_address(addr)));
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
