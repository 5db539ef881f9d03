//! Tables that are nearly full: told before something finds no room.
//!
//! Only tables that refuse what does not fit; those that forget the oldest entry are full all the time. May touch: the tables,
//! for reading.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::metrics::Tables;
use crate::drain::Drain;
use crate::error::chain;
use crate::telemetry::event::notice::{Notice, Notices};

/// Between two looks: each walks through the tables.
const INTERVAL: Duration = Duration::from_secs(15);
/// Per cent from which on a table counts as nearly full, and below which it no longer does.
const FULL: usize = 90;
const ROOMY: usize = 85;

/// Tables that are looked at, and the option that gives each more room.
const TABLES: [(&str, &str); 6] = [
    ("services", "--max-services"),
    ("frontends", "--max-services"),
    ("backends", "--max-backends"),
    ("slots", "--max-backends"),
    ("addresses", "--max-backends"),
    ("flows", "--max-flows"),
];

/// How full a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// Its name.
    pub table: &'static str,
    /// The option that gives it more room.
    option: &'static str,
    /// Entries.
    pub used: usize,
    /// Entries that fit.
    pub capacity: usize,
}

impl Use {
    fn is_at(&self, percent: usize) -> bool {
        self.used.saturating_mul(100) >= self.capacity.saturating_mul(percent)
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { option, used, capacity, .. } = self;
        write!(f, "nearly full: {used} of {capacity}; what finds no room is refused; {option} gives it more")
    }
}

/// Nearly full tables, by name.
pub type NearlyFull = BTreeMap<&'static str, Use>;

/// Which tables are nearly full, after `known` were.
fn judge(known: &NearlyFull, uses: impl IntoIterator<Item = Use>) -> NearlyFull {
    let is_full = |usage: &Use| usage.is_at(if known.contains_key(usage.table) { ROOMY } else { FULL });
    uses.into_iter().filter(is_full).map(|usage| (usage.table, usage)).collect()
}

/// The looks as a part of the agent.
#[derive(Debug)]
pub struct Task {
    tables: Tables,
    found: watch::Sender<NearlyFull>,
    /// Who hears of it.
    pub notices: Notices,
}

impl Task {
    /// Looks at `tables`.
    pub fn new(tables: Tables) -> Self {
        Self { tables, found: watch::Sender::default(), notices: Notices::default() }
    }

    /// Which are nearly full.
    pub fn watch(&self) -> watch::Receiver<NearlyFull> {
        self.found.subscribe()
    }

    /// Looks until the drain.
    pub async fn run(self, mut drain: Drain) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => tokio::task::block_in_place(|| self.look()),
                () = drain.wait() => return,
            }
        }
    }

    fn look(&self) {
        let mut uses = Vec::new();
        for (table, option) in TABLES {
            match self.tables.usage(table) {
                Ok(Some((used, capacity))) => uses.push(Use { table, option, used, capacity: capacity as usize }),
                Ok(None) => {}
                Err(error) => return warn!(error = chain(&error), table, "how full a table is cannot be read"),
            }
        }
        let known = self.found.borrow().clone();
        let found = judge(&known, uses);
        for usage in found.values().filter(|usage| !known.contains_key(usage.table)) {
            let Use { table, used, capacity, option } = *usage;
            warn!(table, used, capacity, option, "a table is nearly full; what finds no room is refused");
            let note = format!(
                "the table {table} of this node has {capacity} entries and is nearly full; {option} gives it more"
            );
            self.notices.tell(Notice::of_node("TableNearlyFull", "Inspect", note));
        }
        for table in known.keys().filter(|table| !found.contains_key(*table)) {
            info!(table, "a table has room again");
        }
        self.found.send_if_modified(|told| {
            let is_new = *told != found;
            *told = found;
            is_new
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(table: &'static str, used: usize) -> Use {
        Use { table, option: "--max-flows", used, capacity: 200 }
    }

    #[test]
    fn a_table_is_nearly_full_from_nine_tenths_on_and_until_it_has_room() {
        let names = |found: &NearlyFull| found.keys().copied().collect::<Vec<_>>();
        let none = NearlyFull::new();
        let first = judge(&none, [usage("flows", 180), usage("slots", 179)]);
        assert_eq!(names(&first), ["flows"]);
        let second = judge(&first, [usage("flows", 170), usage("slots", 179)]);
        assert_eq!(names(&second), ["flows"]);
        assert!(judge(&second, [usage("flows", 169), usage("slots", 179)]).is_empty());
    }

    #[test]
    fn it_is_told_what_to_do() {
        let expected = "nearly full: 190 of 200; what finds no room is refused; --max-flows gives it more";
        assert_eq!(usage("flows", 190).to_string(), expected);
    }
}
