//! Headers from bytes: [`parse`] turns a packet into a [`Parsed`], which all decisions are made on.
//!
//! Reads only through [`Packet`], in bounds or not at all: any bytes are survived.

pub mod checksum;
pub mod header;

use crate::addr::{Addr, Be16, Proto};
use crate::lb::tuple::Tuple;
use header::{
    Ethernet, Extension, Fragment, Header, Icmp, Ipv4, Ipv6, Ports, Tcp, Udp, Vlan, ethertype, extension, tcp,
};

/// Bytes that can be read. The kernel half implements it for its contexts, tests for slices.
pub trait Packet {
    /// The header at `offset`, or `None` if the packet ends before.
    fn load<T: Header>(&self, offset: usize) -> Option<T>;
}

/// VLAN tags that are looked through.
const MAX_VLAN_TAGS: usize = 2;
/// IPv6 extension headers that are looked through; longer chains pass untouched.
const MAX_EXTENSIONS: usize = 6;
/// The same inside a quote: hop-by-hop and fragment, say.
const MAX_QUOTED_EXTENSIONS: usize = 2;
/// No offset beyond this is read: what the longest chains above can take.
const MAX_OFFSET: usize = 2048;

/// What a packet is to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// TCP or UDP with its ports (a whole packet, or a first fragment).
    Transport,
    /// A later fragment of TCP or UDP: no ports.
    LaterFragment,
    /// An ICMP or ICMPv6 error that quotes a TCP or UDP packet with its ports; the tuple is the quoted one reversed: it
    /// names the direction in which the error travels.
    IcmpError,
    /// An ICMP or ICMPv6 redirect that quotes a TCP or UDP packet.
    IcmpRedirect,
    /// An ICMP or ICMPv6 echo request.
    Echo,
    /// Anything else over IP.
    Other,
    /// Likewise, but never answered (RFC 1122 section 3.2.2, RFC 4443 section 2.4 e): an ICMP or ICMPv6 error or redirect
    /// whose quote tells no ports, or a later fragment.
    Unanswerable,
}

/// A packet, as far as decisions need it. Offsets count from the start of the packet data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Addresses, ports and protocol in the direction of travel; for ICMP errors those of the quoted packet, reversed.
    pub tuple: Tuple,
    /// For ICMP errors: the addresses of the error itself; else those of the tuple.
    pub outer_src: Addr,
    /// As `outer_src`.
    pub outer_dst: Addr,
    /// What it is.
    pub kind: Kind,
    /// TCP control bits, and [`tcp::DATA`]; zero for others.
    pub tcp_flags: u8,
    /// True if this is the first fragment of several.
    pub first_fragment: bool,
    /// True if the quoted transport header reaches to its checksum.
    pub quoted_checksum: bool,
    /// TCP sequence number, wire order.
    pub sequence: u32,
    /// TCP acknowledgment number, wire order.
    pub acknowledgment: u32,
    /// Fragment identification, wire order.
    pub fragment_id: u32,
    /// Offset of the IP header.
    pub l3: u16,
    /// Offset of the transport header (ICMP for ICMP errors).
    pub l4: u16,
    /// ICMP errors: offset of the quoted IP header.
    pub quoted_l3: u16,
    /// ICMP errors: offset of the quoted transport header.
    pub quoted_l4: u16,
}

