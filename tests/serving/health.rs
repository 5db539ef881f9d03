//! Health and readiness through an agent's life.

use std::net::{SocketAddr, TcpListener};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Manifests, node, service, service_cidr};
use shunt_tests::topology::{Cluster, Family, Plan, SERVICES};
use shunt_tests::wait;

use crate::http::{Reply, Request, get, try_get};
use crate::lease::Lease;
use crate::samples::{Samples, metrics_address};

const PORT: u16 = 10256;
const PATHS: [&str; 3] = ["/healthz", "/livez", "/readyz"];

/// A node, and one service on it.
struct Rig {
    agent: Agent,
    manifests: Manifests,
    cluster: Cluster,
}

impl Rig {
    /// The agent is not started.
    #[track_caller]
    fn build() -> Self {
        let cluster = Cluster::build(Plan::default());
        let manifests = Manifests::of(&cluster);
        let web = service("web").cluster_ips(SERVICES.host(1)).tcp(80, 8080);
        manifests.apply(&web.endpoints([&cluster.nodes[0].pods[0]]));
        let agent = Agent::new(&cluster, &cluster.nodes[0]).with("--manifests", manifests.dir());
        Self { agent, manifests, cluster }
    }

    fn address(&self) -> SocketAddr {
        self.cluster.nodes[0].addrs.port(Family::V4, PORT)
    }

    /// What the outside gets.
    #[track_caller]
    fn ask(&self, path: &str) -> Reply {
        get(&self.cluster.client.place, self.address(), path)
    }

    /// The code of the answer, if somebody answers.
    fn ask_now(&self, path: &str) -> Option<u16> {
        Some(try_get(&self.cluster.client.place, self.address(), path).ok()?.status)
    }

    #[track_caller]
    fn codes(&self) -> [u16; 3] {
        PATHS.map(|path| self.ask(path).status)
    }

    /// Waits until somebody listens where health is served.
    #[track_caller]
    fn wait_listening(&self) {
        wait::until("health to be served", || try_get(&self.cluster.client.place, self.address(), "/livez").is_ok());
    }
}

