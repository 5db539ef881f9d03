//! The agent comes and goes; what it has programmed stays and is taken over.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;
use shunt_tests::cgroup::Cgroup;
use shunt_tests::place::Place;
use shunt_tests::probe::{TcpLoop, UdpLoop, UdpSockets};
use shunt_tests::process::Process;
use shunt_tests::traffic::Ports;
use shunt_tests::wait;

use crate::node::{Lone, service, text};

const VIP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);

fn names_and_ids(node: &Lone) -> Vec<(String, u64)> {
    let services = node.json("services");
    let services = services.as_array().expect("a list").iter();
    let pair = |service: &serde_json::Value| {
        (service["name"].as_str().expect("a name").to_owned(), service["id"].as_u64().expect("an id"))
    };
    services.map(pair).collect()
}

#[test]
fn services_work_without_an_agent_and_keep_their_ids_under_the_next() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("z", &service("z", "10.96.0.26", &["10.244.1.1"], 8080));
    node.start([]);
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    wait::until("the second service", || names_and_ids(&node).len() == 2);
    let before = names_and_ids(&node);
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node");

    node.crash();
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node", "the hooks outlive the agent");
    node.manifests.delete("z");
    node.start([]);
    node.log("adopted=true");
    // Its name goes when no program can read its record any more.
    wait::until("same id, and the service deleted meanwhile is gone", || names_and_ids(&node) == before[1..]);
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node");
    node.stop();
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node");
}

#[test]
fn node_ports_follow_the_default_route() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.place.ns().ip(["addr add 10.244.2.1/24 dev eth0"]);
    let web = service("web", "10.96.0.10", &["10.244.1.1"], 8080)
        .replace("type: ClusterIP", "type: NodePort")
        .replace("{port: 80, protocol: TCP}", "{port: 80, protocol: TCP, nodePort: 30080}");
    node.manifests.write_text("web", &web);
    node.start([]);
    let answers =
        |node: &Lone, last| node.place.tcp(SocketAddr::new(Ipv4Addr::new(10, 244, last, 1).into(), 30080)).is_ok();
    wait::until("the first address to answer", || answers(&node, 1));
    assert!(!answers(&node, 2));
    node.place.ns().ip(["route add default via 10.244.2.2 src 10.244.2.1"]);
    wait::until("the address that leads out to answer", || answers(&node, 2));
    wait::until("the other one to stop", || !answers(&node, 1));
    node.place.ns().ip(["route del default"]);
    wait::until("the first address to answer again", || answers(&node, 1) && !answers(&node, 2));
}

#[test]
fn a_manifest_that_is_broken_while_the_agent_restarts_costs_its_service_nothing() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("z", &service("z", "10.96.0.26", &["10.244.1.1"], 8080));
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    node.start([]);
    let known = |node: &Lone| names_and_ids(node).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    wait::until("both services", || known(&node).len() == 2);
    let before = names_and_ids(&node);

    node.manifests.write_text("web", "kind: [");
    node.crash();
    // Another file goes and a new one comes: both count.
    node.manifests.delete("z");
    node.manifests.write_text("y", &service("y", "10.96.0.25", &["10.244.1.1"], 8080));
    node.start([]);
    node.log("web.yaml");
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node");
    assert_eq!(node.place.tcp(SocketAddr::new(Ipv4Addr::new(10, 96, 0, 25).into(), 80)).unwrap().server, "node");
    // Nobody knows whether the broken file holds `z` now.
    assert_eq!(known(&node).len(), 3);

    node.manifests.write_text("web", &service("web", "10.96.0.11", &["10.244.1.1"], 8080));
    wait::until("the mended file to count", || {
        node.place.tcp(SocketAddr::new(Ipv4Addr::new(10, 96, 0, 11).into(), 80)).is_ok()
    });
    wait::until("the deleted one to go", || known(&node).len() == 2);
    assert!(
        names_and_ids(&node).contains(before.iter().find(|(name, _)| name.contains("/web:")).expect("it was there"))
    );
    node.manifests.write_text("web", "kind: [");
    node.crash();
    node.manifests.delete("web");
    node.start([]);
    wait::until("the service to go with its file", || known(&node).len() == 1);
    node.stop();
}

