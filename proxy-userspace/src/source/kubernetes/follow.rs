//! One kind of object: listed, watched from there on, listed again when the watch cannot go on.
//!
//! ```text
//!  List ──▶ Watch ──(its time is over)──▶ Watch
//!   ▲         │
//!   │         └─(ended early, refused)──▶ Check ──(the same data)──▶ Watch
//!   └──(version too old)──┘                 └──(other data)──▶ List
//! ```
//! A server that comes back may have another store behind it, restored from a backup or new. A watch from a version of the
//! old store would then be silent until the new one reaches that version. So after every end that was not agreed on, two
//! small requests find out whether the store is still the same and not behind what we know; only then the watch goes on. A
//! restart of the server thus costs no list.

use std::convert::Infallible;
use std::ops::Range;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::intake::Intake;
use super::query::{Query, ask_identity};
use super::session::{Connection, Error};
use super::wire::{Event as WatchEvent, is_older, parse_event, parse_page, parse_uid};
use crate::datapath::backoff::Backoff;
use crate::datapath::sys;
use crate::error::chain;
use crate::model::{Event, Kind, SourceId, Update};
use crate::source::contact::Contact;

/// How long a watch is asked for, as client-go does it; spread, so that the watches of a cluster's nodes do not end together.
const WATCH_SECONDS: Range<u32> = 300..600;

/// A watch may end this much before its time and is still taken to have lasted it.
const ROUNDING: Duration = Duration::from_secs(1);

/// A watch that lasted this long ends the series of failures before it.
const STEADY: Duration = Duration::from_secs(10);

/// How often a cluster is asked for a kind that it does not have.
const ABSENT_PAUSE: Duration = Duration::from_secs(300);

/// Nobody listens to the source any more.
#[derive(Debug)]
struct Unheard;

/// Why a step did not come to its end.
#[derive(Debug)]
enum Failure {
    Unheard,
    Server(Error),
}

impl From<Unheard> for Failure {
    fn from(_: Unheard) -> Self {
        Self::Unheard
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Server(error)
    }
}

/// What is to be done next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// List everything.
    List,
    /// See whether a watch from the last version would tell the truth.
    Check,
    /// Watch from the last version on.
    Watch,
}

/// Follows one kind.
pub struct Follower<'a> {
    query: Query,
    connection: &'a Connection,
    intake: &'a Mutex<Intake>,
    updates: &'a mpsc::Sender<Update>,
    contact: &'a Contact,
    /// Of the store that was listed, if the server tells.
    identity: Option<String>,
    /// The last state of the store that is known.
    version: String,
    was_listed: bool,
    backoff: Backoff,
    /// The last failure, and how many there were without a success between.
    failing: Option<(String, u32)>,
}

impl<'a> Follower<'a> {
    /// Follows what `query` asks for.
    pub fn new(
        query: Query,
        connection: &'a Connection,
        intake: &'a Mutex<Intake>,
        updates: &'a mpsc::Sender<Update>,
        contact: &'a Contact,
    ) -> Self {
        Self {
            query,
            connection,
            intake,
            updates,
            contact,
            identity: None,
            version: String::new(),
            was_listed: false,
            backoff: Backoff::default(),
            failing: None,
        }
    }

    /// Lists and watches until nobody listens any more.
    pub async fn run(mut self) {
        let updates = self.updates;
        tokio::select! {
            Err(Unheard) = self.go_on() => {}
            () = updates.closed() => {}
        }
    }

    async fn go_on(&mut self) -> Result<Infallible, Unheard> {
        let mut step = Step::List;
        loop {
            let done = match step {
                Step::List => self.list().await,
                Step::Check => self.check().await,
                Step::Watch => self.watch().await,
            };
            step = match done {
                Ok(next) => next,
                Err(Failure::Unheard) => return Err(Unheard),
                Err(Failure::Server(error)) => {
                    self.note_failure(&error);
                    self.pause().await;
                    after_failure(step, &error)
                }
            };
        }
    }

    /// Lists everything.
    async fn list(&mut self) -> Result<Step, Failure> {
        // Before the list: if the store is exchanged between the two, the next check sees a change where there is none. The
        // other way round it would miss one.
        let identity = self.identify().await?;
        let mut text = match self.connection.fetch(self.query.list(None)).await {
            Err(error) if error.code() == Some(400) && self.query.relax() => return Ok(Step::List),
            Err(error) if self.is_absent(&error) => return self.do_without(&error).await,
            first => first?,
        };
        self.tell(|intake, kind| Some(intake.begin(kind))).await?;
        loop {
            let page = parse_page(&text).map_err(Error::Unreadable)?;
            for object in &page.objects {
                self.tell(|intake, kind| intake.listed(kind, object)).await?;
            }
            let Some(token) = page.next else {
                self.version = page.version;
                break;
            };
            text = self.connection.fetch(self.query.list(Some(&token))).await?;
        }
        self.tell(|intake, kind| Some(intake.end(kind))).await?;
        debug!(kind = %self.query.kind(), version = self.version, "listed");
        (self.identity, self.was_listed) = (identity, true);
        self.note_success().await?;
        Ok(Step::Watch)
    }

    /// True if the cluster does not have the kind, or its role not the right to it, and can do without.
    fn is_absent(&self, error: &Error) -> bool {
        self.query.is_optional() && !self.was_listed && matches!(error.code(), Some(403 | 404))
    }

