//! Metrics as a scraper sees them.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use shunt_tests::topology::Node;

use crate::http;

/// Where the agent serves metrics by default, from its node.
pub fn metrics_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 10249))
}

/// Values by series: name and labels as they are written.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples(BTreeMap<String, f64>);

impl Samples {
    /// What a scrape on the node gets.
    #[track_caller]
    pub fn scrape(node: &Node) -> Self {
        let reply = http::get(&node.place, metrics_address(), "/metrics");
        assert_eq!(reply.status, 200);
        assert!(reply.head.contains("content-type: text/plain; version=0.0.4"), "{}", reply.head);
        Self::parse(&reply.body)
    }

    /// From text of Prometheus; panics at a series that is there twice, or belongs to no described metric.
    #[track_caller]
    fn parse(text: &str) -> Self {
        let mut samples = BTreeMap::new();
        let mut described = "";
        for line in text.lines() {
            if let Some(description) = line.strip_prefix("# TYPE ") {
                described = description.split(' ').next().expect("a split has a first part");
                continue;
            }
            if line.starts_with('#') {
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            assert!(series.starts_with(described), "{series} after the description of {described}");
            let value = value.parse().unwrap_or_else(|_| panic!("no value: {line}"));
            assert!(samples.insert(series.to_owned(), value).is_none(), "twice: {series}");
        }
        Self(samples)
    }

    /// The value of a series; panics if there is none.
    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        self.find(series).unwrap_or_else(|| panic!("no series {series} among {:#?}", self.0))
    }

    /// The value of a series.
    pub fn find(&self, series: &str) -> Option<f64> {
        self.0.get(series).copied()
    }

    /// The series of a metric, as they are written.
    pub fn series(&self, metric: &str) -> impl Iterator<Item = &str> {
        let is_of = move |series: &&str| {
            series.strip_prefix(metric).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
        };
        self.0.keys().map(String::as_str).filter(is_of)
    }

    /// Counters of services and drops that are greater than in `before`, by how much.
    pub fn moved_since(&self, before: &Self) -> BTreeMap<String, f64> {
        let traffic = self
            .0
            .iter()
            .filter(|(series, _)| series.starts_with("shunt_service_") || series.starts_with("shunt_drops_total"));
        let moved = traffic.map(|(series, value)| (series.clone(), value - before.find(series).unwrap_or_default()));
        moved.filter(|(_, by)| *by != 0.0).collect()
    }
}
