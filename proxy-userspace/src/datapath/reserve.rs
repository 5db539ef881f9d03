//! Ports that the kernel shall not give to local sockets: those of rewritten sources, NodePorts, and health-check NodePorts.
//!
//! What others reserve stays theirs. What is reserved on our behalf is remembered in the pin directory, a note for each
//! range: a note is made before its ports are reserved, and removed after they are released, so a crash forgets nothing,
//! and `shunt cleanup` releases exactly these. A process that asks for such a port by number gets it: nothing is bound in its
//! place, as kube-proxy once did (that of 1.36 does nothing to keep NodePorts free, reserving included). Who has one all the
//! same is found by [`super::overlap`] and told.
//!
//! However many services change, a set of ports is one write to the kernel.
//! In a container whose /proc/sys is read-only they are reserved through /host/proc/sys/net, if that is there.
//! May touch: net.ipv4.ip_local_reserved_ports, notes in the pin directory.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use tracing::{info, warn};

use super::backoff::Backoff;
use super::pins::{self, Pins};
use crate::drain::Drain;
use crate::error::chain;
use crate::model::{Reader, Service, Snapshot};

/// Why ports cannot be reserved or released.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel's list.
    #[error("cannot {action} {path}")]
    Sysctl {
        /// "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel's list with unexpected content.
    #[error("{path} holds {text:?}, which is no list of port ranges")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// The notes.
    #[error(transparent)]
    Pins(#[from] pins::Error),
}

const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Where a container that may not write its own /proc/sys gets the node's (`deploy/kustomize/base/daemon-set.yaml`).
/// Whichever way it is reached, it speaks of the network namespace of who asks.
const ON_HOST: &str = "/host";

/// Longer than the longest list: every second port, by up to five digits and a comma.
const LONGEST: usize = 256 << 10;

/// A range of ports.
pub type PortRange = RangeInclusive<u16>;

/// A set of ports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSet(Box<[u64]>);

impl Default for PortSet {
    fn default() -> Self {
        Self(vec![0; 65536 / 64].into())
    }
}

impl FromIterator<PortRange> for PortSet {
    fn from_iter<T: IntoIterator<Item = PortRange>>(ranges: T) -> Self {
        let mut set = Self::default();
        ranges.into_iter().flatten().for_each(|port| set.insert(port));
        set
    }
}

impl PortSet {
    fn insert(&mut self, port: u16) {
        self.0[usize::from(port) / 64] |= 1 << (port % 64);
    }

    /// True if it has this port.
    pub fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port) / 64] >> (port % 64) & 1 == 1
    }

    /// The ports of both.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a | b).collect())
    }

    /// The ports that `other` has not.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a & !b).collect())
    }

    /// The same as ranges, in order, none beside the next.
    pub fn ranges(&self) -> Vec<PortRange> {
        let mut ranges: Vec<PortRange> = Vec::new();
        for port in (0..=u16::MAX).filter(|port| self.contains(*port)) {
            match ranges.last_mut() {
                Some(last) if *last.end() == port - 1 => *last = *last.start()..=port,
                _ => ranges.push(port..=port),
            }
        }
        ranges
    }

    /// As the kernel writes lists of ports.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for range in self.ranges() {
            let comma = if text.is_empty() { "" } else { "," };
            let _ = match range.start() == range.end() {
                true => write!(text, "{comma}{}", range.start()),
                false => write!(text, "{comma}{}-{}", range.start(), range.end()),
            };
        }
        text
    }

    fn parse(text: &str) -> Option<Self> {
        text.trim().split(',').filter(|part| !part.is_empty()).map(parse_range).collect()
    }
}

