//! A node whose programs run one packet at a time, each step compared with the reference NAT.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::address::{KEPT_GENERATION, kept_index};
use proxy_common::abi::device::DeviceRecord;
use proxy_common::addr::{self, Addr, Port};
use proxy_common::lb::tuple::Tuple;
use proxy_common::verdict::DropReason;
use proxy_userspace::datapath::{sweep, sys};
use shunt_tests::nat::{Bridge, Expected, Facts, Hook, Nat, Set, Spot, check_answer};
use shunt_tests::netns::Netns;
use shunt_tests::packet::{Error, Link, Packet, assert_frame, error, flag, hex};
use shunt_tests::topology::{Cluster, Family, Plan};

use crate::datapath::{Datapath, Outcome};
use crate::tables::{self, Tables};
use crate::world;

/// A device of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The uplink.
    Eth0,
    /// The link of pod 1 or 2.
    Pod(u16),
}

/// Index and MAC address of a device.
type Identity = (u32, [u8; 6]);

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Proto {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];
}

/// Calls `test` for every family and protocol; a failure tells which.
pub fn each(mut test: impl FnMut(Family, Proto)) {
    for family in Family::ALL {
        for proto in Proto::ALL {
            println!("--- {family:?} {proto:?}");
            test(family, proto);
        }
    }
}

/// What the XDP program of the uplink did with packets, before their device's ingress hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Left to the hook as they came.
    pub passed: u32,
    /// Translated; nothing was left to the hook.
    pub translated: u32,
    /// Dropped or answered.
    pub refused: u32,
}

/// A node with the services of [`world`], and the reference that follows it.
pub struct Lab {
    datapath: Datapath,
    /// Its uplink runs XDP.
    has_xdp: bool,
    ahead: Ahead,
    tables: Tables,
    /// The reference.
    pub nat: Nat,
    /// By number: 0 is `eth0`, the others are the pods'.
    devices: BTreeMap<u16, Identity>,
    /// Address of the bridge that the pods' devices are ports of.
    bridge: Option<[u8; 6]>,
    /// Packets that were dropped or answered so far, by reason.
    pub drops: BTreeMap<&'static str, u64>,
    cluster: Cluster,
}

impl Lab {
    /// A fresh node whose pods hang on routed links.
    pub fn new() -> Self {
        Self::build(Plan::default(), world::facts())
    }

    /// The same, and its uplink is hardware that runs the XDP program.
    pub fn with_xdp() -> Self {
        Self::with_xdp_flags(DeviceRecord::SENDS)
    }

    /// The same, with flags of the uplink's [`DeviceRecord`].
    pub fn with_xdp_flags(flags: u16) -> Self {
        let mut lab = Self::new();
        let (index, mac) = lab.devices[&0];
        tables::put_device(&lab.datapath.maps, index, 0, mac, flags);
        lab.has_xdp = true;
        lab
    }

    /// A fresh node whose pods are on a bridge; `resolved` of them are neighbours that the node knows.
    pub fn bridged(resolved: &[u16]) -> Self {
        let mut facts = world::facts();
        facts.bridge = Some(Bridge { mac: [0; 6], neighbours: vec![] });
        let mut lab = Self::build(Plan::bridge(), facts.clone());
        let node = lab.cluster.nodes[0].place.ns().clone();
        let (index, mac) = identity(&node, "cni0");
        for number in 1..=2 {
            tables::put_device(&lab.datapath.maps, lab.devices[&number].0, index, mac, 0);
        }
        lab.bridge = Some(mac);
        let neighbours = resolved.iter().flat_map(|number| lab.resolve(*number)).collect();
        facts.bridge = Some(Bridge { mac, neighbours });
        lab.nat = Nat::new(facts, world::services());
        lab
    }

