//! A node in memory, for tests: the tables as hash maps, what the kernel would say as fields.
//!
//! Entries are leaked boxes: they must stay where flow references point, as map elements do.

use crate::abi::address::{AddressClass, PortUse};
use crate::abi::affinity::{AffinityKey, AffinityValue};
use crate::abi::backend::BackendRecord;
use crate::abi::config::{Cidr, Config};
use crate::abi::flow::{FlowKey, FlowRef, FlowValue};
use crate::abi::fragment::{FragmentKey, FragmentValue};
use crate::abi::frontend::{FrontendKey, FrontendValue};
use crate::abi::service::{Range, Slot};
use crate::addr::{Addr, Be16, Port, Proto};
use crate::lb::flow::{Nanos, Seconds};
use crate::lb::tuple::Tuple;
use crate::tables::{Event, Flows, Lookups, Neighbour, Tables, Tracked};
use crate::verdict::DropReason;
use core::cell::{Cell, RefCell};
use core::net::IpAddr;
use std::boxed::Box;
use std::collections::HashMap;
use std::vec::Vec;

/// A node in memory.
pub struct World {
    pub config: Config,
    pub addresses: RefCell<HashMap<Addr, AddressClass>>,
    pub port_uses: RefCell<HashMap<u16, u64>>,
    pub kept_ports: RefCell<HashMap<u16, u64>>,
    pub frontends: HashMap<FrontendKey, FrontendValue>,
    pub sets: HashMap<(u32, bool), Range>,
    pub affinity_timeouts: HashMap<u32, u32>,
    pub source_ranges: HashMap<u32, Vec<Cidr>>,
    pub fingerprints: HashMap<u32, u32>,
    pub slots: Vec<Slot>,
    pub backends: RefCell<Vec<BackendRecord>>,
    pub affinities: RefCell<HashMap<AffinityKey, AffinityValue>>,
    pub pending: RefCell<HashMap<FlowKey, *mut FlowValue>>,
    pub established: RefCell<HashMap<FlowKey, *mut FlowValue>>,
    pub room_for_flows: Cell<usize>,
    pub fragments: RefCell<HashMap<FragmentKey, FragmentValue>>,
    pub tracked: HashMap<Tuple, Tracked>,
    pub sockets: Vec<Tuple>,
    pub source: Option<Addr>,
    pub neighbour: Cell<Neighbour>,
    pub now: Cell<Seconds>,
    /// Since `now` began.
    pub nanos: Cell<u64>,
    pub ifindex: Cell<u32>,
    pub drops: RefCell<HashMap<DropReason, u32>>,
    pub events: RefCell<HashMap<(u32, &'static str), u32>>,
}

/// An address from text.
pub fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("tests write addresses right").into()
}

fn cidr(text: &str, bits: u32) -> Cidr {
    let addr = addr(text);
    let bits = if addr.is_v4() { 96 + bits } else { bits };
    let mut mask = [0; 4];
    for (i, word) in mask.iter_mut().enumerate() {
        let inside = bits.saturating_sub(32 * i as u32).min(32);
        *word = (u32::MAX.checked_shl(32 - inside).unwrap_or(0)).to_be();
    }
    Cidr { addr, mask: Addr(mask) }
}

impl World {
    /// A node 192.0.2.1 / 2001:db8::1 with pod CIDRs 10.244.1.0/24 and fd00:1::/64 in clusters 10.244.0.0/16 and
    /// fd00::/16, service CIDRs 10.96.0.0/16 and fd96::/112, and no service.
    pub fn new() -> Self {
        let mut config = Config::ZERO;
        config.hash_key = [7, 9];
        config.node_netns = 1;
        (config.snat_first, config.snat_last) = (10000, 29999);
        (config.local_first, config.local_last) = (32768, 60999);
        config.service_cidrs[0] = cidr("10.96.0.0", 16);
        config.service_cidrs[1] = cidr("fd96::", 112);
        config.service_cidr_count = 2;
        config.cluster_cidrs[0] = cidr("10.244.0.0", 16);
        config.cluster_cidrs[1] = cidr("fd00::", 16);
        config.cluster_cidr_count = 2;
        config.pod_cidrs[0] = cidr("10.244.1.0", 24);
        config.pod_cidrs[1] = cidr("fd00:1::", 64);
        config.pod_cidr_count = 2;
        let world = Self {
            config,
            addresses: RefCell::default(),
            port_uses: RefCell::default(),
            kept_ports: RefCell::default(),
            frontends: HashMap::new(),
            sets: HashMap::new(),
            affinity_timeouts: HashMap::new(),
            source_ranges: HashMap::new(),
            fingerprints: HashMap::new(),
            slots: Vec::new(),
            backends: RefCell::new(std::vec![BackendRecord::ZERO]),
            affinities: RefCell::default(),
            pending: RefCell::default(),
            established: RefCell::default(),
            room_for_flows: Cell::new(usize::MAX),
            fragments: RefCell::default(),
            tracked: HashMap::new(),
            sockets: Vec::new(),
            source: None,
            neighbour: Cell::new(Neighbour::Elsewhere),
            now: Cell::new(Seconds(1000)),
            nanos: Cell::new(0),
            ifindex: Cell::new(5),
            drops: RefCell::default(),
            events: RefCell::default(),
        };
        for node in ["192.0.2.1", "2001:db8::1"] {
            world.add_class(addr(node), AddressClass::NODE | AddressClass::NODE_PORT);
        }
        world
    }

