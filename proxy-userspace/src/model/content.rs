//! Updates to snapshots, as a function of values.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::sync::Arc;

use super::endpoint::{EndpointGroup, Endpoints, GroupKind};
use super::name::Name;
use super::node::NodeFacts;
use super::service::{ServiceKey, SourceId};
use super::snapshot::{Gaps, Snapshot};
use super::trigger::{Trigger, Triggers};
use super::update::{Event, Kind, Object, ObjectKey, SourceSpec, Update};

/// The newest snapshot, and how far each source is with its lists.
#[derive(Debug)]
pub struct Content {
    visible: Snapshot,
    sources: BTreeMap<SourceId, SourceState>,
    triggers: Triggers,
}

#[derive(Debug)]
struct SourceState {
    kinds: &'static [Kind],
    /// Kinds that were listed completely at least once.
    listed: BTreeSet<Kind>,
    /// Objects seen so far in each list under way.
    listing: BTreeMap<Kind, BTreeSet<ObjectKey>>,
    /// Everything of the source, until all of its kinds have been listed.
    staged: Option<Snapshot>,
    /// To which service each listed group of endpoints belongs.
    groups: BTreeMap<ObjectKey, Name>,
    /// What the first lists could not read.
    gaps: Gaps,
}

impl SourceState {
    /// Follows what the first lists leave open. True if that has changed.
    fn note_gaps(&mut self, event: &Event) -> bool {
        let kept = &mut self.gaps.kept;
        match event {
            Event::InitKeep(key) if !self.listed.contains(&key.kind) => kept.insert(key.clone()),
            Event::InitApply(object) | Event::Apply(object) => !kept.is_empty() && kept.remove(&object.key()),
            Event::Delete(key) => kept.remove(key),
            Event::InitDone(kind) => {
                let count = kept.len();
                let seen = self.listing.get(kind);
                kept.retain(|key| key.kind != *kind || seen.is_some_and(|seen| seen.contains(key)));
                kept.len() != count
            }
            Event::Unread(is_unread) => std::mem::replace(&mut self.gaps.is_unread, *is_unread) != *is_unread,
            _ => false,
        }
    }
}

impl Content {
    /// No objects; each of `sources` still has to list.
    pub fn new(facts: Arc<NodeFacts>, sources: &[SourceSpec]) -> Self {
        let visible = Snapshot::empty(facts, sources.iter().map(|spec| spec.id));
        let state = |spec: &SourceSpec| SourceState {
            kinds: spec.kinds,
            listed: BTreeSet::new(),
            listing: BTreeMap::new(),
            staged: Some(Snapshot::empty(visible.facts.clone(), [])),
            groups: BTreeMap::new(),
            gaps: Gaps::default(),
        };
        let sources = sources.iter().map(|spec| (spec.id, state(spec))).collect();
        Self { visible, sources, triggers: Triggers::default() }
    }

    /// When the changes happened that nobody has taken yet.
    pub fn triggers(&self) -> &Triggers {
        &self.triggers
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        &self.visible
    }

    /// Replaces what is known about this node. True if that changes the snapshot.
    pub fn set_facts(&mut self, facts: Arc<NodeFacts>) -> bool {
        let changed = self.visible.facts != facts;
        self.visible.facts = facts;
        changed
    }

    /// Takes the steps of a source. True if they change the snapshot. A source that is not configured has no say.
    pub fn apply(&mut self, update: Update) -> bool {
        let Update { source, events } = update;
        events.into_iter().fold(false, |changed, event| self.apply_event(source, event) | changed)
    }

    fn apply_event(&mut self, id: SourceId, event: Event) -> bool {
        let Some(source) = self.sources.get_mut(&id) else { return false };
        if let Event::Problems(problems) = event {
            let known = self.visible.problems.insert(id, problems.clone());
            return known.unwrap_or_default() != problems;
        }
        let gaps_differ = source.note_gaps(&event);
        let (kind, trigger) = (event.kind(), trigger(id, &event));
        let target = source.staged.as_mut().unwrap_or(&mut self.visible);
        let changed = step(target, &mut source.listed, &mut source.listing, &mut source.groups, id, event);
        if source.staged.is_some() {
            return self.enter_when_listed(id);
        }
        if changed {
            self.count(kind, trigger);
        }
        if gaps_differ {
            self.show_gaps(id);
        }
        changed | gaps_differ
    }

