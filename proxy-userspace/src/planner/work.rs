//! One step under way: what it has touched, and how the result becomes a plan once all counts are final.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::address::{AddressClass, port_index};
use proxy_common::abi::config::{Cidr, MAX_CIDRS};
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::{Range, ServiceRecord, Slot};
use proxy_common::addr::{Addr, Proto};

use super::backends::{Backends, Programmed};
use super::claims::Remark;
use super::ids::{BackendId, Epoch};
use super::key::{BackendAddr, FrontendAddr, PortName};
use super::node::NodeView;
use super::plan::{Cidrs, Group, Op, Plan, Subject};
use super::stale::Lost;
use super::state::{Port, Retired, State};
use super::usage::Ports;
use crate::model::ServiceKey;

/// What a step has touched so far. Long lists, not many small ones: they lie apart from what stays.
#[derive(Default, Debug)]
pub(super) struct Work {
    /// Changes for the node itself.
    node: Vec<Op>,
    /// Service ports that were planned and differ.
    pub ports: Vec<Touched>,
    /// Backends that lost a user.
    pub left: Vec<BackendId>,
    /// Service ids that are no longer used, and for whom they were.
    pub retired_services: Vec<(Option<ServiceKey>, Retired)>,
    /// Backend ids that are no longer used.
    pub retired_backends: Vec<BackendId>,
    /// Frontends whose claims changed, and a service whose claim it was.
    frontends: BTreeMap<FrontendAddr, Option<ServiceKey>>,
    /// Frontends that get another value, and whose they are then.
    points: Vec<(ServiceKey, FrontendAddr, FrontendValue)>,
    /// Frontends that go, and whose they were.
    withdrawals: Vec<(Option<ServiceKey>, FrontendAddr)>,
    /// Addresses that may have lost a use.
    addresses: BTreeSet<Addr>,
    /// Words of ports that may have lost a use.
    words: BTreeSet<u32>,
    /// Frontends about which services may have to be told something.
    remarked: BTreeSet<FrontendAddr>,
    /// Services whose problems may have changed.
    pub told: BTreeSet<ServiceKey>,
    /// What may have left connections behind.
    pub lost: Vec<Lost>,
}

/// A service port that differs from before.
#[derive(Debug)]
pub(super) struct Touched {
    /// Which.
    pub name: Arc<PortName>,
    /// Its id has no name yet.
    pub is_new: bool,
    /// Its slots have to be written.
    pub has_new_slots: bool,
    /// The record before, if it is known.
    pub old_record: Option<ServiceRecord>,
    /// The source ranges before.
    pub old_sources: Box<[IpNet]>,
    /// Members of the old local set behind its new slots.
    pub leaving: Vec<BackendId>,
}

/// What a step does for one service.
#[derive(Default, Debug)]
struct ServiceWork {
    ports: Vec<Touched>,
    points: Vec<(FrontendAddr, FrontendValue)>,
    withdrawals: Vec<FrontendAddr>,
    retired: Vec<Retired>,
}

/// What belongs to no single service, and comes last.
#[derive(Default, Debug)]
struct Leftovers {
    now: Vec<Op>,
    after_grace: Vec<Op>,
}

impl Work {
    /// The claims on a frontend have changed.
    pub(super) fn frontend(&mut self, at: FrontendAddr, service: Option<&ServiceKey>) {
        self.frontends.insert(at, service.cloned());
    }

    /// What has been touched, by service; the rest goes to `leftovers`.
    fn by_service(&mut self, leftovers: &mut Leftovers) -> BTreeMap<ServiceKey, ServiceWork> {
        let mut services = BTreeMap::<ServiceKey, ServiceWork>::new();
        for touched in std::mem::take(&mut self.ports) {
            services.entry(touched.name.service().clone()).or_default().ports.push(touched);
        }
        for (service, at, value) in std::mem::take(&mut self.points) {
            services.entry(service).or_default().points.push((at, value));
        }
        for (service, at) in std::mem::take(&mut self.withdrawals) {
            match service {
                Some(service) => services.entry(service).or_default().withdrawals.push(at),
                None => leftovers.now.push(Op::DeleteFrontend { at }),
            }
        }
        for (service, retired) in std::mem::take(&mut self.retired_services) {
            match service {
                Some(service) => services.entry(service).or_default().retired.push(retired),
                None => {
                    let Retired { id, sources } = retired;
                    leftovers.now.extend(sources.into_iter().map(|net| Op::ForbidSource { id, net }));
                    leftovers.after_grace.push(Op::RetireService { id });
                }
            }
        }
        services
    }
}

