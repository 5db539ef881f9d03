//! Ports of fragmented packets, remembered from the first fragment (RFC 791, RFC 8200 section 4.5).

use super::abi;
use crate::addr::{Addr, Be16};

abi! {
    /// A fragmented packet at one hook (addresses differ before and after translation).
    pub struct FragmentKey [40] {
        /// Source as seen at the hook.
        pub src: Addr,
        /// Destination as seen at the hook.
        pub dst: Addr,
        /// Identification, as on the wire (16 bits for IPv4).
        pub id: u32,
        /// [`crate::addr::Proto`] number.
        pub proto: u8,
        /// 0: ingress, 1: egress.
        pub hook: u8,
        /// Zero.
        pub reserved: u16,
    }
}

abi! {
    /// The ports that the first fragment carried.
    pub struct FragmentValue [4] {
        /// Source port.
        pub sport: Be16,
        /// Destination port.
        pub dport: Be16,
    }
}
