//! Ids and slot ranges: who has which, which are free, and which must rest until no program can still use them.
//!
//! The lowest free id is taken first, so that the tables stay dense.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

/// Declares an id of the tables; 0 is none.
macro_rules! id {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(pub u32);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// Position in the `services` table.
    ServiceId
}

id! {
    /// Position in the `backends` table.
    BackendId
}

/// Number of a plan; what it freed may be used again when its epoch has passed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Epoch(pub u64);

/// Capacities of the arrays. Position 0 of `services` and `backends` is never used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Entries of `services`.
    pub services: u32,
    /// Entries of `backends`.
    pub backends: u32,
    /// Entries of `slots`.
    pub slots: u32,
}

/// Ids 1 to the capacity, exclusive.
#[derive(Debug)]
pub(super) struct Ids {
    capacity: u32,
    /// Every id from here on is free.
    fresh: u32,
    /// Free ids below `fresh`.
    free: BTreeSet<u32>,
    resting: VecDeque<(Epoch, u32)>,
}

impl Ids {
    /// All ids are free but those in `used`.
    pub(super) fn new(capacity: u32, used: &BTreeSet<u32>) -> Self {
        let fresh = used.last().map_or(1, |last| last + 1);
        let free = (1..fresh).filter(|id| !used.contains(id)).collect();
        Self { capacity, fresh, free, resting: VecDeque::new() }
    }

    /// How many can be taken.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.capacity.saturating_sub(self.fresh) as usize
    }

    /// The lowest free id.
    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        let id = self.fresh;
        (id < self.capacity).then(|| {
            self.fresh += 1;
            id
        })
    }

    /// Gives an id back; it rests until `epoch` has passed.
    pub(super) fn rest(&mut self, id: u32, epoch: Epoch) {
        self.resting.push_back((epoch, id));
    }

    /// Frees what rested until `epoch`. True if anything did.
    pub(super) fn wake(&mut self, epoch: Epoch) -> bool {
        let mut any = false;
        while let Some((_, id)) = self.resting.pop_front_if(|(since, _)| *since <= epoch) {
            self.free.insert(id);
            any = true;
        }
        any
    }
}

/// A stretch of slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Stretch {
    /// First slot.
    pub base: u32,
    /// Number of slots; 0: nothing is held.
    pub count: u32,
}

/// Stretches of slots: the smallest free one that fits is taken, neighbours are joined when they are free.
#[derive(Debug)]
pub(super) struct Slots {
    by_base: BTreeMap<u32, u32>,
    by_count: BTreeSet<(u32, u32)>,
    resting: VecDeque<(Epoch, Stretch)>,
}

impl Slots {
    /// All slots are free but those in `used`.
    pub(super) fn new(capacity: u32, used: &[Stretch]) -> Self {
        let mut slots = Self { by_base: BTreeMap::new(), by_count: BTreeSet::new(), resting: VecDeque::new() };
        let mut used: Vec<_> = used.iter().filter(|stretch| stretch.count > 0).copied().collect();
        used.sort_by_key(|stretch| stretch.base);
        let mut next = 0;
        for stretch in used {
            slots.insert(Stretch { base: next, count: stretch.base.saturating_sub(next) });
            next = next.max(stretch.base.saturating_add(stretch.count));
        }
        slots.insert(Stretch { base: next, count: capacity.saturating_sub(next) });
        slots
    }

    /// `count` slots in a row; none are always there.
    pub(super) fn take(&mut self, count: u32) -> Option<Stretch> {
        if count == 0 {
            return Some(Stretch::default());
        }
        let (size, base) = *self.by_count.range((count, 0)..).next()?;
        self.remove(Stretch { base, count: size });
        self.insert(Stretch { base: base + count, count: size - count });
        Some(Stretch { base, count })
    }

    /// Gives slots back; they rest until `epoch` has passed.
    pub(super) fn rest(&mut self, stretch: Stretch, epoch: Epoch) {
        if stretch.count > 0 {
            self.resting.push_back((epoch, stretch));
        }
    }

    /// Frees what rested until `epoch`. True if anything did.
    pub(super) fn wake(&mut self, epoch: Epoch) -> bool {
        let mut any = false;
        while let Some((_, stretch)) = self.resting.pop_front_if(|(since, _)| *since <= epoch) {
            self.join(stretch);
            any = true;
        }
        any
    }

    /// Frees a stretch together with its free neighbours.
    fn join(&mut self, mut stretch: Stretch) {
        let before = self.by_base.range(..stretch.base).next_back().map(|(base, count)| (*base, *count));
        if let Some((base, count)) = before.filter(|(base, count)| base + count == stretch.base) {
            self.remove(Stretch { base, count });
            stretch = Stretch { base, count: count + stretch.count };
        }
        if let Some(count) = self.by_base.get(&(stretch.base + stretch.count)).copied() {
            self.remove(Stretch { base: stretch.base + stretch.count, count });
            stretch.count += count;
        }
        self.insert(stretch);
    }

    fn insert(&mut self, stretch: Stretch) {
        if stretch.count > 0 {
            self.by_base.insert(stretch.base, stretch.count);
            self.by_count.insert((stretch.count, stretch.base));
        }
    }

    fn remove(&mut self, stretch: Stretch) {
        self.by_base.remove(&stretch.base);
        self.by_count.remove(&(stretch.count, stretch.base));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_lowest_free_id_is_taken_and_a_used_one_never() {
        let mut ids = Ids::new(6, &BTreeSet::from([1, 3]));
        assert_eq!(ids.available(), 3);
        assert_eq!([ids.take(), ids.take(), ids.take(), ids.take()], [Some(2), Some(4), Some(5), None]);
    }

    #[test]
    fn an_id_rests_until_its_epoch_has_passed() {
        let mut ids = Ids::new(2, &BTreeSet::new());
        let id = ids.take().unwrap();
        ids.rest(id, Epoch(7));
        assert!(!ids.wake(Epoch(6)));
        assert_eq!(ids.take(), None);
        assert!(ids.wake(Epoch(7)));
        assert_eq!(ids.take(), Some(id));
    }

    #[test]
    fn slots_beyond_the_capacity_are_refused() {
        let mut slots = Slots::new(10, &[Stretch { base: 4, count: 2 }]);
        assert_eq!(slots.take(5), None);
        assert_eq!(slots.take(4), Some(Stretch { base: 0, count: 4 }));
        assert_eq!(slots.take(0), Some(Stretch::default()));
    }

    proptest! {
        /// Held stretches never overlap, and all slots come back as one stretch.
        #[test]
        fn stretches_are_disjoint_and_whole_again(steps in prop::collection::vec((1u32..9, any::<bool>()), 1..200)) {
            let mut slots = Slots::new(64, &[]);
            let mut held: Vec<Stretch> = Vec::new();
            for (epoch, (count, give_back)) in steps.into_iter().enumerate() {
                if give_back && !held.is_empty() {
                    slots.rest(held.swap_remove(count as usize % held.len()), Epoch(epoch as u64));
                    slots.wake(Epoch(epoch as u64));
                } else if let Some(stretch) = slots.take(count) {
                    prop_assert!(stretch.base + stretch.count <= 64);
                    let apart = |other: &Stretch| {
                        stretch.base + stretch.count <= other.base || other.base + other.count <= stretch.base
                    };
                    prop_assert!(held.iter().all(apart));
                    held.push(stretch);
                }
            }
            for stretch in held {
                slots.rest(stretch, Epoch(0));
            }
            slots.wake(Epoch(u64::MAX));
            prop_assert_eq!(slots.take(64), Some(Stretch { base: 0, count: 64 }));
        }
    }
}
