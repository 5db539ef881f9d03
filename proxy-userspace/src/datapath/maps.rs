//! The tables that the reconciler writes: as a trait, and over the kernel's maps.
//!
//! Mapped arrays are changed by plain stores, published by one release store each; hashes by batched system calls.
//! May touch: map entries, nothing else. Chooses nothing: order and content come from the plan.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aya::Pod;
use ipnet::IpNet;
use proxy_common::abi::address::{AddressClass, PortWord};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::{Cidr, Config, MAX_CIDRS};
use proxy_common::abi::counter::ServiceCounters;
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{ServiceName, ServiceRecord, Slot};
use proxy_common::abi::source::SourceRangeKey;
use proxy_common::addr::{Addr, Port};
use tracing::warn;

use super::kernel::{Error as KernelError, MapFds, on_map};
use super::sys::{self, MappedWords};
use crate::planner::{Cidrs, FrontendAddr, Op, ServiceId, is_class};

/// Why tables cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A map is missing or of another layout.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A system call failed; a full map is E2BIG or ENOSPC.
    #[error("cannot use {table}")]
    Write {
        /// Map name.
        table: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A position past the end of an array.
    #[error("{table} has {capacity} entries, no number {index}")]
    Bounds {
        /// Map name.
        table: &'static str,
        /// What was asked for.
        index: u32,
        /// What there is.
        capacity: u32,
    },
    /// An entry has not the size that the conversion of its version gives it.
    #[error("an entry of {0} is none of its version")]
    Record(&'static str),
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        refused.source
    }
}

/// Some operations were done, the next was refused.
#[derive(Debug, thiserror::Error)]
#[error("operation {done} was refused")]
pub struct Refused {
    /// Operations that were done; the refused one is the next.
    pub done: usize,
    /// Why.
    pub source: Error,
}

/// The tables as the reconciler changes them.
pub trait Maps {
    /// Does operations in order, up to the first that is refused. Each may be repeated; deleting what is not there is done.
    fn apply(&mut self, ops: &[&Op]) -> Result<(), Refused>;

    /// Whose a frontend is at the moment.
    fn service_at(&self, at: &FrontendAddr) -> Result<Option<ServiceId>, Error>;

    /// True if the tables are as a change would leave them; of what it takes away, nothing is said.
    fn holds(&self, op: &Op) -> Result<bool, Error>;

    /// Writes again what no plan says: what the node itself fixes. True if it was other than this agent had written it.
    fn repair_node(&mut self) -> Result<bool, Error>;
}

/// An array that userspace has mapped.
pub(super) struct MappedArray<T> {
    name: &'static str,
    words: MappedWords,
    capacity: u32,
    _type: std::marker::PhantomData<T>,
}

impl<T: Pod> MappedArray<T> {
    /// Elements of mapped arrays lie eight bytes apart or a multiple of that (kernel, array_map_alloc).
    const WORDS: usize = size_of::<T>().div_ceil(8);

