//! Sockets whose endpoint is gone: who is told, with which error, and who is left alone.

use std::collections::BTreeMap;
use std::net::UdpSocket;

use serde_json::json;
use shunt_tests::manifests::{Endpoint, Service};
use shunt_tests::place::Place;
use shunt_tests::probe::{LongLived, Stats, UdpLoop, UdpSockets};
use shunt_tests::topology::{Addrs, Family, Plan, SERVICES};
use shunt_tests::traffic::Load;

use crate::rig::{Rig, TCP_PORT, TCP_TARGET, UDP_PORT, UDP_TARGET, plain, web, web_ip};

/// What a client of a closed UDP socket meets, by what it was about.
const UDP_ERRORS: [&str; 2] = ["send EDESTADDRREQ", "receive ECONNABORTED"];
/// The same of a TCP socket.
const TCP_ERRORS: [&str; 2] = ["send ECONNABORTED", "receive ECONNABORTED"];
const SOCKETS: u32 = 3;

/// A node with so many pods; connections are reset as soon as their endpoint is gone.
#[track_caller]
fn build(pods: u16) -> Rig {
    Rig::build_with(Plan { pods, ..Plan::default() }, |agent| agent.with("--stale-connections", "reset"))
}

fn asks(service: Service, policy: &str) -> Service {
    service.metadata("annotations", json!({ "shunt/stale-connections": policy }))
}

/// TCP connections that talk without a pause, [`SOCKETS`] of them.
#[track_caller]
fn connections(from: &Place, at: Addrs, family: Family, port: u16) -> Load {
    connections_of(from, at, family, port, SOCKETS)
}

#[track_caller]
fn connections_of(from: &Place, at: Addrs, family: Family, port: u16, connections: u32) -> Load {
    let mut load = from.long_lived(LongLived { to: at.port(family, port), connections, interval_ms: 20 });
    load.wait_for("open connections", |stats| stats.open == u64::from(connections));
    load
}

/// UDP sockets that are connected once, [`SOCKETS`] of them.
#[track_caller]
fn datagrams(from: &Place, at: Addrs, family: Family, port: u16) -> Load {
    datagrams_of(from, at, family, port, SOCKETS)
}

#[track_caller]
fn datagrams_of(from: &Place, at: Addrs, family: Family, port: u16, workers: u32) -> Load {
    let to = vec![at.port(family, port)];
    let sockets = UdpSockets::ConnectedKept;
    let mut load = from.udp_loop(UdpLoop { to, rate: 20 * workers, workers, count: None, sockets });
    load.wait_answers(3 * u64::from(workers));
    load
}

/// All that failed is one of `errors`.
#[track_caller]
fn assert_only(stats: &Stats, errors: &[&str]) {
    assert!(stats.failed.keys().all(|kind| errors.contains(&kind.as_str())), "{:?}", stats.failed);
}

/// Each of the sockets is closed once.
#[track_caller]
fn wait_closed(load: &mut Load, sockets: u32, errors: &[&str]) {
    let stats = load.wait_for("closed sockets", |stats| stats.failures() >= u64::from(sockets));
    assert_only(&stats, errors);
}

#[test]
fn a_connected_datagram_socket_is_closed_once_and_a_new_one_reaches_a_living_endpoint() {
    let rig = Rig::build(2);
    rig.apply(&web().endpoints([rig.pod(1)]));
    let mut loads: Vec<_> = rig
        .clients()
        .into_iter()
        .flat_map(|from| Family::ALL.map(|family| datagrams(from, web_ip(), family, UDP_PORT)))
        .collect();
    rig.apply(&web().endpoints([rig.pod(0)]));
    for load in &mut loads {
        load.wait_for("answers of the other", |stats| stats.by_server.contains_key("pod-1-1"));
        wait_closed(load, SOCKETS, &UDP_ERRORS);
        load.wait_answers(20);
    }
    for load in loads {
        let stats = load.finish();
        assert_only(&stats, &UDP_ERRORS);
        assert_eq!(stats.failures(), u64::from(SOCKETS), "{:?}", stats.failed);
    }
}

