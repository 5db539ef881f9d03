//! What is copied from one layout of the tables to the next, and what becomes of what changes meanwhile.
//!
//! | entries | before the links run the new programs | afterwards |
//! |---|---|---|
//! | written by the agent alone (it is dead) | copied once | |
//! | of flows, clients, addresses | copied; then again what changed, and removed what went | what the old programs still changed is merged |
//! | kept ports | copied | added |
//! | counters | copied | what the old programs still counted is added |
//!
//! Copying again compares each old entry with what was copied of it, by a number of 64 bits a key: the new tables are not
//! read, and nobody but this module writes them then. Merging never takes from the new tables what their programs did: an
//! entry of another connection stands unless the old one is younger, states are united, and nothing is removed.
//! A counter that a program counts up while it is added to may lose that one count.
//! May touch: map entries; those of the old layout for reading.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::Pod;
use proxy_common::abi::address::{AddressClass, PortWord};
use proxy_common::abi::affinity::{AffinityKey, AffinityValue};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::Config;
use proxy_common::abi::counter::ServiceCounters;
use proxy_common::abi::device::DeviceRecord;
use proxy_common::abi::flow::{FlowKey, FlowValue};
use proxy_common::abi::fragment::{FragmentKey, FragmentValue};
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{Range, ServiceName, ServiceRecord, Slot};
use proxy_common::addr::Addr;
use proxy_common::lb::flow::{Hot, Seconds};

use super::convert::{self, Conversion};
use super::kernel::{self, MapFds, on_map};
use super::layout::Usage;
use super::maps::{self, PerCpu, Table};
use super::sys;

/// Why entries could not be carried over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A map is missing or of another layout.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// An entry cannot be written.
    #[error(transparent)]
    Maps(#[from] maps::Error),
    /// An entry has not the size that the conversion of its version gives it.
    #[error("an entry of {0} is none of its version")]
    Record(String),
}

/// Entries of the layout that is left.
pub trait Old<K, V> {
    /// Calls `visit` for every entry; entries that come or go meanwhile may be missed.
    fn for_each(&self, visit: &mut dyn FnMut(K, V) -> Result<(), Error>) -> Result<(), Error>;
}

/// Entries of the layout that is taken up.
pub trait New<K, V> {
    /// Capacity.
    fn capacity(&self) -> u32;
    /// An entry.
    fn get(&self, key: &K) -> Result<Option<V>, Error>;
    /// Writes entries.
    fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), Error>;
    /// Writes an entry if there is none with its key.
    fn insert(&self, key: &K, value: &V) -> Result<(), Error>;
    /// Removes entries; they may be gone.
    fn remove_all(&self, keys: &[K]) -> Result<(), Error>;
}

/// A record that programs write.
pub trait Record: Copy + Hash + PartialEq {
    /// The record without what may lag behind by some seconds.
    #[must_use]
    fn essence(&self) -> Self {
        *self
    }
    /// What `new` must become so that nothing of `old` is lost; `None`: it may stay as it is.
    fn merged(new: &Self, old: &Self) -> Option<Self>;
}

impl Record for FlowValue {
    fn essence(&self) -> Self {
        Self { hot: u64::from(Hot::unpack(self.hot).state), ..*self }
    }

    fn merged(new: &Self, old: &Self) -> Option<Self> {
        /// When a packet was last seen is of use to half a minute.
        const LAG: u32 = 2;
        let connection = |value: &Self| Self { hot: 0, proof: 0, mac: [0; 3], ..*value };
        let (theirs, ours) = (Hot::unpack(old.hot), Hot::unpack(new.hot));
        if connection(new) != connection(old) {
            return (theirs.seen > ours.seen).then_some(*old);
        }
        let hot = Hot { seen: ours.seen.max(theirs.seen), state: ours.state | theirs.state };
        let proof = if new.proof == 0 { old.proof } else { new.proof };
        let mac = if new.mac == [0; 3] { old.mac } else { new.mac };
        let merged = Self { hot: hot.pack(), proof, mac, ..*new };
        let is_behind = ours.seen.age(theirs.seen) > LAG;
        (is_behind || merged.essence() != new.essence()).then_some(merged)
    }
}

impl Record for AffinityValue {
    fn merged(new: &Self, old: &Self) -> Option<Self> {
        (Seconds(old.seen) > Seconds(new.seen)).then_some(*old)
    }
}