fn parse_range(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

const NOTE: &str = "reserved-";

fn note(range: &PortRange) -> String {
    format!("{NOTE}{}-{}", range.start(), range.end())
}

fn parse_note(name: &str) -> Option<PortRange> {
    parse_range(name.strip_prefix(NOTE)?)
}

/// What is reserved on our behalf.
#[derive(Debug)]
pub struct Reservation {
    pins: Pins,
    ours: PortSet,
    notes: BTreeSet<(u16, u16)>,
}

impl Reservation {
    /// What the notes of this and earlier agents say.
    pub fn open(pins: &Pins) -> Result<Self, Error> {
        let notes: Vec<PortRange> = pins.marks()?.iter().filter_map(|name| parse_note(name)).collect();
        Ok(Self {
            pins: pins.clone(),
            ours: notes.iter().cloned().collect(),
            notes: notes.iter().map(|range| (*range.start(), *range.end())).collect(),
        })
    }

    /// The ports that are reserved on our behalf.
    pub fn ours(&self) -> &PortSet {
        &self.ours
    }

    /// From now on, exactly `wanted` and what others reserved is reserved. True if that changed anything.
    pub fn set(&mut self, wanted: &PortSet) -> Result<bool, Error> {
        let reserved = read_reserved()?;
        let others = reserved.without(&self.ours);
        let next = wanted.without(&others);
        for range in next.without(&self.ours).ranges() {
            self.pins.mark(&note(&range))?;
            self.notes.insert((*range.start(), *range.end()));
        }
        let released = self.ours.without(&next);
        // Until they are released, those that are not wanted any more are remembered too.
        self.ours = self.ours.union(&next);
        let all = others.union(&next);
        let is_new = all != reserved;
        if is_new {
            write_reserved(&all)?;
        }
        self.forget(&released)?;
        self.ours = next;
        Ok(is_new)
    }

    /// Leaves notes of what is left of those with released ports.
    fn forget(&mut self, released: &PortSet) -> Result<(), Error> {
        let is_touched = |(first, last): &(u16, u16)| (*first..=*last).any(|port| released.contains(port));
        let touched: Vec<_> = self.notes.iter().copied().filter(is_touched).collect();
        for (first, last) in touched {
            for range in PortSet::from_iter([first..=last]).without(released).ranges() {
                self.pins.mark(&note(&range))?;
                self.notes.insert((*range.start(), *range.end()));
            }
            self.pins.unmark(&note(&(first..=last)))?;
            self.notes.remove(&(first, last));
        }
        Ok(())
    }
}

/// Undoes all that was reserved on our behalf, by whichever agent.
pub fn release(pins: &Pins) -> Result<(), Error> {
    let mut reservation = Reservation::open(pins)?;
    if !reservation.notes.is_empty() {
        reservation.set(&PortSet::default())?;
    }
    Ok(())
}

/// NodePorts of services, by how often each is asked for.
#[derive(Default, Debug)]
struct NodePorts {
    seen: Option<Arc<Snapshot>>,
    counts: BTreeMap<u16, u32>,
}

impl NodePorts {
    /// Follows to a snapshot; the work is in proportion to what differs. True if a port came or went.
    fn follow(&mut self, next: &Arc<Snapshot>) -> bool {
        let before = self.seen.replace(next.clone());
        let known: BTreeSet<u16> = self.counts.keys().copied().collect();
        let services = before.map(|before| before.services.clone()).unwrap_or_default();
        let mut changes = Vec::new();
        for item in services.diff(&next.services) {
            match item {
                DiffItem::Add(_, new) => changes.push((None, Some(new))),
                DiffItem::Remove(_, old) => changes.push((Some(old), None)),
                DiffItem::Update { old: (_, old), new: (_, new) } => changes.push((Some(old), Some(new))),
            }
        }
        for (old, new) in changes {
            new.into_iter().flat_map(|service| node_ports(service)).for_each(|port| self.add(port));
            old.into_iter().flat_map(|service| node_ports(service)).for_each(|port| self.remove(port));
        }
        !known.iter().eq(self.counts.keys())
    }

    fn add(&mut self, port: u16) {
        *self.counts.entry(port).or_default() += 1;
    }

    fn remove(&mut self, port: u16) {
        if let Some(count) = self.counts.get_mut(&port) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&port);
            }
        }
    }
}

/// Those of its ports, and the one of its health check.
fn node_ports(service: &Service) -> impl Iterator<Item = u16> {
    let ports = service.ports.iter().filter_map(|port| port.node_port);
    ports.chain(service.health_check).map(|port| port.0)
}

/// The reservation as a part of the agent.
#[derive(Debug)]
pub struct Task {
    reservation: Reservation,
    /// Ports of rewritten sources.
    sources: PortSet,
    snapshots: Reader,
    node_ports: NodePorts,
}

impl Task {
    /// Reserves `sources`, the range of ports for rewritten sources; what is reserved besides stays until all sources of
    /// services have listed.
    pub fn begin(pins: &Pins, sources: &PortRange, snapshots: Reader) -> Result<Self, Error> {
        let mut reservation = Reservation::open(pins)?;
        let sources: PortSet = [sources.clone()].into_iter().collect();
        let wanted = sources.union(reservation.ours());
        if reservation.set(&wanted)? {
            info!(ports = sources.text(), "source ports reserved");
        }
        Ok(Self { reservation, sources, snapshots, node_ports: NodePorts::default() })
    }

    /// Follows the NodePorts until the drain; then what is reserved stays.
    pub async fn run(mut self, mut drain: Drain) {
        let mut backoff = Backoff::default();
        self.snapshots.mark_changed();
        loop {
            tokio::select! {
                changed = self.snapshots.changed() => if changed.is_err() { return },
                () = drain.wait() => return,
            }
            while let Err(error) = tokio::task::block_in_place(|| self.follow()) {
                warn!(error = chain(&error), "NodePorts are not reserved, retrying");
                tokio::select! {
                    () = tokio::time::sleep(backoff.next_wait()) => {}
                    () = drain.wait() => return,
                }
            }
            backoff = Backoff::default();
        }
    }

    fn follow(&mut self) -> Result<(), Error> {
        let snapshot = self.snapshots.borrow_and_update().clone();
        let is_new = self.node_ports.follow(&snapshot);
        let has_listed = snapshot.pending.is_empty();
        let ports = self.node_ports.counts.keys().map(|port| *port..=*port);
        let mut wanted = self.sources.union(&ports.collect());
        if !has_listed {
            wanted = wanted.union(self.reservation.ours());
        }
        // Without news there may still be something to be released, or to be tried again.
        if is_new || wanted != *self.reservation.ours() {
            self.reservation.set(&wanted)?;
        }
        Ok(())
    }
}