    pub(super) fn open(maps: &MapFds, name: &'static str, writable: bool) -> Result<Self, KernelError> {
        let fd = maps.get(name)?;
        let capacity = checked_capacity::<u32, T>(maps, name)?;
        let bytes = capacity as usize * Self::WORDS * 8;
        let words = MappedWords::map(fd, bytes, writable).map_err(on_map("map into memory", name))?;
        Ok(Self { name, words, capacity, _type: std::marker::PhantomData })
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// All words of all elements.
    pub(super) fn words(&self) -> &[AtomicU64] {
        self.words.words()
    }

    fn at(&self, index: u32) -> Result<&[AtomicU64], Error> {
        let start = index as usize * Self::WORDS;
        let bounds = || Error::Bounds { table: self.name, index, capacity: self.capacity };
        self.words.words().get(start..start + Self::WORDS).ok_or_else(bounds)
    }

    /// Calls `visit` for every element, as [`Self::read`] gives it.
    pub(super) fn for_each(&self, mut visit: impl FnMut(&T)) {
        let mut words = vec![0; Self::WORDS];
        for element in self.words.words().chunks_exact(Self::WORDS) {
            words.iter_mut().zip(element).for_each(|(copy, word)| *copy = word.load(Ordering::Acquire));
            visit(&from_words(&words));
        }
    }

    /// The element, word by word: no more consistent than its single words.
    pub(super) fn read(&self, index: u32) -> Result<T, Error> {
        let words: Vec<u64> = self.at(index)?.iter().map(|word| word.load(Ordering::Acquire)).collect();
        Ok(from_words(&words))
    }
}

/// The words of a plain value; the last one is filled up with zeros.
fn to_words<T: Pod, const N: usize>(value: &T) -> [u64; N] {
    const { assert!(size_of::<T>().div_ceil(8) == N) };
    let mut words = [0; N];
    // SAFETY: `T` is plain bytes without padding, `words` is at least as long, and they do not overlap.
    unsafe {
        std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>(), words.as_mut_ptr().cast(), size_of::<T>())
    };
    words
}

fn from_words<T: Pod>(words: &[u64]) -> T {
    assert!(words.len() * 8 >= size_of::<T>());
    // SAFETY: the source is long enough (asserted), `T` is plain bytes and any bits are a value of it.
    unsafe { words.as_ptr().cast::<T>().read_unaligned() }
}

/// Capacity of a map whose key and value have the given types.
fn checked_capacity<K, V>(maps: &MapFds, name: &'static str) -> Result<u32, KernelError> {
    let info = sys::map_info(maps.get(name)?).map_err(on_map("examine", name))?;
    let sizes = (info.key_size as usize, info.value_size as usize);
    if sizes != (size_of::<K>(), size_of::<V>()) {
        return Err(on_map("use", name)(io::Error::from(io::ErrorKind::InvalidData)));
    }
    Ok(info.max_entries)
}

/// A hash map, or an array that is not mapped.
#[derive(Debug)]
pub struct Table<K, V> {
    name: &'static str,
    fd: OwnedFd,
    capacity: u32,
    _types: std::marker::PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub(super) fn open(maps: &MapFds, name: &'static str) -> Result<Self, KernelError> {
        let capacity = checked_capacity::<K, V>(maps, name)?;
        Ok(Self { name, fd: maps.duplicate(name)?, capacity, _types: std::marker::PhantomData })
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(super) fn put(&self, key: &K, value: &V) -> Result<(), Error> {
        sys::map_update(self.fd.as_fd(), key, value).map_err(|source| self.refused(source))
    }

    pub(super) fn get(&self, key: &K) -> Result<Option<V>, Error> {
        // SAFETY: `V` is plain bytes, zero is a value.
        let mut value: [V; 1] = unsafe { std::mem::zeroed() };
        let found = sys::map_lookup(self.fd.as_fd(), key, &mut value).map_err(|source| self.refused(source))?;
        Ok(found.then_some(value[0]))
    }

    /// Writes an entry if there is none with its key; false if there is.
    pub(super) fn insert(&self, key: &K, value: &V) -> Result<bool, Error> {
        sys::map_insert(self.fd.as_fd(), key, value).map_err(|source| self.refused(source))
    }

    /// Replaces an entry; false if there is none with its key.
    pub(super) fn replace(&self, key: &K, value: &V) -> Result<bool, Error> {
        sys::map_replace(self.fd.as_fd(), key, value).map_err(|source| self.refused(source))
    }

    pub(super) fn remove(&self, key: &K) -> Result<bool, Error> {
        sys::map_delete(self.fd.as_fd(), key).map_err(|source| self.refused(source))
    }

    fn refused(&self, source: io::Error) -> Error {
        Error::Write { table: self.name, source }
    }

    /// One entry by a plain call, more by batches.
    pub(super) fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), Refused> {
        if let ([key], [value]) = (keys, values) {
            return self.put(key, value).map_err(|source| Refused { done: 0, source });
        }
        let mut done = 0;
        for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
            sys::map_update_batch(self.fd.as_fd(), keys, values)
                .map_err(|(more, source)| Refused { done: done + more, source: self.refused(source) })?;
            done += keys.len();
        }
        Ok(())
    }

    /// Removes keys; those that are not there are passed over.
    pub(super) fn remove_all(&self, keys: &[K]) -> Result<(), Refused> {
        let mut done = 0;
        while done < keys.len() {
            let batch = &keys[done..keys.len().min(done + BATCH)];
            match sys::map_delete_batch(self.fd.as_fd(), batch) {
                Ok(()) => done += batch.len(),
                // The batch ends at a key that is not there.
                Err((before, source)) if source.raw_os_error() == Some(libc::ENOENT) => done += before + 1,
                Err((before, source)) => {
                    return Err(Refused { done: done + before, source: self.refused(source) });
                }
            }
        }
        Ok(())
    }

    /// Calls `visit` for every entry; entries that come or go meanwhile may be missed, none is seen twice (hash maps).
    pub(super) fn for_each(&self, mut visit: impl FnMut(&K, &V)) -> Result<(), Error> {
        let mut walk = Walk::new(self);
        while let Some((keys, values)) = walk.next(self)? {
            keys.iter().zip(values).for_each(|(key, value)| visit(key, value));
        }
        Ok(())
    }
}

