//! From one layout of the tables to another, under traffic.
//!
//! ```text
//!  prepare   new maps beside the old ones, programs loaded, entries copied       old programs run
//!  close     copied again; flows are held; copied again; the new layout counts   old programs run
//!            links are flipped (`attach`)                                        both run
//!  finish    what the old programs changed since is merged; flows are let go     new programs run
//!            the old layout is removed
//! ```
//! *Held* means that packets neither open nor remove flows (`Config::settles_at`): they are dropped, and clients send them
//! again, TCP by itself after a second. So both layouts have the same flows from the first flipped link to the last, whatever
//! pair of old and new programs a connection meets, and no packet of a flow meets a table that does not know it. That is why
//! nothing else is held: a backend's packets that no flow translates are its own, and pass. (Letting flows be opened meanwhile
//! would not spare a new connection its second: the answer would meet an egress program without its flow.) It is done only
//! if a table of flows is copied, takes two passes through the old tables and two grace periods (below 0.1 s with few flows;
//! the log says how long it was), and ends by itself if the agent dies.
//!
//! An agent may die at any of these points; the next one, of either layout, finds
//!
//! | died | finds | does |
//! |---|---|---|
//! | before the new layout counts | the old one; a preparation | removes the preparation, begins anew |
//! | later | two layouts; links that run either's programs | merges the older into the newer, goes on from there |
//! | while the old one is removed | the new one; remains | removes the remains |
//!
//! Whoever holds flows sets a time at which that ends by itself: a dead agent never keeps connections from being opened. What
//! the old programs open after that the next agent merges.
//! May touch: layouts below the pin directory; entries by way of `carry`.

use std::time::{Duration, Instant};

use proxy_common::lb::flow::Seconds;
use tracing::{info, warn};

use super::carry::Carry;
use super::kernel::MapFds;
use super::maps;
use super::pins::{self, Layout, Pins};
use super::sys;
use crate::error::chain;

/// How long flows are held at most if nobody lets them go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a layout could not take over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pin directory.
    #[error(transparent)]
    Pins(#[from] pins::Error),
    /// Entries.
    #[error("cannot take over the tables of another layout")]
    Carry(#[from] maps::Error),
}

/// A layout that is to take over. Dropped before it counts, it is removed.
pub struct Handover {
    pins: Pins,
    carry: Option<Carry>,
    from: String,
    held_since: Option<Instant>,
    is_committed: bool,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handover")
            .field("from", &self.from)
            .field("is_committed", &self.is_committed)
            .finish_non_exhaustive()
    }
}

impl Handover {
    /// What is in the preparation directory is to take over; nothing is known of entries.
    pub(super) fn prepare(pins: &Pins) -> Self {
        Self { pins: pins.clone(), carry: None, from: String::new(), held_since: None, is_committed: false }
    }

    /// Makes it the layout that counts.
    pub(super) fn commit(&mut self) -> Result<Layout, pins::Error> {
        let layout = self.pins.commit()?;
        self.is_committed = true;
        Ok(layout)
    }

    /// Copies the maps of these names for the first time.
    pub(super) fn begin(
        mut self,
        old: &MapFds,
        from: Layout,
        new: &MapFds,
        names: &[&str],
    ) -> Result<Self, maps::Error> {
        let start = Instant::now();
        let mut carry = Carry::open(old, from.version, new, names)?;
        carry.copy()?;
        let (entries, took_ms) = (carry.count(), milliseconds(start));
        self.from = from.to_string();
        info!(from = self.from, copied = names.join(" "), entries, took_ms, "another layout of the tables is prepared");
        self.carry = Some(carry);
        Ok(self)
    }

    /// To be called right before the first link runs the new programs: makes the new layout the one that counts.
    pub fn close(&mut self) -> Result<(), Error> {
        if let Some(carry) = &mut self.carry {
            // While nothing is held yet, so that little is left for later.
            carry.copy()?;
            if carry.has_flows() {
                self.held_since = Some(Instant::now());
                carry.hold_old(deadline())?;
                // Programs that run now may not have seen it.
                maps::wait_for_programs();
            }
            carry.copy()?;
            carry.hold_new(deadline())?;
        }
        let layout = self.commit()?;
        if let Some(carry) = &self.carry {
            carry.hold_old(deadline())?;
        }
        info!(from = self.from, to = %layout, "another layout of the tables counts");
        Ok(())
    }

    /// To be called when links have been flipped; again, if some were flipped later.
    pub fn finish(&mut self) -> Result<(), Error> {
        let Some(carry) = &mut self.carry else { return Ok(()) };
        carry.hold_new(deadline())?;
        maps::wait_for_programs();
        carry.merge()?;
        carry.hold_new(Seconds(0))?;
        if let Some(since) = self.held_since.take() {
            info!(held_ms = milliseconds(since), "flows go on in another layout of the tables");
        }
        Ok(())
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        if self.is_committed {
            return;
        }
        if let Err(error) = self.carry.as_ref().map_or(Ok(()), |carry| carry.hold_old(Seconds(0))) {
            warn!(error = chain(&error), "flows are held for some seconds");
        }
        if let Err(error) = self.pins.clear_remains() {
            warn!(error = chain(&error), "what was prepared is left behind");
        }
    }
}

fn milliseconds(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}

fn deadline() -> Seconds {
    Seconds::from_nanos((sys::monotonic() + PATIENCE).as_nanos() as u64)
}
