//! When the changes happened that are not programmed yet: what a source says of them, until somebody has programmed them.
//!
//! Beside the snapshots, since those hold desired state alone; the number of a change joins the two.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, PoisonError};

use super::service::ServiceKey;

/// A change of a service's endpoints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trigger {
    /// Which change of endpoints it was, counted as in [`super::Changes`].
    pub number: u64,
    /// Of which service.
    pub service: ServiceKey,
    /// When it happened, in nanoseconds since 1970.
    pub at: NonZeroU64,
}

/// Those that are not programmed yet. Copies share them.
#[derive(Clone, Debug, Default)]
pub struct Triggers(Arc<Mutex<VecDeque<Trigger>>>);

impl Triggers {
    /// Takes a change, later than all before.
    pub(super) fn push(&self, trigger: Trigger) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(trigger);
    }

    /// The changes up to `number`, which are then forgotten: when the earliest of each service happened.
    pub fn take(&self, number: u64) -> BTreeMap<ServiceKey, NonZeroU64> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut earliest = BTreeMap::new();
        while let Some(trigger) = waiting.pop_front_if(|trigger| trigger.number <= number) {
            let at = earliest.entry(trigger.service).or_insert(trigger.at);
            *at = trigger.at.min(*at);
        }
        earliest
    }
}
