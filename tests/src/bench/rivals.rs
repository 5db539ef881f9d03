//! Shunt beside the real kube-proxy, in both of its modes: nodes of one kind with the same objects from one control plane.
//!
//! For every number of services, one after the other loads them cold and follows changes; nobody else runs meanwhile. Then
//! connections are compared, in turns, with nobody running: each one's work lies in the kernel. A node without any proxy stands beside
//! them; what nodes differ by without proxies is measured first and divided out. Many services are measured, since iptables has them in
//! a row. kube-proxy is configured as by default; what it waits between two changes is not counted, since changes come
//! after longer pauses.

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::load::{self, Job, Meter, PORT};
use super::path::filler;
use super::{Row, control, median};
use crate::agent::Agent;
use crate::control_plane::{self, Api, ControlPlane, Identity, Kind, KubeProxyMode, Part, Patch};
use crate::manifests::{self, Service, cluster_cidr, service};
use crate::place::Place;
use crate::probe::{TcpOnce, tcp_once};
use crate::process::Process;
use crate::topology::{Addrs, Cluster, Family, Plan, Pod, SERVICES};
use crate::traffic::{Ports, Server};

/// Services that connections are made through.
const MEASURED: u16 = 12;
/// Connections a service and round.
const CONNECTIONS: usize = 25;
/// Endpoints of every other service. With ten, mode nftables would load for many minutes.
const ENDPOINTS: usize = 2;
/// Changes measured.
const CHANGES: usize = 9;
/// Between a change that has arrived and the next: kube-proxy's least time between two, and its cleaning up after one.
const PAUSE: Duration = Duration::from_millis(2500);
/// Between two attempts to meet what has changed.
const LOOK: Duration = Duration::from_micros(500);
/// Before a dial is given up that nobody answers, while services are loaded.
const GLANCE: Duration = Duration::from_millis(100);
/// Nobody should take that long.
const LIMIT: Duration = Duration::from_secs(1800);
/// Where the servers of changed services listen.
const TARGET: u16 = 8080;
/// Clients that fill the control plane.
const WRITERS: usize = 6;

/// Who serves a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Nobody,
    Shunt,
    Iptables,
    Nftables,
}

impl Who {
    const ALL: [Self; 4] = [Self::Nobody, Self::Shunt, Self::Iptables, Self::Nftables];
    const PROXIES: [Self; 3] = [Self::Shunt, Self::Iptables, Self::Nftables];
    const RIVALS: [Self; 2] = [Self::Iptables, Self::Nftables];

    fn name(self) -> &'static str {
        match self {
            Self::Nobody => "no proxy",
            Self::Shunt => "Shunt",
            Self::Iptables => "kube-proxy iptables",
            Self::Nftables => "kube-proxy nftables",
        }
    }
}

/// Measures every number of services, each beside the real kube-proxy.
pub fn rows(rounds: usize, services: &[usize]) -> Vec<Row> {
    if let Err(why) = control_plane::find_bin_dir() {
        return vec![Row::missing("Shunt beside kube-proxy".to_owned(), "", &why)];
    }
    let plane = ControlPlane::start_apart();
    store_basis(plane.api(), &sites(&plane)[0].cluster);
    // Nothing of what follows is its work.
    plane.halt(Part::ControllerManager);
    let (mut rows, mut filled) = (Vec::new(), 0);
    for &count in services {
        eprintln!("rivals: {count} services are stored");
        fill(plane.api(), filled, count);
        filled = count.max(filled);
        rows.extend(with_services(rounds, filled, &plane));
    }
    rows
}

/// A node, what runs on it, and its client.
struct Site {
    who: Who,
    _servers: (Process, Vec<Server>),
    cluster: Cluster,
}

fn sites(plane: &ControlPlane) -> Vec<Site> {
    let site = |(link, who)| {
        let cluster = Cluster::build(Plan { pods: 3, ..Plan::default() });
        plane.connect(link, &cluster);
        let pods = &cluster.nodes[0].pods;
        let ports = Ports { tcp: &[TARGET], udp: &[] };
        let answering = pods[1..].iter().map(|pod| pod.place.unhooked().serve(ports)).collect();
        Site { who, _servers: (load::server(&pods[1].place.unhooked()), answering), cluster }
    };
    (0..).zip(Who::ALL).map(site).collect()
}