    /// Adds flags to an address.
    pub fn add_class(&self, addr: Addr, flags: u32) {
        self.addresses.borrow_mut().entry(addr).or_insert(AddressClass::ZERO).flags |= flags;
    }

    /// Adds a service with these backends in its cluster set, the local ones in its local set; the id it got.
    pub fn add_service(&mut self, backends: &[(&str, u16, bool)], proto: Proto) -> u32 {
        let service = self.sets.len() as u32 / 2 + 1;
        for only_local in [false, true] {
            let base = self.slots.len() as u32;
            for &(text, port, local) in backends.iter().filter(|&&(_, _, local)| local || !only_local) {
                let record = BackendRecord {
                    addr: addr(text),
                    port: Port(port).be(),
                    proto: proto.0,
                    state: BackendRecord::STATE_LIVE,
                    flags: if local { BackendRecord::LOCAL } else { 0 },
                };
                let known = self.backends.borrow().iter().position(|other| *other == record);
                let id = known.unwrap_or_else(|| {
                    self.backends.borrow_mut().push(record);
                    self.backends.borrow().len() - 1
                });
                self.add_class(record.addr, AddressClass::BACKEND);
                self.slots.push(Slot { backend: id as u32, owner: service });
            }
            let count = self.slots.len() as u32 - base;
            let range = match (count, only_local && !backends.is_empty()) {
                (0, true) => Range::DROP,
                (0, false) => Range::REJECT,
                _ => Range { base, count },
            };
            self.sets.insert((service, only_local), range);
        }
        service
    }

    /// Adds a frontend; `flags` of [`FrontendValue`].
    pub fn add_frontend(&mut self, service: u32, text: &str, port: u16, proto: Proto, flags: u32) {
        let key = FrontendKey { addr: addr(text), port: Port(port).be(), proto: proto.0, reserved: 0 };
        self.frontends.insert(key, FrontendValue { service, flags });
        if key.addr == key.addr.wildcard() {
            *self.port_uses.borrow_mut().entry(port).or_insert(0) |= PortUse::NODE_PORT;
            return;
        }
        let cluster_ip = if flags & FrontendValue::CLUSTER_IP != 0 { AddressClass::CLUSTER_IP } else { 0 };
        self.add_class(key.addr, AddressClass::FRONTEND | cluster_ip);
    }

    /// Adds a source range to a service.
    pub fn allow(&mut self, service: u32, text: &str, bits: u32) {
        self.source_ranges.entry(service).or_default().push(cidr(text, bits));
    }

    /// Takes a backend away, as the agent does when its endpoint is gone.
    pub fn remove_backend(&self, text: &str) {
        for backend in self.backends.borrow_mut().iter_mut().filter(|backend| backend.addr == addr(text)) {
            backend.state = BackendRecord::STATE_NONE;
        }
    }

    /// Says that the endpoint of an established flow is gone, as the agent does.
    pub fn mark_stale(&self, front: &FlowKey) {
        let mut established = self.established.borrow_mut();
        let entry = established.get_mut(front).expect("it was opened");
        let mut changed = reference(*entry).with(|value| *value);
        changed.flags |= FlowValue::STALE;
        *entry = leak(&changed);
    }

    /// How often a drop was counted by the tables (not by a verdict).
    pub fn drops(&self, reason: DropReason) -> u32 {
        self.drops.borrow().get(&reason).copied().unwrap_or_default()
    }
}

fn leak(value: &FlowValue) -> *mut FlowValue {
    Box::leak(Box::new(*value))
}

#[expect(unsafe_code, reason = "the entries are leaked boxes, as valid as map elements")]
fn reference<'a>(entry: *mut FlowValue) -> FlowRef<'a> {
    // SAFETY: a leaked box, never freed.
    unsafe { FlowRef::new(entry) }
}