#[test]
fn a_datagram_socket_that_waits_for_an_answer_is_told_that_there_will_be_none() {
    let mut rig = Rig::build(2);
    rig.servers.remove(1).kill();
    for family in Family::ALL {
        rig.apply(&web().endpoints([rig.pod(1)]));
        // It takes questions and answers none.
        let silent = rig.pod(1).addrs.port(family, UDP_TARGET);
        let silent = rig.pod(1).place.run(|| UdpSocket::bind(silent)).expect("nobody listens there");
        let udp = UdpLoop {
            to: vec![web_ip().port(family, UDP_PORT)],
            rate: 0,
            workers: 1,
            count: Some(1),
            sockets: UdpSockets::ConnectedKept,
        };
        let load = rig.pod(0).place.udp_loop(udp);
        silent.recv(&mut [0; 100]).expect("the question arrives");
        rig.apply(&web().endpoints([rig.pod(0)]));
        let stats = load.finish();
        assert_eq!(stats.failed, BTreeMap::from([("receive ECONNABORTED".to_owned(), 1)]));
    }
}

#[test]
fn sockets_to_the_endpoint_itself_and_by_a_service_that_has_it_still_are_left_alone() {
    let rig = build(2);
    let other = SERVICES.host(11);
    let endpoints = || [Endpoint::from(rig.pod(1))];
    rig.apply(&web().endpoints(endpoints()));
    rig.apply(&plain("other", other).endpoints(endpoints()));
    for from in rig.clients() {
        for family in Family::ALL {
            rig.apply(&web().endpoints(endpoints()));
            let direct = rig.pod(1).addrs;
            let mut kept = [
                connections(from, direct, family, TCP_TARGET),
                connections(from, other, family, TCP_PORT),
                datagrams(from, direct, family, UDP_TARGET),
                datagrams(from, other, family, UDP_PORT),
            ];
            let mut tcp = connections(from, web_ip(), family, TCP_PORT);
            let mut udp = datagrams(from, web_ip(), family, UDP_PORT);
            rig.apply(&web().endpoints([rig.pod(0)]));
            wait_closed(&mut tcp, SOCKETS, &TCP_ERRORS);
            wait_closed(&mut udp, SOCKETS, &UDP_ERRORS);
            for load in &mut kept {
                load.wait_answers(20);
            }
            for load in kept {
                load.finish_clean();
            }
        }
    }
}

#[test]
fn a_connection_drains_while_its_endpoint_is_listed_and_is_reset_when_it_is_not() {
    let rig = build(2);
    let (leaving, stays) = (Endpoint::from(rig.pod(1)), Endpoint::from(rig.pod(0)));
    for from in rig.clients() {
        for family in Family::ALL {
            rig.apply(&web().endpoints([leaving.clone()]));
            let mut tcp = connections(from, web_ip(), family, TCP_PORT);
            let mut udp = datagrams(from, web_ip(), family, UDP_PORT);
            for is_serving in [true, false] {
                rig.manifests.apply(&web().endpoints([stays.clone(), leaving.clone().terminating(is_serving)]));
                rig.agent.wait_endpoints("web", 1);
                if is_serving {
                    udp.wait_answers(20);
                    assert_eq!(udp.stats().failures(), 0, "it still serves");
                } else {
                    // Told of the change, the agent closes what is not to stay.
                    wait_closed(&mut udp, SOCKETS, &UDP_ERRORS);
                }
                let stats = tcp.wait_answers(20);
                assert_eq!(stats.failures(), 0, "{:?}", stats.failed);
            }
            rig.apply(&web().endpoints([stays.clone()]));
            wait_closed(&mut tcp, SOCKETS, &TCP_ERRORS);
        }
    }
}

#[test]
fn a_service_says_for_itself_what_becomes_of_its_connections() {
    let rig = build(2);
    let services = [("keeps", "keep", 11), ("waits", "reset-after=2s", 12), ("unsaid", "nonsense", 13)];
    let apply = |name, policy, number, pod| {
        rig.apply(&asks(plain(name, SERVICES.host(number)), policy).endpoints([rig.pod(pod)]));
    };
    for (name, policy, number) in services {
        apply(name, policy, number, 1);
    }
    let from = rig.clients()[1];
    let [mut keeps, mut waits, mut unsaid] =
        services.map(|(_, _, number)| connections(from, SERVICES.host(number), Family::V4, TCP_PORT));
    for (name, policy, number) in services {
        apply(name, policy, number, 0);
    }
    wait_closed(&mut unsaid, SOCKETS, &TCP_ERRORS);
    wait_closed(&mut waits, SOCKETS, &TCP_ERRORS);
    keeps.wait_answers(20);
    keeps.finish_clean();
}

/// What becomes of a service.
type Change = fn(&Rig);