impl Record for FragmentValue {
    fn merged(_new: &Self, _old: &Self) -> Option<Self> {
        None
    }
}

impl Record for AddressClass {
    fn merged(new: &Self, old: &Self) -> Option<Self> {
        let flags = new.flags | old.flags & Self::FLOWS;
        (flags != new.flags).then_some(Self { flags })
    }
}

/// One map on its way.
trait Part {
    /// Makes the new entries what the old ones are. Only while no program writes the new ones.
    fn copy(&mut self) -> Result<(), Error>;
    /// Adds to the new entries what the old programs did since.
    fn merge(&mut self) -> Result<(), Error>;
    /// How many entries were copied.
    fn count(&self) -> usize;
}

/// Entries in the making of one call.
struct Writes<'a, K, V, N> {
    new: &'a N,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<'a, K: Copy, V: Copy, N: New<K, V>> Writes<'a, K, V, N> {
    const BATCH: usize = 4096;

    fn to(new: &'a N) -> Self {
        Self { new, keys: Vec::new(), values: Vec::new() }
    }

    fn put(&mut self, key: K, value: V) -> Result<(), Error> {
        self.keys.push(key);
        self.values.push(value);
        if self.keys.len() < Self::BATCH { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), Error> {
        if !self.keys.is_empty() {
            self.new.put_all(&self.keys, &self.values)?;
        }
        self.keys.clear();
        self.values.clear();
        Ok(())
    }
}

/// Entries that only the agent writes.
struct Once<O, N, K, V> {
    old: O,
    new: N,
    counts: fn(u32, &K, &V) -> bool,
    count: Option<usize>,
}

impl<K: Copy, V: Copy, O: Old<K, V>, N: New<K, V>> Part for Once<O, N, K, V> {
    fn copy(&mut self) -> Result<(), Error> {
        if self.count.is_some() {
            return Ok(());
        }
        let (mut writes, mut count, capacity) = (Writes::to(&self.new), 0, self.new.capacity());
        self.old.for_each(&mut |key, value| {
            if !(self.counts)(capacity, &key, &value) {
                return Ok(());
            }
            count += 1;
            writes.put(key, value)
        })?;
        writes.flush()?;
        self.count = Some(count);
        Ok(())
    }

    fn merge(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn count(&self) -> usize {
        self.count.unwrap_or_default()
    }
}

/// Entries that programs write.
struct Entries<O, N, K> {
    old: O,
    new: N,
    /// New entries that are found before these: what is older there must not hide what comes here.
    before: Option<N>,
    copied: HashMap<K, Copied>,
    round: u32,
    /// Entries that did not fit any more.
    lost: usize,
}

/// What was copied of an entry.
#[derive(Clone, Copy)]
struct Copied {
    essence: u64,
    round: u32,
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl<O, N, K> Entries<O, N, K> {
    fn new(old: O, new: N, before: Option<N>) -> Self {
        Self { old, new, before, copied: HashMap::new(), round: 0, lost: 0 }
    }
}

impl<O, N, K: Copy + Eq + Hash> Entries<O, N, K> {
    fn merge_one<V: Record>(&self, key: &K, old: &V) -> Result<(), Error>
    where
        N: New<K, V>,
    {
        if let Some(before) = &self.before
            && let Some(hiding) = before.get(key)?
            && V::merged(&hiding, old) == Some(*old)
        {
            before.remove_all(&[*key])?;
        }
        match self.new.get(key)? {
            None => self.new.insert(key, old),
            Some(new) => match V::merged(&new, old) {
                Some(merged) => self.new.put_all(&[*key], &[merged]),
                None => Ok(()),
            },
        }
    }
}

/// A table that is full.
fn is_full(error: &Error) -> bool {
    let Error::Maps(maps::Error::Write { source, .. }) = error else { return false };
    matches!(source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM))
}

/// [`Entries`] with the type of their values.
struct Written<O, N, K, V>(Entries<O, N, K>, std::marker::PhantomData<V>);

impl<O, N, K, V> Written<O, N, K, V> {
    fn new(old: O, new: N, before: Option<N>) -> Self {
        Self(Entries::new(old, new, before), std::marker::PhantomData)
    }
}

impl<K: Copy + Eq + Hash, V: Record, O: Old<K, V>, N: New<K, V>> Part for Written<O, N, K, V> {
    fn copy(&mut self) -> Result<(), Error> {
        let Entries { old, new, copied, round, .. } = &mut self.0;
        *round += 1;
        let mut writes = Writes::to(&*new);
        old.for_each(&mut |key, value| {
            let now = Copied { essence: hash(&value.essence()), round: *round };
            let before = copied.insert(key, now);
            if before.is_some_and(|before| before.essence == now.essence) { Ok(()) } else { writes.put(key, value) }
        })?;
        // What went makes room for what came.
        let gone: Vec<K> = copied.iter().filter(|(_, copy)| copy.round != *round).map(|(key, _)| *key).collect();
        copied.retain(|_, copy| copy.round == *round);
        new.remove_all(&gone)?;
        writes.flush()
    }

