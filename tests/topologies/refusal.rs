//! Connections that cannot be: refused at once where a client should know, dropped and counted where it should not.

use std::io;
use std::net::SocketAddr;

use serde_json::json;
use shunt_tests::manifests::{Endpoint, service};
use shunt_tests::place::Place;
use shunt_tests::probe::UdpOnce;
use shunt_tests::topology::{Addrs, Family, Offloads, Overlay, Plan, PodLink, SERVICES};
use shunt_tests::wait;

use crate::rig::{Counters, Frontend, Offer, PORT, Proto, Rig, TARGET};
use crate::talk::{Tcp, Udp, ping};

const EMPTY: Offer = Offer::new(1, "empty");
const WEB: Offer = Offer::new(2, "web");

/// The client's call fails with ECONNREFUSED. (A datagram socket is told of it when it is connected.)
#[track_caller]
fn assert_refused(place: &Place, proto: Proto, to: SocketAddr) {
    let failure = match proto {
        Proto::Tcp => place.tcp(to).expect_err("nobody serves it"),
        Proto::Udp => {
            let once = UdpOnce { to: vec![to], bind: None, is_connected: true, mapped: false, payload: 40 };
            place.udp_with(once).pop().expect("one outcome").expect_err("nobody serves it")
        }
    };
    assert_eq!(failure.reason, "ECONNREFUSED", "{} to {to} {proto:?}: {failure}", place.name());
}

/// Clients of all kinds: by socket hook, by packets, of the node, from outside.
fn clients(rig: &Rig) -> [Place; 4] {
    let (node, pod) = (rig.node(0), &rig.node(0).pods[1]);
    [pod.place.clone(), pod.place.unhooked(), node.place.clone(), rig.cluster.client.place.clone()]
}

#[track_caller]
fn nobody_is_left_waiting(plan: Plan) {
    let rig = Rig::build(plan);
    rig.cluster.route_vips(rig.node(0));
    rig.apply(&[&EMPTY.service(), &WEB.to(&rig.node(0).pods[0])]);
    for place in clients(&rig) {
        for family in Family::ALL {
            for proto in Proto::ALL {
                let ((), counted) = rig.counted(0, || {
                    for frontend in Frontend::ALL {
                        assert_refused(&place, proto, EMPTY.at(frontend, rig.node(0), family));
                    }
                    assert_refused(&place, proto, WEB.cluster_ip().port(family, PORT + 1));
                });
                // One drop for each: nobody had to ask twice.
                let drops = [("no_endpoint", 4), ("unknown_port", 1)].map(|(reason, count)| (reason.to_owned(), count));
                let expected = Counters { refused: 4, drops: drops.into(), ..Counters::default() };
                assert_eq!(counted, expected, "{} {family:?} {proto:?}", place.name());
            }
        }
    }
}

#[test]
fn missing_endpoints_and_unknown_ports_refuse_routed_clients() {
    nobody_is_left_waiting(Plan::default().strict());
}

#[test]
fn missing_endpoints_and_unknown_ports_refuse_clients_without_offloads() {
    nobody_is_left_waiting(Plan { offloads: Offloads::Off, ..Plan::default() });
}

#[test]
fn missing_endpoints_and_unknown_ports_refuse_clients_on_a_bridge() {
    let pod_link = PodLink::Bridge { calls_netfilter: false, is_hairpin: false };
    nobody_is_left_waiting(Plan { pod_link, ..Plan::default().strict() });
}

#[test]
fn missing_endpoints_and_unknown_ports_refuse_clients_of_flannel() {
    nobody_is_left_waiting(Plan { overlay: Overlay::Vxlan, ..Plan::flannel(1) });
}

/// Dropped without an answer: the node counts it.
#[track_caller]
pub fn assert_dropped(rig: &Rig, place: &Place, to: SocketAddr, reason: &str) {
    let dropped = |since: u64| wait::until(reason, || rig.counters(0).drops(reason) > since);
    place.run(|| {
        let before = rig.counters(0).drops(reason);
        let udp = Udp::open(0, to).expect("a port is free");
        udp.send(to).expect("it is sent");
        dropped(before);
        assert!(!udp.has_answer(), "{to} answered");
        let before = rig.counters(0).drops(reason);
        let dial = std::thread::scope(|scope| {
            let dial = scope.spawn(|| place.run(|| Tcp::dial_briefly(to)));
            dropped(before);
            dial.join().expect("it does not panic")
        });
        assert_eq!(dial.expect_err("nobody answers").kind(), io::ErrorKind::TimedOut, "{to}");
    });
}