#[test]
fn a_node_is_healthy_when_all_is_loaded_and_alive_before() {
    let mut rig = Rig::build();
    // The source cannot finish its list while one of its files cannot be opened.
    let lease = Lease::on(&rig.manifests.dir().join("web.yaml"));
    rig.agent.spawn();
    rig.wait_listening();
    assert_eq!(rig.codes(), [503, 200, 503]);
    let waiting = rig.ask("/readyz").body;
    assert!(waiting.contains("manifests has not listed everything yet\n"), "{waiting}");
    let samples = Samples::scrape(&rig.cluster.nodes[0]);
    assert_eq!(samples.value(r#"shunt_source_pending{source="manifests"}"#), 1.0);
    assert_eq!(samples.value("shunt_ready"), 0.0);
    drop(lease);
    rig.agent.wait_log("first plan applied");
    assert_eq!(rig.codes(), [200, 200, 200]);
    assert_eq!(rig.ask("/readyz").body, "ready\n");
    let samples = Samples::scrape(&rig.cluster.nodes[0]);
    assert_eq!(samples.value(r#"shunt_source_pending{source="manifests"}"#), 0.0);
    assert_eq!(samples.value("shunt_ready"), 1.0);
    // This node itself was one plan, the service another.
    assert!(samples.value("kubeproxy_sync_proxy_rules_duration_seconds_count") >= 1.0);
    assert!(samples.value(r#"kubeproxy_proxy_healthz_total{code="503"}"#) >= 1.0);
    assert_eq!(samples.value(r#"kubeproxy_proxy_healthz_total{code="200"}"#), 1.0);
}

/// What was loaded once serves on, so a node whose sources are out of reach when its agent restarts keeps its clients.
#[test]
fn a_restarted_agent_is_healthy_before_its_sources_list_again() {
    let mut rig = Rig::build();
    rig.agent.start();
    rig.agent.crash();
    let lease = Lease::on(&rig.manifests.dir().join("web.yaml"));
    rig.agent.spawn();
    wait::until("the node to be healthy", || rig.ask_now("/healthz") == Some(200));
    assert_eq!(rig.codes(), [200, 200, 503]);
    drop(lease);
    rig.agent.wait_log("first plan applied");
    assert_eq!(rig.codes(), [200, 200, 200]);
}

#[test]
fn health_is_told_as_kube_proxy_tells_it() {
    let mut rig = Rig::build();
    rig.agent.start();
    let reply = rig.ask("/healthz");
    assert!(reply.head.contains("content-type: application/json"), "{}", reply.head);
    assert!(reply.head.contains("x-content-type-options: nosniff"), "{}", reply.head);
    let health: Value = serde_json::from_str(&reply.body).expect("an object");
    assert_eq!(health["healthy"], true);
    assert_eq!(health["nodeEligible"], true);
    assert_eq!(health["lastUpdated"], health["currentTime"]);
    for family in ["IPv4", "IPv6"] {
        assert_eq!(health["status"][family]["healthy"], true);
        let applied = health["status"][family]["lastUpdated"].as_str().expect("a time");
        assert!(applied.starts_with("20") && applied.ends_with('Z'), "{applied}");
    }
    let live: Value = serde_json::from_str(&rig.ask("/livez").body).expect("an object");
    assert_eq!(live["healthy"], true);
    assert!(live.get("nodeEligible").is_none(), "{live}");
    assert_eq!(rig.ask("/").status, 404);
}

/// External load balancers drain a node by /healthz before it goes; nothing restarts an agent for that.
#[test]
fn a_node_that_is_about_to_go_is_told_to_load_balancers_alone() {
    let mut rig = Rig::build();
    rig.agent.start();
    let plain = node(&rig.cluster.nodes[0]);
    let [mut tainted, mut deleted] = [plain.clone(), plain.clone()];
    tainted["spec"]["taints"] = json!([{ "key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule" }]);
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    let mut other = plain.clone();
    other["metadata"]["name"] = json!("node-9");
    for leaving in [&tainted, &deleted, &other] {
        rig.manifests.write("cluster", std::slice::from_ref(leaving));
        wait::until(&format!("{leaving} to be told"), || rig.codes() == [503, 200, 200]);
        let health: Value = serde_json::from_str(&rig.ask("/healthz").body).expect("an object");
        assert_eq!((&health["nodeEligible"], &health["healthy"]), (&json!(false), &json!(true)), "{health}");
        assert_eq!(health["lastUpdated"], health["currentTime"]);
        rig.manifests.write("cluster", std::slice::from_ref(&plain));
        wait::until("the node to stay", || rig.codes() == [200, 200, 200]);
    }
    // Without any node there is nothing that should know this one.
    rig.manifests.write("cluster", &[other]);
    wait::until("the node to be unknown", || rig.codes() == [503, 200, 200]);
    rig.manifests.write("cluster", &[service_cidr()]);
    wait::until("no node to be known", || rig.codes() == [200, 200, 200]);
    let samples = Samples::scrape(&rig.cluster.nodes[0]);
    for (path, code) in [("healthz", 503), ("healthz", 200), ("livez", 200)] {
        let series = format!(r#"kubeproxy_proxy_{path}_total{{code="{code}"}}"#);
        assert!(samples.value(&series) >= 1.0, "{series}");
    }
    assert_eq!(samples.find(r#"kubeproxy_proxy_livez_total{code="503"}"#), None);
}

#[test]
fn an_agent_that_ends_is_not_ready_and_answers_to_its_end() {
    let mut rig = Rig::build();
    rig.agent.start();
    let client = &rig.cluster.client.place;
    let begun = PATHS.map(|path| Request::begin(client, rig.address(), path).expect("health is served"));
    // Connections are accepted in their order: the answer on a later one says that those have been.
    assert_eq!(rig.ask("/readyz").status, 200);
    rig.agent.process().signal(Signal::SIGTERM);
    rig.agent.wait_log("draining");
    let replies = begun.map(|request| request.finish().expect("a request under way is answered"));
    assert_eq!(replies.each_ref().map(|reply| reply.status), [200, 200, 503]);
    assert_eq!(replies[2].body, "the agent ends\n");
    assert!(rig.agent.stop().success());
}

#[test]
fn an_address_in_use_is_had_when_it_is_free_and_the_agent_serves_meanwhile() {
    let mut rig = Rig::build();
    let node = rig.cluster.nodes[0].place.clone();
    let other = node.run(|| TcpListener::bind(("0.0.0.0", PORT)).expect("the port is free"));
    rig.agent.start();
    rig.agent.wait_log("cannot listen");
    assert_eq!(Samples::scrape(&rig.cluster.nodes[0]).value("shunt_ready"), 1.0);
    drop(other);
    rig.wait_listening();
    assert_eq!(rig.codes(), [200, 200, 200]);
}

#[test]
fn listeners_are_where_the_flags_say_or_nowhere() {
    let Rig { agent, manifests: _manifests, cluster } = Rig::build();
    let mut agent = agent.with("--healthz-bind-address", "[::]:10000").with("--metrics-bind-address", "");
    agent.start();
    let node = &cluster.nodes[0];
    for family in Family::ALL {
        assert_eq!(get(&cluster.client.place, node.addrs.port(family, 10000), "/readyz").status, 200);
    }
    for nowhere in [metrics_address(), node.addrs.port(Family::V4, PORT)] {
        let error = try_get(&node.place, nowhere, "/metrics").expect_err("nobody listens");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{nowhere}");
    }
}