/// The whole list. In one piece: a second read gives nothing (proc_do_large_bitmap, kernel/sysctl.c).
pub(super) fn read_reserved() -> Result<PortSet, Error> {
    let mut text = vec![0; LONGEST];
    let read = File::open(RESERVED).and_then(|mut file| file.read(&mut text)).map_err(sysctl("read"))?;
    let text = String::from_utf8_lossy(&text[..read]);
    PortSet::parse(&text).ok_or_else(|| Error::Unreadable { path: RESERVED.into(), text: text.into_owned() })
}

fn write_reserved(ports: &PortSet) -> Result<(), Error> {
    // An empty list is an empty line; an empty write changes nothing.
    let text = ports.text() + "\n";
    write_setting(RESERVED, &text).map_err(sysctl("write"))
}

/// Writes a setting of the kernel, given its path below /proc/sys; in a container that may not write that, by [`ON_HOST`].
pub(super) fn write_setting(path: &str, text: &str) -> io::Result<()> {
    match fs::write(path, text) {
        // Where there is no other way, the first answer is the one to be told.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            fs::write(format!("{ON_HOST}{path}"), text).map_err(|_| error)
        }
        result => result,
    }
}

fn sysctl(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Sysctl { action, path: RESERVED.into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Name, NodeFacts, Protocol, ServiceKey, ServicePort, SourceId};
    use proptest::prelude::*;
    use proxy_common::addr::Port;

    #[test]
    fn notes_come_back() {
        assert_eq!(parse_note(&note(&(10000..=29999))), Some(10000..=29999));
        assert_eq!(parse_note("reserved-x"), None);
    }

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for text in ["", "80", "9000,10000-29999", "0,2,4-6,65535", "0-65535"] {
            assert_eq!(PortSet::parse(&format!("{text}\n")).unwrap().text(), text);
        }
        assert_eq!(PortSet::parse("80-90,85-100,101").unwrap().text(), "80-101");
        assert_eq!(PortSet::parse("80;90"), None);
    }

    fn snapshot(services: &[(&str, &[u16])]) -> Arc<Snapshot> {
        let mut snapshot = Snapshot::empty(Arc::new(NodeFacts::named(Name::from("n"))), []);
        for (name, ports) in services {
            let key =
                ServiceKey { source: SourceId::Manifests, namespace: Name::from("default"), name: Name::from(*name) };
            let port = |port: &u16| ServicePort {
                name: Name::from(""),
                protocol: Protocol::Tcp,
                port: Port(80),
                node_port: Some(Port(*port)),
            };
            let service = Service {
                created: None,
                cluster_ips: Default::default(),
                ports: ports.iter().map(port).collect(),
                external_ips: Box::default(),
                load_balancer_ips: Box::default(),
                internal_policy: Default::default(),
                external_policy: Default::default(),
                affinity: None,
                health_check: None,
                source_ranges: Default::default(),
                stale: None,
            };
            snapshot.services.insert(key, Arc::new(service));
        }
        Arc::new(snapshot)
    }

    #[test]
    fn a_node_port_counts_for_as_long_as_a_service_has_it() {
        let mut ports = NodePorts::default();
        assert!(ports.follow(&snapshot(&[("a", &[30_000, 30_001]), ("b", &[30_000])])));
        assert!(!ports.follow(&snapshot(&[("a", &[30_001, 30_000]), ("b", &[30_000])])), "no port came or went");
        assert!(ports.follow(&snapshot(&[("b", &[30_000])])));
        assert_eq!(ports.counts.keys().collect::<Vec<_>>(), [&30_000]);
        assert!(ports.follow(&snapshot(&[])));
        assert!(ports.counts.is_empty());
    }

    proptest! {
        #[test]
        fn sets_are_sets(
            one in proptest::collection::vec((0u16..200, 0u16..200), 0..5),
            other in proptest::collection::vec((0u16..200, 0u16..200), 0..5),
        ) {
            let ranges = |pairs: &[(u16, u16)]| -> Vec<_> { pairs.iter().map(|(a, b)| *a.min(b)..=*a.max(b)).collect() };
            let (one, other) = (ranges(&one), ranges(&other));
            let has = |ranges: &[PortRange], port: u16| ranges.iter().any(|range| range.contains(&port));
            let (a, b): (PortSet, PortSet) = (one.iter().cloned().collect(), other.iter().cloned().collect());
            for port in 0..200 {
                prop_assert_eq!(a.union(&b).contains(port), has(&one, port) || has(&other, port));
                prop_assert_eq!(a.without(&b).contains(port), has(&one, port) && !has(&other, port));
            }
            let again: PortSet = a.ranges().into_iter().collect();
            prop_assert_eq!(&again, &a);
            prop_assert!(a.ranges().windows(2).all(|pair| u32::from(*pair[0].end()) + 1 < u32::from(*pair[1].start())));
        }
    }
}
