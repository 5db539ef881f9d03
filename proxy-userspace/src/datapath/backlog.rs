//! Operations that were refused, and those that wait behind them: a pure queue for each subject.
//!
//! An operation of a service waits behind a refused one of the same service, since it may rest on it; the node's and
//! leftovers do not. A newer operation on the same entry makes an older one void, whoever it was for.
//! May touch: nothing.

use std::collections::{BTreeMap, VecDeque};

use crate::planner::{Op, Subject};

/// What is still to be done for one subject.
#[derive(Debug)]
pub struct Waiting {
    /// In order; the first was refused.
    pub ops: VecDeque<Op>,
    /// How often the first was tried.
    pub attempts: u32,
    /// What the tables said the last time, as a chain of causes.
    pub error: String,
}

/// All that is still to be done.
#[derive(Debug, Default)]
pub struct Backlog(BTreeMap<Subject, Waiting>);

impl Backlog {
    /// True if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What waits, by subject.
    pub fn iter(&self) -> impl Iterator<Item = (&Subject, &Waiting)> {
        self.0.iter()
    }

    /// True if new operations of `subject` have to wait for older ones.
    pub fn blocks(&self, subject: &Subject) -> bool {
        is_chain(subject) && self.0.contains_key(subject)
    }

    /// Puts an operation behind the others of its subject.
    pub fn push(&mut self, subject: &Subject, op: Op, error: Option<String>) {
        let waiting = self.0.entry(subject.clone()).or_insert_with(|| Waiting {
            ops: VecDeque::new(),
            attempts: 0,
            error: String::new(),
        });
        waiting.ops.push_back(op);
        if let Some(error) = error {
            waiting.attempts += 1;
            waiting.error = error;
        }
    }

    /// Drops what `newer` makes void.
    pub fn supersede(&mut self, newer: &Op) {
        for waiting in self.0.values_mut() {
            waiting.ops.retain(|older| !supersedes(newer, older));
        }
        self.0.retain(|_, waiting| !waiting.ops.is_empty());
    }

    /// Tries everything again with `apply`; what is refused stays, with what it blocks.
    pub fn retry(&mut self, mut apply: impl FnMut(&Op) -> Result<(), String>) {
        for (subject, waiting) in &mut self.0 {
            waiting.retry(is_chain(subject), &mut apply);
        }
        self.0.retain(|_, waiting| !waiting.ops.is_empty());
    }
}

impl Waiting {
    fn retry(&mut self, is_chain: bool, apply: &mut impl FnMut(&Op) -> Result<(), String>) {
        let mut refused = VecDeque::new();
        let mut was_refused = false;
        while let Some(op) = self.ops.pop_front() {
            if was_refused && is_chain {
                refused.push_back(op);
                continue;
            }
            if let Err(error) = apply(&op) {
                self.error = error;
                was_refused = true;
                refused.push_back(op);
            }
        }
        self.attempts += u32::from(was_refused);
        self.ops = refused;
    }
}

/// True if the operations of a subject rest on those before them.
fn is_chain(subject: &Subject) -> bool {
    matches!(subject, Subject::Service(_))
}

/// True if `older` need not, and must not, be done once `newer` is.
fn supersedes(newer: &Op, older: &Op) -> bool {
    use Op::{DeleteAddress, DeleteFrontend, PublishService, PutAddress, PutBackend, PutCidrs, PutFrontend, PutName};
    use Op::{PutPorts, RetireBackend, RetireService, WriteSlots};
    match (newer, older) {
        (PutCidrs(_), PutCidrs(_)) => true,
        (PutName { id: new, .. }, PutName { id: old, .. } | RetireService { id: old }) => new == old,
        (PublishService { id: new, .. }, PublishService { id: old, .. }) => new == old,
        (
            RetireService { id: new },
            PutName { id: old, .. } | PublishService { id: old, .. } | RetireService { id: old },
        ) => new == old,
        (
            PutBackend { id: new, .. } | RetireBackend { id: new },
            PutBackend { id: old, .. } | RetireBackend { id: old },
        ) => new == old,
        (WriteSlots { base: new, slots: new_slots }, WriteSlots { base: old, slots: old_slots }) => {
            overlap((*new, new_slots.len()), (*old, old_slots.len()))
        }
        (
            PutFrontend { at: new, .. } | DeleteFrontend { at: new },
            PutFrontend { at: old, .. } | DeleteFrontend { at: old },
        ) => new == old,
        (
            PutAddress { addr: new, .. } | DeleteAddress { addr: new },
            PutAddress { addr: old, .. } | DeleteAddress { addr: old },
        ) => new == old,
        (PutPorts { index: new, .. }, PutPorts { index: old, .. }) => new == old,
        _ => false,
    }
}

