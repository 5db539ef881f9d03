//! The socket path: which backend a process gets when it dials a frontend.

use crate::abi::address::AddressClass;
use crate::abi::config::Config;
use crate::abi::frontend::FrontendValue;
use crate::abi::socket::{SOCKET_ENTRIES, SocketEntry, SocketTable};
use crate::addr::{Addr, Be16, Proto};
use crate::lb::flow::Seconds;
use crate::lb::pick::{self, Client};
use crate::lb::select;
use crate::tables::{Event, Tables};
use crate::verdict::{DropReason, Refusal};

/// A process dials an address.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    /// Destination.
    pub addr: Addr,
    /// Destination port.
    pub port: Be16,
    /// TCP or UDP.
    pub proto: Proto,
    /// SO_COOKIE of the socket.
    pub socket: u64,
    /// SO_NETNS_COOKIE of its namespace.
    pub netns: u64,
    /// The socket is bound to a source port already.
    pub bound: bool,
    /// The clock.
    pub now: Seconds,
}

/// What becomes of it.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It goes where it was going.
    Leave,
    /// It goes to a backend instead.
    Translate(SocketEntry),
    /// The application sees "connection refused".
    Reject(DropReason),
}

/// Decides on a connect.
#[inline(always)]
pub fn dial<T: Tables>(tables: &T, dial: &Dial) -> Verdict {
    match find(tables, dial, true) {
        Ok(frontend) => choose(tables, dial, frontend),
        Err(Unserved::Leave) => Verdict::Leave,
        Err(Unserved::Reject(reason)) => Verdict::Reject(reason),
    }
}

/// Why a dialled address is not for the socket path.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unserved {
    /// As [`Verdict::Leave`].
    Leave,
    /// As [`Verdict::Reject`].
    Reject(DropReason),
}

/// The frontend that is dialled: by a connect, or by a datagram without a connection (whose socket is not left to the packet
/// path when bound: every such socket is).
#[inline(always)]
pub fn find<T: Tables>(tables: &T, dial: &Dial, connects: bool) -> Result<FrontendValue, Unserved> {
    let Some(config) = tables.config() else { return Err(Unserved::Leave) };
    let of_node = dial.netns == config.node_netns;
    if config.has(Config::SOCKETS_OFF) || config.has(Config::SOCKETS_HOST_ONLY) && !of_node {
        return Err(Unserved::Leave);
    }
    let mut class = tables.address(&dial.addr);
    if of_node && dial.addr.is_loopback() {
        class.flags |= AddressClass::NODE | AddressClass::NODE_PORT;
    }
    if !class.has(AddressClass::FRONTEND | AddressClass::NODE_PORT) {
        return Err(Unserved::Leave);
    }
    let ports = tables.port_use(dial.port.host());
    let Some(found) = pick::find_frontend(tables, class, ports, &dial.addr, dial.port, dial.proto) else {
        return Err(if class.has(AddressClass::CLUSTER_IP) {
            Unserved::Reject(DropReason::UnknownPort)
        } else {
            Unserved::Leave
        });
    };
    // Two services with one backend would make two connections with the same ends (EADDRNOTAVAIL); the packet path can
    // tell them apart. It alone rewrites sources. The node's own packets do not pass it.
    let left_to_packets = match of_node {
        true => found.value.has(FrontendValue::CLOSED_TO_NODE),
        false => {
            let masqueraded = config.has(Config::MASQUERADE_ALL) && found.value.has(FrontendValue::CLUSTER_IP);
            connects && dial.bound || found.value.has(FrontendValue::PACKETS_ONLY) || masqueraded
        }
    };
    if left_to_packets { Err(Unserved::Leave) } else { Ok(found.value) }
}

/// True if the process gets what clients inside get.
#[inline(always)]
fn is_inside(config: &Config, dial: &Dial) -> bool {
    dial.netns == config.node_netns || config.cluster_cidr_count != 0
}