/// Each start loads the programs anew and puts them behind the links that are there: one connection after the other, and
/// UDP from sockets that stay, must not notice.
#[test]
fn nothing_fails_while_agents_are_killed_and_replaced() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[8080] });
    let both = service("web", "10.96.0.10", &["10.244.1.1"], 8080)
        .replace(
            "ports: [{port: 80, protocol: TCP}]",
            "ports: [{name: t, port: 80, protocol: TCP}, {name: u, port: 80, protocol: UDP}]",
        )
        .replace(
            "ports: [{name: '', port: 8080, protocol: TCP}]",
            "ports: [{name: t, port: 8080, protocol: TCP}, {name: u, port: 8080, protocol: UDP}]",
        );
    node.manifests.write_text("web", &both);
    node.start([]);
    let (to, rate, workers) = (vec![VIP], 200, 4);
    let mut tcp = node.place.tcp_loop(TcpLoop { to: to.clone(), rate, workers, count: None });
    let mut udp = node.place.udp_loop(UdpLoop { to, rate, workers, count: None, sockets: UdpSockets::UnconnectedKept });
    let ids = |node: &Lone| node.json("services").as_array().map(Vec::len);
    for _ in 0..4 {
        tcp.wait_answers(20);
        udp.wait_answers(20);
        node.crash();
        tcp.wait_answers(20);
        node.start([]);
        node.log("adopted=true");
        assert_eq!(ids(&node), Some(2));
    }
    assert_eq!(node.device_pins().len(), 4, "no link is left behind: {:?}", node.device_pins());
    tcp.finish_clean();
    udp.finish_clean();
}

/// The links of an agent with another version of the tables are taken over; its tables go when nothing uses them.
#[test]
fn tables_of_another_version_go_once_their_programs_are_replaced() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    node.start([]);
    node.stop();
    let pins = node.pins();
    let foreign = pins.base().join("v4000000000");
    std::fs::rename(pins.maps(pins.current().unwrap().unwrap()), &foreign).expect("pins can be moved");
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node", "programs hold their tables, whatever the pins are called");
    node.start([]);
    node.log("tables of a version that cannot be read");
    assert!(!foreign.exists());
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node");
    assert_eq!(node.device_pins().len(), 4);
}

#[test]
fn a_second_agent_on_one_directory_refuses() {
    let mut node = Lone::new();
    node.start([]);
    let mut second = Process::start("second", node.agent_command([]));
    let status = second.wait();
    assert_eq!(status.code(), Some(1), "{second}");
    assert!(second.lines().join("\n").contains("another agent owns"), "{second}");
    assert_eq!(node.json("status")["agent"], true);
}

/// Asking whether an agent runs takes the lock for nobody.
#[test]
fn an_agent_starts_while_the_status_is_asked_for() {
    let mut node = Lone::new();
    node.start([]);
    node.stop();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    node.pins().is_locked().expect("it is there");
                }
            });
        }
        let lock = node.pins().lock();
        stop.store(true, Ordering::Relaxed);
        lock.expect("nobody owns it");
    });
    assert_eq!(node.json("status")["agent"], false);
}

#[test]
fn all_that_is_wrong_with_the_flags_is_told_at_once() {
    let node = Lone::new();
    let mut agent = Process::start("agent", node.agent_command(["--snat-ports", "9-3", "--cluster-cidr", "x"]));
    assert_eq!(agent.wait().code(), Some(64), "{agent}");
    let told = agent.lines().join("\n");
    assert!(told.contains("--snat-ports") && told.contains("--cluster-cidr"), "{told}");
}

#[test]
fn another_control_group_takes_the_hooks_over() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    node.start([]);
    node.stop();
    let other = Cgroup::new(&node.bed, "other");
    node.start(["--cgroup", &text(other.dir())]);
    let there = Place::new("there", node.place.ns().clone(), Some(other));
    assert_eq!(there.tcp(VIP).unwrap().server, "node");
    assert!(node.place.tcp(VIP).is_err(), "the hooks have left the first group");
}

#[test]
fn sockets_are_left_alone_when_that_is_wanted() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    node.start([]);
    node.stop();
    node.start(["--socket-lb", "off", "--host-clients", "off"]);
    assert!(node.place.tcp(VIP).is_err());
    assert_eq!(node.json("status")["socket_hooks"], 0);
}

#[test]
fn the_drain_ends_the_agent_by_either_signal_with_success() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut node = Lone::new();
        let mut agent = Process::start("agent", node.agent_command([]));
        agent.wait_line(0, "readiness", |line| line.contains("first plan applied").then_some(()));
        agent.signal(signal);
        assert!(agent.wait().success(), "{signal}: {agent}");
        node.start([]);
    }
}

/// What the tables cannot tell comes from the agent: here a service whose port name is too long for the table of names.
#[test]
fn status_tells_what_a_service_does_not_get() {
    let mut node = Lone::new();
    let long = "x".repeat(250);
    node.manifests.write_text("long", &service(&long, "10.96.0.11", &["10.244.1.1"], 8080));
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    node.start([]);
    let output = node.shunt(["status", "--admin-socket", &text(node.admin_socket())]);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("agent         running"), "{shown}");
    assert!(shown.contains("a name has at most 256"), "{shown}");
    assert_eq!(names_and_ids(&node).len(), 1);
}