#[track_caller]
fn assert_closed_after(change: Change) {
    let rig = build(2);
    for from in rig.clients() {
        for family in Family::ALL {
            rig.apply(&web().endpoints([rig.pod(1)]));
            let mut tcp = connections(from, web_ip(), family, TCP_PORT);
            let mut udp = datagrams(from, web_ip(), family, UDP_PORT);
            change(&rig);
            wait_closed(&mut tcp, SOCKETS, &TCP_ERRORS);
            udp.wait_for("closed sockets", |stats| {
                stats
                    .failed
                    .iter()
                    .filter(|(kind, _)| UDP_ERRORS.contains(&kind.as_str()))
                    .map(|(_, count)| count)
                    .sum::<u64>()
                    >= u64::from(SOCKETS)
            });
        }
    }
}

#[test]
fn sockets_of_a_deleted_service_are_closed() {
    assert_closed_after(|rig| rig.manifests.delete("web"));
}

#[test]
fn sockets_of_a_service_that_gets_another_address_are_closed() {
    assert_closed_after(|rig| rig.apply(&plain("web", SERVICES.host(99)).endpoints([rig.pod(1)])));
}

#[test]
fn sockets_of_a_service_that_gets_other_ports_are_closed() {
    assert_closed_after(|rig| {
        let moved =
            shunt_tests::manifests::service("web").cluster_ips(web_ip()).tcp(81, TCP_TARGET).udp(54, UDP_TARGET);
        rig.apply(&moved.endpoints([rig.pod(1)]));
    });
}

#[test]
fn sockets_of_a_service_that_is_left_without_endpoints_are_closed() {
    assert_closed_after(|rig| {
        rig.manifests.apply(&web());
        rig.agent.wait_endpoints("web", 0);
    });
}

#[test]
fn what_went_while_no_agent_ran_is_found_by_the_next() {
    let mut rig = build(2);
    rig.apply(&web().endpoints([rig.pod(1)]));
    rig.apply(&plain("other", SERVICES.host(11)).endpoints([rig.pod(1)]));
    let mut closed: Vec<_> = rig
        .clients()
        .into_iter()
        .map(|from| {
            let (v4, v6) = (Family::V4, Family::V6);
            (connections(from, web_ip(), v4, TCP_PORT), datagrams(from, web_ip(), v6, UDP_PORT))
        })
        .collect();
    let mut kept = connections(rig.clients()[1], SERVICES.host(11), Family::V4, TCP_PORT);
    rig.agent.crash();
    rig.manifests.apply(&web().endpoints([rig.pod(0)]));
    rig.agent.start();
    for (tcp, udp) in &mut closed {
        wait_closed(tcp, SOCKETS, &TCP_ERRORS);
        wait_closed(udp, SOCKETS, &UDP_ERRORS);
    }
    kept.wait_answers(20);
    kept.finish_clean();
}

#[test]
fn hundreds_of_sockets_in_many_namespaces_are_closed_and_none_twice() {
    const EACH: u32 = 60;
    let rig = build(5);
    rig.apply(&web().endpoints([rig.pod(1)]));
    let places: Vec<_> =
        rig.node().pods.iter().filter(|pod| pod.addrs != rig.pod(1).addrs).map(|pod| &pod.place).collect();
    let mut tcp: Vec<_> =
        places.iter().map(|from| connections_of(from, web_ip(), Family::V4, TCP_PORT, EACH)).collect();
    let mut udp: Vec<_> = places.iter().map(|from| datagrams_of(from, web_ip(), Family::V6, UDP_PORT, EACH)).collect();
    rig.apply(&web().endpoints([rig.pod(0)]));
    tcp.iter_mut().for_each(|load| wait_closed(load, EACH, &TCP_ERRORS));
    for load in &mut udp {
        wait_closed(load, EACH, &UDP_ERRORS);
        load.wait_answers(u64::from(EACH));
        assert_eq!(load.stats().failures(), u64::from(EACH), "new ones live");
    }
}

#[test]
fn an_unconnected_socket_leaves_a_backend_that_its_service_has_dropped_and_another_has() {
    let rig = Rig::build(2);
    let other = plain("other", SERVICES.host(11));
    rig.apply(&other.endpoints(rig.endpoints()));
    for from in rig.clients() {
        for family in Family::ALL {
            rig.apply(&web().endpoints([rig.pod(1)]));
            let udp = UdpLoop {
                to: vec![web_ip().port(family, UDP_PORT)],
                rate: 200,
                workers: 1,
                count: None,
                sockets: UdpSockets::UnconnectedKept,
            };
            let mut load = from.udp_loop(udp);
            load.wait_answers(20);
            rig.apply(&web().endpoints([rig.pod(0)]));
            load.wait_for("answers of the other", |stats| stats.by_server.contains_key("pod-1-1"));
            load.finish_clean();
        }
    }
}
