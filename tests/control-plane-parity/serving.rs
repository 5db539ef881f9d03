//! Health, configuration and metrics over HTTP: whoever asks kube-proxy finds the same here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};
use shunt_tests::control_plane::{Kind, Patch};
use shunt_tests::manifests::Endpoint;
use shunt_tests::place::Place;
use shunt_tests::topology::{Cluster, Family};
use shunt_tests::wait;

use crate::difference::{Findings, assert_listed};
use crate::http::{self, Reply};
use crate::offer::Offer;
use crate::pair::Pair;

/// What differs from one answer to the next, or with the length of what does.
const VOLATILE_HEADERS: [&str; 2] = ["date", "content-length"];
/// How metrics begin that say something of a proxy. The others are of Go, and of libraries of the API server.
const METRICS: [&str; 4] = ["kubeproxy_", "process_", "rest_client_", "shunt_"];
/// Where health checks of services listen, counted from here by the offer's number.
const HEALTH_CHECKS: u16 = 32_000;

/// What is asked where.
struct Request {
    /// As it stands in the list.
    port: &'static str,
    path: &'static str,
    node: usize,
    to: Where,
}

enum Where {
    /// From outside, on a node's address.
    Outside(u16),
    /// From the node itself, on its loopback.
    Inside(u16),
}

impl Request {
    fn all() -> Vec<Self> {
        let mut requests = Vec::new();
        let mut add = |port, node, to: fn() -> Where, paths: &[&'static str]| {
            requests.extend(paths.iter().map(|&path| Self { port, path, node, to: to() }));
        };
        add("10256", 0, || Where::Outside(10256), &["/healthz", "/livez", "/"]);
        add("10249", 0, || Where::Inside(10249), &["/healthz", "/proxyMode", "/configz", "/metrics", "/nothing"]);
        for (port, number) in
            [("near", 1), ("far", 2), ("nobody", 3), ("ends", 4), ("published-unready", 5), ("two", 6)]
        {
            for node in [0, 1] {
                let path = ["/", "/any/path"][node];
                requests.push(Self { port, path, node, to: Where::Outside(HEALTH_CHECKS + number) });
            }
        }
        requests
    }

    fn ask(&self, cluster: &Cluster) -> Option<Reply> {
        let node = &cluster.nodes[self.node];
        let (place, to): (&Place, SocketAddr) = match self.to {
            Where::Outside(port) => (&cluster.client.place, node.addrs.port(Family::V4, port)),
            Where::Inside(port) => (&node.place, SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        };
        http::try_get(place, to, self.path).ok()
    }
}

/// The services whose health is asked for.
fn offers(cluster: &Cluster) -> Vec<Value> {
    let near = || Endpoint::from(&cluster.nodes[0].pods[0]);
    let far = || Endpoint::from(&cluster.nodes[1].pods[0]);
    let all = [
        ("near", vec![near()]),
        ("far", vec![far()]),
        ("nobody", vec![]),
        ("ends", vec![near().terminating(true), far()]),
        ("published-unready", vec![Endpoint { is_serving: false, ..near() }]),
        ("two", vec![near(), (&cluster.nodes[0].pods[1]).into(), far()]),
    ];
    let offers = (1..).zip(all).map(|(number, (name, endpoints))| {
        let offer = Offer::new(number, name).to(endpoints).spec("externalTrafficPolicy", json!("Local"));
        offer.spec("healthCheckNodePort", json!(HEALTH_CHECKS + number))
    });
    offers.flat_map(|offer| offer.service.objects()).collect()
}

/// All answers of both sides, aspect by aspect.
fn compare(pair: &Pair, stage: &str) -> Findings {
    let mut findings = Findings::new();
    for request in Request::all() {
        let [kube_proxy, shunt] = pair.worlds.each_ref().map(|world| aspects(&request, request.ask(&world.cluster)));
        let names: BTreeSet<_> = kube_proxy.keys().chain(shunt.keys()).cloned().collect();
        for name in names {
            let value =
                |side: &BTreeMap<String, String>| side.get(&name).cloned().unwrap_or_else(|| "absent".to_owned());
            let words =
                [stage, &format!("node-{}", request.node + 1), request.port, request.path, &name].map(str::to_owned);
            findings.push((words, (value(&kube_proxy), value(&shunt))));
        }
    }
    findings
}

/// What an answer consists of, by name.
fn aspects(request: &Request, reply: Option<Reply>) -> BTreeMap<String, String> {
    let Some(reply) = reply else { return BTreeMap::from([("status".to_owned(), "refused".to_owned())]) };
    let mut aspects = BTreeMap::from([("status".to_owned(), reply.status.to_string())]);
    for header in reply.head.lines().skip(1) {
        let (name, value) = header.split_once(':').expect("a header has a name");
        if !VOLATILE_HEADERS.contains(&name) {
            aspects.insert(format!("header {name}"), value.trim().to_owned());
        }
    }
    match request.path {
        "/metrics" if reply.head.contains("transfer-encoding: chunked") => {
            aspects.extend(metrics(&joined(&reply.body)))
        }
        "/metrics" => aspects.extend(metrics(&reply.body)),
        "/configz" => flatten("", &serde_json::from_str(&reply.body).expect("JSON"), &mut aspects),
        _ => drop(aspects.insert("body".to_owned(), format!("{:?}", timeless(&reply.body)))),
    }
    aspects
}

/// The metrics of a proxy and their types.
fn metrics(text: &str) -> impl Iterator<Item = (String, String)> {
    let described = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let described = described.filter(|(name, _)| METRICS.iter().any(|prefix| name.starts_with(prefix)));
    described.map(|(name, kind)| (format!("metric {name}"), kind.to_owned()))
}

/// A body in chunks, put together (RFC 9112, section 7.1).
fn joined(chunks: &str) -> String {
    let (mut left, mut whole) = (chunks, String::new());
    while let Some((size, rest)) = left.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk begins with its size");
        whole.push_str(&rest[..size]);
        left = rest[size..].trim_start_matches("\r\n");
    }
    whole
}

