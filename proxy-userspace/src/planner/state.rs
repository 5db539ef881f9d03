//! Everything that is programmed, and for whom; how it moves from snapshot to snapshot.
//!
//! One step: services that differ are planned and take their ids, slots and claims; then, when all counts are final, each
//! touched frontend, backend, address and port is compared with the tables once.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::{Range, ServiceRecord};
use proxy_common::addr::Addr;

use super::backends::{Backend, Backends, Listed, Programmed};
use super::claims::{Claim, Claims, Remark};
use super::health_check::{Checks, HealthChecks};
use super::ids::{BackendId, Epoch, Ids, Limits, ServiceId, Slots, Stretch};
use super::key::{BackendAddr, FrontendAddr, PortName};
use super::node::NodeView;
use super::plan::{Cidrs, Plan};
use super::problem::Problem;
use super::service::{Layout, PlannedBackend, PlannedFrontend, PortPlan, ServicePlan, plan_service};
use super::usage::{Addresses, Ports};
use super::work::{Touched, Work};
use crate::model::{Endpoint, Endpoints, ServiceKey, Snapshot, SourceId};

/// What is programmed, and for whom. A value: each step takes it and gives the next one back.
#[derive(Debug)]
pub struct State {
    pub(super) limits: Limits,
    pub(super) epoch: Epoch,
    /// What the state was last advanced to, and this node in it.
    pub(super) planned: Option<(Arc<Snapshot>, NodeView)>,
    pub(super) service_ids: Ids,
    pub(super) backend_ids: Ids,
    pub(super) slots: Slots,
    pub(super) ports: BTreeMap<Arc<PortName>, Port>,
    pub(super) backends: Backends,
    pub(super) claims: Claims,
    pub(super) addresses: Addresses,
    /// Those among them that are this node's.
    pub(super) node_addresses: BTreeSet<Addr>,
    pub(super) port_uses: Ports,
    /// Prefixes in the configuration.
    pub(super) cidrs: Cidrs,
    /// What is in the tables without a use that is known; it goes when every source has listed.
    pub(super) orphans: Orphans,
    /// Services that found no room.
    pub(super) refused: BTreeSet<ServiceKey>,
    /// Room was freed since they were refused.
    pub(super) has_room: bool,
    /// What load balancers are told of services.
    pub(super) checks: Checks,
    /// What each service's own plan says it does not get.
    pub(super) problems: BTreeMap<ServiceKey, Vec<Problem>>,
    /// Frontends about which a service is told something.
    pub(super) remarks: BTreeSet<(ServiceKey, FrontendAddr, Remark)>,
}

/// Flags of a frontend that say who may dial it.
const CLOSED: u32 = FrontendValue::RESTRICTED | FrontendValue::PACKETS_ONLY | FrontendValue::CLOSED_TO_NODE;

/// A service port in one family, as programmed.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub id: ServiceId,
    /// The slots it holds; there may be more than are used.
    pub stretch: Stretch,
    /// What is in them; empty although it holds some if the table contradicts itself.
    pub slots: Box<[BackendId]>,
    /// What the table says; `None` if it contradicts itself.
    pub record: Option<ServiceRecord>,
    /// Its backends, and whether it says that they run here.
    pub backends: Box<[Listed]>,
    pub frontends: Box<[PlannedFrontend]>,
    /// Who may dial the restricted ones.
    pub sources: Box<[IpNet]>,
    pub created: Option<NonZeroU64>,
    /// Read from the tables, not planned yet.
    pub is_held: bool,
}

/// A service id that is no longer used, and what the tables have under it.
#[derive(Debug)]
pub(super) struct Retired {
    pub id: ServiceId,
    pub sources: Box<[IpNet]>,
}

/// What a service port is going to have.
struct Reserved {
    id: ServiceId,
    stretch: Stretch,
    /// Members of the old local set that stand behind the new slots until no frontend asks for them.
    leaving: Vec<BackendId>,
}

/// Entries of the tables that no name or slot accounts for.
#[derive(Default, Debug)]
pub(super) struct Orphans {
    /// Service ids without a name, or with a name that another id has; and their slots.
    pub services: Vec<(Retired, Stretch)>,
    /// Backends of which another id has the same address.
    pub backends: Vec<BackendId>,
    /// Backends in no slot, which count as used once.
    pub unlisted: Vec<BackendId>,
}

