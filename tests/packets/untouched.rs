//! What is not ours goes through as it is: bytes, counters, everything; and no bytes at all can hurt.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use shunt_tests::nat::Hook;
use shunt_tests::packet::{Body, Icmp, Ip, Packet};
use shunt_tests::topology::Family;

use crate::datapath::Outcome;
use crate::lab::{Device, Lab, each};
use crate::world::{self, Name};

#[test]
fn direct_traffic_passes() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let ends = [world::outside(1), world::pod(1), world::pod(2), world::remote_pod(1), world::node()];
        for (a, b) in ends.iter().flat_map(|a| ends.iter().map(move |b| (a, b))).filter(|(a, b)| a != b) {
            let packet = lab.opening(proto, a.port(family, 50_000), b.port(family, world::TARGET));
            assert_eq!(
                lab.through(&packet).as_ref().map(|out| (out.src(), out.dst())),
                Some((packet.src(), packet.dst()))
            );
        }
    });
}

#[test]
fn frames_for_others_and_for_many_pass() {
    let lab = Lab::new();
    each(|family, proto| {
        let frontend = Name::Local.vip().port(family, world::PORT);
        let packet = lab.opening(proto, world::outside(1).port(family, 4000), frontend);
        for dst in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 9, 9, 9, 9, 9]] {
            let mut frame = packet.clone();
            frame.link.dst = dst;
            let bytes = frame.to_bytes();
            assert_eq!(lab.peek(Hook::Ingress, Device::Eth0, &frame), Outcome::Next(bytes));
        }
    });
}

#[test]
fn other_protocols_pass_between_others() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let ip = Ip::new(world::outside(1).get(family), world::pod(1).get(family));
        let echo = Icmp { kind: if family == Family::V4 { 8 } else { 128 }, code: 0, rest: 7, data: vec![1; 56] };
        for body in
            [Body::Icmp(echo), Body::Other(132, vec![0; 40]), Body::Other(47, vec![0; 3]), Body::Other(50, vec![])]
        {
            let packet = Packet { link: lab.link(Device::Eth0), ip: ip.clone(), body, part: None };
            lab.through(&packet).expect("it passes");
        }
    }
}

/// The shortest frame of that type that a test run takes: one byte after the link header, and whole IP headers.
fn shortest(bytes: &[u8]) -> usize {
    match bytes[12..14] {
        [0x08, 0x00] => 34,
        [0x86, 0xdd] => 54,
        _ => 15,
    }
}

/// Bytes that are a packet up to somewhere: cut, or with some bytes changed, or noise altogether.
pub fn frames(lab: &Lab) -> impl Strategy<Value = Vec<u8>> + use<> {
    let mut models: Vec<Vec<u8>> = Vec::new();
    for family in Family::ALL {
        for proto in crate::lab::Proto::ALL {
            let (client, frontend) =
                (world::outside(1).port(family, 4000), Name::Mixed.vip().port(family, world::PORT));
            let packet = lab.opening(proto, client, frontend);
            let error = crate::lab::too_big(&packet);
            models.push(packet.to_bytes());
            models.push(lab.following(proto, client, frontend).to_bytes());
            models.push(packet.fragment(3, 0, 48).to_bytes());
            models.push(Packet::error(packet.link.clone(), client.ip(), frontend.ip(), error).to_bytes());
            let mut dressed = packet;
            dressed.link.tags = vec![(0x8100, 1)];
            dressed.ip.options = if family == Family::V4 { vec![1; 12] } else { vec![] };
            dressed.ip.extensions =
                if family == Family::V4 { vec![] } else { vec![(0, vec![1, 4, 0, 0, 0, 0]), (60, vec![0; 6])] };
            models.push(dressed.to_bytes());
        }
    }
    let mac = lab.link(Device::Eth0);
    let changed = (
        prop::sample::select(models),
        any::<prop::sample::Index>(),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    )
        .prop_map(|(mut bytes, cut, changes)| {
            for (at, byte) in changes {
                let position = 12 + at.index(bytes.len() - 12);
                bytes[position] = byte;
            }
            // A third of them whole.
            let length = shortest(&bytes) + cut.index(bytes.len() * 3 / 2);
            bytes.truncate(length);
            bytes
        });
    let noise = prop::collection::vec(any::<u8>(), 3..200)
        .prop_map(move |noise| [&mac.dst[..], &mac.src[..], &noise[..]].concat())
        .prop_filter("a test run refuses it", |bytes| bytes.len() >= shortest(bytes));
    prop_oneof![4 => changed, 1 => noise]
}

#[test]
fn no_bytes_are_translated_into_something_malformed() {
    let lab = Lab::new();
    let mut runner = TestRunner::new(Config { cases: 20_000, failure_persistence: None, ..Config::default() });
    let is_sound = |bytes: Vec<u8>| {
        for hook in [Hook::Ingress, Hook::Egress] {
            let Outcome::Next(out) = lab.run_bytes(hook, Device::Eth0, &bytes) else { continue };
            prop_assert_eq!(out.len(), bytes.len());
            // What was whole and right stays so.
            if shunt_tests::packet::check(&bytes).is_ok() {
                prop_assert_eq!(shunt_tests::packet::check(&out), Ok(()));
            }
            // Link header, lengths, protocol: translation changes addresses, ports and checksums.
            let kept = bytes.len().min(18);
            prop_assert_eq!(&out[..kept], &bytes[..kept]);
        }
        Ok(())
    };
    runner.run(&frames(&lab), is_sound).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn cut_packets_are_not_translated() {
    let lab = Lab::new();
    each(|family, proto| {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Mixed.vip().port(family, world::PORT));
        let packet = lab.opening(proto, client, frontend);
        let bytes = packet.to_bytes();
        // All lengths that the kernel takes and that do not hold the ports; the header says there is more.
        for length in shortest(&bytes)..14 + packet.header_bytes() + 4 {
            let cut = &bytes[..length];
            match lab.run_bytes(Hook::Ingress, Device::Eth0, cut) {
                Outcome::Next(out) => assert_eq!(out, cut, "{length} bytes"),
                Outcome::Dropped => {}
                Outcome::Answered(answer) => panic!("{length} bytes are answered: {answer:?}"),
            }
        }
    });
}
