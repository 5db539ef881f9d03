//! Health of this node's service proxy, as load balancers, kubelets and people ask for it.
//!
//! | path | 200 | else 503 |
//! |---|---|---|
//! | `/healthz` | everything that the sources listed was programmed once, by this agent or the one it took over from, the reconciler gets on, and the node stays | also before the first full load |
//! | `/livez` | the reconciler gets on | only a restart might help |
//! | `/readyz` | everything that the sources listed is programmed, the reconciler gets on, and the agent does not end | what is missing, a line each |
//!
//! Health of single services is in [`node_port`].
//!
//! A node that is about to be deleted has no more new connections to get: external load balancers are told so by `/healthz`
//! (KEP-3836), while the agent works on for those it has. The same is said of a node that its cluster does not know, if
//! there is a cluster to know it: the Kubernetes API is followed, or the manifests list nodes.
//!
//! The first two speak kube-proxy's JSON. Two answers differ from it, deliberately. Before its first sync kube-proxy calls
//! itself healthy, and load balancers send traffic to a node that has no services yet. And an agent that ends stays healthy
//! for them: what it programmed works on. May touch: nothing; it looks at what other parts tell.

pub mod node_port;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family as MetricFamily;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::datapath::progress::Progress;
use crate::datapath::reconcile::Status;
use crate::drain::Drain;
use crate::model::{Family, Reader, Snapshot, SourceId};
use crate::telemetry::http::{Answer, Handler, Question};

/// The reconciler does not get on when it is at one piece of work for that long. kube-proxy: twice its sync period of 30 s.
const PATIENCE: Duration = Duration::from_secs(60);

/// What Go prints for a time that never was.
const NEVER: &str = "0001-01-01T00:00:00Z";

const PATHS: [&str; 3] = ["/healthz", "/livez", "/readyz"];

/// What health is judged by.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Sources whose first list is not complete.
    pub pending: Vec<SourceId>,
    /// All have listed, and what they listed is programmed.
    pub is_programmed: bool,
    /// That was so once in the tables that were taken over: they serve, whether or not the sources can be reached now.
    pub was_programmed: bool,
    /// The programs are attached.
    pub is_attached: bool,
    /// The agent ends.
    pub is_draining: bool,
    /// The node is not known, or about to be deleted.
    pub is_node_leaving: bool,
    /// What the reconciler is at.
    pub progress: Progress,
}

impl View {
    /// Clients of services can be sent here.
    fn is_loaded(&self) -> bool {
        (self.is_programmed || self.was_programmed) && self.is_attached
    }

    /// The reconciler gets on. The first load may take its time: a restart would only begin it anew.
    fn is_alive(&self, now: Instant) -> bool {
        let is_stuck = |since: Instant| now.saturating_duration_since(since) > PATIENCE;
        self.progress.applied.is_none() || !self.progress.busy_since.is_some_and(is_stuck)
    }

    /// What keeps the agent from being ready, a sentence each.
    fn missing(&self, now: Instant) -> Vec<String> {
        let mut missing = Vec::new();
        if self.is_draining {
            missing.push("the agent ends".to_owned());
        }
        missing.extend(self.pending.iter().map(|source| format!("{source} has not listed everything yet")));
        if !self.is_programmed && self.pending.is_empty() {
            missing.push("the first plan is not applied yet".to_owned());
        }
        if !self.is_attached {
            missing.push("the programs are not attached yet".to_owned());
        }
        if !self.is_alive(now) {
            missing.push(format!("the reconciler has been at one plan for more than {} s", PATIENCE.as_secs()));
        }
        missing
    }
}

/// kube-proxy's answer on `/healthz` and `/livez`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct ProxyHealth {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    status: BTreeMap<&'static str, FamilyHealth>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyHealth {
    last_updated: String,
    healthy: bool,
}

