//! NodePorts and loopback; sockets that are bound to a port; and what looks like a frontend but is none here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use shunt_tests::manifests::service;
use shunt_tests::tables::Opened;
use shunt_tests::topology::{Family, Plan};
use shunt_tests::traffic::Ports;

use crate::rig::{Rig, Socket, TCP_PORT, TCP_TARGET, UDP_PORT, UDP_TARGET, case, web_ip};

const TCP_NODE_PORT: u16 = 30080;
const UDP_NODE_PORT: u16 = 30053;
/// A server on both, where no service is meant.
const SAME_PORTS: Ports<'_> = Ports { tcp: &[TCP_NODE_PORT], udp: &[UDP_NODE_PORT] };

/// Writes a service with NodePorts, which all pods of the first node serve.
#[track_caller]
fn apply_node_ports(rig: &Rig) {
    let web = service("web").cluster_ips(web_ip());
    let web = web.tcp(TCP_PORT, TCP_TARGET).node_port(TCP_NODE_PORT).udp(UDP_PORT, UDP_TARGET).node_port(UDP_NODE_PORT);
    rig.apply(&web.endpoints(rig.endpoints()));
}

fn node_port(socket: Socket) -> u16 {
    if socket.is_tcp() { TCP_NODE_PORT } else { UDP_NODE_PORT }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

#[test]
fn node_ports_answer_on_loopback_for_the_nodes_own_processes() {
    let rig = Rig::build(2);
    apply_node_ports(&rig);
    for (socket, family) in Socket::of_both_families() {
        let mut hosts = vec![loopback(family)];
        if family == Family::V4 {
            hosts.push(Ipv4Addr::new(127, 1, 2, 3).into());
        }
        for to in hosts.into_iter().map(|host| SocketAddr::new(host, node_port(socket))) {
            let (answer, opened) = rig.count(|| socket.ask(&rig.node().place, to));
            let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure}", case(&rig.node().place, socket, to)));
            assert!(answer.server.starts_with("pod-1-"), "{socket:?} was answered by {}", answer.server);
            assert_eq!(
                (answer.peer, opened.sockets),
                (socket.shown(to, &answer), 1),
                "{}",
                case(&rig.node().place, socket, to)
            );
        }
    }
}

#[test]
fn loopback_of_a_pod_is_the_pods_own() {
    let rig = Rig::build(2);
    apply_node_ports(&rig);
    let pod = rig.pod(0).place.named("the pod itself");
    let _server = pod.serve(SAME_PORTS);
    for (socket, family) in Socket::of_both_families() {
        let to = SocketAddr::new(loopback(family), node_port(socket));
        let (answer, opened) = rig.count(|| socket.ask(&pod, to));
        let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure}", case(&pod, socket, to)));
        assert_eq!((answer.server.as_str(), answer.seen_server), ("the pod itself", to));
        assert_eq!(opened, Opened::default(), "{}", case(&pod, socket, to));
    }
}

#[test]
fn node_ports_of_other_nodes_are_their_affair() {
    let rig = Rig::build_with(Plan { nodes: 2, pods: 1, ..Plan::default() }, |agent| agent);
    apply_node_ports(&rig);
    let other = &rig.cluster.nodes[1];
    let _server = other.place.serve(SAME_PORTS);
    for from in rig.clients() {
        for (socket, family) in Socket::of_both_families() {
            let to = other.addrs.port(family, node_port(socket));
            let (answer, opened) = rig.count(|| socket.ask(from, to));
            let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure}", case(from, socket, to)));
            assert_eq!((answer.server.as_str(), answer.peer), ("node-2", to), "{}", case(from, socket, to));
            assert_eq!(opened, Opened::default(), "{}", case(from, socket, to));
        }
    }
}

#[test]
fn ports_of_the_node_that_are_no_node_ports_are_its_own() {
    let rig = Rig::build(1);
    apply_node_ports(&rig);
    // The ports that the service has elsewhere, and the endpoints', are the node's own here; so is a NodePort's number in
    // the other protocol.
    let ports =
        |socket: Socket| [socket.port(), socket.target(), if socket.is_tcp() { UDP_NODE_PORT } else { TCP_NODE_PORT }];
    let _server = rig.node().place.serve(Ports { tcp: &ports(Socket::Tcp), udp: &ports(Socket::Udp) });
    for from in rig.clients() {
        for (socket, family) in Socket::of_both_families() {
            for to in ports(socket).map(|port| rig.node().addrs.port(family, port)) {
                let (answer, opened) = rig.count(|| socket.ask(from, to));
                let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure}", case(from, socket, to)));
                assert_eq!(answer.server, "node-1", "{}", case(from, socket, to));
                assert_eq!(opened, Opened::default(), "{}", case(from, socket, to));
            }
        }
    }
}

#[test]
fn connections_from_a_bound_port_of_a_pod_are_left_to_the_packet_path() {
    let rig = Rig::build(2);
    let to = rig.apply_web();
    let pod = rig.pod(0);
    for (number, (socket, family)) in Socket::of_both_families().enumerate() {
        let bind = pod.addrs.port(family, 40_000 + number as u16);
        let to = to.port(family, socket.port());
        let (answer, opened) = rig.count(|| socket.ask_bound(&pod.place, to, Some(bind)));
        let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure}", case(&pod.place, socket, to)));
        assert_eq!((answer.peer, answer.local), (to, bind), "{}", case(&pod.place, socket, to));
        // A datagram names its destination itself: two services with one backend do not collide.
        let path = (opened.sockets, opened.packets > 0);
        let expected = if socket.is_connected() { (0, true) } else { (1, false) };
        assert_eq!(path, expected, "{}", case(&pod.place, socket, to));
    }
}

#[test]
fn connections_from_a_bound_port_of_the_node_are_translated() {
    let rig = Rig::build(2);
    let to = rig.apply_web();
    for (number, (socket, family)) in Socket::of_both_families().enumerate() {
        let bind = rig.node().gateway().port(family, 40_000 + number as u16);
        let to = to.port(family, socket.port());
        let (answer, opened) = rig.count(|| socket.ask_bound(&rig.node().place, to, Some(bind)));
        let answer = answer.unwrap_or_else(|failure| panic!("{}: {failure}", case(&rig.node().place, socket, to)));
        assert_eq!((answer.peer, answer.seen_client), (socket.shown(to, &answer), bind), "{socket:?}");
        assert_eq!(opened, Opened { sockets: 1, ..Opened::default() }, "{socket:?}");
    }
}
