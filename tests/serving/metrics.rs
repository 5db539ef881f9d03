//! Counters move by what was sent, and by nothing else.

use std::collections::BTreeMap;

use serde_json::Value;
use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Endpoint, Manifests, Service, service};
use shunt_tests::topology::{Cluster, Family, Plan, SERVICES};
use shunt_tests::traffic::{Ports, Server};
use shunt_tests::wait;

use crate::http::get;
use crate::samples::{Samples, metrics_address};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const WEB_TCP: &str = "web:tcp-80/TCP";
const WEB_UDP: &str = "web:udp-80/UDP";

/// A node with a server in its first pod, and its agent.
struct Rig {
    _server: Server,
    agent: Agent,
    manifests: Manifests,
    cluster: Cluster,
}

fn web() -> Service {
    service("web").cluster_ips(SERVICES.host(1)).tcp(PORT, TARGET).udp(PORT, TARGET)
}

impl Rig {
    #[track_caller]
    fn build(services: impl Fn(&Cluster) -> Vec<Service>) -> Self {
        let cluster = Cluster::build(Plan::default());
        let manifests = Manifests::of(&cluster);
        services(&cluster).iter().for_each(|service| manifests.apply(service));
        let server = cluster.nodes[0].pods[0].place.unhooked().serve(Ports { tcp: &[TARGET], udp: &[TARGET] });
        let agent = Agent::start_on(&cluster, &cluster.nodes[0], &manifests);
        Self { _server: server, agent, manifests, cluster }
    }

    #[track_caller]
    fn scrape(&self) -> Samples {
        Samples::scrape(&self.cluster.nodes[0])
    }

    /// Which counters of services and drops `work` moves, and by how much.
    #[track_caller]
    fn moved(&self, work: impl FnOnce()) -> BTreeMap<String, f64> {
        let before = self.scrape();
        work();
        self.scrape().moved_since(&before)
    }
}

/// A series of a service port; `port` as in `web:tcp-80/TCP`, `more` as in `,via="socket"`.
fn series(metric: &str, port: &str, family: Family, more: &str) -> String {
    let family = match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    };
    format!(r#"shunt_service_{metric}_total{{service="manifests/default/{port}",family="{family}"{more}}}"#)
}