impl ProxyHealth {
    /// Both families are planned and applied together, so they have the same health, which says nothing of the node.
    fn new(progress: &Progress, healthy: bool, node_eligible: Option<bool>, wall: SystemTime) -> Self {
        let applied = progress.applied.map_or_else(|| NEVER.to_owned(), time_text);
        let current_time = time_text(wall);
        // Old probers take an old time for bad health.
        let last_updated = if healthy { current_time.clone() } else { applied.clone() };
        let family = FamilyHealth { last_updated: applied, healthy };
        let status = Family::ALL.iter().map(|name| (name.name(), family.clone())).collect();
        Self { last_updated, current_time, node_eligible, healthy, status }
    }

    fn answer(&self) -> Answer {
        let body = serde_json::to_string(self).expect("strings and booleans have a JSON form");
        Answer::json(status_code(self.healthy && self.node_eligible != Some(false)), body)
    }
}

/// RFC 3339 with a fraction.
fn time_text(time: SystemTime) -> String {
    // Fails only thousands of years from now.
    Timestamp::try_from(time).map_or_else(|_| NEVER.to_owned(), |time| time.to_string())
}

fn status_code(is_good: bool) -> StatusCode {
    if is_good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// The answer to a question about health, from the state and the time.
fn answer(path: &str, view: &View, now: Instant, wall: SystemTime) -> Answer {
    let is_alive = view.is_alive(now);
    match path {
        "/healthz" => {
            let healthy = is_alive && view.is_loaded();
            ProxyHealth::new(&view.progress, healthy, Some(!view.is_node_leaving), wall).answer()
        }
        "/livez" => ProxyHealth::new(&view.progress, is_alive, None, wall).answer(),
        "/readyz" => ready(&view.missing(now)),
        _ => Answer::not_found(&PATHS),
    }
}

/// True if external load balancers should send nobody to this node any more. Where it is not known whether there is a Node
/// object (a list is not complete, or could not be read), that is no reason.
fn is_node_leaving(snapshot: &Snapshot, follows_cluster: bool) -> bool {
    match snapshot.own_node() {
        Some(node) => node.is_leaving,
        None => (follows_cluster || !snapshot.nodes.is_empty()) && snapshot.is_settled(),
    }
}

fn ready(missing: &[String]) -> Answer {
    let mut body = String::new();
    missing.iter().for_each(|line| _ = writeln!(body, "{line}"));
    if missing.is_empty() {
        body.push_str("ready\n");
    }
    Answer::text(status_code(missing.is_empty()), body)
}

type ByCode = MetricFamily<[(&'static str, u16); 1], Counter>;

/// What other parts tell.
#[derive(Debug)]
pub struct Watched {
    /// What the sources said.
    pub snapshots: Reader,
    /// What the reconciler has done,
    pub status: watch::Receiver<Arc<Status>>,
    /// and what it is at.
    pub progress: watch::Receiver<Progress>,
    /// Whether the programs are attached.
    pub attached: watch::Receiver<bool>,
    /// Whether the agent ends.
    pub drain: Drain,
}

/// Answers about health.
#[derive(Debug)]
pub struct Health {
    watched: Watched,
    was_programmed: bool,
    follows_cluster: bool,
    healthz: ByCode,
    livez: ByCode,
}

impl Health {
    /// Watches what `watched` tell. `was_programmed`: as in [`View`]; `follows_cluster`: a cluster is to know this node.
    pub fn new(watched: Watched, was_programmed: bool, follows_cluster: bool) -> Self {
        let (healthz, livez) = (ByCode::default(), ByCode::default());
        Self { watched, was_programmed, follows_cluster, healthz, livez }
    }

    /// Answers by code, under kube-proxy's names.
    pub fn register(&self, registry: &mut Registry) {
        let kube_proxy = registry.sub_registry_with_prefix("kubeproxy");
        kube_proxy.register("proxy_healthz", "Answers on /healthz by code", self.healthz.clone());
        kube_proxy.register("proxy_livez", "Answers on /livez by code", self.livez.clone());
    }

    /// What `/healthz` calls healthy: the tables are loaded, and the reconciler gets on.
    fn is_healthy(&self) -> bool {
        let view = self.view();
        view.is_loaded() && view.is_alive(Instant::now())
    }

    fn view(&self) -> View {
        let watched = &self.watched;
        let status = watched.status.borrow().clone();
        let snapshot = watched.snapshots.borrow().clone();
        View {
            pending: status.pending.clone(),
            is_programmed: status.is_ready,
            was_programmed: self.was_programmed,
            is_attached: *watched.attached.borrow(),
            is_draining: watched.drain.has_begun(),
            is_node_leaving: is_node_leaving(&snapshot, self.follows_cluster),
            progress: watched.progress.borrow().clone(),
        }
    }
}

impl Handler for Health {
    async fn answer(&self, question: Question<'_>) -> Answer {
        let answer = answer(question.path, &self.view(), Instant::now(), SystemTime::now());
        let counter = match question.path {
            "/healthz" => Some(&self.healthz),
            "/livez" => Some(&self.livez),
            _ => None,
        };
        if let Some(counter) = counter {
            counter.get_or_create(&[("code", answer.status.as_u16())]).inc();
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Gaps, Kind, Name, Node, NodeFacts, ObjectKey};

    const WALL: SystemTime = SystemTime::UNIX_EPOCH;

    fn loaded() -> View {
        View { is_programmed: true, is_attached: true, progress: applied(), ..View::default() }
    }

    fn applied() -> Progress {
        Progress { applied: Some(WALL + Duration::from_millis(1500)), ..Progress::default() }
    }

    fn codes(view: &View, now: Instant) -> [u16; 3] {
        PATHS.map(|path| answer(path, view, now, WALL).status.as_u16())
    }

    #[test]
    fn nothing_but_life_before_the_first_full_load() {
        let now = Instant::now();
        assert_eq!(codes(&View::default(), now), [503, 200, 503]);
        let one_of_two = View { pending: vec![SourceId::Kubernetes], progress: applied(), ..View::default() };
        assert_eq!(codes(&one_of_two, now), [503, 200, 503]);
        assert_eq!(codes(&View { is_attached: false, ..loaded() }, now), [503, 200, 503]);
        assert_eq!(codes(&loaded(), now), [200, 200, 200]);
    }

    #[test]
    fn tables_that_were_loaded_once_are_healthy_while_the_sources_are_waited_for() {
        let view = View { pending: vec![SourceId::Kubernetes], was_programmed: true, ..View::default() };
        let now = Instant::now();
        assert_eq!(codes(&view, now), [503, 200, 503], "nothing is attached yet");
        assert_eq!(codes(&View { is_attached: true, ..view }, now), [200, 200, 503]);
    }

    #[test]
    fn an_ending_agent_is_not_ready_but_its_node_is_healthy() {
        let view = View { is_draining: true, ..loaded() };
        assert_eq!(codes(&view, Instant::now()), [200, 200, 503]);
        assert_eq!(answer("/readyz", &view, Instant::now(), WALL).body, "the agent ends\n");
    }

    #[test]
    fn a_node_that_goes_is_drained_by_its_load_balancers_while_the_agent_works_on() {
        let view = View { is_node_leaving: true, ..loaded() };
        let now = Instant::now();
        assert_eq!(codes(&view, now), [503, 200, 200]);
        let body = answer("/healthz", &view, now, WALL).body;
        assert!(body.contains(r#""nodeEligible":false,"healthy":true"#), "{body}");
        assert!(body.contains(r#""IPv4":{"lastUpdated":"1970-01-01T00:00:01.5Z","healthy":true}"#), "{body}");
    }

    #[test]
    fn a_node_goes_when_its_object_says_so_or_is_missing_where_there_should_be_one() {
        let empty = |pending: &[SourceId]| {
            Snapshot::empty(Arc::new(NodeFacts::named(Name::from("node-a"))), pending.iter().copied())
        };
        let with = |name: &str, is_leaving| {
            let mut snapshot = empty(&[]);
            let node = Arc::new(Node { is_leaving, ..Node::default() });
            snapshot.nodes.insert((SourceId::Manifests, Name::from(name)), node);
            snapshot
        };
        let leaves =
            |snapshot: &Snapshot| [false, true].map(|follows_cluster| is_node_leaving(snapshot, follows_cluster));
        assert_eq!(leaves(&with("node-a", false)), [false, false]);
        assert_eq!(leaves(&with("node-a", true)), [true, true]);
        assert_eq!(leaves(&with("node-b", false)), [true, true], "others are known, and this one is not");
        assert_eq!(leaves(&empty(&[])), [false, true], "without a cluster, nobody has to know it");
        // As long as it is not known.
        assert_eq!(leaves(&empty(&[SourceId::Kubernetes])), [false, false]);
        let mut unread = with("node-b", false);
        let key = ObjectKey { kind: Kind::Node, namespace: Name::from(""), name: Name::from("node-a") };
        let gaps = Gaps { kept: [key].into(), ..Gaps::default() };
        unread.gaps.insert(SourceId::Manifests, Arc::new(gaps));
        assert_eq!(leaves(&unread), [false, false]);
    }

    #[test]
    fn a_reconciler_that_does_not_get_on_is_ill_after_its_first_load_only() {
        let start = Instant::now();
        let busy = |applied| View {
            progress: Progress { busy_since: Some(start), applied, ..Progress::default() },
            ..loaded()
        };
        let [soon, late] = [PATIENCE, PATIENCE + Duration::from_millis(1)].map(|after| start + after);
        assert_eq!(codes(&busy(Some(WALL)), soon), [200, 200, 200]);
        assert_eq!(codes(&busy(Some(WALL)), late), [503, 503, 503]);
        let first = View { is_programmed: false, ..busy(None) };
        assert_eq!(codes(&first, late), [503, 200, 503]);
    }

    #[test]
    fn what_is_missing_is_told_a_line_each() {
        let view = View { pending: vec![SourceId::Manifests, SourceId::Consul], ..View::default() };
        let expected = "manifests has not listed everything yet\nconsul has not listed everything yet\n\
                        the programs are not attached yet\n";
        assert_eq!(answer("/readyz", &view, Instant::now(), WALL).body, expected);
        let unplanned = View { is_attached: true, ..View::default() };
        assert_eq!(answer("/readyz", &unplanned, Instant::now(), WALL).body, "the first plan is not applied yet\n");
        assert_eq!(answer("/readyz", &loaded(), Instant::now(), WALL).body, "ready\n");
    }

    #[test]
    fn health_has_the_shape_of_kube_proxy() {
        let wall = WALL + Duration::from_secs(60);
        let healthy = answer("/healthz", &loaded(), Instant::now(), wall);
        assert_eq!(healthy.content_type, "application/json");
        let expected = concat!(
            r#"{"lastUpdated":"1970-01-01T00:01:00Z","currentTime":"1970-01-01T00:01:00Z","nodeEligible":true,"#,
            r#""healthy":true,"status":{"IPv4":{"lastUpdated":"1970-01-01T00:00:01.5Z","healthy":true},"#,
            r#""IPv6":{"lastUpdated":"1970-01-01T00:00:01.5Z","healthy":true}}}"#
        );
        assert_eq!(healthy.body, expected);
        let ill = answer("/healthz", &View::default(), Instant::now(), wall).body;
        assert!(
            ill.starts_with(r#"{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"1970-01-01T00:01:00Z""#),
            "{ill}"
        );
        let alive = answer("/livez", &loaded(), Instant::now(), wall).body;
        assert_eq!(alive, expected.replace(r#""nodeEligible":true,"#, ""));
    }

    #[test]
    fn an_unknown_path_tells_the_known_ones() {
        let answer = answer("/", &loaded(), Instant::now(), WALL);
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        assert!(answer.body.contains("/healthz /livez /readyz"), "{}", answer.body);
    }
}
