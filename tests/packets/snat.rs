//! Sources: rewritten when the backend's answer would not come back to this node, and only then; ports kept where they can be.

use std::collections::BTreeSet;

use proxy_common::abi::address::PortUse;
use shunt_tests::nat::Hook;
use shunt_tests::packet::Packet;
use shunt_tests::topology::Family;

use crate::lab::{Device, Lab, Proto, each};
use crate::world::{self, Name};

#[test]
fn outside_clients_of_a_remote_backend_get_the_nodes_address() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (port, frontend) in (4000..).zip(Name::Remote.frontends(family)) {
            let seen = lab.converse(proto, world::outside(1).port(family, port), frontend);
            // Outside the host's own range and free: kept.
            assert_eq!(seen.src(), world::node().port(family, port));
        }
    });
}

#[test]
fn ports_of_the_hosts_own_range_are_not_kept() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let client = world::outside(1).port(family, 40_000);
        let seen = lab.converse(proto, client, Name::Remote.vip().port(family, world::PORT));
        assert!((10_000..=29_999).contains(&seen.src().port()), "{}", seen.src());
    });
}

#[test]
fn clients_with_one_port_get_different_ones_towards_one_backend() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let mut ports = BTreeSet::new();
        for number in 1..=200 {
            let client = world::outside(number).port(family, 4000);
            ports.insert(lab.open(proto, client, Name::Remote.vip().port(family, world::PORT)).src().port());
        }
        assert_eq!(ports.len(), 200);
        assert!(ports.contains(&4000));
    });
}

#[test]
fn pods_of_other_nodes_keep_their_address_to_a_cluster_ip_and_lose_it_to_others() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let [cluster_ip, vip, node_port] = Name::Remote.frontends(family);
        let client = world::remote_pod(9);
        assert_eq!(lab.converse(proto, client.port(family, 4000), cluster_ip).src().ip(), client.get(family));
        for (port, frontend) in (4001..).zip([vip, node_port]) {
            let seen = lab.converse(proto, client.port(family, port), frontend);
            assert_eq!(seen.src().ip(), world::node().get(family));
        }
    });
}

#[test]
fn a_pod_that_gets_itself_sees_the_node() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (port, frontend) in (4000..).zip(Name::Local.frontends(family)) {
            let seen = lab.converse(proto, world::pod(1).port(family, port), frontend);
            // By its address on the pod's link.
            assert_eq!(seen.src().ip(), world::gateway().get(family));
        }
    });
}

#[test]
fn one_client_port_to_two_vips_of_one_backend_is_two_connections() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (one, other) in [(Name::Local, Name::Twin), (Name::Remote, Name::RemoteTwin)] {
            for (port, client) in (4000..).zip([world::outside(1), world::pod(2)]) {
                let client = client.port(family, port);
                let frontends = [one, other].map(|name| name.cluster_ip().port(family, world::PORT));
                let seen = frontends.map(|frontend| lab.converse(proto, client, frontend));
                assert_ne!(seen[0].src(), seen[1].src());
                // And both go on.
                for (frontend, first) in frontends.iter().zip(&seen) {
                    let more = lab.confirming(proto, client, *frontend);
                    assert_eq!(lab.through(&more).map(|packet| packet.src()), Some(first.src()));
                }
            }
        }
    });
}

#[test]
fn a_source_that_the_cni_has_rewritten_is_left_alone() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        // Between the hooks, the node's own masquerade rule: to any port, and to the one that we would have taken.
        for (client, port) in [(client, 61_000), (world::outside(2).port(family, 4000), 4000)] {
            let masqueraded = |packet: Packet| packet.with_src(world::node().port(family, port));
            let opening = lab.opening(proto, client, frontend);
            let following = lab.confirming(proto, client, frontend);
            for (packet, is_first) in [(&opening, true), (&following, false), (&following, false)] {
                let inside = lab.step(Hook::Ingress, Device::Eth0, packet).expect("it is the frontend's");
                let outside = masqueraded(inside);
                assert_eq!(lab.step(Hook::Egress, Device::Eth0, &outside), Some(outside.clone()));
                // The answer to it is the kernel's to translate back.
                let answer = match is_first {
                    true => lab.answer(proto, &outside),
                    false => lab.following(proto, outside.dst(), outside.src()),
                };
                assert_eq!(lab.step(Hook::Ingress, Device::Eth0, &answer), Some(answer.clone()));
                let restored = Packet { link: lab.link(Device::Eth0), ..answer.with_dst(client) };
                let out = lab.step(Hook::Egress, Device::Eth0, &restored).expect("it reaches the client");
                assert_eq!((out.src(), out.dst()), (frontend, client));
            }
        }
    });
}