/// Entries of one system call: large enough to make its cost vanish, small enough to keep buffers out of the way.
const BATCH: usize = 4096;

/// A walk through a hash map in slices, so that the caller may pause between them.
pub struct Walk<K, V> {
    cursor: sys::Cursor,
    keys: Vec<K>,
    values: Vec<V>,
    done: bool,
}

/// Some keys and their values, position by position.
pub(super) type Entries<'a, K, V> = (&'a [K], &'a [V]);

impl<K: Pod, V: Pod> Walk<K, V> {
    pub(super) fn new(table: &Table<K, V>) -> Self {
        let length = BATCH.min(table.capacity.max(64) as usize);
        // SAFETY: keys and values are plain bytes, zero is a value.
        let (key, value) = unsafe { (std::mem::zeroed::<K>(), std::mem::zeroed::<V>()) };
        Self { cursor: sys::Cursor::default(), keys: vec![key; length], values: vec![value; length], done: false }
    }

    /// The next slice, or `None` at the end.
    pub(super) fn next(&mut self, table: &Table<K, V>) -> Result<Option<Entries<'_, K, V>>, Error> {
        while !self.done {
            match sys::map_lookup_batch(table.fd.as_fd(), &mut self.cursor, &mut self.keys, &mut self.values) {
                Ok(batch) => {
                    self.done = batch.done;
                    return Ok(Some((&self.keys[..batch.count], &self.values[..batch.count])));
                }
                // One bucket holds more than the buffers.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => self.grow(),
                Err(source) => return Err(table.refused(source)),
            }
        }
        Ok(None)
    }

    fn grow(&mut self) {
        let length = self.keys.len() * 2;
        self.keys.resize(length, self.keys[0]);
        self.values.resize(length, self.values[0]);
    }
}

/// The tables in the kernel.
pub struct KernelMaps {
    config: Table<u32, Config>,
    ports: Table<u32, PortWord>,
    addresses: Table<Addr, AddressClass>,
    frontends: Table<FrontendKey, FrontendValue>,
    names: Table<u32, ServiceName>,
    sources: Table<SourceRangeKey, u32>,
    counters: PerCpu<ServiceCounters>,
    services: MappedArray<ServiceRecord>,
    slots: MappedArray<Slot>,
    backends: MappedArray<BackendRecord>,
    fixed: Mutex<Option<Fixed>>,
}

