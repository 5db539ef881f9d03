//! How the entries of one table get from one layout to another; where they lie is for others to know.
//!
//! Pure but for the tables that are given, which tests have in memory.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::marker::PhantomData;

use proxy_common::abi::address::{AddressClass, PortWord};
use proxy_common::abi::affinity::AffinityValue;
use proxy_common::abi::flow::FlowValue;
use proxy_common::abi::fragment::FragmentValue;
use proxy_common::lb::flow::{Hot, Seconds};
use tracing::warn;

use super::Error;

/// What is called with each entry.
pub(super) type Visit<'a, K, V> = &'a mut dyn FnMut(K, V) -> Result<(), Error>;

/// Entries of the layout that is left.
pub(super) trait Old<K, V> {
    /// Calls `visit` for every entry; entries that come or go meanwhile may be missed.
    fn for_each(&self, visit: Visit<'_, K, V>) -> Result<(), Error>;
}

/// Entries of the layout that is taken up.
pub(super) trait New<K, V> {
    /// Capacity.
    fn capacity(&self) -> u32;
    /// An entry.
    fn get(&self, key: &K) -> Result<Option<V>, Error>;
    /// Writes entries.
    fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), Error>;
    /// Writes an entry if there is none with its key.
    fn insert(&self, key: &K, value: &V) -> Result<(), Error>;
    /// Removes entries; they may be gone.
    fn remove_all(&self, keys: &[K]) -> Result<(), Error>;
}

/// A record that programs write.
pub(super) trait Record: Copy + Hash + PartialEq {
    /// The record without what may lag behind by some seconds.
    #[must_use]
    fn essence(&self) -> Self {
        *self
    }
    /// What `new` must become so that nothing of `old` is lost; `None`: it may stay as it is.
    fn merged(new: &Self, old: &Self) -> Option<Self>;
}

impl Record for FlowValue {
    fn essence(&self) -> Self {
        Self { hot: u64::from(Hot::unpack(self.hot).state), ..*self }
    }

    fn merged(new: &Self, old: &Self) -> Option<Self> {
        /// When a packet was last seen is of use to half a minute.
        const LAG: u32 = 2;
        let connection = |value: &Self| Self { hot: 0, proof: 0, mac: [0; 3], stamp: 0, ..*value };
        let (theirs, ours) = (Hot::unpack(old.hot), Hot::unpack(new.hot));
        if connection(new) != connection(old) {
            return (theirs.seen > ours.seen).then_some(*old);
        }
        let hot = Hot { seen: ours.seen.max(theirs.seen), state: ours.state | theirs.state };
        let proof = if new.proof == 0 { old.proof } else { new.proof };
        let mac = if new.mac == [0; 3] { old.mac } else { new.mac };
        let stamp = if theirs.seen > ours.seen { old.stamp } else { new.stamp };
        let merged = Self { hot: hot.pack(), proof, mac, stamp, ..*new };
        let is_behind = ours.seen.age(theirs.seen) > LAG;
        (is_behind || merged.essence() != new.essence()).then_some(merged)
    }
}

impl Record for AffinityValue {
    fn merged(new: &Self, old: &Self) -> Option<Self> {
        (Seconds(old.seen) > Seconds(new.seen)).then_some(*old)
    }
}

impl Record for FragmentValue {
    fn merged(_new: &Self, _old: &Self) -> Option<Self> {
        None
    }
}

impl Record for AddressClass {
    fn merged(new: &Self, old: &Self) -> Option<Self> {
        let flags = new.flags | old.flags & Self::FLOWS;
        (flags != new.flags).then_some(Self { flags })
    }
}

/// One map on its way.
pub(super) trait Part {
    /// Makes the new entries what the old ones are. Only while no program writes the new ones.
    fn copy(&mut self) -> Result<(), Error>;
    /// Adds to the new entries what the old programs did since.
    fn merge(&mut self) -> Result<(), Error>;
    /// How many entries were copied.
    fn count(&self) -> usize;
}

