//! Agents that die and agents that are replaced, again and again, under all kinds of load: nothing fails, nothing is left.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use shunt_tests::agent::{self, Agent};
use shunt_tests::held::{self, Held};
use shunt_tests::place::Place;
use shunt_tests::probe::{LongLived, TcpLoop, UdpLoop, UdpSockets};
use shunt_tests::topology::{Family, Plan};
use shunt_tests::traffic::Load;
use shunt_tests::wait;

use crate::rig::{Frontend, Offer, Rig};

/// With a backend on the clients' node.
const NEAR: Offer = Offer::new(1, "near");
/// With a backend on the other node: outside clients come to it with a rewritten source.
const FAR: Offer = Offer::new(2, "far");

/// How often each agent goes and the next one comes: on a quiet machine that takes about a minute.
const TURNS: usize = 30;
/// Begun a second by each load of new connections.
const RATE: u32 = 20;

#[track_caller]
fn offer(rig: &Rig) {
    rig.apply(&[&NEAR.to(&rig.node(0).pods[0]), &FAR.to(&rig.node(1).pods[0])]);
}

/// New TCP connections, TCP connections that stay, new and kept UDP sockets, to both services and families.
#[track_caller]
fn loads(rig: &Rig, place: &Place, frontend: Frontend) -> Vec<Load> {
    let at = |offer: &Offer, family| offer.at(frontend, rig.node(0), family);
    let of = |family| [NEAR, FAR].map(|offer| at(&offer, family));
    let all: Vec<_> = Family::ALL.into_iter().flat_map(of).collect();
    let mut loads = vec![
        place.tcp_loop(TcpLoop { to: all.clone(), rate: RATE, workers: 2, count: None }),
        place.udp_loop(UdpLoop {
            to: all.clone(),
            rate: RATE,
            workers: 2,
            count: None,
            sockets: UdpSockets::ConnectedEach,
        }),
    ];
    for family in Family::ALL {
        let (to, sockets) = (of(family).to_vec(), UdpSockets::UnconnectedKept);
        loads.push(place.udp_loop(UdpLoop { to, rate: RATE, workers: 1, count: None, sockets }));
    }
    loads.extend(all.iter().map(|to| place.long_lived(LongLived { to: *to, connections: 1, interval_ms: 40 })));
    loads
}

/// Flows of a protocol on a node.
fn flows(agent: &Agent, proto: &str) -> usize {
    let flows: Value = serde_json::from_str(&agent.shunt(["flows", "-o", "json"])).expect("a list");
    flows.as_array().expect("a list").iter().filter(|flow| flow["proto"] == proto).count()
}

/// Waits until all that earlier agents held has gone, and says what is held now. Programs go when no packet is in them.
#[track_caller]
fn settled(agent: &Agent, as_before: Option<Held>) -> Held {
    let mut held = Held::look(agent.bpffs());
    if let Some(before) = as_before
        && !wait::came_true(|| {
            held = Held::look(agent.bpffs());
            held == before
        })
    {
        panic!("{before:?} has become {held:?}");
    }
    held
}

/// A copy of the program at another path, as a package manager leaves one.
fn next_version(rig: &Rig) -> PathBuf {
    let copy = rig.cluster.bed.dir().join("shunt-next");
    fs::copy(agent::program(), &copy).expect("it can be copied");
    copy
}

#[test]
fn a_minute_of_crashes_and_upgrades_fails_nothing_and_leaves_nothing() {
    let mut rig = Rig::build(Plan { nodes: 2, ..Plan::default().strict() });
    offer(&rig);
    let before: Vec<Held> = rig.agents.iter().map(|agent| settled(agent, None)).collect();
    let bytes_before = held::map_bytes(rig.agents[0].bpffs());
    let pod = &rig.node(0).pods[1].place;
    let mut loads: Vec<Load> = loads(&rig, pod, Frontend::ClusterIp);
    loads.extend(self::loads(&rig, &pod.unhooked(), Frontend::ClusterIp));
    loads.extend(self::loads(&rig, &rig.cluster.client.place, Frontend::NodePort));
    loads.iter_mut().for_each(|load| drop(load.wait_answers(5)));

    let versions = [agent::program(), next_version(&rig)];
    let mut first_bytes = 0;
    for turn in 0..TURNS {
        for agent in &mut rig.agents {
            if turn % 2 == 0 {
                agent.crash();
            } else {
                assert!(agent.stop().success());
                agent.set_program(&versions[turn / 2 % 2]);
            }
            agent.start();
            agent.wait_log("adopted=true");
        }
        // The pace: a load of this rate answers so often in a second, less what the start took.
        loads[0].wait_answers(u64::from(RATE / 4));
        if turn == 2 {
            first_bytes = held::process_bytes(rig.agents[0].process().id());
        }
    }
    let last_bytes = held::process_bytes(rig.agents[0].process().id());
    loads.iter_mut().for_each(|load| drop(load.wait_answers(5)));
    let lost = |load: Load| load.finish_clean().retransmitted;
    let lost: u64 = loads.into_iter().map(lost).sum();
    eprintln!("{TURNS} restarts, {lost} connections with a segment sent again");

    for (agent, before) in rig.agents.iter().zip(&before) {
        settled(agent, Some(*before));
    }
    // A restarted agent reads what its predecessors left: that must not become more.
    assert!(
        last_bytes < first_bytes + (4 << 20),
        "an agent had {first_bytes} bytes, after {TURNS} restarts {last_bytes}"
    );
    many_changes_take_no_memory(&rig);
    offer(&rig);
    // Finished connections are kept for a minute. Datagrams for two: those go the same way.
    let end = Instant::now() + 4 * wait::PATIENCE;
    while rig.agents.iter().any(|agent| flows(agent, "TCP") > 0) {
        assert!(Instant::now() < end, "flows are left: {}", rig.agents[0].shunt(["flows"]));
        std::thread::sleep(Duration::from_millis(200));
    }
    let bytes = held::map_bytes(rig.agents[0].bpffs());
    // What is kept of datagrams: some of three entries at most, each far below 500 bytes.
    let datagrams = 1500 * flows(&rig.agents[0], "UDP") as u64;
    assert!(bytes <= bytes_before + datagrams, "maps had {bytes_before} bytes, then {bytes}");
}

/// Endpoints come and go; the agent's memory stays as it is once it has seen such changes.
#[track_caller]
fn many_changes_take_no_memory(rig: &Rig) {
    let id = rig.agents[0].process().id();
    let change = |times: usize| {
        for turn in 0..times {
            let pods = &rig.node(turn % 2).pods;
            rig.apply(&[&NEAR.service().endpoints(pods), &FAR.to(&pods[0])]);
        }
        held::process_bytes(id)
    };
    // It takes some hundred changes until the allocator has for each thread what it will ever want.
    let before = change(300);
    let after = change(100);
    // Each turn is four plans and a dozen objects. What is left of it must be less than two pages.
    assert!(after < before + 100 * 8192, "{before} bytes have become {after}");
}
