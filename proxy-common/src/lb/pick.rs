//! From a frontend to a backend: which set a client gets, affinity, and the pick. Shared by sockets and packets.

use crate::abi::address::{AddressClass, PortUse};
use crate::abi::affinity::{AffinityKey, AffinityValue};
use crate::abi::backend::BackendRecord;
use crate::abi::frontend::{FrontendKey, FrontendValue};
use crate::abi::service::Range;
use crate::addr::{Addr, Be16, Proto};
use crate::lb::flow::Seconds;
use crate::lb::select;
use crate::tables::Tables;
use crate::verdict::{DropReason, Refusal};

/// A frontend that was found, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Its service and flags.
    pub value: FrontendValue,
    /// True if the NodePort wildcard matched, not the address itself.
    pub by_node_port: bool,
}

/// The frontend of a destination whose class is `class`: the exact address and port, the address with any port, a
/// NodePort; in that order.
#[inline(always)]
pub fn find_frontend<T: Tables>(
    tables: &T,
    class: AddressClass,
    ports: PortUse,
    addr: &Addr,
    port: Be16,
    proto: Proto,
) -> Option<Frontend> {
    let mut key = FrontendKey { addr: *addr, port, proto: proto.0, reserved: 0 };
    if class.has(AddressClass::FRONTEND) {
        if let Some(value) = tables.frontend(&key) {
            return Some(Frontend { value, by_node_port: false });
        }
        if class.has(AddressClass::ANY_PORT) {
            key.port = Be16::ZERO;
            if let Some(value) = tables.frontend(&key) {
                return Some(Frontend { value, by_node_port: false });
            }
            key.port = port;
        }
    }
    if class.has(AddressClass::NODE_PORT) && ports.has(PortUse::NODE_PORT) {
        key.addr = addr.wildcard();
        if let Some(value) = tables.frontend(&key) {
            return Some(Frontend { value, by_node_port: true });
        }
    }
    None
}

/// A client, as far as the pick depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Inside: this node itself, or an address of the cluster.
    pub inside: bool,
    /// Key of affinity; its service is filled in.
    pub affinity: AffinityKey,
    /// Random to an outsider, the same for the same connection.
    pub hash: u64,
}

/// A backend that was picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Its id.
    pub id: u32,
    /// Its record.
    pub backend: BackendRecord,
    /// The service has affinity.
    pub affine: bool,
}

/// The backend for a new connection, or why there is none.
///
/// A slot of another owner means that its range was given away while this was running, which userspace waits for not to
/// happen: the packet is dropped, its retransmission finds the new range.
#[inline(always)]
pub fn pick<T: Tables>(
    tables: &T,
    frontend: FrontendValue,
    client: &Client,
    now: Seconds,
) -> Result<Pick, (DropReason, Refusal)> {
    let service = frontend.service;
    let range = set_for(tables, frontend, client.inside)?;
    let timeout = tables.affinity_timeout(service);
    if timeout != 0
        && let Some(pick) = remembered(tables, range, client, timeout, now)
    {
        return Ok(pick);
    }
    let position = range.base.wrapping_add(select::position(client.hash, range.count));
    match tables.slot(position) {
        Some(slot) if slot.owner == service => match tables.backend(slot.backend) {
            Some(backend) if backend.is_live() => Ok(Pick { id: slot.backend, backend, affine: timeout != 0 }),
            _ => Err((DropReason::NoEndpoint, Refusal::Drop)),
        },
        _ => Err((DropReason::NoEndpoint, Refusal::Drop)),
    }
}

/// The set that a client gets by its scope, or why there is nobody in it.
#[inline(always)]
pub fn set_for<T: Tables>(tables: &T, frontend: FrontendValue, inside: bool) -> Result<Range, (DropReason, Refusal)> {
    let local = frontend.has(if inside { FrontendValue::INSIDE_LOCAL } else { FrontendValue::OUTSIDE_LOCAL });
    match tables.range(frontend.service, local) {
        Some(range) if range.count != 0 => Ok(range),
        Some(range) => Err(nobody(range)),
        None => Err(nobody(Range::REJECT)),
    }
}

#[inline(always)]
fn nobody(range: Range) -> (DropReason, Refusal) {
    if range.base == Range::DROP.base {
        (DropReason::NoLocalEndpoint, Refusal::Drop)
    } else {
        (DropReason::NoEndpoint, Refusal::Reject)
    }
}

/// The backend that the client had last, if that was not too long ago and it still stands in the set.
#[inline(always)]
fn remembered<T: Tables>(tables: &T, range: Range, client: &Client, timeout: u32, now: Seconds) -> Option<Pick> {
    let last = tables.affinity(&client.affinity)?;
    if Seconds(last.seen).age(now) > Seconds::span(timeout) {
        return None;
    }
    let backend = tables.backend(last.backend)?;
    if !backend.is_live() || !tables.range_contains(range, last.backend) {
        return None;
    }
    Some(Pick { id: last.backend, backend, affine: true })
}

/// Remembers `backend` for the client.
#[inline(always)]
pub fn remember<T: Tables>(tables: &T, key: &AffinityKey, backend: u32, now: Seconds) {
    tables.set_affinity(key, &AffinityValue { backend, seen: now.0 });
}

/// The affinity key of a client address.
#[inline(always)]
pub const fn affinity_of_address(addr: &Addr, service: u32) -> AffinityKey {
    AffinityKey { client: addr.0, service, is_cookie: 0 }
}

/// The affinity key of the processes in a network namespace.
#[inline(always)]
pub const fn affinity_of_netns(cookie: u64, service: u32) -> AffinityKey {
    AffinityKey { client: [cookie as u32, (cookie >> 32) as u32, 0, 0], service, is_cookie: 1 }
}
