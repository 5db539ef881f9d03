//! Tables in the kernel: those of a layout that is left, read as its version has them, and those of the one taken up.
//!
//! May touch: map entries.

use std::os::fd::{AsFd as _, OwnedFd};

use aya::Pod;

use super::Error;
use super::part::{New, NewCounters, Old, OldCounters, Visit};
use crate::datapath::convert::{self, Conversion};
use crate::datapath::kernel::{self, MapFds, on_map};
use crate::datapath::maps::{PerCpu, Table};
use crate::datapath::sys;

/// What is called with the bytes of each key and value.
type VisitBytes<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<(), Error>;

/// A map of the layout that is left, read as its version has it.
pub(super) struct OldMap {
    pub(super) name: &'static str,
    fd: OwnedFd,
    info: sys::MapInfo,
    conversion: Conversion,
}

impl OldMap {
    /// None if that layout has no such map.
    pub(super) fn open(maps: &MapFds, version: u32, name: &'static str) -> Result<Option<Self>, kernel::Error> {
        let Ok(fd) = maps.get(name) else { return Ok(None) };
        let info = sys::map_info(fd).map_err(on_map("examine", name))?;
        let conversion = convert::of(version, name);
        Ok(Some(Self { name, fd: maps.duplicate(name)?, info, conversion }))
    }

    fn record<T: Pod>(&self, convert: convert::Convert, bytes: &[u8], room: &mut Vec<u8>) -> Result<T, Error> {
        room.clear();
        convert(bytes, room);
        if room.len() != size_of::<T>() {
            return Err(Error::Record(self.name));
        }
        // SAFETY: as long as the type, which is plain bytes; any bits are a value of it.
        Ok(unsafe { room.as_ptr().cast::<T>().read_unaligned() })
    }

    /// Calls `visit` with each key and the bytes of its value, those of all CPUs in a row.
    fn for_each_bytes(&self, visit: VisitBytes<'_>) -> Result<(), Error> {
        let key_size = self.info.key_size as usize;
        let value_size = self.stride()?;
        let mut count = 4096.min(self.info.max_entries.max(1) as usize);
        let (mut keys, mut values) = (vec![0; count * key_size], vec![0; count * value_size]);
        let (mut cursor, mut is_done) = (sys::Cursor::default(), false);
        while !is_done {
            let buffers = ((key_size, keys.as_mut_slice()), (value_size, values.as_mut_slice()));
            let batch = match sys::map_lookup_batch_bytes(self.fd.as_fd(), &mut cursor, buffers.0, buffers.1) {
                Ok(batch) => batch,
                // One bucket holds more than the buffers.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    count *= 2;
                    keys.resize(count * key_size, 0);
                    values.resize(count * value_size, 0);
                    continue;
                }
                Err(source) => return Err(on_map("read", self.name)(source).into()),
            };
            for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(value_size)).take(batch.count) {
                visit(key, value)?;
            }
            is_done = batch.done || batch.count == 0;
        }
        Ok(())
    }

    /// Bytes of an element: of a per-CPU map one value a CPU, each filled up to eight bytes.
    fn stride(&self) -> Result<usize, kernel::Error> {
        let value_size = self.info.value_size as usize;
        if !self.info.is_per_cpu() {
            return Ok(value_size);
        }
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| on_map("count CPUs for", self.name)(error))?;
        Ok(value_size.next_multiple_of(8) * cpus)
    }
}

impl<K: Pod, V: Pod> Old<K, V> for OldMap {
    fn for_each(&self, visit: Visit<'_, K, V>) -> Result<(), Error> {
        let mut room = Vec::new();
        self.for_each_bytes(&mut |key, value| {
            let key = self.record(self.conversion.key, key, &mut room)?;
            let value = self.record(self.conversion.value, value, &mut room)?;
            visit(key, value)
        })
    }
}

impl OldCounters for OldMap {
    fn for_each(&self, visit: Visit<'_, u32, Vec<u64>>) -> Result<(), Error> {
        let (mut room, mut key_room) = (Vec::new(), Vec::new());
        let value_size = self.info.value_size as usize;
        self.for_each_bytes(&mut |key, copies| {
            if copies.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            let mut sums: Vec<u64> = Vec::new();
            for copy in copies.chunks_exact(value_size.next_multiple_of(8)) {
                room.clear();
                (self.conversion.value)(&copy[..value_size], &mut room);
                let words = room.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")));
                sums.resize(room.len() / 8, 0);
                sums.iter_mut().zip(words).for_each(|(sum, word)| *sum += word);
            }
            visit(self.record(self.conversion.key, key, &mut key_room)?, sums)
        })
    }
}

impl<K: Pod, V: Pod> New<K, V> for Table<K, V> {
    fn capacity(&self) -> u32 {
        Table::capacity(self)
    }

    fn get(&self, key: &K) -> Result<Option<V>, Error> {
        Table::get(self, key)
    }

    fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), Error> {
        Ok(Table::put_all(self, keys, values)?)
    }

    fn insert(&self, key: &K, value: &V) -> Result<(), Error> {
        Table::insert(self, key, value).map(drop)
    }

    fn remove_all(&self, keys: &[K]) -> Result<(), Error> {
        Ok(Table::remove_all(self, keys)?)
    }
}

impl<V: Pod> NewCounters for PerCpu<V> {
    fn set(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
        // All on the first CPU: readers add them up.
        self.set_words(index, counts)
    }

    fn add(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
        self.add_words(index, counts)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proxy_common::addr::Addr;

    use super::*;

    /// A record that grew is read by the conversion of its version.
    #[test]
    fn records_of_an_older_version_are_converted_one_by_one() {
        fn grow(old: &[u8], new: &mut Vec<u8>) {
            new.extend_from_slice(old);
            new.extend_from_slice(&[0; 12]);
        }
        let fd = std::fs::File::open("/dev/null").unwrap().into();
        let info = sys::MapInfo { id: 0, kind: 1, key_size: 4, value_size: 2, max_entries: 1, flags: 0 };
        let map = OldMap { name: "addresses", fd, info, conversion: Conversion::NONE };
        let address = Addr::from(Ipv4Addr::new(10, 0, 0, 1));
        let word = address.0[0].to_ne_bytes();
        let mut room = Vec::new();
        let read: Addr = map.record(grow, &word, &mut room).unwrap();
        assert_eq!(read, Addr([address.0[0], 0, 0, 0]));
        let wrong = map.record::<Addr>(map.conversion.key, &word, &mut room).unwrap_err();
        assert_eq!(wrong.to_string(), "an entry of addresses is none of its version");
    }
}
