//! The reference's services and facts as entries of the real maps.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use aya::Pod;
use proxy_common::abi::address::{AddressClass, PortUse, PortWord, port_index};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::{Cidr, Config, MAX_CIDRS};
use proxy_common::abi::device::DeviceRecord;
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{Range, ServiceRecord, Slot};
use proxy_common::abi::source::SourceRangeKey;
use proxy_common::addr::{Addr, Port};
use proxy_userspace::datapath::kernel::MapFds;
use proxy_userspace::datapath::sys;
use shunt_tests::nat::{At, Backend, Facts, Frontend, Prefix, Service, Set};

/// What has been written, so that it can be changed.
#[derive(Default)]
pub struct Tables {
    addresses: BTreeMap<IpAddr, u32>,
    ports: BTreeMap<u32, u64>,
    /// Ids of the backends of each service, by its id.
    backends: BTreeMap<u32, BTreeMap<SocketAddr, u32>>,
    slots: u32,
    last_backend: u32,
}

impl Tables {
    /// Fills empty maps with `facts` and `services`; services get the ids 1, 2 … in order.
    pub fn fill(maps: &MapFds, facts: &Facts, services: &[Service]) -> Self {
        let mut tables = Self::default();
        for addr in &facts.node {
            tables.class(*addr, AddressClass::NODE | AddressClass::NODE_PORT);
        }
        for port in facts.snat_ports.clone() {
            tables.port(port, PortUse::SNAT);
        }
        for (id, service) in (1..).zip(services) {
            tables.write_sets(maps, id, service);
            for frontend in &service.frontends {
                tables.frontend(maps, id, service.proto, frontend);
            }
            for Prefix { first, bits } in &service.sources {
                let bits = u32::from(*bits) + if first.is_ipv4() { 96 } else { 0 };
                put(maps, "source_ranges", &SourceRangeKey::new(id, Addr::from(*first), bits), &1_u32);
            }
        }
        put(maps, "config", &0_u32, &config(facts));
        for (addr, flags) in &tables.addresses {
            put(maps, "addresses", &Addr::from(*addr), &AddressClass { flags: *flags });
        }
        for (word, bits) in &tables.ports {
            put(maps, "ports", word, &PortWord { bits: *bits });
        }
        tables
    }

    /// Changes the endpoints of the services, as the agent does: new slots, then the sets, then backends that nobody lists.
    pub fn replace(&mut self, maps: &MapFds, services: &[Service]) {
        for (id, service) in (1..).zip(services) {
            self.write_sets(maps, id, service);
            let is_listed = |addr: &SocketAddr| {
                let is_in =
                    |set: &Set| matches!(set, Set::Of(list) if list.iter().any(|backend| backend.addr == *addr));
                is_in(&service.cluster) || is_in(&service.local)
            };
            let ids = self.backends.entry(id).or_default();
            ids.extract_if(.., |addr, _| !is_listed(addr))
                .for_each(|(_, gone)| put(maps, "backends", &gone, &BackendRecord::ZERO));
        }
    }

    /// Writes the sets of a service to slots that were never used.
    fn write_sets(&mut self, maps: &MapFds, id: u32, service: &Service) {
        let cluster = self.set(maps, id, service.proto, &service.cluster);
        let local = self.set(maps, id, service.proto, &service.local);
        // Slots are never used again, so their positions tell the sets apart.
        let fingerprint = self.slots;
        let record = ServiceRecord { cluster: cluster.pack(), local: local.pack(), affinity: 0, fingerprint };
        put(maps, "services", &id, &record);
    }

    /// Writes a set's backends and slots; a backend of both sets of a service has one id.
    fn set(&mut self, maps: &MapFds, service: u32, proto: u8, set: &Set) -> Range {
        let backends = match set {
            Set::Of(backends) => backends,
            Set::Reject => return Range::REJECT,
            Set::Drop => return Range::DROP,
        };
        let base = self.slots;
        for backend in backends {
            let known = self.backends.get(&service).and_then(|ids| ids.get(&backend.addr)).copied();
            let id = known.unwrap_or_else(|| self.backend(maps, service, proto, backend));
            put(maps, "slots", &self.slots, &Slot { backend: id, owner: service });
            self.slots += 1;
        }
        Range { base, count: self.slots - base }
    }

    fn backend(&mut self, maps: &MapFds, service: u32, proto: u8, backend: &Backend) -> u32 {
        self.last_backend += 1;
        let record = BackendRecord {
            addr: backend.addr.ip().into(),
            port: Port(backend.addr.port()).be(),
            proto,
            state: BackendRecord::STATE_LIVE,
            flags: if backend.is_local { BackendRecord::LOCAL } else { 0 },
        };
        put(maps, "backends", &self.last_backend, &record);
        self.class(backend.addr.ip(), AddressClass::BACKEND);
        self.backends.entry(service).or_default().insert(backend.addr, self.last_backend);
        self.last_backend
    }

    fn class(&mut self, addr: IpAddr, flags: u32) {
        *self.addresses.entry(addr).or_default() |= flags;
    }

    fn port(&mut self, port: u16, bits: u64) {
        let (word, shift) = port_index(Port(port));
        *self.ports.entry(word).or_default() |= bits << shift;
    }

    fn frontend(&mut self, maps: &MapFds, service: u32, proto: u8, frontend: &Frontend) {
        let key = |addr, port| FrontendKey { addr, port: Port(port).be(), proto, reserved: 0 };
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        let flags = flag(frontend.is_local_inside, FrontendValue::INSIDE_LOCAL)
            | flag(frontend.is_local_outside, FrontendValue::OUTSIDE_LOCAL)
            | flag(frontend.is_cluster_ip, FrontendValue::CLUSTER_IP)
            | flag(frontend.is_restricted, FrontendValue::RESTRICTED);
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
        put(maps, "frontends", &key, &FrontendValue { service, flags });
    }
}

/// Makes a device known as a port of a bridge, or (bridge 0) as one that runs XDP; flags of [`DeviceRecord`].
pub fn put_device(maps: &MapFds, ifindex: u32, bridge: u32, mac: [u8; 6], flags: u16) {
    let [a, b, c, d, e, f] = mac;
    let mac = [[a, b], [c, d], [e, f]].map(u16::from_ne_bytes);
    put(maps, "devices", &ifindex, &DeviceRecord { bridge, mac, flags });
}

/// Makes a device unknown.
pub fn remove_device(maps: &MapFds, ifindex: u32) {
    let fd = maps.get("devices").expect("the object has it");
    assert!(sys::map_delete(fd, &ifindex).expect("it is a hash map"), "the device was known");
}

fn put<K: Pod, V: Pod>(maps: &MapFds, map: &str, key: &K, value: &V) {
    let fd = maps.get(map).expect("the object has it");
    sys::map_update(fd, key, value).unwrap_or_else(|error| panic!("cannot write {map}: {error}"));
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
