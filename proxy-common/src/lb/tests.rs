//! Properties of the packet path on whole packets: what a client sends, what its backend sees, what comes back.

use super::packet::{Rewrite, Verdict, egress, egress_known, ingress, ingress_known, is_final, refusal};
use super::rewrite::{End, Slice, apply};
use super::tuple::Tuple;
use super::world::{World, addr, tuple};
use crate::abi::address::AddressClass;
use crate::abi::flow::FlowKey;
use crate::abi::frontend::FrontendValue;
use crate::abi::service::Range;
use crate::addr::{Addr, Port, Proto};
use crate::lb::flow::{Hot, Seconds, is_expired};
use crate::tables::{Neighbour, Tracked};
use crate::verdict::{DropReason, Refusal};
use crate::wire::checksum::fold;
use crate::wire::header::tcp;
use crate::wire::{Parsed, parse_ip};
use core::net::IpAddr;
use proptest::prelude::*;
use std::vec::Vec;

const CLUSTER_IP: u32 = FrontendValue::CLUSTER_IP;

fn octets(addr: Addr) -> Vec<u8> {
    match IpAddr::from(addr) {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]))).sum()
}

/// An IP packet (no link layer) with right checksums.
fn packet(tuple: &Tuple, flags: u8, sequence: u32, acknowledgment: u32, data: &[u8]) -> Vec<u8> {
    let mut l4 = Vec::new();
    l4.extend(tuple.sport.host().0.to_be_bytes());
    l4.extend(tuple.dport.host().0.to_be_bytes());
    let checksum = if tuple.proto == Proto::TCP {
        l4.extend(sequence.to_be_bytes());
        l4.extend(acknowledgment.to_be_bytes());
        l4.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        16
    } else {
        l4.extend((8 + data.len() as u16).to_be_bytes());
        l4.extend([0, 0]);
        6
    };
    l4.extend(data);
    let (src, dst) = (octets(tuple.src), octets(tuple.dst));
    let pseudo = sum(&src) + sum(&dst) + u64::from(tuple.proto.0) + l4.len() as u64;
    let total = !fold(pseudo + sum(&l4));
    let total = if total == 0 && tuple.proto == Proto::UDP { 0xffff } else { total };
    l4[checksum..checksum + 2].copy_from_slice(&total.to_be_bytes());
    let mut out = ip_header(tuple.src, tuple.dst, tuple.proto.0, l4.len());
    out.extend(l4);
    out
}

fn ip_header(src: Addr, dst: Addr, proto: u8, length: usize) -> Vec<u8> {
    let mut out = Vec::new();
    if src.is_v4() {
        out.extend([0x45, 0]);
        out.extend((20 + length as u16).to_be_bytes());
        out.extend([0x12, 0x34, 0x40, 0, 64, proto, 0, 0]);
        out.extend(octets(src));
        out.extend(octets(dst));
        let checksum = !fold(sum(&out));
        out[10..12].copy_from_slice(&checksum.to_be_bytes());
    } else {
        out.extend([0x60, 0, 0, 0]);
        out.extend((length as u16).to_be_bytes());
        out.extend([proto, 64]);
        out.extend(octets(src));
        out.extend(octets(dst));
    }
    out
}