/// The leaves of an object by their paths.
fn flatten(path: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            fields.iter().for_each(|(name, field)| flatten(&format!("{path}.{name}"), field, leaves));
        }
        leaf => drop(leaves.insert(format!("field {}", path.trim_start_matches('.')), leaf.to_string())),
    }
}

/// A text with its times taken out: those in quotes, of RFC 3339 and in UTC.
fn timeless(text: &str) -> String {
    let is_time = |part: &str| part.starts_with("20") && part.ends_with('Z') && part.contains('T');
    text.split('"').map(|part| if is_time(part) { "TIME" } else { part }).collect::<Vec<_>>().join("\"")
}

/// Waits until both sides say that the node goes, or stays.
#[track_caller]
fn wait_status(pair: &Pair, status: u16) {
    let node = |cluster: &Cluster| cluster.nodes[0].addrs.port(Family::V4, 10256);
    for world in &pair.worlds {
        let ask = || http::try_get(&world.cluster.client.place, node(&world.cluster), "/healthz");
        wait::until(&format!("/healthz to be {status}"), || ask().is_ok_and(|reply| reply.status == status));
    }
}

#[test]
fn health_configuration_and_metrics_are_told_as_by_kube_proxy() {
    let pair = Pair::new();
    pair.serve(&offers(pair.cluster()));
    wait_status(&pair, 200);
    let mut findings = compare(&pair, "served");
    let nodes = pair.api().all(Kind::NODE);
    let taint = json!([{ "key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule" }]);
    nodes.patch("node-1", &Patch::Merge(json!({ "spec": { "taints": taint } }))).expect("a node can be tainted");
    wait_status(&pair, 503);
    findings.extend(compare(&pair, "leaving"));
    assert_listed("serving.md", include_str!("serving.md"), &findings);
}

#[test]
fn chunks_are_joined_where_they_were_cut() {
    assert_eq!(joined("3\r\n# T\r\n5\r\nYPE a\r\n0\r\n\r\n"), "# TYPE a");
}

#[test]
fn times_are_all_that_is_taken_out() {
    let text = r#"{"lastUpdated": "2026-01-02T03:04:05.6Z","healthy": true, "a": "20Z"}"#;
    assert_eq!(timeless(text), r#"{"lastUpdated": "TIME","healthy": true, "a": "20Z"}"#);
}
