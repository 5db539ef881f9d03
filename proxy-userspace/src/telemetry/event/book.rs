//! Which notice becomes which event, when it is written, and when it is lost. Pure: the time comes as argument.
//!
//! The first time a notice makes an event; what follows is counted in it (its series), and written at once the second
//! time and then every [`SERIES_PAUSE`]. Writes are limited by a bucket: [`BURST`] at once, then one each [`REFILL`].

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::notice::Notice;

/// Events that are known: those that wait, and those that may be told again.
pub const MOST: usize = 1000;
/// How long an event waits for an API server that takes it.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// Between two writes of how often something was told.
pub const SERIES_PAUSE: Duration = Duration::from_secs(10);
/// An event that was not told again for so long is begun anew the next time. The API server keeps events for an hour
/// (`--event-ttl`).
const MEMORY: Duration = Duration::from_secs(3600);
/// Writes at once.
const BURST: u32 = 25;
/// For one more write.
const REFILL: Duration = Duration::from_secs(1);
/// Between two attempts of one event.
const RETRY: Duration = Duration::from_secs(5);

/// What became of a write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The event says what is known.
    Written,
    /// Another node has told it.
    Known,
    /// There is nothing any more that it is about.
    Gone,
    /// The API server does not want it.
    Refused(String),
    /// It may work later.
    Failed(String),
}

/// An event to be written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Due {
    /// What it says.
    pub notice: Notice,
    /// When it was told first.
    pub first: SystemTime,
    /// When it was told last.
    pub last: SystemTime,
    /// How often.
    pub count: u32,
    /// The event is there already.
    pub is_begun: bool,
}

#[derive(Debug)]
struct Entry {
    first: SystemTime,
    last: SystemTime,
    count: u32,
    /// What of `count` the server knows.
    written: u32,
    /// What is being written.
    writing: u32,
    /// Another node counts it.
    is_foreign: bool,
    /// When the next write may be.
    due: Instant,
    /// Since when a write is outstanding.
    waiting_since: Instant,
    told: Instant,
}

impl Entry {
    fn is_waiting(&self) -> bool {
        !self.is_foreign && self.count > self.written
    }
}

/// All events.
#[derive(Debug)]
pub struct Book {
    entries: BTreeMap<Notice, Entry>,
    tokens: u32,
    refilled: Option<Instant>,
}

impl Default for Book {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), tokens: BURST, refilled: None }
    }
}

impl Book {
    /// Takes a notice in, to be written after `delay`. False if there is no room: it is lost.
    pub fn note(&mut self, notice: Notice, now: Instant, clock: SystemTime, delay: Duration) -> bool {
        self.forget_old(now);
        if let Some(entry) = self.entries.get_mut(&notice) {
            if !entry.is_waiting() {
                entry.waiting_since = now;
            }
            (entry.last, entry.told) = (clock, now);
            entry.count = entry.count.saturating_add(1);
            return true;
        }
        if self.entries.len() >= MOST && !self.forget_settled() {
            return false;
        }
        let entry = Entry {
            first: clock,
            last: clock,
            count: 1,
            written: 0,
            writing: 0,
            is_foreign: false,
            due: now + delay,
            waiting_since: now,
            told: now,
        };
        self.entries.insert(notice, entry);
        true
    }

    fn forget_old(&mut self, now: Instant) {
        self.entries.retain(|_, entry| entry.is_waiting() || now < entry.told + MEMORY);
    }

    /// Makes room by forgetting what was told longest ago and is written. False if nothing is.
    fn forget_settled(&mut self) -> bool {
        let settled = self.entries.iter().filter(|(_, entry)| !entry.is_waiting());
        let oldest = settled.min_by_key(|(_, entry)| entry.told).map(|(notice, _)| notice.clone());
        oldest.and_then(|notice| self.entries.remove(&notice)).is_some()
    }

    /// What is to be written now; it counts as being written until it is settled.
    pub fn next(&mut self, now: Instant) -> Option<Due> {
        self.refill(now);
        if self.tokens == 0 {
            return None;
        }
        let due = self.entries.iter_mut().filter(|(_, entry)| entry.is_waiting() && entry.due <= now);
        let (notice, entry) = due.min_by_key(|(_, entry)| entry.due)?;
        self.tokens -= 1;
        entry.writing = entry.count;
        let Entry { first, last, count, written, .. } = *entry;
        Some(Due { notice: notice.clone(), first, last, count, is_begun: written > 0 })
    }