/// The ICMP or ICMPv6 "too big" that a router at `from` sends to the sender of `quoted`.
fn too_big(from: Addr, quoted: &[u8]) -> Vec<u8> {
    let parsed = parse(quoted);
    let v6 = !from.is_v4();
    let mut icmp = if v6 { std::vec![2, 0, 0, 0, 0, 0, 5, 0] } else { std::vec![3, 4, 0, 0, 0, 0, 5, 0] };
    icmp.extend(quoted);
    let to = parsed.tuple.src;
    let pseudo = if v6 { sum(&octets(from)) + sum(&octets(to)) + 58 + icmp.len() as u64 } else { 0 };
    let checksum = !fold(pseudo + sum(&icmp));
    icmp[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut out = ip_header(from, to, if v6 { 58 } else { 1 }, icmp.len());
    out.extend(icmp);
    out
}

/// True if all checksums of a packet are right, those inside a quote too.
fn is_sound(bytes: &[u8]) -> bool {
    let v6 = bytes[0] >> 4 == 6;
    let (header, proto) = if v6 { (40, bytes[6]) } else { (20, bytes[9]) };
    let (ip, l4) = bytes.split_at(header);
    let addresses = if v6 { &ip[8..40] } else { &ip[12..20] };
    let pseudo = sum(addresses) + u64::from(proto) + l4.len() as u64;
    let right = |sum: u64| fold(sum) == 0xffff;
    let transport = match proto {
        1 => right(sum(l4)) && is_sound(&l4[8..]),
        58 => right(pseudo + sum(l4)) && is_sound(&l4[8..]),
        17 if l4[6] == 0 && l4[7] == 0 => true,
        _ => right(pseudo + sum(l4)),
    };
    (v6 || right(sum(ip))) && transport
}

fn parse(bytes: &[u8]) -> Parsed {
    let mut copy = bytes.to_vec();
    parse_ip::<_, true>(&Slice(&mut copy)).expect("a packet of this test")
}

fn through(
    world: &World,
    mut bytes: Vec<u8>,
    end: End,
    decide: impl Fn(&World, &mut Parsed) -> Verdict,
) -> Result<Vec<u8>, (DropReason, Refusal)> {
    let mut parsed = parse(&bytes);
    match decide(world, &mut parsed) {
        Verdict::Pass => Ok(bytes),
        Verdict::Refuse(reason, refusal) => Err((reason, refusal)),
        Verdict::Rewrite(rewrite) => {
            assert!(apply(&mut Slice(&mut bytes), &parsed, end, &rewrite), "{rewrite:?} on {parsed:?}");
            assert!(is_sound(&bytes), "bad checksum after {rewrite:?}");
            Ok(bytes)
        }
    }
}

/// What look-ups alone say of a packet.
fn glance(world: &World, parsed: &Parsed) -> Option<Verdict> {
    let mut rewrite = Rewrite::NONE;
    ingress_known(world, parsed, &mut rewrite).verdict(rewrite)
}

/// A packet at ingress. The short decision, where there is one, must be the long one; and what a hook before this one may
/// translate, this one must take for nobody's.
fn enters(world: &World, bytes: Vec<u8>) -> Result<Vec<u8>, (DropReason, Refusal)> {
    let copy = bytes.clone();
    through(world, bytes, End::Destination, |world, parsed| {
        let known = glance(world, parsed);
        let refused = refusal(world, parsed);
        let verdict = ingress(world, parsed);
        if let Some((reason, how)) = refused {
            assert_eq!(verdict, Verdict::Refuse(reason, how), "a hook before refuses what this one takes: {parsed:?}");
        } else if parsed.tcp_flags == tcp::SYN {
            let unseen = matches!(verdict, Verdict::Refuse(DropReason::NoLocalEndpoint | DropReason::UnknownPort, _));
            assert!(!unseen, "a hook before could have refused: {verdict:?} for {parsed:?}");
        }
        assert!(known.is_none() || known == Some(verdict), "{known:?} but {verdict:?} for {parsed:?}");
        if let Some(Verdict::Rewrite(rewrite)) = known
            && is_final(world, parsed, &rewrite)
        {
            let mut ahead = copy.clone();
            assert!(apply(&mut Slice(&mut ahead), parsed, End::Destination, &rewrite));
            assert_eq!(ingress(world, &mut parse(&ahead)), Verdict::Pass, "left to do after {rewrite:?} on {parsed:?}");
        }
        verdict
    })
}

fn leaves(world: &World, bytes: Vec<u8>) -> Result<Vec<u8>, (DropReason, Refusal)> {
    through(world, bytes, End::Source, |world, parsed| {
        // One of the two decides: a backend's answer that is asked about twice is two answers.
        egress_known(world, parsed).unwrap_or_else(|| egress(world, parsed))
    })
}

/// A connection through the node: what the client sends and gets, what the backend sees.
struct Connection {
    /// What the client dials.
    dialled: Tuple,
    /// What the stack sees between ingress and egress.
    plain: Tuple,
    /// What the backend sees.
    seen: Tuple,
}

fn tuple_of(bytes: &[u8]) -> Tuple {
    parse(bytes).tuple
}

/// Sends a SYN (or a first datagram) through the node.
fn dial(world: &World, dialled: Tuple) -> Result<Connection, (DropReason, Refusal)> {
    let inside = enters(world, packet(&dialled, tcp::SYN, 100, 0, b""))?;
    let outside = leaves(world, inside.clone())?;
    Ok(Connection { dialled, plain: tuple_of(&inside), seen: tuple_of(&outside) })
}

/// Sends a packet the way of the client; it must arrive as the first one did.
fn send(world: &World, connection: &Connection, flags: u8, acknowledgment: u32) {
    let bytes = packet(&connection.dialled, flags, 101, acknowledgment, b"question");
    let arrived = leaves(world, enters(world, bytes).expect("in")).expect("out");
    assert_eq!(tuple_of(&arrived), connection.seen);
}

/// Sends a packet back; the client must see what it dialled.
fn reply(world: &World, connection: &Connection, flags: u8, sequence: u32) {
    let bytes = packet(&connection.seen.reversed(), flags, sequence, 101, b"answer");
    let inside = enters(world, bytes).expect("in");
    assert_eq!(tuple_of(&inside), connection.plain.reversed(), "what the stack sees");
    assert_eq!(tuple_of(&leaves(world, inside).expect("out")), connection.dialled.reversed(), "what the client sees");
}

/// Opens a connection with a whole handshake (or question and answer).
fn open(world: &World, dialled: Tuple) -> Connection {
    let connection = dial(world, dialled).expect("a service");
    reply(world, &connection, tcp::SYN | tcp::ACK, 500);
    send(world, &connection, tcp::ACK, 501);
    connection
}

fn established(world: &World) -> usize {
    world.established.borrow().len()
}

/// A world with one service in both families: two backends here, one elsewhere.
fn with_service(proto: Proto) -> World {
    let mut world = World::new();
    let v4 =
        world.add_service(&[("10.244.1.5", 8080, true), ("10.244.1.6", 8080, true), ("10.244.2.7", 80, false)], proto);
    let v6 = world.add_service(&[("fd00:1::5", 8080, true), ("fd00:2::7", 80, false)], proto);
    for (service, cluster_ip, wildcard, external) in
        [(v4, "10.96.0.10", "0.0.0.0", "198.51.100.9"), (v6, "fd96::10", "::", "2001:db8:9::9")]
    {
        world.add_frontend(service, cluster_ip, 80, proto, CLUSTER_IP);
        world.add_frontend(service, wildcard, 30080, proto, 0);
        world.add_frontend(service, external, 80, proto, 0);
    }
    world
}

/// Clients and frontends of one family: a pod here, a pod elsewhere, somebody outside.
fn cases() -> impl Strategy<Value = (Proto, &'static str, &'static str, u16, u16)> {
    let v4 = (
        prop_oneof![Just("10.244.1.50"), Just("10.244.3.50"), Just("203.0.113.5"), Just("10.244.1.5")],
        prop_oneof![Just(("10.96.0.10", 80)), Just(("192.0.2.1", 30080)), Just(("198.51.100.9", 80))],
    );
    let v6 = (
        prop_oneof![Just("fd00:1::50"), Just("fd00:3::50"), Just("2001:db8:5::5"), Just("fd00:1::5")],
        prop_oneof![Just(("fd96::10", 80)), Just(("2001:db8::1", 30080)), Just(("2001:db8:9::9", 80))],
    );
    (prop_oneof![Just(Proto::TCP), Just(Proto::UDP)], prop_oneof![v4, v6], 1024u16..)
        .prop_map(|(proto, (client, (vip, port)), sport)| (proto, client, vip, port, sport))
}

proptest! {
    #[test]
    fn replies_restore_what_the_client_dialled((proto, client, vip, port, sport) in cases()) {
        let world = with_service(proto);
        let connection = open(&world, tuple(client, sport, vip, port, proto));
        // The stack sees client and backend, both ways.
        prop_assert_eq!(connection.plain.src, addr(client));
        prop_assert!(world.backends.borrow().iter().any(|backend| backend.addr == connection.plain.dst));
        // A promoted flow lives without its pending entries.
        world.pending.borrow_mut().clear();
        reply(&world, &connection, tcp::ACK, 501);
        send(&world, &connection, tcp::ACK, 507);
        prop_assert!(world.drops.borrow().is_empty());
    }

    #[test]
    fn the_source_is_kept_unless_replies_would_not_come_back((proto, client, vip, port, sport) in cases()) {
        let world = with_service(proto);
        let connection = open(&world, tuple(client, sport, vip, port, proto));
        let kept = connection.seen.src == addr(client);
        let backend = connection.plain.dst;
        let local = backend == addr("10.244.1.5") || backend == addr("10.244.1.6") || backend == addr("fd00:1::5");
        let hairpin = backend == addr(client);
        let own_pod = client.starts_with("10.244.1.") || client.starts_with("fd00:1:");
        let to_cluster_ip_inside = (vip == "10.96.0.10" || vip == "fd96::10") && !client.starts_with("20");
        prop_assert_eq!(kept, !hairpin && (local || own_pod || to_cluster_ip_inside));
    }

    #[test]
    fn errors_about_either_direction_name_what_the_receiver_knows((proto, client, vip, port, sport) in cases()) {
        let world = with_service(proto);
        let connection = open(&world, tuple(client, sport, vip, port, proto));
        let v4 = addr(client).is_v4();
        let router = addr(if v4 { "192.0.2.254" } else { "2001:db8::fe" });
        // About the client's packet, from beyond the node: it comes back to whom the node sent it as.
        let error = too_big(router, &packet(&connection.seen, tcp::ACK, 1, 1, b"12345678"));
        let at_client = leaves(&world, enters(&world, error).expect("in")).expect("out");
        let parsed = parse(&at_client);
        prop_assert_eq!(parsed.tuple, connection.dialled.reversed());
        prop_assert_eq!((parsed.outer_src, parsed.outer_dst), (router, addr(client)));
        // About the reply, from the client's side: the backend must see its own packet quoted.
        let error = too_big(router, &packet(&connection.dialled.reversed(), tcp::ACK, 1, 1, b"12345678"));
        let at_backend = leaves(&world, enters(&world, error).expect("in")).expect("out");
        let parsed = parse(&at_backend);
        prop_assert_eq!(parsed.tuple, connection.seen);
        prop_assert_eq!((parsed.outer_src, parsed.outer_dst), (router, connection.seen.dst));
    }

    #[test]
    fn parsing_survives_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = bytes;
        let _ = crate::wire::parse_ethernet::<_, true>(&Slice(&mut bytes));
        if let Some(parsed) = parse_ip::<_, true>(&Slice(&mut bytes)) {
            let world = with_service(Proto::TCP);
            let _ = ingress(&world, &mut parsed.clone());
            let _ = egress(&world, &mut parsed.clone());
        }
    }

    #[test]
    fn what_is_not_ours_is_untouched(src in any::<u32>(), dst in any::<u32>(), sport in any::<u16>(), dport in any::<u16>(), flags in 0u8..32) {
        let world = with_service(Proto::TCP);
        let tuple = Tuple {
            src: Addr::from_v4_word(src), dst: Addr::from_v4_word(dst),
            sport: crate::addr::Be16(sport), dport: crate::addr::Be16(dport), proto: Proto::TCP,
        };
        prop_assume!(world.addresses.borrow().get(&tuple.dst).is_none() && !world.config.is_service_address(&tuple.dst));
        let bytes = packet(&tuple, flags, 1, 2, b"x");
        prop_assert_eq!(enters(&world, bytes.clone()), Ok(bytes.clone()));
        prop_assert_eq!(leaves(&world, bytes.clone()), Ok(bytes));
        prop_assert!(world.pending.borrow().is_empty());
    }
}

#[test]
fn a_flood_of_forged_segments_fills_the_pending_table_only() {
    let world = with_service(Proto::TCP);
    for sport in 1..2000 {
        let connection = dial(&world, tuple("203.0.113.5", sport, "192.0.2.1", 30080, Proto::TCP)).expect("a service");
        reply(&world, &connection, tcp::SYN | tcp::ACK, 500);
        send(&world, &connection, tcp::ACK, 499);
    }
    assert_eq!(established(&world), 0);
}

#[test]
fn a_full_flow_table_refuses_nobody() {
    let world = with_service(Proto::TCP);
    world.room_for_flows.set(1);
    for sport in 1..20 {
        let connection = open(&world, tuple("203.0.113.5", sport, "192.0.2.1", 30080, Proto::TCP));
        reply(&world, &connection, tcp::ACK, 501);
        send(&world, &connection, tcp::ACK, 507);
    }
    assert_eq!(established(&world), 0, "half a flow is none");
    assert!(world.drops(DropReason::FlowTable) > 0, "it is counted");
}

#[test]
fn one_client_port_to_two_vips_and_to_the_backend_itself_makes_three_connections() {
    for proto in [Proto::TCP, Proto::UDP] {
        let mut world = World::new();
        let one = world.add_service(&[("10.244.1.5", 8080, true)], proto);
        let two = world.add_service(&[("10.244.1.5", 8080, true)], proto);
        world.add_frontend(one, "10.96.0.10", 80, proto, CLUSTER_IP);
        world.add_frontend(two, "10.96.0.20", 80, proto, CLUSTER_IP);
        let all = ["10.96.0.10:80", "10.96.0.20:80", "10.244.1.5:8080"].map(|dialled| {
            let (dst, port) = dialled.split_once(':').expect("written above");
            open(&world, tuple("10.244.1.50", 5555, dst, port.parse().expect("a port"), proto))
        });
        for connection in &all {
            reply(&world, connection, tcp::ACK, 501);
            send(&world, connection, tcp::ACK, 507);
            assert_eq!(all.iter().filter(|other| other.seen == connection.seen).count(), 1, "{proto}: told apart");
        }
        // The translated packet, met again at another device, is not taken for a direct one.
        world.ifindex.set(6);
        let again = packet(&all[0].plain, tcp::SYN, 100, 0, b"");
        assert_eq!(enters(&world, again.clone()), Ok(again), "{proto}");
    }
}

