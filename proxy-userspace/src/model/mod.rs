//! Desired state: what the sources said, in our own partial types, as one immutable [`Snapshot`].
//!
//! | module | holds |
//! |---|---|
//! | [`name`] | interned names |
//! | [`service`] | services and their ports |
//! | [`endpoint`] | endpoints, grouped as they were listed |
//! | [`node`] | nodes, ServiceCIDRs, and what was read about this node |
//! | [`update`] | the contract every source speaks |
//! | [`snapshot`] | all of it at one moment: persistent maps of `Arc`s, compared by pointer |
//! | [`trigger`] | when the changes happened that are not programmed yet |
//! | [`content`] | updates to snapshots, as a function of values |
//! | [`store`] | one writer, many readers: the only file here that knows tokio (its `watch` channel) |
//!
//! May not touch: files, sockets, clocks, randomness, the kernel.

pub mod content;
pub mod endpoint;
pub mod name;
pub mod node;
pub mod service;
pub mod snapshot;
pub mod store;
pub mod trigger;
pub mod update;

pub use endpoint::{Conditions, Endpoint, EndpointGroup, EndpointPort, EndpointSubset, Endpoints, GroupKind, Hints};
pub use name::{Interner, Name};
pub use node::{LocalAddress, Node, NodeFacts, NodePortAddresses, PrimaryAddresses, ServiceCidr};
pub use service::{
    ByFamily, Family, NotAPolicy, Protocol, Service, ServiceKey, ServicePort, SourceId, StalePolicy, TrafficPolicy,
};
pub use snapshot::{Changes, ClusterKey, Gaps, Snapshot};
pub use store::{Reader, Writer};
pub use trigger::{Trigger, Triggers};
pub use update::{Event, Kind, Object, ObjectKey, ObjectProblem, SourceSpec, Update};
