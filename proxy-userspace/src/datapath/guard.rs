//! Pins that somebody else removes: made again. The maps live on with this process, and would end with it.
//!
//! Pins of links are made again by `attach`: a link without its pin is gone. What is noted beside the pins is noted again, and
//! the right to change what is pinned is taken anew where its directory is a new one.
//! May touch: the pin directory.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use super::attach::Error;
use super::kernel::{Continuations, MapFds, on_map};
use super::pins::{Layout, Lock, Pins};
use super::sys;

/// What is to stay pinned.
#[derive(Debug)]
pub struct Guard {
    maps: Arc<MapFds>,
    /// Where the maps are pinned, once no other programs run.
    layout: Option<Layout>,
    /// The directory of all, by device and inode.
    base: Option<(u64, u64)>,
    /// Notes as they were at the last look.
    notes: BTreeSet<String>,
    /// On a directory that was made again.
    lock: Option<Lock>,
}

impl Guard {
    /// Keeps the pins of these maps.
    pub fn new(maps: Arc<MapFds>) -> Self {
        Self { maps, layout: None, base: None, notes: BTreeSet::new(), lock: None }
    }

    /// Begins to keep them where they are now: no other programs run any more.
    pub fn begin(&mut self, pins: &Pins) -> Result<(), Error> {
        self.layout = pins.current()?;
        self.remember(pins)
    }

    /// Makes again what is gone. How many pins that were; nothing before it is known where they belong.
    pub fn repair(&mut self, pins: &Pins, continuations: &Continuations) -> Result<usize, Error> {
        let Some(layout) = self.layout else { return Ok(0) };
        pins.prepare()?;
        self.repair_base(pins)?;
        let directory = pins.maps(layout);
        pins.ensure(&directory)?;
        let mut count = 0;
        for (name, map) in self.maps.iter() {
            let pin = directory.join(name);
            if !pin.exists() {
                sys::pin(map, &pin).map_err(on_map("pin", name))?;
                count += 1;
            }
        }
        Ok(count + usize::from(continuations.repair(pins)?))
    }

    /// Takes the lock of a directory that is not the one of the last look, and notes there what was noted.
    fn repair_base(&mut self, pins: &Pins) -> Result<(), Error> {
        if base(pins) != self.base {
            self.lock = Some(pins.lock()?);
        }
        // Others of this agent make notes and remove them, but never all.
        if pins.marks()?.is_empty() {
            self.notes.iter().try_for_each(|note| pins.mark(note))?;
        }
        self.remember(pins)
    }

    fn remember(&mut self, pins: &Pins) -> Result<(), Error> {
        self.base = base(pins);
        self.notes = pins.marks()?.into_iter().collect();
        Ok(())
    }
}

fn base(pins: &Pins) -> Option<(u64, u64)> {
    fs::metadata(pins.base()).map(|data| (data.dev(), data.ino())).ok()
}