impl State {
    /// The state after everything in `next` is programmed, and what has to be done for that.
    pub fn advance(mut self, next: &Arc<Snapshot>) -> (Self, Plan) {
        self.epoch = Epoch(self.epoch.0 + 1);
        let mut work = Work::default();
        let before = self.planned.take();
        let kept = before.as_ref().filter(|(old, _)| is_same_node(old, next)).map(|(_, node)| node.clone());
        let is_kept = kept.is_some();
        let node = kept.unwrap_or_else(|| NodeView::of(next));
        if before.is_none() {
            self.touch_everything(&mut work);
        }
        if !is_kept {
            self.take_node(&node, next.is_settled(), &mut work);
        }
        for service in self.changed_services(before.as_ref(), next, &node) {
            self.take_service(service, next, &node, &mut work);
        }
        if next.is_settled() {
            self.drop_orphans(&mut work);
        }
        let asked = |service| before.as_ref().and_then(|(old, _)| old.services.get(service)).and_then(|old| old.stale);
        self.planned = Some((next.clone(), node));
        let mut plan = self.finish(work);
        plan.lost.iter_mut().for_each(|lost| lost.policy = asked(&lost.service));
        (self, plan)
    }

    /// The state after no flow uses `addr` any more, and what has to be done for that.
    pub fn prune_address(mut self, addr: Addr) -> (Self, Plan) {
        self.epoch = Epoch(self.epoch.0 + 1);
        let plan = Plan::of_leftovers(self.epoch, self.addresses.prune(addr));
        (self, plan)
    }

    /// The state after `after_grace` of the plan of `epoch` has been done. The flag is true if services that found no room
    /// may find some now: then it is worth advancing to the same snapshot once more.
    pub fn grace_passed(mut self, epoch: Epoch) -> (Self, bool) {
        let freed = [self.service_ids.wake(epoch), self.backend_ids.wake(epoch), self.slots.wake(epoch)];
        self.has_room |= freed.contains(&true);
        let worth_it = self.has_room && !self.refused.is_empty();
        (self, worth_it)
    }

    /// This node, as last planned for.
    pub fn node(&self) -> Option<&NodeView> {
        self.planned.as_ref().map(|(_, node)| node)
    }

    /// What load balancers are told of services, and where.
    pub fn health_checks(&self) -> HealthChecks {
        let addresses = self.node().map(|node| node.node_port_sockets.clone()).unwrap_or_default();
        HealthChecks { by_port: self.checks.served().clone(), addresses }
    }

    /// Everything that services do not get, by service.
    pub fn problems(&self) -> BTreeMap<ServiceKey, Vec<Problem>> {
        let told = self.remarks.iter().map(|(service, ..)| service);
        let services: BTreeSet<_> = self.problems.keys().chain(told).chain(self.checks.services()).collect();
        let all = services.into_iter().map(|service| (service.clone(), self.problems_of(service)));
        all.filter(|(_, problems)| !problems.is_empty()).collect()
    }

    pub(super) fn problems_of(&self, service: &ServiceKey) -> Vec<Problem> {
        let own = self.problems.get(service).into_iter().flatten().cloned();
        own.chain(self.remarks_to(service)).chain(self.checks.problem(service, &self.claims)).collect()
    }

    fn remarks_to<'a>(&'a self, service: &'a ServiceKey) -> impl Iterator<Item = Problem> + 'a {
        let first = (service.clone(), FrontendAddr::FIRST, Remark::Conflict);
        let own = self.remarks.range(first..).take_while(move |(to, ..)| to == service);
        own.filter_map(|(_, at, remark)| match remark {
            Remark::IsBackend => Some(Problem::FrontendIsBackend { frontend: *at }),
            Remark::Conflict => {
                let winner = self.claims.get(at)?.winner()?;
                Some(Problem::Conflict { frontend: *at, winner: PortName::clone(&winner.owner) })
            }
        })
    }

