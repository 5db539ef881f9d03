//! Agents whose tables have another layout, one after the other, under traffic of every kind: nothing fails, nothing is
//! forgotten, nothing is left behind. Loads never try again.
//!
//! New conversations by packets lose a datagram if they begin in the moment in which both layouts are in use; TCP sends it
//! again. So datagrams are sent by sockets that stay, or through the socket hooks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use shunt_tests::agent::{Agent, LAYOUT_VERSION};
use shunt_tests::place::Place;
use shunt_tests::probe::{LongLived, TcpLoop, UdpLoop, UdpSockets};
use shunt_tests::topology::{Family, Plan};
use shunt_tests::traffic::Load;

use crate::rig::{Counters, Frontend, Offer, Rig};

/// A backend on the node, and one on another node: the latter's clients from outside get a rewritten source.
const NEAR: Offer = Offer::new(1, "near");
const FAR: Offer = Offer::new(2, "far");
/// Both backends, and clients that stay with theirs.
const STEADY: Offer = Offer::new(3, "steady");

/// More of them than fit into small tables.
const MORE: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// An option and its value.
type Flag = (&'static str, &'static str);

/// One scene at a time: its loads keep a machine of two cores busy, and an agent that starts beside two of them is late.
static TURN: Mutex<()> = Mutex::new(());

struct Scene {
    rig: Rig,
    loads: Vec<(String, Load)>,
    /// Clients of [`STEADY`], and the backend that each had first.
    steady: Vec<(Place, SocketAddr, String)>,
    /// Released last.
    _turn: MutexGuard<'static, ()>,
}

impl Scene {
    #[track_caller]
    fn build() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let sizes = |agent: Agent| {
            agent.with("--max-services", "64").with("--max-backends", "256").with("--max-flows", "65536")
        };
        let rig = Rig::build_with(Plan { nodes: 2, ..Plan::default().strict() }, sizes);
        rig.cluster.route_vips(rig.node(0));
        let pods = [&rig.node(0).pods[0], &rig.node(1).pods[0]];
        let affinity = json!({"clientIP": {"timeoutSeconds": 600}});
        let steady =
            STEADY.service().spec("sessionAffinity", json!("ClientIP")).spec("sessionAffinityConfig", affinity);
        rig.apply(&[&NEAR.to(pods[0]), &FAR.to(pods[1]), &steady.endpoints(pods)]);
        let mut scene = Self { rig, loads: Vec::new(), steady: Vec::new(), _turn: turn };
        scene.start_loads();
        scene.note_steady();
        scene
    }

    fn start_loads(&mut self) {
        let node = self.rig.node(0);
        let pod = &node.pods[1].place;
        let outside = &self.rig.cluster.client.place;
        let mut loads = Vec::new();
        for family in Family::ALL {
            let at = |frontend| [NEAR.at(frontend, node, family), FAR.at(frontend, node, family)];
            let by = [
                ("a pod by packets", pod.unhooked(), Frontend::ClusterIp),
                ("outside", outside.clone(), Frontend::NodePort),
                ("a pod by sockets", pod.clone(), Frontend::ClusterIp),
            ];
            for (who, place, frontend) in by {
                let to = at(frontend).to_vec();
                for to in &to {
                    let long = LongLived { to: *to, connections: 4, interval_ms: 10 };
                    loads.push((format!("connections of {who} to {to}"), place.long_lived(long)));
                }
                let new = TcpLoop { to: to.clone(), rate: 40, workers: 12, count: None };
                loads.push((format!("new connections of {who}"), place.tcp_loop(new)));
                let udp = |sockets| UdpLoop { to: vec![to[0]], rate: 40, workers: 2, count: None, sockets };
                loads.push((format!("datagrams of {who}"), place.udp_loop(udp(UdpSockets::UnconnectedKept))));
                if who == "a pod by sockets" {
                    let connected = place.udp_loop(udp(UdpSockets::ConnectedEach));
                    loads.push((format!("connected datagrams of {who}"), connected));
                }
            }
        }
        self.loads = loads;
        self.wait_answers();
    }

    /// Each load has got some more answers.
    #[track_caller]
    fn wait_answers(&mut self) {
        for (name, load) in &mut self.loads {
            let enough = load.stats().answered + 12;
            load.wait_for(&format!("answers of {name}"), |stats| stats.answered >= enough);
        }
    }

    /// So that by chance alone hardly all of them would stay with their backends.
    fn note_steady(&mut self) {
        let (node, other) = (self.rig.node(0), self.rig.node(1));
        let places = [
            node.pods[1].place.clone(),
            node.pods[1].place.unhooked(),
            node.pods[0].place.unhooked(),
            self.rig.cluster.client.place.clone(),
            other.place.unhooked(),
        ];
        let mut steady = Vec::new();
        for family in Family::ALL {
            for place in &places {
                let to = STEADY.at(Frontend::NodePort, node, family);
                let server = place.tcp(to).expect("it is served").server;
                steady.push((place.clone(), to, server));
            }
        }
        self.steady = steady;
    }

    #[track_caller]
    fn assert_steady(&self) {
        for (place, to, server) in &self.steady {
            let answer = place.tcp(*to).unwrap_or_else(|error| panic!("{} to {to}: {error:?}", place.name()));
            assert_eq!(answer.server, *server, "{} to {to}", place.name());
        }
    }

    fn agent(&mut self) -> &mut Agent {
        &mut self.rig.agents[0]
    }

    /// Ids by names.
    fn ids(&self) -> BTreeMap<String, u64> {
        let rows = self.rig.agents[0].shunt(["services", "-o", "json"]);
        let rows: Vec<Value> = serde_json::from_str(&rows).expect("a list");
        let pair = |row: &Value| (row["name"].as_str().expect("a name").to_owned(), row["id"].as_u64().expect("an id"));
        rows.iter().map(pair).collect()
    }

    /// What is below the pin directory.
    fn names(&self) -> Vec<String> {
        let mut names = names_in(self.rig.agents[0].bpffs());
        names.sort();
        names
    }

    /// Only one layout is left, and one load of the programs.
    #[track_caller]
    fn assert_tidy(&self) {
        let names = self.names();
        let layouts = names.iter().filter(|name| name.starts_with('v')).count();
        assert_eq!((names.len(), layouts), (4, 1), "{names:?}: continuations, links, notes and a layout");
        assert_eq!(names_in(&self.rig.agents[0].bpffs().join("continuations")).len(), 1);
    }

    #[track_caller]
    fn finish(self) {
        self.finish_but(0);
    }

    /// Nothing failed, but for some datagrams of each load that is no socket hook's.
    #[track_caller]
    fn finish_but(self, datagrams: u64) {
        for (name, load) in self.loads {
            println!("{name}");
            if datagrams > 0 && name.starts_with("datagrams of") && !name.contains("sockets") {
                let stats = load.finish();
                assert!(stats.answered > 0 && stats.failures() <= datagrams, "{stats:?}");
            } else {
                load.finish_clean();
            }
        }
    }
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    entries.map(|entry| entry.expect("it can be read").file_name().into_string().expect("text")).collect()
}