impl State {
    /// Looks at everything in the tables once.
    pub(super) fn touch_everything(&mut self, work: &mut Work) {
        work.node.extend(Ports::words().filter_map(|word| self.port_uses.reveal(word)));
        work.words.extend(Ports::words());
        work.addresses.extend(self.addresses.all().map(|(addr, _)| addr));
        for at in self.claims.addresses() {
            work.frontend(at, None);
        }
    }

    /// Takes what this node is: its prefixes and its addresses. As long as some source has not listed, what the tables
    /// say of them is not taken away.
    pub(super) fn take_node(&mut self, node: &NodeView, is_complete: bool, work: &mut Work) {
        let cidrs = if is_complete { node.cidrs.clone() } else { self.cidrs_and(&node.cidrs) };
        if cidrs != self.cidrs {
            self.cidrs = cidrs.clone();
            work.node.push(Op::PutCidrs(Box::new(cidrs)));
        }
        let known = std::mem::replace(&mut self.node_addresses, node.addresses.keys().copied().collect());
        for addr in known.into_iter().filter(|addr| !node.addresses.contains_key(addr)) {
            self.addresses.at(addr).set_node(0);
            work.addresses.insert(addr);
        }
        for (addr, class) in &node.addresses {
            let uses = self.addresses.at(*addr);
            let kept = if is_complete { 0 } else { uses.node() & AddressClass::NODE_PORT };
            uses.set_node(class | kept);
            work.node.extend(self.addresses.reveal(*addr));
            work.addresses.insert(*addr);
        }
    }

    /// Prefixes, together with those that are programmed.
    fn cidrs_and(&self, new: &Cidrs) -> Cidrs {
        let both = |new: &[Cidr], known: &[Cidr]| {
            let more = known.iter().filter(|cidr| !new.contains(cidr));
            new.iter().chain(more).copied().take(MAX_CIDRS).collect()
        };
        Cidrs {
            service: both(&new.service, &self.cidrs.service),
            cluster: new.cluster.clone(),
            pod: both(&new.pod, &self.cidrs.pod),
        }
    }

    /// The plan of a step that has planned all its services.
    pub(super) fn finish(&mut self, mut work: Work) -> Plan {
        for (at, toucher) in std::mem::take(&mut work.frontends) {
            self.settle_frontend(at, toucher, &mut work);
        }
        let mut plan = Plan { epoch: self.epoch, ..Plan::default() };
        plan.push(Subject::Node, std::mem::take(&mut work.node), Vec::new());
        let mut leftovers = Leftovers::default();
        for (key, service) in work.by_service(&mut leftovers) {
            let (now, after_grace) = self.settle_service(service, &mut work, &mut leftovers);
            plan.push(Subject::Service(key), now, after_grace);
        }
        self.settle_leftovers(&mut work, &mut leftovers);
        plan.push(Subject::Leftovers, leftovers.now, leftovers.after_grace);
        for at in std::mem::take(&mut work.remarked) {
            self.settle_remarks(at, &mut work);
        }
        plan.lost = std::mem::take(&mut work.lost);
        plan.problems = work.told.iter().map(|key| (key.clone(), self.problems_of(key))).collect();
        plan
    }

    /// Compares the winner of a frontend with the table.
    fn settle_frontend(&mut self, at: FrontendAddr, toucher: Option<ServiceKey>, work: &mut Work) {
        work.remarked.insert(at);
        if at.is_node_port() && at.proto == Proto::TCP {
            work.told.extend(self.checks.claimants(at.port).cloned());
        }
        let entry = self.claims.entry(at);
        let known = entry.programmed;
        let winner = entry.winner().map(|claim| (claim.owner.service().clone(), claim.value));
        let value = winner.as_ref().map(|(_, value)| *value);
        entry.programmed = value;
        if known == value {
            return;
        }
        // Who has lost it to another still has its connections.
        let outbid = known.and_then(|known| entry.losers().iter().find(|claim| claim.value.service == known.service));
        let outbid = outbid.map(|claim| claim.owner.clone());
        work.lost.extend(outbid.and_then(|owner| self.outbid(&owner, at)));
        self.count_frontend(at, known, value, work);
        match winner {
            Some((service, value)) => work.points.push((service, at, value)),
            None => work.withdrawals.push((toucher, at)),
        }
    }