impl KernelMaps {
    /// Opens the tables for writing.
    pub fn open(maps: &MapFds) -> Result<Self, KernelError> {
        Ok(Self {
            config: Table::open(maps, "config")?,
            ports: Table::open(maps, "ports")?,
            addresses: Table::open(maps, "addresses")?,
            frontends: Table::open(maps, "frontends")?,
            names: Table::open(maps, "service_names")?,
            sources: Table::open(maps, "source_ranges")?,
            counters: PerCpu::open(maps, "service_counters")?,
            services: MappedArray::open(maps, "services", true)?,
            slots: MappedArray::open(maps, "slots", true)?,
            backends: MappedArray::open(maps, "backends", true)?,
            fixed: Mutex::default(),
        })
    }
}

impl Maps for KernelMaps {
    fn apply(&mut self, ops: &[&Op]) -> Result<(), Refused> {
        let mut done = 0;
        for run in ops.chunk_by(|a, b| std::mem::discriminant(*a) == std::mem::discriminant(*b)) {
            self.apply_run(run).map_err(|refused| Refused { done: done + refused.done, ..refused })?;
            done += run.len();
        }
        Ok(())
    }

    fn service_at(&self, at: &FrontendAddr) -> Result<Option<ServiceId>, Error> {
        Ok(self.frontends.get(&at.record())?.map(|value| ServiceId(value.service)))
    }

    fn holds(&self, op: &Op) -> Result<bool, Error> {
        match op {
            Op::PutCidrs(cidrs) => self.has_cidrs(cidrs),
            Op::PutName { id, name } => Ok(self.names.get(&id.0)? == Some(name.record())),
            Op::PutBackend { id, record } => Ok(self.backends.read(id.0)? == *record),
            // A wider prefix is found too: it lets in the same clients.
            Op::AllowSource { id, net } => Ok(self.sources.get(&source_key(*id, net))?.is_some()),
            Op::WriteSlots { base, slots } => self.has_slots(*base, slots),
            Op::PublishService { id, record } => Ok(self.services.read(id.0)? == *record),
            Op::PutFrontend { at, value } => Ok(self.frontends.get(&at.record())? == Some(*value)),
            Op::PutAddress { addr, class, keep } => Ok(is_class(self.addresses.get(addr)?.as_ref(), *class, *keep)),
            Op::PutPorts { index, word, keep } => {
                Ok(self.ports.get(index)?.map_or(0, |known| known.bits) & !keep == word.bits & !keep)
            }
            Op::DeleteFrontend { .. }
            | Op::DeleteAddress { .. }
            | Op::ForbidSource { .. }
            | Op::RetireBackend { .. }
            | Op::RetireService { .. } => Ok(true),
        }
    }

    fn repair_node(&mut self) -> Result<bool, Error> {
        let fixed = *self.fixed.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(fixed) = fixed else { return Ok(false) };
        let mut is_changed = false;
        self.change_config(|config| is_changed = fixed.restore(config))?;
        Ok(is_changed)
    }
}

/// What this agent has fixed in the configuration of the programs.
#[derive(Clone, Copy, Debug)]
struct Fixed(Config);

impl Fixed {
    /// Puts it back. True if something was other.
    fn restore(&self, config: &mut Config) -> bool {
        let before = *config;
        let Config { hash_key, node_netns, flags, snat_first, snat_last, local_first, local_last, .. } = self.0;
        *config = Config { hash_key, node_netns, flags, snat_first, snat_last, local_first, local_last, ..before };
        *config != before
    }
}

