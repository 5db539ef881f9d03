//! Refusals: who is answered, who is not, and which counter says so.

use shunt_tests::nat::{Hook, check_answer};
use shunt_tests::packet::{Body, Error, Icmp, Ip, Packet, flag, proto};
use shunt_tests::topology::{Family, SERVICES};

use crate::datapath::Outcome;
use crate::lab::{Device, Lab, Proto, each, tcp, too_big};
use crate::world::{self, Name};

#[test]
fn a_service_without_endpoints_is_refused_with_an_answer() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (port, frontend) in (4000..).zip(Name::Empty.frontends(family)) {
            for client in [world::outside(1), world::pod(2)] {
                let opening = lab.opening(proto, client.port(family, port), frontend);
                assert_eq!(lab.through(&opening), None);
            }
        }
    });
    assert_eq!(lab.drops["no_endpoint"], 24);
}

#[test]
fn a_local_policy_without_local_endpoint_drops_in_silence() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let vip = Name::LocalPolicy.vip().port(family, world::PORT);
        let opening = lab.opening(proto, world::outside(1).port(family, 4000), vip);
        assert_eq!(lab.through(&opening), None);
        // From inside the cluster all endpoints are good.
        lab.converse(proto, world::pod(2).port(family, 4000), vip);
    });
    assert_eq!(lab.drops["no_local_endpoint"], 4);
}

#[test]
fn an_unknown_port_is_refused_on_a_cluster_ip_alone() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let cluster_ip = Name::Local.cluster_ip().port(family, world::NO_PORT);
        let opening = lab.opening(proto, world::pod(2).port(family, 4000), cluster_ip);
        assert_eq!(lab.through(&opening), None);
        for other in [Name::Local.vip().port(family, world::NO_PORT), world::node().port(family, 22)] {
            let opening = lab.opening(proto, world::outside(1).port(family, 4000), other);
            assert_eq!(lab.through_ingress(&opening), Some(opening));
        }
    });
    assert_eq!(lab.drops["unknown_port"], 4);
}

#[test]
fn a_restricted_address_is_open_to_its_sources_alone() {
    let mut lab = Lab::with_xdp();
    let [cluster_ip, vip, node_port] = [0, 1, 2];
    each(|family, proto| {
        let frontends = Name::Restricted.frontends(family);
        for client in [world::outside(1), world::pod(1), world::remote_pod(3)] {
            lab.converse(proto, client.port(family, 4000), frontends[vip]);
        }
        for client in [world::outside(2), world::pod(2), world::remote_pod(1)] {
            let opening = lab.opening(proto, client.port(family, 4000), frontends[vip]);
            assert_eq!(lab.through(&opening), None);
        }
        for open in [cluster_ip, node_port] {
            lab.converse(proto, world::pod(2).port(family, 4001), frontends[open]);
        }
    });
    assert_eq!(lab.drops["source_range"], 4 * 3);
}

/// On the way out: after the way in another proxy may still translate it.
#[test]
fn a_packet_to_an_unallocated_service_address_does_not_leave() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let opening =
            lab.opening(proto, world::pod(2).port(family, 4000), SERVICES.host(999).port(family, world::PORT));
        let inside = lab.through_ingress(&opening).expect("it is let in");
        assert_eq!(inside, opening);
        assert_eq!(lab.step(Hook::Egress, Device::Eth0, &inside), None);
        assert_eq!(lab.through(&opening), None);
    });
    for family in Family::ALL {
        let echo = Icmp { kind: if family == Family::V4 { 8 } else { 128 }, code: 0, rest: 7, data: vec![1; 56] };
        let ip = Ip::new(world::pod(2).get(family), SERVICES.host(999).get(family));
        let echo = Packet { link: lab.link(Device::Eth0), ip, body: Body::Icmp(echo), part: None };
        assert_eq!(lab.step(Hook::Egress, Device::Eth0, &echo), None);
    }
    assert_eq!(lab.drops["unallocated_service_address"], 4 * 2 + 2);
}

#[test]
fn segments_of_no_connection_are_reset_at_a_cluster_ip_alone() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        for flags in [flag::ACK, flag::ACK | flag::PSH, flag::FIN | flag::ACK, flag::SYN | flag::ACK, flag::FIN] {
            let mut packet =
                lab.following(Proto::Tcp, world::pod(2).port(family, 4000), Name::Local.cluster_ip().port(family, 80));
            tcp(&mut packet).flags = flags;
            assert_eq!(lab.through(&packet), None);
            let mut packet =
                packet.with_dst(Name::Local.vip().port(family, 80)).with_src(world::outside(1).port(family, 4000));
            packet.link = lab.link(Device::Eth0);
            assert_eq!(lab.through_ingress(&packet), Some(packet));
        }
    }
    assert_eq!(lab.drops["no_connection"], 10);
}