fn assert_not_less(now: &Counters, before: &Counters) {
    let pairs = [
        (now.sockets, before.sockets),
        (now.flows, before.flows),
        (now.packets, before.packets),
        (now.refused, before.refused),
    ];
    assert!(pairs.iter().all(|(now, before)| now >= before), "{now:?} after {before:?}");
    assert!(before.drops.iter().all(|(reason, count)| now.drops(reason) >= *count), "{now:?} after {before:?}");
}

/// Agents that follow one another: the version goes up and down, tables grow and shrink.
#[test]
fn nothing_fails_while_the_layout_of_the_tables_changes() {
    let mut scene = Scene::build();
    let ids = scene.ids();
    let steps: [&[Flag]; 7] = [
        &[(LAYOUT_VERSION, "7")],
        &[(LAYOUT_VERSION, "8")],
        &[(LAYOUT_VERSION, "7")],
        &[("--max-flows", "131072")],
        &[("--max-flows", "65536")],
        &[("--max-services", "128"), ("--max-backends", "512")],
        &[(LAYOUT_VERSION, "9"), ("--max-flows", "50000"), ("--max-services", "96")],
    ];
    for step in steps {
        let before = scene.rig.counters(0);
        if scene.rig.agents[0].shunt(["status"]).contains("agent         running") {
            scene.agent().crash();
        }
        scene.wait_answers();
        step.iter().for_each(|(option, value)| scene.agent().set(option, *value));
        scene.agent().start();
        scene.agent().wait_log("another layout of the tables counts");
        scene.agent().wait_log("adopted=true");
        scene.assert_tidy();
        assert_eq!(scene.ids(), ids, "{step:?}");
        assert_not_less(&scene.rig.counters(0), &before);
        scene.assert_steady();
        scene.wait_answers();
    }
    scene.finish();
}

