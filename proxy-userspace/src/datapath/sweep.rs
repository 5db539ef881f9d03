//! Removes flows that have outlived themselves, entries that lost their flow and marks of ports that no flow uses, and tells
//! which addresses no flow uses.
//!
//! The programs expire a flow when its client comes again; the sweep is for those whose clients do not. It goes through
//! the tables in slices with pauses, and looks at every entry twice: an expired one again right before it is removed (a
//! packet may have come meanwhile), one without its flow again in the next round (its flow may have been in the making).
//! May touch: flow entries and marks of kept ports, for reading and removing; address classes, for reading.

use std::collections::HashSet;
use std::time::Duration;

use proxy_common::abi::address::{AddressClass, PortWord};
use proxy_common::abi::flow::{FlowKey, FlowValue};
use proxy_common::addr::{Addr, Be16, Proto};
use proxy_common::lb::flow::{self, Hot, Seconds};
use proxy_common::lb::tuple::Tuple;
use tokio::sync::{mpsc, watch};
use tracing::{debug, warn};

use super::inspect::FlowState;
use super::kept::{self, Users};
use super::kernel::{self, MapFds};
use super::maps::{self, Error, MappedArray, Table, Walk};
use super::sys;
use crate::drain::Drain;
use crate::error::chain;

/// Between two rounds. The shortest lifetime of a flow is about twice that.
const INTERVAL: Duration = Duration::from_secs(15);
/// Between two slices.
const PAUSE: Duration = Duration::from_millis(1);
/// Addresses and kept ports are looked at in every such round: that takes going through all of them.
const ADDRESS_ROUNDS: u32 = 4;

/// One table of flows.
pub trait Entries {
    /// An entry.
    fn get(&self, key: &FlowKey) -> Result<Option<FlowValue>, Error>;
    /// Removes an entry; it may be gone.
    fn remove(&self, key: &FlowKey) -> Result<(), Error>;
}

impl Entries for Table<FlowKey, FlowValue> {
    fn get(&self, key: &FlowKey) -> Result<Option<FlowValue>, Error> {
        Table::get(self, key)
    }

    fn remove(&self, key: &FlowKey) -> Result<(), Error> {
        Table::remove(self, key).map(drop)
    }
}

/// The two tables of flows.
#[derive(Debug)]
pub struct Both<T> {
    /// Those whose return path is proven.
    pub established: T,
    /// The others, and what promotion left behind: older copies of established ones.
    pub pending: T,
}

/// Which of the two a slice is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// [`Both::established`].
    Established,
    /// [`Both::pending`].
    Pending,
}

/// What one round came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Entries looked at in [`Both::established`].
    pub established: usize,
    /// Entries looked at in [`Both::pending`].
    pub pending: usize,
    /// Flows that go on, by [`FlowState`] number.
    pub flows: [usize; FlowState::ALL.len()],
    /// Flows removed because they were over.
    pub expired: usize,
    /// Entries removed because they belonged to no flow.
    pub orphans: usize,
    /// Uses of ports that ended: no flow has them any more.
    pub unmarked: usize,
}

/// What the sweep tells.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Rounds done.
    pub rounds: u64,
    /// What the last one came to.
    pub last: Outcome,
    /// Flows that were removed in all rounds.
    pub expired: u64,
    /// Entries without a flow that were removed in all rounds.
    pub orphans: u64,
}

impl Report {
    fn add(&mut self, outcome: Outcome) {
        self.rounds += 1;
        self.expired += outcome.expired as u64;
        self.orphans += outcome.orphans as u64;
        self.last = outcome;
    }
}

/// The sweep without its clock and its tables.
#[derive(Debug, Default)]
pub struct Sweep {
    /// Established entries that had no flow in the round before.
    suspects: HashSet<FlowKey>,
    /// Those of this round.
    new_suspects: HashSet<FlowKey>,
    outcome: Outcome,
}

