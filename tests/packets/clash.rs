//! Clashes: connections that differ for the client and would be one inside the node get different ports there.

use shunt_tests::nat::Hook;
use shunt_tests::packet::{Packet, flag};
use shunt_tests::topology::Family;

use crate::lab::{Device, Lab, Proto, each, tcp};
use crate::world::{self, Name};

#[test]
fn a_direct_connection_beside_one_through_a_frontend() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (name, backend) in [(Name::Local, world::pod(1)), (Name::Remote, world::remote_pod(1))] {
            let client = world::pod(2).port(family, 4000);
            let (frontend, backend) =
                (name.cluster_ip().port(family, world::PORT), backend.port(family, world::TARGET));
            let through = lab.converse(proto, client, frontend);
            let direct = lab.converse(proto, client, backend);
            assert_eq!(direct.dst(), through.dst());
            assert_ne!(direct.src(), through.src());
            // Both go on.
            for (to, first) in [(frontend, &through), (backend, &direct)] {
                let more = lab.confirming(proto, client, to);
                assert_eq!(lab.through(&more).map(|packet| packet.src()), Some(first.src()));
            }
        }
    });
}

#[test]
fn a_direct_connection_without_another_is_left_alone() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, backend) = (world::pod(2).port(family, 4000), world::pod(1).port(family, world::TARGET));
        let seen = lab.converse(proto, client, backend);
        assert_eq!(seen.src(), client);
    });
}

#[test]
fn a_backend_that_knows_the_ends_from_elsewhere_makes_the_next_attempt_avoid_them() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, frontend) = (world::pod(2).port(family, 4000), Name::Local.cluster_ip().port(family, world::PORT));
        // The backend has a connection with the client's port already, made before there were hooks.
        let seen = lab.open(Proto::Tcp, client, frontend);
        let from = |lab: &mut Lab, packet: &Packet| lab.through(packet).map(|packet| packet.src());
        let data = lab.following(Proto::Tcp, seen.dst(), seen.src());
        assert_eq!(from(&mut lab, &data), Some(seen.dst()), "it is the other connection's");
        let challenge = challenge(&lab, &seen);
        assert_eq!(from(&mut lab, &challenge), Some(frontend), "the client sends again at once");
        let reset = Packet::tcp(lab.link(Device::Pod(2)), client, frontend, flag::RST);
        assert_eq!(lab.through(&reset), None, "the other connection lives on");
        assert_eq!(from(&mut lab, &challenge), Some(seen.dst()), "once is enough");
        let again = lab.open(Proto::Tcp, client, frontend);
        assert_ne!(again.src(), client);
        let answer = lab.answer(Proto::Tcp, &again);
        assert_eq!(lab.through(&answer).map(|packet| packet.dst()), Some(client));
    }
}

/// What a backend says to `syn` that has the ends of another connection.
fn challenge(lab: &Lab, syn: &Packet) -> Packet {
    let mut challenge = lab.following(Proto::Tcp, syn.dst(), syn.src());
    (tcp(&mut challenge).flags, tcp(&mut challenge).data) = (flag::ACK, vec![]);
    challenge
}

#[test]
fn a_remote_backend_that_knows_the_ends_from_elsewhere_is_asked_again_by_another_port() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 40_000), Name::Remote.vip().port(family, world::PORT));
        let seen = lab.open(Proto::Tcp, client, frontend);
        let challenge = challenge(&lab, &seen);
        assert_eq!(lab.through(&challenge).map(|packet| packet.dst()), Some(client), "the client sends again at once");
        let reset = Packet::tcp(lab.link(Device::Eth0), client, frontend, flag::RST);
        assert_eq!(lab.through(&reset), None, "the other connection lives on");
        let for_us = |packet: &Packet| Some(packet.clone());
        let mut foreign = lab.answer(Proto::Tcp, &seen);
        tcp(&mut foreign).ack = 0x7000_0000;
        for packet in [&challenge, &foreign] {
            assert_eq!(lab.step(Hook::Ingress, Device::Eth0, packet), for_us(packet), "the rest is the stack's affair");
        }
        lab.converse(Proto::Tcp, client, frontend);
    }
}

#[test]
fn a_connection_gets_the_answer_to_its_own_syn_alone() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, frontend) = (world::pod(2).port(family, 4000), Name::Local.cluster_ip().port(family, world::PORT));
        // The SYN-ACK of a direct connection that was begun right before from the same port.
        let seen = lab.open(Proto::Tcp, client, frontend);
        let mut foreign = lab.answer(Proto::Tcp, &seen);
        tcp(&mut foreign).ack = 0x7000_0000;
        assert_eq!(lab.through(&foreign).map(|packet| packet.src()), Some(seen.dst()));
        lab.converse(Proto::Tcp, client, frontend);
    }
}

#[test]
fn segments_of_an_unknown_direct_connection_pass_beside_one_through_a_frontend() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, backend) = (world::pod(2).port(family, 4000), world::pod(1).port(family, world::TARGET));
        lab.open(Proto::Tcp, client, Name::Local.cluster_ip().port(family, world::PORT));
        let packet = lab.following(Proto::Tcp, client, backend);
        assert_eq!(lab.step(Hook::Ingress, Device::Pod(2), &packet), Some(packet));
    }
}

#[test]
fn errors_about_connections_with_another_port_find_it() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, backend) = (world::pod(2).port(family, 4000), world::pod(1).port(family, world::TARGET));
        lab.converse(proto, client, Name::Local.cluster_ip().port(family, world::PORT));
        let direct = lab.converse(proto, client, backend);
        let error = Packet::error(lab.link(Device::Pod(1)), direct.ip.dst, direct.ip.src, crate::lab::too_big(&direct));
        let got = lab.through(&error).expect("it comes through");
        let shunt_tests::packet::Body::Error(error) = got.body else { panic!("it is an error") };
        assert_eq!((error.quoted.src(), error.quoted.dst()), (client, backend));
    });
}

#[test]
fn a_connection_opened_in_a_pods_name_leaves_the_pods_own_alone() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        for (port, forger) in (4000..).zip([Device::Pod(1), Device::Eth0]) {
            let (pod, backend) = (world::pod(2).port(family, port), world::pod(1).port(family, world::TARGET));
            // Another pod takes the ends that the pod's own connection to the backend has, by both ways.
            for target in [Name::Local.cluster_ip().port(family, world::PORT), backend] {
                let mut forged = lab.opening(Proto::Tcp, pod, target);
                tcp(&mut forged).seq = 0xdead_beef;
                forged.link = lab.link(forger);
                lab.step(Hook::Ingress, forger, &forged).expect("it cannot be told");
            }
            let seen = lab.converse(Proto::Tcp, pod, backend);
            assert_eq!(seen.dst(), backend);
        }
    }
}
