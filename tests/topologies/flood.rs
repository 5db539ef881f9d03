//! A flood of forged SYNs beside real connections.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};
use shunt_tests::probe::{LongLived, TcpLoop};
use shunt_tests::topology::{Family, Plan};
use socket2::{Domain, Protocol, Socket, Type};

use crate::rig::{Frontend, Offer, Rig};

const WEB: Offer = Offer::new(1, "web");
/// Packets a system call.
const BATCH: usize = 512;

/// An IPv4 packet with a SYN; checksums are left to be filled in.
fn syn(to: SocketAddr) -> [u8; 40] {
    let IpAddr::V4(ip) = to.ip() else { panic!("a flood of IPv4") };
    let mut packet = [0; 40];
    packet[..4].copy_from_slice(&[0x45, 0, 0, 40]);
    packet[8..10].copy_from_slice(&[64, 6]);
    packet[16..20].copy_from_slice(&ip.octets());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    packet[32..36].copy_from_slice(&[0x50, 2, 0xff, 0xff]);
    packet
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
}

/// Gives a SYN its source, number `number` of 198.18.0.0/15 (RFC 2544), and right checksums (RFC 1071).
fn forge(packet: &mut [u8; 40], number: u32) {
    let source = u32::from_be_bytes([198, 18, 0, 0]) + (number & 0x1ffff);
    let port = 1024 + (number >> 17) as u16;
    packet[12..16].copy_from_slice(&source.to_be_bytes());
    packet[20..22].copy_from_slice(&port.to_be_bytes());
    packet[24..28].copy_from_slice(&number.wrapping_mul(0x9e37_79b9).to_be_bytes());
    packet[10..12].fill(0);
    packet[36..38].fill(0);
    let header = !fold(sum(&packet[..20]));
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    let transport = !fold(sum(&packet[12..20]) + 6 + 20 + sum(&packet[20..]));
    packet[36..38].copy_from_slice(&transport.to_be_bytes());
}

/// Sends SYNs number `from` to `to` from this namespace. Panics on what is no passing lack of room.
fn flood(target: SocketAddr, from: u32, to: u32) {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).expect("a raw socket");
    socket.set_send_buffer_size(8 << 20).expect("a size");
    let IpAddr::V4(ip) = target.ip() else { panic!("a flood of IPv4") };
    let address = SockaddrIn::from(std::net::SocketAddrV4::new(ip, 0));
    let mut packets = vec![syn(target); BATCH];
    let mut headers = MultiHeaders::preallocate(BATCH, None);
    let mut next = from;
    while next < to {
        let count = BATCH.min((to - next) as usize);
        for (packet, number) in packets.iter_mut().zip(next..) {
            forge(packet, number);
        }
        let parts: Vec<[io::IoSlice<'_>; 1]> =
            packets[..count].iter().map(|packet| [io::IoSlice::new(packet)]).collect();
        let addresses = vec![Some(address); count];
        let sent = sendmmsg(socket.as_raw_fd(), &mut headers, &parts, &addresses, [], MsgFlags::empty());
        match sent {
            Ok(sent) => next += sent.count() as u32,
            Err(nix::errno::Errno::ENOBUFS) => {}
            Err(error) => panic!("SYN {next}: {error}"),
        }
    }
}

/// Floods the NodePort of a service whose backend is on node number `backend`, with connections of all kinds beside.
///
/// Towards a backend of another node there are fewer source ports than forged connections: new ones take the port of the
/// oldest beginning, and a client whose port the backend remembers sends its SYN again by another. These clients dial once.
#[track_caller]
fn nobody_suffers(plan: Plan, backend: usize, syns: u32) {
    let rig = Rig::build(plan);
    let client = &rig.cluster.client.place;
    let node = rig.node(0);
    let pod = &rig.node(backend).pods[0];
    rig.apply(&[&WEB.to(pod)]);
    // Answers to forged sources end at the next hop, not as errors.
    rig.cluster.net.ns().ip(["route add blackhole 198.18.0.0/15"]);
    // The backend must go on answering: cookies once its queue is full (RFC 4987).
    pod.place.ns().sysctl("net/ipv4/tcp_syncookies", "1");
    let unhooked = node.pods[1].place.unhooked();
    let from_outside = WEB.at(Frontend::NodePort, node, Family::V4);
    let from_pod = WEB.at(Frontend::ClusterIp, node, Family::V4);
    let dialled = [(client, from_outside), (&unhooked, from_pod)];
    let long = |to| LongLived { to, connections: 20, interval_ms: 20 };
    let mut live: Vec<_> = dialled.iter().map(|(place, to)| place.long_lived(long(*to))).collect();
    live.iter_mut().for_each(|load| drop(load.wait_for("open connections", |stats| stats.open == 20)));
    let short = |to| TcpLoop { to: vec![to], rate: 50, workers: 2, count: None };
    let mut new: Vec<_> = dialled.iter().map(|(place, to)| place.tcp_loop(short(*to))).collect();
    let ((), counted) = rig.counted(0, || client.run(|| flood(from_outside, 0, syns)));
    assert!(counted.packets >= 2 * u64::from(syns) * 9 / 10, "the flood was not answered: {counted:?}");
    for load in &mut live {
        load.wait_answers(100);
        assert_eq!(load.stats().open, 20);
    }
    new.iter_mut().for_each(|load| drop(load.wait_answers(20)));
    live.into_iter().chain(new).for_each(|load| drop(load.finish_clean()));
}

#[test]
fn a_million_forged_syns_lose_no_connection_and_hinder_no_new_one() {
    nobody_suffers(Plan::default(), 0, 1_000_000);
}

/// Fifty times as many as there are ports for rewritten sources.
#[test]
fn forged_syns_to_a_backend_of_another_node_do_not_use_up_the_source_ports() {
    nobody_suffers(Plan { nodes: 2, ..Plan::default() }, 1, 1_000_000);
}
