//! XDP on the uplink: what it does instead of the ingress hook behind it is what that would have done, byte for byte; the
//! rest passes as it came. [`Lab::with_xdp`] checks both for every packet; here is told which packets are which.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use shunt_tests::nat::{Hook, check_answer};
use shunt_tests::packet::{Packet, assert_frame, check, flag, proto};
use shunt_tests::topology::{Family, SERVICES};

use crate::datapath::Outcome;
use crate::lab::{Ahead, Device, Lab, Proto, each, tcp, too_big};
use crate::untouched::frames;
use crate::world::{self, Name};

const PASSED: Ahead = Ahead { passed: 1, translated: 0, refused: 0 };
const TRANSLATED: Ahead = Ahead { passed: 0, translated: 1, refused: 0 };
const REFUSED: Ahead = Ahead { passed: 0, translated: 0, refused: 1 };

/// What a packet from outside becomes in the node, and who did it.
#[track_caller]
fn enter(lab: &mut Lab, packet: &Packet) -> (Option<Packet>, Ahead) {
    lab.ahead(|lab| lab.step(Hook::Ingress, Device::Eth0, packet))
}

/// Links with a tag, headers with options or extensions.
fn dressed(packet: &Packet, variant: usize) -> Packet {
    let mut packet = packet.clone();
    let hop_by_hop = (proto::HOP_BY_HOP, vec![1, 4, 0, 0, 0, 0]);
    match (variant, packet.is_v4()) {
        (0, _) => {}
        (1, _) => packet.link.tags = vec![(0x8100, 0x2005)],
        (2, _) => packet.link.tags = vec![(0x88a8, 7), (0x8100, 8)],
        (3, true) => packet.ip.options = vec![7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        (_, true) => packet.ip.options = vec![1; 40],
        (3, false) => packet.ip.extensions = vec![hop_by_hop],
        (_, false) => packet.ip.extensions = vec![hop_by_hop, (proto::DESTINATION, vec![1, 4, 0, 0, 0, 0])],
    }
    packet
}

const VARIANTS: usize = 5;

#[test]
fn segments_of_established_connections_go_to_their_backend() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        for name in [Name::Local, Name::Remote, Name::Mixed] {
            for (port, frontend) in (4000..).zip(name.frontends(family)) {
                let client = world::outside(1).port(family, port);
                let seen = lab.converse(Proto::Tcp, client, frontend);
                for variant in 0..VARIANTS {
                    let more = dressed(&lab.confirming(Proto::Tcp, client, frontend), variant);
                    let (inside, ahead) = enter(&mut lab, &more);
                    assert_eq!((inside.expect("it passes").dst(), ahead), (seen.dst(), TRANSLATED), "{more:?}");
                }
            }
        }
    }
}

#[test]
fn replies_to_a_rewritten_source_go_to_the_client() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let seen = lab.open(Proto::Tcp, client, frontend);
        assert_eq!(seen.src().ip(), world::node().get(family));
        let answer = lab.answer(Proto::Tcp, &seen);
        let (inside, ahead) = enter(&mut lab, &answer);
        assert_eq!((inside.expect("it passes").dst(), ahead), (client, PASSED), "the answer to the SYN");
        lab.converse(Proto::Tcp, client, frontend);
        for variant in 0..VARIANTS {
            for flags in [flag::ACK, flag::ACK | flag::PSH, flag::FIN | flag::ACK, flag::RST] {
                let mut reply = dressed(&lab.following(Proto::Tcp, seen.dst(), seen.src()), variant);
                tcp(&mut reply).flags = flags;
                let (inside, ahead) = enter(&mut lab, &reply);
                assert_eq!((inside.expect("it passes").dst(), ahead), (client, TRANSLATED), "{reply:?}");
            }
        }
    }
}

#[test]
fn what_opens_or_ends_a_connection_passes() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Local.vip().port(family, world::PORT));
        let opening = lab.opening(Proto::Tcp, client, frontend);
        assert_eq!(enter(&mut lab, &opening).1, PASSED);
        lab.converse(Proto::Tcp, client, frontend);
        for flags in [flag::SYN, flag::FIN | flag::ACK, flag::RST | flag::ACK, flag::RST, flag::SYN | flag::ACK] {
            let mut packet = lab.confirming(Proto::Tcp, client, frontend);
            tcp(&mut packet).flags = flags;
            let (_, ahead) = enter(&mut lab, &packet);
            assert_eq!(ahead, PASSED, "{flags:#x}");
        }
    }
}

#[test]
fn the_segment_that_proves_a_connection_passes() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Local.vip().port(family, world::PORT));
        let seen = lab.open(Proto::Tcp, client, frontend);
        let answer = lab.answer(Proto::Tcp, &seen);
        lab.through(&answer).expect("it passes");
        let confirming = lab.confirming(Proto::Tcp, client, frontend);
        assert_eq!(enter(&mut lab, &confirming).1, PASSED, "tcx must see it");
        assert_eq!(enter(&mut lab, &confirming).1, TRANSLATED, "and it has");
    }
}

