//! Endpoints come and go while clients dial; files are rewritten, renamed, removed and broken.

use std::fs;
use std::net::SocketAddr;

use shunt_tests::manifests::{Endpoint, Service};
use shunt_tests::place::Place;
use shunt_tests::probe::{TcpLoop, UdpLoop, UdpSockets};
use shunt_tests::topology::{Addrs, Family, Plan, Pod};
use shunt_tests::traffic::{Load, Ports, Server};

use crate::rig::{Rig, Socket, TCP_PORT, TCP_TARGET, UDP_PORT, UDP_TARGET, case, web, web_ip};

const SERVED: Ports<'_> = Ports { tcp: &[TCP_TARGET], udp: &[UDP_TARGET] };

/// New connections and datagrams to `web` without end, in both families, from all clients of the rig.
#[track_caller]
fn start_loads(rig: &Rig) -> Vec<Load> {
    let both = |port: u16| Family::ALL.map(|family| web_ip().port(family, port)).to_vec();
    let start = |from: &Place| {
        let (workers, count) = (4, None);
        let sockets = [UdpSockets::ConnectedEach, UdpSockets::UnconnectedEach];
        let udp =
            sockets.map(|sockets| from.udp_loop(UdpLoop { to: both(UDP_PORT), rate: 200, workers, count, sockets }));
        let tcp = from.tcp_loop(TcpLoop { to: both(TCP_PORT), rate: 400, workers, count });
        udp.into_iter().chain([tcp]).collect::<Vec<_>>()
    };
    rig.clients().into_iter().flat_map(start).collect()
}

/// Waits until each has got some more answers: what was begun before this call has ended.
#[track_caller]
fn wait_answers(loads: &mut [Load]) {
    for load in loads {
        load.wait_answers(40);
    }
}

/// Ends them; not one attempt failed.
#[track_caller]
fn finish_clean(loads: Vec<Load>) {
    for load in loads {
        load.finish_clean();
    }
}

/// A way to put a new text into the place of a manifest.
type Write = fn(&Rig, &Service);

/// The file is emptied and written anew.
fn rewrite_in_place(rig: &Rig, service: &Service) {
    let objects: Vec<_> = service.objects().iter().map(ToString::to_string).collect();
    let path = rig.manifests.dir().join("web.yaml");
    fs::write(&path, objects.join("\n---\n"))
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}

/// Another file takes its name.
fn rename_over(rig: &Rig, service: &Service) {
    rig.manifests.apply(service);
}

/// One pod after the other is replaced by a new one: the new one is added, the old one taken out, then killed.
#[track_caller]
fn roll(write: Write) {
    let mut rig = Rig::build(3);
    let mut servers: Vec<Server> = rig.servers.drain(..).collect();
    let mut endpoints = rig.endpoints();
    rig.apply_web();
    let mut loads = start_loads(&rig);
    let mut new_pods: Vec<(Pod, Server)> = Vec::new();
    for _ in 0..3 {
        let pod = rig.cluster.nodes[0].add_pod();
        let server = pod.place.serve(SERVED);
        endpoints.push(Endpoint::from(&pod));
        write(&rig, &web().endpoints(endpoints.clone()));
        rig.agent.wait_endpoints("web", 4);
        endpoints.remove(0);
        write(&rig, &web().endpoints(endpoints.clone()));
        rig.agent.wait_endpoints("web", 3);
        wait_answers(&mut loads);
        servers.remove(0).kill();
        wait_answers(&mut loads);
        new_pods.push((pod, server));
    }
    for load in &mut loads {
        let names: Vec<_> = new_pods.iter().map(|(pod, _)| pod.place.name().to_owned()).collect();
        load.wait_for("answers of all new pods", |stats| names.iter().all(|name| stats.by_server.contains_key(name)));
    }
    finish_clean(loads);
}

#[test]
fn no_connection_fails_while_all_pods_are_replaced_and_files_renamed() {
    roll(rename_over);
}

#[test]
fn no_connection_fails_while_all_pods_are_replaced_and_files_rewritten() {
    roll(rewrite_in_place);
}

#[test]
fn no_connection_fails_while_a_service_grows_and_shrinks() {
    let rig = Rig::build(4);
    rig.apply_web();
    let all = rig.endpoints();
    let mut loads = start_loads(&rig);
    for count in [1, 4, 2, 3, 1, 2, 4] {
        rig.apply(&web().endpoints(all[..count].to_vec()));
        wait_answers(&mut loads);
    }
    finish_clean(loads);
}