impl KernelMaps {
    /// Operations of one kind: those on hashes go to the kernel together.
    fn apply_run(&self, ops: &[&Op]) -> Result<(), Refused> {
        match ops[0] {
            Op::PutFrontend { .. } => {
                let (keys, values): (Vec<_>, Vec<_>) = ops.iter().filter_map(|op| frontend_entry(op)).unzip();
                self.frontends.put_all(&keys, &values)
            }
            Op::PutAddress { .. } => self.put_addresses(ops),
            Op::DeleteFrontend { .. } => {
                let keys: Vec<_> = ops.iter().filter_map(|op| frontend_key(op)).collect();
                self.frontends.remove_all(&keys)
            }
            Op::DeleteAddress { .. } => {
                let keys: Vec<_> = ops.iter().filter_map(|op| address_key(op)).collect();
                self.addresses.remove_all(&keys)
            }
            _ => each(ops, |op| self.apply_one(op)),
        }
    }

    fn apply_one(&self, op: &Op) -> Result<(), Error> {
        match op {
            Op::PutCidrs(cidrs) => self.put_cidrs(cidrs),
            Op::PutName { id, name } => self.names.put(&id.0, &name.record()),
            Op::PutBackend { id, record } => self.write_backend(id.0, record),
            Op::AllowSource { id, net } => self.sources.put(&source_key(*id, net), &1),
            Op::ForbidSource { id, net } => self.sources.remove(&source_key(*id, net)).map(drop),
            Op::WriteSlots { base, slots } => self.write_slots(*base, slots),
            Op::PublishService { id, record } => self.write_service(id.0, record),
            Op::PutFrontend { at, value } => self.frontends.put(&at.record(), value),
            Op::DeleteFrontend { at } => self.frontends.remove(&at.record()).map(drop),
            Op::PutAddress { addr, class, keep } => self.put_address(addr, *class, *keep),
            Op::DeleteAddress { addr } => self.addresses.remove(addr).map(drop),
            Op::PutPorts { index, word, keep } => self.put_ports(*index, *word, *keep),
            Op::RetireBackend { id } => self.write_backend(id.0, &BackendRecord::ZERO),
            Op::RetireService { id } => self.retire_service(id.0),
        }
    }

    /// Classes that keep nothing go together; the others need to be read first, one by one.
    fn put_addresses(&self, ops: &[&Op]) -> Result<(), Refused> {
        let keeps = |op: &Op| matches!(op, Op::PutAddress { keep, .. } if *keep != 0);
        let mut done = 0;
        for run in ops.chunk_by(|a, b| keeps(a) == keeps(b)) {
            let result = if keeps(run[0]) {
                each(run, |op| self.apply_one(op))
            } else {
                let (keys, values): (Vec<_>, Vec<_>) = run.iter().filter_map(|op| address_entry(op)).unzip();
                self.addresses.put_all(&keys, &values)
            };
            result.map_err(|refused| Refused { done: done + refused.done, ..refused })?;
            done += run.len();
        }
        Ok(())
    }

    /// A flag that a program sets between the look-up and the write is lost; it sets it again with the next such flow.
    fn put_address(&self, addr: &Addr, class: AddressClass, keep: u32) -> Result<(), Error> {
        let kept = if keep == 0 { 0 } else { self.addresses.get(addr)?.map_or(0, |old| old.flags & keep) };
        self.addresses.put(addr, &AddressClass { flags: class.flags | kept })
    }

    fn put_ports(&self, index: u32, word: PortWord, keep: u64) -> Result<(), Error> {
        let kept = if keep == 0 { 0 } else { self.ports.get(&index)?.map_or(0, |old| old.bits & keep) };
        self.ports.put(&index, &PortWord { bits: word.bits | kept })
    }

    fn put_cidrs(&self, cidrs: &Cidrs) -> Result<(), Error> {
        self.change_config(|config| {
            (config.service_cidrs, config.service_cidr_count) = cidr_list(&cidrs.service);
            (config.cluster_cidrs, config.cluster_cidr_count) = cidr_list(&cidrs.cluster);
            (config.pod_cidrs, config.pod_cidr_count) = cidr_list(&cidrs.pod);
        })
    }

    /// From now on no address is a service's because of its range.
    pub fn clear_service_cidrs(&self) -> Result<(), Error> {
        self.change_config(|config| config.service_cidr_count = 0)
    }