    /// When there is something to be written; none if nothing waits.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        let due = self.entries.values().filter(|entry| entry.is_waiting()).map(|entry| entry.due).min()?;
        let refilled = self.refilled.unwrap_or(now);
        Some(if self.tokens > 0 { due } else { due.max(refilled + REFILL) })
    }

    fn refill(&mut self, now: Instant) {
        let since = self.refilled.get_or_insert(now);
        let whole = (now.saturating_duration_since(*since).as_secs() / REFILL.as_secs()).min(u64::from(BURST)) as u32;
        if self.tokens + whole >= BURST {
            (self.tokens, *since) = (BURST, now);
        } else {
            self.tokens += whole;
            *since += REFILL * whole;
        }
    }

    /// Notes what became of a write. True if the event is given up.
    pub fn settle(&mut self, notice: &Notice, outcome: &Outcome, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(notice) else { return false };
        match outcome {
            Outcome::Written => {
                // The second time is news; later ones are numbers.
                entry.due = if entry.written == 0 { now } else { now + SERIES_PAUSE };
                (entry.written, entry.waiting_since) = (entry.writing, now);
                false
            }
            Outcome::Known => {
                entry.is_foreign = true;
                false
            }
            Outcome::Gone | Outcome::Refused(_) => {
                self.entries.remove(notice);
                false
            }
            Outcome::Failed(_) if now.saturating_duration_since(entry.waiting_since) >= PATIENCE => {
                self.entries.remove(notice);
                true
            }
            Outcome::Failed(_) => {
                entry.due = now + RETRY;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A book, and a time that passes when told to.
    struct Rig {
        book: Book,
        start: Instant,
        seconds: u64,
    }

    impl Rig {
        fn new() -> Self {
            Self { book: Book::default(), start: Instant::now(), seconds: 0 }
        }

        fn now(&self) -> Instant {
            self.start + Duration::from_secs(self.seconds)
        }

        fn note(&mut self, note: &str) -> bool {
            let clock = SystemTime::UNIX_EPOCH + Duration::from_secs(self.seconds);
            self.book.note(notice(note), self.now(), clock, Duration::ZERO)
        }

        /// What is to be written now: note, count, and whether the event is there.
        fn next(&mut self) -> Option<(String, u32, bool)> {
            let now = self.now();
            self.book.next(now).map(|due| (due.notice.note, due.count, due.is_begun))
        }

        fn settle(&mut self, note: &str, outcome: Outcome) -> bool {
            let now = self.now();
            self.book.settle(&notice(note), &outcome, now)
        }
    }

    fn notice(note: &str) -> Notice {
        Notice::of_node("A", "B", note)
    }

    #[test]
    fn what_is_told_again_is_counted_in_one_event() {
        let mut rig = Rig::new();
        assert!(rig.note("a"));
        assert_eq!(rig.next(), Some(("a".into(), 1, false)));
        assert!(rig.note("a"), "while it is being written");
        rig.settle("a", Outcome::Written);
        assert_eq!(rig.next(), Some(("a".into(), 2, true)), "the second time is told at once");
        rig.settle("a", Outcome::Written);
        assert_eq!(rig.next(), None);
        (0..100).for_each(|_| assert!(rig.note("a")));
        assert_eq!(rig.next(), None);
        assert_eq!(rig.book.next_due(rig.now()), Some(rig.start + SERIES_PAUSE));
        rig.seconds += SERIES_PAUSE.as_secs();
        assert_eq!(rig.next(), Some(("a".into(), 102, true)));
        rig.settle("a", Outcome::Written);
        rig.seconds += 1000;
        assert_eq!((rig.next(), rig.book.next_due(rig.now())), (None, None));
    }

    #[test]
    fn a_flood_is_written_in_a_trickle_and_beyond_a_bound_not_at_all() {
        let mut rig = Rig::new();
        let taken = (0..MOST + 10).filter(|number| rig.note(&number.to_string())).count();
        assert_eq!(taken, MOST);
        let drain = |rig: &mut Rig| {
            std::iter::from_fn(|| {
                let (note, ..) = rig.next()?;
                rig.settle(&note, Outcome::Written);
                Some(note)
            })
            .count()
        };
        assert_eq!(drain(&mut rig), BURST as usize);
        assert_eq!(rig.book.next_due(rig.now()), Some(rig.start + REFILL));
        rig.seconds += 3;
        assert_eq!(drain(&mut rig), 3);
        // What is written makes room.
        assert!(rig.note("new"));
    }

    #[test]
    fn what_another_node_has_told_is_left_to_it() {
        let mut rig = Rig::new();
        rig.note("a");
        rig.next().unwrap();
        rig.settle("a", Outcome::Known);
        rig.note("a");
        assert_eq!((rig.next(), rig.book.next_due(rig.now())), (None, None));
        rig.seconds += MEMORY.as_secs();
        rig.note("a");
        assert_eq!(rig.next(), Some(("a".into(), 1, false)), "its event is gone by now");
    }

    #[test]
    fn a_server_that_is_away_is_waited_for_and_not_for_ever() {
        let mut rig = Rig::new();
        rig.note("a");
        let failed = || Outcome::Failed("away".into());
        rig.next().unwrap();
        assert!(!rig.settle("a", failed()));
        assert_eq!(rig.next(), None);
        rig.seconds += RETRY.as_secs();
        assert_eq!(rig.next(), Some(("a".into(), 1, false)));
        rig.seconds += PATIENCE.as_secs();
        assert!(rig.settle("a", failed()), "it is given up");
        assert_eq!((rig.next(), rig.book.next_due(rig.now())), (None, None));
        // One that came later has its own time, also in an event that is there.
        rig.note("b");
        rig.next().unwrap();
        rig.settle("b", Outcome::Written);
        rig.seconds += PATIENCE.as_secs();
        rig.note("b");
        rig.next().unwrap();
        assert!(!rig.settle("b", failed()));
    }

    #[test]
    fn what_is_refused_is_not_tried_again() {
        for outcome in [Outcome::Gone, Outcome::Refused("no".into())] {
            let mut rig = Rig::new();
            rig.note("a");
            rig.next().unwrap();
            rig.settle("a", outcome);
            assert_eq!(rig.next(), None);
        }
    }

    #[test]
    fn a_delay_is_kept() {
        let mut rig = Rig::new();
        let now = rig.now();
        rig.book.note(notice("a"), now, SystemTime::UNIX_EPOCH, Duration::from_secs(2));
        assert_eq!((rig.next(), rig.book.next_due(now)), (None, Some(now + Duration::from_secs(2))));
        rig.seconds = 2;
        assert!(rig.next().is_some());
    }
}