    /// Makes a pod a known neighbour on the bridge.
    fn resolve(&self, number: u16) -> Vec<(IpAddr, [u8; 6])> {
        let (node, pod) = (&self.cluster.nodes[0], &self.cluster.nodes[0].pods[usize::from(number) - 1]);
        let (_, mac) = identity(pod.place.ns(), "eth0");
        let text: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let entry = |family| {
            format!("neigh replace {} lladdr {} dev cni0 nud permanent", pod.addrs.get(family), text.join(":"))
        };
        node.place.ns().ip(Family::ALL.map(entry));
        Family::ALL.map(|family| (pod.addrs.get(family), mac)).to_vec()
    }

    fn build(plan: Plan, facts: Facts) -> Self {
        let cluster = Cluster::build(plan);
        let node = &cluster.nodes[0];
        assert_eq!((node.addrs, node.pods[1].addrs), (world::node(), world::pod(2)), "the world is the topology's");
        let devices = [(0, "eth0"), (1, "veth-1-1"), (2, "veth-1-2")];
        let devices = devices.map(|(number, name)| (number, identity(node.place.ns(), name))).into_iter().collect();
        let datapath = Datapath::load(&cluster.bed, node.place.ns());
        let services = world::services();
        let tables = Tables::fill(&datapath.maps, &facts, &services);
        let nat = Nat::new(facts, services);
        let (has_xdp, ahead) = (false, Ahead::default());
        Self { datapath, has_xdp, ahead, tables, nat, devices, bridge: None, drops: BTreeMap::new(), cluster }
    }

    /// From now on, the backends at these addresses are gone from all services.
    pub fn retire(&mut self, gone: &[SocketAddr]) {
        let mut services = world::services();
        for service in &mut services {
            for (set, otherwise) in [(&mut service.cluster, Set::Reject), (&mut service.local, Set::Drop)] {
                if let Set::Of(backends) = set {
                    backends.retain(|backend| !gone.contains(&backend.addr));
                    if backends.is_empty() {
                        *set = otherwise;
                    }
                }
            }
        }
        self.tables.replace(&self.datapath.maps, &services);
        self.nat.set_services(services);
    }

    /// A round of the sweep that looks at ports.
    pub fn sweep(&self) -> sweep::Outcome {
        let (unused, _receiver) = tokio::sync::mpsc::channel(16);
        let mut sweep = sweep::Task::open(&self.datapath.maps, unused).expect("the tables can be opened");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(sweep.round(true)).expect("the tables can be swept")
    }

    /// What the programs have marked a port for, whichever generation.
    pub fn marks(&self, port: u16) -> u64 {
        let (word, shift) = kept_index(Port(port));
        let mut bits = [0_u64];
        let map = self.datapath.maps.get("kept_ports").expect("the object has it");
        sys::map_lookup(map, &word, &mut bits).expect("every port has its word");
        (bits[0] | bits[0] >> KEPT_GENERATION) >> shift & 3
    }

    /// Takes the entries of a rewritten source out of the tables.
    pub fn forget_source(&self, proto: Proto, backend: SocketAddr, source: SocketAddr) {
        let end = |at: SocketAddr| (Addr::from(at.ip()), Port(at.port()).be());
        let ((src, sport), (dst, dport)) = (end(backend), end(source));
        let proto = match proto {
            Proto::Tcp => addr::Proto::TCP,
            Proto::Udp => addr::Proto::UDP,
        };
        let key = Tuple { src, sport, dst, dport, proto }.snat_key();
        for table in ["flows", "flows_pending"] {
            let map = self.datapath.maps.get(table).expect("the object has it");
            sys::map_delete(map, &key).expect("an entry can be removed");
        }
    }

    /// The MAC address of a pod's own device.
    pub fn mac_of_pod(&self, number: u16) -> [u8; 6] {
        identity(self.cluster.nodes[0].pods[usize::from(number) - 1].place.ns(), "eth0").1
    }

    /// The ingress hook of a device.
    pub fn ingress(&self, device: Device) -> Hook {
        if self.bridge.is_some() && device != Device::Eth0 { Hook::IngressPort } else { Hook::Ingress }
    }

