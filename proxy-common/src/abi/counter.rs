//! Counters, one copy a CPU.

use super::abi;

abi! {
    /// What went through one service port.
    pub struct ServiceCounters [40] {
        /// Connections opened by packets (flows created).
        pub flows: u64,
        /// Connections opened by the socket hooks.
        pub sockets: u64,
        /// Packets translated, both directions.
        pub packets: u64,
        /// Bytes of those packets, as on the device (headers included).
        pub bytes: u64,
        /// New connections that found no backend (rejected or dropped).
        pub no_backend: u64,
    }
}
