//! All desired state at one moment.

use std::sync::Arc;

use imbl::OrdMap;

use super::endpoint::Endpoints;
use super::name::Name;
use super::node::{Node, NodeFacts, ServiceCidr};
use super::service::{Service, ServiceKey, SourceId};
use super::update::ObjectProblem;

/// Which cluster-wide object: who listed it, and its name.
pub type ClusterKey = (SourceId, Name);

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
            changes: Changes::default(),
            problems: OrdMap::new(),
        }
    }

    /// True if this source is configured and has not listed everything once.
    pub fn is_pending(&self, source: SourceId) -> bool {
        self.pending.contains(&source)
    }

    /// The Node object of this node; the first source that has one counts.
    pub fn own_node(&self) -> Option<&Arc<Node>> {
        SourceId::ALL.iter().find_map(|source| self.nodes.get(&(*source, self.facts.name.clone())))
    }
}