#[test]
fn datagrams_errors_and_fragments_pass() {
    let mut lab = Lab::with_xdp();
    each(|family, proto| {
        for (port, name) in (4000..).zip([Name::Local, Name::Remote]) {
            let (client, frontend) = (world::outside(1).port(family, port), name.vip().port(family, world::PORT));
            let seen = lab.converse(proto, client, frontend);
            let forward = lab.confirming(proto, client, frontend);
            let mut packets = vec![forward.fragment(9, 0, 64), forward.fragment(9, 64, 1000)];
            let about_reply = too_big(&lab.following(proto, frontend, client));
            packets.push(Packet::error(lab.link(Device::Eth0), client.ip(), frontend.ip(), about_reply));
            if proto == Proto::Udp {
                packets.push(forward);
            }
            if name == Name::Remote {
                let about_forward = too_big(&seen);
                packets.push(Packet::error(lab.link(Device::Eth0), seen.ip.dst, seen.ip.src, about_forward));
                let reply = lab.following(proto, seen.dst(), seen.src());
                packets.extend((proto == Proto::Udp).then_some(reply));
            }
            for packet in packets {
                let (out, ahead) = enter(&mut lab, &packet);
                assert_eq!((out.is_some(), ahead), (true, PASSED), "{packet:?}");
            }
        }
    });
}

#[test]
fn direct_traffic_passes() {
    let mut lab = Lab::with_xdp();
    each(|family, proto| {
        for target in [world::pod(1), world::pod(2), world::node(), world::outside(9)] {
            for port in [22, world::TARGET, 50_000] {
                for packet in [
                    lab.opening(proto, world::outside(1).port(family, 4000), target.port(family, port)),
                    lab.following(proto, world::outside(1).port(family, 4000), target.port(family, port)),
                ] {
                    assert_eq!(enter(&mut lab, &packet), (Some(packet), PASSED));
                }
            }
        }
    });
}

/// The translated packet would have the ends of a direct connection whose port ingress changes on this very device.
#[test]
fn a_connection_beside_a_direct_one_with_its_ends_is_left_to_ingress() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        let client = world::outside(1).port(family, 4000);
        let (frontend, backend) =
            (Name::Local.vip().port(family, world::PORT), world::pod(1).port(family, world::TARGET));
        let through = lab.converse(Proto::Tcp, client, frontend);
        let more = lab.confirming(Proto::Tcp, client, frontend);
        assert_eq!(enter(&mut lab, &more).1, TRANSLATED);
        let direct = lab.converse(Proto::Tcp, client, backend);
        assert_ne!(direct.src(), through.src());
        for (to, seen, by_xdp) in [(frontend, &through, PASSED), (backend, &direct, TRANSLATED)] {
            let more = lab.confirming(Proto::Tcp, client, to);
            let (inside, ahead) = enter(&mut lab, &more);
            assert_eq!((inside.expect("it passes").src(), ahead), (seen.src(), by_xdp));
        }
    }
}

#[test]
fn connections_that_nobody_serves_are_reset_and_datagrams_pass() {
    let mut lab = Lab::with_xdp();
    each(|family, proto| {
        let unknown = Name::Local.cluster_ip().port(family, world::NO_PORT);
        for (port, frontend) in (4000..).zip(Name::Empty.frontends(family).into_iter().chain([unknown])) {
            let (variants, by_xdp) = if proto == Proto::Tcp { (VARIANTS, REFUSED) } else { (1, PASSED) };
            for variant in 0..variants {
                let opening = dressed(&lab.opening(proto, world::outside(1).port(family, port), frontend), variant);
                // Either way it is answered, and rightly: the lab has looked at the answer.
                assert_eq!(enter(&mut lab, &opening), (None, by_xdp), "{opening:?}");
            }
        }
    });
    let each = 2 * (VARIANTS as u64 + 1);
    assert_eq!((lab.drops["no_endpoint"], lab.drops["unknown_port"]), (3 * each, each));
}

/// Another proxy may know the address.
#[test]
fn unallocated_service_addresses_pass() {
    let mut lab = Lab::with_xdp();
    each(|family, proto| {
        let to = SERVICES.host(999).port(family, world::PORT);
        let opening = lab.opening(proto, world::outside(1).port(family, 4000), to);
        assert_eq!(enter(&mut lab, &opening), (Some(opening), PASSED));
    });
}

/// What is sent by a device that is no hardware may not arrive: the hook behind answers.
#[test]
fn resets_are_left_to_ingress_where_xdp_cannot_send() {
    let mut lab = Lab::with_xdp_flags(0);
    for family in Family::ALL {
        let client = world::outside(1).port(family, 4000);
        let opening = lab.opening(Proto::Tcp, client, Name::Empty.vip().port(family, world::PORT));
        assert_eq!(enter(&mut lab, &opening), (None, PASSED));
        let frontend = Name::Local.vip().port(family, world::PORT);
        lab.converse(Proto::Tcp, client, frontend);
        let more = lab.confirming(Proto::Tcp, client, frontend);
        assert_eq!(enter(&mut lab, &more).1, TRANSLATED);
    }
}