/// True if a hook before ingress may translate the next segment of an established connection.
fn may_go_ahead(world: &World, connection: &Connection) -> bool {
    let parsed = parse(&packet(&connection.dialled, tcp::ACK, 101, 507, b"more"));
    let Some(Verdict::Rewrite(rewrite)) = glance(world, &parsed) else { panic!("it is established") };
    is_final(world, &parsed, &rewrite)
}

#[test]
fn a_hook_before_leaves_alone_what_would_look_like_a_direct_connection() {
    let world = two_services(Proto::TCP);
    let vip = open(&world, tuple("10.244.1.50", 5555, "10.96.0.10", 80, Proto::TCP));
    let other = open(&world, tuple("10.244.1.50", 5556, "10.96.0.10", 80, Proto::TCP));
    assert!(may_go_ahead(&world, &vip) && may_go_ahead(&world, &other));
    let direct = open(&world, tuple("10.244.1.50", 5555, "10.244.1.5", 8080, Proto::TCP));
    assert_ne!(direct.seen, direct.dialled);
    assert!(!may_go_ahead(&world, &vip), "the direct connection's entry would take it");
    assert!(may_go_ahead(&world, &direct), "nothing goes by its other port");
}

/// A clash on one port of a backend makes no difference to the other packets that go there directly.
#[test]
fn a_direct_segment_needs_no_second_look_because_another_connection_clashed() {
    let world = two_services(Proto::TCP);
    let to_backend = |sport| tuple("10.244.1.50", sport, "10.244.1.5", 8080, Proto::TCP);
    open(&world, tuple("10.244.1.50", 5555, "10.96.0.10", 80, Proto::TCP));
    let direct = open(&world, to_backend(5555));
    assert_ne!(direct.seen, direct.dialled);
    let segment = |of: &Tuple| parse(&packet(of, tcp::ACK, 101, 507, b"more"));
    for flags in [tcp::ACK, tcp::SYN | tcp::ACK, tcp::FIN | tcp::ACK, tcp::RST] {
        let other = parse(&packet(&to_backend(5557), flags, 101, 507, b""));
        assert_eq!(glance(&world, &other), Some(Verdict::Pass), "{flags:#x}");
    }
    open(&world, tuple("10.244.1.50", 5558, "10.96.0.10", 80, Proto::TCP));
    dial(&world, to_backend(5558)).expect("by another port");
    assert_eq!(glance(&world, &segment(&to_backend(5558))), None, "it proves that its client hears");
}

/// Two services with one backend.
fn two_services(proto: Proto) -> World {
    let mut world = World::new();
    for cluster_ip in ["10.96.0.10", "10.96.0.20"] {
        let service = world.add_service(&[("10.244.1.5", 8080, true), ("10.244.1.5", 8080, true)], proto);
        world.add_frontend(service, cluster_ip, 80, proto, CLUSTER_IP);
    }
    world
}

#[test]
fn a_finished_connection_never_touches_the_one_that_took_its_ends() {
    let world = two_services(Proto::TCP);
    let [one, two] = ["10.96.0.10", "10.96.0.20"].map(|vip| tuple("10.244.1.50", 5555, vip, 80, Proto::TCP));
    let first = open(&world, one);
    send(&world, &first, tcp::FIN | tcp::ACK, 501);
    reply(&world, &first, tcp::FIN | tcp::ACK, 501);
    let second = open(&world, two);
    assert_eq!(second.seen, first.seen, "the ends are free");
    // A straggler of the first is no affair of the second.
    let straggler = packet(&one, tcp::RST, 102, 0, b"");
    assert_eq!(enters(&world, straggler), Err((DropReason::NoConnection, Refusal::Reject)));
    reply(&world, &second, tcp::ACK, 501);
    // The first service again, from the same port: another way to the backend.
    let third = open(&world, one);
    assert_ne!(third.seen, second.seen);
    for connection in [&second, &third] {
        reply(&world, connection, tcp::ACK, 501);
        send(&world, connection, tcp::ACK, 507);
    }
}

#[test]
fn a_backend_on_the_clients_bridge_is_looked_for_again_now_and_then() {
    let mut world = World::new();
    let service = world.add_service(&[("10.244.1.5", 53, true)], Proto::UDP);
    world.add_frontend(service, "10.96.0.10", 53, Proto::UDP, CLUSTER_IP);
    let dialled = tuple("10.244.1.50", 5555, "10.96.0.10", 53, Proto::UDP);
    let mac_of_next = |neighbour| {
        world.neighbour.set(neighbour);
        let mut parsed = parse(&packet(&dialled, 0, 0, 0, b"question"));
        let known = glance(&world, &parsed);
        let Verdict::Rewrite(rewrite) = ingress(&world, &mut parsed) else { panic!("a service") };
        assert!(known.is_none() || known == Some(Verdict::Rewrite(rewrite)));
        rewrite.mac
    };
    assert_eq!(mac_of_next(Neighbour::Unresolved), [0; 3], "the stack finds it");
    assert_eq!(mac_of_next(Neighbour::At([1; 3])), [1; 3]);
    leaves(&world, packet(&tuple("10.244.1.5", 53, "10.244.1.50", 5555, Proto::UDP), 0, 0, 0, b"answer")).expect("out");
    assert_eq!(mac_of_next(Neighbour::At([2; 3])), [1; 3], "not for every packet");
    assert_eq!(established(&world), 2);
    world.now.set(Seconds(world.now.get().0 + 3));
    assert_eq!(mac_of_next(Neighbour::At([2; 3])), [2; 3]);
    world.now.set(Seconds(world.now.get().0 + 3));
    assert_eq!(mac_of_next(Neighbour::Unresolved), [2; 3], "the best guess");
    assert_eq!(mac_of_next(Neighbour::At([3; 3])), [2; 3]);
}

#[test]
fn a_finished_connection_leaves_a_direct_one_with_its_ends_alone() {
    let world = two_services(Proto::TCP);
    let ended = open(&world, tuple("10.244.1.50", 5555, "10.96.0.10", 80, Proto::TCP));
    reply(&world, &ended, tcp::RST, 0);
    let direct = dial(&world, ended.plain).expect("a backend");
    assert_eq!(direct.seen, direct.dialled, "the ends are free");
    reply(&world, &direct, tcp::SYN | tcp::ACK, 500);
    assert_eq!(established(&world), 0, "nothing of the ended one is left");
}

#[test]
fn a_finished_connection_with_a_rewritten_source_leaves_nothing_behind_when_its_ends_are_taken() {
    let mut world = World::new();
    for external in ["198.51.100.1", "198.51.100.2"] {
        let service = world.add_service(&[("10.244.2.7", 80, false)], Proto::TCP);
        world.add_frontend(service, external, 80, Proto::TCP, 0);
    }
    let [one, two] = ["198.51.100.1", "198.51.100.2"].map(|vip| tuple("203.0.113.5", 5555, vip, 80, Proto::TCP));
    let first = open(&world, one);
    send(&world, &first, tcp::FIN | tcp::ACK, 501);
    reply(&world, &first, tcp::FIN | tcp::ACK, 501);
    open(&world, two);
    assert_eq!(established(&world), 3, "front, plain and snat of the second");
}

#[test]
fn a_reply_of_a_direct_connection_is_translated_at_the_clients_device_only() {
    let world = two_services(Proto::TCP);
    let port = world.ifindex.get();
    open(&world, tuple("10.244.1.50", 5555, "10.96.0.10", 80, Proto::TCP));
    let direct = dial(&world, tuple("10.244.1.50", 5555, "10.244.1.5", 8080, Proto::TCP)).expect("a backend");
    assert_ne!(direct.seen, direct.dialled);
    let answer = packet(&direct.seen.reversed(), tcp::SYN | tcp::ACK, 500, 101, b"");
    world.ifindex.set(port + 1);
    let at_bridge = leaves(&world, answer.clone()).expect("out");
    assert_eq!(at_bridge, answer, "the bridge comes first");
    world.ifindex.set(port);
    assert_eq!(tuple_of(&leaves(&world, at_bridge).expect("out")), direct.dialled.reversed());
}

