//! The newest changes of what sources want, in words: services that came and went, endpoints that came up and went down.
//!
//! Two snapshots are compared by pointer: the work follows the change. Many at once, as a first list, are one entry.
//! May touch: nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use imbl::ordmap::DiffItem;
use jiff::Timestamp;
use proxy_common::addr::Addr;
use serde::Serialize;

use crate::drain::Drain;
use crate::model::{Endpoints, Reader, ServiceKey, Snapshot};

/// How many are kept.
const KEPT: usize = 200;
/// More at once are told by their number.
const SINGLE: usize = 50;

/// A change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// When it entered the model, as RFC 3339.
    pub at: String,
    /// Which kind: `added`, `removed`, `changed`, `up`, `down`, `many`.
    pub kind: &'static str,
    /// The service; empty for many.
    pub service: String,
    /// What changed, in words.
    pub what: String,
}

/// The newest changes. Cheap to clone: clones share them.
#[derive(Clone, Debug, Default)]
pub struct Changes(Arc<Mutex<VecDeque<Change>>>);

impl Changes {
    /// All that are kept, the newest first.
    pub fn newest(&self) -> Vec<Change> {
        self.0.lock().expect("nobody panics with the lock").iter().cloned().collect()
    }

    fn note(&self, changes: Vec<Change>) {
        let mut kept = self.0.lock().expect("nobody panics with the lock");
        changes.into_iter().for_each(|change| kept.push_front(change));
        kept.truncate(KEPT);
    }

    /// Follows the snapshots until the drain.
    pub async fn follow(self, mut snapshots: Reader, mut drain: Drain) {
        let mut known = snapshots.borrow_and_update().clone();
        loop {
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { return },
                () = drain.wait() => return,
            }
            let next = snapshots.borrow_and_update().clone();
            let now = Timestamp::try_from(SystemTime::now()).map_or_else(|_| String::new(), |now| format!("{now:.0}"));
            self.note(compare(&known, &next, &now));
            known = next;
        }
    }
}

/// What differs, in the order of services.
fn compare(old: &Snapshot, new: &Snapshot, at: &str) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut note = |kind, service: &ServiceKey, what: String| {
        changes.push(Change { at: at.to_owned(), kind, service: service.to_string(), what });
    };
    for item in old.services.diff(&new.services) {
        match item {
            DiffItem::Add(key, service) => note("added", key, count(service.ports.len(), "port")),
            DiffItem::Remove(key, _) => note("removed", key, String::new()),
            DiffItem::Update { old: (key, before), new: (_, after) } if before != after => {
                note("changed", key, differences(before, after));
            }
            DiffItem::Update { .. } => {}
        }
    }
    for item in old.endpoints.diff(&new.endpoints) {
        let (key, before, after) = match item {
            DiffItem::Add(key, after) => (key, None, Some(after)),
            DiffItem::Remove(key, before) => (key, Some(before), None),
            DiffItem::Update { old: (key, before), new: (_, after) } => (key, Some(before), Some(after)),
        };
        let [before, after] = [before, after].map(|endpoints| endpoints.map(ready).unwrap_or_default());
        for (kind, addresses) in [("up", &after - &before), ("down", &before - &after)] {
            if !addresses.is_empty() {
                note(kind, key, addresses_text(&addresses, after.len()));
            }
        }
    }
    if changes.len() > SINGLE { vec![summary(&changes, at)] } else { changes }
}

/// Addresses of endpoints that get new connections.
fn ready(endpoints: &Arc<Endpoints>) -> BTreeSet<Addr> {
    let subsets = endpoints.groups().iter().flat_map(|group| group.subsets.iter());
    let all = subsets.flat_map(|subset| subset.endpoints.iter());
    all.filter(|endpoint| endpoint.conditions.is_ready()).map(|endpoint| endpoint.addr).collect()
}

fn addresses_text(addresses: &BTreeSet<Addr>, left: usize) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<_> = addresses.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = match addresses.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}; {left} ready", shown.join(", "))
}

fn differences(before: &crate::model::Service, after: &crate::model::Service) -> String {
    let parts = [
        (before.cluster_ips != after.cluster_ips, "ClusterIP"),
        (before.ports != after.ports, "ports"),
        (before.external_ips != after.external_ips, "externalIPs"),
        (before.load_balancer_ips != after.load_balancer_ips, "load-balancer addresses"),
        (before.internal_policy != after.internal_policy, "internalTrafficPolicy"),
        (before.external_policy != after.external_policy, "externalTrafficPolicy"),
        (before.affinity != after.affinity, "affinity"),
        (before.health_check != after.health_check, "healthCheckNodePort"),
        (before.source_ranges != after.source_ranges, "source ranges"),
        (before.stale != after.stale, "stale connections"),
    ];
    let parts: Vec<_> = parts.into_iter().filter(|(differs, _)| *differs).map(|(_, name)| name).collect();
    parts.join(", ")
}