#[test]
fn a_beginning_with_data_or_padding_is_answered_with_the_right_number() {
    let lab = Lab::with_xdp();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Empty.vip().port(family, world::PORT));
        for (data, padding) in [(0, 6), (11, 0), (1400, 3), (8000, 0)] {
            let mut opening = lab.opening(Proto::Tcp, client, frontend);
            tcp(&mut opening).data = vec![7; data];
            let frame = [opening.to_bytes(), vec![0; padding]].concat();
            let Outcome::Answered(answer) = lab.run_xdp(&frame) else { panic!("{data} bytes are not answered") };
            check_answer(&opening, &answer).unwrap_or_else(|wrong| panic!("{wrong}, to {data} bytes: {answer:?}"));
        }
    }
}

#[test]
fn a_local_policy_without_local_endpoint_drops_in_silence() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        let (client, vip) = (world::outside(1).port(family, 4000), Name::LocalPolicy.vip().port(family, world::PORT));
        let opening = lab.opening(Proto::Tcp, client, vip);
        assert_eq!(enter(&mut lab, &opening), (None, REFUSED));
    }
    assert_eq!(lab.drops["no_local_endpoint"], 2);
}

#[test]
fn segments_of_no_connection_are_left_to_who_can_ask_the_kernel() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        for to in [Name::Local.cluster_ip(), Name::Empty.cluster_ip(), Name::Local.vip()] {
            let packet = lab.following(Proto::Tcp, world::outside(1).port(family, 4000), to.port(family, world::PORT));
            assert_eq!(enter(&mut lab, &packet).1, PASSED);
        }
    }
}

/// All that it would act on, to somebody else's MAC address.
#[test]
fn frames_for_others_and_for_many_pass() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        let client = world::outside(1).port(family, 4000);
        let frontend = Name::Local.vip().port(family, world::PORT);
        lab.converse(Proto::Tcp, client, frontend);
        let empty = Name::Empty.vip().port(family, world::PORT);
        for packet in [lab.confirming(Proto::Tcp, client, frontend), lab.opening(Proto::Tcp, client, empty)] {
            assert_ne!(lab.run_xdp(&packet.to_bytes()), Outcome::Next(packet.to_bytes()), "it acts on its own");
            for dst in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 9, 9, 9, 9, 9]] {
                let mut other = packet.clone();
                other.link.dst = dst;
                assert_eq!(lab.run_xdp(&other.to_bytes()), Outcome::Next(other.to_bytes()), "{other:?}");
            }
        }
    }
}

#[test]
fn a_device_without_a_record_is_left_alone() {
    let mut lab = Lab::with_xdp();
    let (client, frontend) =
        (world::outside(1).port(Family::V4, 4000), Name::Local.vip().port(Family::V4, world::PORT));
    lab.converse(Proto::Tcp, client, frontend);
    lab.forget_uplink();
    let more = lab.confirming(Proto::Tcp, client, frontend);
    assert_eq!(enter(&mut lab, &more).1, PASSED);
    let opening = lab.opening(Proto::Tcp, client, Name::Empty.vip().port(Family::V4, world::PORT));
    assert_eq!(enter(&mut lab, &opening), (None, PASSED), "the hook behind it answers");
}

/// Frames of several buffers: a test run of the hook behind cannot make them.
#[test]
fn jumbo_frames_are_translated() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Local.vip().port(family, world::PORT));
        let seen = lab.converse(Proto::Tcp, client, frontend);
        let mut more = lab.confirming(Proto::Tcp, client, frontend);
        tcp(&mut more).data = (0..8900).map(|at| at as u8).collect();
        let Outcome::Next(out) = lab.run_xdp(&more.to_bytes()) else { panic!("it passes") };
        assert_frame("a jumbo frame", &out, &more.with_dst(seen.dst()));
    }
}

#[test]
fn no_bytes_are_translated_into_something_malformed() {
    let mut lab = Lab::with_xdp();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Mixed.vip().port(family, world::PORT));
        lab.converse(Proto::Tcp, client, frontend);
    }
    let mut runner = TestRunner::new(Config { cases: 20_000, failure_persistence: None, ..Config::default() });
    let translated = std::cell::Cell::new(0);
    let is_sound = |bytes: Vec<u8>| {
        let Outcome::Next(out) = lab.run_xdp(&bytes) else { return Ok(()) };
        prop_assert_eq!(out.len(), bytes.len());
        if check(&bytes).is_ok() {
            prop_assert_eq!(check(&out), Ok(()));
        }
        let kept = bytes.len().min(18);
        prop_assert_eq!(&out[..kept], &bytes[..kept]);
        translated.set(translated.get() + u32::from(out != bytes));
        Ok(())
    };
    runner.run(&frames(&lab), is_sound).unwrap_or_else(|error| panic!("{error}"));
    assert!(translated.get() > 100, "only {} of them were translated at all", translated.get());
}
