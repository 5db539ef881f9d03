//! Packets as plain data, turned into bytes and back: every length and checksum computed from scratch, field by field.
//!
//! Written apart from `proxy-common`, so that both can be wrong only in different ways.
//! Sources: RFC 791, RFC 8200, RFC 9293, RFC 768, RFC 792, RFC 4443, IEEE 802.1Q.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Protocol numbers (IANA).
pub mod proto {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
}

/// TCP control bits.
pub mod flag {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Opens.
    pub const SYN: u8 = 2;
    /// Resets.
    pub const RST: u8 = 4;
    /// Pushes.
    pub const PSH: u8 = 8;
    /// Acknowledges.
    pub const ACK: u8 = 16;
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Ethernet header.
    pub link: Link,
    /// IP header.
    pub ip: Ip,
    /// What the IP packet carries.
    pub body: Body,
    /// Set if this is a part of what the body says.
    pub part: Option<Part>,
}

/// An Ethernet header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Destination.
    pub dst: [u8; 6],
    /// Source.
    pub src: [u8; 6],
    /// Tags, outermost first: tag protocol and tag.
    pub tags: Vec<(u16, u16)>,
}

/// An IP header of either family; both addresses have one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Type of service, or traffic class.
    pub class: u8,
    /// IPv4 options; padded to whole words.
    pub options: Vec<u8>,
    /// IPv6 extension headers: type, and what follows its first two bytes; padded to whole units.
    pub extensions: Vec<(u8, Vec<u8>)>,
}

/// A part of a fragmented packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Identification.
    pub id: u32,
    /// First byte of the body that this part carries; a multiple of 8.
    pub from: usize,
    /// The byte after the last that this part carries, or beyond the body's end.
    pub to: usize,
}

/// What an IP packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A TCP segment.
    Tcp(Tcp),
    /// A UDP datagram.
    Udp(Udp),
    /// ICMP or ICMPv6 that is not an error.
    Icmp(Icmp),
    /// An ICMP or ICMPv6 error.
    Error(Error),
    /// Anything else, by protocol number.
    Other(u8, Vec<u8>),
}

/// Which checksum a TCP or UDP header carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// The right one.
    Right,
    /// Zero: none (UDP over IPv4).
    None,
    /// The right one plus this number (in one's complement arithmetic): wrong by exactly that.
    Wrong(u16),
}

/// A TCP segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Control bits.
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Options; padded to whole words.
    pub options: Vec<u8>,
    /// Data.
    pub data: Vec<u8>,
    /// Which checksum it carries.
    pub checksum: Checksum,
}

/// A UDP datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Udp {
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Data.
    pub data: Vec<u8>,
    /// Which checksum it carries.
    pub checksum: Checksum,
}

/// An ICMP or ICMPv6 message that quotes no packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// The second word: identifier and sequence number of an echo.
    pub rest: u32,
    /// Data.
    pub data: Vec<u8>,
}

/// An ICMP or ICMPv6 message that quotes a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// The second word: the MTU of "fragmentation needed" and "packet too big".
    pub rest: u32,
    /// The packet it is about; its link header is not quoted.
    pub quoted: Box<Packet>,
    /// Bytes of the quoted IP packet that are there, at most.
    pub quoted_bytes: usize,
}

/// ICMP types and codes of errors, by family.
pub mod error {
    /// Destination unreachable (type, with code 3: port).
    pub const V4_UNREACHABLE: u8 = 3;
    /// Code of `V4_UNREACHABLE`.
    pub const V4_PORT: u8 = 3;
    /// Code of `V4_UNREACHABLE`.
    pub const V4_TOO_BIG: u8 = 4;
    /// Redirect.
    pub const V4_REDIRECT: u8 = 5;
    /// Time exceeded.
    pub const V4_TIME: u8 = 11;
    /// Destination unreachable (type).
    pub const V6_UNREACHABLE: u8 = 1;
    /// Code of `V6_UNREACHABLE`.
    pub const V6_PORT: u8 = 4;
    /// Packet too big.
    pub const V6_TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const V6_TIME: u8 = 3;
    /// Redirect.
    pub const V6_REDIRECT: u8 = 137;
}

