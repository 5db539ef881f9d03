//! What is refused: with ECONNREFUSED, as if nobody listened, and never with EPERM.

use serde_json::json;
use shunt_tests::tables::{Opened, Set};
use shunt_tests::topology::{Addrs, VIPS};

use crate::rig::{Rig, Socket, case, web, web_ip};

/// Every kind of socket of every client is refused at `port` of `addrs`, at once and without a packet.
#[track_caller]
fn assert_refused(rig: &Rig, addrs: Addrs, port: impl Fn(Socket) -> u16) {
    for from in rig.clients() {
        for (socket, family) in Socket::of_both_families() {
            let to = addrs.port(family, port(socket));
            let failure = socket.ask(from, to).expect_err(&case(from, socket, to));
            assert_eq!(failure.kind(), refusal(socket), "{}", case(from, socket, to));
        }
    }
}

/// By the call that names the destination.
fn refusal(socket: Socket) -> &'static str {
    if socket.is_connected() { "connect ECONNREFUSED" } else { "send ECONNREFUSED" }
}

#[test]
fn services_without_endpoints_refuse() {
    let rig = Rig::build(1);
    let external = VIPS.host(20);
    rig.manifests.apply(&web().external_ips(external));
    rig.agent.wait_service("web", "no endpoints", |port| port.cluster == Set::Empty("reject".to_owned()));
    let ((), opened) = rig.count(|| {
        assert_refused(&rig, web_ip(), Socket::port);
        assert_refused(&rig, external, Socket::port);
    });
    let each = rig.clients().len() * Socket::of_both_families().count();
    let expected = Opened { refused: 2 * each as u64, ..Default::default() };
    assert_eq!(opened, expected);
}

#[test]
fn unknown_ports_of_a_cluster_ip_refuse() {
    let rig = Rig::build(1);
    let to = rig.apply_web();
    assert_refused(&rig, to, |_| 81);
    // A port of the other protocol is no port.
    assert_refused(&rig, to, |socket| if socket.is_tcp() { Socket::Udp.port() } else { Socket::Tcp.port() });
    // What the endpoints listen on is none either.
    assert_refused(&rig, to, Socket::target);
}

#[test]
fn a_service_refuses_as_soon_as_its_last_endpoint_goes_and_answers_as_soon_as_one_comes() {
    let rig = Rig::build(1);
    for _ in 0..3 {
        let to = rig.apply_web();
        for (socket, family) in Socket::of_both_families() {
            let to = to.port(family, socket.port());
            socket.ask(&rig.pod(0).place, to).unwrap_or_else(|failure| panic!("{failure}"));
        }
        rig.apply(&web());
        assert_refused(&rig, to, Socket::port);
    }
}

#[test]
fn a_service_of_one_family_is_none_in_the_other() {
    let rig = Rig::build(1);
    let mut objects = web().endpoints([rig.pod(0)]).objects();
    objects[0]["spec"]["ipFamilies"] = json!(["IPv4"]);
    objects[0]["spec"]["clusterIPs"] = json!([web_ip().v4]);
    rig.manifests.write("web", &objects);
    rig.agent.wait_endpoints("web", 1);
    let (answer, opened) = rig.count(|| rig.pod(0).place.tcp((web_ip().v4, Socket::Tcp.port()).into()));
    assert_eq!((answer.expect("IPv4 is served").server.as_str(), opened.sockets), ("pod-1-1", 1));
    assert!(rig.agent.ports_of("web").iter().all(|port| port.name.ends_with("/IPv4")), "{:?}", rig.agent.services());
}
