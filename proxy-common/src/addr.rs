//! Addresses, ports and protocols: the only place where byte order is converted.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP address as four 32-bit words exactly as they lie on the wire; IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2).
///
/// Compared and hashed, never calculated with. Words keep the kernel code half the size that bytes would give.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Addr(pub [u32; 4]);

/// Third word of an IPv4-mapped address: 00 00 ff ff in wire order.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// The IPv6 unspecified address, `::`; the NodePort wildcard of IPv6.
    pub const UNSPECIFIED_V6: Self = Self([0; 4]);
    /// `::ffff:0.0.0.0`; the NodePort wildcard of IPv4.
    pub const UNSPECIFIED_V4: Self = Self([0, 0, MAPPED, 0]);

    /// The mapped form of an IPv4 address given as its wire word.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// True for an IPv4 address (in its mapped form).
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The wire word of an IPv4 address; the last word of any other.
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.0[3]
    }

    /// The wildcard address of this address's family, under which NodePorts are stored.
    #[inline(always)]
    pub const fn wildcard(&self) -> Self {
        if self.is_v4() { Self::UNSPECIFIED_V4 } else { Self::UNSPECIFIED_V6 }
    }

    /// True for 127.0.0.0/8 and `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 1u32.to_be()
        }
    }

    /// True for IPv6 link-local addresses, fe80::/10.
    #[inline(always)]
    pub const fn is_v6_link_local(&self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0x3fa
    }

    /// True for addresses that stand for many receivers: 224.0.0.0/4, 255.255.255.255, ff00::/8.
    #[inline(always)]
    pub const fn is_multicast_or_broadcast(&self) -> bool {
        if self.is_v4() {
            self.0[3] == u32::MAX || u32::from_be(self.0[3]) >> 28 == 0xe
        } else {
            u32::from_be(self.0[0]) >> 24 == 0xff
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(addr: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(addr.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(addr: Ipv6Addr) -> Self {
        let o = addr.octets();
        let word = |i: usize| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl From<IpAddr> for Addr {
    fn from(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Addr> for IpAddr {
    /// The address in its own family: a mapped address comes back as IPv4.
    fn from(addr: Addr) -> Self {
        if addr.is_v4() {
            return Ipv4Addr::from(addr.0[3].to_ne_bytes()).into();
        }
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(addr.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets).into()
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

/// A port number in host order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Port(pub u16);

/// A 16-bit number in wire order, as it stands in headers and map keys.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Be16(pub u16);

impl Be16 {
    /// No port.
    pub const ZERO: Self = Self(0);

    /// The number in host order.
    #[inline(always)]
    pub const fn host(self) -> Port {
        Port(u16::from_be(self.0))
    }

    /// True for port 0, which stands for "none" or "any" in the tables.
    #[inline(always)]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl Port {
    /// The number in wire order.
    #[inline(always)]
    pub const fn be(self) -> Be16 {
        Be16(self.0.to_be())
    }
}

impl From<Port> for Be16 {
    fn from(port: Port) -> Self {
        port.be()
    }
}

impl From<Be16> for Port {
    fn from(port: Be16) -> Self {
        port.host()
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Be16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.host().fmt(f)
    }
}

/// A transport protocol number (IANA protocol numbers).
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Proto(pub u8);

impl Proto {
    /// RFC 9293.
    pub const TCP: Self = Self(6);
    /// RFC 768.
    pub const UDP: Self = Self(17);
    /// RFC 792.
    pub const ICMP: Self = Self(1);
    /// RFC 4443.
    pub const ICMPV6: Self = Self(58);
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TCP => f.write_str("TCP"),
            Self::UDP => f.write_str("UDP"),
            Self::ICMP => f.write_str("ICMP"),
            Self::ICMPV6 => f.write_str("ICMPv6"),
            Self(other) => other.fmt(f),
        }
    }
}

impl fmt::Debug for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    proptest! {
        #[test]
        fn addresses_survive_the_round_trip(octets in any::<[u8; 16]>(), v4 in any::<[u8; 4]>()) {
            let v6 = Ipv6Addr::from(octets);
            prop_assume!(v6.to_ipv4_mapped().is_none());
            prop_assert_eq!(IpAddr::from(Addr::from(v6)), IpAddr::V6(v6));
            prop_assert_eq!(IpAddr::from(Addr::from(Ipv4Addr::from(v4))), IpAddr::V4(v4.into()));
        }

        #[test]
        fn classes_agree_with_std(octets in any::<[u8; 16]>(), v4 in any::<[u8; 4]>()) {
            let (v6, v4) = (Ipv6Addr::from(octets), Ipv4Addr::from(v4));
            prop_assert_eq!(Addr::from(v4).is_loopback(), v4.is_loopback());
            prop_assert_eq!(Addr::from(v6).is_v6_link_local(), v6.is_unicast_link_local());
            prop_assert_eq!(Addr::from(v4).is_multicast_or_broadcast(), v4.is_multicast() || v4.is_broadcast());
            prop_assert_eq!(Addr::from(v6).is_multicast_or_broadcast(), v6.is_multicast());
        }
    }

    #[test]
    fn mapped_words_are_the_wire_form() {
        let addr = Addr::from(Ipv4Addr::new(10, 96, 0, 1));
        let bytes: std::vec::Vec<u8> = addr.0.iter().flat_map(|w| w.to_ne_bytes()).collect();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 96, 0, 1]);
        assert_eq!(addr.to_string(), "10.96.0.1");
        assert!(Addr::from(Ipv6Addr::LOCALHOST).is_loopback());
        assert_eq!(addr.wildcard(), Addr::UNSPECIFIED_V4);
    }
}