#[test]
fn a_direct_connection_that_was_there_first_is_not_disturbed() {
    let world = with_service(Proto::TCP);
    // The backend answers a SYN on a living connection with a challenge ACK, and goes on sending data.
    let vip = tuple("10.244.1.50", 5555, "10.96.0.10", 80, Proto::TCP);
    let clash = dial(&world, vip).expect("a service");
    let data = packet(&clash.plain.reversed(), tcp::ACK, 900, 5, b"data of the direct connection");
    assert_eq!(leaves(&world, data.clone()), Ok(data.clone()), "it belongs to the direct connection");
    let challenge = packet(&clash.plain.reversed(), tcp::ACK, 900, 5, b"");
    is_told_once(&world, &clash, &challenge);
    assert_eq!(leaves(&world, challenge.clone()), Ok(challenge), "an acknowledgment of the direct connection");
    let retry = open(&world, vip);
    assert_ne!(retry.seen.sport, vip.sport, "the retransmission avoids the clash");
    assert_eq!(leaves(&world, data.clone()), Ok(data), "still not ours");
}

/// The client sees what its backend says to another connection, and its reset ends nothing.
#[track_caller]
fn is_told_once(world: &World, clash: &Connection, challenge: &[u8]) {
    let at_client = leaves(world, enters(world, challenge.to_vec()).expect("in")).expect("out");
    assert_eq!(tuple_of(&at_client), clash.dialled.reversed(), "so that its next SYN does not wait");
    let reset = packet(&clash.dialled, tcp::RST, 5, 0, b"");
    assert_eq!(enters(world, reset), Err((DropReason::NoConnection, Refusal::Drop)));
}

#[test]
fn a_connection_gets_the_answer_to_its_own_syn_alone() {
    for (vip, frontend_port) in [("10.96.0.10", 80), ("198.51.100.9", 80)] {
        let world = with_service(Proto::TCP);
        // A direct connection has begun right before, with the same ends.
        let dialled = tuple("10.244.1.50", 5555, vip, frontend_port, Proto::TCP);
        let clash = dial(&world, dialled).expect("a service");
        for flags in [tcp::SYN | tcp::ACK, tcp::RST | tcp::ACK, tcp::RST] {
            let foreign = packet(&clash.plain.reversed(), flags, 500, 70_001, b"");
            assert_eq!(leaves(&world, foreign.clone()), Ok(foreign), "it belongs to the direct connection");
        }
        // That one is over, and the SYN has got through after all.
        reply(&world, &clash, tcp::SYN | tcp::ACK, 600);
        send(&world, &clash, tcp::ACK, 601);
        assert_eq!(established(&world), 2);
        reply(&world, &clash, tcp::ACK, 601);
    }
}

#[test]
fn a_client_that_dials_anew_from_the_same_port_gets_its_answer() {
    let world = with_service(Proto::TCP);
    let dialled = tuple("203.0.113.5", 40000, "198.51.100.9", 80, Proto::TCP);
    let given_up = dial(&world, dialled).expect("a service");
    let syn = packet(&dialled, tcp::SYN, 9000, 0, b"");
    let seen = tuple_of(&leaves(&world, enters(&world, syn).expect("in")).expect("out"));
    assert_eq!(seen.dst, given_up.seen.dst, "the same pick");
    let answer = packet(&seen.reversed(), tcp::SYN | tcp::ACK, 500, 9001, b"");
    let at_client = leaves(&world, enters(&world, answer).expect("in")).expect("out");
    assert_eq!(tuple_of(&at_client), dialled.reversed());
}

/// A world with a NodePort whose backend is elsewhere, and a hundred ports for rewritten sources.
fn with_few_snat_ports() -> World {
    let mut world = World::new();
    world.config.snat_last = world.config.snat_first + 99;
    let service = world.add_service(&[("10.244.2.7", 80, false)], Proto::TCP);
    world.add_frontend(service, "0.0.0.0", 30080, Proto::TCP, 0);
    world
}

#[test]
fn a_handshake_keeps_its_port_while_older_ones_are_to_be_had() {
    let world = with_few_snat_ports();
    let at_node = |client, sport| tuple(client, sport, "192.0.2.1", 30080, Proto::TCP);
    let mut sports = 33_000..;
    let mut forge = |count: usize| {
        for sport in sports.by_ref().take(count) {
            world.nanos.set(world.nanos.get() + (1 << 20));
            dial(&world, at_node("203.0.113.66", sport)).expect("a beginning");
        }
    };
    forge(1000);
    for sport in 40_000..40_100 {
        let connection = dial(&world, at_node("203.0.113.5", sport)).expect("a service");
        forge(20);
        reply(&world, &connection, tcp::SYN | tcp::ACK, 500);
    }
}

/// A backend remembers beginnings of one age: who meets one of them gets a port of another age when the SYN comes again.
#[test]
fn the_age_of_a_port_that_is_taken_over_varies() {
    let world = with_few_snat_ports();
    let at_node = |client, sport| tuple(client, sport, "192.0.2.1", 30080, Proto::TCP);
    let mut held_since = std::collections::HashMap::new();
    let mut beginnings = 0..;
    let (rounds, mut oldest) = (100, 0);
    for _ in 0..rounds {
        for count in beginnings.by_ref().take(200) {
            world.nanos.set(world.nanos.get() + (1 << 20));
            let forged = dial(&world, at_node("203.0.113.66", 33_000 + count)).expect("a service");
            held_since.insert(forged.seen.sport, count);
        }
        let count = beginnings.next().expect("no end");
        let connection = dial(&world, at_node("203.0.113.5", 33_000 + count)).expect("a service");
        let age = held_since.insert(connection.seen.sport, count);
        let older = held_since.values().filter(|other| age > Some(**other)).count();
        oldest += u32::from(older < held_since.len() / 10);
    }
    assert!(oldest < 80, "{oldest} of {rounds} took one of the oldest tenth");
}

#[test]
fn a_datagram_flow_keeps_clear_of_what_the_kernel_tracks() {
    let mut world = World::new();
    let service = world.add_service(&[("10.244.1.5", 53, true)], Proto::UDP);
    world.add_frontend(service, "10.96.0.10", 53, Proto::UDP, CLUSTER_IP);
    world.tracked.insert(tuple("10.244.1.50", 5555, "10.244.1.5", 53, Proto::UDP), Tracked::Plain);
    let connection = open(&world, tuple("10.244.1.50", 5555, "10.96.0.10", 53, Proto::UDP));
    assert_ne!(connection.seen.sport, connection.dialled.sport);
}

#[test]
fn connections_of_a_predecessor_pass_untouched() {
    for proto in [Proto::TCP, Proto::UDP] {
        let mut world = with_service(proto);
        let theirs = tuple("203.0.113.5", 4000, "192.0.2.1", 30080, proto);
        world.tracked.insert(theirs, Tracked::Translated);
        let bytes = packet(&theirs, tcp::ACK, 1, 1, b"data");
        assert_eq!(enters(&world, bytes.clone()), Ok(bytes));
        assert!(world.pending.borrow().is_empty());
    }
}

#[test]
fn a_segment_of_no_connection_is_reset_at_a_cluster_ip_and_passes_elsewhere() {
    let world = with_service(Proto::TCP);
    let ack = |dst, port| packet(&tuple("10.244.1.50", 4000, dst, port, Proto::TCP), tcp::ACK, 1, 1, b"data");
    assert_eq!(enters(&world, ack("10.96.0.10", 80)), Err((DropReason::NoConnection, Refusal::Reject)));
    assert_eq!(enters(&world, ack("192.0.2.1", 30080)), Ok(ack("192.0.2.1", 30080)));
}

#[test]
fn unknown_ports_and_addresses_are_refused_only_where_nobody_else_can_be() {
    let world = with_service(Proto::TCP);
    let syn = |dst, port| packet(&tuple("10.244.1.50", 4000, dst, port, Proto::TCP), tcp::SYN, 1, 0, b"");
    assert_eq!(enters(&world, syn("10.96.0.10", 81)), Err((DropReason::UnknownPort, Refusal::Reject)));
    assert_eq!(enters(&world, syn("10.96.0.99", 80)), Ok(syn("10.96.0.99", 80)), "another proxy may know it");
    assert_eq!(leaves(&world, syn("10.96.0.99", 80)), Err((DropReason::UnallocatedServiceAddress, Refusal::Drop)));
    assert_eq!(enters(&world, syn("192.0.2.1", 22)), Ok(syn("192.0.2.1", 22)), "SSH lives there");
    assert_eq!(enters(&world, syn("198.51.100.9", 22)), Ok(syn("198.51.100.9", 22)), "maybe this node's own");
    assert_eq!(leaves(&world, syn("10.96.0.10", 80)), Err((DropReason::HostUnhooked, Refusal::Reject)));
}

