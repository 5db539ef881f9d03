//! The real kube-proxy before, beside and after the agent. Loads never try again: neither a connection that is there nor a
//! new one may notice who translates it.

use std::net::SocketAddr;

use nix::sys::signal::Signal;
use serde_json::Value;
use shunt_tests::control_plane::KubeProxyMode;
use shunt_tests::place::Place;
use shunt_tests::probe::{LongLived, TcpLoop, UdpLoop, UdpSockets};
use shunt_tests::process::Process;
use shunt_tests::topology::CLUSTER;
use shunt_tests::traffic::Load;
use shunt_tests::wait::until;

use crate::rig::{Rig, deployment, service_with_datagrams};

/// kube-proxy on every node; dropped, it is killed and its rules stay.
struct KubeProxies(Vec<Process>);

impl KubeProxies {
    /// Starts them and waits until their rules name every endpoint.
    #[track_caller]
    fn start(rig: &Rig) -> Self {
        let proxies = Self(places(rig).iter().map(|place| start(rig, place)).collect());
        let endpoints = rig.wait_ready("web", 2);
        for place in places(rig) {
            until(&format!("the rules of kube-proxy on {}", place.name()), || {
                let rules = place.ns().output(["nft", "list", "ruleset"]);
                endpoints.iter().all(|endpoint| rules.contains(&format!("{endpoint} . 8080")))
            });
        }
        proxies
    }

    /// Ends them and removes what they left, as their operators do.
    #[track_caller]
    fn remove(mut self, rig: &Rig) {
        for proxy in &mut self.0 {
            proxy.signal(Signal::SIGTERM);
            proxy.wait();
        }
        for place in places(rig) {
            let mut cleanup = place.command(rig.plane.binary("kube-proxy"));
            cleanup.arg("--cleanup");
            place.ns().feed(cleanup, "");
            assert!(!place.ns().output(["nft", "list", "ruleset"]).contains("kube-proxy"), "its rules are gone");
        }
    }
}

fn start(rig: &Rig, place: &Place) -> Process {
    let mut command = rig.plane.kube_proxy(place, place.name(), KubeProxyMode::Nftables);
    // The usual ports are the agent's, which runs beside it.
    command.arg(format!("--cluster-cidr={CLUSTER}"));
    command.args(["--metrics-bind-address=127.0.0.1:10349", "--healthz-bind-address=0.0.0.0:10356"]);
    Process::start(&format!("kube-proxy of {}", place.name()), command)
}

/// The nodes themselves.
fn places(rig: &Rig) -> Vec<Place> {
    rig.pods.cluster().nodes.iter().map(|node| node.place.clone()).collect()
}

/// A service with a backend on each node.
#[track_caller]
fn serve(rig: &Rig) -> Value {
    let stored = rig.api().create(&service_with_datagrams("web")).expect("the service is accepted");
    rig.api().create(&deployment("web", 2, "1")).expect("the deployment is accepted");
    rig.wait_ready("web", 2);
    stored
}

/// One kind of client and where it dials.
struct Client {
    place: Place,
    streams: Vec<SocketAddr>,
    datagrams: Vec<SocketAddr>,
}

impl Client {
    /// Pods by sockets and by packets, a process of the node, a machine outside.
    fn all(rig: &Rig, service: &Value) -> [Self; 4] {
        let clients = rig.clients();
        let host = places(rig).swap_remove(0);
        let inside = rig.cluster_addresses(service);
        let within = |place| Self { place, streams: inside.clone(), datagrams: inside.clone() };
        let (streams, datagrams) = (rig.node_addresses_of(service, 0), rig.node_addresses_of(service, 1));
        let outside = Self { place: clients.outside, streams, datagrams };
        [within(clients.by_socket), within(clients.by_packets), within(host), outside]
    }

    /// Connections that stay, a few to each address.
    #[track_caller]
    fn stay(&self) -> Vec<Load> {
        let long = |to: &SocketAddr| self.place.long_lived(LongLived { to: *to, connections: 3, interval_ms: 50 });
        self.streams.iter().map(long).collect()
    }

    /// Sockets that stay and send datagrams.
    #[track_caller]
    fn send(&self) -> Vec<Load> {
        let sockets = UdpSockets::UnconnectedKept;
        let udp = |to: &SocketAddr| {
            self.place.udp_loop(UdpLoop { to: vec![*to], rate: 20, workers: 2, count: None, sockets })
        };
        self.datagrams.iter().map(udp).collect()
    }

    /// New connections.
    #[track_caller]
    fn dial(&self) -> Load {
        self.place.tcp_loop(TcpLoop { to: self.streams.clone(), rate: 20, workers: 2, count: None })
    }
}

#[track_caller]
fn go_on(loads: &mut [Load]) {
    loads.iter_mut().for_each(|load| drop(load.wait_answers(20)));
}

#[test]
fn connections_outlive_the_kube_proxy_that_shunt_replaces() {
    let mut rig = Rig::without_agents();
    let service = serve(&rig);
    let proxies = KubeProxies::start(&rig);
    let clients = Client::all(&rig, &service);
    let mut loads: Vec<Load> =
        clients.iter().flat_map(|client| client.stay().into_iter().chain(client.send())).collect();
    loads.extend(clients.iter().map(Client::dial));
    go_on(&mut loads);
    rig.start_agents();
    go_on(&mut loads);
    proxies.remove(&rig);
    go_on(&mut loads);
    for load in loads {
        load.finish_clean();
    }
}

#[test]
fn connections_outlive_the_shunt_that_kube_proxy_replaces() {
    let mut rig = Rig::new();
    let service = serve(&rig);
    rig.wait_backends("web", 2);
    let clients = Client::all(&rig, &service);
    // Those of sockets stay for good: no packet of theirs is translated.
    let [by_socket, by_packets, host, outside] = &clients;
    let mut lasting: Vec<Load> = [by_socket, host].into_iter().flat_map(Client::stay).collect();
    lasting.extend(clients.iter().flat_map(Client::send));
    lasting.extend(clients.iter().map(Client::dial));
    let mut drained: Vec<Load> = [by_packets, outside].into_iter().flat_map(Client::stay).collect();
    go_on(&mut drained);
    go_on(&mut lasting);

    let _proxies = KubeProxies::start(&rig);
    go_on(&mut lasting);
    rig.agents.iter_mut().for_each(|agent| assert!(agent.stop().success()));
    let drain = |limit: &[&str]| -> Vec<Process> {
        let words = [&["cleanup", "--drain"], limit].concat();
        rig.agents.iter().map(|agent| agent.spawn_shunt(&words)).collect()
    };
    let mut drains = drain(&[]);
    for drain in &drains {
        drain.wait_line(0, "flows that are left", |line| line.contains("flows are left").then_some(()));
    }
    go_on(&mut drained);
    go_on(&mut lasting);
    assert!(drains.iter_mut().all(|drain| drain.try_wait().is_none()), "connections are waited for");
    for drain in &mut drains {
        drain.signal(Signal::SIGINT);
        drain.wait();
    }
    go_on(&mut drained);
    for load in drained {
        load.finish_clean();
    }
    // Datagrams that never pause are given up when the time is over: their sockets may meet another backend.
    for drain in &mut drain(&["1s"]) {
        assert!(drain.wait().success(), "{drain}");
        assert!(drain.lines().iter().any(|line| line.contains("removed from")), "{drain}");
    }
    go_on(&mut lasting);
    for load in lasting {
        load.finish_clean();
    }
}
