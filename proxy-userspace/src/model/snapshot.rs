//! All desired state at one moment.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::OrdMap;

use super::endpoint::Endpoints;
use super::name::Name;
use super::node::{Node, NodeFacts, ServiceCidr};
use super::service::{Service, ServiceKey, SourceId};
use super::update::{Kind, ObjectKey, ObjectProblem};

/// Which cluster-wide object: who listed it, and its name.
pub type ClusterKey = (SourceId, Name);

/// What the first list of a source leaves open, because it could not be read. It is known to later lists or not at all, so
/// only a start can open a gap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Gaps {
    /// Some part of the source could not be read at all.
    pub is_unread: bool,
    /// Objects that are there and could not be used.
    pub kept: BTreeSet<ObjectKey>,
}

impl Gaps {
    /// True if there may be objects of these kinds that are not known.
    fn may_lack<const N: usize>(&self, kinds: [Kind; N]) -> bool {
        let kept = |kind| {
            let first = ObjectKey { kind, namespace: Name::from(""), name: Name::from("") };
            self.kept.range(first..).next().is_some_and(|key| key.kind == kind)
        };
        self.is_unread || kinds.into_iter().any(kept)
    }
}

/// Changes of objects that have entered the model since the start, counted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Changes {
    /// Of services.
    pub services: u64,
    /// Of endpoints.
    pub endpoints: u64,
}

/// Desired state: immutable, cheap to clone; two of them are compared by pointer, in time proportional to what differs.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Services.
    pub services: OrdMap<ServiceKey, Arc<Service>>,
    /// Endpoints by the service they belong to, which need not exist.
    pub endpoints: OrdMap<ServiceKey, Arc<Endpoints>>,
    /// Nodes.
    pub nodes: OrdMap<ClusterKey, Arc<Node>>,
    /// Ranges of service addresses.
    pub service_cidrs: OrdMap<ClusterKey, Arc<ServiceCidr>>,
    /// What was read about this node.
    pub facts: Arc<NodeFacts>,
    /// Configured sources whose first list is not complete: what the kernel has of them is kept as it is.
    pub pending: Arc<[SourceId]>,
    /// What first lists leave open, by source.
    pub gaps: OrdMap<SourceId, Arc<Gaps>>,
    /// How much has changed until now.
    pub changes: Changes,
    /// What each source cannot use.
    pub problems: OrdMap<SourceId, Arc<[ObjectProblem]>>,
}

impl Snapshot {
    /// Nothing but facts; every one of `sources` still has to list.
    pub fn empty(facts: Arc<NodeFacts>, sources: impl IntoIterator<Item = SourceId>) -> Self {
        Self {
            services: OrdMap::new(),
            endpoints: OrdMap::new(),
            nodes: OrdMap::new(),
            service_cidrs: OrdMap::new(),
            facts,
            pending: sources.into_iter().collect(),
            gaps: OrdMap::new(),
            changes: Changes::default(),
            problems: OrdMap::new(),
        }
    }

    /// True if this source is configured and has not listed everything once.
    pub fn is_pending(&self, source: SourceId) -> bool {
        self.pending.contains(&source)
    }

    /// True if nobody knows whether this service is there, or whether it has endpoints: what the kernel has of it from an
    /// earlier run is kept as it is.
    pub fn is_open(&self, key: &ServiceKey) -> bool {
        let Some(gaps) = self.gaps.get(&key.source) else { return false };
        match self.services.contains_key(key) {
            false => gaps.is_unread || gaps.kept.contains(&ObjectKey::of_service(key)),
            true => gaps.may_lack([Kind::EndpointSlice, Kind::Endpoints]) && !self.endpoints.contains_key(key),
        }
    }

    /// True if what the sources say of nodes and prefixes is all there is.
    pub fn is_settled(&self) -> bool {
        self.pending.is_empty() && !self.gaps.values().any(|gaps| gaps.may_lack([Kind::Node, Kind::ServiceCidr]))
    }

    /// The Node object of this node; the first source that has one counts.
    pub fn own_node(&self) -> Option<&Arc<Node>> {
        SourceId::ALL.iter().find_map(|source| self.nodes.get(&(*source, self.facts.name.clone())))
    }
}
