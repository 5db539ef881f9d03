//! Session affinity, which is a namespace's, and the internal traffic policy.

use serde_json::json;
use shunt_tests::manifests::{Endpoint, Service};
use shunt_tests::place::Place;
use shunt_tests::tables::Set;
use shunt_tests::topology::{Cluster, Family, Plan, Pod};

use crate::rig::{Rig, Socket, case, web, web_ip};

/// Connections of which a fair pick among two would give all to one once in 10^9 runs.
const MANY: u64 = 30;

/// Every family and protocol once; the other sockets differ in what is tested elsewhere.
const SOCKETS: [(Socket, Family); 4] = [
    (Socket::Tcp, Family::V4),
    (Socket::Tcp, Family::V6),
    (Socket::Udp, Family::V4),
    (Socket::UdpConnected, Family::V6),
];

/// All new connections from a place are answered by `pod`.
#[track_caller]
fn assert_all_by(from: &Place, pod: &Pod) {
    for (socket, family) in SOCKETS {
        let to = web_ip().port(family, socket.port());
        let servers = socket.ask_often(from, to, MANY);
        assert_eq!(servers.keys().collect::<Vec<_>>(), [pod.place.name()], "{}", case(from, socket, to));
    }
}

fn with_affinity() -> Service {
    web().spec("sessionAffinity", json!("ClientIP"))
}

#[test]
fn affinity_is_kept_for_each_namespace_apart() {
    let rig = Rig::build(2);
    let (one, two) = (rig.pod(0), rig.pod(1));
    let [node, pod] = rig.clients();
    // Each client meets another backend first, because there is no other.
    rig.apply(&with_affinity().endpoints([one]));
    assert_all_by(node, one);
    rig.apply(&with_affinity().endpoints([two]));
    assert_all_by(pod, two);
    rig.apply(&with_affinity().endpoints([one, two]));
    assert_all_by(node, one);
    assert_all_by(pod, two);
}

#[test]
fn affinity_moves_when_its_backend_goes_and_stays_where_it_moved() {
    let rig = Rig::build(2);
    let (one, two) = (rig.pod(0), rig.pod(1));
    for from in rig.clients() {
        rig.apply(&with_affinity().endpoints([one]));
        assert_all_by(from, one);
        rig.apply(&with_affinity().endpoints([two]));
        assert_all_by(from, two);
        rig.apply(&with_affinity().endpoints([one, two]));
        assert_all_by(from, two);
    }
}

/// Two nodes with a pod each; the agent runs on the first.
fn two_nodes() -> Rig {
    Rig::build_with(Plan { nodes: 2, pods: 1, ..Plan::default() }, |agent| agent)
}

fn pods(cluster: &Cluster) -> Vec<Endpoint> {
    cluster.pods().map(Endpoint::from).collect()
}

#[test]
fn internal_policy_local_uses_endpoints_of_this_node_alone() {
    let rig = two_nodes();
    let local = web().spec("internalTrafficPolicy", json!("Local")).endpoints(pods(&rig.cluster));
    rig.manifests.apply(&local);
    rig.agent.wait_service("web", "one local endpoint", |port| port.local.endpoints().len() == 1);
    for from in rig.clients() {
        assert_all_by(from, rig.pod(0));
    }
}

#[test]
fn internal_policy_local_without_a_local_endpoint_is_no_permission_matter() {
    let rig = two_nodes();
    let remote = rig.cluster.nodes[1].pods.iter().map(Endpoint::from);
    rig.manifests.apply(&web().spec("internalTrafficPolicy", json!("Local")).endpoints(remote));
    rig.agent.wait_service("web", "no local endpoint", |port| port.local == Set::Empty("drop".to_owned()));
    // Nothing answers, and the clients wait: together, since each waits for long.
    std::thread::scope(|scope| {
        for from in rig.clients() {
            for (socket, family) in SOCKETS {
                let to = web_ip().port(family, socket.port());
                scope.spawn(move || {
                    let failure = socket.ask(from, to).expect_err(&case(from, socket, to));
                    assert!(!failure.kind().contains("EPERM"), "{}: {failure}", case(from, socket, to));
                    assert!(!failure.kind().contains("ECONN"), "{}: {failure}", case(from, socket, to));
                });
            }
        }
    });
    let status: serde_json::Value =
        serde_json::from_str(&rig.agent.shunt(["status", "-o", "json"])).expect("it is JSON");
    let counted = |reason: &str| status["drops"][reason].as_u64();
    assert!(counted("no_local_endpoint") > Some(0), "{status}");
    assert_eq!(counted("host_unhooked"), Some(0), "the hooks have seen them: {status}");
}
