//! The state that the tables show.
//!
//! Whatever they hold is accounted for: by a name, by a frontend, by a slot, or as an orphan. What contradicts itself (an
//! agent died in the middle of a change, or somebody else wrote) is kept apart, so that it is written anew and no id or
//! slot is given out twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::{Range, ServiceRecord};
use proxy_common::addr::Proto;

use super::backends::{Backend, Backends, Listed, Programmed};
use super::claims::Claims;
use super::health_check::Checks;
use super::ids::{BackendId, Epoch, Ids, Limits, ServiceId, Slots, Stretch};
use super::key::{BackendAddr, FrontendAddr, PortName};
use super::service::{FrontendKind, PlannedFrontend};
use super::state::{Orphans, Port, Retired, State, claim};
use super::tables::Tables;
use super::usage::{Addresses, Ports, SnatPorts};

impl State {
    /// Nothing is programmed.
    pub fn empty(limits: Limits, snat: SnatPorts) -> Self {
        Self::restore(limits, snat, &Tables::default())
    }

    /// The state that the tables show.
    ///
    /// What it holds stays as it is until its source has listed: [`State::advance`] takes away only what belongs to
    /// sources that have, or that are no longer configured.
    pub fn restore(limits: Limits, snat: SnatPorts, tables: &Tables) -> Self {
        let (named, unnamed) = named_services(tables);
        let (backends, doubles) = backends(tables);
        let stretches = stretches(tables, limits.slots);
        let stretch_of = |id: &ServiceId| stretches.get(id).copied().unwrap_or_default();
        let mut state = Self {
            limits,
            epoch: Epoch(0),
            planned: None,
            service_ids: Ids::new(limits.services, &used_services(tables)),
            backend_ids: Ids::new(limits.backends, &tables.backends.keys().map(|id| id.0).collect()),
            slots: Slots::new(limits.slots, &stretches.values().copied().collect::<Vec<_>>()),
            ports: BTreeMap::new(),
            backends,
            claims: Claims::default(),
            addresses: Addresses::default(),
            node_addresses: BTreeSet::new(),
            port_uses: Ports::restore(snat, &tables.ports),
            cidrs: tables.cidrs.clone(),
            orphans: Orphans {
                services: unnamed
                    .iter()
                    .map(|id| (Retired { id: *id, sources: sources(tables, id) }, stretch_of(id)))
                    .collect(),
                backends: doubles,
                unlisted: Vec::new(),
            },
            refused: BTreeSet::new(),
            has_room: false,
            checks: Checks::default(),
            problems: BTreeMap::new(),
            remarks: BTreeSet::new(),
        };
        let mut frontends = frontends_by_service(tables);
        for (name, id) in named {
            let frontends = frontends.remove(&id).unwrap_or_default();
            let port = restore_port(tables, &state.backends, id, stretch_of(&id), frontends);
            state.restore_claims(&name, &port);
            state.ports.insert(name, port);
        }
        state.restore_addresses(tables);
        state.restore_uses(tables);
        state
    }

    fn restore_claims(&mut self, name: &Arc<PortName>, port: &Port) {
        for frontend in &port.frontends {
            self.claims.put(frontend.at, claim(name, port, frontend));
        }
        for listed in &port.backends {
            if let Some(backend) = self.backends.get_mut(listed.id()) {
                backend.users += 1;
                backend.local_users += u32::from(listed.is_local());
            }
        }
    }

    fn restore_addresses(&mut self, tables: &Tables) {
        for (addr, class) in &tables.addresses {
            self.addresses.at(*addr).restore(class.flags);
            if self.addresses.at(*addr).node() != 0 {
                self.node_addresses.insert(*addr);
            }
        }
    }

    /// Counts users as the tables have them.
    fn restore_uses(&mut self, tables: &Tables) {
        for (at, value) in &tables.frontends {
            self.claims.entry(*at).programmed = Some(*value);
            if at.is_node_port() {
                self.port_uses.add(at.port);
                continue;
            }
            let uses = self.addresses.at(at.addr);
            uses.frontends += 1;
            uses.cluster_ips += u32::from(value.has(FrontendValue::CLUSTER_IP));
        }
        for (id, backend) in self.backends.iter() {
            self.addresses.at(backend.at.addr).backends += 1;
            if backend.users == 0 {
                self.orphans.unlisted.push(id);
            }
        }
        for id in &self.orphans.unlisted {
            self.backends.get_mut(*id).expect("it was just seen").users = 1;
        }
    }
}

/// Ids that mean something.
fn used_services(tables: &Tables) -> BTreeSet<u32> {
    let pointed_to = tables.frontends.values().map(|value| value.service);
    let published = tables.services.iter().filter(|(_, record)| **record != ServiceRecord::ZERO).map(|(id, _)| id.0);
    let restricted = tables.sources.keys().map(|id| id.0);
    let known = tables.names.keys().map(|id| id.0);
    known.chain(published).chain(pointed_to).chain(restricted).filter(|id| *id != 0).collect()
}