impl Ip {
    /// A header without options and extensions.
    pub fn new(src: IpAddr, dst: IpAddr) -> Self {
        assert_eq!(src.is_ipv4(), dst.is_ipv4(), "one family");
        Self { src, dst, ttl: 64, class: 0, options: vec![], extensions: vec![] }
    }
}

impl Packet {
    /// A TCP segment with data of 100 bytes unless it opens or resets.
    pub fn tcp(link: Link, src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        let data = if flags & (flag::SYN | flag::RST) != 0 { vec![] } else { (0..100).collect() };
        let tcp = Tcp {
            sport: src.port(),
            dport: dst.port(),
            seq: 0x1000_0001,
            ack: if flags & flag::ACK != 0 { 0x2000_0002 } else { 0 },
            flags,
            window: 0x7fff,
            options: vec![],
            data,
            checksum: Checksum::Right,
        };
        Self { link, ip: Ip::new(src.ip(), dst.ip()), body: Body::Tcp(tcp), part: None }
    }

    /// A datagram of 100 bytes.
    pub fn udp(link: Link, src: SocketAddr, dst: SocketAddr) -> Self {
        let udp = Udp { sport: src.port(), dport: dst.port(), data: (0..100).collect(), checksum: Checksum::Right };
        Self { link, ip: Ip::new(src.ip(), dst.ip()), body: Body::Udp(udp), part: None }
    }

    /// An ICMP error from `src` to `dst`.
    pub fn error(link: Link, src: IpAddr, dst: IpAddr, error: Error) -> Self {
        Self { link, ip: Ip::new(src, dst), body: Body::Error(error), part: None }
    }

    /// The part of this packet that carries the body's bytes from `from` to `to`.
    pub fn fragment(&self, id: u32, from: usize, to: usize) -> Self {
        assert_eq!(from % 8, 0, "fragments begin at units of 8 bytes");
        Self { part: Some(Part { id, from, to }), ..self.clone() }
    }

    /// True for IPv4.
    pub fn is_v4(&self) -> bool {
        self.ip.src.is_ipv4()
    }

    /// The protocol number of the body.
    pub fn proto(&self) -> u8 {
        match &self.body {
            Body::Tcp(_) => proto::TCP,
            Body::Udp(_) => proto::UDP,
            Body::Icmp(_) | Body::Error(_) if self.is_v4() => proto::ICMP,
            Body::Icmp(_) | Body::Error(_) => proto::ICMPV6,
            Body::Other(number, _) => *number,
        }
    }

    /// Source and destination port of TCP and UDP.
    pub fn ports(&self) -> Option<(u16, u16)> {
        match &self.body {
            Body::Tcp(tcp) => Some((tcp.sport, tcp.dport)),
            Body::Udp(udp) => Some((udp.sport, udp.dport)),
            _ => None,
        }
    }

    /// Source address and port; port 0 if the body has none.
    pub fn src(&self) -> SocketAddr {
        SocketAddr::new(self.ip.src, self.ports().map_or(0, |ports| ports.0))
    }

    /// Destination address and port; port 0 if the body has none.
    pub fn dst(&self) -> SocketAddr {
        SocketAddr::new(self.ip.dst, self.ports().map_or(0, |ports| ports.1))
    }

    /// With another source.
    pub fn with_src(mut self, src: SocketAddr) -> Self {
        self.ip.src = src.ip();
        match &mut self.body {
            Body::Tcp(tcp) => tcp.sport = src.port(),
            Body::Udp(udp) => udp.sport = src.port(),
            _ => {}
        }
        self
    }

    /// With another destination.
    pub fn with_dst(mut self, dst: SocketAddr) -> Self {
        self.ip.dst = dst.ip();
        match &mut self.body {
            Body::Tcp(tcp) => tcp.dport = dst.port(),
            Body::Udp(udp) => udp.dport = dst.port(),
            _ => {}
        }
        self
    }