    /// Counts a change of an object; remembers when it happened.
    fn count(&mut self, kind: Option<Kind>, trigger: Option<(ServiceKey, NonZeroU64)>) {
        let changes = &mut self.visible.changes;
        match kind {
            Some(Kind::Service) => changes.services += 1,
            Some(Kind::EndpointSlice | Kind::Endpoints) => changes.endpoints += 1,
            _ => {}
        }
        if let Some((service, at)) = trigger {
            self.triggers.push(Trigger { number: changes.endpoints, service, at });
        }
    }

    /// Makes a source's objects visible if all of its kinds have been listed. True if that happened.
    fn enter_when_listed(&mut self, id: SourceId) -> bool {
        let Some(source) = self.sources.get_mut(&id) else { return false };
        if !source.kinds.iter().all(|kind| source.listed.contains(kind)) {
            return false;
        }
        let Some(staged) = source.staged.take() else { return false };
        self.visible.changes.services += staged.services.len() as u64;
        self.visible.changes.endpoints += source.groups.len() as u64;
        self.visible.services.extend(staged.services);
        self.visible.endpoints.extend(staged.endpoints);
        self.visible.nodes.extend(staged.nodes);
        self.visible.service_cidrs.extend(staged.service_cidrs);
        self.visible.pending = self.visible.pending.iter().copied().filter(|pending| *pending != id).collect();
        self.show_gaps(id);
        true
    }

    fn show_gaps(&mut self, id: SourceId) {
        match self.sources.get(&id).map(|source| &source.gaps) {
            Some(gaps) if *gaps != Gaps::default() => _ = self.visible.gaps.insert(id, Arc::new(gaps.clone())),
            _ => _ = self.visible.gaps.remove(&id),
        }
    }
}

/// Whose endpoints an event changes, and when the change happened that led to it. Nobody tells that of one that is gone.
fn trigger(source: SourceId, event: &Event) -> Option<(ServiceKey, NonZeroU64)> {
    let (Event::Apply(object) | Event::InitApply(object)) = event else { return None };
    let Object::Endpoints { namespace, service, triggered, .. } = object else { return None };
    let key = ServiceKey { source, namespace: namespace.clone(), name: service.clone() };
    Some((key, (*triggered)?))
}

/// One step of `source` on `target`. True if it changed an object.
fn step(
    target: &mut Snapshot,
    listed: &mut BTreeSet<Kind>,
    listing: &mut BTreeMap<Kind, BTreeSet<ObjectKey>>,
    groups: &mut BTreeMap<ObjectKey, Name>,
    source: SourceId,
    event: Event,
) -> bool {
    match event {
        Event::Init(kind) => {
            listing.insert(kind, BTreeSet::new());
            false
        }
        Event::InitApply(object) | Event::Apply(object) => {
            let key = object.key();
            if let Some(seen) = listing.get_mut(&key.kind) {
                seen.insert(key);
            }
            put(target, groups, source, object)
        }
        Event::InitKeep(key) => {
            if let Some(seen) = listing.get_mut(&key.kind) {
                seen.insert(key);
            }
            false
        }
        Event::Delete(key) => {
            if let Some(seen) = listing.get_mut(&key.kind) {
                seen.remove(&key);
            }
            remove(target, groups, source, &key)
        }
        Event::InitDone(kind) => {
            let Some(seen) = listing.remove(&kind) else { return false };
            listed.insert(kind);
            let stale: Vec<_> = keys(target, groups, source, kind).filter(|key| !seen.contains(key)).collect();
            let mut changed = false;
            for key in &stale {
                changed |= remove(target, groups, source, key);
            }
            changed
        }
        Event::Unread(_) | Event::Problems(_) => false,
    }
}

/// Adds or replaces an object. True unless the same was there.
fn put(target: &mut Snapshot, groups: &mut BTreeMap<ObjectKey, Name>, source: SourceId, object: Object) -> bool {
    match object {
        Object::Service { namespace, name, service } => {
            insert_if_new(&mut target.services, ServiceKey { source, namespace, name }, service)
        }
        Object::Node { name, node } => insert_if_new(&mut target.nodes, (source, name), node),
        Object::ServiceCidr { name, cidr } => insert_if_new(&mut target.service_cidrs, (source, name), cidr),
        Object::Endpoints { namespace, service, group, .. } => {
            put_group(target, groups, source, namespace, service, group)
        }
    }
}

fn insert_if_new<K: Ord + Clone, V: PartialEq>(map: &mut imbl::OrdMap<K, Arc<V>>, key: K, value: Arc<V>) -> bool {
    if map.get(&key).is_some_and(|known| *known == value) {
        return false;
    }
    map.insert(key, value);
    true
}

