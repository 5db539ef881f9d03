//! Backends by id and by address: the largest part of the state, kept dense.

use std::hash::BuildHasher;

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use proxy_common::abi::backend::BackendRecord;

use super::ids::BackendId;
use super::key::BackendAddr;

/// A backend, and what the table says of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backend {
    /// Where it listens.
    pub at: BackendAddr,
    /// Service ports that list it.
    pub users: u32,
    /// Those that say it runs here.
    pub local_users: u32,
    /// What the table says.
    pub programmed: Programmed,
}

/// A backend's record in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Programmed {
    /// There is none.
    Absent,
    /// Live, on another node.
    Remote,
    /// Live, on this node.
    Local,
}

impl Programmed {
    /// What flags of a live record say.
    pub(super) const fn from_flags(flags: u32) -> Self {
        if flags & BackendRecord::LOCAL != 0 { Self::Local } else { Self::Remote }
    }
}

impl Backend {
    /// What the table should say. One user who knows that it runs here is enough.
    pub(super) const fn wanted(&self) -> Programmed {
        match (self.users, self.local_users) {
            (0, _) => Programmed::Absent,
            (_, 0) => Programmed::Remote,
            _ => Programmed::Local,
        }
    }

    /// Its live record.
    pub(super) const fn record(&self) -> BackendRecord {
        BackendRecord {
            addr: self.at.addr,
            port: self.at.port.be(),
            proto: self.at.proto.0,
            state: BackendRecord::STATE_LIVE,
            flags: if self.local_users > 0 { BackendRecord::LOCAL } else { 0 },
        }
    }
}

/// A service port's word on a backend: which, and whether it runs here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Listed(u32);

/// Ids are positions in a memory-mapped array of 24 bytes an entry; they never need the upper bit.
const LOCAL_BIT: u32 = 1 << 31;

impl Listed {
    pub(super) const fn new(id: BackendId, is_local: bool) -> Self {
        Self(id.0 | if is_local { LOCAL_BIT } else { 0 })
    }

    pub(super) const fn id(self) -> BackendId {
        BackendId(self.0 & !LOCAL_BIT)
    }

    pub(super) const fn is_local(self) -> bool {
        self.0 & LOCAL_BIT != 0
    }
}

/// All backends.
#[derive(Default, Debug)]
pub(super) struct Backends {
    /// By id.
    entries: Vec<Option<Backend>>,
    /// Ids by address.
    ids: HashTable<u32>,
}

/// The seed is fixed: planning is a function of its arguments. Who could choose colliding addresses could as well list more.
fn hash(at: &BackendAddr) -> u64 {
    FixedState::with_seed(0).hash_one(at)
}

impl Backends {
    /// The id of an address.
    pub(super) fn find(&self, at: &BackendAddr) -> Option<BackendId> {
        let found = self.ids.find(hash(at), |id| self.is_at(*id, at));
        found.map(|id| BackendId(*id))
    }

    fn is_at(&self, id: u32, at: &BackendAddr) -> bool {
        self.entries[id as usize].is_some_and(|backend| backend.at == *at)
    }

    /// The backend of an id.
    pub(super) fn get(&self, id: BackendId) -> Option<&Backend> {
        self.entries.get(id.0 as usize)?.as_ref()
    }

    /// The backend of an id, to change it.
    pub(super) fn get_mut(&mut self, id: BackendId) -> Option<&mut Backend> {
        self.entries.get_mut(id.0 as usize)?.as_mut()
    }

    /// Adds a backend whose address has no id yet.
    pub(super) fn add(&mut self, id: BackendId, backend: Backend) {
        let place = id.0 as usize;
        if self.entries.len() <= place {
            self.entries.resize(place + 1, None);
        }
        self.entries[place] = Some(backend);
        let entries = &self.entries;
        let rehash = |id: &u32| entries[*id as usize].map_or(0, |backend| hash(&backend.at));
        self.ids.insert_unique(hash(&backend.at), id.0, rehash);
    }

    /// Forgets a backend.
    pub(super) fn remove(&mut self, id: BackendId) -> Option<Backend> {
        let backend = self.entries.get_mut(id.0 as usize)?.take()?;
        if let Ok(entry) = self.ids.find_entry(hash(&backend.at), |known| *known == id.0) {
            entry.remove();
        }
        Some(backend)
    }

    /// All of them, in order of their ids.
    pub(super) fn iter(&self) -> impl Iterator<Item = (BackendId, &Backend)> {
        let numbered = (0..).map(BackendId).zip(&self.entries);
        numbered.filter_map(|(id, backend)| Some((id, backend.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proxy_common::addr::{Addr, Port, Proto};
    use std::net::Ipv4Addr;

    fn at(number: u32) -> BackendAddr {
        BackendAddr { addr: Addr::from(Ipv4Addr::from(number)), port: Port(80), proto: Proto::TCP }
    }

    #[test]
    fn backends_are_found_by_address_until_they_are_removed() {
        let mut backends = Backends::default();
        for number in 1..1000 {
            let backend = Backend { at: at(number), users: 1, local_users: 0, programmed: Programmed::Absent };
            backends.add(BackendId(number), backend);
        }
        for number in (1..1000).step_by(2) {
            assert_eq!(backends.remove(BackendId(number)).map(|backend| backend.at), Some(at(number)));
        }
        for number in 1..1000 {
            let expected = (number % 2 == 0).then_some(BackendId(number));
            assert_eq!(backends.find(&at(number)), expected);
            assert_eq!(backends.get_mut(BackendId(number)).is_some(), expected.is_some());
        }
        assert_eq!(backends.iter().count(), 499);
    }

    #[test]
    fn a_listed_backend_keeps_id_and_place() {
        for is_local in [false, true] {
            let listed = Listed::new(BackendId(77), is_local);
            assert_eq!((listed.id(), listed.is_local()), (BackendId(77), is_local));
        }
    }
}
