//! ICMP errors: whoever gets one finds the packet quoted that it sent itself.

use shunt_tests::nat::Hook;
use shunt_tests::packet::{Checksum, Error, Packet, error, flag};
use shunt_tests::topology::Family;

use crate::lab::{Device, Lab, Proto, each, too_big};
use crate::world::{self, Name};

/// Clients and frontends whose connections differ in what is translated: nothing but the destination; the source too; the port too.
fn connections(
    lab: &mut Lab,
    family: Family,
    proto: Proto,
) -> Vec<(std::net::SocketAddr, std::net::SocketAddr, Packet)> {
    let mut opened = Vec::new();
    for (client, name) in [
        (world::outside(1).port(family, 4000), Name::Local),
        (world::outside(1).port(family, 4000), Name::Twin),
        (world::outside(1).port(family, 40_000), Name::Remote),
        (world::outside(1).port(family, 40_000), Name::RemoteTwin),
        (world::pod(2).port(family, 4001), Name::Remote),
        (world::pod(1).port(family, 4002), Name::Local),
    ] {
        let frontend = name.cluster_ip().port(family, world::PORT);
        let seen = lab.converse(proto, client, frontend);
        opened.push((client, frontend, seen));
    }
    opened
}

#[test]
fn errors_about_a_clients_packet_reach_the_client() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (client, frontend, seen) in connections(&mut lab, family, proto) {
            let beyond = lab.device_of(seen.ip.dst);
            // From the backend itself, and from a router before it.
            for from in [seen.ip.dst, world::remote_pod(200).get(family)] {
                let error = Packet::error(lab.link(beyond), from, seen.ip.src, too_big(&seen));
                let got = lab.through_from(beyond, &error).expect("it comes through");
                assert_eq!(got.ip.dst, client.ip());
                let expected = if from == seen.ip.dst { frontend.ip() } else { from };
                assert_eq!(got.ip.src, expected);
                assert_eq!(quoted(&got), (client, frontend));
            }
        }
    });
}

#[test]
fn errors_about_a_backends_packet_reach_the_backend() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (client, frontend, seen) in connections(&mut lab, family, proto) {
            let before = lab.device_of(client.ip());
            let answer = lab.following(proto, frontend, client);
            // From the client itself, and from a router before it.
            for from in [client.ip(), world::outside(200).get(family)] {
                let error = Packet::error(lab.link(before), from, frontend.ip(), too_big(&answer));
                let got = lab.through_from(before, &error).expect("it comes through");
                assert_eq!(got.ip.dst, seen.ip.dst);
                assert_eq!(got.ip.src, if from == client.ip() { seen.ip.src } else { from });
                assert_eq!(quoted(&got), (seen.dst(), seen.src()));
            }
        }
    });
}

#[test]
fn the_nodes_own_errors_reach_the_client() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Local.vip().port(family, world::PORT));
        lab.converse(proto, client, frontend);
        let opening = lab.following(proto, client, frontend);
        let inside = lab.step(Hook::Ingress, Device::Eth0, &opening).expect("it passes");
        // The stack finds that the next link is too narrow for it.
        let error = Packet::error(lab.link(Device::Eth0), world::node().get(family), client.ip(), too_big(&inside));
        let got = lab.step(Hook::Egress, Device::Eth0, &error).expect("it leaves");
        assert_eq!(quoted(&got), (client, frontend));
    });
}

#[test]
fn short_and_long_quotes_are_translated() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let seen = lab.converse(proto, client, frontend);
        let header = seen.header_bytes();
        // Ports alone; without the TCP checksum and with it; an odd number; everything.
        for quoted_bytes in [header + 8, header + 9, header + 16, header + 20, 10_000] {
            let error = Error { quoted_bytes, ..too_big(&seen) };
            let packet = Packet::error(lab.link(Device::Eth0), seen.ip.dst, seen.ip.src, error);
            let got = lab.through(&packet).expect("it comes through");
            assert_eq!(quoted(&got), (client, frontend), "{quoted_bytes} bytes");
        }
    });
}

