//! What load balancers are told of services (healthCheckNodePort): which service a port speaks of, and how many endpoints
//! it has here.
//!
//! A port speaks of one service, however many ask for it: of the oldest, then by the order of sources, then by namespace
//! and name. As for frontends, but for what the tables hold from an earlier run: of these ports they hold nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::sync::Arc;

use imbl::OrdMap;
use proxy_common::addr::{Addr, Port, Proto};

use super::claims::Claims;
use super::key::FrontendAddr;
use super::problem::Problem;
use super::service::PortPlan;
use crate::model::{ByFamily, Family, Service, ServiceKey};

/// What is told of one service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCheck {
    /// The service.
    pub service: ServiceKey,
    /// How many endpoints it has on this node, in each family in which it is served.
    pub local_endpoints: ByFamily<Option<usize>>,
}

/// What is told, and where.
#[derive(Clone, Debug, Default)]
pub struct HealthChecks {
    /// By port.
    pub by_port: OrdMap<Port, Arc<HealthCheck>>,
    /// Where sockets listen; wildcards stand for their whole family.
    pub addresses: Arc<[Addr]>,
}

impl HealthChecks {
    /// True if the two are the same; looks at no single port.
    pub fn is_same(&self, other: &Self) -> bool {
        self.by_port.ptr_eq(&other.by_port) && self.addresses == other.addresses
    }

    /// Where a socket has to listen for a port.
    pub fn addresses_of(&self, port: Port) -> impl Iterator<Item = Addr> + '_ {
        let check = self.by_port.get(&port);
        let is_served = move |family| check.is_some_and(|check| check.local_endpoints.get(family).is_some());
        self.addresses.iter().copied().filter(move |addr| is_served(Family::of(addr)))
    }
}

/// What one service asks to be told of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlannedCheck {
    /// At which port.
    pub port: Port,
    /// As in [`HealthCheck`].
    pub local_endpoints: ByFamily<Option<usize>>,
}

impl PlannedCheck {
    /// The same for a service that is not programmed.
    pub fn without_endpoints(mut self) -> Self {
        for family in Family::ALL {
            *self.local_endpoints.get_mut(family) = self.local_endpoints.get(family).map(|_| 0);
        }
        self
    }

    /// An address counts once, over however many ports it is ready; one that terminates does not count, also while it gets
    /// traffic for want of others (KEP-1669).
    pub fn new(port: Port, service: &Service, plans: &[PortPlan]) -> Self {
        let count = |family: Family| {
            let of_family = plans.iter().filter(|plan| plan.family == family);
            let backends = of_family.flat_map(|plan| &plan.backends);
            let ready = backends.filter(|backend| backend.is_local && backend.is_ready);
            ready.map(|backend| backend.at.addr).collect::<BTreeSet<_>>().len()
        };
        let mut local_endpoints = ByFamily::default();
        for family in Family::ALL {
            *local_endpoints.get_mut(family) = service.cluster_ips.get(family).map(|_| count(family));
        }
        Self { port, local_endpoints }
    }
}

/// A service's wish for a port; the first in order has it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Wish {
    /// Seconds of Unix time; unknown age comes last.
    created: u64,
    service: ServiceKey,
}

/// The index of wishes, and what follows from it.
#[derive(Default, Debug)]
pub(super) struct Checks {
    planned: BTreeMap<ServiceKey, (Wish, PlannedCheck)>,
    wishes: BTreeMap<Port, BTreeSet<Wish>>,
    served: OrdMap<Port, Arc<HealthCheck>>,
}

impl Checks {
    /// Adds, replaces or takes back what a service asks for. Returns the services whose problems may be others now.
    pub(super) fn put(
        &mut self,
        service: &ServiceKey,
        created: Option<NonZeroU64>,
        planned: Option<PlannedCheck>,
    ) -> BTreeSet<ServiceKey> {
        let wish = Wish { created: created.map_or(u64::MAX, NonZeroU64::get), service: service.clone() };
        let next = planned.map(|planned| (wish, planned));
        let known = match &next {
            Some(next) => self.planned.insert(service.clone(), next.clone()),
            None => self.planned.remove(service),
        };
        let mut told = BTreeSet::new();
        if wanted(&known) != wanted(&next) {
            if let Some((wish, PlannedCheck { port, .. })) = known {
                told.extend(self.claimants(port).cloned());
                self.withdraw(port, &wish);
            }
            if let Some((wish, PlannedCheck { port, .. })) = &next {
                self.wishes.entry(*port).or_default().insert(wish.clone());
                told.extend(self.claimants(*port).cloned());
            }
        }
        if let Some((_, planned)) = next {
            self.settle(planned.port);
        }
        told
    }

    fn withdraw(&mut self, port: Port, wish: &Wish) {
        if let Some(wishes) = self.wishes.get_mut(&port) {
            wishes.remove(wish);
            if wishes.is_empty() {
                self.wishes.remove(&port);
            }
        }
        self.settle(port);
    }

    /// Brings what a port tells up to date.
    fn settle(&mut self, port: Port) {
        let check = self.winner(port).and_then(|service| {
            let (_, planned) = self.planned.get(service)?;
            Some(HealthCheck { service: service.clone(), local_endpoints: planned.local_endpoints })
        });
        match check {
            Some(check) if self.served.get(&port).is_some_and(|known| **known == check) => {}
            Some(check) => _ = self.served.insert(port, Arc::new(check)),
            None => _ = self.served.remove(&port),
        }
    }

    fn winner(&self, port: Port) -> Option<&ServiceKey> {
        self.claimants(port).next()
    }

    /// Services that ask for a port, the one that has it first.
    pub(super) fn claimants(&self, port: Port) -> impl Iterator<Item = &ServiceKey> {
        self.wishes.get(&port).into_iter().flatten().map(|wish| &wish.service)
    }

    /// Services that ask for any port.
    pub(super) fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.planned.keys()
    }

    /// What ports tell.
    pub(super) fn served(&self) -> &OrdMap<Port, Arc<HealthCheck>> {
        &self.served
    }

    /// Why health checks of a service do not work.
    pub(super) fn problem(&self, service: &ServiceKey, claims: &Claims) -> Option<Problem> {
        let (_, PlannedCheck { port, local_endpoints }) = self.planned.get(service)?;
        let winner = self.winner(*port)?;
        if winner != service {
            return Some(Problem::HealthCheckTaken { port: *port, winner: winner.clone() });
        }
        let families = Family::ALL.into_iter().filter(|family| local_endpoints.get(*family).is_some());
        let node_port = |family: Family| FrontendAddr { addr: family.wildcard(), port: *port, proto: Proto::TCP };
        let mut hiding = families.filter_map(|family| claims.get(&node_port(family))?.winner());
        let winner = hiding.next()?.owner.as_ref().clone();
        Some(Problem::HealthCheckHidden { port: *port, winner })
    }
}

/// Which wish for which port.
fn wanted(planned: &Option<(Wish, PlannedCheck)>) -> Option<(&Wish, Port)> {
    planned.as_ref().map(|(wish, planned)| (wish, planned.port))
}