    /// Tells that there is nothing of the kind, and asks again much later.
    async fn do_without(&mut self, error: &Error) -> Result<Step, Failure> {
        info!(kind = %self.query.kind(), %error, "going on without");
        self.contact.found(self.query.kind().name());
        self.tell(|intake, kind| Some(intake.begin(kind))).await?;
        self.tell(|intake, kind| Some(intake.end(kind))).await?;
        self.note_success().await?;
        sleep(ABSENT_PAUSE).await;
        Ok(Step::List)
    }

    /// The uid of the service that every API server makes itself; `None` if there is none.
    async fn identify(&self) -> Result<Option<String>, Error> {
        let text = self.connection.fetch(ask_identity()).await?;
        Ok(parse_uid(&parse_page(&text).map_err(Error::Unreadable)?))
    }

    /// Finds out whether the store behind the server is the one that was listed, and not behind what is known.
    async fn check(&mut self) -> Result<Step, Failure> {
        let identity = self.identify().await?;
        let text = self.connection.fetch(self.query.probe()).await?;
        let newest = parse_page(&text).map_err(Error::Unreadable)?.version;
        if identity == self.identity && !is_older(&newest, &self.version) {
            return Ok(Step::Watch);
        }
        let (kind, known) = (self.query.kind(), &self.version);
        info!(%kind, known, newest, "the API server has other data than before, listing again");
        Ok(Step::List)
    }

    /// Watches until the watch ends.
    async fn watch(&mut self) -> Result<Step, Failure> {
        let time = Duration::from_secs(random_between(WATCH_SECONDS).into());
        let begun = Instant::now();
        let end = self.watch_for(time).await;
        let lasted = begun.elapsed();
        if lasted >= STEADY {
            self.backoff = Backoff::default();
        }
        let next = end?;
        if next == Step::Check && lasted + ROUNDING >= time {
            return Ok(Step::Watch);
        }
        // Without it, a server that ends every watch at once would be asked at once again, by every node.
        self.pause().await;
        Ok(next)
    }

    /// Watches until the server ends the watch, and what follows from how it did.
    async fn watch_for(&mut self, time: Duration) -> Result<Step, Failure> {
        let mut lines = match self.connection.watch(self.query.watch(&self.version, time.as_secs())).await {
            Err(error) if error.code() == Some(TOO_OLD) => return Ok(Step::List),
            opened => opened?,
        };
        self.note_success().await?;
        while let Some(line) = lines.next().await? {
            self.contact.heard();
            let version = match parse_event(line).map_err(Error::Unreadable)? {
                WatchEvent::Put(object, version) => {
                    self.tell(|intake, kind| intake.put(kind, object)).await?;
                    version
                }
                WatchEvent::Gone(object, version) => {
                    self.tell(|intake, kind| intake.gone(kind, object)).await?;
                    version
                }
                WatchEvent::Bookmark(version) => version,
                WatchEvent::Failed(status) if status.code == TOO_OLD => return Ok(Step::List),
                WatchEvent::Failed(status) => return Err(Error::Refused(status).into()),
                WatchEvent::Unknown => None,
            };
            self.version = version.unwrap_or(std::mem::take(&mut self.version));
            self.tell_problems().await?;
        }
        Ok(Step::Check)
    }

    /// Waits, longer each time until a watch has been steady.
    async fn pause(&mut self) {
        sleep(self.backoff.next_wait()).await;
    }

    fn note_failure(&mut self, error: &Error) {
        let text = chain(error);
        let attempt = match self.failing.take() {
            Some((known, count)) if known == text => count + 1,
            _ => 1,
        };
        if attempt.is_power_of_two() {
            let (server, kind) = (self.connection.server(), self.query.kind());
            warn!(%server, %kind, error = text, attempt, "no news from the API server, retrying; what is known stays");
        }
        self.contact.lost(self.query.kind().name(), text.clone());
        self.failing = Some((text, attempt));
    }

    async fn note_success(&mut self) -> Result<(), Unheard> {
        if self.failing.take().is_some() {
            info!(server = %self.connection.server(), kind = %self.query.kind(), "the API server answers again");
        }
        self.contact.found(self.query.kind().name());
        self.tell_problems().await
    }

    async fn tell_problems(&self) -> Result<(), Unheard> {
        self.tell(|intake, _| intake.problems()).await
    }

    async fn tell(&self, what: impl FnOnce(&mut Intake, Kind) -> Option<Event>) -> Result<(), Unheard> {
        let event = what(&mut *self.intake.lock().await, self.query.kind());
        match event {
            Some(event) => {
                let update = Update { source: SourceId::Kubernetes, events: vec![event] };
                self.updates.send(update).await.map_err(|_| Unheard)
            }
            None => Ok(()),
        }
    }
}

/// The status of a version whose changes the server no longer has.
const TOO_OLD: u16 = 410;

/// What follows when a step has failed and it is time to try again.
fn after_failure(step: Step, error: &Error) -> Step {
    match (step, error.code()) {
        // The server understands the question and cannot make anything of the version.
        (Step::List, _) | (_, Some(400 | 404 | 405 | TOO_OLD | 422)) => Step::List,
        _ => Step::Check,
    }
}

fn random_between(range: Range<u32>) -> u32 {
    let mut bytes = [0; 4];
    // Without randomness it is the beginning of the range.
    let random = sys::random(&mut bytes).map_or(0, |()| u32::from_ne_bytes(bytes));
    range.start + random % (range.end - range.start)
}
