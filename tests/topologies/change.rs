//! Endpoints and frontends that come and go under traffic.

use shunt_tests::place::Place;
use shunt_tests::probe::LongLived;
use shunt_tests::topology::{Family, Plan, PodLink};
use shunt_tests::traffic::Ports;
use shunt_tests::wait;

use crate::refusal::assert_dropped;
use crate::rig::{self, Frontend, Offer, PORT, Proto, Rig, TARGET};
use crate::talk::{Tcp, Udp};

const WEB: Offer = Offer::new(1, "web");
const OTHER: Offer = Offer::new(2, "other");

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

/// Connections stay for as long as both ends want.
#[track_caller]
fn build(plan: Plan) -> Rig {
    Rig::build_with(plan, |agent| agent.with("--stale-connections", "keep"))
}

#[test]
fn a_removed_endpoint_loses_datagrams_at_once_and_keeps_connections() {
    let rig = build(Plan { nodes: 2, ..Plan::default().strict() });
    rig.cluster.route_vips(rig.node(0));
    datagrams_move_and_connections_stay(&rig, &rig.node(0).pods[1].place, Frontend::ClusterIp);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::NodePort);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::External);
}

#[test]
fn a_removed_endpoint_loses_datagrams_at_once_over_flannel() {
    let rig = build(Plan::flannel(2));
    rig.cluster.route_vips(rig.node(0));
    datagrams_move_and_connections_stay(&rig, &rig.node(0).pods[1].place, Frontend::ClusterIp);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::NodePort);
}

#[test]
fn a_removed_endpoint_loses_datagrams_at_once_by_filters() {
    let rig = Rig::build_with(Plan::flannel(2), rig::by_filters);
    rig.cluster.route_vips(rig.node(0));
    datagrams_move_and_connections_stay(&rig, &rig.node(0).pods[1].place.unhooked(), Frontend::ClusterIp);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::NodePort);
}

/// The endpoint is there all the while, for another service.
#[test]
fn an_endpoint_that_its_service_dropped_loses_datagrams_at_once_while_another_service_has_it() {
    let rig = build(Plan { nodes: 2, ..Plan::default().strict() });
    rig.cluster.route_vips(rig.node(0));
    rig.apply(&[&OTHER.service().endpoints([&rig.node(0).pods[0], &rig.node(1).pods[0]])]);
    datagrams_move_and_connections_stay(&rig, &rig.node(0).pods[1].place.unhooked(), Frontend::ClusterIp);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::NodePort);
    datagrams_move_and_connections_stay(&rig, &rig.cluster.client.place, Frontend::External);
}

/// The addresses of a service go, and what goes through them stays.
#[test]
fn a_deleted_service_keeps_its_connections_and_takes_no_more() {
    let rig = build(Plan { nodes: 2, ..Plan::default().strict() });
    rig.cluster.route_vips(rig.node(0));
    let clients = [
        (rig.node(0).pods[1].place.unhooked(), Frontend::ClusterIp),
        (rig.cluster.client.place.clone(), Frontend::NodePort),
        (rig.cluster.client.place.clone(), Frontend::External),
    ];
    for family in Family::ALL {
        for endpoint in [&rig.node(0).pods[0], &rig.node(1).pods[0]] {
            rig.apply(&[&WEB.to(endpoint)]);
            let dial = |(place, frontend): &(Place, Frontend)| {
                let to = WEB.at(*frontend, rig.node(0), family);
                let mut held = place.run(|| Tcp::dial(0, to)).expect("it is served");
                held.ask().expect("it is answered");
                held
            };
            let mut held: Vec<_> = clients.iter().map(dial).collect();
            rig.manifests.delete("web");
            rig.settle();
            for (held, (_, frontend)) in held.iter_mut().zip(&clients) {
                let seen = held.ask().unwrap_or_else(|error| panic!("{frontend:?} {family:?}: {error}"));
                assert_eq!(seen.server, endpoint.place.name());
            }
            let to = WEB.at(Frontend::NodePort, rig.node(0), family);
            assert_eq!(rig.cluster.client.place.tcp(to).expect_err("it is gone").reason, "ECONNREFUSED");
            let to = WEB.at(Frontend::ClusterIp, rig.node(0), family);
            assert_dropped(&rig, &rig.node(0).pods[1].place.unhooked(), to, "unallocated_service_address");
        }
    }
}

