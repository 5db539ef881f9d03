//! Endpoints and frontends that come and go under traffic.

use shunt_tests::place::Place;
use shunt_tests::probe::LongLived;
use shunt_tests::topology::{Family, Plan};
use shunt_tests::traffic::Ports;

use crate::rig::{Frontend, Offer, PORT, Rig, TARGET};
use crate::talk::{Tcp, Udp};

const WEB: Offer = Offer::new(1, "web");

/// A socket that goes on sending reaches the new backend with the first datagram after the change, though it had answers
/// from the old one a moment ago. The TCP connection beside it stays where it is.
#[track_caller]
fn datagrams_move_and_connections_stay(rig: &Rig, client: &Place, frontend: Frontend) {
    let pods = [&rig.node(0).pods[0], &rig.node(1).pods[0]];
    for family in Family::ALL {
        let to = WEB.at(frontend, rig.node(0), family);
        client.run(|| {
            rig.apply(&[&WEB.to(pods[0])]);
            let (udp, mut tcp) = (Udp::open(0, to).expect("a free port"), Tcp::dial(0, to).expect("it is served"));
            let ask = |expected: &str| {
                for _ in 0..3 {
                    assert_eq!(udp.ask(to, b"payload").expect("it is answered").server, expected, "{to}");
                }
            };
            ask(pods[0].place.name());
            assert_eq!(tcp.ask().expect("it is answered").server, pods[0].place.name());
            for pod in [pods[1], pods[0], pods[1]] {
                rig.apply(&[&WEB.to(pod)]);
                ask(pod.place.name());
                assert_eq!(tcp.ask().expect("it lives on").server, pods[0].place.name());
            }
        });
    }
}

#[test]
fn a_removed_endpoint_loses_datagrams_at_once_and_keeps_connections() {
    let rig = Rig::build(Plan { nodes: 2, ..Plan::default().strict() });
    rig.cluster.route_vips(rig.node(0));
    datagrams_move_and_connections_stay(&rig, &rig.node(0).pods[1].place, Frontend::ClusterIp);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::NodePort);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::External);
}

#[test]
fn a_removed_endpoint_loses_datagrams_at_once_over_flannel() {
    let rig = Rig::build(Plan::flannel(2));
    rig.cluster.route_vips(rig.node(0));
    datagrams_move_and_connections_stay(&rig, &rig.node(0).pods[1].place, Frontend::ClusterIp);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::NodePort);
}

/// A service may have the node's own address as an external one: its port alone is taken, and the others go on as before,
/// while it comes and when it goes.
#[test]
fn a_nodes_own_address_as_external_ip_leaves_its_other_ports_alone() {
    const SSH: u16 = 22;
    let rig = Rig::build(Plan { nodes: 2, ..Plan::default().strict() });
    let node = rig.node(0);
    let _sshd = node.place.named("sshd").unhooked().serve(Ports { tcp: &[SSH], udp: &[SSH] });
    let web =
        || shunt_tests::manifests::service("web").cluster_ips(WEB.cluster_ip()).tcp(PORT, TARGET).udp(PORT, TARGET);
    let clients = [&rig.cluster.client.place, &node.pods[1].place, &node.pods[1].place.unhooked(), &rig.node(1).place];
    for family in Family::ALL {
        let ssh = node.addrs.port(family, SSH);
        let long = LongLived { to: ssh, connections: 3, interval_ms: 5 };
        let mut loads: Vec<_> = clients.iter().map(|place| place.long_lived(long.clone())).collect();
        loads.iter_mut().for_each(|load| drop(load.wait_for("open connections", |stats| stats.open == 3)));
        rig.apply(&[&web().external_ips(node.addrs).endpoints([&node.pods[0]])]);
        for place in clients {
            let answer = place.tcp(node.addrs.port(family, PORT)).expect("the service answers");
            assert_eq!(answer.server, node.pods[0].place.name());
            for outcome in [place.tcp(ssh), place.udp(ssh)] {
                assert_eq!(outcome.expect("the node answers").server, "sshd");
            }
            let closed = place.tcp(node.addrs.port(family, PORT + 1)).expect_err("nobody listens");
            assert_eq!(closed.reason, "ECONNREFUSED");
        }
        loads.iter_mut().for_each(|load| drop(load.wait_answers(20)));
        rig.apply(&[&web().endpoints([&node.pods[0]])]);
        loads.iter_mut().for_each(|load| drop(load.wait_answers(20)));
        for load in loads {
            load.finish_clean();
        }
        // Its own server would be here now, if it had one.
        let gone = rig.cluster.client.place.tcp(node.addrs.port(family, PORT)).expect_err("the frontend is gone");
        assert_eq!(gone.reason, "ECONNREFUSED");
    }
}
