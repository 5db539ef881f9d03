//! Probes: who answers, what both ends see, and that each failure is reported by its errno.

use std::net::SocketAddr;

use shunt_tests::place::Place;
use shunt_tests::probe::{Bulk, Direction, LongLived, TcpLoop, TcpOnce, UdpLoop, UdpOnce, UdpSockets};
use shunt_tests::topology::{Cluster, Family, Plan};
use shunt_tests::traffic::Ports;

const PORTS: Ports<'_> = Ports { tcp: &[8080, 8081], udp: &[5353] };

/// A node with two pods.
fn pods() -> Cluster {
    Cluster::build(Plan::default())
}

fn tcp_loop(to: Vec<SocketAddr>) -> TcpLoop {
    TcpLoop { to, rate: 500, workers: 4, count: None }
}

#[test]
fn loops_count_answers_by_server() {
    let cluster = pods();
    let [one, two] = [&cluster.nodes[0].pods[0], &cluster.nodes[0].pods[1]];
    let servers = (one.place.serve(PORTS), two.place.serve(PORTS));
    let to = vec![one.addrs.port(Family::V4, 8080), two.addrs.port(Family::V6, 8081)];
    let mut load = cluster.client_on_node().tcp_loop(tcp_loop(to));
    load.wait_answers(50);
    let stats = load.finish_clean();
    assert_eq!(stats.by_server.keys().collect::<Vec<_>>(), ["pod-1-1", "pod-1-2"]);
    assert_eq!(stats.by_server.values().sum::<u64>(), stats.sent);
    drop(servers);
}

#[test]
fn a_counted_load_ends_by_itself() {
    let cluster = pods();
    let pod = &cluster.nodes[0].pods[0];
    let _server = pod.place.serve(PORTS);
    let tcp = TcpLoop { count: Some(40), rate: 0, ..tcp_loop(vec![pod.addrs.port(Family::V4, 8080)]) };
    let mut load = cluster.client_on_node().tcp_loop(tcp);
    load.wait_for("all of them", |stats| stats.sent == 40);
    assert_eq!(load.finish_clean().answered, 40);
}

#[test]
fn failures_carry_their_errno() {
    let cluster = pods();
    let (from, pod) = (cluster.client_on_node(), &cluster.nodes[0].pods[0]);
    let to = pod.addrs.port(Family::V4, 9);
    assert_eq!(from.tcp(to).expect_err("nobody listens").kind(), "connect ECONNREFUSED");
    let connected = UdpOnce { to: vec![to], bind: None, is_connected: true, mapped: false, payload: 1 };
    let outcome = from.udp_with(connected).pop().expect("one");
    assert_eq!(outcome.expect_err("nobody listens").kind(), "receive ECONNREFUSED");
    let mut load = from.tcp_loop(tcp_loop(vec![to]));
    load.wait_for("failures", |stats| stats.failures() >= 10);
    assert_eq!(load.failures()[0].kind(), "connect ECONNREFUSED");
    let stats = load.finish();
    assert_eq!(stats.failed.get("connect ECONNREFUSED"), Some(&stats.sent));
}

#[test]
#[should_panic(expected = "connect ECONNREFUSED")]
fn a_load_that_failed_is_not_clean() {
    let cluster = pods();
    let mut load =
        cluster.client_on_node().tcp_loop(tcp_loop(vec![cluster.nodes[0].pods[0].addrs.port(Family::V4, 9)]));
    load.wait_for("failures", |stats| stats.failures() >= 1);
    load.finish_clean();
}

#[test]
fn long_lived_connections_notice_the_end_of_their_server() {
    let cluster = pods();
    let pod = &cluster.nodes[0].pods[0];
    let server = pod.place.serve(PORTS);
    let long = LongLived { to: pod.addrs.port(Family::V6, 8080), connections: 3, interval_ms: 5 };
    let mut load = cluster.client_on_node().long_lived(long);
    load.wait_for("three connections", |stats| stats.open == 3);
    load.wait_answers(30);
    server.kill();
    let stats = load.wait_for("three failures", |stats| stats.failures() == 3);
    assert_eq!(stats.open, 0);
    // They are not opened again.
    let _server = pod.place.serve(PORTS);
    assert_eq!(load.finish().failures(), 3);
}

#[test]
fn udp_sockets_of_each_kind_are_answered() {
    let cluster = pods();
    let [one, two] = [&cluster.nodes[0].pods[0], &cluster.nodes[0].pods[1]];
    let _servers = (one.place.serve(PORTS), two.place.serve(PORTS));
    let to = vec![one.addrs.port(Family::V4, 5353), two.addrs.port(Family::V4, 5353)];
    for sockets in [UdpSockets::ConnectedEach, UdpSockets::UnconnectedEach, UdpSockets::UnconnectedKept] {
        let udp = UdpLoop { to: to.clone(), rate: 500, workers: 2, count: None, sockets };
        let mut load = cluster.client_on_node().udp_loop(udp);
        load.wait_answers(20);
        assert_eq!(load.finish_clean().by_server.len(), 2, "{sockets:?}");
    }
    let once = UdpOnce { to, bind: None, is_connected: false, mapped: true, payload: 3000 };
    let answers = cluster.client_on_node().udp_with(once);
    let names: Vec<_> = answers.iter().map(|answer| answer.as_ref().expect("it is answered").server.as_str()).collect();
    assert_eq!(names, ["pod-1-1", "pod-1-2"]);
}

#[test]
fn bound_ports_and_mapped_addresses_are_used() {
    let cluster = pods();
    let pod = &cluster.nodes[0].pods[0];
    let _server = pod.place.serve(PORTS);
    let bind = cluster.nodes[0].gateway().port(Family::V4, 40_001);
    let once = TcpOnce { to: pod.addrs.port(Family::V4, 8080), bind: Some(bind), mapped: true };
    let answer = cluster.client_on_node().tcp_with(once.clone()).expect("it is answered");
    assert_eq!((answer.local, answer.seen_client, answer.peer), (bind, bind, once.to));
}

#[test]
fn bulk_moves_every_byte_both_ways() {
    let cluster = pods();
    let pod = &cluster.nodes[0].pods[0];
    let _server = pod.place.serve(PORTS);
    for direction in [Direction::Up, Direction::Down] {
        let bulk = Bulk { to: pod.addrs.port(Family::V4, 8080), bytes: 2_000_003, direction };
        let transfer = cluster.client_on_node().bulk(bulk).expect("it arrives");
        assert_eq!((transfer.bytes, transfer.server.as_str()), (2_000_003, "pod-1-1"));
    }
}

/// Where these tests' clients run.
trait ClientOnNode {
    fn client_on_node(&self) -> &Place;
}

impl ClientOnNode for Cluster {
    fn client_on_node(&self) -> &Place {
        &self.nodes[0].place
    }
}
