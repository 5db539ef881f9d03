//! One step under way: what it has touched, and how the result becomes a plan once all counts are final.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_common::abi::address::AddressClass;
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::{Cidr, MAX_CIDRS};
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::addr::Addr;

use super::claims::Remark;
use super::ids::ServiceId;
use super::key::{BackendAddr, FrontendAddr, PortName};
use super::node::NodeView;
use super::plan::{Cidrs, Group, Op, Plan, Subject};
use super::state::State;
use super::usage::Ports;
use crate::model::ServiceKey;

/// What a step has touched so far.
#[derive(Default, Debug)]
pub(super) struct Work {
    /// Changes for the node itself.
    node: Vec<Op>,
    services: BTreeMap<ServiceKey, ServiceWork>,
    /// Frontends whose claims changed, and a service whose claim it was.
    frontends: BTreeMap<FrontendAddr, Option<ServiceKey>>,
    /// Addresses that may have lost a use.
    addresses: BTreeSet<Addr>,
    /// Words of ports that may have lost a use.
    words: BTreeSet<u32>,
    /// Sets that become empty.
    emptied: Vec<Op>,
    /// Backends that lost a user.
    pub left: Vec<BackendAddr>,
    /// Frontends that are to be removed and whose service is not known.
    withdrawals: Vec<Op>,
    /// Changes for after the grace period that belong to no service.
    pub retired: Vec<Op>,
    /// Frontends about which services may have to be told something.
    remarked: BTreeSet<FrontendAddr>,
    /// Services whose problems may have changed.
    pub told: BTreeSet<ServiceKey>,
}

/// What a step does for one service.
#[derive(Default, Debug)]
struct ServiceWork {
    names: Vec<Op>,
    backends: Vec<BackendAddr>,
    writes: Vec<Op>,
    points: Vec<Op>,
    addresses: BTreeSet<Addr>,
    words: BTreeSet<u32>,
    withdrawals: Vec<Op>,
    retired: Vec<Op>,
}

impl Work {
    fn of(&mut self, key: &ServiceKey) -> &mut ServiceWork {
        if !self.services.contains_key(key) {
            self.services.insert(key.clone(), ServiceWork::default());
        }
        self.services.get_mut(key).expect("inserted above if it was missing")
    }

    /// A service id gets its name.
    pub(super) fn name(&mut self, id: ServiceId, name: &Arc<PortName>) {
        self.of(name.service()).names.push(Op::PutName { id, name: name.clone() });
    }

    /// Slots or a record are written.
    pub(super) fn write(&mut self, name: &PortName, op: Op) {
        self.of(name.service()).writes.push(op);
    }

    /// A record of which a set becomes empty is published after everything else.
    pub(super) fn empty(&mut self, op: Op) {
        self.emptied.push(op);
    }

    /// A service lists backends.
    pub(super) fn backends(&mut self, service: &ServiceKey, listed: impl Iterator<Item = BackendAddr>) {
        self.of(service).backends.extend(listed);
    }

    /// The claims on a frontend have changed.
    pub(super) fn frontend(&mut self, at: FrontendAddr, service: Option<&ServiceKey>) {
        self.frontends.insert(at, service.cloned());
    }

