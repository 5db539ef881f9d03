//! Nanoseconds a packet of the programs themselves, by test-run in one process: no device, no stack.
//!
//! A *hot* packet is run many times by one system call, which gives the mean; the kernel does not reset the packet between
//! the runs, so the flow's backend is the frontend itself and rewriting changes nothing. Everything is stated above the
//! least that a program can do: a bare pass program if there is a clang to build it, else our own program with a frame that is
//! not IP.
//!
//! A *random* packet belongs to another flow each time, so each takes a system call of its own. The kernel reads its clock right
//! before and after the run; what the system call itself leaves in the caches, and the clock's own nanoseconds, are the same for a
//! packet that is always the same one, and the two take turns: the difference of the medians is what the cold entries cost. It is
//! set beside what a missed cache line costs here: a chain of dependent reads through memory far larger than the caches.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use aya::programs::{SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, TestRun, TestRunOptions, TestRunResult};
use aya_obj::programs::XdpAttachType;
use proxy_common::abi::address::AddressClass;
use proxy_common::abi::flow::FlowValue;
use proxy_common::addr::{Port, Proto};
use proxy_common::lb::flow::{Hot, Seconds};
use proxy_common::lb::tuple::Tuple;
use proxy_userspace::datapath::kernel::{self, Loaded, MapFds, Sizes};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::Pins;
use proxy_userspace::datapath::sys;

use super::{Row, median};
use crate::bed::Bed;
use crate::packet::{Link, Packet, flag};

/// Runs of a hot packet in one measurement.
const REPEAT: u32 = 300_000;
/// Runs of random packets in one round, and of as many hot ones.
const RANDOM_RUNS: usize = 4000;
/// Established flows in the table.
const FLOWS: usize = 200_000;
/// Services in the table when there are many.
const SERVICES: usize = 10_000;
/// Offset of `ifindex` in `struct __sk_buff` (uapi/linux/bpf.h), and its size.
const IFINDEX: usize = 40;
const CONTEXT: usize = 192;

/// Nanoseconds of a run of a frame, the mean of so many.
type Run<'a> = &'a dyn Fn(&[u8], u32) -> f64;

