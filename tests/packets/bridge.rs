//! Pods on one bridge: the backend's answer is switched and never meets the stack, so the client's packet must not either.

use shunt_tests::nat::Hook;
use shunt_tests::packet::Packet;

use crate::lab::{Device, Lab, each};
use crate::world::{self, Name};

#[test]
fn a_packet_for_a_pod_of_the_clients_bridge_goes_to_it_directly() {
    let mut lab = Lab::bridged(&[1, 2]);
    let (client_mac, backend_mac) = (lab.mac_of_pod(2), lab.mac_of_pod(1));
    each(|family, proto| {
        let (client, frontend) = (world::pod(2).port(family, 4000), Name::Local.cluster_ip().port(family, world::PORT));
        let opening = lab.opening(proto, client, frontend);
        let switched = lab.step(Hook::IngressPort, Device::Pod(2), &opening).expect("it opens");
        assert_eq!(switched.link.dst, backend_mac);
        assert_eq!(lab.step(Hook::Egress, Device::Pod(1), &switched), Some(switched.clone()));
        // The answer is for the client's own address: only the client's port sees that it is one.
        let mut answer = lab.answer(proto, &switched);
        answer.link.dst = client_mac;
        assert_eq!(lab.step(Hook::IngressPort, Device::Pod(1), &answer), Some(answer.clone()));
        let got = lab.step(Hook::Egress, Device::Pod(2), &answer).expect("it reaches the client");
        assert_eq!((got.src(), got.dst()), (frontend, client));
        // And so on.
        let more = lab.confirming(proto, client, frontend);
        let switched = lab.step(Hook::IngressPort, Device::Pod(2), &more).expect("it passes");
        assert_eq!(switched.link.dst, backend_mac);
    });
}

#[test]
fn an_unresolved_neighbour_is_left_to_the_stack_first() {
    let mut lab = Lab::bridged(&[]);
    each(|family, proto| {
        let (client, frontend) = (world::pod(2).port(family, 4000), Name::Local.cluster_ip().port(family, world::PORT));
        let opening = lab.opening(proto, client, frontend);
        let inside = lab.step(Hook::IngressPort, Device::Pod(2), &opening).expect("it opens");
        assert_eq!((inside.link.dst, inside.dst()), (opening.link.dst, world::pod(1).port(family, world::TARGET)));
    });
}

#[test]
fn pods_of_a_bridge_reach_remote_backends_and_themselves() {
    let mut lab = Lab::bridged(&[1, 2]);
    each(|family, proto| {
        let client = world::pod(2).port(family, 4001);
        lab.converse(proto, client, Name::Remote.cluster_ip().port(family, world::PORT));
    });
}

#[test]
fn frames_between_pods_are_nobodys_business() {
    let mut lab = Lab::bridged(&[1, 2]);
    let mac = lab.mac_of_pod(1);
    each(|family, proto| {
        // Even with a frontend's address inside: not for the bridge, not ours.
        let frontend = Name::Local.cluster_ip().port(family, world::PORT);
        let mut packet = lab.opening(proto, world::pod(2).port(family, 4000), frontend);
        packet.link.dst = mac;
        assert_eq!(lab.step(Hook::IngressPort, Device::Pod(2), &packet), Some(packet));
    });
}

#[test]
fn outside_clients_reach_a_pod_on_the_bridge() {
    let mut lab = Lab::bridged(&[1, 2]);
    each(|family, proto| {
        let client = world::outside(1).port(family, 4000);
        let seen: Packet = lab.converse(proto, client, Name::Local.vip().port(family, world::PORT));
        assert_eq!(seen.src(), client);
    });
}