/// Both families and protocols of a client are answered by one of `pods`.
#[track_caller]
fn assert_answered(from: &Place, at: Addrs, pods: &[&str]) {
    for (socket, family) in Socket::of_both_families() {
        let to: SocketAddr = at.port(family, socket.port());
        let answer = socket.ask(from, to).unwrap_or_else(|failure| panic!("{}: {failure}", case(from, socket, to)));
        assert!(pods.contains(&answer.server.as_str()), "{}: by {}", case(from, socket, to), answer.server);
    }
}

#[test]
fn a_manifest_that_cannot_be_parsed_changes_nothing_and_the_next_good_one_counts() {
    let rig = Rig::build(2);
    rig.apply_web();
    let good = fs::read_to_string(rig.manifests.dir().join("web.yaml")).expect("it was written");
    // Cut off within a text in quotes.
    let torn = &good[..good.rfind(": \"").expect("texts are in quotes") + 5];
    for (number, bad) in [": not yaml: [", torn, "\u{0}\u{1}", "--- {{{"].iter().enumerate() {
        let line = rig.agent.process().line_count();
        rig.manifests.write_text("web", bad);
        rig.agent
            .process()
            .wait_line(line, "a complaint that names the file", |line| line.contains("web.yaml").then_some(()));
        for from in rig.clients() {
            assert_answered(from, web_ip(), &["pod-1-1", "pod-1-2"]);
        }
        let only = &rig.node().pods[number % 2];
        rig.apply(&web().endpoints([only]));
        for from in rig.clients() {
            assert_answered(from, web_ip(), &[only.place.name()]);
        }
        rig.apply_web();
    }
}

#[test]
fn a_bad_object_harms_nothing_beside_it() {
    let rig = Rig::build(2);
    let mut objects = web().endpoints(rig.endpoints()).objects();
    let mut bad = crate::rig::plain("bad", shunt_tests::topology::SERVICES.host(11)).objects();
    bad[0]["spec"]["ports"] = serde_json::json!("eighty");
    objects.splice(1..1, bad);
    let line = rig.agent.process().line_count();
    rig.manifests.write("web", &objects);
    rig.agent.process().wait_line(line, "a complaint that names the object", |line| line.contains("bad").then_some(()));
    rig.agent.wait_endpoints("web", 2);
    for from in rig.clients() {
        assert_answered(from, web_ip(), &["pod-1-1", "pod-1-2"]);
    }
}

#[test]
fn a_service_goes_with_its_file_and_comes_back_with_it() {
    let rig = Rig::build(1);
    rig.apply_web();
    for _ in 0..2 {
        rig.manifests.delete("web");
        shunt_tests::wait::until("the service's end", || rig.agent.ports_of("web").is_empty());
        rig.apply_web();
        for from in rig.clients() {
            assert_answered(from, web_ip(), &["pod-1-1"]);
        }
    }
}

#[test]
fn sockets_are_served_while_no_agent_runs_and_the_next_one_follows_the_files() {
    let mut rig = Rig::build(2);
    rig.apply_web();
    let mut loads = start_loads(&rig);
    wait_answers(&mut loads);
    rig.agent.crash();
    wait_answers(&mut loads);
    // Written while nobody looks.
    rig.manifests.apply(&web().endpoints([rig.pod(1)]));
    rig.agent.start();
    rig.agent.wait_endpoints("web", 1);
    wait_answers(&mut loads);
    for from in rig.clients() {
        assert_answered(from, web_ip(), &["pod-1-2"]);
    }
    finish_clean(loads);
}

#[test]
fn changes_in_the_second_after_the_last_are_seen_too() {
    let rig = Rig::build(2);
    // Same length, same second, same inode: only the contents differ.
    for round in 0..20 {
        let only = rig.pod(round % 2);
        rewrite_in_place(&rig, &web().endpoints([only]));
        let target = only.addrs.port(Family::V4, TCP_TARGET);
        shunt_tests::wait::until("the other endpoint", || {
            rig.agent.port_of("web", &Socket::Tcp.port_name(), Family::V4).is_some_and(|port| port.cluster.has(target))
        });
    }
}

/// The plan that most tests here use has one node; with two, the second's pods are as good.
#[test]
fn endpoints_on_another_node_are_reached_by_the_same_sockets() {
    let rig = Rig::build_with(Plan { nodes: 2, pods: 1, ..Plan::default() }, |agent| agent);
    let remote = &rig.cluster.nodes[1].pods[0];
    rig.apply(&web().endpoints([remote]));
    for from in rig.clients() {
        assert_answered(from, web_ip(), &[remote.place.name()]);
    }
}