/// Entries in the making of one call.
struct Writes<'a, K, V, N> {
    new: &'a N,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<'a, K: Copy, V: Copy, N: New<K, V>> Writes<'a, K, V, N> {
    const BATCH: usize = 4096;

    fn to(new: &'a N) -> Self {
        Self { new, keys: Vec::new(), values: Vec::new() }
    }

    fn put(&mut self, key: K, value: V) -> Result<(), Error> {
        self.keys.push(key);
        self.values.push(value);
        if self.keys.len() < Self::BATCH { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), Error> {
        if !self.keys.is_empty() {
            self.new.put_all(&self.keys, &self.values)?;
        }
        self.keys.clear();
        self.values.clear();
        Ok(())
    }
}

/// Entries that only the agent writes.
pub(super) struct Once<O, N, K, V> {
    old: O,
    new: N,
    is_used: fn(u32, &K, &V) -> bool,
    count: Option<usize>,
}

impl<O, N, K, V> Once<O, N, K, V> {
    /// `is_used`, given the capacity of the new table: the entry means something.
    pub(super) fn new(old: O, new: N, is_used: fn(u32, &K, &V) -> bool) -> Self {
        Self { old, new, is_used, count: None }
    }
}

impl<K: Copy, V: Copy, O: Old<K, V>, N: New<K, V>> Part for Once<O, N, K, V> {
    fn copy(&mut self) -> Result<(), Error> {
        if self.count.is_some() {
            return Ok(());
        }
        let (mut writes, mut count, capacity) = (Writes::to(&self.new), 0, self.new.capacity());
        self.old.for_each(&mut |key, value| {
            if !(self.is_used)(capacity, &key, &value) {
                return Ok(());
            }
            count += 1;
            writes.put(key, value)
        })?;
        writes.flush()?;
        self.count = Some(count);
        Ok(())
    }

    fn merge(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn count(&self) -> usize {
        self.count.unwrap_or_default()
    }
}

/// Entries that programs write.
pub(super) struct Written<O, N, K, V> {
    old: O,
    new: N,
    /// New entries that are found before these: what is older there must not hide what comes here.
    before: Option<N>,
    copied: HashMap<K, Copied>,
    round: u32,
    /// Entries that did not fit any more.
    lost: usize,
    _values: PhantomData<V>,
}

/// What was copied of an entry.
#[derive(Clone, Copy)]
struct Copied {
    essence: u64,
    round: u32,
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl<O, N, K, V> Written<O, N, K, V> {
    /// `before`: a table in which programs look first.
    pub(super) fn new(old: O, new: N, before: Option<N>) -> Self {
        Self { old, new, before, copied: HashMap::new(), round: 0, lost: 0, _values: PhantomData }
    }
}

impl<K: Copy + Eq + Hash, V: Record, O: Old<K, V>, N: New<K, V>> Written<O, N, K, V> {
    fn is_as_copied(&self, key: &K, value: &V) -> bool {
        self.copied.get(key).is_some_and(|copy| copy.essence == hash(&value.essence()))
    }

    fn merge_one(&self, key: &K, old: &V) -> Result<(), Error> {
        if let Some(before) = &self.before
            && let Some(hiding) = before.get(key)?
            && V::merged(&hiding, old) == Some(*old)
        {
            before.remove_all(&[*key])?;
        }
        match self.new.get(key)? {
            None => self.new.insert(key, old),
            Some(new) => match V::merged(&new, old) {
                Some(merged) => self.new.put_all(&[*key], &[merged]),
                None => Ok(()),
            },
        }
    }
}

impl<K: Copy + Eq + Hash, V: Record, O: Old<K, V>, N: New<K, V>> Part for Written<O, N, K, V> {
    fn copy(&mut self) -> Result<(), Error> {
        self.round += 1;
        let Self { old, new, copied, round, .. } = self;
        let mut writes = Writes::to(&*new);
        old.for_each(&mut |key, value| {
            let now = Copied { essence: hash(&value.essence()), round: *round };
            let before = copied.insert(key, now);
            if before.is_some_and(|before| before.essence == now.essence) { Ok(()) } else { writes.put(key, value) }
        })?;
        // What went makes room for what came.
        let gone: Vec<K> = copied.iter().filter(|(_, copy)| copy.round != *round).map(|(key, _)| *key).collect();
        copied.retain(|_, copy| copy.round == *round);
        new.remove_all(&gone)?;
        writes.flush()
    }