    /// Services that have to be planned: those that differ, those with an endpoint that is local or not by an address that
    /// this node has got or lost, and all if this node differs in what all plans depend on.
    pub(super) fn changed_services(
        &mut self,
        before: Option<&(Arc<Snapshot>, NodeView)>,
        next: &Snapshot,
        node: &NodeView,
    ) -> BTreeSet<ServiceKey> {
        let mut changed: BTreeSet<ServiceKey> = match before {
            Some((old, old_node)) if !old_node.plans_differ(node) => {
                let moved = old_node.other_addresses(node).filter(|addr| self.addresses.has_backends(addr)).collect();
                differing(old, next).into_iter().chain(services_at(&moved, next)).collect()
            }
            _ => next.services.keys().chain(self.programmed_services()).cloned().collect(),
        };
        let tells_more = |source: &SourceId| {
            before.is_some_and(|(old, _)| old.is_pending(*source) || old.gaps.get(source) != next.gaps.get(source))
        };
        let entered: Vec<_> = SourceId::ALL.into_iter().filter(tells_more).collect();
        if !entered.is_empty() {
            changed.extend(self.programmed_services().filter(|key| entered.contains(&key.source)).cloned());
        }
        if std::mem::take(&mut self.has_room) {
            changed.extend(self.refused.iter().cloned());
        }
        changed.retain(|key| !(next.is_pending(key.source) || next.is_open(key) && self.is_held(key)));
        changed
    }

    /// True if a service is as the tables had it at the start.
    fn is_held(&self, key: &ServiceKey) -> bool {
        self.ports_of(key).any(|name| self.ports[name].is_held)
    }