impl Sweep {
    /// Takes one slice of one table.
    pub fn take<T: Entries>(
        &mut self,
        tables: &Both<T>,
        origin: Origin,
        entries: impl IntoIterator<Item = (FlowKey, FlowValue)>,
        now: Seconds,
    ) -> Result<(), Error> {
        for (key, value) in entries {
            match origin {
                Origin::Established => self.outcome.established += 1,
                Origin::Pending => self.outcome.pending += 1,
            }
            if key.kind == FlowKey::PLAIN {
                if !self.expire(tables, origin, &key, &value, now)? {
                    self.count(tables, origin, &key, &value)?;
                }
            } else if origin == Origin::Established {
                self.check_orphan(tables, &key, &value)?;
            }
        }
        Ok(())
    }

    /// Ends a round.
    pub fn finish(&mut self) -> Outcome {
        self.suspects = std::mem::take(&mut self.new_suspects);
        std::mem::take(&mut self.outcome)
    }

    /// Counts a flow that goes on, by its entry that counts: an older copy in the pending table does not.
    fn count<T: Entries>(
        &mut self,
        tables: &Both<T>,
        origin: Origin,
        key: &FlowKey,
        value: &FlowValue,
    ) -> Result<(), Error> {
        if origin == Origin::Established || tables.established.get(key)?.is_none() {
            self.outcome.flows[FlowState::of(Hot::unpack(value.hot)) as usize] += 1;
        }
        Ok(())
    }

    /// Removes a flow that is over. True if it was.
    fn expire<T: Entries>(
        &mut self,
        tables: &Both<T>,
        origin: Origin,
        key: &FlowKey,
        copy: &FlowValue,
        now: Seconds,
    ) -> Result<bool, Error> {
        if !is_expired(key, copy, now) {
            return Ok(false);
        }
        let table = match origin {
            Origin::Established => &tables.established,
            Origin::Pending => &tables.pending,
        };
        let Some(value) = table.get(key)?.filter(|value| is_expired(key, value, now)) else { return Ok(false) };
        self.outcome.expired += 1;
        if origin == Origin::Established {
            remove_flow(&tables.established, key, &value)?;
        }
        // The copies that promotion left must not bring an expired flow back. An established flow does without them.
        remove_flow(&tables.pending, key, &value)?;
        Ok(true)
    }

    /// A front or snat entry needs a plain one, in either table: a flow is promoted entry by entry.
    fn check_orphan<T: Entries>(&mut self, tables: &Both<T>, key: &FlowKey, value: &FlowValue) -> Result<(), Error> {
        let plain = plain_of(key, value);
        if tables.established.get(&plain)?.is_some() || tables.pending.get(&plain)?.is_some() {
            return Ok(());
        }
        if !self.suspects.contains(key) {
            self.new_suspects.insert(*key);
            return Ok(());
        }
        self.outcome.orphans += 1;
        tables.established.remove(key)
    }
}

fn is_expired(key: &FlowKey, plain: &FlowValue, now: Seconds) -> bool {
    flow::is_expired(Proto(key.proto), Hot::unpack(plain.hot), now)
}

/// Removes a flow from one table, the forward entries first: a client that comes meanwhile opens a new flow. What stands
/// under a key but belongs to another flow stays: one with other ends, or one that began after this one's last packet.
fn remove_flow<T: Entries>(table: &T, plain_key: &FlowKey, plain: &FlowValue) -> Result<(), Error> {
    let ends = Ends::of(plain_key, plain);
    for key in [Some(ends.front_key()), ends.snat_key()].into_iter().flatten() {
        if table.get(&key)?.is_some_and(|value| plain_of(&key, &value) == *plain_key && !is_newer(&key, &value, plain))
        {
            table.remove(&key)?;
        }
    }
    if table.get(plain_key)?.is_some_and(|value| !is_newer(plain_key, &value, plain)) {
        table.remove(plain_key)?;
    }
    Ok(())
}