/// Measures each program with a packet that is not ours and with ones of established flows.
pub fn rows(rounds: usize) -> Vec<Row> {
    eprintln!("program: test-runs");
    let bed = Bed::new();
    let pins = Pins::new(bed.bpffs("bpf").join("shunt"));
    pins.prepare().expect("the BPF file system takes pins");
    let sizes = Sizes { services: 1 << 15, backends: 1 << 16, flows: 2 * FLOWS as u32 };
    let loaded = kernel::load(OBJECT, &pins, &sizes).unwrap_or_else(|error| panic!("{error:#}: {error:?}"));
    let (ingress, egress) = (classifier(&loaded, &pins, "ingress"), classifier(&loaded, &pins, "egress"));
    let uplink =
        Xdp::from_pin(pin(&loaded, &pins, "uplink"), XdpAttachType::Interface).expect("it was pinned just now");
    let in_c = in_c(bed.dir(), &pins);
    let (ingress, egress) = (run(&ingress), run(&egress));
    let uplink =
        |frame: &[u8], repeat| nanos(&uplink, TestRunOptions { data_in: Some(frame), repeat, ..TestRunOptions::new() });
    put_flow(&loaded.maps, Flow::HOT);
    let mut rows = Vec::new();
    let (request, reply) = (Flow::HOT.request(), Flow::HOT.reply());
    let mut hot = Vec::new();
    for (name, program, ours) in
        [("ingress", &ingress as Run<'_>, &request), ("egress", &egress, &reply), ("XDP", &uplink, &request)]
    {
        rows.push(above_least(rounds, name, "a packet that is not ours", program, &foreign()));
        rows.push(above_least(rounds, name, "a packet of one hot flow", program, ours));
        hot.push(compare(rounds, || program(ours, REPEAT), || program(&not_ip(), REPEAT)));
    }
    rows.extend(beside_c(rounds, &ingress, in_c.as_ref()));
    eprintln!("program: {FLOWS} flows");
    let many = [("of one service", 1), ("of 10,000 services", SERVICES)];
    let line = missed_line();
    for (whose, services) in many {
        (0..FLOWS).for_each(|number| put_flow(&loaded.maps, Flow::random(number, services)));
        for (name, program) in [("ingress", &ingress as Run<'_>), ("XDP", &uplink)] {
            rows.push(random(rounds, &format!("{name}, one of 200,000 flows {whose}"), program, services, line));
        }
    }
    for ((name, program, ours), before) in
        [("ingress", &ingress as Run<'_>, &request), ("egress", &egress, &reply), ("XDP", &uplink, &request)]
            .into_iter()
            .zip(hot)
    {
        let after = compare(rounds, || program(ours, REPEAT), || program(&not_ip(), REPEAT));
        let what = format!("{name}: one hot flow among 10,000 services and 200,000 flows, beside it alone");
        rows.push(Row::ratio(what, "at most 1.05 times", 1.05, after / before));
    }
    rows
}

/// The program of a name, pinned.
fn pin(loaded: &Loaded, pins: &Pins, name: &str) -> PathBuf {
    let path = pins.base().join(name);
    sys::pin(loaded.programs.get(name).expect("the object has it").as_fd(), &path).expect("programs can be pinned");
    path
}

fn classifier(loaded: &Loaded, pins: &Pins, name: &str) -> SchedClassifier {
    SchedClassifier::from_pin(pin(loaded, pins, name)).expect("it was pinned just now")
}

fn run(program: &SchedClassifier) -> impl Fn(&[u8], u32) -> f64 {
    let mut context = [0_u8; CONTEXT];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&1_u32.to_ne_bytes());
    move |frame, repeat| {
        nanos(program, TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), repeat, ..TestRunOptions::new() })
    }
}

fn nanos<P>(program: &P, options: TestRunOptions<'_>) -> f64
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    program.test_run(options).expect("the program runs").duration.as_nanos() as f64
}

/// The median over rounds of the ratios of one thing to another, in turns.
fn compare(rounds: usize, one: impl Fn() -> f64, other: impl Fn() -> f64) -> f64 {
    median((0..rounds).map(|_| one() / other()).collect())
}

fn above_least(rounds: usize, name: &str, what: &str, program: Run<'_>, frame: &[u8]) -> Row {
    let least = not_ip();
    let above = (0..rounds).map(|_| program(frame, REPEAT) - program(&least, REPEAT)).collect();
    Row::note(format!("{name}: {what}, above a frame that is not IP"), format!("{:.0} ns", median(above)))
}

/// The programs in C; what hinders them, as an error.
fn in_c(dir: &Path, pins: &Pins) -> Result<Ebpf, String> {
    let object = compile(dir)?;
    let mut loader = EbpfLoader::new();
    let tables = pins.maps(pins.current().expect("layouts can be listed").expect("the agent's are pinned"));
    let mut ebpf = loader.default_map_pin_directory(tables).load_file(object).map_err(refused)?;
    for name in ["ingress_in_c", "pass"] {
        let program: &mut SchedClassifier =
            ebpf.program_mut(name).expect("the source has it").try_into().expect("it is a classifier");
        program.load().map_err(refused)?;
    }
    Ok(ebpf)
}

/// What an error says first; all of it (a verifier's log may be in it) goes to standard error.
fn refused(error: impl std::error::Error) -> String {
    eprintln!("the programs in C: {error:?}");
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn compile(dir: &Path) -> Result<PathBuf, String> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/bench-c/ingress.c");
    let object = dir.join("ingress.o");
    // Where Debian and Ubuntu keep the kernel's headers of one architecture.
    let headers = format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    for clang in ["clang-22", "clang"] {
        let mut command = Command::new(clang);
        command.args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", &headers, "-c", source, "-o"]).arg(&object);
        match command.output() {
            Ok(output) if output.status.success() => return Ok(object),
            Ok(output) => {
                eprintln!("{}", String::from_utf8_lossy(&output.stderr));
                return Err(format!("{clang} does not compile it"));
            }
            Err(_) => {}
        }
    }
    Err("no clang is installed (apt-get install clang-22)".to_owned())
}

fn beside_c(rounds: usize, ours: Run<'_>, in_c: Result<&Ebpf, &String>) -> Vec<Row> {
    const GOAL: &str = "at most 1.02 times";
    let whats = [("a packet of one hot flow", Flow::HOT.request()), ("a packet that is not ours", foreign())];
    let what = |packet: &str| format!("ingress: {packet}, beside the same logic in C");
    let ebpf = match in_c {
        Ok(ebpf) => ebpf,
        Err(why) => return whats.iter().map(|(packet, _)| Row::missing(what(packet), GOAL, why)).collect(),
    };
    let program = |name: &str| -> &SchedClassifier {
        ebpf.program(name).expect("the source has it").try_into().expect("it is a classifier")
    };
    let (in_c, pass) = (run(program("ingress_in_c")), run(program("pass")));
    let above = |run: Run<'_>, frame: &[u8]| run(frame, REPEAT) - pass(frame, REPEAT);
    let mut rows = vec![Row::note(
        "ingress: a frame that is not IP, beside a bare pass program".to_owned(),
        format!("{:.0} ns more", median((0..rounds).map(|_| above(ours, &not_ip())).collect())),
    )];
    for (packet, frame) in &whats {
        let ratio = compare(rounds, || above(ours, frame), || above(&in_c, frame).max(0.1));
        rows.push(Row::ratio(what(packet), GOAL, 1.02, ratio));
    }
    rows
}

/// What a packet of a random flow costs more than one of a hot flow.
fn random(rounds: usize, what: &str, program: Run<'_>, services: usize, line: f64) -> Row {
    let mut next = 1_usize;
    let mut one_round = || {
        let (mut cold, mut hot) = (Vec::new(), Vec::new());
        for _ in 0..RANDOM_RUNS {
            // Full period: the multiplier minus one is a multiple of all primes of 200,000, and of four.
            next = (next * 100_421 + 12_347) % FLOWS;
            hot.push(program(&Flow::HOT.request(), 1));
            cold.push(program(&Flow::random(next, services).request(), 1));
        }
        median(cold) - median(hot)
    };
    let more = median((0..rounds).map(|_| one_round()).collect());
    let lines = more / line;
    Row {
        what: format!("{what}, above one hot flow"),
        goal: "at most two missed cache lines",
        found: format!("{more:.0} ns, {lines:.1} lines of {line:.0} ns"),
        reached: Some(lines <= 2.0),
    }
}

/// Nanoseconds of a read that no cache has: the median of stretches short enough that most are not interrupted.
fn missed_line() -> f64 {
    /// Lines of 64 bytes: 256 MiB.
    const LINES: usize = 1 << 22;
    const STRETCHES: usize = 512;
    const READS: usize = 1024;
    let mut chain = vec![[0_u32; 16]; LINES];
    // Full period: an odd increment, a multiplier of one more than a multiple of four.
    for (line, words) in chain.iter_mut().enumerate() {
        words[0] = ((line * 1_103_515_245 + 12_345) % LINES) as u32;
    }
    let mut line = 1_u32;
    let stretch = |_| {
        let start = Instant::now();
        line = (0..READS).fold(line, |line, _| chain[line as usize][0]);
        start.elapsed().as_nanos() as f64 / READS as f64
    };
    let nanos = median((0..STRETCHES).map(stretch).collect());
    std::hint::black_box(line);
    nanos
}

/// An established flow whose backend is the frontend itself: rewriting it changes nothing, whatever is rewritten.
#[derive(Clone, Copy)]
struct Flow {
    client: SocketAddr,
    vip: SocketAddr,
    /// Service id.
    service: u32,
}

impl Flow {
    const HOT: Self = Self::of([10, 200, 0, 1], [10, 201, 0, 1], 1);

    const fn of(client: [u8; 4], vip: [u8; 4], service: u32) -> Self {
        Self { client: at(client, 40000), vip: at(vip, 80), service }
    }

    /// One of many, over so many services.
    fn random(number: usize, services: usize) -> Self {
        let service = number % services;
        let mut flow = Self::HOT;
        flow.client.set_ip(Ipv4Addr::from_bits(u32::from_be_bytes([10, 210, 0, 0]) + number as u32).into());
        flow.vip.set_ip(Ipv4Addr::from_bits(u32::from_be_bytes([10, 220, 0, 0]) + service as u32).into());
        flow.service = 2 + service as u32;
        flow
    }

    fn request(&self) -> Vec<u8> {
        Packet::tcp(link(), self.client, self.vip, flag::ACK).to_bytes()
    }

    fn reply(&self) -> Vec<u8> {
        Packet::tcp(link(), self.vip, self.client, flag::ACK).to_bytes()
    }
}

const fn at([a, b, c, d]: [u8; 4], port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), port)
}

fn link() -> Link {
    Link { dst: [0; 6], src: [2, 0, 0, 0, 0, 1], tags: vec![] }
}

/// Between two pods that no table has.
fn foreign() -> Vec<u8> {
    Flow::of([10, 202, 0, 1], [10, 202, 0, 2], 0).request()
}

fn not_ip() -> Vec<u8> {
    let mut frame = foreign();
    // EtherType of ARP.
    frame[12..14].copy_from_slice(&[0x08, 0x06]);
    frame
}

fn put_flow(maps: &MapFds, flow: Flow) {
    let tuple = Tuple {
        src: flow.client.ip().into(),
        dst: flow.vip.ip().into(),
        sport: Port(flow.client.port()).be(),
        dport: Port(flow.vip.port()).be(),
        proto: Proto::TCP,
    };
    let (plain, client_is_a) = tuple.plain_key();
    let value = FlowValue {
        hot: Hot { seen: Seconds(0), state: Hot::ESTABLISHED }.pack(),
        peer: tuple.dst,
        peer_port: tuple.dport,
        service: flow.service,
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
