//! What the reconciler and the sources report, as metrics.
//!
//! May touch: nothing; it looks at the newest status.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::source::Sources;
use crate::datapath::overlap::Overlaps;
use crate::datapath::reconcile::Status;
use crate::health::node_port::Refusals;
use crate::model::SourceId;
use crate::planner::Problem;

#[derive(Debug)]
struct Reports {
    ids: Box<[SourceId]>,
    status: watch::Receiver<Arc<Status>>,
    sources: Sources,
    health_checks: watch::Receiver<Refusals>,
    overlaps: watch::Receiver<Overlaps>,
}

/// Makes metrics of status and sources known; `ids` are those that are configured.
pub fn register(
    registry: &mut Registry,
    ids: impl Iterator<Item = SourceId>,
    status: watch::Receiver<Arc<Status>>,
    sources: Sources,
    health_checks: watch::Receiver<Refusals>,
    overlaps: watch::Receiver<Overlaps>,
) {
    let reports = Reports { ids: ids.collect(), status, sources, health_checks, overlaps };
    registry.sub_registry_with_prefix("shunt").register_collector(Box::new(reports));
}

impl Collector for Reports {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let status = self.status.borrow().clone();
        let beside = [
            ("health_check_not_served", self.health_checks.borrow().len()),
            ("node_port_taken", self.overlaps.borrow().len()),
        ];
        encode_status(&mut encoder, &status, beside)?;
        encode_pending(&mut encoder, &self.ids, &status)?;
        self.sources.encode(&mut encoder)
    }
}

