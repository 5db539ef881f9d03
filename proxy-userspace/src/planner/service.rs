//! One service, its endpoints and this node: what should be programmed.

use std::num::NonZeroU64;

use super::endpoints;
use super::key::{BackendAddr, FrontendAddr};
use super::node::NodeView;
use super::problem::Problem;
use crate::model::{Endpoints, Family, Name, Service};
use proxy_common::addr::Proto;

/// What should be programmed for one service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServicePlan {
    /// Its ports, each once per family.
    pub ports: Vec<PortPlan>,
    /// What it asks for that cannot be done.
    pub problems: Vec<Problem>,
}

/// What should be programmed for one service port in one family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortPlan {
    /// Name of the port.
    pub port: Name,
    /// Its protocol.
    pub proto: Proto,
    /// The family.
    pub family: Family,
    /// Every backend that may have flows, in order of their addresses.
    pub backends: Vec<PlannedBackend>,
    /// Some frontend sends some clients to the cluster set.
    pub uses_cluster: bool,
    /// Some frontend sends some clients to the local set.
    pub uses_local: bool,
    /// Seconds of session affinity; 0: none.
    pub affinity: u32,
    /// What clients dial, in order of kind.
    pub frontends: Vec<PlannedFrontend>,
}

/// A backend of one service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedBackend {
    /// Where it listens.
    pub at: BackendAddr,
    /// It runs on this node.
    pub is_local: bool,
    /// It gets new connections of those who get the cluster set.
    pub in_cluster: bool,
    /// It gets new connections of those who get the local set.
    pub in_local: bool,
}

/// Kinds of frontends, the stronger claim first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum FrontendKind {
    /// A ClusterIP.
    ClusterIp,
    /// An address in the status of the load balancer.
    LoadBalancer,
    /// One of externalIPs.
    ExternalIp,
    /// A port of the node's own addresses.
    NodePort,
}

/// A frontend of one service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedFrontend {
    /// What clients dial.
    pub at: FrontendAddr,
    /// Its kind.
    pub kind: FrontendKind,
    /// Flags of its record.
    pub flags: u32,
}