impl Site {
    fn client(&self) -> &Place {
        &self.cluster.nodes[0].pods[0].place
    }

    fn pods(&self) -> &[Pod] {
        &self.cluster.nodes[0].pods
    }
}

/// The address of a measured service.
fn measured_at(number: u16) -> Addrs {
    SERVICES.host(100 + number)
}

/// The address of the service whose endpoint changes.
fn changed_at() -> Addrs {
    SERVICES.host(90)
}

fn measured(cluster: &Cluster) -> Vec<Value> {
    let pods = &cluster.nodes[0].pods;
    let of = |service: Service| service.endpoints([&pods[1]]).objects();
    let measured = (0..MEASURED)
        .map(|number| of(service(&format!("measured-{number}")).cluster_ips(measured_at(number)).tcp(80, PORT)));
    let changed = of(service("changed").cluster_ips(changed_at()).tcp(80, TARGET));
    measured.flatten().chain(changed).collect()
}

/// Stores what is there at every number of services; the clusters of all sites look the same.
fn store_basis(api: &Api, cluster: &Cluster) {
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "filler" } });
    create(api, &[manifests::node(&cluster.nodes[0]), namespace]);
    create(api, &measured(cluster));
}

#[track_caller]
fn create(api: &Api, objects: &[Value]) {
    for object in objects {
        api.create(object).unwrap_or_else(|error| panic!("{error}: {object:#}"));
    }
}

/// Stores services up to `to`.
fn fill(api: &Api, from: usize, to: usize) {
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            scope.spawn(move || {
                let api = api.reconnected();
                for number in (from + writer..to).step_by(WRITERS) {
                    let mut objects = filler(number);
                    objects[1]["endpoints"].as_array_mut().expect("a list").truncate(ENDPOINTS);
                    create(&api, &objects);
                }
            });
        }
    });
}

fn with_services(rounds: usize, services: usize, plane: &ControlPlane) -> Vec<Row> {
    let sites = sites(plane);
    let before = Dialling::start(&sites, |_| true).round_ratios(rounds);
    let proxied = |who| sites.iter().find(|site| site.who == who).expect("there is one of each");
    let courses: Vec<_> = Who::PROXIES.into_iter().map(|who| Course::run(proxied(who), services, plane)).collect();
    let mut rows = course_rows(services, &courses);
    rows.extend(connection_rows(rounds, services, &sites, &before));
    rows
}

/// What one proxy did with so many services, one after the other.
struct Course {
    who: Who,
    /// From the process's start to the first connections through the first services and the last.
    load: Duration,
    usage: control::Usage,
    /// From the write of a slice to the first connection to the new endpoint; milliseconds, the median.
    change: f64,
    /// The API server's answer to the write, in it.
    write: f64,
}

impl Course {
    fn run(site: &Site, services: usize, plane: &ControlPlane) -> Self {
        eprintln!("rivals: {} with {services} services", site.who.name());
        let start = Instant::now();
        let mut proxy = Proxy::start(site, plane);
        wait_loaded(site, &proxy);
        let load = start.elapsed();
        let usage = control::usage(proxy.id());
        eprintln!("rivals: loaded in {load:.1?}");
        let (mut changes, mut writes) = (Vec::new(), Vec::new());
        for turn in 0..=CHANGES {
            thread::sleep(PAUSE);
            let (change, write) = change(site, plane.api(), &site.pods()[1 + (turn + 1) % 2]);
            // The first finds things that have never been asked for.
            if turn > 0 {
                changes.push(change.as_secs_f64() * 1e3);
                writes.push(write.as_secs_f64() * 1e3);
            }
        }
        proxy.stop();
        Self { who: site.who, load, usage, change: median(changes), write: median(writes) }
    }
}

/// A running proxy.
enum Proxy {
    Agent(Agent),
    KubeProxy(Process),
}