#[test]
fn a_restricted_address_is_open_to_its_ranges_alone() {
    let mut world = World::new();
    let service = world.add_service(&[("10.244.1.5", 8080, true)], Proto::TCP);
    world.add_frontend(service, "203.0.113.80", 80, Proto::TCP, FrontendValue::RESTRICTED);
    world.add_frontend(service, "198.51.100.9", 80, Proto::TCP, 0);
    let from = |client| tuple(client, 4000, "203.0.113.80", 80, Proto::TCP);
    let closed = Some((DropReason::SourceRange, Refusal::Drop));
    assert_eq!(dial(&world, from("192.0.2.7")).err(), closed, "no range allows anybody");
    world.allow(service, "192.0.2.0", 28);
    let connection = open(&world, from("192.0.2.7"));
    assert_eq!(dial(&world, from("192.0.2.16")).err(), closed);
    assert_eq!(dial(&world, from("10.244.1.50")).err(), closed, "a pod is a client like others");
    assert!(dial(&world, tuple("192.0.2.16", 4000, "198.51.100.9", 80, Proto::TCP)).is_ok(), "another frontend");
    world.source_ranges.clear();
    send(&world, &connection, tcp::ACK, 501);
}

#[test]
fn policies_and_emptiness_decide_who_is_refused_and_how() {
    let mut world = World::new();
    let remote = world.add_service(&[("10.244.2.7", 80, false)], Proto::TCP);
    let none = world.add_service(&[], Proto::TCP);
    world.add_frontend(remote, "0.0.0.0", 30001, Proto::TCP, FrontendValue::OUTSIDE_LOCAL);
    world.add_frontend(none, "10.96.0.11", 80, Proto::TCP, CLUSTER_IP);
    let outside = dial(&world, tuple("203.0.113.5", 4000, "192.0.2.1", 30001, Proto::TCP));
    assert_eq!(outside.err(), Some((DropReason::NoLocalEndpoint, Refusal::Drop)));
    assert!(
        dial(&world, tuple("10.244.1.50", 4000, "192.0.2.1", 30001, Proto::TCP)).is_ok(),
        "inside: the cluster set"
    );
    let empty = dial(&world, tuple("10.244.1.50", 4000, "10.96.0.11", 80, Proto::TCP));
    assert_eq!(empty.err(), Some((DropReason::NoEndpoint, Refusal::Reject)));
}

#[test]
fn a_process_of_the_node_is_dropped_where_policy_keeps_it_from_all_endpoints() {
    let mut world = World::new();
    let remote = world.add_service(&[("10.244.2.7", 80, false)], Proto::TCP);
    world.add_frontend(remote, "10.96.0.10", 80, Proto::TCP, CLUSTER_IP | FrontendValue::INSIDE_LOCAL);
    world.add_frontend(remote, "10.96.0.20", 80, Proto::TCP, CLUSTER_IP);
    let syn = |dst| packet(&tuple("192.0.2.1", 4000, dst, 80, Proto::TCP), tcp::SYN, 1, 0, b"");
    assert_eq!(leaves(&world, syn("10.96.0.10")), Err((DropReason::NoLocalEndpoint, Refusal::Drop)));
    assert_eq!(leaves(&world, syn("10.96.0.20")), Err((DropReason::HostUnhooked, Refusal::Reject)));
}

#[test]
fn a_connection_whose_endpoint_is_gone_is_reset_with_the_clients_next_segment() {
    for (dst, dport) in [("10.96.0.10", 80), ("192.0.2.1", 30080), ("198.51.100.9", 80)] {
        for flags in [tcp::ACK, tcp::FIN | tcp::ACK] {
            let world = with_service(Proto::TCP);
            // Enough clients that local and remote backends are among those they get.
            for sport in 5000..5008 {
                let dialled = tuple("203.0.113.5", sport, dst, dport, Proto::TCP);
                let (connection, other) =
                    (open(&world, dialled), open(&world, Tuple { sport: Port(sport + 1000).be(), ..dialled }));
                let before = established(&world);
                world.mark_stale(&dialled.front_key());
                reply(&world, &connection, tcp::ACK, 600);
                let segment = || packet(&dialled, flags, 101, 601, b"question");
                assert_eq!(enters(&world, segment()), Err((DropReason::NoConnection, Refusal::Reject)));
                assert!(established(&world) < before, "its entries are gone");
                send(&world, &other, tcp::ACK, 601);
                open(&world, dialled);
            }
        }
    }
}

#[test]
fn a_client_of_an_endpoint_that_is_gone_may_dial_again_by_the_same_port() {
    let world = with_service(Proto::TCP);
    let dialled = tuple("203.0.113.5", 5000, "10.96.0.10", 80, Proto::TCP);
    open(&world, dialled);
    world.mark_stale(&dialled.front_key());
    dial(&world, dialled).expect("a service");
    assert_eq!(established(&world), 0, "the old connection is gone");
    open(&world, dialled);
}

#[test]
fn datagrams_leave_a_backend_whose_service_has_no_endpoints_or_is_gone() {
    for is_deleted in [false, true] {
        let mut world = World::new();
        let service = world.add_service(&[("10.244.1.5", 53, true)], Proto::UDP);
        world.add_frontend(service, "10.96.0.10", 53, Proto::UDP, CLUSTER_IP);
        world.fingerprints.insert(service, 1);
        let connection = open(&world, tuple("10.244.1.50", 4000, "10.96.0.10", 53, Proto::UDP));
        // The backend itself is there: another service has it.
        world.fingerprints.insert(service, 3);
        world.sets.insert((service, false), Range::REJECT);
        if is_deleted {
            world.frontends.clear();
            world.addresses.borrow_mut().insert(connection.dialled.dst, AddressClass { flags: AddressClass::FLOWS });
        }
        let expected = match is_deleted {
            false => (DropReason::NoEndpoint, Refusal::Reject),
            true => (DropReason::UnallocatedServiceAddress, Refusal::Drop),
        };
        assert_eq!(dial(&world, connection.dialled).err(), Some(expected), "deleted: {is_deleted}");
        assert_eq!(established(&world), 0);
    }
}

#[test]
fn a_gone_backend_is_left_by_datagrams_at_once_and_by_connections_at_their_next_syn() {
    for proto in [Proto::TCP, Proto::UDP] {
        let mut world = World::new();
        let service = world.add_service(&[("10.244.1.5", 80, true), ("10.244.1.6", 80, true)], proto);
        world.add_frontend(service, "10.96.0.10", 80, proto, CLUSTER_IP);
        let connection = open(&world, tuple("10.244.1.50", 4000, "10.96.0.10", 80, proto));
        let (old, new) = if connection.plain.dst == addr("10.244.1.5") { (0, 1) } else { (1, 0) };
        world.remove_backend(["10.244.1.5", "10.244.1.6"][old]);
        let survivor = world.slots[new];
        world.slots[old] = survivor;
        if proto == Proto::TCP {
            send(&world, &connection, tcp::ACK, 507);
        }
        let moved = dial(&world, connection.dialled).expect("the other backend");
        assert_eq!(moved.plain.dst, addr(["10.244.1.5", "10.244.1.6"][new]), "{proto}");
    }
}

#[test]
fn datagrams_leave_a_backend_that_their_service_dropped_while_another_has_it() {
    const BACKENDS: [&str; 2] = ["10.244.1.5", "10.244.1.6"];
    let mut world = World::new();
    let [one, two] = ["10.96.0.10", "10.96.0.20"].map(|cluster_ip| {
        let service = world.add_service(&BACKENDS.map(|backend| (backend, 53, true)), Proto::UDP);
        world.add_frontend(service, cluster_ip, 53, Proto::UDP, CLUSTER_IP);
        world.fingerprints.insert(service, 1);
        service
    });
    let connection = open(&world, tuple("10.244.1.50", 4000, "10.96.0.10", 53, Proto::UDP));
    let other = open(&world, tuple("10.244.1.50", 4000, "10.96.0.20", 53, Proto::UDP));
    // A change that leaves the backend where it is.
    world.fingerprints.insert(one, 2);
    send(&world, &connection, 0, 0);
    send(&world, &connection, 0, 0);
    // Now the first service loses it.
    let (old, new) = if connection.plain.dst == addr(BACKENDS[0]) { (0, 1) } else { (1, 0) };
    let survivor = world.slots[new];
    world.slots[old] = survivor;
    world.fingerprints.insert(one, 3);
    let moved = dial(&world, connection.dialled).expect("the other backend");
    assert_eq!(moved.plain.dst, addr(BACKENDS[new]));
    send(&world, &other, 0, 0);
    // And the second one its frontend.
    world.frontends.values_mut().for_each(|frontend| frontend.service = one);
    world.fingerprints.insert(two, 0);
    let moved = dial(&world, other.dialled).expect("the other backend");
    assert_eq!(moved.plain.dst, addr(BACKENDS[new]));
}

