//! The kernel's tables against the fake ones: the same operations leave the same entries.

use std::net::Ipv4Addr;
use std::sync::Arc;

use proxy_common::abi::address::{AddressClass, PortWord};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::Cidr;
use proxy_common::abi::flow::FlowValue;
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::{Range, ServiceRecord, Slot};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::flow::Hot;
use proxy_common::lb::tuple::Tuple;
use proxy_userspace::datapath::kernel::{self, Loaded, Sizes};
use proxy_userspace::datapath::maps::{KernelMaps, Maps as _};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::Pins;
use proxy_userspace::datapath::{inspect, restore, sweep, sys};
use proxy_userspace::planner::{BackendId, Cidrs, FrontendAddr, Op, PortName, ServiceId, Tables};
use shunt_tests::bed::Bed;

const SIZES: Sizes = Sizes { services: 16, backends: 64, flows: 5000 };

fn load(bed: &Bed) -> Loaded {
    let pins = Pins::new(bed.bpffs("bpf").join("shunt"));
    pins.prepare().unwrap();
    kernel::load(OBJECT, &pins, &SIZES).unwrap()
}

/// Numbers that look random and are the same in every run (xorshift64, Marsaglia 2003).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn addr(&mut self) -> Addr {
        Addr::from(Ipv4Addr::new(10, 0, 0, self.below(8) as u8))
    }

    fn frontend(&mut self) -> FrontendAddr {
        FrontendAddr { addr: self.addr(), port: Port(80 + self.below(3) as u16), proto: Proto::TCP }
    }

    fn range(&mut self) -> u64 {
        match self.below(4) {
            0 => Range::REJECT.pack(),
            1 => Range::DROP.pack(),
            _ => Range { base: self.below(32) as u32, count: 1 + self.below(8) as u32 }.pack(),
        }
    }

    fn slots(&mut self) -> Vec<Slot> {
        let count = 1 + self.below(8);
        (0..count).map(|_| Slot { backend: self.below(9) as u32, owner: self.below(9) as u32 }).collect()
    }

    fn name(&mut self) -> Arc<PortName> {
        let text = format!("manifests/default/s{}:p/TCP/IPv4", self.below(5));
        Arc::new(text.parse().expect("it is a name"))
    }

    fn op(&mut self) -> Op {
        let service = ServiceId(1 + self.below(15) as u32);
        let backend = BackendId(1 + self.below(63) as u32);
        match self.below(12) {
            0 => {
                let service = vec![Cidr { addr: self.addr(), mask: self.addr() }; self.below(3) as usize];
                Op::PutCidrs(Cidrs { service, ..Cidrs::default() }.into())
            }
            1 => Op::PutName { id: service, name: self.name() },
            2 => {
                let (addr, port) = (self.addr(), Port(self.below(4) as u16).be());
                let flags = self.below(2) as u32;
                let record = BackendRecord { addr, port, proto: 6, state: BackendRecord::STATE_LIVE, flags };
                Op::PutBackend { id: backend, record }
            }
            3 => Op::WriteSlots { base: self.below(32) as u32, slots: self.slots() },
            4 => {
                let (cluster, local, affinity) = (self.range(), self.range(), self.below(3) as u32);
                let record = ServiceRecord { cluster, local, affinity, fingerprint: self.below(3) as u32 };
                Op::PublishService { id: service, record }
            }
            5 => Op::PutFrontend { at: self.frontend(), value: FrontendValue { service: service.0, flags: 1 } },
            6 => Op::DeleteFrontend { at: self.frontend() },
            7 | 8 => {
                let class = AddressClass { flags: self.below(128) as u32 };
                let keep = if self.below(2) == 0 { 0 } else { AddressClass::FLOWS };
                Op::PutAddress { addr: self.addr(), class, keep }
            }
            9 => Op::DeleteAddress { addr: self.addr() },
            10 => {
                let (word, keep) = (PortWord { bits: self.below(1 << 20) }, self.below(1 << 20));
                Op::PutPorts { index: self.below(4) as u32, word, keep }
            }
            _ if self.below(2) == 0 => Op::RetireBackend { id: backend },
            _ => Op::RetireService { id: service },
        }
    }
}

/// What a reader can see of the fake: the kernel's tables are read back in this form.
fn visible(tables: &Tables) -> Tables {
    let mut tables = tables.clone();
    tables.services.retain(|_, record| *record != ServiceRecord::ZERO);
    let ranges = tables.services.values().flat_map(|record| [record.cluster, record.local]).map(Range::unpack);
    let positions = ranges.flat_map(|range| range.base..range.base + range.count);
    let slot = |position| (position, tables.slots.get(&position).copied().unwrap_or(Slot::ZERO));
    tables.slots = positions.map(slot).collect();
    tables
}

