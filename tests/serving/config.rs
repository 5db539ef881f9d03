//! An agent that starts from a configuration file: what is in effect, and that it serves.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::{Value, json};
use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Manifests, cluster_cidr, service};
use shunt_tests::topology::{Cluster, Family, Plan, SERVICES};
use shunt_tests::traffic::{Ports, Server};
use shunt_tests::wait;

use crate::http::{get, try_get};
use crate::samples::metrics_address;

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const NODE_PORT: u16 = 30080;

/// A node with a service whose server is in its first pod, and an agent that is not started.
struct Rig {
    _server: Server,
    agent: Agent,
    manifests: Manifests,
    cluster: Cluster,
}

impl Rig {
    /// The agent's file holds what `config` says; beyond it, only where this test keeps things is typed.
    #[track_caller]
    fn new(config: impl FnOnce(&Cluster, &Manifests) -> Value) -> Self {
        let cluster = Cluster::build(Plan::default());
        let manifests = Manifests::of(&cluster);
        let node = &cluster.nodes[0];
        let web = service("web").cluster_ips(SERVICES.host(1)).tcp(PORT, TARGET).node_port(NODE_PORT);
        manifests.apply(&web.endpoints([&node.pods[0]]));
        let server = node.pods[0].place.unhooked().serve(Ports { tcp: &[TARGET], udp: &[] });
        let file = write(&cluster, "config.conf", &config(&cluster, &manifests));
        let agent = Agent::new(&cluster, node).with("--config", file);
        Self { _server: server, agent, manifests, cluster }
    }

    /// The configuration that is in effect, from where metrics are served.
    #[track_caller]
    fn configz(&self, address: SocketAddr) -> Value {
        let place = &self.cluster.nodes[0].place;
        let reply = wait::until_some(&format!("/configz at {address}"), || try_get(place, address, "/configz").ok());
        let whole: Value = serde_json::from_str(&reply.body).expect("an object");
        whole["kubeproxy.config.k8s.io"].clone()
    }

    /// Waits until a pod and an outside client are served.
    #[track_caller]
    fn wait_served(&self) {
        let node = &self.cluster.nodes[0];
        for family in Family::ALL {
            let (inside, outside) = (SERVICES.host(1).port(family, PORT), node.addrs.port(family, NODE_PORT));
            wait::until("a pod is served", || node.pods[1].place.tcp(inside).is_ok());
            wait::until("a client is served", || self.cluster.client.place.tcp(outside).is_ok());
        }
    }
}

#[track_caller]
fn write(cluster: &Cluster, name: &str, content: &Value) -> PathBuf {
    let path = cluster.bed.dir().join(name);
    fs::write(&path, content.to_string()).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    path
}

#[test]
fn a_configuration_of_shunt_is_in_effect_but_for_what_is_typed() {
    let mut rig = Rig::new(|_, manifests| {
        json!({
            "apiVersion": "shunt/v1alpha1",
            "kind": "AgentConfiguration",
            "manifests": manifests.dir(),
            "nodeName": "typed-over",
            "nodeportAddresses": "all",
            "healthzBindAddress": "[::]:9256",
            "metricsBindAddress": "127.0.0.1:9249",
        })
    });
    rig.agent.start();
    rig.wait_served();
    let node = &rig.cluster.nodes[0];
    let configz = rig.configz(SocketAddr::from(([127, 0, 0, 1], 9249)));
    assert_eq!(configz["hostnameOverride"], node.name());
    assert_eq!(configz["clusterCIDR"], cluster_cidr());
    assert_eq!(configz["nodePortAddresses"], json!(["0.0.0.0/0", "::/0"]));
    assert_eq!(configz["healthzBindAddress"], "[::]:9256");
    let health = get(&rig.cluster.client.place, node.addrs.port(Family::V6, 9256), "/healthz");
    assert_eq!(health.status, 200, "{}", health.body);
    try_get(&node.place, metrics_address(), "/metrics").expect_err("nobody listens at the default address");
}