    fn programmed_services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.ports.keys().map(|name| name.service())
    }

    /// Plans one service and takes what it needs.
    fn take_service(&mut self, key: ServiceKey, next: &Snapshot, node: &NodeView, work: &mut Work) {
        let none = Arc::<Endpoints>::default();
        let service = next.services.get(&key);
        let endpoints = next.endpoints.get(&key).unwrap_or(&none);
        let ServicePlan { ports, health_check, mut problems } =
            service.map(|service| plan_service(service, endpoints, node)).unwrap_or_default();
        let created = service.and_then(|service| service.created);
        let mut wanted = BTreeSet::new();
        self.refused.remove(&key);
        for port in ports {
            let name = match PortName::new(key.clone(), port.port.clone(), port.proto, port.family) {
                Ok(name) => Arc::new(name),
                Err(error) => {
                    problems.push(error.into());
                    continue;
                }
            };
            wanted.insert(name.clone());
            if let Err(problem) = self.take_port(name, &port, created, work) {
                self.refused.insert(key.clone());
                problems.push(problem);
            }
        }
        for name in self.ports_of(&key).filter(|name| !wanted.contains(*name)).cloned().collect::<Vec<_>>() {
            self.withdraw_port(&name, work);
        }
        let is_missing = self.refused.contains(&key) && self.ports_of(&key).next().is_none();
        let health_check = health_check.map(|check| if is_missing { check.without_endpoints() } else { check });
        work.told.extend(self.checks.put(&key, created, health_check));
        self.set_problems(key, problems, work);
    }

    fn ports_of<'a>(&'a self, key: &'a ServiceKey) -> impl Iterator<Item = &'a Arc<PortName>> {
        let from_first = self.ports.range::<PortName, _>(PortName::first_of(key.clone())..);
        from_first.map(|(name, _)| name).take_while(move |name| name.service() == key)
    }

    fn set_problems(&mut self, key: ServiceKey, problems: Vec<Problem>, work: &mut Work) {
        let known = match problems.is_empty() {
            true => self.problems.remove(&key),
            false => self.problems.insert(key.clone(), problems.clone()),
        };
        if known.unwrap_or_default() != problems {
            work.told.insert(key);
        }
    }

    /// Takes ids and slots for a service port and puts its claims in. If there is no room, it changes only who may dial what is
    /// there.
    fn take_port(
        &mut self,
        name: Arc<PortName>,
        plan: &PortPlan,
        created: Option<NonZeroU64>,
        work: &mut Work,
    ) -> Result<(), Problem> {
        let layout = plan.layout();
        if self.is_programmed(&name, plan, &layout, created) {
            return Ok(());
        }
        let reserved = self.reserve(&name, plan, &layout);
        if reserved.is_err() {
            self.restrict(&name, plan, work);
        }
        let Reserved { id, stretch, leaving } = reserved?;
        let backends = self.list_backends(plan);
        let old = self.ports.remove(&name);
        let old_stretch = old.as_ref().map(|old| old.stretch).unwrap_or_default();
        if let Some(old) = &old {
            self.unlist_backends(old, work);
        }
        if old_stretch != stretch {
            self.slots.rest(old_stretch, self.epoch);
        }
        let port = Port {
            id,
            stretch,
            slots: layout.slots.iter().filter_map(|at| self.backends.find(at)).collect(),
            record: Some(record(&layout, stretch, plan.affinity)),
            backends,
            frontends: plan.frontends.iter().copied().collect(),
            sources: plan.sources.iter().copied().collect(),
            created,
            is_held: false,
        };
        self.change_claims(&name, old.as_ref(), &port, work);
        work.lost.extend(old.as_ref().and_then(|old| self.lost(&name, old, Some(&port))));
        work.ports.push(Touched {
            name: name.clone(),
            is_new: old.is_none(),
            has_new_slots: old_stretch != stretch,
            old_record: old.as_ref().and_then(|old| old.record),
            old_sources: old.map(|old| old.sources).unwrap_or_default(),
            leaving,
        });
        self.ports.insert(name, port);
        Ok(())
    }

    /// Lets no more clients dial the frontends of a service port than its plan does, and no fewer; all else stays.
    fn restrict(&mut self, name: &Arc<PortName>, plan: &PortPlan, work: &mut Work) {
        let Some(mut port) = self.ports.remove(name) else { return };
        let old = port.clone();
        port.sources = plan.sources.iter().copied().collect();
        for frontend in &mut port.frontends {
            if let Some(planned) = plan.frontends.iter().find(|planned| planned.at == frontend.at) {
                frontend.flags = frontend.flags & !CLOSED | planned.flags & CLOSED;
            }
        }
        if (&old.frontends, &old.sources) != (&port.frontends, &port.sources) {
            self.change_claims(name, Some(&old), &port, work);
            work.ports.push(Touched {
                name: name.clone(),
                is_new: false,
                has_new_slots: false,
                old_record: old.record,
                old_sources: old.sources,
                leaving: Vec::new(),
            });
        }
        self.ports.insert(name.clone(), port);
    }

    /// True if everything in the plan is programmed already.
    fn is_programmed(&self, name: &PortName, plan: &PortPlan, layout: &Layout, created: Option<NonZeroU64>) -> bool {
        let Some(port) = self.ports.get(name).filter(|port| !port.is_held && port.created == created) else {
            return false;
        };
        let listed = |planned: &PlannedBackend| Some(Listed::new(self.backends.find(&planned.at)?, planned.is_local));
        port.record == Some(record(layout, port.stretch, plan.affinity))
            && *port.frontends == *plan.frontends
            && *port.sources == *plan.sources
            && port.backends.iter().map(|listed| Some(*listed)).eq(plan.backends.iter().map(listed))
            && self.are_slots(port, &layout.slots)
    }

    /// What a port will have: what it has, where that stays the same. Sees to it that there are ids for its new backends.
    fn reserve(&mut self, name: &PortName, plan: &PortPlan, layout: &Layout) -> Result<Reserved, Problem> {
        let known = self.ports.get(name);
        let full = |what, wanted, capacity| Problem::Exhausted { name: name.clone(), wanted, what, capacity };
        if known.is_none() && self.service_ids.available() == 0 {
            return Err(full("services", 1, self.limits.services));
        }
        let new = plan.backends.iter().filter(|backend| self.backends.find(&backend.at).is_none()).count();
        if new > self.backend_ids.available() {
            return Err(full("backends", new, self.limits.backends));
        }
        let (stretch, leaving) = match known.filter(|port| self.are_slots(port, &layout.slots)) {
            Some(port) => (port.stretch, Vec::new()),
            None => {
                let leaving = known.map(|port| leaving(port, layout)).unwrap_or_default();
                let wanted = layout.slots.len() + leaving.len();
                let free = self.slots.take(wanted as u32);
                (free.ok_or_else(|| full("slots in a row", wanted, self.limits.slots))?, leaving)
            }
        };
        let id = match self.ports.get(name) {
            Some(port) => port.id,
            None => ServiceId(self.service_ids.take().expect("one was available above")),
        };
        Ok(Reserved { id, stretch, leaving })
    }

    fn are_slots(&self, port: &Port, wanted: &[BackendAddr]) -> bool {
        let ids = wanted.iter().map(|at| self.backends.find(at));
        port.record.is_some() && port.slots.iter().map(|id| Some(*id)).eq(ids)
    }

    /// Counts a port in as a user of its backends, with new ids for new ones.
    fn list_backends(&mut self, plan: &PortPlan) -> Box<[Listed]> {
        plan.backends.iter().map(|planned| self.list_backend(planned)).collect()
    }

    fn list_backend(&mut self, planned: &PlannedBackend) -> Listed {
        let id = self.backends.find(&planned.at).unwrap_or_else(|| {
            let id = BackendId(self.backend_ids.take().expect("as many as needed were available"));
            self.addresses.at(planned.at.addr).backends += 1;
            let backend = Backend { at: planned.at, users: 0, local_users: 0, programmed: Programmed::Absent };
            self.backends.add(id, backend);
            id
        });
        if let Some(backend) = self.backends.get_mut(id) {
            backend.users += 1;
            backend.local_users += u32::from(planned.is_local);
        }
        Listed::new(id, planned.is_local)
    }

    /// Counts a port out as a user of its backends.
    fn unlist_backends(&mut self, port: &Port, work: &mut Work) {
        for listed in &port.backends {
            if let Some(backend) = self.backends.get_mut(listed.id()) {
                backend.users -= 1;
                backend.local_users -= u32::from(listed.is_local());
                work.left.push(listed.id());
            }
        }
    }

    fn change_claims(&mut self, name: &Arc<PortName>, old: Option<&Port>, new: &Port, work: &mut Work) {
        let same = |old: &Port| !old.is_held && old.frontends == new.frontends && old.created == new.created;
        if old.is_some_and(same) {
            return;
        }
        let listed = |at: &FrontendAddr| new.frontends.iter().any(|frontend| frontend.at == *at);
        for frontend in old.iter().flat_map(|old| &old.frontends).filter(|frontend| !listed(&frontend.at)) {
            self.claims.withdraw(frontend.at, name);
            work.frontend(frontend.at, Some(name.service()));
        }
        for frontend in &new.frontends {
            self.claims.put(frontend.at, claim(name, new, frontend));
            work.frontend(frontend.at, Some(name.service()));
        }
    }

    /// Takes everything from a service port.
    fn withdraw_port(&mut self, name: &Arc<PortName>, work: &mut Work) {
        let Some(port) = self.ports.remove(name) else { return };
        work.lost.extend(self.lost(name, &port, None));
        self.unlist_backends(&port, work);
        for frontend in &port.frontends {
            self.claims.withdraw(frontend.at, name);
            work.frontend(frontend.at, Some(name.service()));
        }
        self.slots.rest(port.stretch, self.epoch);
        self.service_ids.rest(port.id.0, self.epoch);
        let id = Retired { id: port.id, sources: port.sources };
        work.retired_services.push((Some(name.service().clone()), id));
    }

    /// Lets go of what nobody accounts for.
    fn drop_orphans(&mut self, work: &mut Work) {
        let orphans = std::mem::take(&mut self.orphans);
        for (retired, stretch) in orphans.services {
            self.slots.rest(stretch, self.epoch);
            self.service_ids.rest(retired.id.0, self.epoch);
            work.retired_services.push((None, retired));
        }
        // A service that found no room stays as it was, with what its slots name.
        let is_named = |id: &BackendId| self.ports.values().any(|port| port.slots.contains(id));
        let (named, unnamed): (Vec<_>, Vec<_>) = orphans.backends.into_iter().partition(is_named);
        self.orphans.backends = named;
        for id in unnamed {
            self.backend_ids.rest(id.0, self.epoch);
            work.retired_backends.push(id);
        }
        for id in orphans.unlisted {
            if let Some(backend) = self.backends.get_mut(id) {
                backend.users -= 1;
                work.left.push(id);
            }
        }
    }
}