    /// The device by which the node reaches `addr`.
    pub fn device_of(&self, addr: IpAddr) -> Device {
        let is_pod = |number: &u16| Family::ALL.iter().any(|family| world::pod(*number).get(*family) == addr);
        [1, 2].into_iter().find(is_pod).map_or(Device::Eth0, Device::Pod)
    }

    fn identity(&self, device: Device) -> Identity {
        match device {
            Device::Eth0 => self.devices[&0],
            Device::Pod(number) => self.devices[&number],
        }
    }

    /// The Ethernet header of a frame that comes in by `device`, or leaves by it.
    pub fn link(&self, device: Device) -> Link {
        let own = self.identity(device).1;
        let dst = if device == Device::Eth0 { own } else { self.bridge.unwrap_or(own) };
        Link { dst, src: [2, 0, 0, 0, 0, 1], tags: vec![] }
    }

    /// A packet of the protocol: a SYN, or a datagram.
    pub fn opening(&self, proto: Proto, src: SocketAddr, dst: SocketAddr) -> Packet {
        let link = self.link(self.device_of(src.ip()));
        match proto {
            Proto::Tcp => Packet::tcp(link, src, dst, flag::SYN),
            Proto::Udp => Packet::udp(link, src, dst),
        }
    }

    /// A packet of an open connection: an ACK with data, or a datagram.
    pub fn following(&self, proto: Proto, src: SocketAddr, dst: SocketAddr) -> Packet {
        let link = self.link(self.device_of(src.ip()));
        match proto {
            Proto::Tcp => Packet::tcp(link, src, dst, flag::ACK | flag::PSH),
            Proto::Udp => Packet::udp(link, src, dst),
        }
    }

    /// What comes out of one hook for `packet`, as the reference says too; `None` if nothing, or an answer.
    #[track_caller]
    pub fn step(&mut self, hook: Hook, device: Device, packet: &Packet) -> Option<Packet> {
        let before = self.datapath.drops();
        let ifindex = self.identity(device).0;
        let frame = packet.to_bytes();
        let outcome = self.run(hook, device, &frame);
        let got = match &outcome {
            Outcome::Next(bytes) => &bytes[..],
            Outcome::Dropped | Outcome::Answered(_) => &[],
        };
        let expected = self.nat.expect(Spot { hook, device: ifindex }, packet, got);
        let what = format!("{hook:?} on {device:?} of\n{packet:?}\n{}", hex(&frame));
        let reasons = self.moved_counters(&before);
        let out = match (&expected, &outcome) {
            (Expected::Same, Outcome::Next(got)) => {
                assert_eq!(got, &frame, "{what}was changed");
                Some(packet.clone())
            }
            (Expected::Packet(wanted), Outcome::Next(got)) => {
                assert_frame(&what, got, wanted);
                Some(wanted.as_ref().clone())
            }
            (Expected::Drop, Outcome::Dropped) => None,
            (Expected::Reject, Outcome::Answered(answer)) => {
                check_answer(packet, answer)
                    .unwrap_or_else(|wrong| panic!("{what}was answered wrongly: {wrong}\n{}", hex(answer)));
                None
            }
            _ => panic!("{what}expected {expected:?}\ngot {outcome:?}, counted {reasons:?}"),
        };
        let is_counted = reasons.len() == 1 && reasons[0].1 == 1;
        assert!(if out.is_some() { reasons.is_empty() } else { is_counted }, "{what}counted {reasons:?}");
        for (reason, count) in reasons {
            *self.drops.entry(reason.name()).or_default() += count;
        }
        out
    }

    /// What comes out of a hook for `frame`; where XDP has done its work, the hook must find nothing left to do.
    #[track_caller]
    fn run(&mut self, hook: Hook, device: Device, frame: &[u8]) -> Outcome {
        if !(self.has_xdp && hook == Hook::Ingress && device == Device::Eth0) {
            return self.run_bytes(hook, device, frame);
        }
        let outcome = self.run_xdp(frame);
        match &outcome {
            Outcome::Next(out) if out == frame => {
                self.ahead.passed += 1;
                return self.run_bytes(hook, device, frame);
            }
            Outcome::Next(out) => {
                self.ahead.translated += 1;
                assert_eq!(self.run_bytes(hook, device, out), outcome, "the hook translates again");
            }
            Outcome::Dropped | Outcome::Answered(_) => self.ahead.refused += 1,
        }
        outcome
    }