#[test]
fn a_repeated_syn_keeps_its_backend_and_one_after_the_end_picks_anew() {
    let world = with_service(Proto::TCP);
    let dialled = tuple("203.0.113.5", 4000, "192.0.2.1", 30080, Proto::TCP);
    let connection = open(&world, dialled);
    assert_eq!(dial(&world, dialled).expect("the same").seen, connection.seen);
    send(&world, &connection, tcp::FIN | tcp::ACK, 507);
    reply(&world, &connection, tcp::FIN | tcp::ACK, 507);
    let entries = established(&world);
    let _ = dial(&world, dialled).expect("a new one");
    assert_eq!(established(&world), 0, "{entries} entries of the old connection are gone");
}

/// Until the clock says so, flows stay as they are: nothing opens one, nothing ends one, and those that there are go on.
#[test]
fn while_the_tables_are_handed_over_flows_are_neither_opened_nor_removed() {
    const HELD: (DropReason, Refusal) = (DropReason::Settling, Refusal::Drop);
    let mut world = with_service(Proto::TCP);
    let over = open(&world, tuple("203.0.113.5", 4000, "192.0.2.1", 30080, Proto::TCP));
    let living = open(&world, tuple("203.0.113.5", 4001, "192.0.2.1", 30080, Proto::TCP));
    send(&world, &over, tcp::FIN | tcp::ACK, 507);
    reply(&world, &over, tcp::FIN | tcp::ACK, 507);
    let (entries, pending) = (established(&world), world.pending.borrow().len());

    world.config.settles_at = world.now.get().0 + 1;
    let fresh = |dst, port| tuple("203.0.113.5", 4002, dst, port, Proto::TCP);
    for (dst, port) in [("192.0.2.1", 30080), ("10.96.0.10", 80)] {
        assert_eq!(dial(&world, fresh(dst, port)).err(), Some(HELD), "a new one");
        let ack = packet(&fresh(dst, port), tcp::ACK, 1, 1, b"data");
        assert_eq!(enters(&world, ack), Err(HELD), "one that nobody knows may be known elsewhere");
    }
    let unknown = packet(&fresh("10.96.0.10", 81), tcp::ACK, 1, 1, b"data");
    assert_eq!(enters(&world, unknown), Err(HELD));
    assert_eq!(dial(&world, over.dialled).err(), Some(HELD), "it would take the place of one that is over");
    assert_eq!(dial(&world, living.dialled).expect("a repeated SYN").seen, living.seen);
    send(&world, &living, tcp::ACK, 507);
    reply(&world, &living, tcp::ACK, 507);
    let syn = |dst, port| packet(&fresh(dst, port), tcp::SYN, 1, 0, b"");
    assert_eq!(enters(&world, syn("10.96.0.10", 81)), Err((DropReason::UnknownPort, Refusal::Reject)));
    assert_eq!(enters(&world, syn("192.0.2.1", 22)), Ok(syn("192.0.2.1", 22)), "not ours");
    assert_eq!((established(&world), world.pending.borrow().len()), (entries, pending));

    world.now.set(Seconds(world.config.settles_at));
    assert!(dial(&world, fresh("192.0.2.1", 30080)).is_ok(), "it ends by itself");
    assert!(dial(&world, over.dialled).is_ok());
}

#[test]
fn rewritten_sources_are_unique_to_the_last_port_and_then_refused() {
    let mut world = World::new();
    world.config.snat_last = world.config.snat_first + 9;
    let service = world.add_service(&[("10.244.2.7", 80, false)], Proto::TCP);
    world.add_frontend(service, "0.0.0.0", 30080, Proto::TCP, 0);
    let mut seen = std::collections::HashSet::new();
    for sport in 40000..40010 {
        let connection = open(&world, tuple("203.0.113.5", sport, "192.0.2.1", 30080, Proto::TCP));
        assert!(seen.insert(connection.seen), "port used twice");
    }
    let eleventh = dial(&world, tuple("203.0.113.5", 40010, "192.0.2.1", 30080, Proto::TCP));
    assert_eq!(eleventh.err(), Some((DropReason::SnatPortsExhausted, Refusal::Drop)));
}

#[test]
fn forged_beginnings_keep_nobody_from_a_remote_backend() {
    let world = with_few_snat_ports();
    let at_node = |client, sport| tuple(client, sport, "192.0.2.1", 30080, Proto::TCP);
    let before = open(&world, at_node("203.0.113.5", 40000));
    for sport in 33_000..34_000 {
        dial(&world, at_node("203.0.113.66", sport)).expect("a beginning");
    }
    let after = open(&world, at_node("203.0.113.5", 40001));
    assert_ne!(after.seen, before.seen);
    for connection in [before, after] {
        reply(&world, &connection, tcp::ACK, 501);
        send(&world, &connection, tcp::ACK, 507);
    }
    let snat = |entries: &std::cell::RefCell<std::collections::HashMap<_, _>>| {
        let keys: Vec<FlowKey> = entries.borrow().keys().copied().collect();
        keys.iter().filter(|key| key.kind == FlowKey::SNAT).count()
    };
    assert!(snat(&world.pending) <= 100, "each port once");
}

#[test]
fn a_datagram_without_source_port_reaches_its_backend() {
    let mut world = with_service(Proto::UDP);
    let remote = world.add_service(&[("10.244.2.7", 53, false)], Proto::UDP);
    world.add_frontend(remote, "198.51.100.7", 53, Proto::UDP, 0);
    for (dst, port) in [("198.51.100.7", 53), ("10.96.0.10", 80)] {
        let first = dial(&world, tuple("203.0.113.5", 0, dst, port, Proto::UDP)).expect("a service");
        let entries = world.pending.borrow().len();
        send(&world, &first, 0, 0);
        assert_eq!(world.pending.borrow().len(), entries, "one flow");
    }
    assert!(world.drops.borrow().is_empty());
}

#[test]
fn a_client_port_that_the_kernel_never_hands_out_is_kept_if_free() {
    let mut world = with_service(Proto::UDP);
    let service = world.add_service(&[("10.244.2.7", 5060, false)], Proto::UDP);
    world.add_frontend(service, "198.51.100.7", 5060, Proto::UDP, 0);
    let dialled = |client| tuple(client, 5060, "198.51.100.7", 5060, Proto::UDP);
    let first = open(&world, dialled("203.0.113.5"));
    assert_eq!((first.seen.src, first.seen.sport), (addr("192.0.2.1"), first.dialled.sport));
    let second = open(&world, dialled("203.0.113.6"));
    assert_ne!(second.seen.sport, first.seen.sport, "taken");
    reply(&world, &first, 0, 0);
    reply(&world, &second, 0, 0);
}

#[test]
fn a_port_that_a_socket_of_this_node_uses_towards_the_backend_is_not_taken() {
    let mut world = World::new();
    let service = world.add_service(&[("10.244.2.7", 80, false)], Proto::TCP);
    world.add_frontend(service, "0.0.0.0", 30080, Proto::TCP, 0);
    world.sockets.push(tuple("10.244.2.7", 80, "192.0.2.1", 5000, Proto::TCP));
    let connection = open(&world, tuple("203.0.113.5", 5000, "192.0.2.1", 30080, Proto::TCP));
    assert_ne!(connection.seen.sport, connection.dialled.sport);
}

#[test]
fn affinity_holds_for_its_time_and_while_the_backend_is_in_the_set() {
    let mut world = with_service(Proto::TCP);
    world.affinity_timeouts.insert(1, 100);
    let client = |sport| tuple("10.244.1.50", sport, "10.96.0.10", 80, Proto::TCP);
    let first = open(&world, client(4000)).plain.dst;
    for sport in 4001..4050 {
        world.now.set(Seconds(world.now.get().0 + 60));
        assert_eq!(open(&world, client(sport)).plain.dst, first, "each connection renews it");
    }
    world.remove_backend("10.244.1.5");
    world.remove_backend("10.244.1.6");
    world.remove_backend("10.244.2.7");
    assert!(dial(&world, client(4060)).is_err(), "a remembered backend that is gone is not used");
}

#[test]
fn flows_carry_on_for_a_vip_that_was_removed() {
    let mut world = with_service(Proto::TCP);
    let connection = open(&world, tuple("203.0.113.5", 4000, "198.51.100.9", 80, Proto::TCP));
    world.frontends.clear();
    world.addresses.borrow_mut().insert(addr("198.51.100.9"), AddressClass { flags: AddressClass::FLOWS });
    send(&world, &connection, tcp::ACK, 507);
    reply(&world, &connection, tcp::ACK, 507);
}

