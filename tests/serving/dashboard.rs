//! The dashboard in `deploy/grafana` asks for what the agent exports.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;
use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Manifests, service};
use shunt_tests::topology::{Cluster, Plan, SERVICES};
use shunt_tests::wait;

use crate::samples::Samples;

/// How the names of metrics of an agent begin.
const PREFIXES: [&str; 3] = ["shunt_", "kubeproxy_", "process_"];

/// The queries of a dashboard.
fn queries(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().expect("it has panels").iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    targets.map(|target| target["expr"].as_str().expect("a target is a query").to_owned()).collect()
}

/// The words of a query, as PromQL takes names apart.
fn words(query: &str) -> impl Iterator<Item = &str> {
    query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// The metrics that a query names.
fn metrics(query: &str) -> impl Iterator<Item = &str> {
    words(query).filter(|word| PREFIXES.iter().any(|prefix| word.starts_with(prefix)))
}

/// The labels by which it groups, but for those that Prometheus itself adds.
fn groups(query: &str) -> impl Iterator<Item = &str> {
    let lists = query.split(" by (").skip(1).filter_map(|rest| rest.split(')').next());
    lists.flat_map(words).filter(|label| *label != "instance")
}

#[test]
fn every_metric_and_label_of_the_dashboard_is_exported() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/grafana/shunt.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let queries = queries(&serde_json::from_str(&text).expect("a dashboard is JSON"));
    assert!(queries.len() > 20, "{queries:#?}");

    let cluster = Cluster::build(Plan::default());
    let manifests = Manifests::of(&cluster);
    manifests.apply(&service("web").cluster_ips(SERVICES.host(1)).tcp(80, 8080).endpoints([&cluster.nodes[0].pods[0]]));
    let _agent = Agent::start_on(&cluster, &cluster.nodes[0], &manifests);
    // Flows are counted by the sweep.
    wait::until("a first sweep", || Samples::scrape(&cluster.nodes[0]).series("shunt_flows").count() > 0);
    let samples = Samples::scrape(&cluster.nodes[0]);

    let mut missing = BTreeSet::new();
    for query in &queries {
        assert!(metrics(query).count() > 0, "{query}");
        for metric in metrics(query) {
            let mut series = samples.series(metric).peekable();
            let is_there = series.peek().is_some();
            let has = |label: &str| samples.series(metric).any(|series| series.contains(&format!("{label}=\"")));
            missing.extend((!is_there).then(|| metric.to_owned()));
            missing.extend(groups(query).filter(|label| !has(label)).map(|label| format!("{metric}: {label}")));
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn metrics_and_labels_are_found_in_queries() {
    let query =
        r#"topk(10, sum by (le, service) (rate(shunt_service_bytes_total{job=~"$job"}[1m])) / process_max_fds)"#;
    assert_eq!(metrics(query).collect::<Vec<_>>(), ["shunt_service_bytes_total", "process_max_fds"]);
    assert_eq!(groups(query).collect::<Vec<_>>(), ["le", "service"]);
}