/// Clients that only packets tell of, and connections to the same endpoint by another service beside theirs.
#[test]
fn connections_by_packets_are_reset_when_their_endpoint_is_gone_and_others_go_on() {
    let rig = Rig::build_with(Plan { nodes: 2, ..Plan::default().strict() }, |agent| {
        agent.with("--stale-connections", "reset")
    });
    rig.cluster.route_vips(rig.node(0));
    let clients = [
        (rig.node(0).pods[1].place.unhooked(), Frontend::ClusterIp),
        (rig.cluster.client.place.clone(), Frontend::NodePort),
        (rig.cluster.client.place.clone(), Frontend::External),
    ];
    let all = || clients.iter().flat_map(|client| Family::ALL.map(|family| (client, family)));
    let pods = [&rig.node(0).pods[0], &rig.node(1).pods[0]];
    for (endpoint, other) in [(pods[0], pods[1]), (pods[1], pods[0])] {
        for is_deleted in [false, true] {
            rig.apply(&[&WEB.to(endpoint), &OTHER.to(endpoint)]);
            let dial = |offer: &Offer| -> Vec<Tcp> {
                let one = |((place, frontend), family): (&(Place, Frontend), Family)| {
                    let to = offer.at(*frontend, rig.node(0), family);
                    let mut held = place.run(|| Tcp::dial(0, to)).expect("it is served");
                    held.ask().expect("it is answered");
                    held
                };
                all().map(one).collect()
            };
            let (mut held, mut kept) = (dial(&WEB), dial(&OTHER));
            match is_deleted {
                true => rig.manifests.delete("web"),
                false => rig.apply(&[&WEB.to(other)]),
            }
            for (held, ((_, frontend), family)) in held.iter_mut().zip(all()) {
                let case = format!("{frontend:?} {family:?}, deleted: {is_deleted}");
                let error = wait::until_some(&case, || held.ask().err());
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{case}");
            }
            for held in &mut kept {
                assert_eq!(held.ask().expect("it lives on").server, endpoint.place.name());
            }
        }
    }
}

/// Devices get their programs as they come, whatever the pods are connected by.
#[test]
fn pods_made_later_are_clients_and_backends_like_the_others() {
    let plans = [Plan::default().strict(), Plan::bridge().strict()];
    for (plan, is_by_filters) in plans.into_iter().flat_map(|plan| [(plan, false), (plan, true)]) {
        let mut rig = if is_by_filters { Rig::build_with(plan, rig::by_filters) } else { Rig::build(plan) };
        let pod = rig.cluster.nodes[0].add_pod();
        rig.agents[0].wait_log(&format!("programs attached device=\"{}\"", pod.device));
        let _server = pod.place.unhooked().serve(Ports { tcp: &[TARGET], udp: &[TARGET] });
        let old = &rig.node(0).pods[1];
        for (client, endpoint) in [(&pod, &rig.node(0).pods[0]), (old, &pod)] {
            rig.apply(&[&WEB.to(endpoint)]);
            for family in Family::ALL {
                for proto in Proto::ALL {
                    let to = WEB.at(Frontend::ClusterIp, rig.node(0), family);
                    let answer = proto.ask(&client.place.unhooked(), to).expect("it is served");
                    assert_eq!(answer.server, endpoint.place.name());
                }
            }
        }
    }
}

/// On a bridge, packets to a backend bear its MAC address: a machine that comes back with another one, and says so, is found
/// by the clients it has.
#[test]
fn a_backend_that_comes_back_with_another_mac_address_is_found_by_its_clients() {
    let pod_link = PodLink::Bridge { calls_netfilter: false, is_hairpin: false };
    let rig = Rig::build(Plan { pod_link, ..Plan::default() });
    let [backend, client] = [&rig.node(0).pods[0], &rig.node(0).pods[1]];
    rig.apply(&[&WEB.to(backend)]);
    for (family, mac) in Family::ALL.into_iter().zip(["02:aa:00:00:00:01", "02:aa:00:00:00:02"]) {
        let to = WEB.at(Frontend::ClusterIp, rig.node(0), family);
        client.place.run(|| {
            let udp = Udp::open(0, to).expect("a free port");
            (0..3).for_each(|_| drop(udp.ask(to, b"payload").expect("it is answered")));
            backend.place.ns().ip([format!("link set eth0 address {mac}")]);
            // It speaks to its gateway, as every machine soon does.
            let gateway = rig.node(0).gateway().port(family, TARGET);
            assert_eq!(backend.place.tcp(gateway).expect("the node answers").server, rig.node(0).name());
            wait::until("the backend under its new address", || udp.is_answered(to, b"payload"));
        });
    }
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