/// The series of the connections of a service port by who picked the backend.
fn connections(port: &str, family: Family, via: &str) -> String {
    series("connections", port, family, &format!(r#",via="{via}""#))
}

fn expect<const N: usize>(series: [(String, f64); N]) -> BTreeMap<String, f64> {
    BTreeMap::from(series)
}

#[test]
fn connections_of_sockets_move_one_counter_by_their_number() {
    let rig = Rig::build(|cluster| vec![web().endpoints([&cluster.nodes[0].pods[0]])]);
    let client = &rig.cluster.nodes[0].pods[1].place;
    for (family, count) in [(Family::V4, 3), (Family::V6, 2)] {
        let to = SERVICES.host(1).port(family, PORT);
        let moved = rig.moved(|| {
            for _ in 0..count {
                client.tcp(to).expect("an answer");
            }
        });
        assert_eq!(moved, expect([(connections(WEB_TCP, family, "socket"), f64::from(count))]));
    }
}

#[test]
fn packets_and_their_bytes_are_counted_to_the_last() {
    let rig = Rig::build(|cluster| vec![web().endpoints([&cluster.nodes[0].pods[0]])]);
    // Without a socket hook, each of them is a packet from the pod's device.
    let client = rig.cluster.nodes[0].pods[1].place.unhooked();
    for (family, headers) in [(Family::V4, 20 + 8), (Family::V6, 40 + 8)] {
        let to = SERVICES.host(1).port(family, PORT);
        let device = &rig.cluster.nodes[0].pods[1].device;
        let before = device_bytes(&rig, device);
        let moved = rig.moved(|| drop(client.udp(to).expect("an answer")));
        let sent = device_bytes(&rig, device) - before;
        let bytes = moved.get(&series("bytes", WEB_UDP, family, "")).copied().unwrap_or_default();
        // What else went over the device are neighbour discoveries, which are not counted.
        assert!(bytes >= f64::from(2 * headers) && bytes <= sent, "{bytes} of {sent}");
        // A datagram and its answer do not prove a connection yet: they are packets, but none is established.
        let expected = [(series("packets", WEB_UDP, family, ""), 2.0), (series("bytes", WEB_UDP, family, ""), bytes)];
        assert_eq!(moved, expect(expected));
    }
    let to = SERVICES.host(1).port(Family::V4, PORT);
    let moved = rig.moved(|| (0..4).for_each(|_| drop(client.tcp(to).expect("an answer"))));
    assert_eq!(moved[&connections(WEB_TCP, Family::V4, "packet")], 4.0);
    assert_eq!(moved.len(), 3, "connections, packets and bytes of one service port: {moved:?}");
}

/// Bytes that the node's end of a pod's link has sent and received.
#[track_caller]
fn device_bytes(rig: &Rig, device: &str) -> f64 {
    let text = rig.cluster.nodes[0].place.ns().output(["ip", "-j", "-s", "link", "show", "dev", device]);
    let links: serde_json::Value = serde_json::from_str(&text).expect("ip prints JSON");
    let bytes = |direction: &str| links[0]["stats64"][direction]["bytes"].as_f64().expect("a counter");
    bytes("rx") + bytes("tx")
}

#[test]
fn refusals_are_counted_by_service_and_by_reason() {
    let empty = || service("empty").cluster_ips(SERVICES.host(2)).tcp(PORT, TARGET).endpoints(Vec::<Endpoint>::new());
    let rig = Rig::build(|cluster| vec![web().endpoints([&cluster.nodes[0].pods[0]]), empty()]);
    let pod = &rig.cluster.nodes[0].pods[1].place;
    let drops = |reason: &str| format!(r#"shunt_drops_total{{reason="{reason}"}}"#);
    for client in [pod.clone(), pod.unhooked()] {
        let to = SERVICES.host(2).port(Family::V4, PORT);
        let moved = rig.moved(|| drop(client.tcp(to).expect_err("nobody serves it")));
        let refused = series("no_backend", "empty:tcp-80/TCP", Family::V4, "");
        assert_eq!(moved, expect([(refused, 1.0), (drops("no_endpoint"), 1.0)]));
        let nowhere = SERVICES.host(1).port(Family::V4, 81);
        let moved = rig.moved(|| drop(client.tcp(nowhere).expect_err("the service has no such port")));
        assert_eq!(moved, expect([(drops("unknown_port"), 1.0)]));
    }
}

#[test]
fn a_service_has_series_from_its_first_moment_to_its_last() {
    let rig = Rig::build(|_| vec![]);
    let zero = connections(WEB_TCP, Family::V6, "socket");
    assert_eq!(rig.scrape().find(&zero), None);
    rig.manifests.apply(&web().endpoints([&rig.cluster.nodes[0].pods[0]]));
    wait::until("a series of the new service", || rig.scrape().find(&zero) == Some(0.0));
    rig.manifests.delete("web");
    wait::until("no series of the deleted service", || rig.scrape().find(&zero).is_none());
}

#[test]
fn counters_go_on_where_the_agent_before_left_them() {
    let mut rig = Rig::build(|cluster| vec![web().endpoints([&cluster.nodes[0].pods[0]])]);
    let to = SERVICES.host(1).port(Family::V4, PORT);
    rig.cluster.nodes[0].pods[1].place.tcp(to).expect("an answer");
    rig.agent.crash();
    rig.agent.start();
    assert_eq!(rig.scrape().value(&connections(WEB_TCP, Family::V4, "socket")), 1.0);
}

#[test]
fn tables_attachments_sources_and_the_process_are_told() {
    let rig = Rig::build(|cluster| vec![web().endpoints([&cluster.nodes[0].pods[0]])]);
    let samples = rig.scrape();
    // Two ports in two families, each with one backend and one ClusterIP.
    for map in ["services", "backends", "slots"] {
        assert_eq!(samples.value(&format!(r#"shunt_map_entries{{map="{map}"}}"#)), 4.0, "{map}");
    }
    assert!(samples.value(r#"shunt_map_entries{map="frontends"}"#) >= 4.0);
    assert_eq!(samples.value(r#"shunt_map_max_entries{map="services"}"#), 16384.0);
    assert!(samples.value(r#"shunt_map_bytes{map="services"}"#) >= 16384.0 * 24.0);
    // The uplink and two pods.
    assert_eq!(samples.value("shunt_attached_devices"), 3.0);
    assert!(samples.value("shunt_attached_socket_hooks") > 0.0);
    for (metric, value) in [("object_errors", 0.0), ("stale", 0.0), ("pending", 0.0)] {
        assert_eq!(samples.value(&format!(r#"shunt_source_{metric}{{source="manifests"}}"#)), value, "{metric}");
    }
    assert!(samples.value(r#"shunt_source_last_contact_timestamp_seconds{source="manifests"}"#) > 1.7e9);
    // One for each family.
    for (kind, count) in [("Service", 1.0), ("EndpointSlice", 2.0)] {
        let series = format!(r#"shunt_source_objects{{source="manifests",kind="{kind}"}}"#);
        assert_eq!(samples.value(&series), count, "{kind}");
    }
    for name in [r#"shunt_problems{kind="conflict"}"#, "shunt_failures_waiting"] {
        assert_eq!(samples.value(name), 0.0, "{name}");
    }
    assert!(samples.value("shunt_plans_total") >= 1.0);
    assert!(samples.value("process_resident_memory_bytes") > 0.0);
    rig.manifests.write_text("broken", "apiVersion: v1\nkind: Service\nmetadata: {name: 7}\n");
    wait::until("an object error", || rig.scrape().value(r#"shunt_source_object_errors{source="manifests"}"#) >= 1.0);
    // Rounds are 15 s apart.
    wait::until("a sweep", || rig.scrape().find(r#"shunt_flows{state="established"}"#).is_some());
}

/// The endpoints of a service that say when they changed.
fn changed(at: &str, port: u16) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-more
  namespace: default
  labels: {{kubernetes.io/service-name: web}}
  annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '{at}'}}
addressType: IPv4
ports: [{{name: tcp-80, port: {port}, protocol: TCP}}]
endpoints: [{{addresses: [10.244.9.9], nodeName: elsewhere}}]
"
    )
}

#[test]
fn changes_are_counted_and_timed_from_what_led_to_them() {
    let rig = Rig::build(|cluster| vec![web().endpoints([&cluster.nodes[0].pods[0]])]);
    let count = |rig: &Rig| rig.scrape().value("kubeproxy_network_programming_duration_seconds_count");
    let samples = rig.scrape();
    assert_eq!(samples.value("kubeproxy_sync_proxy_rules_service_changes_total"), 1.0);
    let changes = samples.value("kubeproxy_sync_proxy_rules_endpoint_changes_total");
    assert!(samples.value("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds") > 1.7e9);
    // From before the agent's start: programmed, not timed.
    rig.manifests.write_text("more", &changed("2020-01-01T00:00:00Z", 8081));
    let endpoint_changes = |rig: &Rig| {
        let samples = rig.scrape();
        let pending = samples.value("kubeproxy_sync_proxy_rules_endpoint_changes_pending");
        (samples.value("kubeproxy_sync_proxy_rules_endpoint_changes_total"), pending)
    };
    wait::until("the old change", || endpoint_changes(&rig) == (changes + 1.0, 0.0));
    assert_eq!(count(&rig), 0.0);
    let now = rig.cluster.nodes[0].place.ns().output(["date", "-u", "+%Y-%m-%dT%H:%M:%S.%NZ"]);
    rig.manifests.write_text("more", &changed(now.trim(), 8082));
    wait::until("the new change", || count(&rig) == 1.0);
    assert_eq!(endpoint_changes(&rig), (changes + 2.0, 0.0));
    // A deletion is not timed.
    rig.manifests.delete("more");
    wait::until("the deletion", || endpoint_changes(&rig) == (changes + 3.0, 0.0));
    assert_eq!(count(&rig), 1.0);
}

#[test]
fn tools_find_what_they_ask_kube_proxy_for() {
    let rig = Rig::build(|_| vec![]);
    let node = &rig.cluster.nodes[0];
    let ask = |path: &str| get(&node.place, metrics_address(), path);
    assert_eq!(ask("/proxyMode").body, "nftables");
    assert_eq!(ask("/healthz").body, "ok");
    let configz = ask("/configz");
    assert!(configz.head.contains("content-type: application/json"), "{}", configz.head);
    let configz: Value = serde_json::from_str(&configz.body).expect("an object");
    let configuration = &configz["kubeproxy.config.k8s.io"];
    assert_eq!(configuration["hostnameOverride"], node.name());
    assert_eq!(configuration["clusterCIDR"], shunt_tests::manifests::cluster_cidr());
    assert_eq!(configuration["metricsBindAddress"], "127.0.0.1:10249");
    assert_eq!(ask("/").status, 404);
}