    /// What XDP on the uplink does with any bytes.
    pub fn run_xdp(&self, frame: &[u8]) -> Outcome {
        self.datapath.run_uplink(self.identity(Device::Eth0).0, frame)
    }

    /// What XDP did with the packets of `work`.
    #[track_caller]
    pub fn ahead<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> (T, Ahead) {
        self.ahead = Ahead::default();
        let result = work(self);
        (result, self.ahead)
    }

    /// The uplink is no longer known to run XDP.
    pub fn forget_uplink(&self) {
        tables::remove_device(&self.datapath.maps, self.identity(Device::Eth0).0);
    }

    /// What comes out of the ingress hook of the source's device, as the reference says too.
    #[track_caller]
    pub fn through_ingress(&mut self, packet: &Packet) -> Option<Packet> {
        let device = self.device_of(packet.ip.src);
        self.step(self.ingress(device), device, packet)
    }

    /// What one hook does with `packet`, without asking the reference.
    pub fn peek(&self, hook: Hook, device: Device, packet: &Packet) -> Outcome {
        self.run_bytes(hook, device, &packet.to_bytes())
    }

    /// Why one hook refuses `packet`, without asking the reference.
    #[track_caller]
    pub fn refused_because(&self, hook: Hook, device: Device, packet: &Packet) -> &'static str {
        let before = self.datapath.drops();
        let outcome = self.peek(hook, device, packet);
        match (&outcome, &self.moved_counters(&before)[..]) {
            (Outcome::Dropped | Outcome::Answered(_), [(reason, 1)]) => reason.name(),
            (_, counted) => panic!("{packet:?} is not refused: {outcome:?}, counted {counted:?}"),
        }
    }

    /// What one hook does with any bytes.
    pub fn run_bytes(&self, hook: Hook, device: Device, frame: &[u8]) -> Outcome {
        self.datapath.run(hook, self.identity(device).0, frame)
    }

    /// How many of many packets `is_counted` says yes to after one hook, without asking the reference.
    pub fn run_all(
        &self,
        hook: Hook,
        device: Device,
        frames: impl Iterator<Item = Vec<u8>> + Send,
        is_counted: impl Fn(&Outcome) -> bool + Sync,
    ) -> usize {
        self.datapath.run_all(hook, self.identity(device).0, frames, is_counted)
    }

    fn moved_counters(&self, before: &[(DropReason, u64)]) -> Vec<(DropReason, u64)> {
        let after = self.datapath.drops();
        before.iter().zip(after).filter(|(old, new)| old.1 != new.1).map(|(old, new)| (new.0, new.1 - old.1)).collect()
    }

    /// What a packet becomes on its way through the node: in by its source's device, out by that of its new destination.
    #[track_caller]
    pub fn through(&mut self, packet: &Packet) -> Option<Packet> {
        let source = self.device_of(packet.ip.src);
        self.through_from(source, packet)
    }

    /// As [`Self::through`], in by `source`.
    #[track_caller]
    pub fn through_from(&mut self, source: Device, packet: &Packet) -> Option<Packet> {
        let mut inside = self.step(
            self.ingress(source),
            source,
            &Packet { link: self.link_like(source, packet), ..packet.clone() },
        )?;
        let target = self.device_of(inside.ip.dst);
        inside.link = self.link_like(target, &inside);
        self.step(Hook::Egress, target, &inside)
    }

    fn link_like(&self, device: Device, packet: &Packet) -> Link {
        Link { tags: packet.link.tags.clone(), ..self.link(device) }
    }

    /// Opens a connection and returns what its first packet became: what the backend sees.
    #[track_caller]
    pub fn open(&mut self, proto: Proto, client: SocketAddr, frontend: SocketAddr) -> Packet {
        let packet = self.opening(proto, client, frontend);
        self.through(&packet).expect("a connection opens")
    }

    /// A whole exchange through a frontend: opened, answered, confirmed, data both ways. Returns what the backend saw first.
    #[track_caller]
    pub fn converse(&mut self, proto: Proto, client: SocketAddr, frontend: SocketAddr) -> Packet {
        let first = self.open(proto, client, frontend);
        let answer = self.answer(proto, &first);
        self.expect_answer(&answer, client, frontend);
        for _ in 0..2 {
            let more = self.confirming(proto, client, frontend);
            let seen = self.through(&more).expect("the connection goes on");
            assert_eq!((seen.src(), seen.dst()), (first.src(), first.dst()), "one connection, one path");
            let answer = self.following(proto, first.dst(), first.src());
            self.expect_answer(&answer, client, frontend);
        }
        first
    }

    /// What a backend answers to the first packet of a connection.
    pub fn answer(&self, proto: Proto, seen: &Packet) -> Packet {
        let link = self.link(self.device_of(seen.ip.dst));
        match proto {
            Proto::Tcp => {
                let mut packet = Packet::tcp(link, seen.dst(), seen.src(), flag::SYN | flag::ACK);
                tcp(&mut packet).seq = BACKEND_SEQ;
                tcp(&mut packet).ack = tcp(&mut seen.clone()).seq.wrapping_add(1);
                packet
            }
            Proto::Udp => Packet::udp(link, seen.dst(), seen.src()),
        }
    }

    /// What a client sends after the answer: the acknowledgement of exactly that.
    pub fn confirming(&self, proto: Proto, client: SocketAddr, frontend: SocketAddr) -> Packet {
        let mut packet = self.following(proto, client, frontend);
        if proto == Proto::Tcp {
            tcp(&mut packet).ack = BACKEND_SEQ + 1;
        }
        packet
    }

    /// A backend's packet must reach the client as the frontend's.
    #[track_caller]
    fn expect_answer(&mut self, answer: &Packet, client: SocketAddr, frontend: SocketAddr) {
        let seen = self.through(answer).expect("an answer comes through");
        assert_eq!((seen.src(), seen.dst()), (frontend, client));
    }
}