#[test]
fn answers_to_nobodys_port_are_the_hosts_own() {
    let mut lab = Lab::new();
    each(|family, proto| {
        lab.open(proto, world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let backend = world::remote_pod(1).port(family, world::TARGET);
        for port in [4001, 10_000, 29_999, 40_000] {
            let packet = lab.following(proto, backend, world::node().port(family, port));
            assert_eq!(lab.through_ingress(&packet), Some(packet));
        }
    });
}

#[test]
fn a_kept_port_is_marked_for_as_long_as_a_flow_has_it() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (frontend, backend) = (Name::Remote.vip().port(family, world::PORT), world::remote_pod(1));
        let established = lab.converse(proto, world::outside(1).port(family, 4000), frontend);
        let pending = lab.open(proto, world::outside(1).port(family, 4001), frontend);
        assert_eq!([established.src().port(), pending.src().port()], [4000, 4001]);
        // Marks are carried from generation to generation, and answers find their way in each.
        for _ in 0..3 {
            assert_eq!(lab.sweep().unmarked, 0);
            assert_eq!([4000, 4001].map(|port| lab.marks(port)), [PortUse::SNAT; 2]);
            let answer = lab.following(proto, established.dst(), established.src());
            assert_eq!(lab.through(&answer).map(|packet| packet.src()), Some(frontend));
        }
        for seen in [established, pending] {
            lab.forget_source(proto, backend.port(family, world::TARGET), seen.src());
        }
        assert_eq!(lab.sweep().unmarked, 2);
        assert_eq!([4000, 4001].map(|port| lab.marks(port)), [0; 2]);
    });
}

#[test]
fn every_port_can_be_used_towards_one_backend() {
    let lab = Lab::new();
    let frontend = Name::Remote.vip().port(Family::V4, world::PORT);
    // All from ports of the host's own range: each takes one of 20,000. The reference is too slow to follow.
    let mut ports = BTreeSet::new();
    let through = |mut frame: Vec<u8>| {
        for hook in [Hook::Ingress, Hook::Egress] {
            let crate::datapath::Outcome::Next(out) = lab.run_bytes(hook, Device::Eth0, &frame) else {
                panic!("{hook:?} refuses a packet");
            };
            frame = out;
        }
        frame
    };
    let backend = world::remote_pod(1).port(Family::V4, world::TARGET);
    for number in 0..20_000_u16 {
        let client = world::outside(1 + number / 10_000).port(Family::V4, 40_000 + number % 10_000);
        let opening = lab.opening(Proto::Udp, client, frontend);
        let (src, dst) = opening.read_ends(&through(opening.to_bytes())).expect("it is as long as before");
        assert_eq!((src.ip(), dst), (world::node().get(Family::V4), backend));
        ports.insert(src.port());
        // Answered and asked again, the flow is established: nobody else may have its port.
        through(lab.opening(Proto::Udp, backend, src).to_bytes());
        through(opening.to_bytes());
    }
    assert_eq!((ports.len(), ports.first(), ports.last()), (20_000, Some(&10_000), Some(&29_999)));
    let last = lab.opening(Proto::Udp, world::outside(3).port(Family::V4, 40_000), frontend);
    assert_eq!(lab.refused_because(Hook::Ingress, Device::Eth0, &last), "snat_ports_exhausted");
}