    /// The frame.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = [self.link.dst, self.link.src].concat();
        for (protocol, tag) in &self.link.tags {
            bytes.extend(protocol.to_be_bytes());
            bytes.extend(tag.to_be_bytes());
        }
        bytes.extend(if self.is_v4() { 0x0800_u16 } else { 0x86dd }.to_be_bytes());
        bytes.extend(self.ip_bytes());
        bytes
    }

    /// The IP packet.
    pub fn ip_bytes(&self) -> Vec<u8> {
        let body = self.body_bytes();
        let part = self.part.map_or(&body[..], |part| &body[part.from.min(body.len())..part.to.min(body.len())]);
        let has_more = self.part.is_some_and(|part| part.to < body.len());
        match (self.ip.src, self.ip.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.v4_bytes(src, dst, part, has_more),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.v6_bytes(src, dst, part, has_more),
            _ => unreachable!("addresses of one family"),
        }
    }

    fn v4_bytes(&self, src: Ipv4Addr, dst: Ipv4Addr, body: &[u8], has_more: bool) -> Vec<u8> {
        let options = padded(&self.ip.options, 4);
        let header = 20 + options.len();
        let (id, offset) = self.part.map_or((0x1234, 0), |part| (part.id as u16, (part.from / 8) as u16));
        // "Don't fragment" on whole packets, as most stacks send them.
        let flags = if self.part.is_none() { 0x4000 } else { u16::from(has_more) << 13 };
        let mut bytes = vec![0x40 | (header / 4) as u8, self.ip.class];
        bytes.extend(((header + body.len()) as u16).to_be_bytes());
        bytes.extend(id.to_be_bytes());
        bytes.extend((flags | offset).to_be_bytes());
        bytes.extend([self.ip.ttl, self.proto(), 0, 0]);
        bytes.extend(src.octets());
        bytes.extend(dst.octets());
        bytes.extend(options);
        let checksum = !sum(&bytes);
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn v6_bytes(&self, src: Ipv6Addr, dst: Ipv6Addr, body: &[u8], has_more: bool) -> Vec<u8> {
        let mut headers = self.ip.extensions.clone();
        if let Some(part) = self.part {
            let mut fragment = ((part.from as u16) | u16::from(has_more)).to_be_bytes().to_vec();
            fragment.extend(part.id.to_be_bytes());
            headers.push((proto::FRAGMENT, fragment));
        }
        let kinds: Vec<u8> = headers.iter().map(|(kind, _)| *kind).chain([self.proto()]).collect();
        let mut content = Vec::new();
        for ((kind, rest), next) in headers.iter().zip(&kinds[1..]) {
            let rest = padded_after(rest, 8, 2);
            // The fragment header's second byte is reserved; the others' is their length in units after the first.
            let length = if *kind == proto::FRAGMENT { 0 } else { ((rest.len() + 2) / 8 - 1) as u8 };
            content.extend([*next, length]);
            content.extend(rest);
        }
        content.extend(body);
        let mut bytes = vec![0x60 | self.ip.class >> 4, self.ip.class << 4 | 0x0a, 0xbc, 0xde];
        bytes.extend((content.len() as u16).to_be_bytes());
        bytes.extend([kinds[0], self.ip.ttl]);
        bytes.extend(src.octets());
        bytes.extend(dst.octets());
        bytes.extend(content);
        bytes
    }

    /// The whole body, as if it were not fragmented.
    fn body_bytes(&self) -> Vec<u8> {
        match &self.body {
            Body::Tcp(tcp) => self.tcp_bytes(tcp),
            Body::Udp(udp) => self.udp_bytes(udp),
            Body::Icmp(icmp) => self.icmp_bytes(icmp.kind, icmp.code, icmp.rest, &icmp.data),
            Body::Error(error) => {
                let mut quoted = error.quoted.ip_bytes();
                quoted.truncate(error.quoted_bytes);
                self.icmp_bytes(error.kind, error.code, error.rest, &quoted)
            }
            Body::Other(_, bytes) => bytes.clone(),
        }
    }

    fn tcp_bytes(&self, tcp: &Tcp) -> Vec<u8> {
        let options = padded(&tcp.options, 4);
        let mut bytes = Vec::new();
        bytes.extend(tcp.sport.to_be_bytes());
        bytes.extend(tcp.dport.to_be_bytes());
        bytes.extend(tcp.seq.to_be_bytes());
        bytes.extend(tcp.ack.to_be_bytes());
        bytes.extend([(((20 + options.len()) / 4) << 4) as u8, tcp.flags]);
        bytes.extend(tcp.window.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(options);
        bytes.extend(&tcp.data);
        let checksum = chosen(tcp.checksum, !sum(&[self.pseudo_header(bytes.len()), bytes.clone()].concat()));
        bytes[16..18].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    fn udp_bytes(&self, udp: &Udp) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(udp.sport.to_be_bytes());
        bytes.extend(udp.dport.to_be_bytes());
        bytes.extend(((8 + udp.data.len()) as u16).to_be_bytes());
        bytes.extend([0; 2]);
        bytes.extend(&udp.data);
        let right = !sum(&[self.pseudo_header(bytes.len()), bytes.clone()].concat());
        // Zero would say "no checksum" (RFC 768).
        let right = if right == 0 { 0xffff } else { right };
        bytes[6..8].copy_from_slice(&chosen(udp.checksum, right).to_be_bytes());
        bytes
    }

    fn icmp_bytes(&self, kind: u8, code: u8, rest: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind, code, 0, 0];
        bytes.extend(rest.to_be_bytes());
        bytes.extend(data);
        let pseudo = if self.is_v4() { vec![] } else { self.pseudo_header(bytes.len()) };
        let checksum = !sum(&[pseudo, bytes.clone()].concat());
        bytes[2..4].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    /// What TCP, UDP and ICMPv6 checksums cover of the IP header.
    fn pseudo_header(&self, length: usize) -> Vec<u8> {
        pseudo_header(self.ip.src, self.ip.dst, self.proto(), length)
    }

    /// Bytes of the IP header with its options or extension headers.
    pub fn header_bytes(&self) -> usize {
        let (ip, body) = self.offsets();
        body - ip
    }

    /// Offsets in the frame of the IP header and of the body.
    fn offsets(&self) -> (usize, usize) {
        let ip = 14 + 4 * self.link.tags.len();
        let body = if self.is_v4() {
            ip + 20 + padded(&self.ip.options, 4).len()
        } else {
            let extensions =
                self.ip.extensions.iter().map(|(_, rest)| 2 + padded_after(rest, 8, 2).len()).sum::<usize>();
            ip + 40 + extensions + if self.part.is_some() { 8 } else { 0 }
        };
        (ip, body)
    }

    /// Source and destination of a frame that is built like this one; `None` if it is too short.
    pub fn read_ends(&self, frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
        let (ip, body) = self.offsets();
        let (src, dst) = read_addrs(frame.get(ip..)?)?;
        let port = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
        if self.ports().is_none() {
            return Some((SocketAddr::new(src, 0), SocketAddr::new(dst, 0)));
        }
        Some((SocketAddr::new(src, port(body)?), SocketAddr::new(dst, port(body + 2)?)))
    }
}

/// Source and destination address of an IP packet.
fn read_addrs(ip: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
    match ip.first()? >> 4 {
        4 => Some((v4(12)?, v4(16)?)),
        6 => Some((v6(8)?, v6(24)?)),
        _ => None,
    }
}

/// What TCP, UDP and ICMPv6 checksums cover of the IP header.
fn pseudo_header(src: IpAddr, dst: IpAddr, proto: u8, length: usize) -> Vec<u8> {
    let mut bytes = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => [src.octets(), dst.octets()].concat(),
        (IpAddr::V6(src), IpAddr::V6(dst)) => [src.octets(), dst.octets()].concat(),
        _ => unreachable!("addresses of one family"),
    };
    // The 16-bit length of IPv4 and the 32-bit length of IPv6 sum up to the same.
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, proto]);
    bytes
}

