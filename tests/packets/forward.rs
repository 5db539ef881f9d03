//! Connections to local backends: the destination changes on the way in, the source of the answer on the way out.

use shunt_tests::nat::Hook;
use shunt_tests::packet::{Checksum, Packet, flag, proto};
use shunt_tests::topology::Family;

use crate::lab::{Device, Lab, Proto, each, tcp, udp};
use crate::world::{self, Name};

#[test]
fn outside_clients_reach_a_local_backend_by_every_frontend_and_keep_their_address() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (port, frontend) in (4000..).zip(Name::Local.frontends(family)) {
            let client = world::outside(1).port(family, port);
            let seen = lab.converse(proto, client, frontend);
            assert_eq!((seen.src(), seen.dst()), (client, world::pod(1).port(family, world::TARGET)));
        }
    });
}

#[test]
fn pods_of_the_node_reach_local_and_remote_backends_and_keep_their_address() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for name in [Name::Local, Name::Remote] {
            for (port, frontend) in (40_000..).zip(name.frontends(family)) {
                let client = world::pod(2).port(family, port);
                assert_eq!(lab.converse(proto, client, frontend).src(), client);
            }
        }
    });
}

#[test]
fn connections_spread_over_all_backends() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let frontend = Name::Mixed.cluster_ip().port(family, world::PORT);
        let pick = |port| lab.open(proto, world::pod(2).port(family, port), frontend).dst();
        let backends: std::collections::BTreeSet<_> = (1000..1100).map(pick).collect();
        // The chance that a hundred picks miss one of four is 10^-12.
        assert_eq!(backends.len(), 4);
    });
}

#[test]
fn retransmitted_opening_keeps_its_backend() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for port in 1000..1020 {
            let (client, frontend) =
                (world::outside(1).port(family, port), Name::Mixed.vip().port(family, world::PORT));
            let first = lab.open(proto, client, frontend);
            assert_eq!(lab.open(proto, client, frontend), first);
        }
    });
}

#[test]
fn translated_packets_are_not_translated_again() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Local.vip().port(family, world::PORT));
        let opening = lab.opening(proto, client, frontend);
        let inside = lab.step(Hook::Ingress, Device::Eth0, &opening).expect("it opens");
        // Bridges, VLANs and tunnels bring a packet to several devices.
        let inside = Packet { link: lab.link(Device::Pod(2)), ..inside };
        let again = lab.step(Hook::Ingress, Device::Pod(2), &inside);
        assert_eq!(again, Some(inside));
    });
}

#[test]
fn options_and_extension_headers_and_tags_stay() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let frontend = Name::Local.vip().port(family, world::PORT);
        for variant in 0..4_u16 {
            let client = world::outside(2).port(family, 5000 + variant);
            let mut packet = lab.opening(proto, client, frontend);
            match (variant, family) {
                (0, _) => packet.link.tags = vec![(0x8100, 0x2005)],
                (1, _) => packet.link.tags = vec![(0x88a8, 7), (0x8100, 8)],
                (2, Family::V4) => packet.ip.options = vec![7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1],
                (3, Family::V4) => packet.ip.options = vec![1; 40],
                (2, Family::V6) => packet.ip.extensions = vec![(proto::HOP_BY_HOP, vec![1, 4, 0, 0, 0, 0])],
                (_, Family::V6) => {
                    let destination = (proto::DESTINATION, vec![1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                    packet.ip.extensions = vec![(proto::HOP_BY_HOP, vec![1, 4, 0, 0, 0, 0]), destination];
                }
                _ => unreachable!("four variants"),
            }
            let seen = lab.through(&packet).expect("it opens");
            assert_eq!(seen.dst(), world::pod(1).port(family, world::TARGET), "{packet:?}");
        }
    });
}

#[test]
fn udp_without_checksum_stays_without() {
    let mut lab = Lab::new();
    let (client, frontend) =
        (world::outside(1).port(Family::V4, 4000), Name::Remote.vip().port(Family::V4, world::PORT));
    let mut packet = lab.opening(Proto::Udp, client, frontend);
    udp(&mut packet).checksum = Checksum::None;
    let seen = lab.through(&packet).expect("it opens");
    assert_eq!(&seen.to_bytes()[40..42], [0, 0]);
}

#[test]
fn wrong_checksums_stay_wrong() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let mut packet = lab.opening(Proto::Tcp, client, frontend);
        tcp(&mut packet).checksum = Checksum::Wrong(0x1234);
        lab.through(&packet).expect("the receiver finds out");
    }
}

#[test]
fn every_control_bit_of_an_open_connection_passes() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let first = lab.converse(Proto::Tcp, client, frontend);
        for flags in [flag::ACK, flag::PSH | flag::ACK, flag::FIN | flag::ACK, flag::RST | flag::ACK, flag::RST] {
            let mut forward = lab.confirming(Proto::Tcp, client, frontend);
            tcp(&mut forward).flags = flags;
            lab.through(&forward).expect("it passes");
            let mut reply = lab.following(Proto::Tcp, first.dst(), first.src());
            tcp(&mut reply).flags = flags;
            lab.through(&reply).expect("it passes");
        }
    }
}

#[test]
fn a_port_that_is_used_again_gets_a_new_connection() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Mixed.vip().port(family, world::PORT));
        let mut backends = std::collections::BTreeSet::new();
        for round in 0..20 {
            let first = lab.converse(Proto::Tcp, client, frontend);
            backends.insert(first.dst());
            // Ended by a reset of the client, of the backend, or by both in order.
            let (by_client, by_backend) =
                [(flag::RST, 0), (0, flag::RST), (flag::FIN | flag::ACK, flag::FIN | flag::ACK)][round % 3];
            for (packet, flags) in [
                (lab.confirming(Proto::Tcp, client, frontend), by_client),
                (lab.following(Proto::Tcp, first.dst(), first.src()), by_backend),
            ] {
                if flags != 0 {
                    let mut packet = packet;
                    tcp(&mut packet).flags = flags;
                    lab.through(&packet).expect("the end comes through");
                }
            }
        }
        assert!(!backends.is_empty());
    }
}
