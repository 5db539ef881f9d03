//! The reference's services and facts as entries of the real maps.

use std::collections::BTreeMap;
use std::net::IpAddr;

use aya::Pod;
use proxy_common::abi::address::{AddressClass, PortUse, PortWord, port_index};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::{Cidr, Config, MAX_CIDRS};
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{Range, ServiceRecord, Slot};
use proxy_common::addr::{Addr, Port};
use proxy_userspace::datapath::kernel::MapFds;
use proxy_userspace::datapath::sys;
use shunt_tests::nat::{At, Backend, Facts, Frontend, Prefix, Service, Set};

/// The tables of one node, filled once.
pub struct Tables<'a> {
    maps: &'a MapFds,
    addresses: BTreeMap<IpAddr, u32>,
    ports: BTreeMap<u32, u64>,
    slots: u32,
    backends: u32,
}

/// Fills empty maps with `facts` and `services`; services get the ids 1, 2 … in order.
pub fn fill(maps: &MapFds, facts: &Facts, services: &[Service]) {
    let mut tables = Tables { maps, addresses: BTreeMap::new(), ports: BTreeMap::new(), slots: 0, backends: 0 };
    for addr in &facts.node {
        tables.class(*addr, AddressClass::NODE | AddressClass::NODE_PORT);
    }
    for port in facts.snat_ports.clone() {
        tables.port(port, PortUse::SNAT);
    }
    for (id, service) in (1..).zip(services) {
        tables.service(id, service);
    }
    tables.put("config", &0_u32, &config(facts));
    for (addr, flags) in &tables.addresses {
        tables.put("addresses", &Addr::from(*addr), &AddressClass { flags: *flags });
    }
    for (word, bits) in &tables.ports {
        tables.put("ports", word, &PortWord { bits: *bits });
    }
}

impl Tables<'_> {
    fn put<K: Pod, V: Pod>(&self, map: &str, key: &K, value: &V) {
        let fd = self.maps.get(map).expect("the object has it");
        sys::map_update(fd, key, value).unwrap_or_else(|error| panic!("cannot write {map}: {error}"));
    }

    fn class(&mut self, addr: IpAddr, flags: u32) {
        *self.addresses.entry(addr).or_default() |= flags;
    }

    fn port(&mut self, port: u16, bits: u64) {
        let (word, shift) = port_index(Port(port));
        *self.ports.entry(word).or_default() |= bits << shift;
    }

    fn service(&mut self, id: u32, service: &Service) {
        let mut ids = BTreeMap::new();
        let cluster = self.set(id, service.proto, &service.cluster, &mut ids);
        let local = self.set(id, service.proto, &service.local, &mut ids);
        let record = ServiceRecord { cluster: cluster.pack(), local: local.pack(), affinity: 0, reserved: 0 };
        self.put("services", &id, &record);
        for frontend in &service.frontends {
            self.frontend(id, service.proto, frontend);
        }
    }

    /// Writes a set's backends and slots; a backend of both sets of a service has one id.
    fn set(&mut self, service: u32, proto: u8, set: &Set, ids: &mut BTreeMap<std::net::SocketAddr, u32>) -> Range {
        let backends = match set {
            Set::Of(backends) => backends,
            Set::Reject => return Range::REJECT,
            Set::Drop => return Range::DROP,
        };
        let base = self.slots;
        for backend in backends {
            let id = *ids.entry(backend.addr).or_insert_with(|| self.backend(proto, backend));
            self.put("slots", &self.slots, &Slot { backend: id, owner: service });
            self.slots += 1;
        }
        Range { base, count: self.slots - base }
    }

    fn backend(&mut self, proto: u8, backend: &Backend) -> u32 {
        self.backends += 1;
        let record = BackendRecord {
            addr: backend.addr.ip().into(),
            port: Port(backend.addr.port()).be(),
            proto,
            state: BackendRecord::STATE_LIVE,
            flags: if backend.is_local { BackendRecord::LOCAL } else { 0 },
        };
        self.put("backends", &self.backends, &record);
        self.class(backend.addr.ip(), AddressClass::BACKEND);
        self.backends
    }

    fn frontend(&mut self, service: u32, proto: u8, frontend: &Frontend) {
        let key = |addr, port| FrontendKey { addr, port: Port(port).be(), proto, reserved: 0 };
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        let flags = flag(frontend.is_local_inside, FrontendValue::INSIDE_LOCAL)
            | flag(frontend.is_local_outside, FrontendValue::OUTSIDE_LOCAL)
            | flag(frontend.is_cluster_ip, FrontendValue::CLUSTER_IP);
        let key = match frontend.at {
            At::Addr(at) => {
                self.class(at.ip(), AddressClass::FRONTEND | flag(frontend.is_cluster_ip, AddressClass::CLUSTER_IP));
                key(at.ip().into(), at.port())
            }
            At::NodePort { is_v4, port } => {
                self.port(port, PortUse::NODE_PORT);
                key(if is_v4 { Addr::UNSPECIFIED_V4 } else { Addr::UNSPECIFIED_V6 }, port)
            }
        };
        self.put("frontends", &key, &FrontendValue { service, flags });
    }
}

fn config(facts: &Facts) -> Config {
    let (service_cidrs, service_cidr_count) = cidrs(&facts.services);
    let (cluster_cidrs, cluster_cidr_count) = cidrs(&facts.cluster);
    let (pod_cidrs, pod_cidr_count) = cidrs(&facts.pods);
    Config {
        hash_key: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
        snat_first: *facts.snat_ports.start(),
        snat_last: *facts.snat_ports.end(),
        local_first: *facts.local_ports.start(),
        local_last: *facts.local_ports.end(),
        service_cidr_count,
        cluster_cidr_count,
        pod_cidr_count,
        service_cidrs,
        cluster_cidrs,
        pod_cidrs,
        ..Config::ZERO
    }
}

fn cidrs(prefixes: &[Prefix]) -> ([Cidr; MAX_CIDRS], u8) {
    let mut list = [Cidr::ZERO; MAX_CIDRS];
    for (slot, prefix) in list.iter_mut().zip(prefixes) {
        *slot = cidr(prefix);
    }
    (list, prefixes.len() as u8)
}

fn cidr(prefix: &Prefix) -> Cidr {
    // The mask of a mapped address covers the 96 bits before it as well.
    let bits = u32::from(prefix.bits) + if prefix.first.is_ipv4() { 96 } else { 0 };
    let mask = std::net::Ipv6Addr::from_bits(u128::MAX.checked_shl(128 - bits).unwrap_or(0));
    Cidr { addr: prefix.first.into(), mask: mask.into() }
}