/// The one's complement sum of big-endian 16-bit words (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let total: u64 = bytes.chunks(2).map(|pair| u64::from(word(pair))).sum();
    fold(total)
}

fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn chosen(checksum: Checksum, right: u16) -> u16 {
    match checksum {
        Checksum::Right => right,
        Checksum::None => 0,
        Checksum::Wrong(by) => fold(u64::from(right) + u64::from(by)),
    }
}

fn padded(bytes: &[u8], unit: usize) -> Vec<u8> {
    padded_after(bytes, unit, 0)
}

/// Padded with zeros until `before` bytes and these make whole units.
fn padded_after(bytes: &[u8], unit: usize, before: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize((before + bytes.len()).next_multiple_of(unit) - before, 0);
    bytes
}

/// What is wrong with a frame's checksums, or nothing. Fragments and unknown protocols: the IPv4 header's alone.
pub fn check(frame: &[u8]) -> Result<(), String> {
    let parsed = parse(frame).ok_or("not a whole IP packet")?;
    if parsed.is_v4() {
        let ip = &frame[14 + 4 * parsed.link.tags.len()..];
        let header = &ip[..usize::from(ip[0] & 15) * 4];
        if sum(header) != 0xffff {
            return Err("IPv4 header checksum".into());
        }
    }
    match &parsed.body {
        _ if parsed.part.is_some() => Ok(()),
        Body::Tcp(Tcp { checksum: Checksum::Right, .. })
        | Body::Udp(Udp { checksum: Checksum::Right | Checksum::None, .. }) => Ok(()),
        Body::Tcp(_) => Err("TCP checksum".into()),
        Body::Udp(_) => Err("UDP checksum".into()),
        Body::Icmp(_) | Body::Error(_) => {
            let (_, at) = parsed.offsets();
            let pseudo = if parsed.is_v4() { vec![] } else { parsed.pseudo_header(frame.len() - at) };
            let is_right = sum(&[&pseudo, &frame[at..]].concat()) == 0xffff;
            if is_right { Ok(()) } else { Err("ICMP checksum".into()) }
        }
        Body::Other(..) => Ok(()),
    }
}

