//! Whether a source hears from where it reads, and since when it does not.
//!
//! Sources write it, status and metrics read it; it decides nothing. May touch: the wall clock, which is told to people.

use std::time::SystemTime;

use tokio::sync::watch;

/// A source's side; copies speak for the same source.
#[derive(Clone, Debug, Default)]
pub struct Contact(watch::Sender<State>);

/// How a source stands with what it reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// When something was last read, be it that nothing has changed.
    pub heard: Option<SystemTime>,
    /// What cannot be read at the moment: what was known of it stays.
    pub outages: Vec<Outage>,
}

/// Something that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// What.
    pub what: String,
    /// Since when.
    pub since: SystemTime,
    /// Why, by the last attempt.
    pub why: String,
}

impl Contact {
    /// For those who want to know.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.0.subscribe()
    }

    /// There was a sign of life.
    pub fn heard(&self) {
        let now = SystemTime::now();
        self.0.send_modify(|state| state.heard = Some(now));
    }

    /// `what` could be read.
    pub fn found(&self, what: &str) {
        let now = SystemTime::now();
        self.0.send_modify(|state| state.found(what, now));
    }

    /// `what` could not be read. True if it could before.
    pub fn lost(&self, what: &str, why: String) -> bool {
        let now = SystemTime::now();
        let mut is_new = false;
        self.0.send_modify(|state| is_new = state.lost(what, why, now));
        is_new
    }
}

impl State {
    fn found(&mut self, what: &str, now: SystemTime) {
        self.heard = Some(now);
        self.outages.retain(|outage| outage.what != what);
    }

    fn lost(&mut self, what: &str, why: String, now: SystemTime) -> bool {
        let known = self.outages.iter_mut().find(|outage| outage.what == what);
        let is_new = known.is_none();
        match known {
            Some(outage) => outage.why = why,
            None => self.outages.push(Outage { what: what.to_owned(), since: now, why }),
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_outage_lasts_from_its_first_failure_to_the_next_success() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let mut state = State::default();
        state.found("Service", at(1));
        assert!(state.lost("Service", "refused".into(), at(2)));
        assert!(state.lost("Node", "refused".into(), at(3)));
        assert!(!state.lost("Service", "silent".into(), at(4)));
        let outage = |what: &str, since, why: &str| Outage { what: what.into(), since: at(since), why: why.into() };
        assert_eq!(state.outages, [outage("Service", 2, "silent"), outage("Node", 3, "refused")]);
        assert_eq!(state.heard, Some(at(1)));
        state.found("Service", at(5));
        assert_eq!(state, State { heard: Some(at(5)), outages: vec![outage("Node", 3, "refused")] });
    }
}