#[test]
fn resets_and_errors_are_never_answered() {
    let lab = Lab::new();
    for family in Family::ALL {
        let client = world::pod(2).port(family, 4000);
        for (frontend, flags) in [
            (Name::Empty.cluster_ip().port(family, 80), flag::RST),
            (Name::Local.cluster_ip().port(family, 80), flag::RST | flag::ACK),
            (Name::Local.cluster_ip().port(family, world::NO_PORT), flag::RST),
        ] {
            let mut packet = lab.following(Proto::Tcp, client, frontend);
            tcp(&mut packet).flags = flags;
            assert_eq!(lab.peek(Hook::Ingress, Device::Pod(2), &packet), Outcome::Dropped, "{packet:?}");
        }
    }
}

#[test]
fn a_reset_does_not_acknowledge_the_padding_of_a_short_frame() {
    let lab = Lab::new();
    for family in Family::ALL {
        let frontend = Name::Empty.vip().port(family, world::PORT);
        let opening = lab.opening(Proto::Tcp, world::outside(1).port(family, 4000), frontend);
        // A SYN without options: 54 bytes with IPv4, where 60 is the least.
        let padded = [opening.to_bytes(), vec![0; 6]].concat();
        let Outcome::Answered(answer) = lab.run_bytes(Hook::Ingress, Device::Eth0, &padded) else {
            panic!("it is refused");
        };
        check_answer(&opening, &answer).expect("a right answer");
    }
}

#[test]
fn answers_hold_for_options_and_extension_headers() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let frontend = Name::Empty.vip().port(family, world::PORT);
        let mut packet = lab.opening(proto, world::outside(1).port(family, 4000), frontend);
        match family {
            Family::V4 => packet.ip.options = vec![7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            Family::V6 => packet.ip.extensions = vec![(proto::HOP_BY_HOP, vec![1, 4, 0, 0, 0, 0])],
        }
        assert_eq!(lab.through(&packet), None);
    });
}

/// Links pad short frames; what they add is no data.
#[test]
fn a_padded_segment_is_answered_as_if_it_were_not() {
    let lab = Lab::new();
    for family in Family::ALL {
        let opening =
            lab.opening(Proto::Tcp, world::outside(1).port(family, 4000), Name::Empty.vip().port(family, world::PORT));
        let padded = [opening.to_bytes(), vec![0; 6]].concat();
        let Outcome::Answered(answer) = lab.run_bytes(Hook::Ingress, Device::Eth0, &padded) else {
            panic!("it is not answered")
        };
        check_answer(&opening, &answer).unwrap_or_else(|wrong| panic!("{wrong}: {answer:?}"));
    }
}

#[test]
fn other_protocols_are_refused_at_a_cluster_ip() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let ip = Ip::new(world::pod(2).get(family), Name::Local.cluster_ip().get(family));
        let echo = Icmp { kind: if family == Family::V4 { 8 } else { 128 }, code: 0, rest: 7, data: vec![1; 56] };
        for body in [Body::Icmp(echo), Body::Other(132, vec![0; 40])] {
            let packet = Packet { link: lab.link(Device::Pod(2)), ip: ip.clone(), body, part: None };
            assert_eq!(lab.through(&packet), None);
        }
    }
}

#[test]
fn errors_that_tell_no_ports_and_fragments_are_never_answered() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let link = lab.link(Device::Pod(2));
        let (pod, cluster_ip) = (world::pod(2).get(family), Name::Local.cluster_ip().get(family));
        let echo = Icmp { kind: if family == Family::V4 { 8 } else { 128 }, code: 0, rest: 7, data: vec![1; 56] };
        let there = Ip::new(pod, cluster_ip);
        let packet = Packet { link: link.clone(), ip: there, body: Body::Icmp(echo.clone()), part: None };
        // About an echo that the ClusterIP never sent, and about a segment, cut before its ports end.
        let back = Packet { ip: Ip::new(cluster_ip, pod), ..packet.clone() };
        let segment =
            lab.following(Proto::Tcp, Name::Local.cluster_ip().port(family, 80), world::pod(2).port(family, 4000));
        let cut = Error { quoted_bytes: segment.header_bytes() + 3, ..too_big(&segment) };
        for error in [too_big(&back), cut] {
            assert_eq!(lab.through(&Packet::error(link.clone(), pod, cluster_ip, error)), None);
        }
        for (from, to) in [(0, 24), (24, 10_000)] {
            assert_eq!(lab.through(&packet.fragment(9, from, to)), None);
        }
        let other = Packet { body: Body::Other(132, vec![0; 40]), ..packet };
        assert_eq!(lab.through(&other.fragment(10, 8, 10_000)), None);
    }
}

#[test]
fn a_packet_to_a_cluster_ip_never_leaves_the_node() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let opening = lab.opening(proto, world::node().port(family, 50_000), Name::Local.cluster_ip().port(family, 80));
        assert_eq!(lab.step(Hook::Egress, Device::Eth0, &opening), None);
    });
    assert_eq!(lab.drops["host_unhooked"], 4);
}