#[test]
fn unallocated_service_addresses_are_dropped() {
    let rig = Rig::build(Plan::default());
    rig.cluster.route_vips(rig.node(0));
    rig.apply(&[&WEB.to(&rig.node(0).pods[0])]);
    for family in Family::ALL {
        let to = SERVICES.host(4_000).port(family, PORT);
        for place in [&rig.node(0).pods[1].place.unhooked(), &rig.cluster.client.place] {
            assert_dropped(&rig, place, to, "unallocated_service_address");
        }
    }
}

/// Clients of every kind, as loadBalancerSourceRanges name them; what is open is open by every path.
#[test]
fn load_balancer_addresses_are_open_to_their_source_ranges_alone() {
    let rig = Rig::build(Plan { nodes: 2, ..Plan::default() });
    let (node, client) = (rig.node(0), &rig.cluster.client);
    rig.cluster.route_vips(node);
    let ranges = |hosts: &[Addrs]| {
        let nets = hosts.iter().flat_map(|host| [format!("{}/32", host.v4), format!("{}/128", host.v6)]);
        json!(nets.collect::<Vec<_>>())
    };
    let web = |allowed: &[Addrs]| WEB.to(&rig.node(1).pods[0]).spec("loadBalancerSourceRanges", ranges(allowed));
    let (first, second) = (&node.pods[0], &node.pods[1]);
    rig.apply(&[&web(&[first.addrs, client.addrs])]);
    let expect = |place: &Place, is_open: bool| {
        for family in Family::ALL {
            let to = WEB.at(Frontend::LoadBalancer, node, family);
            if is_open {
                assert_eq!(place.tcp(to).expect("it is open").server, rig.node(1).pods[0].place.name(), "{to}");
            } else {
                assert_dropped(&rig, place, to, "source_range");
            }
            place.tcp(WEB.at(Frontend::ClusterIp, node, family)).expect("a ClusterIP is open to all");
        }
    };
    let pods = |pod: &Place, is_open| {
        expect(pod, is_open);
        expect(&pod.unhooked(), is_open);
    };
    pods(&first.place, true);
    pods(&second.place, false);
    for family in Family::ALL {
        let to = WEB.at(Frontend::LoadBalancer, node, family);
        client.place.tcp(to).expect("it is open");
        let failure = node.place.run(|| Tcp::dial_briefly(to)).expect_err("the node is in no range");
        assert_eq!(failure.kind(), io::ErrorKind::TimedOut);
        client.place.tcp(WEB.at(Frontend::External, node, family)).expect("other addresses are open to all");
    }
    // It follows, and connections that are there stay.
    let mut held = client.place.run(|| Tcp::dial(0, WEB.at(Frontend::LoadBalancer, node, Family::V4))).expect("open");
    rig.apply(&[&web(&[second.addrs, node.addrs])]);
    pods(&first.place, false);
    pods(&second.place, true);
    held.ask().expect("a narrower range cuts nothing");
    for family in Family::ALL {
        let to = WEB.at(Frontend::LoadBalancer, node, family);
        node.place.tcp(to).expect("the node is in a range");
        assert_dropped(&rig, &client.place, to, "source_range");
    }
    rig.apply(&[&WEB.to(&rig.node(1).pods[0])]);
    pods(&first.place, true);
    client.place.tcp(WEB.at(Frontend::LoadBalancer, node, Family::V4)).expect("open to all");
}

/// A service that its label leaves to another proxy has an address of the services' range that we do not know.
#[test]
fn a_service_address_that_another_proxy_knows_is_left_to_it() {
    let rig = Rig::build(Plan::default());
    let node = rig.node(0);
    rig.cluster.route_vips(node);
    rig.apply(&[&WEB.to(&node.pods[0])]);
    let (backend, addrs) = (node.pods[0].addrs, SERVICES.host(4_000));
    node.place.ns().nft(&format!(
        "table inet another {{
            chain prerouting {{ type nat hook prerouting priority dstnat;
                ip daddr {v4} dnat ip to {b4}
                ip6 daddr {v6} dnat ip6 to {b6}
            }}
        }}\n",
        v4 = addrs.v4,
        v6 = addrs.v6,
        b4 = backend.v4,
        b6 = backend.v6,
    ));
    for family in Family::ALL {
        let to = addrs.port(family, TARGET);
        let pod = &node.pods[1].place;
        for place in [pod, &pod.unhooked(), &rig.cluster.client.place] {
            assert_eq!(place.tcp(to).expect("it is served").server, node.pods[0].place.name());
            let once = UdpOnce { to: vec![to], bind: None, is_connected: true, mapped: false, payload: 40 };
            let answer = place.udp_with(once).pop().expect("one outcome").expect("it is served");
            assert_eq!(answer.server, node.pods[0].place.name());
        }
    }
}

