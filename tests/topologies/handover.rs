//! A successor takes over: connections keep their backends until they end, new ones are its own from the first moment. The
//! successor here is three rules for the kernel's NAT; the real kube-proxy is met in the suite `control-plane`.

use shunt_tests::agent::Agent;
use shunt_tests::place::Place;
use shunt_tests::process::Process;
use shunt_tests::topology::{Family, Node, Plan};

use crate::rig::{Frontend, Offer, PORT, Rig, TARGET};
use crate::talk::Tcp;

const WEB: Offer = Offer::new(1, "web");

/// All frontends of the service lead to the second pod of the node.
#[track_caller]
fn succeed(node: &Node) {
    let (backend, web) = (node.pods[1].addrs, WEB.cluster_ip());
    let rules = format!(
        "table inet successor {{
            chain prerouting {{ type nat hook prerouting priority dstnat;
                ip daddr {v4} tcp dport {PORT} dnat ip to {b4}:{TARGET}
                ip6 daddr {v6} tcp dport {PORT} dnat ip6 to [{b6}]:{TARGET}
                fib daddr type local meta nfproto ipv4 tcp dport {port} dnat ip to {b4}:{TARGET}
                fib daddr type local meta nfproto ipv6 tcp dport {port} dnat ip6 to [{b6}]:{TARGET}
            }}
        }}",
        v4 = web.v4,
        v6 = web.v6,
        b4 = backend.v4,
        b6 = backend.v6,
        port = WEB.node_port(),
    );
    node.place.ns().nft(&rules);
}

/// Runs until it says that flows are left, and goes on.
#[track_caller]
fn drain(agent: &Agent) -> Process {
    let drain = agent.spawn_shunt(&["cleanup", "--drain"]);
    drain.wait_line(0, "flows that are left", |line| line.contains("flows are left").then_some(()));
    drain
}

/// Connections that packets made, to every kind of frontend.
#[track_caller]
fn hold(rig: &Rig, pod: &Place) -> Vec<Tcp> {
    let client = &rig.cluster.client.place;
    let mut held = Vec::new();
    for family in Family::ALL {
        for (place, frontend) in [(pod, Frontend::ClusterIp), (client, Frontend::NodePort)] {
            let to = WEB.at(frontend, rig.node(0), family);
            held.push(place.run(|| Tcp::dial(0, to)).expect("it is served"));
        }
    }
    ask(rig, &mut held);
    held
}

/// All are still answered by the backend that Shunt chose.
#[track_caller]
fn ask(rig: &Rig, held: &mut [Tcp]) {
    for held in held {
        assert_eq!(held.ask().expect("it lives on").server, rig.node(0).pods[0].place.name());
    }
}

/// What new connections of a pod (by sockets and by packets) and of an outside client meet.
#[track_caller]
fn meet(rig: &Rig, pod: &Place, server: &str) {
    for family in Family::ALL {
        let at = |frontend| WEB.at(frontend, rig.node(0), family);
        let clients = [
            (pod.clone(), at(Frontend::ClusterIp)),
            (pod.unhooked(), at(Frontend::ClusterIp)),
            (rig.cluster.client.place.clone(), at(Frontend::NodePort)),
        ];
        for (place, to) in clients {
            let answer = place.tcp(to).unwrap_or_else(|failure| panic!("{}: {failure}", place.name()));
            assert_eq!((answer.server.as_str(), answer.peer), (server, to), "{}", place.name());
        }
    }
}

#[test]
fn a_drain_keeps_connections_until_they_end_and_leaves_new_ones_to_the_successor() {
    let mut rig = Rig::build(Plan { pods: 3, ..Plan::default().strict() });
    rig.apply(&[&WEB.to(&rig.node(0).pods[0])]);
    let pod = rig.node(0).pods[2].place.clone();
    let [shunts, successors] = [0, 1].map(|number| rig.node(0).pods[number].place.name().to_owned());
    let mut held = hold(&rig, &pod.unhooked());
    succeed(rig.node(0));
    meet(&rig, &pod, &shunts);

    assert_eq!(rig.agents[0].stop().code(), Some(0));
    let mut interrupted = drain(&rig.agents[0]);
    let ((), counted) = rig.counted(0, || meet(&rig, &pod, &successors));
    assert_eq!((counted.sockets, counted.flows, counted.drops.len()), (0, 0, 0), "untouched: {counted:?}");
    ask(&rig, &mut held);
    interrupted.kill();

    // Whoever changes their mind starts the agent: everything is as it was.
    rig.agents[0].start();
    meet(&rig, &pod, &shunts);
    ask(&rig, &mut held);
    held.extend(hold(&rig, &pod.unhooked()));
    assert!(rig.agents[0].stop().success());

    let mut drain = drain(&rig.agents[0]);
    meet(&rig, &pod, &successors);
    ask(&rig, &mut held);
    assert!(drain.try_wait().is_none(), "{} connections are waited for", held.len());
    let ((), counted) = rig.counted(0, || ask(&rig, &mut held));
    assert!(counted.packets >= 2 * held.len() as u64, "Shunt translates them still: {counted:?}");
    drop(held);
    assert!(drain.wait().success(), "{drain}");
    assert!(drain.lines().iter().any(|line| line == "0 flows are left"), "{drain}");
    assert!(!rig.agents[0].bpffs().exists(), "nothing is pinned");
    meet(&rig, &pod, &successors);
}
