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

mod part;
mod table;

use std::hash::Hash;
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
use proxy_common::abi::source::SourceRangeKey;
use proxy_common::addr::Addr;
use proxy_common::lb::flow::Seconds;

use super::convert;
use super::kernel::{self, MapFds, on_map};
use super::layout::{CONFIG, Usage};
use super::maps::{Error, PerCpu, Table, config_turn};
use super::sys;
use part::{Bits, Counters, Old, Once, Part, Record, Written};
use table::OldMap;

/// Where the words of `Config::settles_at` are written, in the configuration of either layout.
struct Hold {
    fd: OwnedFd,
    value_size: usize,
    at: usize,
}

impl Hold {
    fn open(maps: &MapFds, version: u32) -> Result<Self, kernel::Error> {
        let name = CONFIG;
        let info = sys::map_info(maps.get(name)?).map_err(on_map("examine", name))?;
        let value_size = info.value_size as usize;
        Ok(Self { fd: maps.duplicate(name)?, value_size, at: convert::settles_at(version) })
    }

    fn set(&self, settles_at: Seconds) -> Result<(), Error> {
        let _turn = config_turn();
        let write = || -> io::Result<()> {
            let mut config = vec![0u8; self.value_size];
            sys::map_lookup(self.fd.as_fd(), &0u32, &mut config)?;
            config[self.at..self.at + 4].copy_from_slice(&settles_at.0.to_ne_bytes());
            sys::map_update_slice(self.fd.as_fd(), &0u32, &config)
        };
        Ok(write().map_err(on_map("write", CONFIG))?)
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
pub const ORDER: [&str; 17] = [
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
    "source_ranges",
    "frontends",
    "services",
    "slots",
    "backends",
];

fn once<K: Pod + Send, V: Pod + Send>(
    old: OldMap,
    new: &MapFds,
    is_used: fn(u32, &K, &V) -> bool,
) -> Result<Box<dyn Part + Send>, kernel::Error> {
    let new = Table::<K, V>::open(new, old.name)?;
    Ok(Box::new(Once::new(old, new, is_used)))
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
    Ok(Box::new(Counters::new(old, new)))
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
        "source_ranges" => once::<SourceRangeKey, u32>(old, new, |_, _, _| true),
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