    /// Counts what a frontend was out and what it will be in.
    fn count_frontend(
        &mut self,
        at: FrontendAddr,
        old: Option<FrontendValue>,
        new: Option<FrontendValue>,
        work: &mut Work,
    ) {
        if at.is_node_port() {
            work.words.insert(port_index(at.port).0);
            match (old, new) {
                (None, Some(_)) => self.port_uses.add(at.port),
                (Some(_), None) => self.port_uses.remove(at.port),
                _ => {}
            }
            return;
        }
        work.addresses.insert(at.addr);
        let uses = self.addresses.at(at.addr);
        uses.frontends = uses.frontends + u32::from(new.is_some()) - u32::from(old.is_some());
        uses.cluster_ips = uses.cluster_ips + cluster_ip(new) - cluster_ip(old);
    }

    /// The changes of one service, in order.
    fn settle_service(
        &mut self,
        service: ServiceWork,
        work: &mut Work,
        leftovers: &mut Leftovers,
    ) -> (Vec<Op>, Vec<Op>) {
        let mut now = Vec::new();
        let mut addresses = BTreeSet::new();
        for touched in &service.ports {
            self.prepare_port(touched, &mut now, &mut addresses, work, leftovers);
        }
        let points = service.points.iter().map(|(at, value)| Op::PutFrontend { at: *at, value: *value });
        now.extend(points);
        let words: BTreeSet<_> = node_ports(&service.points).map(|at| port_index(at.port).0).collect();
        addresses.extend(service.points.iter().map(|(at, _)| *at).filter(|at| !at.is_node_port()).map(|at| at.addr));
        now.extend(addresses.into_iter().filter_map(|addr| self.addresses.reveal(addr)));
        now.extend(words.into_iter().filter_map(|word| self.port_uses.reveal(word)));
        now.extend(service.withdrawals.into_iter().map(|at| Op::DeleteFrontend { at }));
        let retire = |Retired { id, sources }: Retired| {
            let forbid = sources.into_iter().map(move |net| Op::ForbidSource { id, net });
            forbid.chain([Op::RetireService { id }])
        };
        (now, service.retired.into_iter().flat_map(retire).collect())
    }

    /// Name, backends, slots and record of a port.
    fn prepare_port(
        &mut self,
        touched: &Touched,
        now: &mut Vec<Op>,
        addresses: &mut BTreeSet<Addr>,
        work: &mut Work,
        leftovers: &mut Leftovers,
    ) {
        let Some(port) = self.ports.get(&touched.name) else { return };
        if touched.is_new {
            now.push(Op::PutName { id: port.id, name: touched.name.clone() });
        }
        for listed in &port.backends {
            if let Some((at, op)) = put_backend(&mut self.backends, listed.id()) {
                addresses.insert(at.addr);
                if self.claims.get(&as_frontend(at)).is_some() {
                    work.remarked.insert(as_frontend(at));
                }
                now.push(op);
            }
        }
        if touched.has_new_slots && port.stretch.count > 0 {
            now.push(write_slots(port, &touched.leaving));
        }
        let (id, old, new) = (port.id, &touched.old_sources, &port.sources);
        let added = new.iter().filter(|net| old.binary_search(net).is_err());
        now.extend(added.map(|net| Op::AllowSource { id, net: *net }));
        let lost = old.iter().filter(|net| new.binary_search(net).is_err());
        leftovers.now.extend(lost.map(|net| Op::ForbidSource { id, net: *net }));
        publish(port, touched, now, leftovers);
    }

    /// Takes away what has lost its last user.
    fn settle_leftovers(&mut self, work: &mut Work, leftovers: &mut Leftovers) {
        let mut left = std::mem::take(&mut work.left);
        left.sort_unstable();
        left.dedup();
        for id in left {
            leftovers.now.extend(put_backend(&mut self.backends, id).map(|(_, op)| op));
            self.retire_unused_backend(id, work);
        }
        leftovers.now.extend(work.addresses.iter().filter_map(|addr| self.addresses.conceal(*addr)));
        leftovers.now.extend(work.words.iter().filter_map(|word| self.port_uses.conceal(*word)));
        leftovers.after_grace.extend(work.retired_backends.iter().map(|id| Op::RetireBackend { id: *id }));
    }

