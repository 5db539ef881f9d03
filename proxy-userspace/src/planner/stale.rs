//! Connections whose endpoint is gone: what a step leaves behind, and what is to become of a connection that is found.
//!
//! A connection is known by what its client dialled and where it was sent ([`Link`]). Whether that still holds is asked of
//! the state as a whole, so that it is the same question for a deleted service, one that was renumbered, one without
//! endpoints, and after a restart. What a step leaves behind ([`Lost`]) only tells where to look.

use std::collections::BTreeSet;
use std::fmt;

use proxy_common::addr::Port;

use super::backends::Listed;
use super::key::{BackendAddr, FrontendAddr, PortName};
use super::state::{Port as ServicePort, State};
use crate::model::{Family, ServiceKey, Snapshot, StalePolicy};

/// A connection through a frontend, without its client.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Link {
    /// What the client dialled.
    pub frontend: FrontendAddr,
    /// Where it was sent.
    pub backend: BackendAddr,
}

/// What holds of a [`Link`] now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// The backend is one of the frontend's that may have connections: ready, or still serving.
    Served,
    /// It is listed, but neither ready nor serving.
    Unserving,
    /// The frontend does not lead there any more. What the service asks for, if it is still there and says so.
    Gone(Option<StalePolicy>),
}

/// Backends that a step took from a service port, or frontends that it took from all of these.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lost {
    /// Whose they were.
    pub service: ServiceKey,
    /// What it asked for before the step.
    pub policy: Option<StalePolicy>,
    /// Frontends that are not its own any more.
    pub frontends: Vec<FrontendAddr>,
    /// Backends that it may have connections to for which that is no longer meant.
    pub backends: Vec<BackendAddr>,
}

impl State {
    /// What is to become of a connection, by what the state was last advanced to.
    pub fn standing(&self, link: &Link) -> Standing {
        let Some(owner) = self.owner(&link.frontend) else { return Standing::Gone(None) };
        let port = &self.ports[owner];
        let listed = self.backends.find(&link.backend);
        let is_served = listed.is_some_and(|id| port.backends.iter().any(|listed| listed.id() == id));
        // Of a port that is as the tables had it nobody knows what is listed.
        if is_served || port.is_held {
            return Standing::Served;
        }
        let Some((snapshot, _)) = &self.planned else { return Standing::Served };
        match is_listed(snapshot, owner, &link.backend) {
            true => Standing::Unserving,
            false => Standing::Gone(snapshot.services.get(owner.service()).and_then(|service| service.stale)),
        }
    }

    /// Who has a frontend, by its own address or as a NodePort.
    fn owner(&self, at: &FrontendAddr) -> Option<&PortName> {
        let winner = |at: &FrontendAddr| self.claims.get(at)?.winner().map(|claim| &*claim.owner);
        let any_port = FrontendAddr { port: Port(0), ..*at };
        let node_port = FrontendAddr { addr: Family::of(&at.addr).wildcard(), ..*at };
        winner(at).or_else(|| winner(&any_port)).or_else(|| winner(&node_port))
    }

    /// What a port loses that becomes another, or nothing.
    pub(super) fn lost(&self, name: &PortName, old: &ServicePort, new: Option<&ServicePort>) -> Option<Lost> {
        let kept = |at: &FrontendAddr| new.is_some_and(|new| new.frontends.iter().any(|frontend| frontend.at == *at));
        let frontends: Vec<_> = old.frontends.iter().map(|frontend| frontend.at).filter(|at| !kept(at)).collect();
        let listed: BTreeSet<u32> = new.iter().flat_map(|new| &new.backends).map(|listed| listed.id().0).collect();
        let is_lost = |listed_before: &&Listed| !frontends.is_empty() || !listed.contains(&listed_before.id().0);
        let lost = old.backends.iter().filter(is_lost);
        let backends: Vec<_> = lost.filter_map(|listed| Some(self.backends.get(listed.id())?.at)).collect();
        let is_any = !backends.is_empty();
        is_any.then(|| Lost { service: name.service().clone(), policy: None, frontends, backends })
    }

    /// What a port loses that has a frontend no more although it wishes for it.
    pub(super) fn outbid(&self, name: &PortName, at: FrontendAddr) -> Option<Lost> {
        let port = self.ports.get(name)?;
        let backends = port.backends.iter().filter_map(|listed| Some(self.backends.get(listed.id())?.at)).collect();
        Some(Lost { service: name.service().clone(), policy: None, frontends: vec![at], backends })
    }
}

/// True if an endpoint is listed, whatever its condition.
fn is_listed(snapshot: &Snapshot, name: &PortName, backend: &BackendAddr) -> bool {
    let Some(endpoints) = snapshot.endpoints.get(name.service()) else { return false };
    endpoints.groups().iter().flat_map(|group| group.subsets.iter()).any(|subset| {
        let is_ours = |port: &crate::model::EndpointPort| {
            port.port == backend.port && port.name == *name.port() && port.protocol.proto() == Some(backend.proto)
        };
        subset.ports.iter().any(is_ours) && subset.endpoints.iter().any(|endpoint| endpoint.addr == backend.addr)
    })
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.frontend, self.backend)
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Served => f.write_str("served"),
            Self::Unserving => f.write_str("drains"),
            Self::Gone(None) => f.write_str("gone"),
            Self::Gone(Some(policy)) => write!(f, "gone, {policy}"),
        }
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backends: Vec<_> = self.backends.iter().map(ToString::to_string).collect();
        write!(f, "{}: {}", self.service, backends.join(" "))?;
        self.frontends.iter().try_for_each(|at| write!(f, ", not by {at}"))?;
        self.policy.map_or(Ok(()), |policy| write!(f, ", {policy}"))
    }
}