fn summary(changes: &[Change], at: &str) -> Change {
    let mut counts = BTreeMap::new();
    changes.iter().for_each(|change| *counts.entry(change.kind).or_insert(0) += 1);
    let words = [
        ("added", "services added"),
        ("removed", "services removed"),
        ("changed", "services changed"),
        ("up", "services with endpoints that came up"),
        ("down", "services with endpoints that went down"),
    ];
    let parts = words.into_iter().filter_map(|(kind, words)| counts.get(kind).map(|count| format!("{count} {words}")));
    Change { at: at.to_owned(), kind: "many", service: String::new(), what: parts.collect::<Vec<_>>().join(", ") }
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        ByFamily, Conditions, Endpoint, EndpointGroup, EndpointSubset, GroupKind, Name, NodeFacts, Service, SourceId,
        TrafficPolicy,
    };

    fn key(name: &str) -> ServiceKey {
        ServiceKey { source: SourceId::Manifests, namespace: Name::from("default"), name: Name::from(name) }
    }

    fn service() -> Service {
        Service {
            created: None,
            cluster_ips: ByFamily::default(),
            ports: Box::default(),
            external_ips: Box::default(),
            load_balancer_ips: Box::default(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity: None,
            health_check: None,
            source_ranges: ByFamily::default(),
            stale: None,
        }
    }

    fn endpoints(addresses: &[(&str, bool)]) -> Arc<Endpoints> {
        let endpoint = |&(addr, is_ready): &(&str, bool)| Endpoint {
            addr: Addr::from(addr.parse::<std::net::IpAddr>().unwrap()),
            node: None,
            hints: None,
            conditions: Conditions::new(Some(is_ready), None, None),
        };
        let subset = EndpointSubset { ports: Box::default(), endpoints: addresses.iter().map(endpoint).collect() };
        let group = EndpointGroup { kind: GroupKind::Slice, name: Name::from("a"), subsets: [subset].into() };
        Arc::new(Endpoints::default().with(Arc::new(group)))
    }

    fn empty() -> Snapshot {
        Snapshot::empty(Arc::new(NodeFacts::named(Name::from("n"))), [])
    }

    /// Kind and words of what differs.
    fn told(old: &Snapshot, new: &Snapshot) -> Vec<(&'static str, String)> {
        compare(old, new, "now")
            .into_iter()
            .map(|change| (change.kind, format!("{} {}", change.service, change.what)))
            .collect()
    }

    #[test]
    fn services_and_endpoints_that_come_and_go_are_told() {
        let mut with = empty();
        with.services.insert(key("web"), Arc::new(service()));
        with.endpoints.insert(key("web"), endpoints(&[("10.0.0.1", true), ("10.0.0.2", false)]));
        let web = "manifests/default/web";
        let wanted = [("added", format!("{web} 0 ports")), ("up", format!("{web} 10.0.0.1; 1 ready"))];
        assert_eq!(told(&empty(), &with), wanted);
        let wanted = [("removed", format!("{web} ")), ("down", format!("{web} 10.0.0.1; 0 ready"))];
        assert_eq!(told(&with, &empty()), wanted);
        let mut next = with.clone();
        let moved = Service { internal_policy: TrafficPolicy::Local, ..service() };
        next.services.insert(key("web"), Arc::new(moved));
        next.endpoints.insert(key("web"), endpoints(&[("10.0.0.2", true)]));
        let wanted = [
            ("changed", format!("{web} internalTrafficPolicy")),
            ("up", format!("{web} 10.0.0.2; 1 ready")),
            ("down", format!("{web} 10.0.0.1; 1 ready")),
        ];
        assert_eq!(told(&with, &next), wanted);
        assert_eq!(told(&next, &next), []);
    }

    #[test]
    fn many_at_once_are_one_and_few_are_kept() {
        let mut many = empty();
        (0..1000).for_each(|number| drop(many.services.insert(key(&number.to_string()), Arc::new(service()))));
        assert_eq!(told(&empty(), &many), [("many", " 1000 services added".to_owned())]);
        let changes = Changes::default();
        let change =
            |what: usize| Change { at: String::new(), kind: "up", service: String::new(), what: what.to_string() };
        (0..KEPT + 10).for_each(|number| changes.note(vec![change(number)]));
        let newest = changes.newest();
        assert_eq!((newest.len(), newest[0].what.as_str()), (KEPT, "209"));
    }
}