/// True if an entry is of a flow that began after the last packet of `plain`'s.
fn is_newer(key: &FlowKey, entry: &FlowValue, plain: &FlowValue) -> bool {
    let since = match key.kind {
        // When it took its port (`flow::Hold`).
        FlowKey::SNAT => Seconds::from_nanos(entry.hot),
        _ => Hot::unpack(entry.hot).seen,
    };
    since > Hot::unpack(plain.hot).seen
}

/// Who takes part in a flow, from its plain entry.
struct Ends {
    client: (Addr, Be16),
    frontend: (Addr, Be16),
    backend: (Addr, Be16),
    source: Option<(Addr, Be16)>,
    proto: Proto,
}

impl Ends {
    fn of(key: &FlowKey, plain: &FlowValue) -> Self {
        let (a, b) = ((key.a, key.a_port), (key.b, key.b_port));
        let (client, backend) = if plain.has(FlowValue::CLIENT_IS_A) { (a, b) } else { (b, a) };
        let own_port = if plain.alias_port.is_zero() { client.1 } else { plain.alias_port };
        Self {
            client: (client.0, own_port),
            frontend: (plain.peer, plain.peer_port),
            backend,
            source: plain.has(FlowValue::SNAT).then_some((plain.nat, plain.nat_port)),
            proto: Proto(key.proto),
        }
    }

    fn front_key(&self) -> FlowKey {
        tuple(self.client, self.frontend, self.proto).front_key()
    }

    fn snat_key(&self) -> Option<FlowKey> {
        self.source.map(|source| tuple(self.backend, source, self.proto).snat_key())
    }
}

fn tuple(src: (Addr, Be16), dst: (Addr, Be16), proto: Proto) -> Tuple {
    Tuple { src: src.0, dst: dst.0, sport: src.1, dport: dst.1, proto }
}

/// Key of the plain entry of the flow that a front or snat entry belongs to.
fn plain_of(key: &FlowKey, value: &FlowValue) -> FlowKey {
    let (a, peer, proto) = ((key.a, key.a_port), (value.peer, value.peer_port), Proto(key.proto));
    let to_backend = if key.kind == FlowKey::SNAT {
        tuple(peer, a, proto)
    } else {
        let port = if value.alias_port.is_zero() { key.a_port } else { value.alias_port };
        tuple((key.a, port), peer, proto)
    };
    to_backend.plain_key().0
}

/// Addresses that are looked up for flows alone, and whether any flow uses them.
#[derive(Debug, Default)]
pub struct Lingering {
    /// Unused in the round before.
    suspects: HashSet<Addr>,
    /// Not seen in use in this round.
    unseen: HashSet<Addr>,
}

impl Lingering {
    /// Begins a round with the addresses whose class has [`AddressClass::FLOWS`].
    fn begin(&mut self, addresses: HashSet<Addr>) {
        self.unseen = addresses;
    }

    fn see(&mut self, key: &FlowKey) {
        if key.kind == FlowKey::FRONT {
            self.unseen.remove(&key.b);
        }
    }

    /// Ends a round: what was unused in two rounds.
    fn finish(&mut self) -> Vec<Addr> {
        let unseen = std::mem::take(&mut self.unseen);
        let unused = unseen.intersection(&self.suspects).copied().collect();
        self.suspects = unseen;
        unused
    }
}

/// The sweep as a part of the agent.
pub struct Task {
    tables: Both<Table<FlowKey, FlowValue>>,
    addresses: Table<Addr, AddressClass>,
    kept_ports: MappedArray<PortWord>,
    unused: mpsc::Sender<Vec<Addr>>,
    sweep: Sweep,
    lingering: Lingering,
    /// Of the round under way, if it looks at ports.
    users: Option<Users>,
    report: watch::Sender<Report>,
}