#[test]
fn the_kernel_and_the_fake_agree_on_any_operations() {
    let bed = Bed::new();
    let loaded = load(&bed);
    let mut maps = KernelMaps::open(&loaded.maps).unwrap();
    let mut fake = Tables::default();
    let mut numbers = Numbers(0x5eed);
    for round in 0..60 {
        let ops: Vec<Op> = (0..1 + numbers.below(80)).map(|_| numbers.op()).collect();
        maps.apply(&ops.iter().collect::<Vec<_>>()).unwrap();
        ops.iter().for_each(|op| fake.apply(op));
        assert_eq!(restore::read_tables(&loaded.maps).unwrap(), visible(&fake), "round {round}: {ops:?}");
    }
    assert!(!fake.frontends.is_empty() && !fake.addresses.is_empty() && !fake.services.is_empty());
}

#[test]
fn a_full_table_says_which_operation_it_refused() {
    let bed = Bed::new();
    let loaded = load(&bed);
    let mut maps = KernelMaps::open(&loaded.maps).unwrap();
    let put = |port| Op::PutFrontend {
        at: FrontendAddr { addr: Addr::UNSPECIFIED_V4, port: Port(port), proto: Proto::TCP },
        value: FrontendValue { service: 1, flags: 0 },
    };
    let capacity = inspect::capacity(&loaded.maps, "frontends").unwrap() as usize;
    let ops: Vec<Op> = (1..=capacity as u16 + 5).map(put).collect();
    let refused = maps.apply(&ops.iter().collect::<Vec<_>>()).unwrap_err();
    assert_eq!(refused.done, capacity);
    assert_eq!(restore::read_tables(&loaded.maps).unwrap().frontends.len(), capacity);
    // What is there can still be replaced and removed.
    let delete =
        Op::DeleteFrontend { at: FrontendAddr { addr: Addr::UNSPECIFIED_V4, port: Port(1), proto: Proto::TCP } };
    maps.apply(&[&ops[0], &delete, &ops[capacity]]).unwrap();
}

#[test]
fn positions_past_the_end_are_refused() {
    let bed = Bed::new();
    let loaded = load(&bed);
    let mut maps = KernelMaps::open(&loaded.maps).unwrap();
    let record = BackendRecord::ZERO;
    let error = maps.apply(&[&Op::PutBackend { id: BackendId(64), record }]).unwrap_err();
    assert_eq!(error.source.to_string(), "backends has 64 entries, no number 64");
    let slots = vec![Slot::ZERO; 2];
    let base = restore::read_limits(&loaded.maps).unwrap().slots - 1;
    let error = maps.apply(&[&Op::WriteSlots { base, slots }]).unwrap_err();
    assert!(error.source.to_string().starts_with("slots has"), "{error}");
}

/// More flows than one slice holds; every second one is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_of_the_kernels_tables_removes_what_is_over() {
    const FLOWS: u16 = 4900;
    let bed = Bed::new();
    let loaded = load(&bed);
    let now = sys::monotonic().as_nanos() as u64 >> 30;
    let flows = loaded.maps.get("flows").unwrap();
    for number in 0..FLOWS {
        let (client, backend) = (Ipv4Addr::from(0x0a00_0000 + u32::from(number)), Ipv4Addr::new(10, 9, 9, 9));
        let (sport, dport) = (Port(5000).be(), Port(53).be());
        let tuple = Tuple { src: client.into(), dst: backend.into(), sport, dport, proto: Proto::UDP };
        let seen = if number % 2 == 0 { now } else { now - 200 };
        let hot = seen << 32 | u64::from(Hot::ESTABLISHED);
        let (plain, client_is_a) = tuple.plain_key();
        let flags = if client_is_a { FlowValue::CLIENT_IS_A } else { 0 };
        let vip = Addr::from(Ipv4Addr::new(10, 96, 0, 1));
        let value = FlowValue { hot, peer: vip, peer_port: dport, flags, ..FlowValue::ZERO };
        sys::map_update(flows, &plain, &value).unwrap();
        let front = FlowValue { peer: tuple.dst, peer_port: dport, ..value };
        sys::map_update(flows, &Tuple { dst: vip, ..tuple }.front_key(), &front).unwrap();
    }
    let (unused, _receiver) = tokio::sync::mpsc::channel(1);
    let mut sweep = sweep::Task::open(&loaded.maps, unused).unwrap();
    let outcome = sweep.round(true).await.unwrap();
    assert_eq!((outcome.expired, outcome.orphans), (usize::from(FLOWS / 2), 0));
    assert_eq!(inspect::count(&loaded.maps, "flows").unwrap().0, usize::from(FLOWS));
    let views = inspect::read_flows(&loaded.maps).unwrap();
    assert!(views.iter().all(|view| view.idle_seconds < 60), "only the young ones are left");
}
