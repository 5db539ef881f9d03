//! What the tables say if nobody but the agent writes them: the operations that would write it.
//!
//! Told in parts, so that a look at all of it need not be one piece of work: first what is of this node, then service port by
//! service port, each with all that it needs. Only what is there is told: an entry that nobody should have made is none of it.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;

use proxy_common::abi::service::Slot;

use super::key::PortName;
use super::plan::{Op, Subject};
use super::state::{Port, State};
use super::usage::Ports;

/// How far a look has come. The default is the beginning.
#[derive(Clone, Debug, Default)]
pub struct Place(Option<Arc<PortName>>);

/// Some of what the tables say.
#[derive(Debug, Default)]
pub struct Stated {
    /// For whom, and the operation that would write it; in the order of a plan's stages for each subject.
    pub ops: Vec<(Subject, Op)>,
    /// Where the rest begins; `None` if that was all.
    pub rest: Option<Place>,
}

impl State {
    /// What the tables say of the next `most` service ports from `place` on, and at the beginning of this node.
    ///
    /// True of the tables once everything planned is done, `after_grace` included.
    pub fn stated(&self, place: &Place, most: usize) -> Stated {
        let mut stated = Stated::default();
        let from = match &place.0 {
            Some(name) => Bound::Excluded(name.clone()),
            None => {
                self.state_node(&mut stated);
                Bound::Unbounded
            }
        };
        let mut ports = self.ports.range((from, Bound::Unbounded));
        let mut last = None;
        for (name, port) in ports.by_ref().take(most) {
            self.state_port(name, port, &mut stated);
            last = Some(name);
        }
        stated.rest = last.filter(|_| ports.next().is_some()).map(|name| Place(Some(name.clone())));
        stated
    }

    fn state_node(&self, stated: &mut Stated) {
        let cidrs = Op::PutCidrs(Box::new(self.cidrs.clone()));
        let addresses = self.node_addresses.iter().filter_map(|addr| self.addresses.stated(*addr));
        let words = Ports::words().filter_map(|word| self.port_uses.stated(word));
        stated.ops.extend([cidrs].into_iter().chain(addresses).chain(words).map(|op| (Subject::Node, op)));
    }

    fn state_port(&self, name: &Arc<PortName>, port: &Port, stated: &mut Stated) {
        let id = port.id;
        let mut ops = vec![Op::PutName { id, name: name.clone() }];
        let mut addresses = BTreeSet::new();
        for listed in &port.backends {
            if let Some(backend) = self.backends.get(listed.id()) {
                ops.push(Op::PutBackend { id: listed.id(), record: backend.record() });
                addresses.insert(backend.at.addr);
            }
        }
        ops.extend(port.sources.iter().map(|net| Op::AllowSource { id, net: *net }));
        if let Some(record) = port.record {
            if !port.slots.is_empty() {
                let slots = port.slots.iter().map(|backend| Slot { backend: backend.0, owner: id.0 });
                ops.push(Op::WriteSlots { base: port.stretch.base, slots: slots.collect() });
            }
            ops.push(Op::PublishService { id, record });
        }
        for frontend in &port.frontends {
            let programmed = self.claims.get(&frontend.at).and_then(|entry| entry.programmed);
            if let Some(value) = programmed.filter(|value| value.service == id.0) {
                ops.push(Op::PutFrontend { at: frontend.at, value });
                addresses.insert(frontend.at.addr);
            }
        }
        ops.extend(addresses.into_iter().filter_map(|addr| self.addresses.stated(addr)));
        let subject = Subject::Service(name.service().clone());
        stated.ops.extend(ops.into_iter().map(|op| (subject.clone(), op)));
    }
}
