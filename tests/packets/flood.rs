//! A flood of beginnings with forged senders pushes out its like, never a connection that has proven its way back.

use std::net::{Ipv4Addr, SocketAddr};

use shunt_tests::nat::Hook;
use shunt_tests::packet::Packet;
use shunt_tests::topology::Family;

use crate::datapath::Outcome;
use crate::lab::{Device, Lab, Proto, each};
use crate::world::{self, Name};

/// More than twice as many as pending flows have room.
const FORGED: u32 = 600_000;
/// More than there are ports for rewritten sources.
const FORGED_REMOTE: u32 = 25_000;

/// Beginnings of connections to `target`, each from another sender.
fn forged(lab: &Lab, target: SocketAddr, count: u32) -> impl Iterator<Item = Vec<u8>> + Send {
    let opening = lab.opening(Proto::Tcp, world::outside(1).port(Family::V4, 1), target);
    (0..count).map(move |number| {
        let address = Ipv4Addr::from_bits(0xc612_0000 + number / 16);
        opening.clone().with_src(SocketAddr::new(address.into(), 61_001 + (number % 16) as u16)).to_bytes()
    })
}

/// Connections of each kind, open and proven.
fn open_some(lab: &mut Lab) -> Vec<(Proto, SocketAddr, SocketAddr, Packet)> {
    let mut opened = Vec::new();
    each(|family, proto| {
        for (port, name) in (4000..4030).zip([Name::Local, Name::Remote, Name::Mixed].into_iter().cycle()) {
            let (client, frontend) = (world::outside(1).port(family, port), name.vip().port(family, world::PORT));
            opened.push((proto, client, frontend, lab.converse(proto, client, frontend)));
        }
    });
    opened
}

fn expect_alive(lab: &mut Lab, opened: &[(Proto, SocketAddr, SocketAddr, Packet)]) {
    for (proto, client, frontend, seen) in opened {
        let more = lab.confirming(*proto, *client, *frontend);
        let got = lab.through(&more).expect("it goes on");
        assert_eq!((got.src(), got.dst()), (seen.src(), seen.dst()));
        let reply = lab.following(*proto, seen.dst(), seen.src());
        let got = lab.through(&reply).expect("it goes on");
        assert_eq!((got.src(), got.dst()), (*frontend, *client));
    }
}

#[test]
fn open_connections_outlive_a_flood_and_new_ones_open() {
    let mut lab = Lab::new();
    let opened = open_some(&mut lab);
    let frames = forged(&lab, Name::Local.vip().port(Family::V4, world::PORT), FORGED);
    let refused = lab.run_all(Hook::Ingress, Device::Eth0, frames, |outcome| !matches!(outcome, Outcome::Next(_)));
    assert_eq!(refused, 0, "no forged packet is told from a true one");
    expect_alive(&mut lab, &opened);
    each(|family, proto| {
        lab.converse(proto, world::outside(2).port(family, 5000), Name::Local.vip().port(family, world::PORT));
    });
}

#[test]
fn forged_beginnings_do_not_use_up_the_ports_of_a_remote_backend() {
    let mut lab = Lab::new();
    let opened = open_some(&mut lab);
    let frames = forged(&lab, Name::Remote.vip().port(Family::V4, world::PORT), FORGED_REMOTE);
    lab.run_all(Hook::Ingress, Device::Eth0, frames, |_| false);
    expect_alive(&mut lab, &opened);
    let (client, frontend) =
        (world::outside(2).port(Family::V4, 40_000), Name::Remote.vip().port(Family::V4, world::PORT));
    let opening = lab.opening(Proto::Tcp, client, frontend);
    let outcome = lab.peek(Hook::Ingress, Device::Eth0, &opening);
    assert!(matches!(outcome, Outcome::Next(_)), "a new connection is refused: {outcome:?}");
}
