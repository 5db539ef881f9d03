//! Operations that were refused, and the few that wait behind one of them.
//!
//! What can be refused are system calls: writes to hashes that are full or find no memory (frontends, addresses, names),
//! and in theory the others. Mapped arrays (backends, slots, service records) take every store. What an operation needs:
//!
//! | operation | needs | if that is refused |
//! |---|---|---|
//! | put backend, write slots, publish service | arrays only | cannot be: always tried, so that sets follow whatever waits |
//! | put frontend | the published record (array), the name of its service | waits for the name: a restart would take a frontend of a nameless service away |
//! | put address, put ports | its frontends, to be of use | tried: what is revealed too early finds no frontend |
//! | delete frontend, delete address | nothing | |
//! | retire service | no frontend that names it | waits, and with it whatever was freed then or later: see [`Backlog::frontends`] |
//! | retire backend | the slots of its former users (array) | cannot be |
//!
//! So one frontend that is refused for ever holds up nothing else, of its own service neither. There is at most one
//! operation for each entry of a table: a newer one makes an older one void, whoever it was for. Subjects are tried again
//! each at its own time. May touch: the kernel's random source, for these times.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use proxy_common::addr::Addr;
use tokio::time::Instant;

use super::backoff::Backoff;
use crate::planner::{BackendId, FrontendAddr, Op, ServiceId, Subject};

/// What is still to be done for one subject.
#[derive(Debug, Default)]
pub struct Waiting {
    /// By entry, in the order in which they are tried.
    ops: BTreeMap<Entry, Op>,
    /// How often they were tried.
    pub attempts: u32,
    /// What the tables said the last time, as a chain of causes.
    pub error: String,
    backoff: Backoff,
    /// When they are tried again, once that is settled.
    due: Option<Instant>,
}

/// An entry of a table. In this order a name comes before the frontends that need it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Entry {
    Cidrs,
    Backend(BackendId),
    Source(ServiceId, IpNet),
    Slots(u32),
    Record(ServiceId),
    Name(ServiceId),
    Frontend(FrontendAddr),
    Address(Addr),
    Ports(u32),
}

/// All that is still to be done.
#[derive(Debug, Default)]
pub struct Backlog {
    subjects: BTreeMap<Subject, Waiting>,
    /// For whom the operation on each entry is.
    entries: BTreeMap<Entry, Subject>,
}

/// Subjects that are due within this time of each other are tried together.
const TOGETHER: Duration = Duration::from_millis(500);

