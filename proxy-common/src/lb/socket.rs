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

/// Decides on a connect, or on a datagram without a connection (whose socket is not left to the packet path when bound:
/// every such socket is).
#[inline(always)]
pub fn dial<T: Tables>(tables: &T, dial: &Dial, connects: bool) -> Verdict {
    let Some(config) = tables.config() else { return Verdict::Leave };
    let of_node = dial.netns == config.node_netns;
    if config.has(Config::SOCKETS_OFF) || config.has(Config::SOCKETS_HOST_ONLY) && !of_node {
        return Verdict::Leave;
    }
    let mut class = tables.address(&dial.addr);
    if of_node && dial.addr.is_loopback() {
        class.flags |= AddressClass::NODE | AddressClass::NODE_PORT;
    }
    if !class.has(AddressClass::FRONTEND | AddressClass::NODE_PORT) {
        return Verdict::Leave;
    }
    let ports = tables.port_use(dial.port.host());
    let Some(found) = pick::find_frontend(tables, class, ports, &dial.addr, dial.port, dial.proto) else {
        return if class.has(AddressClass::CLUSTER_IP) {
            Verdict::Reject(DropReason::UnknownPort)
        } else {
            Verdict::Leave
        };
    };
    // Two services with one backend would make two connections with the same ends (EADDRNOTAVAIL); the packet path can
    // tell them apart. The node's own packets do not pass it.
    if !of_node && (connects && dial.bound || found.value.has(FrontendValue::PACKETS_ONLY)) {
        return Verdict::Leave;
    }
    let service = found.value.service;
    let client = Client {
        inside: of_node || config.cluster_cidr_count != 0,
        affinity: pick::affinity_of_netns(dial.netns, service),
        hash: select::hash_socket(config.hash_key, dial.socket, service),
    };
    match pick::pick(tables, found.value, &client, dial.now) {
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
                service,
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

/// The entry of a frontend, while its backend is still there.
#[inline(always)]
pub fn entry_to<'a, T: Tables>(tables: &T, table: &'a SocketTable, addr: &Addr, port: Be16) -> Option<&'a SocketEntry> {
    for entry in &table.entries {
        if entry.service != 0 && entry.frontend_port == port && entry.frontend == *addr {
            let backend = tables.backend(entry.backend_id)?;
            let same = backend.is_live() && backend.addr == entry.backend && backend.port == entry.backend_port;
            return if same { Some(entry) } else { None };
        }
    }
    None
}

/// The entry of a backend, for a datagram that came from it.
#[inline(always)]
pub fn entry_from<'a>(table: &'a SocketTable, addr: &Addr, port: Be16) -> Option<&'a SocketEntry> {
    table.entries.iter().find(|entry| entry.service != 0 && entry.backend_port == port && entry.backend == *addr)
}

/// Stores an entry: in place of the one of the same frontend, else of the oldest.
#[inline(always)]
pub fn store(table: &mut SocketTable, new: &SocketEntry) {
    for entry in &mut table.entries {
        if entry.service != 0 && entry.frontend_port == new.frontend_port && entry.frontend == new.frontend {
            *entry = *new;
            return;
        }
    }
    let position = table.next as usize & (SOCKET_ENTRIES - 1);
    table.entries[position] = *new;
    table.next = (position as u32 + 1) & (SOCKET_ENTRIES as u32 - 1);
}

const _: () = assert!(SOCKET_ENTRIES.is_power_of_two());
