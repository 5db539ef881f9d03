//! Flows: one connection through a frontend is two or three entries that find each other by their keys.
//!
//! | kind | key | found by | tells |
//! |---|---|---|---|
//! | front | client to frontend | client's packet at ingress | the backend |
//! | plain | client and backend, canonical order | both directions at egress | the frontend, a rewritten source; that the packet is already translated |
//! | snat | backend to rewritten source | reply at ingress | the client |

use super::abi;
use crate::addr::{Addr, Be16};

abi! {
    /// Key of a flow entry.
    pub struct FlowKey [40] {
        /// First end.
        pub a: Addr,
        /// Second end.
        pub b: Addr,
        /// Port of `a`.
        pub a_port: Be16,
        /// Port of `b`.
        pub b_port: Be16,
        /// [`crate::addr::Proto`] number.
        pub proto: u8,
        /// One of the constants of this type.
        pub kind: u8,
        /// Zero.
        pub reserved: u16,
    }
}

impl FlowKey {
    /// `a` is the client, `b` the frontend.
    pub const FRONT: u8 = 1;
    /// Client and backend; the smaller (address, port) is `a`.
    pub const PLAIN: u8 = 2;
    /// `a` is the backend, `b` the rewritten source.
    pub const SNAT: u8 = 3;
}

abi! {
    /// Value of a flow entry. Packets change the first two, `mac` and `stamp`; the other fields are fixed when it is made.
    pub struct FlowValue [80] {
        /// Seconds of the last packet (high half), state bits (low half); of the plain entry. See [`crate::lb::flow::Hot`].
        /// front: seconds of the last question for `mac`. snat: when it was made, and whether it is in use; see
        /// [`crate::lb::flow::Hold`].
        pub hot: u64,
        /// Proof of the return path, of the plain entry; of the others, what it was at first. See [`crate::lb::flow::Proof`].
        pub proof: u64,
        /// front: the backend; plain: the frontend; snat: the client.
        pub peer: Addr,
        /// front and plain: the rewritten source, or zero.
        pub nat: Addr,
        /// Port of `peer`.
        pub peer_port: Be16,
        /// Port of `nat`, or zero.
        pub nat_port: Be16,
        /// front: the port that replaces the client's; plain: the client's own port; zero if it is kept.
        pub alias_port: Be16,
        /// front: where to send frames on the same bridge, as on the wire; zero if the stack forwards.
        pub mac: [u16; 3],
        /// Service id.
        pub service: u32,
        /// Backend id.
        pub backend: u32,
        /// Interface index by which the client's packets come.
        pub ifindex: u32,
        /// See the flags of this type.
        pub flags: u32,
        /// plain, TCP: the sequence number of the client's last SYN, wire order. front, UDP: the service's fingerprint when the
        /// backend was last known to be in its set. Packets that change it are rare.
        pub stamp: u32,
    }
}

impl FlowValue {
    /// plain: the client is `a` of the key.
    pub const CLIENT_IS_A: u32 = 1;
    /// The client's source address is rewritten on the way out.
    pub const SNAT: u32 = 1 << 1;
    /// A direct connection to a backend that got an alias port because of a clash; `peer` of plain is the backend itself.
    pub const DIRECT: u32 = 1 << 2;
    /// Affinity is written when the flow is promoted.
    pub const AFFINITY: u32 = 1 << 3;
    /// front: the backend is on the client's bridge, its MAC address was not known when the flow was opened.
    pub const WANTS_MAC: u32 = 1 << 4;
    /// The client's own port towards the backend was known to be another connection's when the flow was opened.
    pub const ALIAS: u32 = 1 << 5;
    /// front, TCP: the endpoint is gone, and the client is to be told with its next segment. Set by the agent, which puts a
    /// changed copy into the place of the entry.
    pub const STALE: u32 = 1 << 6;
    /// In the tables of a dry run: the entry has been removed.
    pub const GONE: u32 = 1 << 31;

    /// True if any of `flags` is set.
    #[inline(always)]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }
}

/// A flow entry in place: fixed fields by reference, the changing ones by single loads and stores.
///
/// Several CPUs may touch one flow; each of the changing words is written whole, the newest store wins.
#[derive(Clone, Copy)]
pub struct FlowRef<'a> {
    entry: *mut FlowValue,
    lifetime: core::marker::PhantomData<&'a FlowValue>,
}

impl<'a> FlowRef<'a> {
    /// Wraps an entry.
    ///
    /// # Safety
    /// `entry` points to a valid `FlowValue` for `'a`, whose fixed fields nobody changes meanwhile. (A BPF map element
    /// is such: it stays readable until the program ends, even when it is deleted.)
    #[inline(always)]
    pub unsafe fn new(entry: *mut FlowValue) -> Self {
        Self { entry, lifetime: core::marker::PhantomData }
    }

    /// The changing word.
    #[inline(always)]
    pub fn hot(&self) -> u64 {
        // SAFETY: valid by `new`; aligned, eight bytes, one load.
        unsafe { (&raw const (*self.entry).hot).read_volatile() }
    }

    /// Replaces the changing word.
    #[inline(always)]
    pub fn set_hot(&self, hot: u64) {
        // SAFETY: as in `hot`.
        unsafe { (&raw mut (*self.entry).hot).write_volatile(hot) }
    }

    /// The proof word.
    #[inline(always)]
    pub fn proof(&self) -> u64 {
        // SAFETY: as in `hot`.
        unsafe { (&raw const (*self.entry).proof).read_volatile() }
    }

    /// Replaces the proof word.
    #[inline(always)]
    pub fn set_proof(&self, proof: u64) {
        // SAFETY: as in `hot`.
        unsafe { (&raw mut (*self.entry).proof).write_volatile(proof) }
    }

    /// Replaces the MAC address for the same bridge; it is read by later packets only, half a write cannot hurt more
    /// than one frame.
    #[inline(always)]
    pub fn set_mac(&self, mac: [u16; 3]) {
        // SAFETY: valid by `new`.
        unsafe { (&raw mut (*self.entry).mac).write_volatile(mac) }
    }

    /// See the field.
    #[inline(always)]
    pub fn stamp(&self) -> u32 {
        // SAFETY: valid by `new`; aligned, four bytes, one load.
        unsafe { (&raw const (*self.entry).stamp).read_volatile() }
    }

    /// Replaces it.
    #[inline(always)]
    pub fn set_stamp(&self, stamp: u32) {
        // SAFETY: as in `stamp`.
        unsafe { (&raw mut (*self.entry).stamp).write_volatile(stamp) }
    }

    /// The whole entry, to copy it elsewhere.
    #[inline(always)]
    pub fn with<T>(&self, read: impl FnOnce(&FlowValue) -> T) -> T {
        // SAFETY: valid by `new`; a changing word that is replaced meanwhile is copied old or new.
        read(unsafe { &*self.entry })
    }

    /// A field that does not change.
    #[inline(always)]
    pub fn fixed<T: Copy>(&self, field: impl FnOnce(&'a FlowValue) -> T) -> T {
        // SAFETY: valid by `new`; the closure copies fixed fields out.
        field(unsafe { &*self.entry })
    }
}
