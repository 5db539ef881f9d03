//! Every kind of socket reaches every kind of frontend, gets an answer from an endpoint, and sees what it dialled.

use std::net::SocketAddr;

use shunt_tests::manifests::service;
use shunt_tests::place::Place;
use shunt_tests::probe::Answer;
use shunt_tests::tables::Opened;
use shunt_tests::topology::{Addrs, Family, VIPS};
use shunt_tests::traffic::Ports;

use crate::rig::{Rig, Socket, TCP_PORT, TCP_TARGET, UDP_PORT, UDP_TARGET, case, web, web_ip};

const NODE_PORTS: [u16; 2] = [30080, 30053];

/// What each conversation through a frontend must look like from both ends.
#[track_caller]
fn assert_answer(rig: &Rig, from: &Place, socket: Socket, to: SocketAddr, answer: &Answer) {
    let case = case(from, socket, to);
    let pod = rig.node().pods.iter().find(|pod| pod.place.name() == answer.server);
    let pod = pod.unwrap_or_else(|| panic!("{case}: {} is no endpoint", answer.server));
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    assert_eq!(answer.peer, socket.shown(to, answer), "{case}: the client sees what it dialled");
    assert_eq!(
        answer.seen_server,
        pod.addrs.port(family, socket.target()),
        "{case}: the endpoint sees its own address"
    );
    assert_eq!(answer.seen_client.port(), answer.local.port(), "{case}: the source port is the client's own");
    if socket.is_connected() {
        assert_eq!(answer.seen_client, answer.local, "{case}: the source is the client's own");
    }
}

#[test]
fn every_kind_of_socket_reaches_every_kind_of_frontend_and_sees_what_it_dialled() {
    let rig = Rig::build(3);
    let (external, balancer) = (VIPS.host(20), VIPS.host(21));
    let all = service("all").load_balancer(balancer).external_ips(external).cluster_ips(web_ip());
    let all = all.tcp(TCP_PORT, TCP_TARGET).node_port(NODE_PORTS[0]);
    let all = all.udp(UDP_PORT, UDP_TARGET).node_port(NODE_PORTS[1]);
    rig.apply(&all.endpoints(rig.endpoints()));
    let node_port = |socket: Socket| if socket.is_tcp() { NODE_PORTS[0] } else { NODE_PORTS[1] };
    for from in rig.clients() {
        for (socket, family) in Socket::of_both_families() {
            let at = |addrs: Addrs| addrs.port(family, socket.port());
            let node = rig.node().addrs.port(family, node_port(socket));
            for to in [at(web_ip()), at(external), at(balancer), node] {
                let (answer, opened) = rig.count(|| socket.ask(from, to));
                let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure}", case(from, socket, to)));
                assert_answer(&rig, from, socket, to, &answer);
                let expected = Opened { sockets: 1, ..Opened::default() };
                assert_eq!(opened, expected, "{}: by the socket hook alone", case(from, socket, to));
            }
        }
    }
}

#[test]
fn new_connections_spread_over_all_endpoints() {
    let rig = Rig::build(3);
    let to = rig.apply_web();
    for from in rig.clients() {
        for socket in [Socket::Tcp, Socket::Udp, Socket::UdpConnected] {
            for to in Family::ALL.map(|family| to.port(family, socket.port())) {
                // A fair pick misses one of three in 60 draws once in 10^10 runs.
                let servers = socket.ask_often(from, to, 60);
                assert_eq!(servers.len(), 3, "{}: {servers:?}", case(from, socket, to));
            }
        }
    }
}

#[test]
fn destinations_that_are_no_frontend_are_left_alone() {
    let rig = Rig::build(2);
    rig.apply_web();
    let (server, client) = (rig.pod(1), rig.pod(0));
    let _outside = rig.cluster.client.place.serve(Ports { tcp: &[TCP_PORT], udp: &[UDP_PORT] });
    for from in [&rig.node().place, &client.place] {
        for (socket, family) in Socket::of_both_families() {
            let pod = server.addrs.port(family, socket.target());
            let outside = rig.cluster.client.addrs.port(family, socket.port());
            for (to, name) in [(pod, "pod-1-2"), (outside, "client")] {
                let (answer, opened) = rig.count(|| socket.ask(from, to));
                let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure}", case(from, socket, to)));
                assert_eq!((answer.server.as_str(), answer.peer, answer.seen_server), (name, to, to));
                assert_eq!(opened, Opened::default(), "{}", case(from, socket, to));
            }
        }
    }
}

#[test]
fn a_socket_to_its_own_pod_is_answered_through_the_service() {
    let rig = Rig::build(1);
    let only = rig.pod(0);
    rig.apply(&web().endpoints([only]));
    for (socket, family) in Socket::of_both_families() {
        let to = web_ip().port(family, socket.port());
        let answer = socket.ask(&only.place, to).unwrap_or_else(|failure| panic!("{socket:?}: {failure}"));
        assert_answer(&rig, &only.place, socket, to, &answer);
    }
}
