//! What decisions look up and write, as traits: the kernel half implements them over BPF maps and helpers, tests over
//! hash maps.

use crate::abi::address::{AddressClass, PortUse};
use crate::abi::affinity::{AffinityKey, AffinityValue};
use crate::abi::backend::BackendRecord;
use crate::abi::config::Config;
use crate::abi::flow::{FlowKey, FlowRef, FlowValue};
use crate::abi::fragment::{FragmentKey, FragmentValue};
use crate::abi::frontend::{FrontendKey, FrontendValue};
use crate::abi::service::{Range, Slot};
use crate::addr::{Addr, Port};
use crate::lb::flow::{Nanos, Seconds};
use crate::lb::tuple::Tuple;
use crate::verdict::DropReason;

/// The tables. Methods that look up answer `None`, or the type's zero, for what is not there; none can fail otherwise.
pub trait Tables {
    /// The node's configuration.
    fn config(&self) -> Option<&Config>;
    /// The class of an address; zero if nothing is known about it.
    fn address(&self, addr: &Addr) -> AddressClass;
    /// Marks a known address: flows to it are looked up from now on.
    fn set_flows_of(&self, addr: &Addr);
    /// What a port of this node's addresses is used for.
    fn port_use(&self, port: Port) -> PortUse;
    /// Marks a port of this node's addresses with one of [`PortUse`]'s uses while flows use it so: one outside the configured range that
    /// carries rewritten sources, or a NodePort that has flows.
    fn mark_port(&self, port: Port, usage: u64);
    /// The service behind a frontend.
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue>;
    /// The cluster set or the local set of a service.
    fn range(&self, service: u32, local: bool) -> Option<Range>;
    /// Affinity timeout of a service, seconds; 0: none.
    fn affinity_timeout(&self, service: u32) -> u32;
    /// True if a client's address lies in one of a service's source ranges.
    fn is_allowed(&self, service: u32, client: &Addr) -> bool;
    /// Tells one membership of a service's sets from another. A new one is there after the new sets.
    fn fingerprint(&self, service: u32) -> u32;
    /// The slot at a position.
    fn slot(&self, position: u32) -> Option<Slot>;
    /// True if `backend` stands in `range`.
    fn range_contains(&self, range: Range, backend: u32) -> bool;
    /// The backend of an id.
    fn backend(&self, id: u32) -> Option<BackendRecord>;
    /// The backend a client had last.
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue>;
    /// Remembers the backend a client has.
    fn set_affinity(&self, key: &AffinityKey, value: &AffinityValue);
    /// Adds one to a service's counter.
    fn count(&self, service: u32, event: Event);
    /// Counts a drop.
    fn count_drop(&self, reason: DropReason);
}

/// Looking up flows: what a hook can do that changes no table.
pub trait Lookups: Tables {
    /// An established flow entry.
    fn established(&self, key: &FlowKey) -> Option<FlowRef<'_>>;
    /// A pending flow entry.
    fn pending(&self, key: &FlowKey) -> Option<FlowRef<'_>>;
    /// Interface index of the device the packet is on.
    fn ifindex(&self) -> u32;
    /// The clock.
    fn now(&self) -> Seconds;
}

/// Making, promoting and ending flows, and what only the kernel can tell about packets.
pub trait Flows: Lookups {
    /// Room for one entry that is being made; its content is left over from the last. (The kernel's stack is 512 bytes.)
    #[expect(clippy::mut_from_ref, reason = "one program a CPU uses it, and holds it once")]
    fn draft(&self) -> Option<&mut FlowValue>;
    /// Stores a pending entry; with `new_only` false is returned if there is one already.
    fn insert_pending(&self, key: &FlowKey, value: &FlowValue, new_only: bool) -> bool;
    /// Copies a pending entry to the established ones; false if there is one already or the table is full.
    fn establish(&self, key: &FlowKey, value: FlowRef<'_>) -> bool;
    /// Removes an entry from the established ones.
    fn remove_established(&self, key: &FlowKey);
    /// Removes an entry from the pending ones.
    fn remove_pending(&self, key: &FlowKey);
    /// Removes an entry from both.
    #[inline(always)]
    fn remove(&self, key: &FlowKey) {
        self.remove_established(key);
        self.remove_pending(key);
    }
    /// The ports of a fragmented packet.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue>;
    /// Remembers the ports of a fragmented packet.
    fn set_fragment(&self, key: &FragmentKey, value: &FragmentValue);
    /// Calls `found` with 0, 1, 2 … below `tries` until it answers true; answers whether it did.
    fn search<F: FnMut(u32) -> bool>(&self, tries: u32, found: F) -> bool;

    /// The clock, finer.
    fn nanos(&self) -> Nanos;
    /// The address this node would use as source towards `dst`, asked for a packet from `src`.
    fn source_towards(&self, src: &Addr, dst: &Addr) -> Option<Addr>;
    /// Where `dst` is, seen from the bridge that this packet's device is a port of.
    fn bridge_neighbour(&self, src: &Addr, dst: &Addr) -> Neighbour;
    /// What the kernel's connection tracking knows of a tuple.
    fn tracked(&self, tuple: &Tuple) -> Tracked;
    /// True if a socket of this node is connected with exactly this tuple (source is the peer).
    fn has_connected_socket(&self, tuple: &Tuple) -> bool;
}

/// What the kernel's connection tracking knows of a tuple.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tracked {
    /// Nothing (or tracking is off, or cannot be asked).
    Unknown,
    /// A connection whose destination is not translated.
    Plain,
    /// A connection whose destination the kernel translates: a predecessor's.
    Translated,
}

/// Where an address is, seen from a bridge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Neighbour {
    /// Not on this bridge, or the device is no bridge port.
    Elsewhere,
    /// On this bridge, its MAC address is not known yet.
    Unresolved,
    /// On this bridge, at this MAC address (as on the wire).
    At([u16; 3]),
}

/// What a service's counters count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A flow was promoted.
    Flow,
    /// A socket was sent to a backend.
    Socket,
    /// A connection found no backend.
    NoBackend,
}