/// The backend that a frontend gives the socket.
#[inline(always)]
pub fn choose<T: Tables>(tables: &T, dial: &Dial, frontend: FrontendValue) -> Verdict {
    let Some(config) = tables.config() else { return Verdict::Leave };
    let service = frontend.service;
    let client = Client {
        inside: is_inside(config, dial),
        affinity: pick::affinity_of_netns(dial.netns, service),
        hash: select::hash_socket(config.hash_key, dial.socket, service),
    };
    let stamp = stamp(tables, service);
    match pick::pick(tables, frontend, &client, dial.now) {
        Ok(pick) => {
            if pick.affine {
                pick::remember(tables, &client.affinity, pick.id, dial.now);
            }
            tables.count(service, Event::Socket);
            Verdict::Translate(SocketEntry {
                frontend: dial.addr,
                backend: pick.backend.addr,
                frontend_port: dial.port,
                backend_port: pick.backend.port,
                stamp,
                backend_id: pick.id,
            })
        }
        Err((reason, refusal)) => {
            tables.count(service, Event::NoBackend);
            match refusal {
                Refusal::Reject => Verdict::Reject(reason),
                Refusal::Drop => Verdict::Leave,
            }
        }
    }
}

// A backend may stand behind several frontends of one socket. Its datagrams are then shown as the answers of the one that
// was sent to last: of several entries with one backend, that one is kept in front.

/// Where the socket's datagrams to a frontend go, while that is still one of the frontend's backends. Its answers are this
/// frontend's now.
#[inline(always)]
pub fn recall<T: Tables>(
    tables: &T,
    table: &mut SocketTable,
    dial: &Dial,
    frontend: FrontendValue,
) -> Option<(Addr, Be16)> {
    let position = position_of(table, &dial.addr, dial.port)? & (SOCKET_ENTRIES - 1);
    let entry = &mut table.entries[position];
    let backend = tables.backend(entry.backend_id)?;
    if !backend.is_live() || backend.addr != entry.backend || backend.port != entry.backend_port {
        return None;
    }
    // Other services may have it too. Looked for only when the sets of this one have changed.
    let stamp = stamp(tables, frontend.service);
    if entry.stamp != stamp {
        let set = pick::set_for(tables, frontend, is_inside(tables.config()?, dial)).ok()?;
        if !tables.range_contains(set, entry.backend_id) {
            return None;
        }
        entry.stamp = stamp;
    }
    bring_forward(table, position);
    Some((backend.addr, backend.port))
}

/// What tells one membership of a service's sets from another. Read before the sets: if they change meanwhile, they are
/// looked at again. Never zero.
#[inline(always)]
fn stamp<T: Tables>(tables: &T, service: u32) -> u32 {
    tables.fingerprint(service) | 1
}

#[inline(always)]
fn position_of(table: &SocketTable, addr: &Addr, port: Be16) -> Option<usize> {
    for position in 0..SOCKET_ENTRIES {
        let entry = &table.entries[position];
        if entry.stamp != 0 && entry.frontend_port == port && entry.frontend == *addr {
            return Some(position);
        }
    }
    None
}

/// True if datagrams of the socket to a frontend went to some backend before.
#[inline(always)]
pub fn is_known(table: &SocketTable, addr: &Addr, port: Be16) -> bool {
    position_of(table, addr, port).is_some()
}

/// The entry whose answer a datagram is that came from this address.
#[inline(always)]
pub fn entry_from<'a>(table: &'a SocketTable, addr: &Addr, port: Be16) -> Option<&'a SocketEntry> {
    table.entries.iter().find(|entry| is_from(entry, addr, port))
}

/// Stores an entry: in place of the one of the same frontend, else of the oldest.
#[inline(always)]
pub fn store(table: &mut SocketTable, new: &SocketEntry) {
    if let Some(position) = position_of(table, &new.frontend, new.frontend_port) {
        let position = position & (SOCKET_ENTRIES - 1);
        table.entries[position] = *new;
        return bring_forward(table, position);
    }
    let position = table.next as usize & (SOCKET_ENTRIES - 1);
    table.entries[position] = *new;
    table.next = (position as u32 + 1) & (SOCKET_ENTRIES as u32 - 1);
    bring_forward(table, position);
}