impl Task {
    /// Opens the tables. Addresses that no flow uses any more go to `unused`.
    pub fn open(maps: &MapFds, unused: mpsc::Sender<Vec<Addr>>) -> Result<Self, kernel::Error> {
        let tables = Both { established: Table::open(maps, "flows")?, pending: Table::open(maps, "flows_pending")? };
        Ok(Self {
            tables,
            addresses: Table::open(maps, "addresses")?,
            kept_ports: MappedArray::open(maps, "kept_ports", true)?,
            unused,
            sweep: Sweep::default(),
            lingering: Lingering::default(),
            users: None,
            report: watch::Sender::default(),
        })
    }

    /// What it tells, after each round.
    pub fn watch(&self) -> watch::Receiver<Report> {
        self.report.subscribe()
    }

    /// Sweeps until the drain. A round that fails is given up; the next one begins anew.
    pub async fn run(mut self, mut drain: Drain) {
        for round in 0u32.. {
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = drain.wait() => return,
            }
            tokio::select! {
                result = self.round(round.is_multiple_of(ADDRESS_ROUNDS)) => if let Err(error) = result {
                    warn!(error = chain(&error), "flows were not swept");
                },
                () = drain.wait() => return,
            }
        }
    }

    /// Goes through both tables once; with `is_thorough`, looks for addresses and ports that no flow uses.
    pub async fn round(&mut self, is_thorough: bool) -> Result<Outcome, Error> {
        let marked = if is_thorough { self.marked_addresses()? } else { HashSet::new() };
        self.users = None;
        if is_thorough {
            self.begin_ports().await;
        }
        let is_looking = !marked.is_empty();
        // A round that failed may have left something.
        self.sweep.outcome = Outcome::default();
        self.lingering.begin(marked);
        // A flow moves from pending to established: in this order it is met in one of them.
        for origin in [Origin::Pending, Origin::Established] {
            self.walk(origin).await?;
        }
        let mut outcome = self.sweep.finish();
        if let Some(users) = self.users.take() {
            outcome.unmarked = kept::finish(self.kept_ports.words(), &users);
        }
        self.report.send_modify(|report| report.add(outcome));
        debug!(
            established = outcome.established,
            pending = outcome.pending,
            expired = outcome.expired,
            orphans = outcome.orphans,
            unmarked = outcome.unmarked,
            "flows swept"
        );
        if is_looking {
            let unused = self.lingering.finish();
            if !unused.is_empty() {
                // Nobody takes them any more if the agent ends.
                let _ = self.unused.send(unused).await;
            }
        }
        Ok(outcome)
    }

    async fn walk(&mut self, origin: Origin) -> Result<(), Error> {
        let table = match origin {
            Origin::Established => &self.tables.established,
            Origin::Pending => &self.tables.pending,
        };
        let mut walk = Walk::new(table);
        while let Some((keys, values)) = walk.next(table)? {
            let now = Seconds::from_nanos(sys::monotonic().as_nanos() as u64);
            keys.iter().for_each(|key| self.lingering.see(key));
            if let Some(users) = &mut self.users {
                keys.iter().for_each(|key| users.see(key));
            }
            let entries = keys.iter().copied().zip(values.iter().copied());
            self.sweep.take(&self.tables, origin, entries, now)?;
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// From now on, and in programs that run already when this is done, marks are set in a fresh generation.
    async fn begin_ports(&mut self) {
        kept::begin(self.kept_ports.words());
        // The flows of programs that saw the generation before are in the tables when these have ended.
        let waited = tokio::task::spawn_blocking(maps::wait_for_programs).await;
        waited.expect("the wait does not panic, and nobody aborts it");
        self.users = Some(Users::default());
    }

    fn marked_addresses(&self) -> Result<HashSet<Addr>, Error> {
        let mut marked = HashSet::new();
        self.addresses.for_each(|addr, class| {
            if class.has(AddressClass::FLOWS) {
                marked.insert(*addr);
            }
        })?;
        Ok(marked)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::net::Ipv4Addr;

    use proxy_common::addr::Port;
    use proxy_common::lb::flow::{Hold, lifetime};

    use super::*;

    #[derive(Debug, Default)]
    struct Map(RefCell<HashMap<FlowKey, FlowValue>>);

    impl Entries for Map {
        fn get(&self, key: &FlowKey) -> Result<Option<FlowValue>, Error> {
            Ok(self.0.borrow().get(key).copied())
        }

        fn remove(&self, key: &FlowKey) -> Result<(), Error> {
            self.0.borrow_mut().remove(key);
            Ok(())
        }
    }

    impl Map {
        fn put(&self, entries: &[(FlowKey, FlowValue)]) {
            self.0.borrow_mut().extend(entries.iter().copied());
        }

        fn all(&self) -> Vec<(FlowKey, FlowValue)> {
            self.0.borrow().iter().map(|(key, value)| (*key, *value)).collect()
        }
    }

    const NOW: Seconds = Seconds(100_000);

    fn end(last: u8, port: u16) -> (Addr, Be16) {
        (Addr::from(Ipv4Addr::new(10, 0, 0, last)), Port(port).be())
    }

    /// Entries of a UDP flow whose source is rewritten and whose client port is replaced, last seen `age` seconds ago.
    fn flow(client: u8, age: u32) -> [(FlowKey, FlowValue); 3] {
        let (own, alias) = (end(client, 5000), end(client, 6000));
        let (frontend, backend, source) = (end(100, 53), end(1, 5353), end(50, 10001 + u16::from(client)));
        let seen = Seconds(NOW.0 - Seconds::span(age));
        let base = FlowValue {
            hot: Hot { seen, state: Hot::ESTABLISHED }.pack(),
            nat: source.0,
            nat_port: source.1,
            flags: FlowValue::SNAT,
            ..FlowValue::ZERO
        };
        let (plain_key, client_is_a) = tuple(alias, backend, Proto::UDP).plain_key();
        let flags = base.flags | if client_is_a { FlowValue::CLIENT_IS_A } else { 0 };
        let plain = FlowValue { peer: frontend.0, peer_port: frontend.1, alias_port: own.1, flags, ..base };
        let front = FlowValue { peer: backend.0, peer_port: backend.1, alias_port: alias.1, ..base };
        let hold = Hold(u64::from(seen.0) << 30).0;
        let snat = FlowValue { hot: hold, peer: alias.0, peer_port: alias.1, ..base };
        [
            (plain_key, plain),
            (tuple(own, frontend, Proto::UDP).front_key(), front),
            (tuple(backend, source, Proto::UDP).snat_key(), snat),
        ]
    }

    fn both() -> Both<Map> {
        Both { established: Map::default(), pending: Map::default() }
    }

    fn round(sweep: &mut Sweep, tables: &Both<Map>) -> Outcome {
        sweep.take(tables, Origin::Established, tables.established.all(), NOW).unwrap();
        sweep.take(tables, Origin::Pending, tables.pending.all(), NOW).unwrap();
        sweep.finish()
    }

    #[test]
    fn an_expired_flow_goes_with_all_its_entries_and_copies_and_a_living_one_stays() {
        let tables = both();
        tables.established.put(&flow(1, lifetime::UDP_ANSWERED + 3));
        tables.pending.put(&flow(1, lifetime::UDP_ANSWERED + 9));
        tables.established.put(&flow(200, lifetime::UDP_ANSWERED - 3));
        let outcome = round(&mut Sweep::default(), &tables);
        assert_eq!(outcome.expired, 1);
        assert!(tables.pending.all().is_empty());
        let mut left = tables.established.all();
        left.sort_by_key(|(key, _)| key.kind);
        let mut living = flow(200, lifetime::UDP_ANSWERED - 3);
        living.sort_by_key(|(key, _)| key.kind);
        assert_eq!(left, living);
    }

    #[test]
    fn a_flow_is_counted_once_by_its_newest_state() {
        let tables = both();
        let opening = |entries: [(FlowKey, FlowValue); 3]| {
            entries.map(|(key, value)| {
                (key, FlowValue { hot: Hot { state: 0, ..Hot::unpack(value.hot) }.pack(), ..value })
            })
        };
        tables.established.put(&flow(1, 1));
        tables.pending.put(&opening(flow(1, 1)));
        tables.pending.put(&opening(flow(2, 1)));
        let outcome = round(&mut Sweep::default(), &tables);
        assert_eq!((outcome.established, outcome.pending), (3, 6));
        assert_eq!(outcome.flows, [1, 1, 0, 0]);
    }

    #[test]
    fn an_old_copy_of_a_living_flow_goes_without_it() {
        let tables = both();
        tables.established.put(&flow(1, 1));
        tables.pending.put(&flow(1, lifetime::UDP_ANSWERED + 3));
        round(&mut Sweep::default(), &tables);
        assert_eq!((tables.established.all().len(), tables.pending.all().len()), (3, 0));
    }

    #[test]
    fn a_flow_that_got_a_packet_after_the_slice_was_read_stays() {
        let tables = both();
        let stale = flow(1, lifetime::UDP_ANSWERED + 3);
        tables.established.put(&flow(1, 0));
        let mut sweep = Sweep::default();
        sweep.take(&tables, Origin::Established, stale, NOW).unwrap();
        assert_eq!(sweep.finish().expired, 0);
        assert_eq!(tables.established.all().len(), 3);
    }

    #[test]
    fn an_entry_of_another_flow_under_the_same_key_stays() {
        let tables = both();
        let [plain, front, snat] = flow(1, lifetime::UDP_ANSWERED + 3);
        // The client has a new flow by the same frontend, to another backend.
        let newer = FlowValue { peer: end(2, 5353).0, ..front.1 };
        tables.established.put(&[plain, (front.0, newer), snat]);
        round(&mut Sweep::default(), &tables);
        assert_eq!(tables.established.all(), [(front.0, newer)]);
    }

    #[test]
    fn a_flow_that_took_the_ends_while_an_old_one_was_removed_stays() {
        let tables = both();
        // The program has removed the old one from the established flows and begun anew.
        tables.pending.put(&flow(1, 0));
        let old = flow(1, lifetime::UDP_ANSWERED + 3);
        remove_flow(&tables.pending, &old[0].0, &old[0].1).unwrap();
        assert_eq!(tables.pending.all().len(), 3);
    }

    #[test]
    fn an_entry_without_flow_goes_at_the_second_look_only() {
        let tables = both();
        let [plain, front, snat] = flow(1, 0);
        tables.established.put(&[front, snat]);
        let mut sweep = Sweep::default();
        assert_eq!(round(&mut sweep, &tables).orphans, 0);
        assert_eq!(tables.established.all().len(), 2);
        assert_eq!(round(&mut sweep, &tables).orphans, 2);
        assert!(tables.established.all().is_empty());
        // Its flow was in the making: the plain entry is still pending, or comes before the second look.
        tables.established.put(&[front]);
        tables.pending.put(&[plain]);
        assert_eq!((round(&mut sweep, &tables).orphans, round(&mut sweep, &tables).orphans), (0, 0));
    }

    #[test]
    fn an_address_is_unused_after_two_rounds_without_a_flow_to_it() {
        let (used, unused) = (end(100, 0).0, end(101, 0).0);
        let [_, (front, _), _] = flow(1, 0);
        let mut lingering = Lingering::default();
        let mut round = |see: bool| {
            lingering.begin([used, unused].into());
            if see {
                lingering.see(&front);
            }
            lingering.finish()
        };
        assert_eq!(round(true), []);
        assert_eq!(round(true), [unused]);
        assert_eq!(round(false), [unused], "the first round in which it is not seen is not enough");
        let mut both = round(false);
        both.sort();
        assert_eq!(both, [used, unused]);
    }
}
