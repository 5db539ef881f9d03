//! Fragments: the first one says the ports, the others follow it; without it they are dropped and counted.

use shunt_tests::nat::Hook;
use shunt_tests::topology::Family;

use crate::lab::{Device, Lab, Proto, each, udp};
use crate::world::{self, Name};

#[test]
fn fragments_go_where_the_first_one_goes_and_back() {
    let mut lab = Lab::new();
    each(|family, proto| {
        for (port, name) in (4000..).zip([Name::Local, Name::Remote]) {
            let (client, frontend) = (world::outside(1).port(family, port), name.vip().port(family, world::PORT));
            let seen = lab.converse(proto, client, frontend);
            let whole = lab.confirming(proto, client, frontend);
            let back = lab.following(proto, seen.dst(), seen.src());
            for (id, (from, to)) in (100..).zip([(0, 48), (48, 96), (96, 10_000)].repeat(2)) {
                // Two packets: other identifications.
                let id = if id < 103 { 100 } else { 101 } + u32::from(port);
                let part = lab.through(&whole.fragment(id, from, to)).expect("it comes through");
                assert_eq!((part.src(), part.dst()), (seen.src(), seen.dst()));
                let part = lab.through(&back.fragment(id, from, to)).expect("it comes through");
                assert_eq!((part.src(), part.dst()), (frontend, client));
            }
        }
    });
}

#[test]
fn fragments_of_two_packets_between_the_same_hosts_are_told_apart() {
    let mut lab = Lab::new();
    each(|family, proto| {
        // Two ports of one address, led to different backends.
        let client = world::outside(1).port(family, 4000);
        let frontends = [Name::Local, Name::Remote].map(|name| world::node().port(family, name.node_port()));
        let seen = frontends.map(|frontend| lab.converse(proto, client, frontend));
        for (from, to) in [(0, 48), (48, 10_000)] {
            for (id, (frontend, seen)) in (500..).zip(frontends.iter().zip(&seen)) {
                let whole = lab.confirming(proto, client, *frontend);
                let part = lab.through(&whole.fragment(id, from, to)).expect("it comes through");
                assert_eq!((part.src(), part.dst()), (seen.src(), seen.dst()));
            }
        }
    });
}

#[test]
fn a_fragment_opens_a_udp_flow() {
    let mut lab = Lab::new();
    for family in Family::ALL {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let whole = lab.opening(Proto::Udp, client, frontend);
        let first = lab.through(&whole.fragment(7, 0, 64)).expect("it opens");
        let last = lab.through(&whole.fragment(7, 64, 1000)).expect("it follows");
        assert_eq!((first.src(), first.dst()), (last.src(), last.dst()));
    }
}

#[test]
fn fragments_without_their_first_are_dropped_if_they_are_for_a_frontend() {
    let mut lab = Lab::new();
    each(|family, proto| {
        let (client, frontend) = (world::outside(1).port(family, 4000), Name::Remote.vip().port(family, world::PORT));
        let whole = lab.opening(proto, client, frontend);
        assert_eq!(lab.step(Hook::Ingress, Device::Eth0, &whole.fragment(9, 8, 16)), None);
        // Not ours: the stack's affair.
        let other = lab.following(proto, client, world::node().port(family, 22)).fragment(9, 8, 16);
        assert_eq!(lab.step(Hook::Ingress, Device::Eth0, &other), Some(other));
    });
    assert_eq!(lab.drops["fragment_unknown"], 4);
}

#[test]
fn fragments_of_other_traffic_pass_untouched() {
    let mut lab = Lab::new();
    each(|family, _| {
        let mut whole = lab.opening(Proto::Udp, world::outside(1).port(family, 4000), world::pod(1).port(family, 9999));
        udp(&mut whole).data = vec![7; 3000];
        for (from, to) in [(0, 1480), (1480, 2960), (2960, 9000)] {
            lab.through(&whole.fragment(11, from, to)).expect("it passes");
        }
    });
}
