//! What a connection costs: through a service, beside the pod directly; and traffic that is nobody's service, beside a node
//! without Shunt.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::load::{self, Job, Meter, PORT};
use super::{Row, median};
use crate::agent::Agent;
use crate::manifests::{Manifests, Service, service};
use crate::place::Place;
use crate::process::Process;
use crate::topology::{Addrs, Cluster, Family, Plan, SERVICES};

/// Connections a round.
const CONNECTIONS: usize = 300;
/// Bytes a round.
const BYTES: usize = 256 << 20;
/// Filler services a file.
const PER_FILE: usize = 100;

/// Measures every number of services.
pub fn rows(rounds: usize, services: &[usize]) -> Vec<Row> {
    let plan = Plan { pods: 3, ..Plan::default() };
    let cluster = Cluster::build(plan);
    let other = Cluster::build(plan);
    let manifests = Manifests::of(&cluster);
    let (client, backend) = (&cluster.nodes[0].pods[0], &cluster.nodes[0].pods[1]);
    let _server = load::server(&backend.place);
    let foreign = Foreign::start(rounds, &cluster, &other);
    let web = SERVICES.host(1);
    manifests.apply(&the_service(web, &cluster));
    let _agent = Agent::start_on(&cluster, &cluster.nodes[0], &manifests);
    let mut rows = Vec::new();
    let mut filled = 0;
    for &count in services {
        fill(&manifests, filled, count);
        filled = count.max(filled);
        wait_filled(&_agent, filled);
        eprintln!("path: {count} services");
        rows.extend(through(rounds, count, &client.place, backend.addrs, web));
    }
    rows.extend(bulk(rounds, &client.place, backend.addrs, web));
    rows.extend(foreign.rows());
    rows
}

fn the_service(addrs: Addrs, cluster: &Cluster) -> Service {
    service("measured").cluster_ips(addrs).tcp(80, PORT).endpoints([&cluster.nodes[0].pods[1]])
}

/// Adds services with ten endpoints each up to `to`, in files of [`PER_FILE`].
pub fn fill(manifests: &Manifests, from: usize, to: usize) {
    for first in (from..to).step_by(PER_FILE) {
        let numbers = first..(first + PER_FILE).min(to);
        let objects: Vec<Value> = numbers.flat_map(filler).collect();
        manifests.write(&format!("filler-{first}"), &objects);
    }
}

/// A service with ten endpoints on other nodes.
pub fn filler(number: usize) -> Vec<Value> {
    let name = format!("filler-{number}");
    let vip = SERVICES.host(256 + number as u16).v4;
    let endpoint = |i: usize| {
        let at = number * 10 + i;
        json!({ "addresses": [format!("10.{}.{}.{}", 128 + (at >> 16), at >> 8 & 255, at & 255)],
                "conditions": { "ready": true }, "nodeName": format!("node-{}", at % 100 + 10) })
    };
    vec![
        json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name, "namespace": "filler" },
                "spec": { "clusterIP": vip, "clusterIPs": [vip], "ipFamilies": ["IPv4"],
                          "ports": [{ "name": "http", "port": 80, "protocol": "TCP" }] } }),
        json!({ "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": { "name": format!("{name}-a"), "namespace": "filler",
                              "labels": { "kubernetes.io/service-name": name } },
                "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
                "endpoints": (0..10).map(endpoint).collect::<Vec<_>>() }),
    ]
}

fn wait_filled(agent: &Agent, count: usize) {
    let last = format!("filler-{}", count - 1);
    crate::wait::until("the last filler service", || agent.shunt(["services"]).contains(&last));
}

/// The median over rounds of the ratios that `measure` gives for one thing and the other, in turns.
fn compare(rounds: usize, mut measure: impl FnMut(bool) -> f64) -> f64 {
    measure(false);
    measure(true);
    let ratio = |_| {
        let beside = measure(false);
        measure(true) / beside
    };
    median((0..rounds).map(ratio).collect())
}