    fn merge(&mut self) -> Result<(), Error> {
        let mut lost = 0;
        self.old.for_each(&mut |key, value: V| {
            if self.is_as_copied(&key, &value) {
                return Ok(());
            }
            match self.merge_one(&key, &value) {
                Err(error) if is_full(&error) => lost += 1,
                result => result?,
            }
            Ok(())
        })?;
        self.lost = lost;
        if lost > 0 {
            warn!(entries = lost, "some entries found no room in the new tables");
        }
        Ok(())
    }

    fn count(&self) -> usize {
        self.copied.len()
    }
}

/// A table that is full.
fn is_full(error: &Error) -> bool {
    let Error::Write { source, .. } = error else { return false };
    matches!(source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM))
}

/// Marks of ports: bits that are only ever set.
pub(super) struct Bits<O, N>(pub(super) O, pub(super) N);

impl<O: Old<u32, PortWord>, N: New<u32, PortWord>> Part for Bits<O, N> {
    fn copy(&mut self) -> Result<(), Error> {
        self.merge()
    }

    fn merge(&mut self) -> Result<(), Error> {
        self.0.for_each(&mut |index, word| {
            let new = self.1.get(&index)?.map_or(0, |word| word.bits);
            if new | word.bits == new {
                return Ok(());
            }
            self.1.put_all(&[index], &[PortWord { bits: new | word.bits }])
        })
    }

    fn count(&self) -> usize {
        0
    }
}

/// Counters of the layout that is left, all CPUs together.
pub(super) trait OldCounters {
    /// Calls `visit` for every element that counted something.
    fn for_each(&self, visit: Visit<'_, u32, Vec<u64>>) -> Result<(), Error>;
}

/// Counters of the layout that is taken up.
pub(super) trait NewCounters {
    /// Replaces an element.
    fn set(&self, index: u32, counts: &[u64]) -> Result<(), Error>;
    /// Adds to an element.
    fn add(&self, index: u32, counts: &[u64]) -> Result<(), Error>;
}

/// Counters on their way.
pub(super) struct Counters<O, N> {
    old: O,
    new: N,
    copied: HashMap<u32, Vec<u64>>,
}

impl<O, N> Counters<O, N> {
    pub(super) fn new(old: O, new: N) -> Self {
        Self { old, new, copied: HashMap::new() }
    }
}

impl<O: OldCounters, N: NewCounters> Part for Counters<O, N> {
    fn copy(&mut self) -> Result<(), Error> {
        self.old.for_each(&mut |index, counts| {
            if self.copied.get(&index) == Some(&counts) {
                return Ok(());
            }
            self.new.set(index, &counts)?;
            self.copied.insert(index, counts);
            Ok(())
        })
    }

    fn merge(&mut self) -> Result<(), Error> {
        self.old.for_each(&mut |index, counts| {
            let copied = self.copied.get(&index).cloned().unwrap_or_else(|| vec![0; counts.len()]);
            let more: Vec<u64> = counts.iter().zip(&copied).map(|(now, then)| now.saturating_sub(*then)).collect();
            if more.iter().any(|count| *count != 0) {
                self.new.add(index, &more)?;
                self.copied.insert(index, counts);
            }
            Ok(())
        })
    }

