//! UDP sockets that talk to several frontends, stay with their backends, or are connected anew.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use shunt_tests::manifests::Endpoint;
use shunt_tests::place::Place;
use shunt_tests::probe::{Answer, UdpLoop, UdpOnce, UdpSockets};
use shunt_tests::topology::{Family, SERVICES};

use crate::rig::{Rig, UDP_PORT, UDP_TARGET, plain, web, web_ip};

/// Asks all of `to` in turn through one socket, as each kind of socket that can; the answers in order.
#[track_caller]
fn ask_in_turn(from: &Place, to: &[SocketAddr], is_connected: bool, check: impl Fn(&[Answer], &str)) {
    let is_v4 = to.iter().all(SocketAddr::is_ipv4);
    for mapped in [false, true].into_iter().take(1 + usize::from(is_v4)) {
        let once = UdpOnce { to: to.to_vec(), bind: None, is_connected, mapped, payload: 20 };
        let case = format!("from {}, mapped: {mapped}", from.name());
        let outcomes: Result<Vec<_>, _> = from.udp_with(once).into_iter().collect();
        let answers = outcomes.unwrap_or_else(|failure| panic!("{case}: {failure}"));
        let peers: Vec<_> = answers.iter().map(|answer| answer.peer).collect();
        assert_eq!(peers, to, "{case}");
        check(&answers, &case);
    }
}

#[test]
fn one_socket_talks_to_several_frontends_and_gets_each_answer_from_where_it_sent() {
    let rig = Rig::build(2);
    let (one, two) = (SERVICES.host(11), SERVICES.host(12));
    rig.apply(&plain("one", one).endpoints([rig.pod(0)]));
    rig.apply(&plain("two", two).endpoints([rig.pod(1)]));
    for from in rig.clients() {
        for family in Family::ALL {
            let at = |addrs: shunt_tests::topology::Addrs| addrs.port(family, UDP_PORT);
            let to = [at(one), at(two), at(one), at(two)];
            ask_in_turn(from, &to, false, |answers, case| {
                let servers: Vec<_> = answers.iter().map(|answer| answer.server.as_str()).collect();
                assert_eq!(servers, ["pod-1-1", "pod-1-2", "pod-1-1", "pod-1-2"], "{case}");
            });
        }
    }
}

#[test]
fn frontends_with_the_same_backend_and_the_backend_itself_are_told_apart_by_one_socket() {
    let rig = Rig::build(2);
    let (one, two) = (SERVICES.host(11), SERVICES.host(12));
    rig.apply(&plain("one", one).endpoints([rig.pod(1)]));
    rig.apply(&plain("two", two).endpoints([rig.pod(1)]));
    for from in rig.clients() {
        for family in Family::ALL {
            let [one, two] = [one, two].map(|addrs| addrs.port(family, UDP_PORT));
            let direct = rig.pod(1).addrs.port(family, UDP_TARGET);
            let to = [one, two, one, direct, two, direct, one];
            ask_in_turn(from, &to, false, |_, _| ());
            // In a pod, a socket that has a port since it was connected first is the packet path's affair.
            if from.name() == rig.node().name() {
                ask_in_turn(from, &to, true, |_, _| ());
            }
        }
    }
}

#[test]
fn a_socket_may_be_connected_anew_to_frontends_and_elsewhere() {
    let rig = Rig::build(3);
    let (one, two) = (SERVICES.host(11), SERVICES.host(12));
    rig.apply(&plain("one", one).endpoints([rig.pod(0)]));
    rig.apply(&plain("two", two).endpoints([rig.pod(1)]));
    for from in rig.clients() {
        for family in Family::ALL {
            let [one, two] = [one, two].map(|addrs| addrs.port(family, UDP_PORT));
            let direct = rig.pod(2).addrs.port(family, UDP_TARGET);
            ask_in_turn(from, &[one, two, direct, one, direct, two], true, |answers, case| {
                let servers: Vec<_> = answers.iter().map(|answer| &answer.server[..]).collect();
                assert_eq!(servers, ["pod-1-1", "pod-1-2", "pod-1-3", "pod-1-1", "pod-1-3", "pod-1-2"], "{case}");
            });
        }
    }
}

#[test]
fn a_socket_talks_to_more_frontends_than_it_remembers() {
    let rig = Rig::build(2);
    let numbers = 20..40;
    for number in numbers.clone() {
        rig.manifests.apply(&plain(&format!("s{number}"), SERVICES.host(number)).endpoints(rig.endpoints()));
    }
    for number in numbers.clone() {
        rig.agent.wait_endpoints(&format!("s{number}"), 2);
    }
    for from in rig.clients() {
        for family in Family::ALL {
            let to: Vec<_> = numbers.clone().map(|number| SERVICES.host(number).port(family, UDP_PORT)).collect();
            ask_in_turn(from, &to.repeat(2), false, |_, _| ());
        }
    }
}

#[test]
fn an_unconnected_socket_stays_with_its_backend_until_that_is_gone() {
    let rig = Rig::build(4);
    let mut left = rig.endpoints();
    let (first, all) = (left.split_off(2), rig.endpoints());
    rig.apply(&web().endpoints(first.clone()));
    for from in rig.clients() {
        for family in Family::ALL {
            let to = vec![web_ip().port(family, UDP_PORT)];
            let udp = UdpLoop { to, rate: 400, workers: 1, count: None, sockets: UdpSockets::UnconnectedKept };
            let mut load = from.udp_loop(udp);
            let stats = load.wait_answers(30);
            let servers: Vec<_> = stats.by_server.keys().cloned().collect();
            assert_eq!(servers.len(), 1, "one of two backends answered: {:?}", stats.by_server);
            // More backends do not move it, although a new pick might.
            rig.apply(&web().endpoints(all.clone()));
            let stats = load.wait_answers(30);
            assert_eq!(stats.by_server.len(), 1, "{:?}", stats.by_server);
            // Without its backend it goes to another, once.
            let (gone, others): (Vec<_>, Vec<_>) =
                all.iter().cloned().partition(|endpoint| name_of(&rig, endpoint) == servers[0]);
            rig.apply(&web().endpoints(others));
            rig.agent.wait_backend_gone(gone[0].addrs.port(family, UDP_TARGET));
            let gone = load.stats().by_server[&servers[0]];
            let stats = load.wait_answers(30);
            // One that was on its way.
            assert!(stats.by_server[&servers[0]] <= gone + 1, "{:?}", stats.by_server);
            let servers: BTreeSet<_> = load.finish_clean().by_server.into_keys().collect();
            assert_eq!(servers.len(), 2, "{servers:?}");
            rig.apply(&web().endpoints(first.clone()));
        }
    }
}

/// The name of the pod that an endpoint is.
fn name_of(rig: &Rig, endpoint: &Endpoint) -> String {
    let pod = rig.node().pods.iter().find(|pod| pod.addrs == endpoint.addrs).expect("every endpoint is a pod");
    pod.place.name().to_owned()
}
