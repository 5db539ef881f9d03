//! The contract every source speaks: Init, InitApply, InitKeep, InitDone, Apply, Delete, for each kind of object it lists.
//!
//! A source's objects become visible when every kind it announced has been listed once. Listing again (Init) prunes
//! what was not listed this time, at InitDone and not before. No deadline ever deletes anything. What the first list could
//! not read (InitKeep, Unread) is not taken for absent: see [`Gaps`](super::snapshot::Gaps).

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;

use super::endpoint::{EndpointGroup, GroupKind};
use super::name::Name;
use super::node::{Node, ServiceCidr};
use super::service::{Service, ServiceKey, SourceId};

/// A kind of object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// Services.
    Service,
    /// EndpointSlices.
    EndpointSlice,
    /// Legacy Endpoints.
    Endpoints,
    /// Nodes.
    Node,
    /// ServiceCIDRs.
    ServiceCidr,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Service, Self::EndpointSlice, Self::Endpoints, Self::Node, Self::ServiceCidr];

    /// The kind as Kubernetes spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Endpoints => "Endpoints",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which object of a source. Cluster-wide kinds have an empty namespace.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ObjectKey {
    /// What it is.
    pub kind: Kind,
    /// Where it lives.
    pub namespace: Name,
    /// Its name.
    pub name: Name,
}

impl ObjectKey {
    /// The key of a service.
    pub fn of_service(service: &ServiceKey) -> Self {
        Self { kind: Kind::Service, namespace: service.namespace.clone(), name: service.name.clone() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.as_str().is_empty() {
            return write!(f, "{} {}", self.kind, self.name);
        }
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// An object that counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Object {
    /// A service.
    Service {
        /// Its namespace.
        namespace: Name,
        /// Its name.
        name: Name,
        /// What it says.
        service: Arc<Service>,
    },
    /// Endpoints of a service.
    Endpoints {
        /// Namespace of the object and of the service.
        namespace: Name,
        /// Name of the service.
        service: Name,
        /// What the object says.
        group: Arc<EndpointGroup>,
        /// When the change happened that led to this, in nanoseconds since 1970, if the object tells. Passes through the
        /// model and is not kept.
        triggered: Option<NonZeroU64>,
    },
    /// A node.
    Node {
        /// Its name.
        name: Name,
        /// What it says.
        node: Arc<Node>,
    },
    /// A range of service addresses.
    ServiceCidr {
        /// Its name.
        name: Name,
        /// What it says.
        cidr: Arc<ServiceCidr>,
    },
}

impl Object {
    /// Which object this is.
    pub fn key(&self) -> ObjectKey {
        let (namespace, name) = match self {
            Self::Service { namespace, name, .. } => (namespace.clone(), name.clone()),
            Self::Endpoints { namespace, group, .. } => (namespace.clone(), group.name.clone()),
            Self::Node { name, .. } | Self::ServiceCidr { name, .. } => (Name::from(""), name.clone()),
        };
        ObjectKey { kind: self.kind(), namespace, name }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service { .. } => Kind::Service,
            Self::Endpoints { group, .. } => match group.kind {
                GroupKind::Slice => Kind::EndpointSlice,
                GroupKind::Legacy => Kind::Endpoints,
            },
            Self::Node { .. } => Kind::Node,
            Self::ServiceCidr { .. } => Kind::ServiceCidr,
        }
    }
}

/// Something a source could not use, and what follows from it, as text for people.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ObjectProblem {
    /// Where it was found: a file, or an object.
    pub place: String,
    /// The object, where its source knows it by name.
    pub object: Option<ObjectKey>,
    /// What is wrong: names the field and the limit.
    pub message: String,
}

impl fmt::Display for ObjectProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// One step of a source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A list of this kind begins; one that was under way is void.
    Init(Kind),
    /// An object of the list.
    InitApply(Object),
    /// An object of the list that cannot be used: what was known of it stays.
    InitKeep(ObjectKey),
    /// The list of this kind is complete.
    InitDone(Kind),
    /// An object is new or has changed.
    Apply(Object),
    /// An object is gone, or no longer counts.
    Delete(ObjectKey),
    /// Some part of the source cannot be read at all, or every part can be again: what its first list lacks may be in there.
    Unread(bool),
    /// All that the source cannot use at the moment.
    Problems(Arc<[ObjectProblem]>),
}

impl Event {
    /// Of which kind the objects are that it is about.
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Self::Init(kind) | Self::InitDone(kind) => Some(*kind),
            Self::InitApply(object) | Self::Apply(object) => Some(object.kind()),
            Self::InitKeep(key) | Self::Delete(key) => Some(key.kind),
            Self::Problems(_) | Self::Unread(_) => None,
        }
    }
}

/// What a source sends: steps that count together. Nobody sees some of them without the others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Update {
    /// Who sends it.
    pub source: SourceId,
    /// What happened, in this order.
    pub events: Vec<Event>,
}

/// A configured source, and what it lists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceSpec {
    /// Which one.
    pub id: SourceId,
    /// It counts when each of these has been listed once.
    pub kinds: &'static [Kind],
}
