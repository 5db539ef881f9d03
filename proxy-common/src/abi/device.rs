//! What the programs must know about the device they are attached to.

use super::abi;

abi! {
    /// A device that is a port of a bridge.
    pub struct DeviceRecord [12] {
        /// Interface index of the bridge.
        pub bridge: u32,
        /// The bridge's own MAC address as it lies on the wire; only frames to it are looked at.
        pub mac: [u16; 3],
        /// Zero.
        pub reserved: u16,
    }
}