    fn retire_unused_backend(&mut self, id: BackendId, work: &mut Work) {
        if self.backends.get_mut(id).is_none_or(|backend| backend.users > 0) {
            return;
        }
        if let Some(backend) = self.backends.remove(id) {
            self.addresses.at(backend.at.addr).backends -= 1;
            self.backend_ids.rest(id.0, self.epoch);
            work.addresses.insert(backend.at.addr);
            work.retired_backends.push(id);
            if self.claims.get(&as_frontend(backend.at)).is_some() {
                work.remarked.insert(as_frontend(backend.at));
            }
        }
    }

    /// Brings what services are told about a frontend up to date.
    fn settle_remarks(&mut self, at: FrontendAddr, work: &mut Work) {
        let is_backend = self.backends.find(&as_backend(at)).is_some();
        let entry = self.claims.entry(at);
        let lost = entry.losers().iter().map(|claim| (claim.owner.service().clone(), Remark::Conflict));
        let own = entry.winner().filter(|_| is_backend).map(|claim| (claim.owner.service().clone(), Remark::IsBackend));
        let new: Vec<_> = lost.chain(own).collect();
        let old = std::mem::replace(&mut entry.remarks, new.clone());
        for (service, remark) in &old {
            self.remarks.remove(&(service.clone(), at, *remark));
        }
        self.remarks.extend(new.iter().map(|(service, remark)| (service.clone(), at, *remark)));
        work.told.extend(old.into_iter().chain(new).map(|(service, _)| service));
        self.claims.tidy(at);
    }
}

/// The change that makes the table say what a backend is, and its address; if it does not.
fn put_backend(backends: &mut Backends, id: BackendId) -> Option<(BackendAddr, Op)> {
    let backend = backends.get_mut(id)?;
    let wanted = backend.wanted();
    if wanted == backend.programmed || wanted == Programmed::Absent {
        return None;
    }
    backend.programmed = wanted;
    Some((backend.at, Op::PutBackend { id, record: backend.record() }))
}

fn write_slots(port: &Port, leaving: &[BackendId]) -> Op {
    let slots = port.slots.iter().chain(leaving).map(|backend| Slot { backend: backend.0, owner: port.id.0 });
    Op::WriteSlots { base: port.stretch.base, slots: slots.collect() }
}

/// Publishes a port's record. A set that becomes empty is published last: a frontend that leaves for another service must
/// not meet it.
fn publish(port: &Port, touched: &Touched, now: &mut Vec<Op>, leftovers: &mut Leftovers) {
    let Some(new) = port.record else { return };
    let Some(old) = touched.old_record else { return now.push(Op::PublishService { id: port.id, record: new }) };
    let is_empty = |word: u64| Range::unpack(word).count == 0;
    let left = Range { base: port.stretch.base + port.slots.len() as u32, count: touched.leaving.len() as u32 };
    let old_local = if left.count > 0 { left.pack() } else { old.local };
    let mut first = ServiceRecord {
        cluster: if is_empty(new.cluster) { old.cluster } else { new.cluster },
        local: if is_empty(new.local) { old_local } else { new.local },
        ..new
    };
    if first != new {
        first.fingerprint = old.fingerprint;
    }
    if first != old {
        now.push(Op::PublishService { id: port.id, record: first });
    }
    if first != new {
        leftovers.now.push(Op::PublishService { id: port.id, record: new });
    }
}

impl Plan {
    /// A plan of changes that belong to nobody.
    pub(super) fn of_leftovers(epoch: Epoch, ops: impl IntoIterator<Item = Op>) -> Self {
        let mut plan = Self { epoch, ..Self::default() };
        plan.push(Subject::Leftovers, ops.into_iter().collect(), Vec::new());
        plan
    }

    fn push(&mut self, subject: Subject, now: Vec<Op>, after_grace: Vec<Op>) {
        if !now.is_empty() || !after_grace.is_empty() {
            self.groups.push(Group { subject, now, after_grace });
        }
    }
}

fn node_ports(points: &[(FrontendAddr, FrontendValue)]) -> impl Iterator<Item = FrontendAddr> {
    points.iter().map(|(at, _)| *at).filter(FrontendAddr::is_node_port)
}

fn cluster_ip(value: Option<FrontendValue>) -> u32 {
    u32::from(value.is_some_and(|value| value.has(FrontendValue::CLUSTER_IP)))
}

fn as_frontend(at: BackendAddr) -> FrontendAddr {
    FrontendAddr { addr: at.addr, port: at.port, proto: at.proto }
}

fn as_backend(at: FrontendAddr) -> BackendAddr {
    BackendAddr { addr: at.addr, port: at.port, proto: at.proto }
}
