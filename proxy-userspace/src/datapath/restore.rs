//! What the pinned tables say: for an agent that takes over, and for people who ask without an agent.
//!
//! May touch: map entries, for reading.

use proxy_common::abi::address::{AddressClass, PortWord};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::{Cidr, Config};
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{Range, ServiceName, ServiceRecord, Slot};
use proxy_common::abi::source::SourceRangeKey;
use proxy_common::addr::Addr;

use super::kernel::MapFds;
use super::maps::{Error, MappedArray, Table, source_of};
use crate::planner::{BackendId, Cidrs, FrontendAddr, Limits, ServiceId, Tables};

/// Capacities of the arrays that the planner allocates from.
pub fn read_limits(maps: &MapFds) -> Result<Limits, Error> {
    Ok(Limits {
        services: MappedArray::<ServiceRecord>::open(maps, "services", false)?.capacity(),
        backends: MappedArray::<BackendRecord>::open(maps, "backends", false)?.capacity(),
        slots: MappedArray::<Slot>::open(maps, "slots", false)?.capacity(),
    })
}

/// The configuration of the programs.
pub fn read_config(maps: &MapFds) -> Result<Config, Error> {
    Ok(Table::<u32, Config>::open(maps, "config")?.get(&0)?.unwrap_or(Config::ZERO))
}

/// All entries that a plan changes.
pub fn read_tables(maps: &MapFds) -> Result<Tables, Error> {
    let mut tables = Tables { cidrs: cidrs(&read_config(maps)?), ..Tables::default() };
    read_hashes(maps, &mut tables)?;
    read_services(maps, &mut tables)?;
    read_backends(maps, &mut tables)?;
    read_ports(maps, &mut tables)?;
    Ok(tables)
}

fn cidrs(config: &Config) -> Cidrs {
    let list = |cidrs: &[Cidr], count: u8| cidrs.iter().take(usize::from(count)).copied().collect();
    Cidrs {
        service: list(&config.service_cidrs, config.service_cidr_count),
        cluster: list(&config.cluster_cidrs, config.cluster_cidr_count),
        pod: list(&config.pod_cidrs, config.pod_cidr_count),
    }
}

fn read_hashes(maps: &MapFds, tables: &mut Tables) -> Result<(), Error> {
    Table::<u32, ServiceName>::open(maps, "service_names")?.for_each(|id, name| {
        // What is not text cannot be ours; the planner treats a nameless id as free.
        let name = name.as_str().unwrap_or_default().to_owned();
        tables.names.insert(ServiceId(*id), name);
    })?;
    Table::<FrontendKey, FrontendValue>::open(maps, "frontends")?.for_each(|key, value| {
        tables.frontends.insert(FrontendAddr::from(*key), *value);
    })?;
    Table::<SourceRangeKey, u32>::open(maps, "source_ranges")?.for_each(|key, _| {
        if let Some((service, net)) = source_of(key) {
            tables.sources.entry(service).or_default().insert(net);
        }
    })?;
    Table::<Addr, AddressClass>::open(maps, "addresses")?.for_each(|addr, class| {
        tables.addresses.insert(*addr, *class);
    })?;
    Ok(())
}

fn read_services(maps: &MapFds, tables: &mut Tables) -> Result<(), Error> {
    let services = MappedArray::<ServiceRecord>::open(maps, "services", false)?;
    let slots = MappedArray::<Slot>::open(maps, "slots", false)?;
    for id in 1..services.capacity() {
        let record = services.read(id)?;
        if record == ServiceRecord::ZERO {
            continue;
        }
        tables.services.insert(ServiceId(id), record);
        for range in [record.cluster, record.local].map(Range::unpack) {
            let end = range.base.saturating_add(range.count).min(slots.capacity());
            for position in range.base..end {
                tables.slots.insert(position, slots.read(position)?);
            }
        }
    }
    Ok(())
}

fn read_backends(maps: &MapFds, tables: &mut Tables) -> Result<(), Error> {
    let backends = MappedArray::<BackendRecord>::open(maps, "backends", false)?;
    for id in 1..backends.capacity() {
        let record = backends.read(id)?;
        if record.is_live() {
            tables.backends.insert(BackendId(id), record);
        }
    }
    Ok(())
}

fn read_ports(maps: &MapFds, tables: &mut Tables) -> Result<(), Error> {
    let ports = Table::<u32, PortWord>::open(maps, "ports")?;
    for index in 0..ports.capacity() {
        if let Some(word) = ports.get(&index)?.filter(|word| word.bits != 0) {
            tables.ports.insert(index, word);
        }
    }
    Ok(())
}