impl Tables for World {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }
    fn address(&self, addr: &Addr) -> AddressClass {
        self.addresses.borrow().get(addr).copied().unwrap_or(AddressClass::ZERO)
    }
    fn set_flows_of(&self, addr: &Addr) {
        self.add_class(*addr, AddressClass::FLOWS);
    }
    fn port_use(&self, port: Port) -> PortUse {
        let in_range = (self.config.snat_first..=self.config.snat_last).contains(&port.0);
        let range = if in_range { PortUse::SNAT } else { 0 };
        let of = |uses: &RefCell<HashMap<u16, u64>>| uses.borrow().get(&port.0).copied().unwrap_or_default();
        PortUse(range | of(&self.port_uses) | of(&self.kept_ports))
    }
    fn mark_port(&self, port: Port, usage: u64) {
        *self.kept_ports.borrow_mut().entry(port.0).or_insert(0) |= usage;
    }
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        self.frontends.get(key).copied()
    }
    fn range(&self, service: u32, local: bool) -> Option<Range> {
        self.sets.get(&(service, local)).copied()
    }
    fn affinity_timeout(&self, service: u32) -> u32 {
        self.affinity_timeouts.get(&service).copied().unwrap_or_default()
    }
    fn fingerprint(&self, service: u32) -> u32 {
        self.fingerprints.get(&service).copied().unwrap_or_default()
    }
    fn is_allowed(&self, service: u32, client: &Addr) -> bool {
        self.source_ranges.get(&service).is_some_and(|ranges| ranges.iter().any(|range| range.contains(client)))
    }
    fn slot(&self, position: u32) -> Option<Slot> {
        self.slots.get(position as usize).copied()
    }
    fn range_contains(&self, range: Range, backend: u32) -> bool {
        (range.base..range.base + range.count).any(|at| self.slots[at as usize].backend == backend)
    }
    fn backend(&self, id: u32) -> Option<BackendRecord> {
        self.backends.borrow().get(id as usize).copied()
    }
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinities.borrow().get(key).copied()
    }
    fn set_affinity(&self, key: &AffinityKey, value: &AffinityValue) {
        self.affinities.borrow_mut().insert(*key, *value);
    }
    fn count(&self, service: u32, event: Event) {
        let name = match event {
            Event::Flow => "flow",
            Event::Socket => "socket",
            Event::NoBackend => "no backend",
        };
        *self.events.borrow_mut().entry((service, name)).or_default() += 1;
    }
    fn count_drop(&self, reason: DropReason) {
        *self.drops.borrow_mut().entry(reason).or_default() += 1;
    }
}

impl Lookups for World {
    fn established(&self, key: &FlowKey) -> Option<FlowRef<'_>> {
        self.established.borrow().get(key).map(|&entry| reference(entry))
    }
    fn pending(&self, key: &FlowKey) -> Option<FlowRef<'_>> {
        self.pending.borrow().get(key).map(|&entry| reference(entry))
    }
    fn ifindex(&self) -> u32 {
        self.ifindex.get()
    }
    fn now(&self) -> Seconds {
        self.now.get()
    }
}

impl Flows for World {
    fn draft(&self) -> Option<&mut FlowValue> {
        Some(Box::leak(Box::new(FlowValue::ZERO)))
    }
    fn insert_pending(&self, key: &FlowKey, value: &FlowValue, new_only: bool) -> bool {
        let mut pending = self.pending.borrow_mut();
        if new_only && pending.contains_key(key) {
            return false;
        }
        pending.insert(*key, leak(value));
        true
    }
    fn establish(&self, key: &FlowKey, value: FlowRef<'_>) -> bool {
        let mut established = self.established.borrow_mut();
        if established.contains_key(key) || established.len() >= self.room_for_flows.get() {
            return false;
        }
        established.insert(*key, value.with(leak));
        true
    }
    fn remove_established(&self, key: &FlowKey) {
        self.established.borrow_mut().remove(key);
    }
    fn remove_pending(&self, key: &FlowKey) {
        self.pending.borrow_mut().remove(key);
    }
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        self.fragments.borrow().get(key).copied()
    }
    fn set_fragment(&self, key: &FragmentKey, value: &FragmentValue) {
        self.fragments.borrow_mut().insert(*key, *value);
    }
    fn search<F: FnMut(u32) -> bool>(&self, tries: u32, found: F) -> bool {
        (0..tries).any(found)
    }
    fn nanos(&self) -> Nanos {
        Nanos((u64::from(self.now.get().0) << 30) + self.nanos.get())
    }
    fn source_towards(&self, _src: &Addr, dst: &Addr) -> Option<Addr> {
        self.source.or(Some(addr(if dst.is_v4() { "192.0.2.1" } else { "2001:db8::1" })))
    }
    fn bridge_neighbour(&self, _src: &Addr, _dst: &Addr) -> Neighbour {
        self.neighbour.get()
    }
    fn tracked(&self, tuple: &Tuple) -> Tracked {
        self.tracked.get(tuple).copied().unwrap_or(Tracked::Unknown)
    }
    fn has_connected_socket(&self, tuple: &Tuple) -> bool {
        self.sockets.contains(tuple)
    }
}

/// A tuple from text.
pub fn tuple(src: &str, sport: u16, dst: &str, dport: u16, proto: Proto) -> Tuple {
    let be = |port: u16| -> Be16 { Port(port).be() };
    Tuple { src: addr(src), dst: addr(dst), sport: be(sport), dport: be(dport), proto }
}