impl Proxy {
    fn start(site: &Site, plane: &ControlPlane) -> Self {
        let node = &site.cluster.nodes[0];
        let mode = match site.who {
            Who::Iptables => KubeProxyMode::Iptables,
            Who::Nftables => KubeProxyMode::Nftables,
            Who::Shunt | Who::Nobody => {
                let kubeconfig = plane.kubeconfig(Identity::KubeProxy);
                let mut agent = Agent::new(&site.cluster, node).with("--kubeconfig", kubeconfig);
                agent.spawn();
                return Self::Agent(agent);
            }
        };
        let mut command = plane.kube_proxy(&node.place, node.name(), mode);
        command.arg(format!("--cluster-cidr={}", cluster_cidr()));
        Self::KubeProxy(Process::start(site.who.name(), command))
    }

    fn id(&self) -> u32 {
        match self {
            Self::Agent(agent) => agent.process().id(),
            Self::KubeProxy(process) => process.id(),
        }
    }

    /// Ends it; what it has programmed stays.
    fn stop(&mut self) {
        match self {
            Self::Agent(agent) => drop(agent.stop()),
            Self::KubeProxy(process) => {
                process.signal(Signal::SIGTERM);
                process.wait();
            }
        }
    }
}

/// Returns when all services are served: kube-proxy writes all that it knows of a family at once, so that some tell of all;
/// an agent says when it is through.
fn wait_loaded(site: &Site, proxy: &Proxy) {
    let start = Instant::now();
    if let Proxy::Agent(agent) = proxy {
        agent.wait_log("first plan applied");
    }
    for addrs in (0..MEASURED).map(measured_at).chain([changed_at()]) {
        let to = addrs.port(Family::V4, 80);
        site.client().run(|| {
            while TcpStream::connect_timeout(&to, GLANCE).is_err() {
                assert!(start.elapsed() < LIMIT, "{} never serves {to}", site.who.name());
                thread::sleep(LOOK);
            }
        });
    }
}

/// How long it takes from before a slice is written, that sends clients to `pod`, to the first connection there; and how
/// long the writing takes.
fn change(site: &Site, api: &Api, pod: &Pod) -> (Duration, Duration) {
    let to = changed_at().port(Family::V4, 80);
    let endpoints = json!([{
        "addresses": [pod.addrs.v4], "nodeName": pod.node,
        "conditions": { "ready": true, "serving": true, "terminating": false },
    }]);
    let patch = Patch::Merge(json!({ "endpoints": endpoints }));
    thread::scope(|scope| {
        let start = Instant::now();
        let met = scope.spawn(move || site.client().run(|| wait_met(to, pod.place.name(), start)));
        api.namespaced(Kind::ENDPOINT_SLICE, "default").patch("changed-ipv4", &patch).expect("slices can be changed");
        let write = start.elapsed();
        (met.join().expect("the new endpoint is met"), write)
    })
}

fn wait_met(to: SocketAddr, name: &str, start: Instant) -> Duration {
    let ask = || tcp_once(&TcpOnce { to, bind: None, mapped: false });
    while !ask().is_ok_and(|answer| answer.server == name) {
        assert!(start.elapsed() < LIMIT, "{name} is never met");
        thread::sleep(LOOK);
    }
    start.elapsed()
}

/// Processes that measure connections, those of one round side by side.
struct Dialling {
    meters: Vec<(Who, &'static str, Meter, Vec<SocketAddr>)>,
}

impl Dialling {
    /// From every site's client, to the pod itself where `is_direct` says so, else through the services.
    fn start(sites: &[Site], is_direct: impl Fn(Who) -> bool) -> Self {
        let mut meters = Vec::new();
        for site in sites {
            let to: Vec<_> = match is_direct(site.who) {
                true => vec![site.pods()[1].addrs.port(Family::V4, PORT); usize::from(MEASURED)],
                false => (0..MEASURED).map(|number| measured_at(number).port(Family::V4, 80)).collect(),
            };
            if site.who == Who::Shunt && !is_direct(site.who) {
                meters.push((site.who, "socket path", Meter::start(site.client()), to.clone()));
            }
            meters.push((site.who, "packet path", Meter::start(&site.client().unhooked()), to));
        }
        Self { meters }
    }