fn overlap((a, a_length): (u32, usize), (b, b_length): (u32, usize)) -> bool {
    let end = |base: u32, length: usize| base as usize + length;
    (a as usize) < end(b, b_length) && (b as usize) < end(a, a_length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Name, ServiceKey, SourceId};
    use crate::planner::{BackendId, ServiceId};
    use proxy_common::abi::backend::BackendRecord;
    use proxy_common::abi::service::{ServiceRecord, Slot};

    fn service(name: &str) -> Subject {
        let (namespace, name) = (Name::from("default"), Name::from(name));
        Subject::Service(ServiceKey { source: SourceId::Manifests, namespace, name })
    }

    fn put(id: u32) -> Op {
        Op::PutBackend { id: BackendId(id), record: BackendRecord::ZERO }
    }

    fn retire(id: u32) -> Op {
        Op::RetireBackend { id: BackendId(id) }
    }

    fn slots(base: u32, count: usize) -> Op {
        Op::WriteSlots { base, slots: vec![Slot::ZERO; count] }
    }

    #[test]
    fn a_service_waits_behind_its_refused_operation_and_no_other_does() {
        let mut backlog = Backlog::default();
        backlog.push(&service("a"), put(1), Some("full".into()));
        assert!(backlog.blocks(&service("a")));
        assert!(!backlog.blocks(&service("b")));
        backlog.push(&Subject::Node, put(2), Some("full".into()));
        assert!(!backlog.blocks(&Subject::Node));
    }

    #[test]
    fn retry_keeps_order_and_stops_a_service_at_the_first_refusal() {
        let mut backlog = Backlog::default();
        for id in 1..=3 {
            backlog.push(&service("a"), put(id), (id == 1).then(|| "full".into()));
        }
        let mut tried = Vec::new();
        backlog.retry(|op| {
            tried.push(op.clone());
            if *op == put(2) { Err("still full".into()) } else { Ok(()) }
        });
        assert_eq!(tried, [put(1), put(2)]);
        let (_, waiting) = backlog.iter().next().unwrap();
        assert_eq!(waiting.ops, [put(2), put(3)]);
        assert_eq!((waiting.attempts, waiting.error.as_str()), (2, "still full"));
        backlog.retry(|_| Ok(()));
        assert!(backlog.is_empty());
    }

    #[test]
    fn leftovers_do_not_wait_for_each_other() {
        let mut backlog = Backlog::default();
        backlog.push(&Subject::Leftovers, retire(1), Some("no".into()));
        backlog.push(&Subject::Leftovers, retire(2), None);
        backlog.retry(|op| if *op == retire(1) { Err("no".into()) } else { Ok(()) });
        assert_eq!(backlog.iter().next().unwrap().1.ops, [retire(1)]);
    }

    #[test]
    fn a_newer_operation_on_the_same_entry_voids_the_older_one_of_anybody() {
        let mut backlog = Backlog::default();
        backlog.push(&service("a"), retire(7), Some("no".into()));
        backlog.supersede(&put(8));
        assert!(!backlog.is_empty());
        backlog.supersede(&put(7));
        assert!(backlog.is_empty(), "a reused id must not be retired by an old operation");
    }

    #[test]
    fn retiring_a_service_voids_its_name_and_record() {
        let id = ServiceId(3);
        let publish = Op::PublishService { id, record: ServiceRecord::ZERO };
        assert!(supersedes(&Op::RetireService { id }, &publish));
        assert!(!supersedes(&publish, &Op::RetireService { id }), "the name is still to be removed");
    }

    #[test]
    fn slots_are_void_where_newer_ones_overlap() {
        assert!(supersedes(&slots(4, 4), &slots(7, 1)));
        assert!(supersedes(&slots(6, 1), &slots(4, 4)));
        assert!(!supersedes(&slots(4, 4), &slots(8, 4)));
        assert!(!supersedes(&slots(4, 0), &slots(4, 4)), "nothing is written");
    }
}
