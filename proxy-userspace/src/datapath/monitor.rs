//! What the programs tell while somebody watches: the switch, and the ring buffer behind it.
//!
//! The programs tell nothing unless the switch says that somebody watches until a moment to come; whoever watches moves that
//! moment on. So a watcher that is killed leaves nothing switched on.
//!
//! May touch: the tables `watch` and `events`, and a lock beside them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use aya::maps::{Map, MapData, MapError, RingBuf};
use proxy_common::abi::event::{EventRecord, Watch};
use proxy_common::lb::flow::Seconds;

use super::kernel::{self, MapFds};
use super::maps::{self, Table};
use super::pins::{self, Pins};
use super::sys;

/// Why nothing can be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pin directory.
    #[error(transparent)]
    Pins(#[from] pins::Error),
    /// A table is missing.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// A table cannot be used.
    #[error(transparent)]
    Maps(#[from] maps::Error),
    /// There is one buffer, and who reads takes.
    #[error("somebody else watches already")]
    Taken,
    /// The buffer cannot be mapped.
    #[error("cannot map the buffer of events")]
    Buffer(#[source] Box<MapError>),
}

/// For how long the switch is set; to be renewed well before.
const LEASE: Duration = Duration::from_secs(4);

/// Somebody who watches, for as long as this lives.
pub struct Monitor {
    switch: Table<u32, Watch>,
    wanted: Watch,
    events: RingBuf<MapData>,
    lost: u64,
    _lock: File,
}

impl Monitor {
    /// Begins to watch what `wanted` says; its times are filled in.
    pub fn open(pins: &Pins, maps: &MapFds, wanted: Watch) -> Result<Self, Error> {
        let lock = pins.lock_events()?.ok_or(Error::Taken)?;
        let fd: OwnedFd = maps.duplicate("events")?;
        let buffer = |error| Error::Buffer(Box::new(error));
        let data = MapData::from_fd(fd).map_err(buffer)?;
        let mut events: RingBuf<MapData> = Map::RingBuf(data).try_into().map_err(buffer)?;
        // What an earlier watcher has not read is old.
        while events.next().is_some() {}
        let mut monitor = Self { switch: Table::open(maps, "watch")?, wanted, events, lost: 0, _lock: lock };
        monitor.wanted.lost = 0;
        monitor.switch_on()?;
        Ok(monitor)
    }

    /// Keeps the programs telling. To be called every second or so.
    pub fn renew(&mut self) -> Result<(), Error> {
        self.lost += self.switch.get(&0)?.map_or(0, |watch| u64::from(watch.lost));
        self.switch_on()
    }

    fn switch_on(&mut self) -> Result<(), Error> {
        let until = Seconds::from_nanos((sys::monotonic() + LEASE).as_nanos() as u64);
        self.wanted.until = until.0;
        Ok(self.switch.put(&0, &self.wanted)?)
    }

    /// The next event, if there is one.
    pub fn take(&mut self) -> Option<EventRecord> {
        loop {
            let item = self.events.next()?;
            if let Some(record) = parse(&item) {
                return Some(record);
            }
        }
    }

    /// Events that found no room, about.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It ends by itself if this fails.
        let _ = self.switch.put(&0, &Watch::ZERO);
    }
}

fn parse(bytes: &[u8]) -> Option<EventRecord> {
    let bytes: &[u8; size_of::<EventRecord>()] = bytes.get(..size_of::<EventRecord>())?.try_into().ok()?;
    // SAFETY: as many bytes as the record has, of which any are a value; read without asking for alignment.
    Some(unsafe { bytes.as_ptr().cast::<EventRecord>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_from_its_bytes_and_from_no_fewer() {
        let mut bytes = [0; size_of::<EventRecord>() + 8];
        bytes[..8].copy_from_slice(&7_u64.to_ne_bytes());
        assert_eq!(parse(&bytes), Some(EventRecord { time: 7, ..EventRecord::ZERO }));
        assert_eq!(parse(&bytes[..size_of::<EventRecord>() - 1]), None);
    }
}