fn put_group(
    target: &mut Snapshot,
    groups: &mut BTreeMap<ObjectKey, Name>,
    source: SourceId,
    namespace: Name,
    service: Name,
    group: Arc<EndpointGroup>,
) -> bool {
    let object = group_key(group.kind, &namespace, &group.name);
    let moved = groups.get(&object).is_some_and(|known| *known != service);
    let left = moved && remove(target, groups, source, &object);
    let key = ServiceKey { source, namespace, name: service.clone() };
    let known = target.endpoints.get(&key).cloned().unwrap_or_default();
    if known.get(group.kind, &group.name).is_some_and(|known| *known == group) {
        return left;
    }
    groups.insert(object, service);
    target.endpoints.insert(key, Arc::new(known.with(group)));
    true
}

/// Removes an object. True if it was there.
fn remove(target: &mut Snapshot, groups: &mut BTreeMap<ObjectKey, Name>, source: SourceId, object: &ObjectKey) -> bool {
    let (namespace, name) = (object.namespace.clone(), object.name.clone());
    match object.kind {
        Kind::Service => target.services.remove(&ServiceKey { source, namespace, name }).is_some(),
        Kind::Node => target.nodes.remove(&(source, name)).is_some(),
        Kind::ServiceCidr => target.service_cidrs.remove(&(source, name)).is_some(),
        Kind::EndpointSlice => remove_group(target, groups, source, object, GroupKind::Slice),
        Kind::Endpoints => remove_group(target, groups, source, object, GroupKind::Legacy),
    }
}

fn remove_group(
    target: &mut Snapshot,
    groups: &mut BTreeMap<ObjectKey, Name>,
    source: SourceId,
    object: &ObjectKey,
    kind: GroupKind,
) -> bool {
    let Some(service) = groups.remove(object) else { return false };
    let key = ServiceKey { source, namespace: object.namespace.clone(), name: service };
    let rest = target.endpoints.get(&key).map(|known| known.without(kind, &object.name));
    match rest.filter(|rest: &Endpoints| !rest.is_empty()) {
        Some(rest) => target.endpoints.insert(key, Arc::new(rest)),
        None => target.endpoints.remove(&key),
    };
    true
}

fn group_key(kind: GroupKind, namespace: &Name, name: &Name) -> ObjectKey {
    let kind = match kind {
        GroupKind::Slice => Kind::EndpointSlice,
        GroupKind::Legacy => Kind::Endpoints,
    };
    ObjectKey { kind, namespace: namespace.clone(), name: name.clone() }
}