    fn change_config(&self, change: impl FnOnce(&mut Config)) -> Result<(), Error> {
        let _turn = config_turn();
        let mut config = self.config()?;
        change(&mut config);
        self.config.put(&0, &config)
    }

    /// The configuration of the programs.
    pub fn config(&self) -> Result<Config, Error> {
        Ok(self.config.get(&0)?.unwrap_or(Config::ZERO))
    }

    /// Replaces what this node's own facts fix in the configuration; prefixes and the hash key stay.
    pub fn write_node_config(&self, node: &NodeConfig) -> Result<(), Error> {
        self.change_config(|config| {
            if config.hash_key == [0; 2] {
                config.hash_key = node.new_hash_key;
            }
            // An agent that died while it handed over may have left it.
            config.settles_at = 0;
            config.node_netns = node.netns;
            config.flags = node.flags;
            (config.snat_first, config.snat_last) = (node.snat.0.0, node.snat.1.0);
            (config.local_first, config.local_last) = (node.local.0.0, node.local.1.0);
            *self.fixed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Fixed(*config));
        })
    }

    fn has_cidrs(&self, cidrs: &Cidrs) -> Result<bool, Error> {
        let config = self.config()?;
        let is = |count: u8, list: &[Cidr; MAX_CIDRS], wanted: &[Cidr]| (*list, count) == cidr_list(wanted);
        Ok(is(config.service_cidr_count, &config.service_cidrs, &cidrs.service)
            && is(config.cluster_cidr_count, &config.cluster_cidrs, &cidrs.cluster)
            && is(config.pod_cidr_count, &config.pod_cidrs, &cidrs.pod))
    }

    fn has_slots(&self, base: u32, slots: &[Slot]) -> Result<bool, Error> {
        for (position, slot) in (base..).zip(slots) {
            if self.slots.read(position)? != *slot {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The state becomes visible last, and a changed address is never seen with a live state.
    fn write_backend(&self, id: u32, record: &BackendRecord) -> Result<(), Error> {
        let words = self.backends.at(id)?;
        let [first, second, last] = to_words::<_, 3>(record);
        if (words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed)) != (first, second) {
            words[2].store(0, Ordering::Release);
            words[0].store(first, Ordering::Release);
            words[1].store(second, Ordering::Release);
        }
        words[2].store(last, Ordering::Release);
        Ok(())
    }

    fn write_slots(&self, base: u32, slots: &[Slot]) -> Result<(), Error> {
        for (position, slot) in (base..).zip(slots) {
            let [word] = to_words::<_, 1>(slot);
            self.slots.at(position)?[0].store(word, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Each set changes at once, after all slots written before; the affinity is there before them, the fingerprint after.
    fn write_service(&self, id: u32, record: &ServiceRecord) -> Result<(), Error> {
        let words = self.services.at(id)?;
        let old = from_words::<ServiceRecord>(&[0, 0, words[2].load(Ordering::Relaxed)]);
        let [cluster, local, last] = to_words::<_, 3>(record);
        let [_, _, first] = to_words::<_, 3>(&ServiceRecord { fingerprint: old.fingerprint, ..*record });
        words[2].store(first, Ordering::Release);
        words[0].store(cluster, Ordering::Release);
        words[1].store(local, Ordering::Release);
        words[2].store(last, Ordering::Release);
        Ok(())
    }

    /// The next service with this id starts with zero counters.
    fn retire_service(&self, id: u32) -> Result<(), Error> {
        self.write_service(id, &ServiceRecord::ZERO)?;
        self.counters.put(id, &ServiceCounters::ZERO)?;
        self.names.remove(&id).map(drop)
    }
}

/// The key of a source range; an IPv4 prefix has the mapped part before it.
fn source_key(id: ServiceId, net: &IpNet) -> SourceRangeKey {
    let before = if net.addr().is_ipv4() { 96 } else { 0 };
    SourceRangeKey::new(id.0, net.network().into(), before + u32::from(net.prefix_len()))
}

/// The source range of a key, if it is one.
pub(super) fn source_of(key: &SourceRangeKey) -> Option<(ServiceId, IpNet)> {
    let addr = key.range.addr;
    let before = if addr.is_v4() { 96 } else { 0 };
    let length = key.length().checked_sub(before)?.try_into().ok()?;
    Some((ServiceId(key.range.service), IpNet::new(addr.into(), length).ok()?))
}

/// Held while a configuration is read, changed and written as a whole: the reconciler, the start and a handover all do.
pub(super) fn config_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What of the configuration record this node fixes by itself.
#[derive(Clone, Copy, Debug)]
pub struct NodeConfig {
    /// Random; used only where no key is stored yet, so that picks are the same after a restart.
    pub new_hash_key: [u64; 2],
    /// SO_NETNS_COOKIE of the node's network namespace.
    pub netns: u64,
    /// Flags of [`Config`].
    pub flags: u32,
    /// First and last port of rewritten sources.
    pub snat: (Port, Port),
    /// First and last port that the kernel gives to local sockets.
    pub local: (Port, Port),
}

fn each(ops: &[&Op], mut apply: impl FnMut(&Op) -> Result<(), Error>) -> Result<(), Refused> {
    for (done, op) in ops.iter().enumerate() {
        apply(op).map_err(|source| Refused { done, source })?;
    }
    Ok(())
}

fn frontend_entry(op: &Op) -> Option<(FrontendKey, FrontendValue)> {
    let Op::PutFrontend { at, value } = op else { return None };
    Some((at.record(), *value))
}

fn frontend_key(op: &Op) -> Option<FrontendKey> {
    let Op::DeleteFrontend { at } = op else { return None };
    Some(at.record())
}

fn address_entry(op: &Op) -> Option<(Addr, AddressClass)> {
    let Op::PutAddress { addr, class, .. } = op else { return None };
    Some((*addr, *class))
}

fn address_key(op: &Op) -> Option<Addr> {
    let Op::DeleteAddress { addr } = op else { return None };
    Some(*addr)
}

/// A list as the record holds it; what does not fit is the planner's affair.
fn cidr_list(cidrs: &[Cidr]) -> ([Cidr; MAX_CIDRS], u8) {
    let mut list = [Cidr::ZERO; MAX_CIDRS];
    let count = cidrs.len().min(MAX_CIDRS);
    list[..count].copy_from_slice(&cidrs[..count]);
    (list, count as u8)
}

/// Waits until no program can still read what was replaced before the call. Blocks for some milliseconds.
pub fn wait_for_programs() {
    /// Far above any RCU grace period of a machine that works; programs run for microseconds.
    const PATIENCE: Duration = Duration::from_millis(100);
    if let Err(error) = sys::wait_for_programs() {
        // `nohz_full` kernels refuse the call.
        warn!(%error, "membarrier is refused, waiting by the clock");
        std::thread::sleep(PATIENCE);
    }
}

/// A per-CPU array.
pub(super) struct PerCpu<V> {
    table: Table<u32, V>,
    cpus: usize,
}

impl<V: Pod> PerCpu<V> {
    pub(super) fn open(maps: &MapFds, name: &'static str) -> Result<Self, KernelError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| on_map("count CPUs for", name)(error))?;
        Ok(Self { table: Table::open(maps, name)?, cpus })
    }

    /// Sets every CPU's copy.
    pub(super) fn put(&self, index: u32, value: &V) -> Result<(), Error> {
        self.check(index)?;
        let words = size_of::<V>().div_ceil(8);
        let mut copies = vec![0u64; words * self.cpus];
        for copy in copies.chunks_exact_mut(words) {
            // SAFETY: each copy is at least as long as the value, which is plain bytes.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    (&raw const *value).cast::<u8>(),
                    copy.as_mut_ptr().cast(),
                    size_of::<V>(),
                )
            };
        }
        sys::map_update_slice(self.table.fd.as_fd(), &index, &copies).map_err(|source| self.table.refused(source))
    }

    /// Sets the words of the first CPU's copy and clears the others.
    pub(super) fn set_words(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
        self.check(index)?;
        let mut copies = vec![0u64; size_of::<V>().div_ceil(8) * self.cpus];
        copies.iter_mut().zip(counts).for_each(|(word, count)| *word = *count);
        sys::map_update_slice(self.table.fd.as_fd(), &index, &copies).map_err(|source| self.table.refused(source))
    }

    /// Adds to the words of the first CPU's copy. What programs count meanwhile is lost.
    pub(super) fn add_words(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
        self.check(index)?;
        let mut copies = vec![0u64; size_of::<V>().div_ceil(8) * self.cpus];
        let refused = |source| self.table.refused(source);
        sys::map_lookup(self.table.fd.as_fd(), &index, &mut copies).map_err(refused)?;
        copies.iter_mut().zip(counts).for_each(|(word, count)| *word += count);
        sys::map_update_slice(self.table.fd.as_fd(), &index, &copies).map_err(refused)
    }

    /// Every CPU's copy.
    pub(super) fn get(&self, index: u32) -> Result<Vec<V>, Error> {
        self.check(index)?;
        let words = size_of::<V>().div_ceil(8);
        let mut copies = vec![0u64; words * self.cpus];
        sys::map_lookup(self.table.fd.as_fd(), &index, &mut copies).map_err(|source| self.table.refused(source))?;
        Ok(copies.chunks_exact(words).map(from_words).collect())
    }

    /// Calls `visit` with every CPU's copies of the first `count` elements, in order.
    pub(super) fn for_each(&self, count: u32, mut visit: impl FnMut(u32, &[V])) -> Result<(), Error> {
        /// Values of one system call.
        const BYTES: usize = 256 << 10;
        let count = count.min(self.table.capacity) as usize;
        let words = size_of::<V>().div_ceil(8);
        let element = words * self.cpus;
        let length = (BYTES / (element * 8)).clamp(1, count.max(1));
        let (mut keys, mut values) = (vec![0u32; length], vec![0u64; length * element]);
        let mut copies = Vec::with_capacity(self.cpus);
        let (mut cursor, mut done) = (sys::Cursor::default(), 0);
        while done < count {
            let wanted = length.min(count - done);
            let (keys, values) = (&mut keys[..wanted], &mut values[..wanted * element]);
            let batch = sys::map_lookup_batch(self.table.fd.as_fd(), &mut cursor, keys, values)
                .map_err(|source| self.table.refused(source))?;
            for (key, value) in keys[..batch.count].iter().zip(values.chunks_exact(element)) {
                copies.clear();
                copies.extend(value.chunks_exact(words).map(from_words::<V>));
                visit(*key, &copies);
            }
            done += batch.count;
            if batch.done || batch.count == 0 {
                break;
            }
        }
        Ok(())
    }

    fn check(&self, index: u32) -> Result<(), Error> {
        let bounds = Error::Bounds { table: self.table.name, index, capacity: self.table.capacity };
        if index < self.table.capacity { Ok(()) } else { Err(bounds) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_record_come_back() {
        let record = ServiceRecord { cluster: 0x0102_0304_0506_0708, local: u64::MAX, affinity: 10800, fingerprint: 7 };
        assert_eq!(from_words::<ServiceRecord>(&to_words::<_, 3>(&record)), record);
    }

    #[test]
    fn the_state_of_a_backend_lies_in_its_last_word() {
        let live = BackendRecord { state: BackendRecord::STATE_LIVE, ..BackendRecord::ZERO };
        let [first, second, last] = to_words::<_, 3>(&live);
        assert_eq!((first, second), (0, 0));
        assert_ne!(last, 0);
    }
}
