//! What the programs must know about the device they are attached to.

use super::abi;

abi! {
    /// A device that is a port of a bridge, or runs the XDP program.
    pub struct DeviceRecord [12] {
        /// Interface index of the bridge; 0: none.
        pub bridge: u32,
        /// The MAC address of the bridge, else the device's own, as it lies on the wire; only frames to it are looked at.
        pub mac: [u16; 3],
        /// See the flags of this type.
        pub flags: u16,
    }
}

impl DeviceRecord {
    /// What XDP sends by the device leaves it.
    pub const SENDS: u16 = 1;

    /// True if any of `flags` is set.
    #[inline(always)]
    pub const fn has(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }
}