/// Keys of all objects of one kind that `source` has in `target`.
fn keys<'a>(
    target: &'a Snapshot,
    groups: &'a BTreeMap<ObjectKey, Name>,
    source: SourceId,
    kind: Kind,
) -> Box<dyn Iterator<Item = ObjectKey> + 'a> {
    let cluster = move |name: &Name| ObjectKey { kind, namespace: Name::from(""), name: name.clone() };
    match kind {
        Kind::Service => {
            let first = ServiceKey { source, namespace: Name::from(""), name: Name::from("") };
            let own = target.services.range(first..).take_while(move |(key, _)| key.source == source);
            Box::new(own.map(move |(key, _)| ObjectKey {
                kind,
                namespace: key.namespace.clone(),
                name: key.name.clone(),
            }))
        }
        Kind::Node => {
            let own = target.nodes.keys().filter(move |key| key.0 == source);
            Box::new(own.map(move |key| cluster(&key.1)))
        }
        Kind::ServiceCidr => {
            let own = target.service_cidrs.keys().filter(move |key| key.0 == source);
            Box::new(own.map(move |key| cluster(&key.1)))
        }
        Kind::EndpointSlice | Kind::Endpoints => Box::new(groups.keys().filter(move |key| key.kind == kind).cloned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Conditions, Endpoint, EndpointGroup, EndpointPort, EndpointSubset, Node, Protocol, Service};
    use proxy_common::addr::{Addr, Port};

    const BOTH: &[Kind] = &[Kind::Service, Kind::EndpointSlice];

    fn content(ids: &[SourceId]) -> Content {
        let specs: Vec<_> = ids.iter().map(|id| SourceSpec { id: *id, kinds: BOTH }).collect();
        Content::new(Arc::new(NodeFacts::named(Name::from("node-a"))), &specs)
    }

    fn service(name: &str, seconds: u32) -> Object {
        let service = Service {
            created: None,
            cluster_ips: Default::default(),
            ports: Box::default(),
            external_ips: Box::default(),
            load_balancer_ips: Box::default(),
            internal_policy: Default::default(),
            external_policy: Default::default(),
            affinity: std::num::NonZeroU32::new(seconds),
            health_check: None,
            source_ranges: Default::default(),
            stale: None,
        };
        Object::Service { namespace: Name::from("default"), name: Name::from(name), service: Arc::new(service) }
    }

    fn slice(name: &str, service: &str, port: u16) -> Object {
        let endpoint = Endpoint {
            addr: Addr::UNSPECIFIED_V4,
            node: None,
            hints: None,
            conditions: Conditions::new(None, None, None),
        };
        let port = EndpointPort { name: Name::from(""), protocol: Protocol::Tcp, port: Port(port) };
        let subset = EndpointSubset { ports: Box::new([port]), endpoints: Box::new([endpoint]) };
        let group = EndpointGroup { kind: GroupKind::Slice, name: Name::from(name), subsets: Box::new([subset]) };
        Object::Endpoints {
            namespace: Name::from("default"),
            service: Name::from(service),
            group: Arc::new(group),
            triggered: None,
        }
    }

    fn key(kind: Kind, name: &str) -> ObjectKey {
        ObjectKey { kind, namespace: Name::from("default"), name: Name::from(name) }
    }

    fn send(content: &mut Content, source: SourceId, events: impl IntoIterator<Item = Event>) -> bool {
        content.apply(Update { source, events: events.into_iter().collect() })
    }

    fn list(content: &mut Content, source: SourceId, kind: Kind, objects: impl IntoIterator<Item = Object>) -> bool {
        let objects = objects.into_iter().map(Event::InitApply);
        send(content, source, [Event::Init(kind)].into_iter().chain(objects).chain([Event::InitDone(kind)]))
    }

    fn services(content: &Content) -> Vec<String> {
        content.snapshot().services.keys().map(ToString::to_string).collect()
    }

    fn slices_of(content: &Content, source: SourceId, service: &str) -> Vec<String> {
        let key = ServiceKey { source, namespace: Name::from("default"), name: Name::from(service) };
        let endpoints = content.snapshot().endpoints.get(&key);
        endpoints.iter().flat_map(|endpoints| endpoints.groups()).map(|group| group.name.to_string()).collect()
    }

    #[test]
    fn a_source_is_visible_when_all_its_kinds_are_listed_and_others_do_not_wait() {
        let (kubernetes, manifests) = (SourceId::Kubernetes, SourceId::Manifests);
        let mut content = content(&[kubernetes, manifests]);
        assert!(!list(&mut content, kubernetes, Kind::Service, [service("k", 1)]));
        assert!(!list(&mut content, manifests, Kind::Service, [service("m", 1)]));
        assert!(services(&content).is_empty());
        assert!(list(&mut content, manifests, Kind::EndpointSlice, [slice("m-1", "m", 1)]));
        assert_eq!(services(&content), ["manifests/default/m"]);
        assert_eq!(slices_of(&content, manifests, "m"), ["m-1"]);
        assert_eq!(*content.snapshot().pending, [kubernetes]);
        assert!(list(&mut content, kubernetes, Kind::EndpointSlice, []));
        assert_eq!(services(&content), ["kubernetes/default/k", "manifests/default/m"]);
        assert!(content.snapshot().pending.is_empty());
    }

    #[test]
    fn a_list_that_begins_anew_before_it_ended_counts_from_the_second_beginning() {
        let mut content = content(&[SourceId::Kubernetes]);
        list(&mut content, SourceId::Kubernetes, Kind::EndpointSlice, []);
        send(&mut content, SourceId::Kubernetes, [Event::Init(Kind::Service), Event::InitApply(service("gone", 1))]);
        assert!(list(&mut content, SourceId::Kubernetes, Kind::Service, [service("stays", 1)]));
        assert_eq!(services(&content), ["kubernetes/default/stays"]);
    }

    /// A slice that says when it changed.
    fn triggered(name: &str, service: &str, port: u16, at: u64) -> Event {
        let mut object = slice(name, service, port);
        if let Object::Endpoints { triggered, .. } = &mut object {
            *triggered = NonZeroU64::new(at);
        }
        Event::Apply(object)
    }

    #[test]
    fn changes_are_counted_and_the_earliest_of_a_service_tells_when() {
        let mut content = listed();
        let first = content.snapshot().changes;
        assert_eq!((first.services, first.endpoints), (2, 2), "those of the first list");
        let events = [
            triggered("a-1", "a", 10, 500),
            triggered("a-2", "a", 11, 400),
            triggered("a-2", "a", 11, 300),
            triggered("b-1", "b", 12, 600),
            Event::Delete(key(Kind::EndpointSlice, "b-1")),
            triggered("a-1", "a", 13, 700),
        ];
        send(&mut content, SourceId::Kubernetes, events);
        let changes = content.snapshot().changes;
        // One told nothing new.
        assert_eq!((changes.services, changes.endpoints), (2, 2 + 5));
        let taken = |number| -> Vec<_> {
            let earliest = content.triggers().take(number);
            earliest.into_iter().map(|(service, at)| (service.name.to_string(), at.get())).collect()
        };
        assert_eq!(taken(2 + 4), [("a".to_owned(), 400), ("b".to_owned(), 600)]);
        assert_eq!(taken(2 + 5), [("a".to_owned(), 700)]);
        assert_eq!(taken(u64::MAX), []);
    }

    fn listed() -> Content {
        let mut content = content(&[SourceId::Kubernetes]);
        list(&mut content, SourceId::Kubernetes, Kind::Service, [service("a", 1), service("b", 1)]);
        list(&mut content, SourceId::Kubernetes, Kind::EndpointSlice, [slice("a-1", "a", 1), slice("a-2", "a", 2)]);
        content
    }

    #[test]
    fn a_new_list_prunes_at_its_end_and_only_its_own_kind() {
        let mut content = listed();
        send(&mut content, SourceId::Kubernetes, [Event::Init(Kind::Service), Event::InitApply(service("b", 1))]);
        assert_eq!(services(&content), ["kubernetes/default/a", "kubernetes/default/b"]);
        assert!(send(&mut content, SourceId::Kubernetes, [Event::InitDone(Kind::Service)]));
        assert_eq!(services(&content), ["kubernetes/default/b"]);
        assert_eq!(slices_of(&content, SourceId::Kubernetes, "a"), ["a-1", "a-2"]);
        assert!(list(&mut content, SourceId::Kubernetes, Kind::EndpointSlice, [slice("a-2", "a", 2)]));
        assert_eq!(slices_of(&content, SourceId::Kubernetes, "a"), ["a-2"]);
    }

    #[test]
    fn an_end_without_a_beginning_prunes_nothing() {
        let mut content = listed();
        assert!(!send(&mut content, SourceId::Kubernetes, [Event::InitDone(Kind::Service)]));
        assert_eq!(services(&content).len(), 2);
    }

    #[test]
    fn an_object_that_is_deleted_while_a_list_is_under_way_is_gone() {
        let mut content = listed();
        let events = [
            Event::Init(Kind::Service),
            Event::InitApply(service("a", 1)),
            Event::InitApply(service("b", 1)),
            Event::Delete(key(Kind::Service, "a")),
            Event::InitDone(Kind::Service),
        ];
        assert!(send(&mut content, SourceId::Kubernetes, events));
        assert_eq!(services(&content), ["kubernetes/default/b"]);
    }

    fn is_open(content: &Content, service: &str) -> bool {
        let (namespace, name) = (Name::from("default"), Name::from(service));
        content.snapshot().is_open(&ServiceKey { source: SourceId::Kubernetes, namespace, name })
    }

    #[test]
    fn what_the_first_list_could_not_read_is_open_until_it_is_known() {
        let mut content = content(&[SourceId::Kubernetes]);
        let kept = Event::InitKeep(key(Kind::Service, "kept"));
        let services = [Event::Init(Kind::Service), Event::InitApply(service("a", 1)), kept];
        send(&mut content, SourceId::Kubernetes, services.into_iter().chain([Event::InitDone(Kind::Service)]));
        list(&mut content, SourceId::Kubernetes, Kind::EndpointSlice, []);
        let open = |content: &Content| ["a", "kept", "gone"].map(|name| is_open(content, name));
        assert_eq!(open(&content), [false, true, false]);
        assert!(content.snapshot().is_settled());
        // Listed again: still there, still of no use.
        let again = [Event::Init(Kind::Service), Event::InitApply(service("a", 1))];
        let again =
            again.into_iter().chain([Event::InitKeep(key(Kind::Service, "kept")), Event::InitDone(Kind::Service)]);
        send(&mut content, SourceId::Kubernetes, again);
        assert_eq!(open(&content), [false, true, false]);
        assert!(send(&mut content, SourceId::Kubernetes, [Event::Delete(key(Kind::Service, "kept"))]));
        assert_eq!(open(&content), [false; 3]);
    }

    #[test]
    fn endpoints_that_the_first_list_could_not_read_leave_open_who_has_none() {
        let mut content = content(&[SourceId::Kubernetes]);
        list(&mut content, SourceId::Kubernetes, Kind::Service, [service("a", 1), service("b", 1)]);
        let slices = [Event::Init(Kind::EndpointSlice), Event::InitApply(slice("a-1", "a", 1))];
        let kept = Event::InitKeep(key(Kind::EndpointSlice, "b-1"));
        send(
            &mut content,
            SourceId::Kubernetes,
            slices.into_iter().chain([kept, Event::InitDone(Kind::EndpointSlice)]),
        );
        assert_eq!(["a", "b", "gone"].map(|name| is_open(&content, name)), [false, true, false]);
        send(&mut content, SourceId::Kubernetes, [Event::Apply(slice("b-1", "b", 1))]);
        assert!(!is_open(&content, "b"));
    }

    #[test]
    fn a_source_with_a_part_that_cannot_be_read_leaves_open_what_it_does_not_list() {
        let mut content = content(&[SourceId::Kubernetes]);
        send(&mut content, SourceId::Kubernetes, [Event::Unread(true)]);
        list(&mut content, SourceId::Kubernetes, Kind::Service, [service("a", 1), service("b", 1)]);
        list(&mut content, SourceId::Kubernetes, Kind::EndpointSlice, [slice("a-1", "a", 1)]);
        assert_eq!(["a", "b", "gone"].map(|name| is_open(&content, name)), [false, true, true]);
        assert!(!content.snapshot().is_settled());
        assert!(send(&mut content, SourceId::Kubernetes, [Event::Unread(false)]));
        assert!(!is_open(&content, "gone") && content.snapshot().is_settled());
    }

    #[test]
    fn what_says_the_same_changes_nothing_and_keeps_its_place_in_memory() {
        let mut content = listed();
        let before = content.snapshot().clone();
        let same = [Event::Apply(service("a", 1)), Event::Apply(slice("a-1", "a", 1))];
        assert!(!send(&mut content, SourceId::Kubernetes, same));
        assert!(!list(&mut content, SourceId::Kubernetes, Kind::Service, [service("a", 1), service("b", 1)]));
        assert!(before.services.ptr_eq(&content.snapshot().services));
        assert!(before.endpoints.ptr_eq(&content.snapshot().endpoints));
        assert!(send(&mut content, SourceId::Kubernetes, [Event::Apply(service("a", 2))]));
    }

    #[test]
    fn a_slice_that_moves_to_another_service_leaves_the_first() {
        let mut content = listed();
        assert!(send(&mut content, SourceId::Kubernetes, [Event::Apply(slice("a-1", "b", 1))]));
        assert_eq!(slices_of(&content, SourceId::Kubernetes, "a"), ["a-2"]);
        assert_eq!(slices_of(&content, SourceId::Kubernetes, "b"), ["a-1"]);
        assert!(send(&mut content, SourceId::Kubernetes, [Event::Delete(key(Kind::EndpointSlice, "a-1"))]));
        assert!(slices_of(&content, SourceId::Kubernetes, "b").is_empty());
    }

    #[test]
    fn a_source_that_is_not_configured_has_no_say() {
        let mut content = content(&[SourceId::Kubernetes]);
        assert!(!list(&mut content, SourceId::Consul, Kind::Service, [service("a", 1)]));
        assert!(services(&content).is_empty());
    }

    #[test]
    fn the_own_node_of_the_first_source_counts() {
        let mut content = content(&[SourceId::Kubernetes, SourceId::Manifests]);
        for (source, zone) in [(SourceId::Manifests, "m"), (SourceId::Kubernetes, "k")] {
            BOTH.iter().for_each(|kind| _ = list(&mut content, source, *kind, []));
            let node = Arc::new(Node { zone: Some(Name::from(zone)), ..Node::default() });
            send(&mut content, source, [Event::Apply(Object::Node { name: Name::from("node-a"), node })]);
            let own = content.snapshot().own_node().and_then(|node| node.zone.clone());
            assert_eq!(own, Some(Name::from(zone)));
        }
    }
}