/// The IP layer of a packet.
#[derive(Clone, Copy)]
struct Ip {
    src: Addr,
    dst: Addr,
    proto: u8,
    l4: usize,
    /// Where the packet ends.
    end: usize,
    fragment: FragmentPart,
    id: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FragmentPart {
    Whole,
    First,
    Later,
}

/// Parses a frame that begins with an Ethernet header. `None`: not an IP packet that could concern us.
///
/// `QUOTES`: look into what ICMP errors quote. Without, their tuple is that of the error itself, without ports: enough to
/// see that it is an error, at half the code.
#[inline(always)]
pub fn parse_ethernet<P: Packet, const QUOTES: bool>(packet: &P) -> Option<Parsed> {
    let mut kind = packet.load::<Ethernet>(0)?.ethertype;
    let mut offset = size_of::<Ethernet>();
    for _ in 0..MAX_VLAN_TAGS {
        if kind != ethertype::VLAN && kind != ethertype::QINQ {
            break;
        }
        kind = packet.load::<Vlan>(offset)?.ethertype;
        offset += size_of::<Vlan>();
    }
    match kind {
        ethertype::IPV4 => parse_v4::<P, QUOTES>(packet, offset),
        ethertype::IPV6 => parse_v6::<P, QUOTES>(packet, offset),
        _ => None,
    }
}

/// Parses a packet that begins with its IP header, likewise.
#[inline(always)]
pub fn parse_ip<P: Packet, const QUOTES: bool>(packet: &P) -> Option<Parsed> {
    match packet.load::<Extension>(0)?.next_header >> 4 {
        4 => parse_v4::<P, QUOTES>(packet, 0),
        6 => parse_v6::<P, QUOTES>(packet, 0),
        _ => None,
    }
}

#[inline(always)]
fn parse_v4<P: Packet, const QUOTES: bool>(packet: &P, l3: usize) -> Option<Parsed> {
    let ip = ipv4(packet, l3)?;
    transport::<P, QUOTES>(packet, l3, ip, Proto::ICMP.0)
}

#[inline(always)]
fn parse_v6<P: Packet, const QUOTES: bool>(packet: &P, l3: usize) -> Option<Parsed> {
    let ip = ipv6(packet, l3, MAX_EXTENSIONS)?;
    if ip.src.is_v4() || ip.dst.is_v4() || ip.src.is_v6_link_local() || ip.dst.is_v6_link_local() {
        return None;
    }
    transport::<P, QUOTES>(packet, l3, ip, Proto::ICMPV6.0)
}

#[inline(always)]
fn ipv4<P: Packet>(packet: &P, l3: usize) -> Option<Ip> {
    let header = packet.load::<Ipv4>(l3)?;
    let words = (header.version_ihl & 0xf) as usize;
    if header.version_ihl >> 4 != 4 || words < 5 {
        return None;
    }
    let field = u16::from_be(header.fragment);
    let fragment = match (field & 0x1fff, field & 0x2000) {
        (0, 0) => FragmentPart::Whole,
        (0, _) => FragmentPart::First,
        _ => FragmentPart::Later,
    };
    Some(Ip {
        src: Addr::from_v4_word(header.source),
        dst: Addr::from_v4_word(header.destination),
        proto: header.protocol,
        l4: l3 + words * 4,
        end: l3 + u16::from_be(header.length) as usize,
        fragment,
        id: header.id as u32,
    })
}

#[inline(always)]
fn ipv6<P: Packet>(packet: &P, l3: usize, max_extensions: usize) -> Option<Ip> {
    let header = packet.load::<Ipv6>(l3)?;
    if u32::from_be(header.version) >> 28 != 6 {
        return None;
    }
    let mut ip = Ip {
        src: Addr(header.source),
        dst: Addr(header.destination),
        proto: header.next_header,
        l4: l3 + size_of::<Ipv6>(),
        end: l3 + size_of::<Ipv6>() + u16::from_be(header.length) as usize,
        fragment: FragmentPart::Whole,
        id: 0,
    };
    for _ in 0..max_extensions {
        if !skip_extension(packet, &mut ip)? {
            break;
        }
    }
    Some(ip)
}

/// Steps over one extension header; false if the transport header is reached.
#[inline(always)]
fn skip_extension<P: Packet>(packet: &P, ip: &mut Ip) -> Option<bool> {
    // A later fragment carries no further header to look at.
    if ip.fragment == FragmentPart::Later || ip.l4 >= MAX_OFFSET {
        return Some(false);
    }
    match ip.proto {
        extension::FRAGMENT => {
            let header = packet.load::<Fragment>(ip.l4)?;
            let field = u16::from_be(header.offset);
            ip.fragment = match (field >> 3, field & 1) {
                (0, 0) => FragmentPart::Whole,
                (0, _) => FragmentPart::First,
                _ => FragmentPart::Later,
            };
            ip.id = header.id;
            ip.proto = header.next_header;
            ip.l4 += size_of::<Fragment>();
        }
        extension::HOP_BY_HOP | extension::ROUTING | extension::DESTINATION => {
            let header = packet.load::<Extension>(ip.l4)?;
            ip.proto = header.next_header;
            ip.l4 += 8 + header.length as usize * 8;
        }
        extension::AUTHENTICATION => {
            let header = packet.load::<Extension>(ip.l4)?;
            ip.proto = header.next_header;
            ip.l4 += 8 + header.length as usize * 4;
        }
        _ => return Some(false),
    }
    Some(true)
}

#[inline(always)]
fn transport<P: Packet, const QUOTES: bool>(packet: &P, l3: usize, ip: Ip, icmp_proto: u8) -> Option<Parsed> {
    if ip.l4 >= MAX_OFFSET {
        return None;
    }
    let mut parsed = Parsed {
        tuple: Tuple { src: ip.src, dst: ip.dst, sport: Be16::ZERO, dport: Be16::ZERO, proto: Proto(ip.proto) },
        outer_src: ip.src,
        outer_dst: ip.dst,
        kind: Kind::Other,
        tcp_flags: 0,
        first_fragment: ip.fragment == FragmentPart::First,
        quoted_checksum: false,
        sequence: 0,
        acknowledgment: 0,
        fragment_id: ip.id,
        l3: l3 as u16,
        l4: ip.l4 as u16,
        quoted_l3: 0,
        quoted_l4: 0,
    };
    let later = ip.fragment == FragmentPart::Later;
    if ip.proto == Proto::TCP.0 || ip.proto == Proto::UDP.0 {
        if later {
            parsed.kind = Kind::LaterFragment;
            return Some(parsed);
        }
        parsed.kind = Kind::Transport;
        ports(packet, ip.l4, &mut parsed)?;
        if ip.proto == Proto::TCP.0 {
            control(packet, &ip, &mut parsed)?;
        }
    } else if later {
        parsed.kind = Kind::Unanswerable;
    } else if ip.proto == icmp_proto {
        icmp::<P, QUOTES>(packet, ip.l4, icmp_proto, &mut parsed)?;
    }
    Some(parsed)
}

#[inline(always)]
fn ports<P: Packet>(packet: &P, offset: usize, parsed: &mut Parsed) -> Option<()> {
    let ports = packet.load::<Ports>(offset)?;
    parsed.tuple.sport = Be16(ports.source);
    parsed.tuple.dport = Be16(ports.destination);
    Some(())
}

#[inline(always)]
fn control<P: Packet>(packet: &P, ip: &Ip, parsed: &mut Parsed) -> Option<()> {
    let tcp = packet.load::<Tcp>(ip.l4)?;
    // Modulo 2^16: what the kernel has put together beyond 64 KiB says no length, and has data here too.
    let data = ip.end.wrapping_sub(ip.l4 + (tcp.offset >> 4) as usize * 4) as u16 as u32;
    // The sign of what is not zero, negated: a comparison would make two paths of one for the verifier.
    let has_data = (data.wrapping_neg() >> 24) as u8 & tcp::DATA;
    parsed.tcp_flags = tcp.flags & (tcp::FIN | tcp::SYN | tcp::RST | tcp::ACK) | has_data;
    parsed.sequence = tcp.sequence;
    parsed.acknowledgment = tcp.acknowledgment;
    Some(())
}

/// What an ICMP or ICMPv6 type means here.
#[inline(always)]
const fn icmp_kind(v6: bool, kind: u8) -> Kind {
    match (v6, kind) {
        // Destination unreachable, source quench, time exceeded, parameter problem (RFC 792).
        (false, 3 | 4 | 11 | 12) => Kind::IcmpError,
        (false, 5) => Kind::IcmpRedirect,
        (false, 8) => Kind::Echo,
        // Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443).
        (true, 1..=4) => Kind::IcmpError,
        // Redirect (RFC 4861): its quote stands in an option, out of reach here; it never concerns a routed client.
        (true, 128) => Kind::Echo,
        _ => Kind::Other,
    }
}

#[inline(always)]
fn icmp<P: Packet, const QUOTES: bool>(packet: &P, offset: usize, icmp_proto: u8, parsed: &mut Parsed) -> Option<()> {
    let v6 = icmp_proto == Proto::ICMPV6.0;
    let kind = icmp_kind(v6, packet.load::<Icmp>(offset)?.kind);
    if !QUOTES || kind != Kind::IcmpError && kind != Kind::IcmpRedirect {
        parsed.kind = kind;
        return Some(());
    }
    let quoted_l3 = offset + size_of::<Icmp>();
    // A quote too short to tell its ports concerns no flow.
    parsed.kind = Kind::Unanswerable;
    let Some(quoted) = (if v6 { ipv6(packet, quoted_l3, MAX_QUOTED_EXTENSIONS) } else { ipv4(packet, quoted_l3) })
    else {
        return Some(());
    };
    let known = quoted.proto == Proto::TCP.0 || quoted.proto == Proto::UDP.0;
    if !known || quoted.fragment == FragmentPart::Later || quoted.l4 >= MAX_OFFSET {
        return Some(());
    }
    if ports(packet, quoted.l4, parsed).is_none() {
        return Some(());
    }
    parsed.tuple.src = quoted.src;
    parsed.tuple.dst = quoted.dst;
    parsed.tuple.proto = Proto(quoted.proto);
    parsed.tuple = parsed.tuple.reversed();
    parsed.kind = kind;
    parsed.quoted_l3 = quoted_l3 as u16;
    parsed.quoted_l4 = quoted.l4 as u16;
    parsed.quoted_checksum = if quoted.proto == Proto::TCP.0 {
        packet.load::<Tcp>(quoted.l4).is_some()
    } else {
        packet.load::<Udp>(quoted.l4).is_some()
    };
    Some(())
}
