//! One client port, several connections to one backend: to two of its addresses and to the backend itself, in any order;
//! each keeps its own answers.

use std::net::SocketAddr;

use shunt_tests::place::Place;
use shunt_tests::probe::{LongLived, TcpLoop};
use shunt_tests::topology::{Addrs, Family, Plan, PodLink};

use crate::rig::{Offer, PORT, Rig, TARGET};
use crate::talk::{Tcp, Udp};

const ONE: Offer = Offer::new(1, "one");
const TWO: Offer = Offer::new(2, "two");
/// Lies outside the range that the kernel gives away, so that it is kept where it can be.
const CLIENT_PORT: u16 = 9_999;

/// The two services' addresses and the pod's own, in every order.
fn orders(family: Family, pod: Addrs) -> Vec<[SocketAddr; 3]> {
    let [a, b, c] =
        [ONE.cluster_ip().port(family, PORT), TWO.cluster_ip().port(family, PORT), pod.port(family, TARGET)];
    vec![[a, b, c], [b, a, c], [a, c, b], [b, c, a], [c, a, b], [c, b, a]]
}

/// Opens them one after the other and keeps them; then all are asked, twice.
fn all_tcp(order: &[SocketAddr], server: &str) {
    let mut open: Vec<_> = order
        .iter()
        .map(|&to| Tcp::dial(CLIENT_PORT, to).unwrap_or_else(|error| panic!("dial {to} of {order:?}: {error}")))
        .collect();
    for round in 0..2 {
        for (tcp, to) in open.iter_mut().zip(order) {
            let seen = tcp.ask().unwrap_or_else(|error| panic!("ask {to} of {order:?}, round {round}: {error}"));
            assert_eq!(seen.server, server);
        }
    }
}

/// One unconnected socket asks all of them, twice.
fn all_udp(order: &[SocketAddr], server: &str) {
    let udp = Udp::open(CLIENT_PORT, order[0]).expect("the port is free");
    for round in 0..3 {
        for &to in order {
            let seen = udp.ask(to, b"payload");
            let seen = seen.unwrap_or_else(|error| panic!("ask {to} of {order:?}, round {round}: {error}"));
            assert_eq!(seen.server, server);
        }
    }
}

#[track_caller]
fn one_port_serves_all(rig: &Rig, client: &Place, node: usize) {
    let pod = &rig.node(node).pods[0];
    rig.apply(&[&ONE.to(pod), &TWO.to(pod)]);
    let server = pod.place.name();
    for family in Family::ALL {
        for order in orders(family, pod.addrs) {
            client.run(|| all_tcp(&order, server));
            client.run(|| all_udp(&order, server));
        }
    }
}

#[test]
fn one_port_of_a_pod_reaches_two_services_and_their_pod_on_its_node() {
    let rig = Rig::build(Plan::default().strict());
    one_port_serves_all(&rig, &rig.node(0).pods[1].place, 0);
}

#[test]
fn one_port_of_a_pod_reaches_two_services_and_their_pod_on_another_node() {
    let rig = Rig::build(Plan { nodes: 2, ..Plan::default().strict() });
    one_port_serves_all(&rig, &rig.node(0).pods[1].place, 1);
}

#[test]
fn one_port_of_a_pod_reaches_two_services_and_their_pod_over_flannel() {
    let rig = Rig::build(Plan::flannel(2));
    one_port_serves_all(&rig, &rig.node(0).pods[1].place, 1);
}

#[test]
fn one_port_of_a_pod_reaches_two_services_and_their_pod_across_a_bridge() {
    for calls_netfilter in [false, true] {
        let pod_link = PodLink::Bridge { calls_netfilter, is_hairpin: false };
        let rig = Rig::build(Plan { pod_link, ..Plan::default().strict() });
        one_port_serves_all(&rig, &rig.node(0).pods[1].place, 0);
    }
}

#[test]
fn one_port_of_an_outside_client_reaches_two_services_and_their_pod() {
    let rig = Rig::build(Plan { nodes: 2, ..Plan::default() });
    rig.cluster.route_vips(rig.node(0));
    for node in 0..2 {
        one_port_serves_all(&rig, &rig.cluster.client.place, node);
    }
}

/// Connections of a pod that the socket hooks translate, and others that its packets carry, by the same client ports to one
/// backend: the one kind does not wait for the other to end, nor for a second SYN each time.
#[track_caller]
fn both_paths_share_ports(plan: Plan, node: usize, first_by_socket: bool) {
    let rig = Rig::build(plan);
    let (pod, client) = (&rig.node(node).pods[0], &rig.node(0).pods[1].place);
    rig.apply(&[&ONE.to(pod)]);
    // So few that each is used by both.
    client.ns().sysctl("net/ipv4/ip_local_port_range", "40000 40399");
    let long = |to| LongLived { to, connections: 300, interval_ms: 200 };
    let short = |to| TcpLoop { to: vec![to], rate: 200, workers: 8, count: Some(300) };
    let unhooked = client.unhooked();
    let (first, then) = if first_by_socket { (client, &unhooked) } else { (&unhooked, client) };
    for family in Family::ALL {
        let to = ONE.cluster_ip().port(family, PORT);
        let mut held = first.long_lived(long(to));
        held.wait_for("open connections", |stats| stats.open == 300);
        let mut load = then.tcp_loop(short(to));
        load.wait_for("all connections", |stats| stats.answered + stats.failures() == 300);
        load.finish_clean();
        held.finish_clean();
    }
}

#[test]
fn both_paths_of_one_pod_share_client_ports_on_its_node() {
    for first_by_socket in [true, false] {
        both_paths_share_ports(Plan::default(), 0, first_by_socket);
    }
}

#[test]
fn both_paths_of_one_pod_share_client_ports_on_another_node() {
    for first_by_socket in [true, false] {
        both_paths_share_ports(Plan { nodes: 2, ..Plan::default() }, 1, first_by_socket);
    }
}