/// The sequence number of every backend's SYN-ACK here.
const BACKEND_SEQ: u32 = 0x5000_0000;

/// The segment of a TCP packet.
pub fn tcp(packet: &mut Packet) -> &mut shunt_tests::packet::Tcp {
    match &mut packet.body {
        shunt_tests::packet::Body::Tcp(tcp) => tcp,
        other => panic!("{other:?} is not TCP"),
    }
}

/// The datagram of a UDP packet.
pub fn udp(packet: &mut Packet) -> &mut shunt_tests::packet::Udp {
    match &mut packet.body {
        shunt_tests::packet::Body::Udp(udp) => udp,
        other => panic!("{other:?} is not UDP"),
    }
}

/// "Packet too big" about `quoted`, as much of it as is usual.
pub fn too_big(quoted: &Packet) -> Error {
    let (kind, code) = if quoted.is_v4() { (error::V4_UNREACHABLE, error::V4_TOO_BIG) } else { (error::V6_TOO_BIG, 0) };
    Error { kind, code, rest: 1280, quoted: Box::new(quoted.clone()), quoted_bytes: 576 }
}

fn identity(ns: &Netns, device: &str) -> Identity {
    let line = ns.output(["ip", "-o", "link", "show", device]);
    let index = line.split(':').next().and_then(|text| text.parse().ok()).expect("the line begins with the index");
    let mac = line.split_once("link/ether ").expect("it is Ethernet").1;
    let mut bytes = mac[..17].split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a MAC address"));
    (index, std::array::from_fn(|_| bytes.next().expect("six bytes")))
}