#[test]
fn what_a_backend_says_to_another_connection_with_a_rewritten_source_is_the_stacks_affair() {
    let mut world = World::new();
    let service = world.add_service(&[("10.244.2.7", 80, false)], Proto::TCP);
    world.add_frontend(service, "0.0.0.0", 30080, Proto::TCP, 0);
    let dialled = tuple("203.0.113.5", 40000, "192.0.2.1", 30080, Proto::TCP);
    let mut tried = Vec::new();
    for _ in 0..4 {
        let clash = dial(&world, dialled).expect("a service");
        assert!(!tried.contains(&clash.seen), "another port each time");
        let challenge = packet(&clash.seen.reversed(), tcp::ACK, 900, 5, b"");
        is_told_once(&world, &clash, &challenge);
        assert_eq!(enters(&world, challenge.clone()), Ok(challenge), "and never again");
        let late = packet(&clash.seen.reversed(), tcp::SYN | tcp::ACK, 900, 5, b"");
        assert_eq!(enters(&world, late.clone()), Ok(late), "the answer to another SYN");
        tried.push(clash.seen);
        world.nanos.set(world.nanos.get() + (1 << 21));
    }
    let connection = open(&world, dialled);
    assert!(!tried.contains(&connection.seen));
    reply(&world, &connection, tcp::ACK, 501);
}

/// A masquerade of the kernel's own takes the port of a rewritten source once the kernel's connection with it is over.
#[test]
fn a_connection_that_took_the_port_of_a_finished_flow_gets_its_answers() {
    let mut world = World::new();
    let service = world.add_service(&[("10.244.2.7", 80, false)], Proto::TCP);
    world.add_frontend(service, "0.0.0.0", 30080, Proto::TCP, 0);
    let connection = open(&world, tuple("203.0.113.5", 40000, "192.0.2.1", 30080, Proto::TCP));
    let answer = |flags| packet(&connection.seen.reversed(), flags, 900, 5, b"");
    reply(&world, &connection, tcp::SYN | tcp::ACK, 500);
    send(&world, &connection, tcp::FIN | tcp::ACK, 501);
    reply(&world, &connection, tcp::FIN | tcp::ACK, 501);
    reply(&world, &connection, tcp::FIN | tcp::ACK, 501);
    for flags in [tcp::SYN | tcp::ACK, tcp::ACK, tcp::FIN | tcp::ACK] {
        assert_eq!(enters(&world, answer(flags)), Ok(answer(flags)), "it belongs to the node now");
    }
    let again = open(&world, connection.dialled);
    reply(&world, &again, tcp::ACK, 501);
}

#[test]
fn flows_carry_on_for_a_node_port_that_was_removed() {
    let mut world = with_service(Proto::TCP);
    let connection = open(&world, tuple("203.0.113.5", 4000, "192.0.2.1", 30080, Proto::TCP));
    world.frontends.clear();
    world.port_uses.borrow_mut().clear();
    send(&world, &connection, tcp::ACK, 507);
    reply(&world, &connection, tcp::ACK, 507);
    let syn = packet(&tuple("203.0.113.5", 4001, "192.0.2.1", 30080, Proto::TCP), tcp::SYN, 1, 0, b"");
    assert_eq!(enters(&world, syn.clone()), Ok(syn), "new ones are the node's own affair");
}

/// What the agent's tables are while it hands over: addresses are looked up for their flows alone.
#[test]
fn withdrawn_frontends_keep_their_flows_and_leave_new_connections_alone() {
    let mut world = with_service(Proto::TCP);
    let vips = [("10.96.0.10", 80), ("198.51.100.9", 80), ("192.0.2.1", 30080)];
    let from = |port, (vip, dport)| tuple("203.0.113.5", port, vip, dport, Proto::TCP);
    let connections = vips.map(|vip| open(&world, from(4000, vip)));
    let begun = vips.map(|vip| dial(&world, from(5000, vip)).expect("a service"));
    world.config.service_cidr_count = 0;
    world.frontends.clear();
    for vip in ["10.96.0.10", "198.51.100.9"] {
        world.addresses.borrow_mut().insert(addr(vip), AddressClass { flags: AddressClass::FLOWS });
    }
    world.addresses.borrow_mut().insert(addr("192.0.2.1"), AddressClass { flags: AddressClass::NODE });
    for connection in &connections {
        send(&world, connection, tcp::ACK, 507);
        reply(&world, connection, tcp::ACK, 507);
    }
    for connection in &begun {
        reply(&world, connection, tcp::SYN | tcp::ACK, 500);
        send(&world, connection, tcp::ACK, 501);
    }
    for flags in [tcp::SYN, tcp::ACK] {
        for vip in vips.into_iter().chain([("10.96.0.10", 81), ("10.96.0.99", 80)]) {
            let theirs = packet(&from(6000, vip), flags, 1, 1, b"");
            assert_eq!(enters(&world, theirs.clone()), Ok(theirs.clone()), "{vip:?}");
            assert_eq!(leaves(&world, theirs.clone()), Ok(theirs), "{vip:?}");
        }
    }
}

#[test]
fn the_state_of_a_connection_follows_what_both_sides_send() {
    let world = with_service(Proto::TCP);
    let connection = open(&world, tuple("203.0.113.5", 4000, "192.0.2.1", 30080, Proto::TCP));
    let (key, _) = connection.plain.plain_key();
    let hot = || Hot::unpack(crate::tables::Lookups::established(&world, &key).expect("established").hot());
    world.now.set(Seconds(2000));
    reply(&world, &connection, tcp::ACK, 501);
    assert_eq!(hot().seen, Seconds(2000));
    send(&world, &connection, tcp::FIN | tcp::ACK, 502);
    assert!(!hot().is_finished());
    reply(&world, &connection, tcp::RST, 502);
    assert!(hot().is_finished());
}

#[test]
fn a_segment_is_known_by_whether_it_carries_data() {
    for (src, dst) in [("10.244.1.50", "10.96.0.10"), ("fd00:1::50", "fd96::10")] {
        let dialled = tuple(src, 4000, dst, 80, Proto::TCP);
        for (data, flags) in [(&b""[..], tcp::ACK), (b"x", tcp::ACK | tcp::DATA), (&[0; 1400], tcp::ACK | tcp::DATA)] {
            let mut bytes = packet(&dialled, tcp::ACK, 1, 1, data);
            // What a short frame is filled up with is no data.
            bytes.extend([0; 6]);
            assert_eq!(parse(&bytes).tcp_flags, flags, "{} bytes", data.len());
        }
    }
}

#[test]
fn a_port_that_the_cni_masquerades_with_is_not_ours_to_translate_back() {
    for proto in [Proto::TCP, Proto::UDP] {
        let mut world = World::new();
        let service = world.add_service(&[("10.244.2.7", 80, false)], proto);
        world.add_frontend(service, "0.0.0.0", 30080, proto, 0);
        // Behind the hooks, the source is rewritten before us, by chance or to keep it with the port that we would take.
        let dialled = tuple("203.0.113.5", 5000, "192.0.2.1", 30080, proto);
        let masqueraded = tuple("192.0.2.1", 5000, "10.244.2.7", 80, proto);
        let answer = packet(&masqueraded.reversed(), tcp::SYN | tcp::ACK, 500, 101, b"answer");
        for round in 0..3 {
            let flags = if round == 0 { tcp::SYN } else { tcp::ACK };
            let inside = enters(&world, packet(&dialled, flags, 100, 501, b"question")).expect("in");
            assert_eq!(tuple_of(&inside).src, dialled.src);
            let outside = packet(&masqueraded, flags, 100, 501, b"question");
            assert_eq!(leaves(&world, outside.clone()), Ok(outside));
            assert_eq!(enters(&world, answer.clone()), Ok(answer.clone()), "{proto}: the kernel's");
            let restored = packet(&tuple_of(&inside).reversed(), tcp::SYN | tcp::ACK, 500, 101, b"answer");
            assert_eq!(tuple_of(&leaves(&world, restored).expect("out")), dialled.reversed());
        }
        assert_eq!(established(&world), 2, "{proto}: front and plain");
        assert!(!world.pending.borrow().keys().any(|key| key.kind == FlowKey::SNAT), "{proto}: the port is free");
        let error = too_big(addr("10.244.2.1"), &packet(&masqueraded, tcp::ACK, 1, 1, b"12345678"));
        assert_eq!(enters(&world, error.clone()), Ok(error), "{proto}: an error about it");
        if proto == Proto::TCP {
            // Another connection gets the port, and keeps it when the first one is over.
            let other = open(&world, Tuple { src: addr("203.0.113.6"), ..dialled });
            assert_eq!(other.seen, masqueraded);
            let inside = enters(&world, packet(&dialled, tcp::FIN | tcp::ACK, 108, 507, b"")).expect("in");
            let fin = packet(&tuple_of(&inside).reversed(), tcp::FIN | tcp::ACK, 507, 109, b"");
            leaves(&world, fin).expect("out");
            enters(&world, packet(&dialled, tcp::SYN, 1000, 0, b"")).expect("in");
            reply(&world, &other, tcp::ACK, 501);
        }
    }
}