    fn merge(&mut self) -> Result<(), Error> {
        let Self(entries, _) = self;
        let mut lost = 0;
        entries.old.for_each(&mut |key, value: V| {
            let essence = hash(&value.essence());
            if entries.copied.get(&key).is_some_and(|copy| copy.essence == essence) {
                return Ok(());
            }
            match entries.merge_one(&key, &value) {
                Err(error) if is_full(&error) => lost += 1,
                result => result?,
            }
            Ok(())
        })?;
        entries.lost = lost;
        if lost > 0 {
            tracing::warn!(entries = lost, "some entries found no room in the new tables");
        }
        Ok(())
    }

    fn count(&self) -> usize {
        self.0.copied.len()
    }
}

/// Marks of ports: bits that are only ever set.
struct Bits<O, N>(O, N);

impl<O: Old<u32, PortWord>, N: New<u32, PortWord>> Part for Bits<O, N> {
    fn copy(&mut self) -> Result<(), Error> {
        self.merge()
    }

    fn merge(&mut self) -> Result<(), Error> {
        self.0.for_each(&mut |index, word| {
            let new = self.1.get(&index)?.map_or(0, |word| word.bits);
            if new | word.bits == new {
                return Ok(());
            }
            self.1.put_all(&[index], &[PortWord { bits: new | word.bits }])
        })
    }

    fn count(&self) -> usize {
        0
    }
}

/// Counters of the layout that is left, all CPUs together.
trait OldCounters {
    /// Calls `visit` for every element that counted something.
    fn for_each(&self, visit: &mut dyn FnMut(u32, Vec<u64>) -> Result<(), Error>) -> Result<(), Error>;
}

/// Counters of the layout that is taken up.
trait NewCounters {
    /// Replaces an element.
    fn set(&self, index: u32, counts: &[u64]) -> Result<(), Error>;
    /// Adds to an element.
    fn add(&self, index: u32, counts: &[u64]) -> Result<(), Error>;
}

/// Counters on their way.
struct Counters<O, N> {
    old: O,
    new: N,
    copied: HashMap<u32, Vec<u64>>,
}

impl<O: OldCounters, N: NewCounters> Part for Counters<O, N> {
    fn copy(&mut self) -> Result<(), Error> {
        self.old.for_each(&mut |index, counts| {
            if self.copied.get(&index) == Some(&counts) {
                return Ok(());
            }
            self.new.set(index, &counts)?;
            self.copied.insert(index, counts);
            Ok(())
        })
    }

    fn merge(&mut self) -> Result<(), Error> {
        self.old.for_each(&mut |index, counts| {
            let copied = self.copied.get(&index).cloned().unwrap_or_else(|| vec![0; counts.len()]);
            let more: Vec<u64> = counts.iter().zip(&copied).map(|(now, then)| now.saturating_sub(*then)).collect();
            if more.iter().any(|count| *count != 0) {
                self.new.add(index, &more)?;
                self.copied.insert(index, counts);
            }
            Ok(())
        })
    }

    fn count(&self) -> usize {
        self.copied.len()
    }
}

/// A map of the layout that is left, read as its version has it.
struct OldMap {
    name: &'static str,
    fd: OwnedFd,
    info: sys::MapInfo,
    conversion: Conversion,
}

impl OldMap {
    /// None if that layout has no such map.
    fn open(maps: &MapFds, version: u32, name: &'static str) -> Result<Option<Self>, kernel::Error> {
        let Ok(fd) = maps.get(name) else { return Ok(None) };
        let info = sys::map_info(fd).map_err(on_map("examine", name))?;
        let conversion = convert::of(version, name);
        Ok(Some(Self { name, fd: maps.duplicate(name)?, info, conversion }))
    }

