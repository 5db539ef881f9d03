//! Tables that somebody else changes: found by comparison with what the planner knows of them, and written again.
//!
//! Every [`INTERVAL`] a part of the tables is looked at ([`PORTS`] service ports with all that they need, and what is this
//! node's), so that the work is bounded however many services there are. Where something is wrong, the rest is looked at too,
//! at once. Entries that somebody has added are not seen: no key of them is known. Flows and affinity are the programs' own,
//! and nobody knows what should be there.
//! May touch: the tables through [`Maps`]. Chooses nothing: what is written again is what was planned.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tracing::warn;

use super::attach::REPAIR;
use super::backlog::Backlog;
use super::maps::{self, Maps};
use crate::error::chain;
use crate::planner::{Op, Place, State, Subject};
use crate::telemetry::event::notice::{Notice, Notices};

/// Between two looks.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// Service ports of one look: with ten backends each, some thousand system calls, a few milliseconds.
const PORTS: usize = 512;

/// What was wrong in a part of the tables.
#[derive(Debug, Default)]
pub struct Found {
    /// Operations whose entries are other than they left them.
    pub ops: Vec<(Subject, Op)>,
    /// Where the next part begins; `None` if that was the last.
    pub rest: Option<Place>,
}

/// Looks at the part of the tables that begins at `place`. What waits in `backlog` is known to be wrong, and passed over.
pub fn look(state: &State, maps: &impl Maps, backlog: &Backlog, place: &Place) -> Result<Found, maps::Error> {
    let stated = state.stated(place, PORTS);
    let mut found = Found { ops: Vec::new(), rest: stated.rest };
    for (subject, op) in stated.ops {
        if !backlog.concerns(&op) && !maps.holds(&op)? {
            found.ops.push((subject, op));
        }
    }
    Ok(found)
}

/// The table of an operation.
fn table(op: &Op) -> &'static str {
    match op {
        Op::PutCidrs(_) => "config",
        Op::PutName { .. } => "service_names",
        Op::PutBackend { .. } | Op::RetireBackend { .. } => "backends",
        Op::AllowSource { .. } | Op::ForbidSource { .. } => "source_ranges",
        Op::WriteSlots { .. } => "slots",
        Op::PublishService { .. } | Op::RetireService { .. } => "services",
        Op::PutFrontend { .. } | Op::DeleteFrontend { .. } => "frontends",
        Op::PutAddress { .. } | Op::DeleteAddress { .. } => "addresses",
        Op::PutPorts { .. } => "ports",
    }
}

/// Tells what is written again.
#[derive(Debug, Default)]
pub struct Teller {
    /// Entries that were written again.
    pub repairs: Counter,
    /// Who hears of it.
    pub notices: Notices,
}

impl Teller {
    /// That these operations are done again.
    pub fn tell(&self, ops: &[(Subject, Op)]) {
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        ops.iter().for_each(|(_, op)| *counts.entry(table(op)).or_default() += 1);
        let services: BTreeSet<_> = ops.iter().map(|(subject, _)| subject).collect();
        self.tell_counts(&counts, services.len());
    }

    /// That what the node fixes in the configuration of the programs is written again.
    pub fn tell_config(&self) {
        self.tell_counts(&[("config", 1)].into(), 1);
    }

    fn tell_counts(&self, counts: &BTreeMap<&str, u64>, subjects: usize) {
        let total: u64 = counts.values().sum();
        let tables: Vec<_> = counts.keys().copied().collect();
        let tables = tables.join(", ");
        warn!(tables, entries = total, subjects, "somebody else has changed the tables; they are written again");
        self.repairs.inc_by(total);
        let note = format!("somebody else has changed the tables {tables} of this node; they are written again");
        self.notices.tell(Notice::of_node("TablesChanged", REPAIR, note));
    }

    /// That the tables cannot be read.
    pub fn tell_error(&self, error: &maps::Error) {
        warn!(error = chain(error), "the tables cannot be looked at");
    }
}
