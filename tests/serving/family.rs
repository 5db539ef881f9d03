//! A node without IPv6: everything else works as ever, and it is told.

use std::net::SocketAddr;

use serde_json::json;
use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Manifests, service};
use shunt_tests::topology::{Cluster, Family, Plan, SERVICES};
use shunt_tests::traffic::Ports;
use shunt_tests::wait;

use crate::http::{get, try_get};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const NODE_PORT: u16 = 30080;

#[test]
fn a_node_whose_ipv6_is_switched_off_serves_ipv4() {
    let cluster = Cluster::build(Plan::default());
    let node = &cluster.nodes[0];
    for of in ["all", "default"] {
        node.place.ns().sysctl(&format!("net/ipv6/conf/{of}/disable_ipv6"), "1");
    }
    let manifests = Manifests::of(&cluster);
    let web = service("web").cluster_ips(SERVICES.host(1)).tcp(PORT, TARGET).node_port(NODE_PORT);
    manifests.apply(&web.endpoints([&node.pods[0]]));
    let _server = node.pods[0].place.unhooked().serve(Ports { tcp: &[TARGET], udp: &[] });
    let agent = Agent::new(&cluster, node).with("--manifests", manifests.dir());
    // As of a configuration that was made for both.
    let listeners = agent.with("--healthz-bind-address", "[::]:10256").with("--metrics-bind-address", "[::1]:10249");
    let mut agent = listeners.with("--nodeport-addresses", "all");
    agent.start();
    assert!(agent.wait_log("IPv6 is not served on this node").contains("disable_ipv6"));
    let (inside, outside) = (SERVICES.host(1).port(Family::V4, PORT), node.addrs.port(Family::V4, NODE_PORT));
    let pod = &node.pods[1].place;
    for (client, to) in [(pod.clone(), inside), (pod.unhooked(), inside), (node.place.clone(), inside)] {
        assert!(client.tcp(to).is_ok(), "{to} from {}", client.name());
    }
    assert!(cluster.client.place.tcp(outside).is_ok(), "from outside");
    // Health and metrics are there in IPv4.
    wait::until("a healthy node", || {
        try_get(&cluster.client.place, node.addrs.port(Family::V4, 10256), "/healthz")
            .is_ok_and(|reply| reply.status == 200)
    });
    let metrics = get(&node.place, SocketAddr::from(([127, 0, 0, 1], 10249)), "/metrics");
    assert!(metrics.body.contains("shunt_ready 1"), "{}", metrics.body);
    let off = agent.report()["families_off"].clone();
    assert_eq!(off[0]["subject"], json!("IPv6"));
    assert!(off[0]["message"].as_str().is_some_and(|text| text.contains("disable_ipv6")), "{off}");
}