#[test]
fn the_configuration_of_kube_proxy_is_in_effect_as_it_is() {
    let mut rig = Rig::new(|cluster, _| {
        // A server that nobody is: what is asked here is what the file sets, and that other sources are served meanwhile.
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "default",
            "contexts": [{"name": "default", "context": {"cluster": "default", "user": "default"}}],
            "clusters": [{"name": "default", "cluster": {"server": "http://127.0.0.1:1"}}],
            "users": [{"name": "default", "user": {}}],
        });
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "bindAddress": cluster.nodes[0].addrs.get(Family::V6).to_string(),
            "clientConnection": {"kubeconfig": write(cluster, "kubeconfig.conf", &kubeconfig), "qps": 5},
            "configSyncPeriod": "0s",
            "conntrack": {"max": 131_072, "maxPerCore": null, "min": null},
            "healthzBindAddress": "",
            "metricsBindAddress": "127.0.0.1",
            "mode": "",
            "nodePortAddresses": null,
            "notOfThisVersion": true,
        })
    });
    rig.agent = rig.agent.with("--manifests", rig.manifests.dir());
    rig.agent.spawn();
    rig.wait_served();
    assert!(rig.agent.wait_log("ignored").contains("conntrack.max"));
    assert!(rig.agent.wait_log("NodePorts answer on all addresses").contains("nodePortAddresses"));
    assert!(rig.agent.wait_log("unknown").contains("notOfThisVersion"));
    let configz = rig.configz(metrics_address());
    let node = &rig.cluster.nodes[0];
    let kubeconfig = rig.cluster.bed.dir().join("kubeconfig.conf");
    assert_eq!(configz["clientConnection"]["kubeconfig"], json!(kubeconfig));
    assert_eq!(configz["bindAddress"], node.addrs.get(Family::V6).to_string());
    assert_eq!(configz["healthzBindAddress"], "[::]:10256");
    assert_eq!(configz["nodePortAddresses"], json!(["0.0.0.0/0", "::/0"]));
    // As in kube-proxy's mode iptables: also at the address that pods know as their gateway.
    for family in Family::ALL {
        let gateway = node.gateway().port(family, NODE_PORT);
        wait::until("another address", || node.pods[1].place.unhooked().tcp(gateway).is_ok());
        let loopback = SocketAddr::from(([127, 0, 0, 1], NODE_PORT));
        assert!(node.place.tcp(loopback).is_ok(), "a process of the node on loopback");
    }
    let live = get(&rig.cluster.client.place, node.addrs.port(Family::V6, 10256), "/livez");
    assert!(live.body.contains("\"healthy\""), "{}", live.body);
}

#[test]
fn connection_tracking_is_set_as_asked_and_not_switched_on() {
    let mut rig = Rig::new(|_, manifests| {
        json!({
            "apiVersion": "shunt/v1alpha1",
            "kind": "AgentConfiguration",
            "manifests": manifests.dir(),
            // More than one namespace may say: it is the machine's.
            "conntrackMaxPerCore": 1000,
            "conntrackMin": 3000,
            "conntrackTcpTimeoutEstablished": "24h",
            "conntrackTcpTimeoutCloseWait": "1h0m0s",
            "conntrackTcpBeLiberal": true,
            "conntrackUdpTimeout": "20s",
        })
    });
    let ns = rig.cluster.nodes[0].place.ns().clone();
    let read = |name: &str| ns.read_sysctl(&format!("net/netfilter/nf_conntrack_{name}"));
    let (max, stream) = (read("max"), read("udp_timeout_stream"));
    rig.agent.start();
    rig.wait_served();
    assert_eq!(read("tcp_timeout_established"), "86400");
    assert_eq!(read("tcp_timeout_close_wait"), "3600");
    assert_eq!((read("tcp_be_liberal"), read("udp_timeout")), ("1".to_owned(), "20".to_owned()));
    assert_eq!(read("udp_timeout_stream"), stream, "what is not asked for stays");
    if read("max") == max {
        let told = rig.agent.wait_log("cannot be set as the configuration asks");
        assert!(told.contains("nf_conntrack_max"), "{told}");
    }
    let told = rig.agent.wait_log("the kernel will forget connections earlier");
    assert!(told.contains("nf_conntrack_udp_timeout") && told.contains("28"), "{told}");
    assert_eq!(read("count"), "0", "no connection is tracked");
    let configz = rig.configz(metrics_address());
    assert_eq!(configz["conntrack"]["tcpEstablishedTimeout"], "86400s");
    assert_eq!(configz["conntrack"]["maxPerCore"], 1000);
}

#[test]
fn a_file_that_is_wrong_ends_the_agent_with_all_that_is_wrong() {
    let mut rig = Rig::new(|_, _| {
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "conntrack": {"min": "many"},
            "metricsBindAddress": "localhost:1",
        })
    });
    rig.agent.spawn();
    rig.agent.wait_log("config.conf: conntrack.min: ");
    rig.agent.wait_log("config.conf: metricsBindAddress: ");
    assert_eq!(rig.agent.ended().code(), Some(64));
}