    fn record<T: Pod>(&self, convert: convert::Convert, bytes: &[u8], room: &mut Vec<u8>) -> Result<T, Error> {
        room.clear();
        convert(bytes, room);
        if room.len() != size_of::<T>() {
            return Err(Error::Record(self.name.to_owned()));
        }
        // SAFETY: as long as the type, which is plain bytes; any bits are a value of it.
        Ok(unsafe { room.as_ptr().cast::<T>().read_unaligned() })
    }

    /// Calls `visit` with each key and the bytes of its value, those of all CPUs in a row.
    fn for_each_bytes(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> Result<(), Error>) -> Result<(), Error> {
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
    fn for_each(&self, visit: &mut dyn FnMut(K, V) -> Result<(), Error>) -> Result<(), Error> {
        let mut room = Vec::new();
        self.for_each_bytes(&mut |key, value| {
            let key = self.record(self.conversion.key, key, &mut room)?;
            let value = self.record(self.conversion.value, value, &mut room)?;
            visit(key, value)
        })
    }
}

impl OldCounters for OldMap {
    fn for_each(&self, visit: &mut dyn FnMut(u32, Vec<u64>) -> Result<(), Error>) -> Result<(), Error> {
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
        Ok(Table::get(self, key)?)
    }

    fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), Error> {
        Table::put_all(self, keys, values).map_err(|refused| refused.source.into())
    }

    fn insert(&self, key: &K, value: &V) -> Result<(), Error> {
        Ok(Table::insert(self, key, value).map(drop)?)
    }

    fn remove_all(&self, keys: &[K]) -> Result<(), Error> {
        Table::remove_all(self, keys).map_err(|refused| refused.source.into())
    }
}

impl<V: Pod> NewCounters for PerCpu<V> {
    fn set(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
        // All on the first CPU: readers add them up.
        Ok(self.set_words(index, counts)?)
    }

    fn add(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
        Ok(self.add_words(index, counts)?)
    }
}

/// Where the words of `Config::settles_at` are written, in the configuration of either layout.
struct Hold {
    fd: OwnedFd,
    value_size: usize,
    at: usize,
}

impl Hold {
    fn open(maps: &MapFds, version: u32) -> Result<Self, kernel::Error> {
        let name = super::layout::CONFIG;
        let info = sys::map_info(maps.get(name)?).map_err(on_map("examine", name))?;
        let value_size = info.value_size as usize;
        Ok(Self { fd: maps.duplicate(name)?, value_size, at: convert::settles_at(version) })
    }

    fn set(&self, settles_at: Seconds) -> Result<(), Error> {
        let write = || -> io::Result<()> {
            let mut config = vec![0u8; self.value_size];
            sys::map_lookup(self.fd.as_fd(), &0u32, &mut config)?;
            config[self.at..self.at + 4].copy_from_slice(&settles_at.0.to_ne_bytes());
            sys::map_update_slice(self.fd.as_fd(), &0u32, &config)
        };
        Ok(write().map_err(on_map("write", super::layout::CONFIG))?)
    }
}

/// All maps on their way.
pub struct Carry {
    parts: Vec<Box<dyn Part + Send>>,
    /// Old and new, if flows are copied.
    holds: Option<[Hold; 2]>,
}

impl Carry {
    /// For the maps of `names`, from those of a layout of the given version. A map that the old layout lacks begins empty.
    pub fn open(old: &MapFds, version: u32, new: &MapFds, names: &[&str]) -> Result<Self, Error> {
        let mut parts = Vec::new();
        // What a client notices first comes first.
        for name in ORDER.iter().filter(|name| names.contains(*name)) {
            if let Some(map) = OldMap::open(old, version, name)? {
                parts.extend(part(map, new)?);
            }
        }
        let flows = ["flows", "flows_pending"];
        let holds = match flows.iter().any(|name| names.contains(name)) {
            true => Some([Hold::open(old, version)?, Hold::open(new, proxy_common::abi::ABI_VERSION)?]),
            false => None,
        };
        Ok(Self { parts, holds })
    }

    /// Makes the new entries what the old ones are.
    pub fn copy(&mut self) -> Result<(), Error> {
        self.parts.iter_mut().try_for_each(|part| part.copy())
    }

    /// Adds to the new entries what the old programs did since.
    pub fn merge(&mut self) -> Result<(), Error> {
        self.parts.iter_mut().try_for_each(|part| part.merge())
    }