/// A frame as data, or `None` if it is not a whole and well-formed IP packet. ICMP errors come as [`Body::Icmp`].
pub fn parse(frame: &[u8]) -> Option<Packet> {
    let mut link =
        Link { dst: frame.get(..6)?.try_into().ok()?, src: frame.get(6..12)?.try_into().ok()?, tags: vec![] };
    let mut at = 12;
    loop {
        let kind = word(frame, at)?;
        at += 2;
        match kind {
            0x8100 | 0x88a8 => link.tags.push((kind, word(frame, at)?)),
            0x0800 | 0x86dd => return parse_ip(link, frame.get(at..)?),
            _ => return None,
        }
        at += 2;
    }
}

fn parse_ip(link: Link, ip: &[u8]) -> Option<Packet> {
    let (src, dst) = read_addrs(ip)?;
    let mut header = Ip::new(src, dst);
    let (kind, part, body) = if src.is_ipv4() { parse_v4(&mut header, ip)? } else { parse_v6(&mut header, ip)? };
    let body = match part {
        Some(_) => Body::Other(kind, body.to_vec()),
        None => parse_body(&header, kind, body)?,
    };
    Some(Packet { link, ip: header, body, part })
}

fn parse_v4<'a>(header: &mut Ip, ip: &'a [u8]) -> Option<(u8, Option<Part>, &'a [u8])> {
    let length = usize::from(ip.first()? & 15) * 4;
    let (total, id, offset) = (usize::from(word(ip, 2)?), word(ip, 4)?, word(ip, 6)?);
    (header.class, header.ttl) = (*ip.get(1)?, *ip.get(8)?);
    header.options = ip.get(20..length)?.to_vec();
    let body = ip.get(length..total)?;
    let from = usize::from(offset & 0x1fff) * 8;
    let is_part = offset & 0x3fff != 0;
    Some((*ip.get(9)?, is_part.then_some(Part { id: id.into(), from, to: from + body.len() }), body))
}

