//! What the reconciler tells about its work, for health and metrics.

use std::fmt;
use std::time::{Duration, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::model::{Changes, Reader, ServiceKey, Triggers};

/// What the reconciler is at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Since when it has been at one piece of work; none: it waits for work.
    pub busy_since: Option<Instant>,
    /// When the newest snapshot was last applied, by the wall clock; none before all sources have listed.
    pub applied: Option<SystemTime>,
    /// The changes up to that snapshot.
    pub changes: Changes,
}

/// Seconds since 1970.
type Timestamp = Gauge<f64, std::sync::atomic::AtomicU64>;

/// The reconciler's side. Metrics have kube-proxy's names: a plan is what it calls a sync. They are without its label
/// `ip_family`, since a plan holds both families.
#[derive(Debug)]
pub struct Reporter {
    progress: watch::Sender<Progress>,
    /// Changes from before do not count.
    started: SystemTime,
    triggers: Triggers,
    duration: Histogram,
    programming: Histogram,
    last: Timestamp,
    last_queued: Timestamp,
}

impl Default for Reporter {
    fn default() -> Self {
        Self::new(Triggers::default())
    }
}

impl Reporter {
    /// Takes `triggers` as their changes are programmed, but not those of changes before now.
    pub fn new(triggers: Triggers) -> Self {
        // As kube-proxy: 1 ms to 16.4 s.
        let duration = Histogram::new(exponential_buckets(0.001, 2.0, 15));
        Self {
            progress: watch::Sender::default(),
            started: SystemTime::now(),
            triggers,
            duration,
            programming: Histogram::new(programming_buckets()),
            last: Timestamp::default(),
            last_queued: Timestamp::default(),
        }
    }

    /// Makes its metrics known.
    pub fn register(&self, registry: &mut Registry, snapshots: Reader) {
        let kube_proxy = registry.sub_registry_with_prefix("kubeproxy");
        let help = "Time from taking a snapshot to its being programmed, of snapshots that changed something";
        kube_proxy.register("sync_proxy_rules_duration_seconds", help, self.duration.clone());
        let help = "Time from a change of a service's endpoints in the cluster to its being programmed here";
        kube_proxy.register("network_programming_duration_seconds", help, self.programming.clone());
        let help = "When the newest snapshot was last programmed, in seconds since 1970";
        kube_proxy.register("sync_proxy_rules_last_timestamp_seconds", help, self.last.clone());
        let help = "When a change last came in, in seconds since 1970";
        kube_proxy.register("sync_proxy_rules_last_queued_timestamp_seconds", help, self.last_queued.clone());
        kube_proxy.register_collector(Box::new(Queue { snapshots, progress: self.watch() }));
    }

    /// For those who want to know.
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Notes when snapshots come in, for as long as there is somebody who makes them.
    pub fn note_queued(&self, mut snapshots: Reader) -> impl Future<Output = ()> + use<> {
        let last_queued = self.last_queued.clone();
        async move {
            while snapshots.changed().await.is_ok() {
                last_queued.set(seconds(SystemTime::now()));
            }
        }
    }

    /// A piece of work begins.
    pub fn begin(&self) {
        self.progress.send_modify(|progress| progress.busy_since = Some(Instant::now()));
    }

    /// It is done.
    pub fn end(&self) {
        self.progress.send_modify(|progress| progress.busy_since = None);
    }