#[test]
fn quotes_with_options_and_extension_headers_are_translated() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let mut seen = lab.converse(proto, client, frontend);
        match family {
            Family::V4 => seen.ip.options = vec![7, 7, 4, 0, 0, 0, 0, 0],
            Family::V6 => seen.ip.extensions = vec![(60, vec![1, 4, 0, 0, 0, 0])],
        }
        let packet = Packet::error(lab.link(Device::Eth0), seen.ip.dst, seen.ip.src, too_big(&seen));
        let got = lab.through(&packet).expect("it comes through");
        assert_eq!(quoted(&got), (client, frontend));
    });
}

#[test]
fn quoted_datagrams_without_checksum_stay_without() {
    let mut lab = Lab::new();
    let (client, frontend) =
        (world::outside(1).port(Family::V4, 4000), Name::Remote.vip().port(Family::V4, world::PORT));
    let mut seen = lab.converse(Proto::Udp, client, frontend);
    crate::lab::udp(&mut seen).checksum = Checksum::None;
    let packet = Packet::error(lab.link(Device::Eth0), seen.ip.dst, seen.ip.src, too_big(&seen));
    assert_eq!(quoted(&lab.through(&packet).expect("it comes through")), (client, frontend));
}

#[test]
fn every_kind_of_error_is_translated() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let seen = lab.converse(proto, client, frontend);
        let kinds: &[(u8, u8)] = match family {
            Family::V4 => &[(3, 0), (3, 1), (3, 3), (3, 4), (3, 13), (11, 0), (12, 0)],
            Family::V6 => &[(1, 0), (1, 1), (1, 4), (2, 0), (3, 0), (4, 1)],
        };
        for &(kind, code) in kinds {
            let error = Error { kind, code, ..too_big(&seen) };
            let packet = Packet::error(lab.link(Device::Eth0), seen.ip.dst, seen.ip.src, error);
            let got = lab.through(&packet).unwrap_or_else(|| panic!("type {kind} code {code} comes through"));
            assert_eq!(quoted(&got), (client, frontend));
        }
    });
}

#[test]
fn redirects_about_translated_packets_are_dropped() {
    let mut lab = Lab::new();
    for proto in Proto::ALL {
        for (client, frontend, seen) in connections(&mut lab, Family::V4, proto) {
            let redirect = |quoted: &Packet| Error { kind: error::V4_REDIRECT, code: 1, ..too_big(quoted) };
            let (beyond, before) = (lab.device_of(seen.ip.dst), lab.device_of(client.ip()));
            // To the client, by a router behind the node, or by the node itself.
            let packet = Packet::error(lab.link(beyond), world::node().v4.into(), seen.ip.src, redirect(&seen));
            assert_eq!(lab.through_from(beyond, &packet), None, "{seen:?}");
            // To the frontend.
            let answer = lab.following(proto, frontend, client);
            let packet =
                Packet::error(lab.link(before), world::outside(200).v4.into(), frontend.ip(), redirect(&answer));
            assert_eq!(lab.through_from(before, &packet), None, "{answer:?}");
        }
    }
}

#[test]
fn errors_about_other_traffic_pass_untouched() {
    let mut lab = Lab::new();
    each(|family, proto| {
        lab.converse(proto, world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let (a, b) = (world::node().port(family, 50_000), world::outside(5).port(family, 443));
        let other = lab.following(proto, a, b);
        let packet = Packet::error(lab.link(Device::Eth0), b.ip(), a.ip(), too_big(&other));
        assert_eq!(lab.step(Hook::Ingress, Device::Eth0, &packet), Some(packet));
    });
}

#[test]
fn errors_about_a_reset_are_about_its_connection() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let mut seen = lab.converse(Proto::Tcp, client, frontend);
        crate::lab::tcp(&mut seen).flags = flag::RST;
        let packet = Packet::error(lab.link(Device::Eth0), seen.ip.dst, seen.ip.src, too_big(&seen));
        assert_eq!(quoted(&lab.through(&packet).expect("it comes through")), (client, frontend));
    }
}

/// The ends of the packet that an error quotes.
fn quoted(packet: &Packet) -> (std::net::SocketAddr, std::net::SocketAddr) {
    match &packet.body {
        shunt_tests::packet::Body::Error(error) => (error.quoted.src(), error.quoted.dst()),
        other => panic!("{other:?} is no error"),
    }
}