    /// Entries that were copied.
    pub fn count(&self) -> usize {
        self.parts.iter().map(|part| part.count()).sum()
    }

    /// True if flows are among what is copied: they must neither be opened nor removed meanwhile.
    pub fn has_flows(&self) -> bool {
        self.holds.is_some()
    }

    /// Until then the old programs neither open nor remove flows.
    pub fn hold_old(&self, until: Seconds) -> Result<(), Error> {
        self.holds.as_ref().map_or(Ok(()), |[old, _]| old.set(until))
    }

    /// Until then the new programs neither open nor remove flows.
    pub fn hold_new(&self, until: Seconds) -> Result<(), Error> {
        self.holds.as_ref().map_or(Ok(()), |[_, new]| new.set(until))
    }
}

/// Maps that can be carried over, in the order in which it is done.
pub const ORDER: [&str; 16] = [
    "service_counters",
    "drop_counters",
    "affinity",
    "kept_ports",
    "addresses",
    "fragments",
    "flows_pending",
    "flows",
    "config",
    "devices",
    "ports",
    "service_names",
    "frontends",
    "services",
    "slots",
    "backends",
];

fn once<K: Pod + Send, V: Pod + Send>(
    old: OldMap,
    new: &MapFds,
    counts: fn(u32, &K, &V) -> bool,
) -> Result<Box<dyn Part + Send>, kernel::Error> {
    let new = Table::<K, V>::open(new, old.name)?;
    Ok(Box::new(Once { old, new, counts, count: None }))
}

/// An array: zero is nothing, and what stands past the new end is what nothing points to.
fn array<V: Pod + Send + PartialEq>(old: OldMap, new: &MapFds) -> Result<Box<dyn Part + Send>, kernel::Error> {
    once::<u32, V>(old, new, |capacity, index, value| *index < capacity && *value != zero())
}

fn zero<V: Pod>() -> V {
    // SAFETY: plain bytes; zero is a value.
    unsafe { std::mem::zeroed() }
}

fn written<K, V>(old: OldMap, new: &MapFds, before: Option<&'static str>) -> Result<Box<dyn Part + Send>, kernel::Error>
where
    K: Pod + Eq + Hash + Send,
    V: Pod + Record + Send,
{
    let before = before.map(|name| Table::<K, V>::open(new, name)).transpose()?;
    let new = Table::<K, V>::open(new, old.name)?;
    Ok(Box::new(Written::<_, _, K, V>::new(old, new, before)))
}

fn counters<V: Pod + Send>(old: OldMap, new: &MapFds) -> Result<Box<dyn Part + Send>, kernel::Error> {
    let new = PerCpu::<V>::open(new, old.name)?;
    Ok(Box::new(Counters { old, new, copied: HashMap::new() }))
}

/// How a map is carried over.
fn part(old: OldMap, new: &MapFds) -> Result<Option<Box<dyn Part + Send>>, kernel::Error> {
    let part = match old.name {
        "service_counters" => counters::<ServiceCounters>(old, new),
        "drop_counters" => counters::<u64>(old, new),
        "affinity" => written::<AffinityKey, AffinityValue>(old, new, None),
        "kept_ports" => {
            let new = Table::<u32, PortWord>::open(new, old.name)?;
            Ok(Box::new(Bits(old, new)) as Box<dyn Part + Send>)
        }
        "addresses" => written::<Addr, AddressClass>(old, new, None),
        "fragments" => written::<FragmentKey, FragmentValue>(old, new, None),
        "flows_pending" => written::<FlowKey, FlowValue>(old, new, Some("flows")),
        "flows" => written::<FlowKey, FlowValue>(old, new, None),
        "config" => array::<Config>(old, new),
        "ports" => array::<PortWord>(old, new),
        "devices" => once::<u32, DeviceRecord>(old, new, |_, _, _| true),
        "service_names" => once::<u32, ServiceName>(old, new, |_, _, _| true),
        "frontends" => once::<FrontendKey, FrontendValue>(old, new, |_, _, _| true),
        "services" => array::<ServiceRecord>(old, new),
        "slots" => array::<Slot>(old, new),
        "backends" => array::<BackendRecord>(old, new),
        _ => return Ok(None),
    };
    part.map(Some)
}

/// How much of the tables of a layout is in use; of flows only if `with_flows`: there may be many.
pub fn usage(maps: &MapFds, version: u32, with_flows: bool) -> Result<Usage, Error> {
    let mut usage = Usage::default();
    each::<u32, ServiceName>(maps, version, "service_names", |id, _| {
        usage.services += 1;
        usage.last_service = usage.last_service.max(id);
    })?;
    each::<u32, ServiceRecord>(maps, version, "services", |id, record| {
        if record != ServiceRecord::ZERO {
            usage.last_service = usage.last_service.max(id);
            let ends = [record.cluster, record.local].map(Range::unpack).map(|range| match range.count {
                0 => 0,
                count => range.base.saturating_add(count),
            });
            usage.slots = usage.slots.max(ends[0]).max(ends[1]);
        }
    })?;
    each::<u32, BackendRecord>(maps, version, "backends", |id, record| {
        if record.is_live() {
            usage.backends += 1;
            usage.last_backend = id;
        }
    })?;
    each::<FrontendKey, FrontendValue>(maps, version, "frontends", |_, _| usage.frontends += 1)?;
    each::<Addr, AddressClass>(maps, version, "addresses", |_, _| usage.addresses += 1)?;
    if with_flows {
        each::<FlowKey, FlowValue>(maps, version, "flows", |_, _| usage.flows += 1)?;
    }
    Ok(usage)
}

fn each<K: Pod, V: Pod>(
    maps: &MapFds,
    version: u32,
    name: &'static str,
    mut visit: impl FnMut(K, V),
) -> Result<(), Error> {
    let Some(map) = OldMap::open(maps, version, name)? else { return Ok(()) };
    Old::<K, V>::for_each(&map, &mut |key, value| {
        visit(key, value);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;
    use std::rc::Rc;

    use super::*;

    /// A table in memory; clones are the same table.
    #[derive(Clone)]
    struct Fake<K, V> {
        entries: Rc<RefCell<HashMap<K, V>>>,
        capacity: usize,
        written: Rc<RefCell<usize>>,
    }

    impl<K: Copy + Eq + Hash, V: Copy> Fake<K, V> {
        fn new() -> Self {
            Self { entries: Rc::default(), capacity: 100, written: Rc::default() }
        }

        fn put(&self, key: K, value: V) {
            self.entries.borrow_mut().insert(key, value);
        }

        fn drop_key(&self, key: K) {
            self.entries.borrow_mut().remove(&key);
        }

        fn at(&self, key: K) -> Option<V> {
            self.entries.borrow().get(&key).copied()
        }

        /// Entries written since the last call.
        fn written(&self) -> usize {
            self.written.take()
        }
    }

    impl<K: Copy + Eq + Hash, V: Copy> Old<K, V> for Fake<K, V> {
        fn for_each(&self, visit: &mut dyn FnMut(K, V) -> Result<(), Error>) -> Result<(), Error> {
            let entries: Vec<_> = self.entries.borrow().iter().map(|(key, value)| (*key, *value)).collect();
            entries.into_iter().try_for_each(|(key, value)| visit(key, value))
        }
    }

    impl<K: Copy + Eq + Hash, V: Copy> New<K, V> for Fake<K, V> {
        fn capacity(&self) -> u32 {
            self.capacity as u32
        }

        fn get(&self, key: &K) -> Result<Option<V>, Error> {
            Ok(self.at(*key))
        }

        fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), Error> {
            for (key, value) in keys.iter().zip(values) {
                let mut entries = self.entries.borrow_mut();
                if entries.len() == self.capacity && !entries.contains_key(key) {
                    let source = io::Error::from_raw_os_error(libc::E2BIG);
                    return Err(maps::Error::Write { table: "fake", source }.into());
                }
                entries.insert(*key, *value);
                *self.written.borrow_mut() += 1;
            }
            Ok(())
        }

        fn insert(&self, key: &K, value: &V) -> Result<(), Error> {
            if self.at(*key).is_some() { Ok(()) } else { self.put_all(&[*key], &[*value]) }
        }

        fn remove_all(&self, keys: &[K]) -> Result<(), Error> {
            keys.iter().for_each(|key| self.drop_key(*key));
            Ok(())
        }
    }

    type Flows = Fake<u32, FlowValue>;

    fn flow(seen: u32, state: u32, backend: u32) -> FlowValue {
        FlowValue { hot: Hot { seen: Seconds(seen), state }.pack(), backend, ..FlowValue::ZERO }
    }

    fn carry(old: &Flows, new: &Flows) -> Written<Flows, Flows, u32, FlowValue> {
        Written::new(old.clone(), new.clone(), None)
    }

    fn flows(flows: &Flows) -> BTreeMap<u32, FlowValue> {
        flows.entries.borrow().iter().map(|(key, value)| (*key, *value)).collect()
    }

    #[test]
    fn copying_again_writes_what_changed_and_removes_what_went() {
        let (old, new) = (Flows::new(), Flows::new());
        (0..5).for_each(|key| old.put(key, flow(100, 0, 1)));
        let mut part = carry(&old, &new);
        part.copy().unwrap();
        assert_eq!((new.written(), part.count()), (5, 5));
        part.copy().unwrap();
        assert_eq!(new.written(), 0, "nothing changed");
        old.put(0, flow(103, 0, 1));
        old.put(1, flow(100, Hot::ESTABLISHED, 1));
        old.put(2, flow(101, 0, 2));
        old.drop_key(3);
        old.put(9, flow(101, 0, 1));
        part.copy().unwrap();
        assert_eq!(new.written(), 3, "when a packet was last seen may lag behind");
        old.put(0, flow(100, 0, 1));
        assert_eq!(flows(&new), flows(&old));
    }

    #[test]
    fn what_went_makes_room_for_what_came() {
        let (old, new) = (Flows::new(), Flows { capacity: 3, ..Flows::new() });
        (0..3).for_each(|key| old.put(key, flow(100, 0, 1)));
        let mut part = carry(&old, &new);
        part.copy().unwrap();
        (0..3).for_each(|key| old.drop_key(key));
        (3..6).for_each(|key| old.put(key, flow(100, 0, 1)));
        part.copy().unwrap();
        assert_eq!(flows(&new), flows(&old));
    }

    #[test]
    fn merging_takes_nothing_from_what_the_new_programs_did() {
        let (old, new) = (Flows::new(), Flows::new());
        (0..5).for_each(|key| old.put(key, flow(100, Hot::ESTABLISHED, 1)));
        let mut part = carry(&old, &new);
        part.copy().unwrap();
        new.written();
        // Another end closes for each of the programs.
        old.put(0, flow(101, Hot::ESTABLISHED | Hot::FIN_CLIENT, 1));
        new.put(0, flow(102, Hot::ESTABLISHED | Hot::FIN_BACKEND, 1));
        // Both opened another connection; whoever was later knows better.
        (old.put(1, flow(102, 0, 2)), new.put(1, flow(103, 0, 3)));
        (old.put(2, flow(105, 0, 2)), new.put(2, flow(103, 0, 3)));
        // One of them knows more, or less.
        (old.put(8, flow(101, 0, 8)), new.put(9, flow(101, 0, 9)));
        old.drop_key(3);
        part.merge().unwrap();
        assert_eq!(new.written(), 3);
        assert_eq!(new.at(0), Some(flow(102, Hot::ESTABLISHED | Hot::FIN_CLIENT | Hot::FIN_BACKEND, 1)));
        assert_eq!((new.at(1), new.at(2)), (Some(flow(103, 0, 3)), Some(flow(105, 0, 2))));
        assert_eq!((new.at(8), new.at(9)), (Some(flow(101, 0, 8)), Some(flow(101, 0, 9))));
        assert!(new.at(3).is_some(), "nothing is removed");
        part.merge().unwrap();
        assert_eq!(new.written(), 0, "it may be repeated");
    }

    #[test]
    fn what_comes_from_the_pending_ones_is_not_hidden_by_an_older_connection() {
        let (old, new, established) = (Flows::new(), Flows::new(), Flows::new());
        let mut part = Written::<_, _, u32, FlowValue>::new(old.clone(), new.clone(), Some(established.clone()));
        for (key, seen) in [(1, 90), (2, 110)] {
            established.put(key, flow(seen, Hot::ESTABLISHED, 1));
            old.put(key, flow(100, 0, 2));
        }
        part.merge().unwrap();
        assert_eq!(established.at(1), None);
        assert!(established.at(2).is_some(), "it is younger");
    }

    #[test]
    fn a_full_table_loses_entries_and_not_the_takeover() {
        let (old, new) = (Flows::new(), Flows { capacity: 2, ..Flows::new() });
        (0..5).for_each(|key| old.put(key, flow(100, 0, 1)));
        let mut part = carry(&old, &new);
        part.merge().unwrap();
        assert_eq!((part.0.lost, flows(&new).len()), (3, 2));
    }

    #[test]
    fn proof_of_the_return_path_is_kept_whoever_saw_it() {
        let (with, without) = (FlowValue { proof: 7, ..flow(100, 0, 1) }, flow(100, 0, 1));
        assert_eq!(FlowValue::merged(&without, &with), Some(with));
        assert_eq!(FlowValue::merged(&with, &without), None);
        let mac = FlowValue { mac: [1, 2, 3], ..without };
        assert_eq!(FlowValue::merged(&without, &mac), Some(mac));
    }

    #[test]
    fn clients_stay_with_the_backend_they_had_last() {
        let had = |backend, seen| AffinityValue { backend, seen };
        assert_eq!(AffinityValue::merged(&had(1, 5), &had(2, 6)), Some(had(2, 6)));
        assert_eq!(AffinityValue::merged(&had(1, 6), &had(2, 6)), None);
    }

    #[test]
    fn addresses_get_the_mark_that_programs_set_and_no_other() {
        let class = |flags| AddressClass { flags };
        let new = class(AddressClass::BACKEND);
        let merged = AddressClass::merged(&new, &class(AddressClass::FLOWS | AddressClass::NODE));
        assert_eq!(merged, Some(class(AddressClass::BACKEND | AddressClass::FLOWS)));
        assert_eq!(AddressClass::merged(&new, &class(AddressClass::NODE)), None);
    }

    #[test]
    fn arrays_are_copied_once_and_as_far_as_they_mean_something() {
        let (old, new) = (Fake::<u32, u64>::new(), Fake::<u32, u64> { capacity: 4, ..Fake::new() });
        [(1, 5), (2, 0), (9, 7)].map(|(key, value)| old.put(key, value));
        let counts = |capacity: u32, key: &u32, value: &u64| *key < capacity && *value != 0;
        let mut part = Once { old: old.clone(), new: new.clone(), counts, count: None };
        part.copy().unwrap();
        old.put(3, 1);
        part.copy().unwrap();
        part.merge().unwrap();
        assert_eq!((new.at(1), new.entries.borrow().len(), part.count()), (Some(5), 1, 1));
    }

    #[test]
    fn marks_of_ports_are_united() {
        let (old, new) = (Fake::new(), Fake::new());
        let word = |bits| PortWord { bits };
        (old.put(1, word(0b0011)), new.put(1, word(0b0101)), old.put(2, word(0b1000)));
        let mut part = Bits(old, new.clone());
        part.merge().unwrap();
        assert_eq!((new.at(1), new.at(2)), (Some(word(0b0111)), Some(word(0b1000))));
        new.written();
        part.merge().unwrap();
        assert_eq!(new.written(), 0);
    }

    #[derive(Clone, Default)]
    struct FakeCounters(Rc<RefCell<BTreeMap<u32, Vec<u64>>>>);

    impl OldCounters for FakeCounters {
        fn for_each(&self, visit: &mut dyn FnMut(u32, Vec<u64>) -> Result<(), Error>) -> Result<(), Error> {
            self.0.borrow().iter().try_for_each(|(index, counts)| visit(*index, counts.clone()))
        }
    }

    impl NewCounters for FakeCounters {
        fn set(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
            self.0.borrow_mut().insert(index, counts.to_vec());
            Ok(())
        }

        fn add(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
            let mut all = self.0.borrow_mut();
            let entry = all.entry(index).or_insert_with(|| vec![0; counts.len()]);
            entry.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            Ok(())
        }
    }

    #[test]
    fn counters_go_on_from_where_the_old_ones_end() {
        let (old, new) = (FakeCounters::default(), FakeCounters::default());
        old.0.borrow_mut().extend([(1, vec![5, 50]), (2, vec![1, 1])]);
        let mut part = Counters { old: old.clone(), new: new.clone(), copied: HashMap::new() };
        part.copy().unwrap();
        old.0.borrow_mut().insert(1, vec![6, 60]);
        part.copy().unwrap();
        // Both count, one of them a service that the other never saw.
        old.0.borrow_mut().extend([(1, vec![8, 80]), (3, vec![1, 0])]);
        new.add(1, &[100, 1000]).unwrap();
        for _ in 0..2 {
            part.merge().unwrap();
            let expected = BTreeMap::from([(1, vec![108, 1080]), (2, vec![1, 1]), (3, vec![1, 0])]);
            assert_eq!(*new.0.borrow(), expected);
        }
    }

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
