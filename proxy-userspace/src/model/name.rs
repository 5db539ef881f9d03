//! Names, stored once: a cluster repeats its few node, zone and namespace names a hundred thousand times.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::endpoint::Hints;

/// A name as its source spells it. Cloning shares it.
#[derive(Clone, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Eq for Name {}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl From<&str> for Name {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Gives equal names and equal hints one allocation. Each source has its own; a name lives as long as somebody uses it.
#[derive(Default)]
pub struct Interner {
    names: BTreeSet<Name>,
    hints: BTreeSet<Arc<Hints>>,
    prune_at: usize,
}

/// Below this many entries, looking for unused ones is not worth it.
const PRUNE_FLOOR: usize = 4096;

impl Interner {
    /// The shared form of `name`.
    pub fn name(&mut self, name: &str) -> Name {
        if let Some(known) = self.names.get(name) {
            return known.clone();
        }
        self.prune_when_grown();
        let new = Name::from(name);
        self.names.insert(new.clone());
        new
    }

    /// The shared form of `hints`.
    pub fn hints(&mut self, hints: Hints) -> Arc<Hints> {
        if let Some(known) = self.hints.get(&hints) {
            return known.clone();
        }
        self.prune_when_grown();
        let new = Arc::new(hints);
        self.hints.insert(new.clone());
        new
    }

    /// Drops what nobody else holds, each time the tables have doubled: constant work per new entry.
    fn prune_when_grown(&mut self) {
        if self.names.len() + self.hints.len() < self.prune_at.max(PRUNE_FLOOR) {
            return;
        }
        self.hints.retain(|hints| Arc::strong_count(hints) > 1);
        self.names.retain(|name| Arc::strong_count(&name.0) > 1);
        self.prune_at = 2 * (self.names.len() + self.hints.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_share_one_allocation() {
        let mut interner = Interner::default();
        let (a, b) = (interner.name("zone-a"), interner.name("zone-a"));
        assert!(Arc::ptr_eq(&a.0, &b.0));
    }

    #[test]
    fn unused_names_are_forgotten_and_used_ones_kept() {
        let mut interner = Interner::default();
        let kept = interner.name("kept");
        for i in 0..10 * PRUNE_FLOOR {
            interner.name(&format!("gone-{i}"));
        }
        assert!(interner.names.len() <= PRUNE_FLOOR);
        assert!(Arc::ptr_eq(&kept.0, &interner.name("kept").0));
    }
}