#[test]
fn a_connection_opened_in_a_pods_name_leaves_the_pods_own_alone() {
    let world = with_service(Proto::TCP);
    let (pod, forger) = (world.ifindex.get(), world.ifindex.get() + 1);
    world.ifindex.set(forger);
    let syn = |tuple: &Tuple| packet(tuple, tcp::SYN, 0xdead_beef, 0, b"");
    let inside = enters(&world, syn(&tuple("10.244.1.50", 4000, "10.96.0.10", 80, Proto::TCP))).expect("in");
    let own = tuple_of(&inside);
    enters(&world, syn(&own)).expect("the same ends, directly");
    world.ifindex.set(pod);
    let connection = open(&world, own);
    reply(&world, &connection, tcp::ACK, 501);
    send(&world, &connection, tcp::ACK, 507);
}

#[test]
fn a_beginning_that_lost_an_entry_heals_with_the_next_packet() {
    for proto in [Proto::TCP, Proto::UDP] {
        let mut world = World::new();
        let service = world.add_service(&[("10.244.2.7", 80, false)], proto);
        world.add_frontend(service, "0.0.0.0", 30080, proto, 0);
        world.add_frontend(service, "10.96.0.10", 80, proto, CLUSTER_IP);
        let at_port = |sport| tuple("203.0.113.5", sport, "192.0.2.1", 30080, proto);
        for (port, dialled) in
            (0..).zip([at_port(40000), at_port(5000), tuple("10.244.1.50", 5000, "10.96.0.10", 80, proto)])
        {
            for lost in [FlowKey::FRONT, FlowKey::PLAIN, FlowKey::SNAT] {
                let connection = dial(&world, dialled).expect("a service");
                // The kernel tracks it too, which does not make it another's.
                world.tracked.insert(connection.plain, Tracked::Plain);
                world.pending.borrow_mut().retain(|key, _| key.kind != lost);
                world.now.set(Seconds(world.now.get().0 + 1));
                let again = dial(&world, dialled).expect("a service");
                if lost != FlowKey::PLAIN {
                    assert_eq!(again.seen, connection.seen, "{proto} {port}: without {lost}");
                }
                reply(&world, &again, tcp::SYN | tcp::ACK, 500);
                // Once more, before the client confirms.
                if lost == FlowKey::SNAT {
                    world.pending.borrow_mut().retain(|key, _| key.kind != lost);
                }
                send(&world, &again, tcp::ACK, 501);
                assert_eq!(established(&world), if port < 2 { 3 } else { 2 }, "{proto} {port}: without {lost}");
                reply(&world, &again, tcp::ACK, 501);
                assert!(world.drops.borrow().is_empty());
                world.pending.borrow_mut().clear();
                world.established.borrow_mut().clear();
                world.tracked.clear();
            }
        }
    }
}

/// A segment that the sender of `tuple` did not send.
fn forge(world: &World, tuple: &Tuple, flags: u8) {
    let _ = leaves(world, enters(world, packet(tuple, flags, 0xdead_beef, 0, b"")).expect("in")).expect("out");
}

#[test]
fn forged_resets_and_beginnings_end_no_connection() {
    for (client, vip, port) in [("10.244.1.50", "10.96.0.10", 80), ("203.0.113.5", "192.0.2.1", 30080)] {
        let world = with_service(Proto::TCP);
        let connection = open(&world, tuple(client, 4000, vip, port, Proto::TCP));
        let entries = established(&world);
        forge(&world, &connection.dialled, tcp::RST);
        forge(&world, &connection.dialled, tcp::SYN);
        assert_eq!(established(&world), entries, "the backend has not said that it is over");
        // The backend answers the SYN with a challenge, which must reach the client.
        reply(&world, &connection, tcp::ACK, 501);
        send(&world, &connection, tcp::ACK, 507);
        reply(&world, &connection, tcp::ACK, 507);
    }
}

#[test]
fn a_forged_reset_does_not_free_the_ends_for_another_frontend() {
    let world = two_services(Proto::TCP);
    let connection = open(&world, tuple("10.244.1.50", 5555, "10.96.0.10", 80, Proto::TCP));
    forge(&world, &connection.dialled, tcp::RST);
    forge(&world, &tuple("10.244.1.50", 5555, "10.96.0.20", 80, Proto::TCP), tcp::SYN);
    reply(&world, &connection, tcp::ACK, 501);
    send(&world, &connection, tcp::ACK, 507);
}

#[test]
fn a_connection_that_goes_on_after_a_reset_is_kept() {
    let world = with_service(Proto::TCP);
    let connection = open(&world, tuple("203.0.113.5", 4000, "192.0.2.1", 30080, Proto::TCP));
    let (key, _) = connection.plain.plain_key();
    forge(&world, &connection.dialled, tcp::RST);
    reply(&world, &connection, tcp::ACK, 501);
    send(&world, &connection, tcp::ACK, 507);
    let hot = Hot::unpack(crate::tables::Lookups::established(&world, &key).expect("established").hot());
    let later = Seconds(world.now.get().0 + Seconds::span(3600));
    assert!(!is_expired(Proto::TCP, hot, later));
}

#[test]
fn a_client_that_reset_its_connection_opens_the_next_by_the_same_port() {
    let world = with_service(Proto::TCP);
    let first = open(&world, tuple("203.0.113.5", 4000, "192.0.2.1", 30080, Proto::TCP));
    send(&world, &first, tcp::FIN | tcp::ACK, 501);
    send(&world, &first, tcp::RST, 0);
    let entries = established(&world);
    let second = open(&world, first.dialled);
    assert_eq!((second.seen, established(&world)), (first.seen, entries));
    reply(&world, &second, tcp::FIN | tcp::ACK, 501);
    let (key, _) = second.plain.plain_key();
    let hot = Hot::unpack(crate::tables::Lookups::established(&world, &key).expect("established").hot());
    assert!(!hot.is_finished(), "the first one's FIN is not the second's");
}

#[test]
fn later_fragments_go_where_the_first_went() {
    let world = with_service(Proto::UDP);
    let dialled = tuple("203.0.113.5", 4000, "192.0.2.1", 30080, Proto::UDP);
    let mut first = packet(&dialled, 0, 0, 0, &[7; 64]);
    let mut later = first.clone();
    // More fragments; then offset 8. The header checksum follows.
    for (bytes, field) in [(&mut first, 0x2000u16), (&mut later, 8)] {
        bytes[6..8].copy_from_slice(&field.to_be_bytes());
        bytes[10..12].copy_from_slice(&[0, 0]);
        let checksum = !fold(sum(&bytes[..20]));
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    assert_eq!(enters(&world, later.clone()), Ok(later.clone()), "to the node's own address it may be anybody's");
    leaves(&world, first.clone()).expect("out");
    assert!(world.fragments.borrow().is_empty(), "what no flow translates has no part that one does");
    let arrived = leaves(&world, enters(&world, first).expect("in")).expect("out");
    let mut parsed = parse(&later);
    let Verdict::Rewrite(rewrite) = ingress(&world, &mut parsed) else { panic!("not translated") };
    assert!(apply(&mut Slice(&mut later), &parsed, End::Destination, &rewrite));
    assert_eq!(later[16..20], octets(rewrite.addr)[..], "destination");
    assert_eq!(fold(sum(&later[..20])), 0xffff, "header checksum");
    let mut parsed = parse(&later);
    match egress(&world, &mut parsed) {
        Verdict::Rewrite(rewrite) => assert_eq!(rewrite.addr, tuple_of(&arrived).src),
        other => assert_eq!((other, tuple_of(&arrived).src), (Verdict::Pass, addr("203.0.113.5"))),
    }
}

#[test]
fn a_cluster_ip_masquerades_everybody_where_that_is_wanted_and_nothing_else_does() {
    for proto in [Proto::TCP, Proto::UDP] {
        let mut world = with_service(proto);
        world.config.flags |= crate::abi::config::Config::MASQUERADE_ALL;
        world.source = Some(addr("192.0.2.1"));
        // Enough connections to meet the backends here and elsewhere.
        for port in 2000..2040 {
            let connection = open(&world, tuple("10.244.1.50", port, "10.96.0.10", 80, proto));
            assert_eq!(connection.seen.src, addr("192.0.2.1"), "{:?}", connection.seen);
            let connection = open(&world, tuple("10.244.1.50", port, "198.51.100.9", 80, proto));
            assert_eq!(connection.seen.src, addr("10.244.1.50"), "{:?}", connection.seen);
        }
        // Sockets of pods are left to packets, which alone can do that.
        let dialled = |netns, text| crate::lb::socket::Dial {
            addr: addr(text),
            port: Port(80).be(),
            proto,
            socket: 7,
            netns,
            bound: false,
            now: world.now.get(),
        };
        use crate::lb::socket::{Verdict, dial};
        assert_eq!(dial(&world, &dialled(2, "10.96.0.10")), Verdict::Leave);
        assert!(matches!(dial(&world, &dialled(1, "10.96.0.10")), Verdict::Translate(_)));
        assert!(matches!(dial(&world, &dialled(2, "198.51.100.9")), Verdict::Translate(_)));
    }
}