/// Kinds of problems that others find than the planner, and how many there are.
type Beside = [(&'static str, usize); 2];

fn encode_status(encoder: &mut DescriptorEncoder<'_>, status: &Status, beside: Beside) -> fmt::Result {
    let metric = encoder.encode_descriptor("plans", "Plans that changed something", None, MetricType::Counter)?;
    ConstCounter::new(status.plans).encode(metric)?;
    let waiting: usize = status.failures.iter().map(|failure| failure.waiting).sum();
    let gauges = [
        ("ready", "1 if everything that the sources listed is programmed", usize::from(status.is_ready)),
        ("failures_waiting", "Changes that a table refused; they are tried again", waiting),
        ("failed_services", "Services, and this node, with such changes", status.failures.len()),
    ];
    for (name, help, value) in gauges {
        ConstGauge::new(value as u64).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
    }
    encode_problems(encoder, status, beside)
}

fn encode_problems(encoder: &mut DescriptorEncoder<'_>, status: &Status, beside: Beside) -> fmt::Result {
    let help = "Things that services ask for and do not get";
    let mut metric = encoder.encode_descriptor("problems", help, None, MetricType::Gauge)?;
    let mut counts = BTreeMap::from(Problem::KINDS.map(|kind| (kind, 0)));
    counts.extend(beside.map(|(kind, count)| (kind, count as u64)));
    for problem in status.problems.values().flatten() {
        *counts.entry(problem.kind()).or_default() += 1;
    }
    for (kind, count) in counts {
        ConstGauge::new(count).encode(metric.encode_family(&[("kind", kind)])?)?;
    }
    Ok(())
}

fn encode_pending(encoder: &mut DescriptorEncoder<'_>, sources: &[SourceId], status: &Status) -> fmt::Result {
    let help = "1 until everything that a source listed first is programmed";
    let mut metric = encoder.encode_descriptor("source_pending", help, None, MetricType::Gauge)?;
    for source in sources {
        let is_pending = status.pending.contains(source);
        ConstGauge::new(u64::from(is_pending)).encode(metric.encode_family(&[("source", source.name())])?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode_registry;

    use super::*;
    use crate::datapath::reconcile::Failure;
    use crate::health::node_port::Refusal;
    use crate::model::{Name, NodeFacts, ObjectProblem, ServiceKey, Snapshot};
    use crate::planner::{Problem, Subject};
    use crate::source::contact::{Outage, State};
    use std::time::{Duration, SystemTime};

    const SOURCES: [SourceId; 2] = [SourceId::Kubernetes, SourceId::Manifests];

    fn text(status: Status, snapshot: Snapshot) -> String {
        let mut registry = Registry::default();
        let (_status, status) = watch::channel(Arc::new(status));
        let (_snapshot, snapshots) = watch::channel(Arc::new(snapshot));
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let outage = Outage { what: "Service".into(), since: at(50), why: "refused".into() };
        let down = State { heard: Some(at(40)), outages: vec![outage] };
        let contacts = [(SourceId::Kubernetes, down), (SourceId::Manifests, State::default())];
        let contacts = contacts.map(|(id, state)| (id, watch::channel(state).1));
        let address = "192.0.2.1:30100".parse().unwrap();
        let refusal = Refusal { service: service(), address, error: "in use".into() };
        let (_refusals, health_checks) = watch::channel(Refusals::from([(address, refusal)]));
        let sources = Sources::new(snapshots, contacts.into());
        let (_taken, taken) = watch::channel(Overlaps::default());
        register(&mut registry, SOURCES.into_iter(), status, sources, health_checks, taken);
        let mut text = String::new();
        encode_registry(&mut text, &registry).unwrap();
        text
    }

    fn service() -> ServiceKey {
        ServiceKey { source: SourceId::Manifests, namespace: Name::from("a"), name: Name::from("b") }
    }

    fn snapshot() -> Snapshot {
        Snapshot::empty(Arc::new(NodeFacts::named(Name::from("n"))), SOURCES)
    }

    #[track_caller]
    fn assert_samples(text: &str, samples: &[&str]) {
        for sample in samples {
            assert!(text.lines().any(|line| line == *sample), "{sample}\n{text}");
        }
    }

    #[test]
    fn nothing_is_programmed_at_first() {
        let expected = [
            "shunt_ready 0",
            "shunt_plans_total 0",
            r#"shunt_source_pending{source="kubernetes"} 1"#,
            r#"shunt_source_pending{source="manifests"} 1"#,
            r#"shunt_source_object_errors{source="manifests"} 0"#,
        ];
        assert_samples(&text(Status { pending: SOURCES.into(), ..Status::default() }, snapshot()), &expected);
    }

    #[test]
    fn troubles_are_counted() {
        let failure = |waiting| Failure { subject: Subject::Node, error: "full".into(), attempts: 2, waiting };
        let status = Status {
            plans: 5,
            is_serving: true,
            pending: vec![SourceId::Kubernetes],
            failures: vec![failure(3), failure(4)],
            problems: [(service(), vec![Problem::NoClusterIp, Problem::NoClusterIp])].into(),
            ..Status::default()
        };
        let mut snapshot = snapshot();
        let problem = ObjectProblem { place: "a.yaml".into(), object: None, message: "no".into() };
        snapshot.problems.insert(SourceId::Manifests, [problem].into());
        let expected = [
            "shunt_plans_total 5",
            "shunt_failures_waiting 7",
            "shunt_failed_services 2",
            r#"shunt_problems{kind="no_cluster_ip"} 2"#,
            r#"shunt_problems{kind="health_check_not_served"} 1"#,
            r#"shunt_problems{kind="conflict"} 0"#,
            r#"shunt_source_pending{source="kubernetes"} 1"#,
            r#"shunt_source_pending{source="manifests"} 0"#,
            r#"shunt_source_object_errors{source="kubernetes"} 0"#,
            r#"shunt_source_object_errors{source="manifests"} 1"#,
            r#"shunt_source_stale{source="kubernetes"} 1"#,
            r#"shunt_source_stale{source="manifests"} 0"#,
            r#"shunt_source_last_contact_timestamp_seconds{source="kubernetes"} 40.0"#,
            r#"shunt_source_objects{source="manifests",kind="Service"} 0"#,
        ];
        let text = text(status, snapshot);
        assert_samples(&text, &expected);
        let never = r#"shunt_source_last_contact_timestamp_seconds{source="manifests"}"#;
        assert!(!text.contains(never), "a time that never was is not told: {text}");
    }
}
