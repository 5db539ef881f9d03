//! Nanoseconds a packet of the programs themselves, by test-run in one process: no device, no stack.

use std::os::fd::AsFd as _;

use aya::programs::SchedClassifier;
use aya::{TestRun as _, TestRunOptions};
use proxy_common::abi::address::AddressClass;
use proxy_common::abi::flow::FlowValue;
use proxy_common::addr::{Port, Proto};
use proxy_common::lb::flow::{Hot, Seconds};
use proxy_common::lb::tuple::Tuple;
use proxy_userspace::datapath::kernel::{self, MapFds, Sizes};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::Pins;
use proxy_userspace::datapath::sys;

use super::{Row, median};
use crate::bed::Bed;
use crate::packet::{Link, Packet, flag};
use crate::topology::{CLUSTER, Family};

/// Runs a measurement.
const REPEAT: u32 = 500_000;
/// Offset of `ifindex` in `struct __sk_buff` (uapi/linux/bpf.h), and its size.
const IFINDEX: usize = 40;
const CONTEXT: usize = 192;

/// Measures each program with a packet that is not ours and with one of an established flow, above a frame that is not even
/// IP: the least that a program can do.
pub fn rows(rounds: usize) -> Vec<Row> {
    eprintln!("program: test-runs");
    let bed = Bed::new();
    let pins = Pins::new(bed.bpffs("bpf").join("shunt"));
    pins.prepare().expect("the BPF file system takes pins");
    let loaded = kernel::load(OBJECT, &pins, &Sizes { services: 1024, backends: 1024, flows: 65536 });
    let loaded = loaded.unwrap_or_else(|error| panic!("{error:#}: {error:?}"));
    let program = |name: &str| {
        let path = pins.base().join(name);
        sys::pin(loaded.programs.get(name).expect("the object has it").as_fd(), &path).expect("programs can be pinned");
        SchedClassifier::from_pin(&path).expect("it was pinned just now")
    };
    let link = || Link { dst: [0; 6], src: [2, 0, 0, 0, 0, 1], tags: vec![] };
    let frame = |from: u16, to: u16| {
        let (src, dst) = (CLUSTER.host(from).port(Family::V4, 40000), CLUSTER.host(to).port(Family::V4, 80));
        Packet::tcp(link(), src, dst, flag::ACK).to_bytes()
    };
    let mut arp = frame(300, 301);
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    establish(&loaded.maps);
    let mut rows = Vec::new();
    for name in ["ingress", "egress"] {
        let program = program(name);
        let cost = |frame: &[u8]| median((0..rounds).map(|_| nanos(&program, frame)).collect());
        let least = cost(&arp);
        // A reply at egress, a request at ingress: both are rewritten, to what they were (the packet is not reset
        // between the runs of one measurement).
        let flow = if name == "ingress" { frame(CLIENT, VIP) } else { reply(frame) };
        for (what, bytes) in [("a packet that is not ours", frame(300, 301)), ("a packet of an established flow", flow)]
        {
            rows.push(Row {
                what: format!("{name}, by test-run: {what}, above a frame that is not IP"),
                goal: "",
                found: format!("{:.0} ns above {least:.0}", cost(&bytes) - least),
                reached: None,
            });
        }
    }
    rows
}

/// Hosts of the flow that is measured.
const CLIENT: u16 = 400;
const VIP: u16 = 401;

/// The same ends, the other way.
fn reply(frame: impl Fn(u16, u16) -> Vec<u8>) -> Vec<u8> {
    let mut frame = frame(VIP, CLIENT);
    let ports = frame.len() - 20;
    frame[ports..ports + 4].rotate_left(2);
    frame
}

/// An established flow whose backend is the frontend itself: rewriting it changes nothing, whatever is rewritten.
fn establish(maps: &MapFds) {
    let (client, vip) = (CLUSTER.host(CLIENT).port(Family::V4, 40000), CLUSTER.host(VIP).port(Family::V4, 80));
    let tuple = Tuple {
        src: client.ip().into(),
        dst: vip.ip().into(),
        sport: Port(client.port()).be(),
        dport: Port(vip.port()).be(),
        proto: Proto::TCP,
    };
    let (plain, client_is_a) = tuple.plain_key();
    let value = FlowValue {
        hot: Hot { seen: Seconds(0), state: Hot::ESTABLISHED }.pack(),
        peer: tuple.dst,
        peer_port: tuple.dport,
        flags: if client_is_a { FlowValue::CLIENT_IS_A } else { 0 },
        ..FlowValue::ZERO
    };
    let map = |name: &str| maps.get(name).expect("the object has it");
    for key in [tuple.front_key(), plain] {
        sys::map_update(map("flows"), &key, &value).expect("there is room");
    }
    let class = AddressClass { flags: AddressClass::FRONTEND | AddressClass::CLUSTER_IP };
    sys::map_update(map("addresses"), &tuple.dst, &class).expect("there is room");
}

fn nanos(program: &SchedClassifier, frame: &[u8]) -> f64 {
    let mut context = [0_u8; CONTEXT];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&1_u32.to_ne_bytes());
    let options =
        TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), repeat: REPEAT, ..TestRunOptions::default() };
    let result = program.test_run(options).expect("the program runs");
    result.duration.as_nanos() as f64
}
