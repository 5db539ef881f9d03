//! Endpoints: where a service's traffic can go, kept in the groups in which they were listed.
//!
//! They are merged when they are planned, not here: a changed slice then shares all the others with the state before.

use std::sync::Arc;

use proxy_common::addr::{Addr, Port};

use super::name::Name;
use super::service::Protocol;

/// What is known about an endpoint's health, as flags.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Conditions(u8);

impl Conditions {
    const READY: u8 = 1;
    const SERVING: u8 = 1 << 1;
    const TERMINATING: u8 = 1 << 2;

    /// Conditions as Kubernetes names them; a missing one is ready, serving, not terminating.
    pub fn new(ready: Option<bool>, serving: Option<bool>, terminating: Option<bool>) -> Self {
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        Self(
            flag(ready.unwrap_or(true), Self::READY)
                | flag(serving.unwrap_or(true), Self::SERVING)
                | flag(terminating.unwrap_or(false), Self::TERMINATING),
        )
    }

    /// Should get new connections.
    pub const fn is_ready(self) -> bool {
        self.0 & Self::READY != 0
    }

    /// Answers, whatever else is true of it.
    pub const fn is_serving(self) -> bool {
        self.0 & Self::SERVING != 0
    }

    /// Will go away.
    pub const fn is_terminating(self) -> bool {
        self.0 & Self::TERMINATING != 0
    }
}

/// For whom an endpoint is meant; each list is empty if it says nothing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Hints {
    /// Zones.
    pub zones: Box<[Name]>,
    /// Nodes.
    pub nodes: Box<[Name]>,
}

/// One address that serves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// Its address; its family is the family of the traffic it gets.
    pub addr: Addr,
    /// The node it runs on.
    pub node: Option<Name>,
    /// For whom it is meant.
    pub hints: Option<Arc<Hints>>,
    /// Its health.
    pub conditions: Conditions,
}

/// A port of every endpoint of a subset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointPort {
    /// Joins it to a service port; empty if unnamed.
    pub name: Name,
    /// Transport.
    pub protocol: Protocol,
    /// Port of the backends; never 0.
    pub port: Port,
}

/// Endpoints that all have the same ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointSubset {
    /// The ports.
    pub ports: Box<[EndpointPort]>,
    /// The endpoints.
    pub endpoints: Box<[Endpoint]>,
}

/// What kind of object listed a group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum GroupKind {
    /// An EndpointSlice: one of many of its service.
    Slice,
    /// A legacy Endpoints object. Counts only for a service without any slice.
    Legacy,
}

/// The endpoints of one listed object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointGroup {
    /// Kind of the object.
    pub kind: GroupKind,
    /// Name of the object; groups are merged in this order.
    pub name: Name,
    /// Its contents: one subset for a slice, any number for a legacy object.
    pub subsets: Box<[EndpointSubset]>,
}

/// All endpoints of one service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Endpoints {
    /// Ordered by kind, then name.
    groups: Vec<Arc<EndpointGroup>>,
}

impl Endpoints {
    /// The groups that count, in merge order: the slices, or the legacy object if there is no slice.
    pub fn groups(&self) -> &[Arc<EndpointGroup>] {
        let slices = self.groups.partition_point(|group| group.kind == GroupKind::Slice);
        if slices > 0 { &self.groups[..slices] } else { &self.groups }
    }

    /// True if nothing is listed.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// These endpoints with one group added or replaced.
    pub fn with(&self, group: Arc<EndpointGroup>) -> Self {
        let mut groups = self.groups.clone();
        match self.position(group.kind, &group.name) {
            Ok(known) => groups[known] = group,
            Err(place) => groups.insert(place, group),
        }
        Self { groups }
    }

    /// These endpoints with one group removed.
    pub fn without(&self, kind: GroupKind, name: &Name) -> Self {
        let mut groups = self.groups.clone();
        if let Ok(known) = self.position(kind, name) {
            groups.remove(known);
        }
        Self { groups }
    }

    /// The group of one object.
    pub fn get(&self, kind: GroupKind, name: &Name) -> Option<&Arc<EndpointGroup>> {
        self.position(kind, name).ok().map(|known| &self.groups[known])
    }

    fn position(&self, kind: GroupKind, name: &Name) -> Result<usize, usize> {
        self.groups.binary_search_by(|group| (group.kind, &group.name).cmp(&(kind, name)))
    }
}