fn through(rounds: usize, services: usize, client: &Place, backend: Addrs, vip: Addrs) -> Vec<Row> {
    let mut rows = Vec::new();
    for (path, place) in [("socket path", client.clone()), ("packet path", client.unhooked())] {
        let mut meter = Meter::start(&place);
        let direct = backend.port(Family::V4, PORT);
        let through = vip.port(Family::V4, 80);
        let ratio = compare(rounds, |is_service| {
            meter.nanos(Job::Connect { to: if is_service { through } else { direct }, count: CONNECTIONS })
        });
        let what = format!("connect and first byte, {path}, {services} services, beside the pod directly");
        rows.push(Row::ratio(what, "at most 1.05 times", 1.05, ratio));
    }
    rows
}

fn bulk(rounds: usize, client: &Place, backend: Addrs, vip: Addrs) -> Vec<Row> {
    eprintln!("path: bulk");
    let mut rows = Vec::new();
    for (path, place) in [("socket path", client.clone()), ("packet path", client.unhooked())] {
        let mut meter = Meter::start(&place);
        let direct: SocketAddr = backend.port(Family::V4, PORT);
        let through = vip.port(Family::V4, 80);
        let ratio = compare(rounds, |is_service| {
            meter.nanos(Job::Send { to: if is_service { through } else { direct }, bytes: BYTES })
        });
        let what = format!("time of a bulk transfer, {path}, beside the pod directly");
        rows.push(Row::ratio(what, "at most 1.02 times", 1.02, ratio));
    }
    rows
}

/// Pod to pod, no service: a node that gets the programs later, beside one of the same kind that does not.
struct Foreign {
    rounds: usize,
    meters: [Meter; 2],
    to: [SocketAddr; 2],
    /// What the two nodes differ by without Shunt.
    before: [f64; 2],
    _servers: [Process; 2],
}

impl Foreign {
    fn start(rounds: usize, with: &Cluster, without: &Cluster) -> Self {
        let nodes = [without, with].map(|cluster| &cluster.nodes[0]);
        // Between pods that are no service's backends.
        let servers = nodes.map(|node| load::server(&node.pods[0].place));
        let meters = nodes.map(|node| Meter::start(&node.pods[2].place.unhooked()));
        let to = nodes.map(|node| node.pods[0].addrs.port(Family::V4, PORT));
        let mut foreign = Self { rounds, meters, to, before: [1.0; 2], _servers: servers };
        eprintln!("path: foreign traffic, before Shunt");
        foreign.before = foreign.ratios();
        foreign
    }

    fn ratios(&mut self) -> [f64; 2] {
        let connect: fn(SocketAddr) -> Job = |to| Job::Connect { to, count: CONNECTIONS };
        let bulk: fn(SocketAddr) -> Job = |to| Job::Send { to, bytes: BYTES };
        [connect, bulk].map(|job| {
            let (meters, to) = (&mut self.meters, self.to.map(job));
            compare(self.rounds, |has_shunt| meters[usize::from(has_shunt)].nanos(to[usize::from(has_shunt)]))
        })
    }

    fn rows(mut self) -> Vec<Row> {
        eprintln!("path: foreign traffic");
        let [connect, bulk] = self.ratios();
        let before = self.before.map(|ratio| format!("{ratio:.3} times"));
        let note = "what the two nodes differ by before (connect and first byte; bulk), divided out below";
        let note = Row::note(note.to_owned(), before.join("; "));
        let what = "connect and first byte, pod to pod, beside a node without Shunt";
        let connect = Row::ratio(what, "at most 1.02 times", 1.02, connect / self.before[0]);
        let what = "time of a bulk transfer, pod to pod, beside a node without Shunt";
        vec![note, connect, Row::ratio(what, "at most 1.02 times", 1.02, bulk / self.before[1])]
    }
}