    /// Nanoseconds of each, in turns: one list a round, in the order of the meters.
    fn rounds(&mut self, rounds: usize) -> Vec<Vec<f64>> {
        let mut round = || {
            let nanos = |(_, _, meter, to): &mut (Who, &str, Meter, Vec<SocketAddr>)| {
                let sum: f64 = to.iter().map(|&to| meter.nanos(Job::Connect { to, count: CONNECTIONS })).sum();
                sum / to.len() as f64
            };
            self.meters.iter_mut().map(nanos).collect::<Vec<_>>()
        };
        round();
        (0..rounds).map(|_| round()).collect()
    }

    /// Of each, the median ratio to the first.
    fn round_ratios(mut self, rounds: usize) -> Vec<f64> {
        let rounds = self.rounds(rounds);
        (0..self.meters.len()).map(|index| ratio(&rounds, index, 0)).collect()
    }
}

fn ratio(rounds: &[Vec<f64>], one: usize, other: usize) -> f64 {
    median(rounds.iter().map(|round| round[one] / round[other]).collect())
}

fn connection_rows(rounds: usize, services: usize, sites: &[Site], before: &[f64]) -> Vec<Row> {
    eprintln!("rivals: connections, {services} services");
    let mut dialling = Dialling::start(sites, |who| who == Who::Nobody);
    let found = dialling.rounds(rounds);
    let before = |who: Who| before[sites.iter().position(|site| site.who == who).expect("there is one of each")];
    let kinds: Vec<_> = dialling.meters.iter().map(|(who, path, ..)| (*who, *path)).collect();
    let compared = |one: usize, other: usize| ratio(&found, one, other) / before(kinds[one].0) * before(kinds[other].0);
    let label = |(who, path): (Who, &str)| match who {
        Who::Shunt => format!("Shunt's {path}"),
        _ => who.name().to_owned(),
    };
    let mut rows = Vec::new();
    for (index, &kind) in kinds.iter().enumerate().skip(1) {
        let what = format!(
            "connect and first byte, {services} services: {}, beside a pod directly without proxy",
            label(kind)
        );
        rows.push(Row::note(what, format!("{:.3} times", compared(index, 0))));
    }
    for (one, &kind) in kinds.iter().enumerate().filter(|(_, kind)| kind.0 == Who::Shunt) {
        for (other, &rival) in kinds.iter().enumerate().filter(|(_, kind)| Who::RIVALS.contains(&kind.0)) {
            let what = format!("connect and first byte, {services} services: {}, beside {}", label(kind), label(rival));
            rows.push(Row::ratio(what, "faster: below 1 time", 1.0, compared(one, other)));
        }
    }
    rows
}

fn course_rows(services: usize, courses: &[Course]) -> Vec<Row> {
    let mut rows = Vec::new();
    let shunt = courses.iter().find(|course| course.who == Who::Shunt).expect("it was run");
    for course in courses {
        let (name, usage) = (course.who.name(), &course.usage);
        let cpu = (usage.user + usage.kernel + usage.children).as_secs_f64();
        rows.push(Row::note(
            format!("cold load of {services} services: {name}"),
            format!("{:.2} s, {cpu:.2} s of processor time but for children at work", course.load.as_secs_f64()),
        ));
        rows.push(Row::note(
            format!("memory after it: {name} (RSS)"),
            format!("{:.0} MiB, and {:.0} MiB of tables", usage.rss_mib, usage.maps_mib),
        ));
        rows.push(Row::note(
            format!("an endpoint changed among {services} services, slice written to first connection: {name}"),
            format!("{:.2} ms, of which the write {:.2}", course.change, course.write),
        ));
    }
    for rival in courses.iter().filter(|course| course.who != Who::Shunt) {
        let (name, ratio) = (rival.who.name(), shunt.change / rival.change);
        let what = format!("the change, {services} services, beside {name}");
        // The goal speaks of many services alone.
        rows.push(if services >= 10_000 {
            Row::ratio(what, "100 times faster: at most 0.01", 0.01, ratio)
        } else {
            Row::ratio(what, "faster: below 1 time", 1.0, ratio)
        });
        let what = format!("the cold load, {services} services, beside {name}");
        rows.push(Row::ratio(what, "faster: below 1 time", 1.0, shunt.load.as_secs_f64() / rival.load.as_secs_f64()));
        let what = format!("memory, {services} services, beside {name}");
        rows.push(Row::ratio(what, "less: below 1 time", 1.0, shunt.usage.rss_mib / rival.usage.rss_mib));
    }
    rows
}