impl Backlog {
    /// True if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.subjects.is_empty()
    }

    /// What waits, by subject.
    pub fn iter(&self) -> impl Iterator<Item = (&Subject, &Waiting)> {
        self.subjects.iter()
    }

    /// True if something of a subject waits.
    pub fn holds(&self, subject: &Subject) -> bool {
        self.subjects.contains_key(subject)
    }

    /// True if an operation has to wait for one that was refused.
    pub fn blocks(&self, op: &Op) -> bool {
        needed_by(op).is_some_and(|entry| self.entries.contains_key(&entry))
    }

    /// True if an operation on the same entry waits, or one that this one needs.
    pub fn concerns(&self, op: &Op) -> bool {
        self.entries.contains_key(&entry(op)) || self.blocks(op)
    }

    /// Frontends that are not as they should be; what the table has of them may be of services that are gone.
    pub fn frontends(&self) -> impl Iterator<Item = &FrontendAddr> {
        let first = Entry::Frontend(FrontendAddr::FIRST);
        self.entries.range(first..).map_while(|(entry, _)| match entry {
            Entry::Frontend(at) => Some(at),
            _ => None,
        })
    }

    /// Keeps an operation that was refused (with the reason) or has to wait (without), in place of an older one on its
    /// entry.
    pub fn put(&mut self, subject: &Subject, op: Op, error: Option<String>) {
        self.forget(&op);
        let entry = entry(&op);
        self.entries.insert(entry, subject.clone());
        let waiting = self.subjects.entry(subject.clone()).or_default();
        waiting.ops.insert(entry, op);
        if let Some(error) = error {
            waiting.attempts = waiting.attempts.max(1);
            waiting.error = error;
        }
    }

    /// Drops what `newer` makes void.
    pub fn forget(&mut self, newer: &Op) {
        let entry = entry(newer);
        let Some(subject) = self.entries.remove(&entry) else { return };
        let waiting = self.subjects.get_mut(&subject).expect("entries name subjects that wait");
        waiting.ops.remove(&entry);
        if waiting.ops.is_empty() {
            self.subjects.remove(&subject);
        }
    }

    /// When to try again; from now on that is settled for all that wait.
    pub fn next_due(&mut self, now: Instant) -> Option<Instant> {
        let due = |waiting: &mut Waiting| {
            let Waiting { due, backoff, .. } = waiting;
            *due.get_or_insert_with(|| now + backoff.next_wait())
        };
        self.subjects.values_mut().map(due).min()
    }

    /// Tries with `apply` again what is due at `now` or soon after; what is refused stays.
    pub fn retry(&mut self, now: Instant, mut apply: impl FnMut(&Op) -> Result<(), String>) {
        let is_due = |waiting: &Waiting| waiting.due.is_none_or(|due| due <= now + TOGETHER);
        let due = self.subjects.iter().filter(|(_, waiting)| is_due(waiting)).map(|(subject, _)| subject.clone());
        for subject in due.collect::<Vec<_>>() {
            self.retry_subject(&subject, &mut apply);
        }
    }

    fn retry_subject(&mut self, subject: &Subject, apply: &mut impl FnMut(&Op) -> Result<(), String>) {
        let Some(waiting) = self.subjects.get_mut(subject) else { return };
        let mut refused = None;
        let entries = &mut self.entries;
        waiting.ops.retain(|entry, op| {
            if needed_by(op).is_some_and(|needed| entries.contains_key(&needed)) {
                return true;
            }
            match apply(op) {
                Ok(()) => _ = entries.remove(entry),
                Err(error) => refused = Some(error),
            }
            entries.contains_key(entry)
        });
        waiting.due = None;
        if let Some(error) = refused {
            waiting.attempts += 1;
            waiting.error = error;
        }
        if waiting.ops.is_empty() {
            self.subjects.remove(subject);
        }
    }
}

impl Waiting {
    /// How many operations wait.
    pub fn count(&self) -> usize {
        self.ops.len()
    }
}

/// What an operation is on.
fn entry(op: &Op) -> Entry {
    match op {
        Op::PutCidrs(_) => Entry::Cidrs,
        // A service that retires leaves with its name.
        Op::PutName { id, .. } | Op::RetireService { id } => Entry::Name(*id),
        Op::PutBackend { id, .. } | Op::RetireBackend { id } => Entry::Backend(*id),
        Op::AllowSource { id, net } | Op::ForbidSource { id, net } => Entry::Source(*id, *net),
        Op::WriteSlots { base, .. } => Entry::Slots(*base),
        Op::PublishService { id, .. } => Entry::Record(*id),
        Op::PutFrontend { at, .. } | Op::DeleteFrontend { at } => Entry::Frontend(*at),
        Op::PutAddress { addr, .. } | Op::DeleteAddress { addr } => Entry::Address(*addr),
        Op::PutPorts { index, .. } => Entry::Ports(*index),
    }
}