/// The socket sends to this address itself: from now on, what comes from there is nobody's answer.
#[inline(always)]
pub fn disown(table: &mut SocketTable, addr: &Addr, port: Be16) {
    for entry in &mut table.entries {
        if is_from(entry, addr, port) {
            entry.stamp = 0;
        }
    }
}

#[inline(always)]
fn is_from(entry: &SocketEntry, addr: &Addr, port: Be16) -> bool {
    entry.stamp != 0 && entry.backend_port == port && entry.backend == *addr
}

/// The entry at `position` changes places with the first one of its backend.
#[inline(always)]
fn bring_forward(table: &mut SocketTable, position: usize) {
    let position = position & (SOCKET_ENTRIES - 1);
    let entry = table.entries[position];
    for first in 0..SOCKET_ENTRIES {
        if first == position {
            return;
        }
        if is_from(&table.entries[first], &entry.backend, entry.backend_port) {
            table.entries[position] = table.entries[first];
            table.entries[first] = entry;
            return;
        }
    }
}

const _: () = assert!(SOCKET_ENTRIES.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lb::world::{World, addr};

    const PORT: Be16 = Be16(53);

    /// A table, and a node with one service of two backends.
    struct Socket {
        world: World,
        table: SocketTable,
    }

    const BACKENDS: [&str; 2] = ["10.244.1.5", "10.244.2.5"];

    impl Socket {
        fn new() -> Self {
            let mut world = World::new();
            world.add_service(&[(BACKENDS[0], 5353, true), (BACKENDS[1], 5353, false)], Proto::UDP);
            Self { world, table: SocketTable::ZERO }
        }

        /// It sent to `frontend`, and that went to a backend of the service.
        fn sends(&mut self, frontend: &str, backend: usize) {
            let id = (1..).find(|&id| self.record(id).addr == addr(BACKENDS[backend])).expect("it was added");
            let (backend, backend_port) = (self.record(id).addr, self.record(id).port);
            let (frontend, frontend_port) = (addr(frontend), PORT);
            let entry = SocketEntry { frontend, backend, frontend_port, backend_port, stamp: 1, backend_id: id };
            store(&mut self.table, &entry);
        }

        fn record(&self, id: u32) -> crate::abi::backend::BackendRecord {
            self.world.backends.borrow()[id as usize]
        }

        fn recalls(&mut self, frontend: &str) -> Option<Addr> {
            let (addr, netns) = (addr(frontend), self.world.config.node_netns);
            let now = self.world.now.get();
            let dial = Dial { addr, port: PORT, proto: Proto::UDP, socket: 1, netns, bound: false, now };
            let frontend = FrontendValue { service: 1, flags: 0 };
            recall(&self.world, &mut self.table, &dial, frontend).map(|(addr, _)| addr)
        }

        /// Whose answer comes from a backend.
        fn answer_from(&self, backend: usize) -> Option<Addr> {
            let port = self.record(1).port;
            entry_from(&self.table, &addr(BACKENDS[backend]), port).map(|entry| entry.frontend)
        }
    }

    #[test]
    fn a_frontend_keeps_its_backend_while_that_is_there() {
        let mut socket = Socket::new();
        socket.sends("10.96.0.1", 0);
        socket.sends("10.96.0.2", 1);
        assert_eq!(socket.recalls("10.96.0.1"), Some(addr(BACKENDS[0])));
        assert_eq!(socket.recalls("10.96.0.2"), Some(addr(BACKENDS[1])));
        assert_eq!(socket.recalls("10.96.0.3"), None);
        for record in socket.world.backends.borrow_mut().iter_mut().filter(|record| record.addr == addr(BACKENDS[0])) {
            *record = crate::abi::backend::BackendRecord::ZERO;
        }
        assert_eq!(socket.recalls("10.96.0.1"), None);
        assert_eq!(socket.recalls("10.96.0.2"), Some(addr(BACKENDS[1])));
    }

    #[test]
    fn a_backend_that_its_service_has_dropped_is_not_recalled_although_another_has_it() {
        let mut socket = Socket::new();
        socket.world.add_service(&[(BACKENDS[0], 5353, true), (BACKENDS[1], 5353, false)], Proto::UDP);
        socket.world.fingerprints.insert(1, 11);
        socket.sends("10.96.0.1", 0);
        socket.sends("10.96.0.2", 1);
        assert_eq!(socket.recalls("10.96.0.1"), Some(addr(BACKENDS[0])));
        // The service has the second alone from now on.
        let second = crate::abi::service::Range { base: 1, count: 1 };
        assert_eq!(socket.record(socket.world.slots[1].backend).addr, addr(BACKENDS[1]));
        socket.world.sets.insert((1, false), second);
        assert_eq!(socket.recalls("10.96.0.1"), Some(addr(BACKENDS[0])), "its sets are said to be the same");
        socket.world.fingerprints.insert(1, 13);
        assert_eq!(socket.recalls("10.96.0.1"), None);
        assert_eq!(socket.recalls("10.96.0.2"), Some(addr(BACKENDS[1])));
        socket.world.sets.insert((1, false), crate::abi::service::Range::REJECT);
        assert_eq!(socket.recalls("10.96.0.2"), Some(addr(BACKENDS[1])), "looked up once a change");
        socket.world.fingerprints.insert(1, 15);
        assert_eq!(socket.recalls("10.96.0.2"), None);
    }

    #[test]
    fn answers_of_a_shared_backend_are_those_of_the_frontend_that_was_sent_to_last() {
        let mut socket = Socket::new();
        let frontends = ["10.96.0.1", "10.96.0.2", "10.96.0.3"];
        for frontend in frontends {
            socket.sends(frontend, 0);
            assert_eq!(socket.answer_from(0), Some(addr(frontend)));
        }
        socket.sends("10.96.0.4", 1);
        for frontend in ["10.96.0.1", "10.96.0.3", "10.96.0.3", "10.96.0.2", "10.96.0.1"] {
            assert_eq!(socket.recalls(frontend), Some(addr(BACKENDS[0])));
            assert_eq!(socket.answer_from(0), Some(addr(frontend)));
            assert_eq!(socket.answer_from(1), Some(addr("10.96.0.4")), "others keep theirs");
        }
    }

    #[test]
    fn answers_of_a_backend_that_was_sent_to_itself_are_its_own() {
        let mut socket = Socket::new();
        socket.sends("10.96.0.1", 0);
        socket.sends("10.96.0.2", 0);
        socket.sends("10.96.0.3", 1);
        let port = socket.record(1).port;
        disown(&mut socket.table, &addr(BACKENDS[0]), port);
        assert_eq!(socket.answer_from(0), None);
        assert_eq!(socket.answer_from(1), Some(addr("10.96.0.3")));
        socket.sends("10.96.0.1", 0);
        assert_eq!(socket.answer_from(0), Some(addr("10.96.0.1")));
    }

    #[test]
    fn a_full_table_forgets_a_frontend_for_each_new_one_and_never_the_newest() {
        let mut socket = Socket::new();
        for number in 1..=40 {
            let frontend = std::format!("10.96.0.{number}");
            socket.sends(&frontend, number % 2);
            assert_eq!(socket.recalls(&frontend), Some(addr(BACKENDS[number % 2])));
            assert_eq!(socket.answer_from(number % 2), Some(addr(&frontend)));
        }
        let known = (1..=40).filter(|number| socket.recalls(&std::format!("10.96.0.{number}")).is_some());
        assert_eq!(known.count(), SOCKET_ENTRIES);
    }
}
