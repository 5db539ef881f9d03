//! What the reconciler tells about its work, for health and metrics.

use std::time::{Duration, SystemTime};

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::time::Instant;

/// What the reconciler is at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Since when it has been at one piece of work; none: it waits for work.
    pub busy_since: Option<Instant>,
    /// When the newest snapshot was last applied, by the wall clock; none before all sources have listed.
    pub applied: Option<SystemTime>,
}

/// The reconciler's side. Metrics have kube-proxy's names: a plan is what it calls a sync. They are without its label
/// `ip_family`, since a plan holds both families.
#[derive(Debug)]
pub struct Reporter {
    progress: watch::Sender<Progress>,
    duration: Histogram,
    last: Gauge<f64, std::sync::atomic::AtomicU64>,
}

impl Default for Reporter {
    fn default() -> Self {
        // As kube-proxy: 1 ms to 16.4 s.
        let duration = Histogram::new(exponential_buckets(0.001, 2.0, 15));
        Self { progress: watch::Sender::default(), duration, last: Gauge::default() }
    }
}

impl Reporter {
    /// Makes its metrics known.
    pub fn register(&self, registry: &mut Registry) {
        let kube_proxy = registry.sub_registry_with_prefix("kubeproxy");
        let help = "Time from taking a snapshot to its being programmed, of snapshots that changed something";
        kube_proxy.register("sync_proxy_rules_duration_seconds", help, self.duration.clone());
        let help = "When the newest snapshot was last programmed, in seconds since 1970";
        kube_proxy.register("sync_proxy_rules_last_timestamp_seconds", help, self.last.clone());
    }

    /// For those who want to know.
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// A piece of work begins.
    pub fn begin(&self) {
        self.progress.send_modify(|progress| progress.busy_since = Some(Instant::now()));
    }

    /// It is done.
    pub fn end(&self) {
        self.progress.send_modify(|progress| progress.busy_since = None);
    }

    /// The newest snapshot of all sources is programmed; it took `elapsed` if it changed anything.
    pub fn applied(&self, elapsed: Option<Duration>) {
        let now = SystemTime::now();
        self.progress.send_modify(|progress| progress.applied = Some(now));
        self.last.set(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        if let Some(elapsed) = elapsed {
            self.duration.observe(elapsed.as_secs_f64());
        }
    }
}
