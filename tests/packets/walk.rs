//! A long random walk: connections of all kinds open, talk, clash and fail side by side, every packet compared with the reference.

use std::net::SocketAddr;

use shunt_tests::nat::Hook;
use shunt_tests::packet::{Error, Packet};
use shunt_tests::topology::{Addrs, Family};

use crate::lab::{Device, Lab, Proto, too_big};
use crate::world::{self, Name};

/// Noise that is the same everywhere: xorshift64 (Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % sides
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }
}

/// A connection that the walk has opened.
#[derive(Clone)]
struct Open {
    proto: Proto,
    client: SocketAddr,
    frontend: SocketAddr,
    /// Its first packet as the backend sees it.
    seen: Packet,
}

fn clients() -> Vec<Addrs> {
    let outside = (1..=3).map(world::outside);
    let pods = (1..=2).map(world::pod);
    outside.chain(pods).chain([world::remote_pod(8), world::remote_pod(1)]).collect()
}

const NAMES: [Name; 6] = [Name::Local, Name::Twin, Name::Remote, Name::RemoteTwin, Name::Mixed, Name::Restricted];
/// Few, so that connections clash; of the host's range and not.
const PORTS: [u16; 5] = [4000, 4001, 12_000, 40_000, 40_001];
/// Bytes of the body that errors quote: ports, not all of the header, all of it, and more.
const QUOTED: [usize; 6] = [8, 11, 16, 20, 33, 1000];

fn open(lab: &mut Lab, dice: &mut Dice) -> Option<Open> {
    let (family, proto) = (dice.pick(&Family::ALL), dice.pick(&Proto::ALL));
    let client = dice.pick(&clients()).port(family, dice.pick(&PORTS));
    let frontends = dice.pick(&NAMES).frontends(family);
    let frontend = dice.pick(&frontends);
    let opening = lab.opening(proto, client, frontend);
    // A pod that is a backend may get itself: through its own device.
    let seen = lab.through(&opening)?;
    let answer = lab.answer(proto, &seen);
    lab.through(&answer).expect("the answer comes through");
    let confirming = lab.confirming(proto, client, frontend);
    lab.through(&confirming).expect("the connection is open");
    Some(Open { proto, client, frontend, seen })
}

fn talk(lab: &mut Lab, open: &Open) {
    let forward = lab.confirming(open.proto, open.client, open.frontend);
    let got = lab.through(&forward).expect("the connection is open");
    assert_eq!((got.src(), got.dst()), (open.seen.src(), open.seen.dst()));
}

fn reply(lab: &mut Lab, open: &Open) {
    let reply = lab.following(open.proto, open.seen.dst(), open.seen.src());
    let got = lab.through(&reply).expect("the connection is open");
    assert_eq!((got.src(), got.dst()), (open.frontend, open.client));
}

fn fail_forward(lab: &mut Lab, dice: &mut Dice, open: &Open) {
    let beyond = lab.device_of(open.seen.ip.dst);
    let error = Error { quoted_bytes: open.seen.header_bytes() + dice.pick(&QUOTED), ..too_big(&open.seen) };
    let packet = Packet::error(lab.link(beyond), open.seen.ip.dst, open.seen.ip.src, error);
    lab.through_from(beyond, &packet).expect("it comes through");
}

fn fail_back(lab: &mut Lab, dice: &mut Dice, open: &Open) {
    let before = lab.device_of(open.client.ip());
    let answer = lab.following(open.proto, open.frontend, open.client);
    let error = Error { quoted_bytes: answer.header_bytes() + dice.pick(&QUOTED), ..too_big(&answer) };
    let packet = Packet::error(lab.link(before), open.client.ip(), open.frontend.ip(), error);
    lab.through_from(before, &packet).expect("it comes through");
}

fn fragments(lab: &mut Lab, open: &Open, id: u32) {
    let whole = lab.confirming(open.proto, open.client, open.frontend);
    for (from, to) in [(0, 24), (24, 64), (64, 10_000)] {
        let got = lab.through(&whole.fragment(id, from, to)).expect("it comes through");
        assert_eq!((got.src(), got.dst()), (open.seen.src(), open.seen.dst()));
    }
}

fn stranger(lab: &mut Lab, dice: &mut Dice) {
    let (family, proto) = (dice.pick(&Family::ALL), dice.pick(&Proto::ALL));
    let to = dice.pick(&[world::node(), world::pod(1), world::outside(9)]).port(family, dice.pick(&[22, 443, 50_000]));
    let packet = lab.following(proto, world::outside(4).port(family, dice.pick(&PORTS)), to);
    assert_eq!(lab.step(Hook::Ingress, Device::Eth0, &packet), Some(packet));
}

fn walk(lab: &mut Lab, seed: u64, steps: u32) {
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let mut opened: Vec<Open> = Vec::new();
    for step in 0..steps {
        let known = opened.get(dice.roll(opened.len().max(1))).cloned();
        match (dice.roll(8), known) {
            (0 | 1, _) | (_, None) => opened.extend(open(lab, &mut dice)),
            (2, Some(open)) => talk(lab, &open),
            (3, Some(open)) => reply(lab, &open),
            (4, Some(open)) => fail_forward(lab, &mut dice, &open),
            (5, Some(open)) => fail_back(lab, &mut dice, &open),
            (6, Some(open)) => fragments(lab, &open, step),
            _ => stranger(lab, &mut dice),
        }
    }
    assert!(opened.len() > 100, "the walk opened {} connections", opened.len());
}

#[test]
fn random_walks_agree_with_the_reference() {
    for seed in [1, 0x5eed, 0xdead_beef_cafe] {
        walk(&mut Lab::new(), seed, 3000);
    }
}

#[test]
fn random_walks_behind_xdp_agree_with_the_reference() {
    for seed in [2, 0x5eed_cafe] {
        let ((), ahead) = Lab::with_xdp().ahead(|lab| walk(lab, seed, 3000));
        // It has its share of the work, and leaves the rest.
        assert!(ahead.translated > 100 && ahead.passed > 100, "{ahead:?}");
    }
}