/// The claim of a port on one of its frontends.
pub(super) fn claim(name: &Arc<PortName>, port: &Port, frontend: &PlannedFrontend) -> Claim {
    Claim {
        is_held: port.is_held,
        kind: frontend.kind,
        created: port.created,
        owner: name.clone(),
        value: FrontendValue { service: port.id.0, flags: frontend.flags },
    }
}

/// The local set of a port, if it is about to become empty while the cluster set moves to other slots: it moves along until
/// no frontend asks for it, so that all slots of a record are always in one stretch.
fn leaving(port: &Port, layout: &Layout) -> Vec<BackendId> {
    let is_emptied = layout.local.count == 0 && layout.cluster.count > 0;
    let Some(record) = port.record.filter(|_| is_emptied) else { return Vec::new() };
    let old = Range::unpack(record.local);
    let first = (old.base.saturating_sub(port.stretch.base)) as usize;
    port.slots.iter().skip(first).take(old.count as usize).copied().collect()
}

/// True if nothing differs that this node's entries depend on.
fn is_same_node(old: &Snapshot, new: &Snapshot) -> bool {
    let same_objects = old.nodes.ptr_eq(&new.nodes) && old.service_cidrs.ptr_eq(&new.service_cidrs);
    same_objects && Arc::ptr_eq(&old.facts, &new.facts) && old.is_settled() == new.is_settled()
}

