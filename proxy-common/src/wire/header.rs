//! Header layouts, as plain integers in wire order, of the fields that are read.

/// A header that a [`super::Packet`] can load: `repr(C)`, integers only, any bytes are a value.
pub trait Header: Copy + 'static {
    /// The header at the start of `bytes`, or `None` if there are too few.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

/// Reads one integer in native order and advances.
trait Take: Sized {
    fn take(bytes: &mut &[u8]) -> Option<Self>;
}

macro_rules! take {
    ($($int:ty),*) => { $(impl Take for $int {
        fn take(bytes: &mut &[u8]) -> Option<Self> {
            let (head, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            Some(<$int>::from_ne_bytes(*head))
        }
    })* };
}
take!(u8, u16, u32);

impl<T: Take + Default + Copy, const N: usize> Take for [T; N] {
    fn take(bytes: &mut &[u8]) -> Option<Self> {
        let mut all = [T::default(); N];
        for one in &mut all {
            *one = T::take(bytes)?;
        }
        Some(all)
    }
}

macro_rules! header {
    ($(#[$meta:meta])* pub struct $name:ident [$size:literal] { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$type>())* == $size);
        impl Header for $name {
            fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
                Some(Self { $($field: <$type as Take>::take(&mut bytes)?,)* })
            }
        }
    };
}

header! {
    /// Ethernet II (IEEE 802.3).
    pub struct Ethernet [14] {
        /// Destination.
        pub destination: [u16; 3],
        /// Source.
        pub source: [u16; 3],
        /// EtherType.
        pub ethertype: u16,
    }
}

header! {
    /// IEEE 802.1Q tag, after the EtherType.
    pub struct Vlan [4] {
        /// Priority and VLAN id.
        pub tag: u16,
        /// EtherType of what follows.
        pub ethertype: u16,
    }
}

header! {
    /// IPv4 without options (RFC 791).
    pub struct Ipv4 [20] {
        /// Version and header length in words.
        pub version_ihl: u8,
        /// Differentiated services.
        pub tos: u8,
        /// Total length.
        pub length: u16,
        /// Identification.
        pub id: u16,
        /// Flags and fragment offset.
        pub fragment: u16,
        /// Time to live.
        pub ttl: u8,
        /// Protocol.
        pub protocol: u8,
        /// Header checksum.
        pub checksum: u16,
        /// Source.
        pub source: u32,
        /// Destination.
        pub destination: u32,
    }
}

header! {
    /// IPv6 (RFC 8200).
    pub struct Ipv6 [40] {
        /// Version, traffic class, flow label.
        pub version: u32,
        /// Payload length.
        pub length: u16,
        /// Next header.
        pub next_header: u8,
        /// Hop limit.
        pub hop_limit: u8,
        /// Source.
        pub source: [u32; 4],
        /// Destination.
        pub destination: [u32; 4],
    }
}

header! {
    /// The two bytes that every IPv6 extension header but Fragment begins with.
    pub struct Extension [2] {
        /// Next header.
        pub next_header: u8,
        /// Length in units that depend on the header.
        pub length: u8,
    }
}

header! {
    /// IPv6 Fragment header (RFC 8200, 4.5).
    pub struct Fragment [8] {
        /// Next header.
        pub next_header: u8,
        /// Reserved.
        pub reserved: u8,
        /// Offset and the more-fragments bit.
        pub offset: u16,
        /// Identification.
        pub id: u32,
    }
}

header! {
    /// The ports that TCP and UDP begin with.
    pub struct Ports [4] {
        /// Source port.
        pub source: u16,
        /// Destination port.
        pub destination: u16,
    }
}

header! {
    /// UDP (RFC 768).
    pub struct Udp [8] {
        /// Source port.
        pub source: u16,
        /// Destination port.
        pub destination: u16,
        /// Length of header and data.
        pub length: u16,
        /// Checksum; zero: none.
        pub checksum: u16,
    }
}

header! {
    /// TCP without options (RFC 9293).
    pub struct Tcp [20] {
        /// Source port.
        pub source: u16,
        /// Destination port.
        pub destination: u16,
        /// Sequence number.
        pub sequence: u32,
        /// Acknowledgment number.
        pub acknowledgment: u32,
        /// Data offset in the upper four bits.
        pub offset: u8,
        /// Control bits.
        pub flags: u8,
        /// Window.
        pub window: u16,
        /// Checksum.
        pub checksum: u16,
        /// Urgent pointer.
        pub urgent: u16,
    }
}

header! {
    /// ICMP and ICMPv6: type, code, checksum, rest (RFC 792, RFC 4443).
    pub struct Icmp [8] {
        /// Type.
        pub kind: u8,
        /// Code.
        pub code: u8,
        /// Checksum.
        pub checksum: u16,
        /// Depends on the type.
        pub rest: u32,
    }
}

/// EtherTypes in wire order (IEEE 802).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800u16.to_be();
    /// IPv6.
    pub const IPV6: u16 = 0x86ddu16.to_be();
    /// 802.1Q.
    pub const VLAN: u16 = 0x8100u16.to_be();
    /// 802.1ad.
    pub const QINQ: u16 = 0x88a8u16.to_be();
}

/// IPv6 extension headers that may stand before the transport (IANA).
pub mod extension {
    /// Hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing.
    pub const ROUTING: u8 = 43;
    /// Fragment.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header (RFC 4302): its length counts 32-bit words, less two.
    pub const AUTHENTICATION: u8 = 51;
    /// Destination options.
    pub const DESTINATION: u8 = 60;
}

/// TCP control bits.
pub mod tcp {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 1 << 1;
    /// RST.
    pub const RST: u8 = 1 << 2;
    /// ACK.
    pub const ACK: u8 = 1 << 4;
    /// Not of the header: the segment carries data. (In the place of CWR, which nobody here asks for.)
    pub const DATA: u8 = 1 << 7;
}