/// Ids by name; and ids without a name of ours, or whose name another id has. Of those the one with more frontends counts:
/// the other is what an agent had no time to clear.
fn named_services(tables: &Tables) -> (BTreeMap<Arc<PortName>, ServiceId>, Vec<ServiceId>) {
    let frontends = |id: &ServiceId| tables.frontends.values().filter(|value| value.service == id.0).count();
    let mut named: BTreeMap<Arc<PortName>, ServiceId> = BTreeMap::new();
    let mut unnamed: Vec<_> = used_services(tables).into_iter().map(ServiceId).collect();
    unnamed.retain(|id| !tables.names.contains_key(id));
    for (id, text) in &tables.names {
        let Ok(name) = text.parse::<PortName>() else {
            unnamed.push(*id);
            continue;
        };
        let name = Arc::new(name);
        match named.get(&name) {
            Some(other) if frontends(other) >= frontends(id) => unnamed.push(*id),
            _ => unnamed.extend(named.insert(name, *id)),
        }
    }
    (named, unnamed)
}

/// Backends; and ids of which another one has the address.
fn backends(tables: &Tables) -> (Backends, Vec<BackendId>) {
    let mut known = Backends::default();
    let mut doubles = Vec::new();
    for (id, record) in tables.backends.iter().filter(|(_, record)| record.is_live()) {
        let (at, programmed) = (address_of(record), Programmed::from_flags(record.flags));
        match known.find(&at) {
            Some(_) => doubles.push(*id),
            None => known.add(*id, Backend { at, users: 0, local_users: 0, programmed }),
        }
    }
    (known, doubles)
}

fn address_of(record: &BackendRecord) -> BackendAddr {
    BackendAddr { addr: record.addr, port: record.port.host(), proto: Proto(record.proto) }
}

/// The slots that each published record holds: from the first to the last of its two sets. What lies outside the table or
/// in another's slots is held by nobody.
fn stretches(tables: &Tables, capacity: u32) -> BTreeMap<ServiceId, Stretch> {
    let mut all: Vec<_> = tables.services.iter().filter_map(|(id, record)| Some((span(record)?, *id))).collect();
    all.sort_by_key(|(stretch, id)| (stretch.base, *id));
    let mut free_from = 0;
    all.retain(|(stretch, _)| {
        let end = stretch.base.checked_add(stretch.count).filter(|end| *end <= capacity);
        let fits = end.is_some() && stretch.base >= free_from;
        free_from = if fits { end.unwrap_or(free_from) } else { free_from };
        fits
    });
    all.into_iter().map(|(stretch, id)| (id, stretch)).collect()
}

/// From the first to the last slot of the two sets.
fn span(record: &ServiceRecord) -> Option<Stretch> {
    let ranges = [Range::unpack(record.cluster), Range::unpack(record.local)];
    let used = || ranges.iter().filter(|range| range.count > 0);
    let base = used().map(|range| range.base).min()?;
    let end = used().map(|range| range.base.saturating_add(range.count)).max()?;
    Some(Stretch { base, count: end - base })
}

fn sources(tables: &Tables, id: &ServiceId) -> Box<[IpNet]> {
    tables.sources.get(id).into_iter().flatten().copied().collect()
}

fn frontends_by_service(tables: &Tables) -> BTreeMap<ServiceId, Vec<PlannedFrontend>> {
    let mut by_service: BTreeMap<ServiceId, Vec<_>> = BTreeMap::new();
    for (at, value) in &tables.frontends {
        let frontend = PlannedFrontend { at: *at, kind: kind_of(at, value), flags: value.flags };
        by_service.entry(ServiceId(value.service)).or_default().push(frontend);
    }
    by_service
}

/// The kind of a frontend as far as the table shows it: it decides nothing before the source has listed.
fn kind_of(at: &FrontendAddr, value: &FrontendValue) -> FrontendKind {
    match value.has(FrontendValue::CLUSTER_IP) {
        true => FrontendKind::ClusterIp,
        false if at.is_node_port() => FrontendKind::NodePort,
        false => FrontendKind::ExternalIp,
    }
}

/// A service port from its record. If its slots are not all its own, or name backends that are not there, nothing of it can
/// be kept but its id.
fn restore_port(
    tables: &Tables,
    known: &Backends,
    id: ServiceId,
    stretch: Stretch,
    frontends: Vec<PlannedFrontend>,
) -> Port {
    let record = tables.services.get(&id).copied().unwrap_or(ServiceRecord::ZERO);
    let own = |position: u32| tables.slots.get(&position).filter(|slot| slot.owner == id.0);
    let live = |position: u32| {
        let backend = BackendId(own(position)?.backend);
        tables.backends.get(&backend).filter(|record| record.is_live()).map(|record| (backend, record))
    };
    let found: Option<Vec<_>> = (stretch.base..stretch.base + stretch.count).map(live).collect();
    let found = found.filter(|_| span(&record).unwrap_or_default() == stretch);
    let is_sound = found.is_some();
    let found = found.unwrap_or_default();
    let backends: BTreeMap<_, _> = found.iter().map(|(_, record)| (address_of(record), record.is_local())).collect();
    Port {
        id,
        stretch,
        slots: found.iter().map(|(backend, _)| *backend).collect(),
        record: is_sound.then_some(record),
        backends: backends.iter().filter_map(|(at, is_local)| Some(Listed::new(known.find(at)?, *is_local))).collect(),
        frontends: frontends.into(),
        sources: sources(tables, &id),
        created: None,
        is_held: true,
    }
}