/// The entry that has to be written before an operation.
fn needed_by(op: &Op) -> Option<Entry> {
    match op {
        Op::PutFrontend { value, .. } => Some(Entry::Name(ServiceId(value.service))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::Arc;

    use proxy_common::abi::frontend::FrontendValue;
    use proxy_common::addr::{Port, Proto};

    use super::*;
    use crate::model::{Family, Name, ServiceKey, SourceId};
    use crate::planner::PortName;

    fn key(name: &str) -> ServiceKey {
        ServiceKey { source: SourceId::Manifests, namespace: Name::from("default"), name: Name::from(name) }
    }

    fn service(name: &str) -> Subject {
        Subject::Service(key(name))
    }

    fn put_name(id: u32) -> Op {
        let name = PortName::new(key("a"), Name::from("http"), Proto::TCP, Family::V4).unwrap();
        Op::PutName { id: ServiceId(id), name: Arc::new(name) }
    }

    fn at(last: u8) -> FrontendAddr {
        FrontendAddr { addr: Addr::from(Ipv4Addr::new(10, 96, 0, last)), port: Port(80), proto: Proto::TCP }
    }

    fn put_frontend(last: u8, service: u32) -> Op {
        Op::PutFrontend { at: at(last), value: FrontendValue { service, flags: 0 } }
    }

    /// Tries everything again; what was tried.
    fn retry(backlog: &mut Backlog, refuses: impl Fn(&Op) -> bool) -> Vec<Op> {
        let mut tried = Vec::new();
        backlog.retry(Instant::now(), |op| {
            tried.push(op.clone());
            if refuses(op) { Err("still full".into()) } else { Ok(()) }
        });
        tried
    }

    fn refused(backlog: &mut Backlog, subject: &Subject, op: Op) {
        backlog.put(subject, op, Some("full".into()));
    }

    #[test]
    fn only_a_frontend_waits_and_only_for_the_name_of_its_service() {
        let mut backlog = Backlog::default();
        refused(&mut backlog, &service("a"), put_frontend(1, 1));
        assert!(!backlog.blocks(&put_frontend(2, 1)));
        refused(&mut backlog, &service("a"), put_name(2));
        assert!(backlog.blocks(&put_frontend(2, 2)) && !backlog.blocks(&put_frontend(2, 1)));
        let others = [Op::DeleteFrontend { at: at(2) }, Op::RetireService { id: ServiceId(2) }];
        assert!(others.iter().all(|op| !backlog.blocks(op)));
    }

    #[test]
    fn a_name_is_tried_before_its_frontends_and_a_refusal_stops_nothing_else() {
        let mut backlog = Backlog::default();
        backlog.put(&service("a"), put_frontend(1, 7), None);
        for op in [put_name(7), put_frontend(2, 8), put_frontend(3, 8)] {
            refused(&mut backlog, &service("a"), op);
        }
        let tried = retry(&mut backlog, |op| [put_name(7), put_frontend(2, 8)].contains(op));
        assert_eq!(tried, [put_name(7), put_frontend(2, 8), put_frontend(3, 8)]);
        let (_, waiting) = backlog.iter().next().unwrap();
        assert_eq!((waiting.count(), waiting.attempts, waiting.error.as_str()), (3, 2, "still full"));
        assert_eq!(retry(&mut backlog, |_| false), [put_name(7), put_frontend(1, 7), put_frontend(2, 8)]);
        assert!(backlog.is_empty());
    }

    #[test]
    fn a_newer_operation_on_the_same_entry_voids_the_older_one_of_anybody() {
        let mut backlog = Backlog::default();
        refused(&mut backlog, &service("a"), put_frontend(1, 7));
        backlog.forget(&put_frontend(2, 7));
        assert!(!backlog.is_empty());
        refused(&mut backlog, &service("b"), Op::DeleteFrontend { at: at(1) });
        assert_eq!(backlog.iter().map(|(subject, _)| subject.clone()).collect::<Vec<_>>(), [service("b")]);
        refused(&mut backlog, &Subject::Leftovers, Op::RetireService { id: ServiceId(7) });
        backlog.forget(&put_name(7));
        backlog.forget(&put_frontend(1, 7));
        assert!(backlog.is_empty(), "an id that is used again must not be retired by an old operation");
    }

    #[test]
    fn frontends_under_way_are_known() {
        let mut backlog = Backlog::default();
        refused(&mut backlog, &service("a"), put_name(1));
        refused(&mut backlog, &service("a"), put_frontend(1, 1));
        refused(&mut backlog, &service("a"), Op::DeleteFrontend { at: at(2) });
        refused(&mut backlog, &service("a"), Op::DeleteAddress { addr: at(3).addr });
        assert_eq!(backlog.frontends().collect::<Vec<_>>(), [&at(1), &at(2)]);
    }

    #[test]
    fn a_refusal_that_lasts_does_not_delay_the_next_try_of_another_subject() {
        let (mut backlog, now) = (Backlog::default(), Instant::now());
        refused(&mut backlog, &service("a"), put_frontend(1, 1));
        let mut due = now;
        for _ in 0..12 {
            due = backlog.next_due(due).unwrap();
            backlog.retry(due, |_| Err("full".into()));
        }
        assert!(backlog.next_due(now).unwrap() > now + Duration::from_secs(10));
        refused(&mut backlog, &service("b"), put_frontend(2, 2));
        let due = backlog.next_due(now).unwrap();
        assert!(due < now + Duration::from_secs(1));
        let mut tried = Vec::new();
        backlog.retry(due, |op| {
            tried.push(op.clone());
            Ok(())
        });
        assert_eq!(tried, [put_frontend(2, 2)]);
    }
}