    fn count(&self) -> usize {
        self.copied.len()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::io;
    use std::rc::Rc;

    use super::*;

    /// A table in memory; clones are the same table.
    #[derive(Clone)]
    struct Fake<K, V> {
        entries: Rc<RefCell<HashMap<K, V>>>,
        capacity: usize,
        written: Rc<RefCell<usize>>,
    }

    impl<K: Copy + Eq + Hash, V: Copy> Fake<K, V> {
        fn new() -> Self {
            Self { entries: Rc::default(), capacity: 100, written: Rc::default() }
        }

        fn put(&self, key: K, value: V) {
            self.entries.borrow_mut().insert(key, value);
        }

        fn drop_key(&self, key: K) {
            self.entries.borrow_mut().remove(&key);
        }

        fn at(&self, key: K) -> Option<V> {
            self.entries.borrow().get(&key).copied()
        }

        /// Entries written since the last call.
        fn written(&self) -> usize {
            self.written.take()
        }
    }

    impl<K: Copy + Eq + Hash, V: Copy> Old<K, V> for Fake<K, V> {
        fn for_each(&self, visit: Visit<'_, K, V>) -> Result<(), Error> {
            let entries: Vec<_> = self.entries.borrow().iter().map(|(key, value)| (*key, *value)).collect();
            entries.into_iter().try_for_each(|(key, value)| visit(key, value))
        }
    }

    impl<K: Copy + Eq + Hash, V: Copy> New<K, V> for Fake<K, V> {
        fn capacity(&self) -> u32 {
            self.capacity as u32
        }

        fn get(&self, key: &K) -> Result<Option<V>, Error> {
            Ok(self.at(*key))
        }

        fn put_all(&self, keys: &[K], values: &[V]) -> Result<(), Error> {
            for (key, value) in keys.iter().zip(values) {
                let mut entries = self.entries.borrow_mut();
                if entries.len() == self.capacity && !entries.contains_key(key) {
                    let source = io::Error::from_raw_os_error(libc::E2BIG);
                    return Err(Error::Write { table: "fake", source });
                }
                entries.insert(*key, *value);
                *self.written.borrow_mut() += 1;
            }
            Ok(())
        }

        fn insert(&self, key: &K, value: &V) -> Result<(), Error> {
            if self.at(*key).is_some() { Ok(()) } else { self.put_all(&[*key], &[*value]) }
        }

        fn remove_all(&self, keys: &[K]) -> Result<(), Error> {
            keys.iter().for_each(|key| self.drop_key(*key));
            Ok(())
        }
    }

    type Flows = Fake<u32, FlowValue>;

    fn flow(seen: u32, state: u32, backend: u32) -> FlowValue {
        FlowValue { hot: Hot { seen: Seconds(seen), state }.pack(), backend, ..FlowValue::ZERO }
    }

    fn carry(old: &Flows, new: &Flows) -> Written<Flows, Flows, u32, FlowValue> {
        Written::new(old.clone(), new.clone(), None)
    }

    fn flows(flows: &Flows) -> BTreeMap<u32, FlowValue> {
        flows.entries.borrow().iter().map(|(key, value)| (*key, *value)).collect()
    }

    #[test]
    fn copying_again_writes_what_changed_and_removes_what_went() {
        let (old, new) = (Flows::new(), Flows::new());
        (0..5).for_each(|key| old.put(key, flow(100, 0, 1)));
        let mut part = carry(&old, &new);
        part.copy().unwrap();
        assert_eq!((new.written(), part.count()), (5, 5));
        part.copy().unwrap();
        assert_eq!(new.written(), 0, "nothing changed");
        old.put(0, flow(103, 0, 1));
        old.put(1, flow(100, Hot::ESTABLISHED, 1));
        old.put(2, flow(101, 0, 2));
        old.drop_key(3);
        old.put(9, flow(101, 0, 1));
        part.copy().unwrap();
        assert_eq!(new.written(), 3, "when a packet was last seen may lag behind");
        old.put(0, flow(100, 0, 1));
        assert_eq!(flows(&new), flows(&old));
    }

    #[test]
    fn what_went_makes_room_for_what_came() {
        let (old, new) = (Flows::new(), Flows { capacity: 3, ..Flows::new() });
        (0..3).for_each(|key| old.put(key, flow(100, 0, 1)));
        let mut part = carry(&old, &new);
        part.copy().unwrap();
        (0..3).for_each(|key| old.drop_key(key));
        (3..6).for_each(|key| old.put(key, flow(100, 0, 1)));
        part.copy().unwrap();
        assert_eq!(flows(&new), flows(&old));
    }

    #[test]
    fn merging_takes_nothing_from_what_the_new_programs_did() {
        let (old, new) = (Flows::new(), Flows::new());
        (0..5).for_each(|key| old.put(key, flow(100, Hot::ESTABLISHED, 1)));
        let mut part = carry(&old, &new);
        part.copy().unwrap();
        new.written();
        // Another end closes for each of the programs.
        old.put(0, flow(101, Hot::ESTABLISHED | Hot::FIN_CLIENT, 1));
        new.put(0, flow(102, Hot::ESTABLISHED | Hot::FIN_BACKEND, 1));
        // Both opened another connection; whoever was later knows better.
        old.put(1, flow(102, 0, 2));
        new.put(1, flow(103, 0, 3));
        old.put(2, flow(105, 0, 2));
        new.put(2, flow(103, 0, 3));
        // One of them knows more, or less.
        old.put(8, flow(101, 0, 8));
        new.put(9, flow(101, 0, 9));
        old.drop_key(3);
        part.merge().unwrap();
        assert_eq!(new.written(), 3);
        assert_eq!(new.at(0), Some(flow(102, Hot::ESTABLISHED | Hot::FIN_CLIENT | Hot::FIN_BACKEND, 1)));
        assert_eq!((new.at(1), new.at(2)), (Some(flow(103, 0, 3)), Some(flow(105, 0, 2))));
        assert_eq!((new.at(8), new.at(9)), (Some(flow(101, 0, 8)), Some(flow(101, 0, 9))));
        assert!(new.at(3).is_some(), "nothing is removed");
        part.merge().unwrap();
        assert_eq!(new.written(), 0, "it may be repeated");
    }

    #[test]
    fn what_comes_from_the_pending_ones_is_not_hidden_by_an_older_connection() {
        let (old, new, established) = (Flows::new(), Flows::new(), Flows::new());
        let mut part = Written::<_, _, u32, FlowValue>::new(old.clone(), new.clone(), Some(established.clone()));
        for (key, seen) in [(1, 90), (2, 110)] {
            established.put(key, flow(seen, Hot::ESTABLISHED, 1));
            old.put(key, flow(100, 0, 2));
        }
        part.merge().unwrap();
        assert_eq!(established.at(1), None);
        assert!(established.at(2).is_some(), "it is younger");
    }

    #[test]
    fn a_full_table_loses_entries_and_not_the_takeover() {
        let (old, new) = (Flows::new(), Flows { capacity: 2, ..Flows::new() });
        (0..5).for_each(|key| old.put(key, flow(100, 0, 1)));
        let mut part = carry(&old, &new);
        part.merge().unwrap();
        assert_eq!((part.lost, flows(&new).len()), (3, 2));
    }

    #[test]
    fn proof_of_the_return_path_is_kept_whoever_saw_it() {
        let (with, without) = (FlowValue { proof: 7, ..flow(100, 0, 1) }, flow(100, 0, 1));
        assert_eq!(FlowValue::merged(&without, &with), Some(with));
        assert_eq!(FlowValue::merged(&with, &without), None);
        let mac = FlowValue { mac: [1, 2, 3], ..without };
        assert_eq!(FlowValue::merged(&without, &mac), Some(mac));
    }

    #[test]
    fn clients_stay_with_the_backend_they_had_last() {
        let had = |backend, seen| AffinityValue { backend, seen };
        assert_eq!(AffinityValue::merged(&had(1, 5), &had(2, 6)), Some(had(2, 6)));
        assert_eq!(AffinityValue::merged(&had(1, 6), &had(2, 6)), None);
    }

    #[test]
    fn addresses_get_the_mark_that_programs_set_and_no_other() {
        let class = |flags| AddressClass { flags };
        let new = class(AddressClass::BACKEND);
        let merged = AddressClass::merged(&new, &class(AddressClass::FLOWS | AddressClass::NODE));
        assert_eq!(merged, Some(class(AddressClass::BACKEND | AddressClass::FLOWS)));
        assert_eq!(AddressClass::merged(&new, &class(AddressClass::NODE)), None);
    }

    #[test]
    fn arrays_are_copied_once_and_as_far_as_they_mean_something() {
        let (old, new) = (Fake::<u32, u64>::new(), Fake::<u32, u64> { capacity: 4, ..Fake::new() });
        [(1, 5), (2, 0), (9, 7)].into_iter().for_each(|(key, value)| old.put(key, value));
        let mut part = Once::new(old.clone(), new.clone(), |capacity, key, value| *key < capacity && *value != 0);
        part.copy().unwrap();
        old.put(3, 1);
        part.copy().unwrap();
        part.merge().unwrap();
        assert_eq!((new.at(1), new.entries.borrow().len(), part.count()), (Some(5), 1, 1));
    }

    #[test]
    fn marks_of_ports_are_united() {
        let (old, new) = (Fake::new(), Fake::new());
        let word = |bits| PortWord { bits };
        old.put(1, word(0b0011));
        old.put(2, word(0b1000));
        new.put(1, word(0b0101));
        let mut part = Bits(old, new.clone());
        part.merge().unwrap();
        assert_eq!((new.at(1), new.at(2)), (Some(word(0b0111)), Some(word(0b1000))));
        new.written();
        part.merge().unwrap();
        assert_eq!(new.written(), 0);
    }

    #[derive(Clone, Default)]
    struct FakeCounters(Rc<RefCell<BTreeMap<u32, Vec<u64>>>>);

    impl OldCounters for FakeCounters {
        fn for_each(&self, visit: Visit<'_, u32, Vec<u64>>) -> Result<(), Error> {
            self.0.borrow().iter().try_for_each(|(index, counts)| visit(*index, counts.clone()))
        }
    }

    impl NewCounters for FakeCounters {
        fn set(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
            self.0.borrow_mut().insert(index, counts.to_vec());
            Ok(())
        }

        fn add(&self, index: u32, counts: &[u64]) -> Result<(), Error> {
            let mut all = self.0.borrow_mut();
            let entry = all.entry(index).or_insert_with(|| vec![0; counts.len()]);
            entry.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            Ok(())
        }
    }

    #[test]
    fn counters_go_on_from_where_the_old_ones_end() {
        let (old, new) = (FakeCounters::default(), FakeCounters::default());
        old.0.borrow_mut().extend([(1, vec![5, 50]), (2, vec![1, 1])]);
        let mut part = Counters::new(old.clone(), new.clone());
        part.copy().unwrap();
        old.0.borrow_mut().insert(1, vec![6, 60]);
        part.copy().unwrap();
        // Both count, one of them a service that the other never saw.
        old.0.borrow_mut().extend([(1, vec![8, 80]), (3, vec![1, 0])]);
        new.add(1, &[100, 1000]).unwrap();
        for _ in 0..2 {
            part.merge().unwrap();
            let expected = BTreeMap::from([(1, vec![108, 1080]), (2, vec![1, 1]), (3, vec![1, 0])]);
            assert_eq!(*new.0.borrow(), expected);
        }
    }
}
