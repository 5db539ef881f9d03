//! `shunt cleanup`: everything that the agent left in the kernel is taken out. Running it twice is the same as once.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::datapath::kernel::MapFds;
use crate::datapath::pins::{self, Pins};
use crate::datapath::{attach, predecessor, reserve, sweep, withdraw};

/// Between two looks at the flows that are left.
const PAUSE: Duration = Duration::from_secs(1);
/// Between two lines that say how many these are.
const TELL: Duration = Duration::from_secs(10);

/// Detaches, unpins and undoes what is pinned; after what is there has ended, if `drain` says so.
pub(super) fn run(pins: &Pins, drain: Option<Option<Duration>>) -> Result<()> {
    let bpffs = pins.base();
    if !bpffs.try_exists().with_context(|| format!("cannot look into {}", bpffs.display()))? {
        return super::print(&format!("nothing is pinned below {}\n", bpffs.display()));
    }
    // An agent that runs would attach everything again.
    let lock = pins.lock().context("nothing was removed")?;
    if let Some(limit) = drain {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.context("cannot start the runtime")?.block_on(drain_flows(pins, limit))?;
    }
    let detached = attach::detach_all(pins)?;
    reserve::release(pins)?;
    predecessor::release(pins)?;
    let layouts = pins.layouts()?;
    layouts.iter().try_for_each(|layout| pins.remove(*layout))?;
    pins.clear_remains()?;
    pins::remove_layout(&pins.continuations())?;
    // The lock is an open directory: it would keep the mount busy.
    drop(lock);
    pins.remove_directories()?;
    super::print(&format!(
        "{detached} links and {} layouts of tables removed from {}\n",
        layouts.len(),
        bpffs.display()
    ))
}

/// Withdraws the frontends, then waits until no flow is left or `limit` is over.
async fn drain_flows(pins: &Pins, limit: Option<Duration>) -> Result<()> {
    let layouts = pins.layouts()?;
    let Some(layout) = layouts.last() else { return Ok(()) };
    anyhow::ensure!(layouts.len() == 1, "an agent did not finish changing the tables: start it once more, then drain");
    let is_readable = layout.version == pins.version();
    anyhow::ensure!(is_readable, "these tables are of another version of shunt: drain with that one");
    let maps = MapFds::open_pinned(pins)?;
    let frontends = withdraw::withdraw(pins, &maps).context("the frontends cannot be withdrawn")?;
    super::print(&format!("{frontends} frontends withdrawn, new connections pass untouched\n"))?;
    // Nobody takes the addresses that are unused: all of them go soon.
    let mut sweep = sweep::Task::open(&maps, mpsc::channel(1).0)?;
    let end = limit.map(|limit| Instant::now() + limit);
    let mut told: Option<Instant> = None;
    loop {
        let left = withdraw::live_flows(&mut sweep).await?;
        let is_over = end.is_some_and(|end| Instant::now() >= end);
        if left == 0 || is_over || told.is_none_or(|told| told.elapsed() >= TELL) {
            super::print(&format!("{left} flows are left\n"))?;
            told = Some(Instant::now());
        }
        if left == 0 || is_over {
            return Ok(());
        }
        sleep(end.map_or(PAUSE, |end| PAUSE.min(end.saturating_duration_since(Instant::now())))).await;
    }
}

/// Reads a duration with units, as in `1h30m`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let parsed = text.parse::<jiff::SignedDuration>().map_err(|error| error.to_string())?;
    Duration::try_from(parsed).map_err(|_| "a duration cannot be negative".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for text in ["", "90", "-5s", "soon"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