fn parse_v6<'a>(header: &mut Ip, ip: &'a [u8]) -> Option<(u8, Option<Part>, &'a [u8])> {
    header.class = *ip.first()? << 4 | *ip.get(1)? >> 4;
    header.ttl = *ip.get(7)?;
    let mut kind = *ip.get(6)?;
    let mut rest = ip.get(40..40 + usize::from(word(ip, 4)?))?;
    let mut part = None;
    loop {
        match kind {
            proto::HOP_BY_HOP | proto::ROUTING | proto::DESTINATION => {
                let length = (usize::from(*rest.get(1)?) + 1) * 8;
                header.extensions.push((kind, rest.get(2..length)?.to_vec()));
                (kind, rest) = (rest[0], &rest[length..]);
            }
            proto::FRAGMENT => {
                let offset = word(rest, 2)?;
                let id = u32::from_be_bytes(rest.get(4..8)?.try_into().ok()?);
                let from = usize::from(offset & 0xfff8);
                part = Some(Part { id, from, to: from + rest.len() - 8 });
                (kind, rest) = (rest[0], &rest[8..]);
            }
            _ => return Some((kind, part, rest)),
        }
    }
}

fn parse_body(ip: &Ip, kind: u8, body: &[u8]) -> Option<Body> {
    let is_v4 = ip.src.is_ipv4();
    let covered = || [pseudo_header(ip.src, ip.dst, kind, body.len()), body.to_vec()].concat();
    // A right checksum makes the sum all ones, which is zero; what there is beyond is what it is wrong by.
    let checksum = |found: u16| match sum(&covered()) {
        _ if found == 0 && kind == proto::UDP => Checksum::None,
        0xffff => Checksum::Right,
        other => Checksum::Wrong(other),
    };
    let data = |from: usize| Some(body.get(from..)?.to_vec());
    let long = |at: usize| Some(u32::from_be_bytes(body.get(at..at + 4)?.try_into().ok()?));
    match kind {
        proto::TCP => {
            let length = usize::from(*body.get(12)? >> 4) * 4;
            let (options, flags) = (body.get(20..length)?.to_vec(), *body.get(13)?);
            let (sport, dport, seq, ack) = (word(body, 0)?, word(body, 2)?, long(4)?, long(8)?);
            let (window, checksum) = (word(body, 14)?, checksum(word(body, 16)?));
            Some(Body::Tcp(Tcp { sport, dport, seq, ack, flags, window, options, data: data(length)?, checksum }))
        }
        proto::UDP => {
            let checksum = checksum(word(body, 6)?);
            Some(Body::Udp(Udp { sport: word(body, 0)?, dport: word(body, 2)?, data: data(8)?, checksum }))
        }
        proto::ICMP | proto::ICMPV6 if is_v4 == (kind == proto::ICMP) => {
            Some(Body::Icmp(Icmp { kind: *body.first()?, code: *body.get(1)?, rest: long(4)?, data: data(8)? }))
        }
        _ => Some(Body::Other(kind, body.to_vec())),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Panics, with both frames, unless they are the same bytes.
///
/// Where a checksum is expected to be 0, all ones are right as well: both are zero in one's complement (RFC 1624, section 3).
#[track_caller]
pub fn assert_frame(what: &str, got: &[u8], expected: &Packet) {
    let wanted = expected.to_bytes();
    if got == wanted || is_same_but_zero(got, &wanted) && check(got).is_ok() {
        return;
    }
    let first = got.iter().zip(&wanted).position(|(a, b)| a != b).unwrap_or(got.len().min(wanted.len()));
    let (ip, body) = expected.offsets();
    panic!(
        "{what}: frames differ at byte {first} (IP header at {ip}, body at {body})\nexpected {expected:?}\n{}got      {:?}\n{}",
        hex(&wanted),
        parse(got),
        hex(got)
    );
}

/// True if the frames differ only where one has two bytes of zeros and the other of ones.
fn is_same_but_zero(a: &[u8], b: &[u8]) -> bool {
    let is_zero = |pair: &[u8]| pair == [0, 0] || pair == [0xff, 0xff];
    let is_same = |(a, b): (&[u8], &[u8])| a == b || is_zero(a) && is_zero(b);
    a.len() == b.len() && a.chunks(2).zip(b.chunks(2)).all(is_same)
}

/// Bytes as lines of 16.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (line, chunk) in bytes.chunks(16).enumerate() {
        let _ = write!(text, "  {:4}:", line * 16);
        for byte in chunk {
            let _ = write!(text, " {byte:02x}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests;
