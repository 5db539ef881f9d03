//! `proxy-common`'s look-ups over the pinned tables: what the socket hooks would decide, asked from outside.
//!
//! Nothing is written: what a decision would remember or count is left out.
//! May touch: map entries, for reading.

use proxy_common::abi::address::{AddressClass, KEPT_GENERATION, PortUse, PortWord, kept_index, port_index};
use proxy_common::abi::affinity::{AffinityKey, AffinityValue};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::Config;
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{Range, ServiceName, ServiceRecord, Slot};
use proxy_common::abi::source::SourceRangeKey;
use proxy_common::addr::{Addr, Port};
use proxy_common::tables::{Event, Tables};
use proxy_common::verdict::DropReason;

use super::kernel::MapFds;
use super::maps::{Error, Table};
use super::restore;

/// The pinned tables. What cannot be read counts as not there.
pub struct Lookup {
    config: Config,
    addresses: Table<Addr, AddressClass>,
    ports: Table<u32, PortWord>,
    kept_ports: Table<u32, PortWord>,
    frontends: Table<FrontendKey, FrontendValue>,
    services: Table<u32, ServiceRecord>,
    names: Table<u32, ServiceName>,
    slots: Table<u32, Slot>,
    backends: Table<u32, BackendRecord>,
    affinity: Table<AffinityKey, AffinityValue>,
    source_ranges: Table<SourceRangeKey, u32>,
}

impl Lookup {
    /// Opens the tables.
    pub fn open(maps: &MapFds) -> Result<Self, Error> {
        Ok(Self {
            config: restore::read_config(maps)?,
            addresses: Table::open(maps, "addresses")?,
            ports: Table::open(maps, "ports")?,
            kept_ports: Table::open(maps, "kept_ports")?,
            frontends: Table::open(maps, "frontends")?,
            services: Table::open(maps, "services")?,
            names: Table::open(maps, "service_names")?,
            slots: Table::open(maps, "slots")?,
            backends: Table::open(maps, "backends")?,
            affinity: Table::open(maps, "affinity")?,
            source_ranges: Table::open(maps, "source_ranges")?,
        })
    }

    /// Name of a service port; its number if it has none any more.
    pub fn name(&self, service: u32) -> String {
        let name = self.names.get(&service).ok().flatten();
        name.and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_else(|| format!("service number {service}"))
    }

    /// The backends of a set, each as often as it has slots.
    pub fn backends_of(&self, range: Range) -> Vec<BackendRecord> {
        let slots = (0..range.count).filter_map(|step| self.slot(range.base.wrapping_add(step)));
        slots.filter_map(|slot| self.backend(slot.backend)).collect()
    }

    fn service(&self, service: u32) -> Option<ServiceRecord> {
        self.services.get(&service).ok().flatten()
    }
}

impl Tables for Lookup {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }

    fn address(&self, addr: &Addr) -> AddressClass {
        self.addresses.get(addr).ok().flatten().unwrap_or(AddressClass::ZERO)
    }

    fn set_flows_of(&self, _: &Addr) {}

    fn port_use(&self, port: Port) -> PortUse {
        let bits = |table: &Table<u32, PortWord>, (word, shift): (u32, u32)| {
            table.get(&word).ok().flatten().map_or(0, |word| word.bits >> shift)
        };
        let kept = bits(&self.kept_ports, kept_index(port));
        let bits = bits(&self.ports, port_index(port)) | kept | kept >> KEPT_GENERATION;
        PortUse(bits & (PortUse::NODE_PORT | PortUse::SNAT))
    }

    fn mark_port(&self, _: Port, _: u64) {}

    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).ok().flatten()
    }

    fn range(&self, service: u32, local: bool) -> Option<Range> {
        let record = self.service(service)?;
        Some(Range::unpack(if local { record.local } else { record.cluster }))
    }

    fn affinity_timeout(&self, service: u32) -> u32 {
        self.service(service).map_or(0, |record| record.affinity)
    }

    fn is_allowed(&self, service: u32, client: &Addr) -> bool {
        self.source_ranges.get(&SourceRangeKey::new(service, *client, 128)).ok().flatten().is_some()
    }

    fn fingerprint(&self, service: u32) -> u32 {
        self.service(service).map_or(0, |record| record.fingerprint)
    }

    fn slot(&self, position: u32) -> Option<Slot> {
        self.slots.get(&position).ok().flatten()
    }

    fn range_contains(&self, range: Range, backend: u32) -> bool {
        (0..range.count)
            .any(|step| self.slot(range.base.wrapping_add(step)).is_some_and(|slot| slot.backend == backend))
    }

    fn backend(&self, id: u32) -> Option<BackendRecord> {
        self.backends.get(&id).ok().flatten()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.get(key).ok().flatten()
    }

    fn set_affinity(&self, _: &AffinityKey, _: &AffinityValue) {}

    fn count(&self, _: u32, _: Event) {}

    fn count_drop(&self, _: DropReason) {}
}