/// Filters and links take turns on all devices, the tables' layout changes meanwhile and without them: each hook has both for
/// a moment, and packets are translated once. Connections do not notice; of datagrams one for each socket may be lost when the
/// means change.
#[test]
fn no_connection_fails_while_links_and_filters_take_each_others_place() {
    let mut scene = Scene::build();
    let ids = scene.ids();
    let steps: [&[Flag]; 8] = [
        &[("--attach", "clsact")],
        &[],
        &[(LAYOUT_VERSION, "7")],
        &[("--max-flows", "131072")],
        &[("--attach", "tcx")],
        &[("--attach", "clsact"), (LAYOUT_VERSION, "8")],
        &[("--attach", "tcx"), ("--max-flows", "65536")],
        &[("--attach", "clsact")],
    ];
    let mut attach = "auto";
    for (number, step) in steps.iter().enumerate() {
        let before = scene.rig.counters(0);
        match number % 2 {
            0 => scene.agent().crash(),
            _ => assert!(scene.agent().stop().success()),
        }
        scene.wait_answers();
        for (option, value) in *step {
            scene.agent().set(option, *value);
            attach = if *option == "--attach" { value } else { attach };
        }
        scene.agent().start();
        scene.agent().wait_log("adopted=true");
        let status: Value = serde_json::from_str(&scene.agent().shunt(["status", "-o", "json"])).expect("an object");
        assert_eq!(status["attach"], json!([attach]), "{step:?}");
        scene.assert_tidy();
        assert_eq!(scene.ids(), ids, "{step:?}");
        assert_not_less(&scene.rig.counters(0), &before);
        scene.assert_steady();
        scene.wait_answers();
    }
    // Two sockets, and five changes of the means.
    scene.finish_but(2 * 5);
}

/// What has no room is refused before anything changes.
#[test]
fn tables_that_are_too_small_are_refused_by_name_and_harm_nothing() {
    let mut scene = Scene::build();
    let more: Vec<_> = (10..16).map(|number| Offer::new(number, MORE[usize::from(number) - 10])).collect();
    for (offer, target) in more.iter().zip(9000..) {
        let pods = [&scene.rig.node(0).pods[0], &scene.rig.node(1).pods[0]];
        scene.rig.manifests.apply(&offer.service_to(target).endpoints(pods));
    }
    scene.rig.settle();
    let names = scene.names();
    scene.agent().crash();
    for (option, old) in [("--max-services", "64"), ("--max-backends", "256"), ("--max-flows", "65536")] {
        scene.agent().set(option, "16");
        scene.agent().spawn();
        scene.agent().wait_log(&format!("in use, {option} is 16"));
        scene.agent().wait_log("nothing was changed");
        assert_eq!(scene.agent().ended().code(), Some(64));
        scene.agent().set(option, old);
        assert_eq!(scene.names(), names, "nothing was changed");
        scene.wait_answers();
    }
    scene.agent().start();
    scene.assert_steady();
    scene.finish();
}

/// Agents that are killed at some point of taking over, each followed by one that may end its work: of the layout it was
/// killed for, or of another.
#[test]
fn an_agent_killed_while_it_takes_over_leaves_a_state_that_the_next_one_ends() {
    /// What is logged at points of the way; the kill comes a little later.
    const POINTS: [&str; 4] = [
        "another layout of the tables is prepared",
        "another layout of the tables counts",
        "flows go on in another layout",
        "another layout of the tables counts",
    ];
    let mut scene = Scene::build();
    let ids = scene.ids();
    let layouts: [&[Flag]; 5] = [
        &[(LAYOUT_VERSION, "7"), ("--max-flows", "65536")],
        &[(LAYOUT_VERSION, "8"), ("--max-flows", "65536")],
        &[(LAYOUT_VERSION, "8"), ("--max-flows", "131072")],
        &[(LAYOUT_VERSION, "7"), ("--max-flows", "131072")],
        &[(LAYOUT_VERSION, "9"), ("--max-services", "128")],
    ];
    let mut numbers = 0x5eed_u64;
    for round in 0..15 {
        scene.agent().crash();
        let step = layouts[round % layouts.len()];
        step.iter().for_each(|(option, value)| scene.agent().set(option, *value));
        scene.agent().spawn();
        scene.agent().wait_log(POINTS[round % POINTS.len()]);
        numbers = numbers.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // The moment is what is tried: at once, or up to 16 ms later.
        std::thread::sleep(Duration::from_micros((numbers >> 50) * u64::from(round % 3 != 0)));
        scene.agent().crash();
        if round % 2 == 1 {
            let other = layouts[(round + 2) % layouts.len()];
            other.iter().for_each(|(option, value)| scene.agent().set(option, *value));
        }
        scene.agent().start();
        scene.assert_tidy();
        assert_eq!(scene.ids(), ids, "round {round}");
        scene.assert_steady();
        scene.wait_answers();
    }
    scene.finish();
}