    /// A service id is no longer used.
    pub(super) fn retire_service(&mut self, service: &ServiceKey, id: ServiceId) {
        self.of(service).retired.push(Op::RetireService { id });
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
            work.node.push(Op::PutCidrs(cidrs));
        }
        let known = self.addresses.all().filter(|(_, uses)| uses.node != 0).map(|(addr, _)| addr);
        let gone: Vec<Addr> = known.filter(|addr| !node.addresses.contains_key(addr)).collect();
        for addr in gone {
            self.addresses.at(addr).node = 0;
            work.addresses.insert(addr);
        }
        for (addr, class) in &node.addresses {
            let uses = self.addresses.at(*addr);
            let kept = if is_complete { 0 } else { uses.node & AddressClass::NODE_PORT };
            uses.node = class | kept;
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
            self.settle_frontend(at, toucher.as_ref(), &mut work);
        }
        let mut plan = Plan { epoch: self.epoch, ..Plan::default() };
        plan.push(Subject::Node, std::mem::take(&mut work.node), Vec::new());
        for (key, service) in std::mem::take(&mut work.services) {
            let (now, after_grace) = self.settle_service(service, &mut work);
            plan.push(Subject::Service(key), now, after_grace);
        }
        self.settle_left_backends(&mut work, &mut plan);
        for at in std::mem::take(&mut work.remarked) {
            self.settle_remarks(at, &mut work);
        }
        plan.problems = work.told.iter().map(|key| (key.clone(), self.problems_of(key))).collect();
        plan
    }

    /// Compares the winner of a frontend with the table.
    fn settle_frontend(&mut self, at: FrontendAddr, toucher: Option<&ServiceKey>, work: &mut Work) {
        work.remarked.insert(at);
        let entry = self.claims.entry(at);
        let known = entry.programmed;
        let winner = entry.winner().map(|claim| (claim.value, claim.owner.clone()));
        entry.programmed = winner.as_ref().map(|(value, _)| *value);
        if known == entry.programmed {
            return;
        }
        self.count_frontend(at, known, winner.as_ref().map(|(value, _)| *value), work);
        match (winner, toucher) {
            (Some((value, owner)), _) => {
                let service = work.of(owner.service());
                service.points.push(Op::PutFrontend { at, value });
                match at.is_node_port() {
                    true => service.words.insert(port_word(&at)),
                    false => service.addresses.insert(at.addr),
                };
            }
            (None, Some(service)) => work.of(service).withdrawals.push(Op::DeleteFrontend { at }),
            (None, None) => work.withdrawals.push(Op::DeleteFrontend { at }),
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
            work.words.insert(port_word(&at));
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
    fn settle_service(&mut self, mut service: ServiceWork, work: &mut Work) -> (Vec<Op>, Vec<Op>) {
        let mut now = service.names;
        for at in service.backends {
            let before = now.len();
            now.extend(self.put_backend(at, work));
            if now.len() > before {
                service.addresses.insert(at.addr);
            }
        }
        now.append(&mut service.writes);
        now.append(&mut service.points);
        now.extend(service.addresses.into_iter().filter_map(|addr| self.addresses.reveal(addr)));
        now.extend(service.words.into_iter().filter_map(|word| self.port_uses.reveal(word)));
        now.append(&mut service.withdrawals);
        (now, service.retired)
    }

    /// The change that makes the table say what a backend is, if it does not.
    fn put_backend(&mut self, at: BackendAddr, work: &mut Work) -> Option<Op> {
        let backend = self.backends.get_mut(&at).filter(|backend| backend.users > 0)?;
        let flags = backend.flags();
        let known = backend.programmed.replace(flags);
        if known.is_none() {
            work.remarked.insert(as_frontend(at));
        }
        let record = BackendRecord {
            addr: at.addr,
            port: at.port.be(),
            proto: at.proto.0,
            state: BackendRecord::STATE_LIVE,
            flags,
        };
        (known != Some(flags)).then_some(Op::PutBackend { id: backend.id, record })
    }

    /// Takes away what has lost its last user.
    fn settle_left_backends(&mut self, work: &mut Work, plan: &mut Plan) {
        let mut now = std::mem::take(&mut work.emptied);
        let mut left = std::mem::take(&mut work.left);
        left.sort_unstable();
        left.dedup();
        for at in left {
            now.extend(self.put_backend(at, work));
            self.retire_unused_backend(at, work);
        }
        now.append(&mut work.withdrawals);
        now.extend(work.addresses.iter().filter_map(|addr| self.addresses.conceal(*addr)));
        now.extend(work.words.iter().filter_map(|word| self.port_uses.conceal(*word)));
        plan.push(Subject::Leftovers, now, std::mem::take(&mut work.retired));
    }

    fn retire_unused_backend(&mut self, at: BackendAddr, work: &mut Work) {
        if self.backends.get(&at).is_none_or(|backend| backend.users > 0) {
            return;
        }
        if let Some(backend) = self.backends.remove(&at) {
            self.addresses.at(at.addr).backends -= 1;
            self.backend_ids.rest(backend.id.0, self.epoch);
            work.addresses.insert(at.addr);
            work.remarked.insert(as_frontend(at));
            work.retired.push(Op::RetireBackend { id: backend.id });
        }
    }

    /// Brings what services are told about a frontend up to date.
    fn settle_remarks(&mut self, at: FrontendAddr, work: &mut Work) {
        let is_backend = self.backends.contains_key(&as_backend(at));
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

impl Plan {
    /// A plan of changes that belong to nobody.
    pub(super) fn of_leftovers(epoch: super::ids::Epoch, ops: impl IntoIterator<Item = Op>) -> Self {
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

fn port_word(at: &FrontendAddr) -> u32 {
    proxy_common::abi::address::port_index(at.port).0
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