/// Services with an endpoint of which only the address says whether it runs here, and it is one of these.
fn services_at(addresses: &BTreeSet<Addr>, next: &Snapshot) -> Vec<ServiceKey> {
    let is_there = |endpoint: &Endpoint| endpoint.node.is_none() && addresses.contains(&endpoint.addr);
    let has_one = |endpoints: &Endpoints| {
        let mut subsets = endpoints.groups().iter().flat_map(|group| group.subsets.iter());
        subsets.any(|subset| subset.endpoints.iter().any(is_there))
    };
    // Hardly ever are there any.
    let all = next.endpoints.iter().filter(|_| !addresses.is_empty());
    all.filter(|(_, endpoints)| has_one(endpoints)).map(|(key, _)| key.clone()).collect()
}

/// Services of which the object or the endpoints differ.
fn differing(old: &Snapshot, new: &Snapshot) -> BTreeSet<ServiceKey> {
    let services = old.services.diff(&new.services).map(key_of);
    let endpoints = old.endpoints.diff(&new.endpoints).map(key_of);
    services.chain(endpoints).cloned().collect()
}

fn key_of<'a, V>(item: imbl::ordmap::DiffItem<'a, 'a, ServiceKey, V>) -> &'a ServiceKey {
    match item {
        imbl::ordmap::DiffItem::Add(key, _) | imbl::ordmap::DiffItem::Remove(key, _) => key,
        imbl::ordmap::DiffItem::Update { new: (key, _), .. } => key,
    }
}

fn record(layout: &Layout, stretch: Stretch, affinity: u32) -> ServiceRecord {
    let place = |range: Range| match range.count {
        0 => range.pack(),
        count => Range { base: stretch.base + range.base, count }.pack(),
    };
    let fingerprint = fingerprint(layout);
    ServiceRecord { cluster: place(layout.cluster), local: place(layout.local), affinity, fingerprint }
}

/// A number that is the same for the same sets, and hardly ever for others: FNV-1a (Fowler, Noll, Vo) over words. Never zero,
/// which is nobody's.
fn fingerprint(layout: &Layout) -> u32 {
    let ranges = [layout.cluster, layout.local].into_iter().flat_map(|range| [range.base, range.count]);
    let backends = layout.slots.iter().flat_map(|at| at.addr.0.into_iter().chain([u32::from(at.port.0)]));
    ranges
        .chain(backends)
        .flat_map(u32::to_le_bytes)
        .fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
        | 1
}