#[test]
fn processes_of_the_node_outside_the_hooked_group_are_refused_and_named() {
    let rig = Rig::build(Plan::default());
    rig.apply(&[&WEB.to(&rig.node(0).pods[0])]);
    let place = rig.node(0).place.unhooked();
    for family in Family::ALL {
        for proto in Proto::ALL {
            let to = WEB.at(Frontend::ClusterIp, rig.node(0), family);
            let ((), counted) = rig.counted(0, || assert_refused(&place, proto, to));
            assert_eq!(counted.drops.keys().collect::<Vec<_>>(), ["host_unhooked"], "{family:?} {proto:?}");
        }
    }
}

#[test]
fn a_ping_to_a_cluster_ip_is_answered_as_unreachable() {
    let rig = Rig::build(Plan::default());
    rig.cluster.route_vips(rig.node(0));
    rig.apply(&[&WEB.to(&rig.node(0).pods[0])]);
    for place in [&rig.node(0).pods[1].place, &rig.cluster.client.place] {
        place.ns().sysctl("net/ipv4/ping_group_range", "0 0");
        for family in Family::ALL {
            let (outcome, counted) = rig.counted(0, || place.run(|| ping(WEB.cluster_ip().get(family))));
            assert_eq!(outcome.expect_err("nobody answers").kind(), io::ErrorKind::ConnectionRefused, "{family:?}");
            assert_eq!(counted.drops("unknown_port"), 1, "{family:?}");
        }
    }
}

/// The backend's own refusal comes back as the frontend's.
#[track_caller]
fn the_backend_refuses(plan: Plan) {
    const NOBODY: u16 = 9;
    const FAR: Offer = Offer::new(3, "far");
    let rig = Rig::build(plan);
    rig.cluster.route_vips(rig.node(0));
    let closed = |offer: &Offer, node: usize| offer.service_to(NOBODY).endpoints([&rig.node(node).pods[0]]);
    rig.apply(&[&closed(&WEB, 0), &closed(&FAR, 1)]);
    for place in [&rig.node(0).pods[1].place, &rig.node(0).pods[1].place.unhooked(), &rig.cluster.client.place] {
        for offer in [WEB, FAR] {
            for family in Family::ALL {
                for proto in Proto::ALL {
                    let to = offer.at(Frontend::NodePort, rig.node(0), family);
                    let ((), counted) = rig.counted(0, || assert_refused(place, proto, to));
                    assert!(counted.drops.keys().all(|reason| reason == "redirect"), "{counted:?}");
                }
            }
        }
    }
}

#[test]
fn refusals_of_backends_come_from_the_frontend() {
    the_backend_refuses(Plan { nodes: 2, ..Plan::default().strict() });
}

#[test]
fn refusals_of_backends_come_from_the_frontend_over_flannel() {
    the_backend_refuses(Plan::flannel(2));
}

/// Live connections to a service whose last endpoint goes are not refused: only new ones are.
#[test]
fn the_last_endpoint_goes_and_its_connections_stay() {
    let rig = Rig::build(Plan::default());
    let pod = &rig.node(0).pods[1];
    rig.apply(&[&WEB.to(&rig.node(0).pods[0])]);
    for family in Family::ALL {
        let to = WEB.at(Frontend::ClusterIp, rig.node(0), family);
        rig.apply(&[&WEB.to(&rig.node(0).pods[0])]);
        let mut held = pod.place.run(|| Tcp::dial(0, to).expect("it is served"));
        held.ask().expect("it is answered");
        rig.apply(&[
            &service("other").cluster_ips(SERVICES.host(50)).tcp(1, 1),
            &WEB.service().endpoints(Vec::<Endpoint>::new()),
        ]);
        assert_refused(&pod.place.unhooked(), Proto::Tcp, to);
        held.ask().expect("it lives on");
    }
}