    /// The newest snapshot of all sources is programmed, but for the services of which `is_refused` says so. It took `elapsed`
    /// if it changed anything.
    pub fn applied(&self, elapsed: Option<Duration>, changes: Changes, is_refused: impl Fn(&ServiceKey) -> bool) {
        let now = SystemTime::now();
        self.progress.send_modify(|progress| {
            progress.applied = Some(now);
            progress.changes = changes;
        });
        self.last.set(seconds(now));
        if let Some(elapsed) = elapsed {
            self.duration.observe(elapsed.as_secs_f64());
        }
        for (service, at) in self.triggers.take(changes.endpoints) {
            let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(at.get());
            if at > self.started && !is_refused(&service) {
                self.programming.observe(now.duration_since(at).unwrap_or_default().as_secs_f64());
            }
        }
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// As kube-proxy's: a quarter and a half second, each second of a minute, then wider ones up to five minutes.
fn programming_buckets() -> impl Iterator<Item = f64> {
    let seconds = (1..60).chain((60..120).step_by(5)).chain((120..=300).step_by(30));
    [0.25, 0.5].into_iter().chain(seconds.map(f64::from))
}

/// How many changes have come in, and how many of them are not programmed yet.
#[derive(Debug)]
struct Queue {
    snapshots: Reader,
    progress: watch::Receiver<Progress>,
}

impl Collector for Queue {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // In this order: what is programmed is never ahead of what came in.
        let done = self.progress.borrow().changes;
        let all = self.snapshots.borrow().changes;
        let of = [("service", all.services, done.services), ("endpoint", all.endpoints, done.endpoints)];
        for (kind, all, done) in of {
            let name = format!("sync_proxy_rules_{kind}_changes");
            let help = format!("Changes of {kind}s that came in");
            ConstCounter::new(all).encode(encoder.encode_descriptor(&name, &help, None, MetricType::Counter)?)?;
            let (name, help) = (name + "_pending", format!("Changes of {kind}s that are not programmed yet"));
            let pending = encoder.encode_descriptor(&name, &help, None, MetricType::Gauge)?;
            ConstGauge::new(all.saturating_sub(done)).encode(pending)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use prometheus_client::encoding::text::encode_registry;

    use crate::model::content::Content;
    use crate::model::{
        EndpointGroup, Event, GroupKind, Kind, Name, NodeFacts, Object, Snapshot, SourceId, SourceSpec, Update,
    };

    const KINDS: &[Kind] = &[Kind::EndpointSlice];

    /// Endpoints of service `name` that say when they changed.
    fn put(content: &mut Content, name: &str, at: SystemTime, generation: usize) {
        let at = u64::try_from(at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos()).unwrap();
        let subset = crate::model::EndpointSubset { ports: Box::default(), endpoints: Box::default() };
        let group =
            EndpointGroup { kind: GroupKind::Slice, name: Name::from(name), subsets: vec![subset; generation].into() };
        let event = Event::Apply(Object::Endpoints {
            namespace: Name::from("default"),
            service: Name::from(name),
            group: Arc::new(group),
            triggered: std::num::NonZeroU64::new(at),
        });
        content.apply(Update { source: SourceId::Kubernetes, events: vec![event] });
    }

    fn text(reporter: &Reporter, snapshot: &Snapshot) -> String {
        let (_sender, snapshots) = watch::channel(Arc::new(snapshot.clone()));
        let mut registry = Registry::default();
        reporter.register(&mut registry, snapshots);
        let mut text = String::new();
        encode_registry(&mut text, &registry).unwrap();
        text
    }

    #[track_caller]
    fn assert_samples(text: &str, samples: &[&str]) {
        for sample in samples {
            assert!(text.lines().any(|line| line == *sample), "{sample}\n{text}");
        }
    }

    #[test]
    fn one_sample_a_service_from_its_earliest_change_and_none_from_before_the_start() {
        let spec = SourceSpec { id: SourceId::Kubernetes, kinds: KINDS };
        let mut content = Content::new(Arc::new(NodeFacts::named(Name::from("n"))), &[spec]);
        for event in [Event::Init(Kind::EndpointSlice), Event::InitDone(Kind::EndpointSlice)] {
            content.apply(Update { source: SourceId::Kubernetes, events: vec![event] });
        }
        let reporter = Reporter {
            started: SystemTime::now() - Duration::from_secs(100),
            ..Reporter::new(content.triggers().clone())
        };
        let ago = |seconds| SystemTime::now() - Duration::from_secs(seconds);
        put(&mut content, "old", ago(200), 1);
        put(&mut content, "refused", ago(20), 1);
        put(&mut content, "web", ago(10), 1);
        put(&mut content, "web", ago(40), 2);
        let planned = content.snapshot().changes;
        put(&mut content, "late", ago(1), 1);
        let waiting = text(&reporter, content.snapshot());
        let expected = [
            "kubeproxy_network_programming_duration_seconds_count 0",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 5",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 5",
            "kubeproxy_sync_proxy_rules_service_changes_total 0",
        ];
        assert_samples(&waiting, &expected);
        reporter.applied(None, planned, |service| service.name.as_str() == "refused");
        let done = text(&reporter, content.snapshot());
        let expected = [
            "kubeproxy_network_programming_duration_seconds_count 1",
            r#"kubeproxy_network_programming_duration_seconds_bucket{le="39.0"} 0"#,
            r#"kubeproxy_network_programming_duration_seconds_bucket{le="80.0"} 1"#,
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 1",
        ];
        assert_samples(&done, &expected);
        reporter.applied(None, content.snapshot().changes, |_| false);
        assert_samples(
            &text(&reporter, content.snapshot()),
            &[
                "kubeproxy_network_programming_duration_seconds_count 2",
                "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
            ],
        );
    }

    #[test]
    fn buckets_are_those_of_kube_proxy() {
        let buckets: Vec<_> = programming_buckets().collect();
        assert_eq!(buckets.len(), 2 + 59 + 12 + 7);
        assert_eq!(buckets[..4], [0.25, 0.5, 1.0, 2.0]);
        assert_eq!(buckets[60..63], [59.0, 60.0, 65.0]);
        assert_eq!(buckets[72..], [115.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0]);
    }
}
