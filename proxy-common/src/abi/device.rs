//! What the programs must know about the device they are attached to.

use super::abi;

abi! {
    /// A device that is a port of a bridge, or runs the XDP program.
    pub struct DeviceRecord [12] {
        /// Interface index of the bridge; 0: none.
        pub bridge: u32,
        /// The MAC address of the bridge, else the device's own, as it lies on the wire; only frames to it are looked at.
        pub mac: [u16; 3],
        /// Zero.
        pub reserved: u16,
    }
}
