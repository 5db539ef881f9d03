//! Kubernetes events: what people see who ask the cluster about a service or a node, and not this agent.
//!
//! | module | holds |
//! |---|---|
//! | [`notice`] | what is told, and the way from the parts to here |
//! | [`standing`] | what the state of the agent gives to tell; pure |
//! | [`book`] | which notice becomes which event, when it is written, and when it is lost; pure |
//!
//! A notice that comes again is counted in the event that is there. What is the same on every node is one event, whose first
//! teller writes it. Nobody waits for an event: what the API server does not take within [`book::PATIENCE`] is lost, and
//! counted. An event that the server has forgotten (by default after an hour) is not told again for what goes on.
//! May touch: the API server, through [`Herald`].

pub mod book;
pub mod notice;
pub mod standing;

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use crate::datapath::overlap::Overlaps;
use crate::datapath::reconcile::Status;
use crate::datapath::sys;
use crate::drain::Drain;
use crate::health::node_port::Refusals;
use crate::model::Reader;
use crate::source::kubernetes::tell::Herald;
use book::{Book, Due, Outcome};
use notice::{Notice, Notices, Scope};
use standing::standing;

/// Between two looks at the state: what changes more often is seen once.
const PAUSE: Duration = Duration::from_millis(500);
/// Nodes that learn the same at the same moment tell it within this time.
const SPREAD: Duration = Duration::from_secs(2);

/// What is looked at for something to tell.
#[derive(Debug)]
pub struct Watched {
    /// What was done, and what not.
    pub status: watch::Receiver<Arc<Status>>,
    /// What sources cannot use.
    pub snapshots: Reader,
    /// Services whose health is not served.
    pub health_checks: watch::Receiver<Refusals>,
    /// NodePorts that something else has too.
    pub overlaps: watch::Receiver<Overlaps>,
}

/// Events as a part of the agent.
pub struct Task {
    notices: mpsc::Receiver<Notice>,
    watched: Watched,
    book: Book,
    known: BTreeSet<Notice>,
    written: Counter,
    lost: Counter,
}

/// A write under way.
type Writing = Pin<Box<dyn Future<Output = (Due, Outcome)> + Send>>;

impl Task {
    /// Where parts tell, and the part that writes it down.
    pub fn new(watched: Watched, registry: &mut Registry) -> (Notices, Self) {
        let (written, lost) = (Counter::default(), Counter::default());
        let registry = registry.sub_registry_with_prefix("shunt");
        registry.register("events", "Kubernetes events written, repetitions included", written.clone());
        let help =
            "Things to tell as Kubernetes events that were not, because there were too many or no API server took them";
        registry.register("events_lost", help, lost.clone());
        let (notices, receiver) = notice::channel(lost.clone());
        let task = Self { notices: receiver, watched, book: Book::default(), known: BTreeSet::new(), written, lost };
        (notices, task)
    }

    /// Tells until the drain; what is not written then is lost.
    pub async fn run(mut self, herald: Herald, mut drain: Drain) {
        let herald = Arc::new(herald);
        let mut writing: Option<Writing> = None;
        let mut look_at = Instant::now();
        self.watched.status.mark_changed();
        loop {
            if writing.is_none() {
                writing = self.book.next(Instant::now()).map(|due| write(herald.clone(), due));
            }
            let wake = if writing.is_none() { self.book.next_due(Instant::now()) } else { None };
            tokio::select! {
                Some(notice) = self.notices.recv() => self.note(notice),
                () = changed(&mut self.watched), if Instant::now() >= look_at => {
                    look_at = Instant::now() + PAUSE;
                    self.look();
                }
                () = sleep_until(look_at), if Instant::now() < look_at => {}
                (due, outcome) = finished(&mut writing) => {
                    writing = None;
                    self.settle(&due, outcome);
                }
                () = until(wake) => {}
                () = drain.wait() => return,
            }
        }
    }

    fn note(&mut self, notice: Notice) {
        let delay = if notice.scope == Scope::Cluster { spread() } else { Duration::ZERO };
        if !self.book.note(notice, Instant::now(), SystemTime::now(), delay) {
            self.lost.inc();
        }
    }

    /// Tells what is wrong now and was not at the last look.
    fn look(&mut self) {
        let status = self.watched.status.borrow_and_update().clone();
        let snapshot = self.watched.snapshots.borrow_and_update().clone();
        let refusals = self.watched.health_checks.borrow_and_update().clone();
        let overlaps = self.watched.overlaps.borrow_and_update().clone();
        let standing = standing(&status, &snapshot, &refusals, &overlaps);
        let new: Vec<_> = standing.difference(&self.known).cloned().collect();
        new.into_iter().for_each(|notice| self.note(notice));
        self.known = standing;
    }

    fn settle(&mut self, due: &Due, outcome: Outcome) {
        match &outcome {
            Outcome::Written => drop(self.written.inc()),
            Outcome::Known | Outcome::Gone => {}
            Outcome::Refused(error) => {
                self.lost.inc();
                warn!(event = %due.notice, error, "the API server refuses an event");
            }
            Outcome::Failed(error) => {
                debug!(event = %due.notice, error, "an event is not written, it will be tried again")
            }
        }
        if self.book.settle(&due.notice, &outcome, Instant::now()) {
            self.lost.inc();
            warn!(event = %due.notice, "an event is lost: no API server has taken it");
        }
    }
}

fn write(herald: Arc<Herald>, due: Due) -> Writing {
    Box::pin(async move {
        let outcome = herald.write(&due).await;
        (due, outcome)
    })
}

/// Ends with the write; never if there is none.
async fn finished(writing: &mut Option<Writing>) -> (Due, Outcome) {
    match writing {
        Some(writing) => writing.await,
        None => std::future::pending().await,
    }
}

/// Ends when something that is looked at has changed; never if it will not any more.
async fn changed(watched: &mut Watched) {
    let changed = tokio::select! {
        changed = watched.status.changed() => changed,
        changed = watched.snapshots.changed() => changed,
        changed = watched.health_checks.changed() => changed,
        changed = watched.overlaps.changed() => changed,
    };
    if changed.is_err() {
        std::future::pending().await
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// A part of [`SPREAD`].
fn spread() -> Duration {
    let mut random = [0; 2];
    let share = sys::random(&mut random).map_or(0, |()| u16::from_ne_bytes(random));
    SPREAD.mul_f64(f64::from(share) / f64::from(u16::MAX))
}
