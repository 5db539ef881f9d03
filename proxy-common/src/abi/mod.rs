//! Keys and values of the BPF maps, as both halves see them.
//!
//! Every type is `repr(C)`, plain integers, without padding (a key with padding would carry stack garbage and never be
//! found from userspace). One macro derives all of that and holds the project's argument for [`aya::Pod`].
//! Changing any of them raises [`ABI_VERSION`], which is part of the pin path: old pins are migrated, never misread.
//!
//! | map | kind | key | value |
//! |---|---|---|---|
//! | `config` | array, 1 | 0 | [`config::Config`] |
//! | `addresses` | hash | [`Addr`] | [`address::AddressClass`] |
//! | `ports` | array | port / 32 | [`address::PortWord`] |
//! | `kept_ports` | mapped array | port / 16 | [`address::PortWord`], see [`address::KEPT_WORDS`] |
//! | `frontends` | hash | [`frontend::FrontendKey`] | [`frontend::FrontendValue`] |
//! | `source_ranges` | longest-prefix-match trie | [`source::SourceRangeKey`] | 1, `u32` |
//! | `services` | mapped array | service id | [`service::ServiceRecord`] |
//! | `service_names` | hash | service id | [`service::ServiceName`] |
//! | `slots` | mapped array | position | [`service::Slot`] |
//! | `backends` | mapped array | backend id | [`backend::BackendRecord`] |
//! | `flows_pending` | LRU hash | [`flow::FlowKey`] | [`flow::FlowValue`] |
//! | `flows` | hash, never evicts | [`flow::FlowKey`] | [`flow::FlowValue`] |
//! | `dry_flows_pending`, `dry_flows` | hashes of a dry run's own | [`flow::FlowKey`] | [`flow::FlowValue`] |
//! | `affinity` | LRU hash | [`affinity::AffinityKey`] | [`affinity::AffinityValue`] |
//! | `fragments` | LRU hash | [`fragment::FragmentKey`] | [`fragment::FragmentValue`] |
//! | `devices` | hash | interface index | [`device::DeviceRecord`] |
//! | `service_counters` | per-CPU array | service id | [`counter::ServiceCounters`] |
//! | `drop_counters` | per-CPU array | [`crate::verdict::DropReason`] | packets, `u64` |
//! | `watch` | array, 1 | 0 | [`event::Watch`] |
//! | `events` | ring buffer | | [`event::EventRecord`] |
//! | `sockets`, `sockets_udp` | socket storage | socket | [`socket::SocketEntry`], [`socket::SocketTable`] |
#![expect(unsafe_code, reason = "the Pod argument and the shared flow record are written here, once")]

pub mod address;
pub mod affinity;
pub mod backend;
pub mod config;
pub mod counter;
pub mod device;
pub mod event;
pub mod flow;
pub mod fragment;
pub mod frontend;
pub mod service;
pub mod socket;
pub mod source;

/// Version of every layout in this module; part of the pin path.
pub const ABI_VERSION: u32 = 2;

/// Declares a map key or value: `repr(C)`, comparable, zeroable, of exactly `SIZE` bytes and no padding.
macro_rules! abi {
    ($(#[$meta:meta])* pub struct $name:ident [$size:literal] { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }

        const _: () = assert!(size_of::<$name>() == $size, "size of an ABI type changed");
        const _: () = assert!(0 $(+ size_of::<$type>())* == $size, "an ABI type has padding");

        impl $name {
            /// All fields zero.
            pub const ZERO: Self = {
                // SAFETY: only integers and arrays of integers (asserted to be free of padding above), for which zero bits are a value.
                unsafe { core::mem::zeroed() }
            };
        }

        #[cfg(feature = "user")]
        // SAFETY: `repr(C)`, integers only, no padding: every byte is initialised and every bit pattern is a value.
        unsafe impl aya::Pod for $name {}
    };
}
pub(crate) use abi;

#[cfg(feature = "user")]
// SAFETY: a transparent wrapper of four integers.
unsafe impl aya::Pod for crate::addr::Addr {}
