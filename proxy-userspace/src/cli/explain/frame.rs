//! Made packets: Ethernet frames as programs and people read them.

use std::net::{IpAddr, SocketAddr};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::lb::tuple::Tuple;

/// A hardware address, as on the wire.
pub type Mac = [u8; 6];

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TCP segment that opens a connection.
    TcpOpening,
    /// The segment that answers it.
    TcpAnswer,
    /// A UDP datagram.
    Datagram,
    /// An ICMP or ICMPv6 echo request, a "ping".
    Echo,
}

/// Sequence number of an opening segment; the answer acknowledges it.
const SEQUENCE: u32 = 1_000_000;
const WINDOW: u16 = 65535;
const HOP_LIMIT: u8 = 64;

/// The two ends of a frame on its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Who sends it.
    pub src: Mac,
    /// Whom it is for.
    pub dst: Mac,
}

/// A packet from `src` to `dst`; ports of an echo are not looked at. `None` if the two are of different families.
pub fn build(kind: Kind, link: Link, src: SocketAddr, dst: SocketAddr) -> Option<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(link.src, link.dst);
    let ip = match (src.ip(), dst.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), HOP_LIMIT),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), HOP_LIMIT),
        _ => return None,
    };
    let mut frame = Vec::new();
    // Writing to memory cannot fail; lengths fit, since there is no content.
    match kind {
        Kind::TcpOpening => ip.tcp(src.port(), dst.port(), SEQUENCE, WINDOW).syn().write(&mut frame, &[]),
        Kind::TcpAnswer => {
            let segment = ip.tcp(src.port(), dst.port(), 2 * SEQUENCE, WINDOW);
            segment.syn().ack(SEQUENCE + 1).write(&mut frame, &[])
        }
        Kind::Datagram => ip.udp(src.port(), dst.port()).write(&mut frame, &[]),
        Kind::Echo if src.is_ipv4() => ip.icmpv4_echo_request(1, 1).write(&mut frame, &[]),
        Kind::Echo => ip.icmpv6_echo_request(1, 1).write(&mut frame, &[]),
    }
    .ok()?;
    Some(frame)
}

/// A frame as people read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Whom the frame is for.
    pub mac: Mac,
    /// Its sender.
    pub src: SocketAddr,
    /// Its receiver.
    pub dst: SocketAddr,
    /// What it carries.
    pub content: Content,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// TCP.
    Tcp {
        /// It resets a connection.
        reset: bool,
    },
    /// UDP.
    Udp,
    /// ICMP or ICMPv6.
    Icmp,
}

impl Seen {
    /// The tuple of the packet; of an echo with ports that are zero.
    pub fn tuple(&self) -> Tuple {
        let proto = match (self.content, self.src.is_ipv4()) {
            (Content::Tcp { .. }, _) => Proto::TCP,
            (Content::Udp, _) => Proto::UDP,
            (Content::Icmp, true) => Proto::ICMP,
            (Content::Icmp, false) => Proto::ICMPV6,
        };
        let (src, dst) = (Addr::from(self.src.ip()), Addr::from(self.dst.ip()));
        Tuple { src, dst, sport: Port(self.src.port()).be(), dport: Port(self.dst.port()).be(), proto }
    }
}

/// Reads a frame; `None` for what [`build`] and the programs do not make.
pub fn parse(frame: &[u8]) -> Option<Seen> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let mac = frame.first_chunk::<6>()?;
    let (src, dst): (IpAddr, IpAddr) = match packet.net? {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        _ => return None,
    };
    let (sport, dport, content) = match packet.transport? {
        TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port(), Content::Tcp { reset: tcp.rst() }),
        TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port(), Content::Udp),
        TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_) => (0, 0, Content::Icmp),
        _ => return None,
    };
    Some(Seen { mac: *mac, src: SocketAddr::new(src, sport), dst: SocketAddr::new(dst, dport), content })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link { src: [2, 0, 0, 0, 0, 1], dst: [2, 0, 0, 0, 0, 2] };

    #[test]
    fn what_is_built_is_read_again() {
        let ends = [("10.0.0.1:1000", "10.96.0.1:80"), ("[fd00::1]:1000", "[fd00::2]:80")];
        for (src, dst) in ends.map(|(src, dst)| (src.parse().expect("valid"), dst.parse().expect("valid"))) {
            for (kind, content) in [
                (Kind::TcpOpening, Content::Tcp { reset: false }),
                (Kind::TcpAnswer, Content::Tcp { reset: false }),
                (Kind::Datagram, Content::Udp),
            ] {
                let frame = build(kind, LINK, src, dst).expect("one family");
                assert_eq!(parse(&frame), Some(Seen { mac: LINK.dst, src, dst, content }));
            }
            let echo = parse(&build(Kind::Echo, LINK, src, dst).expect("one family")).expect("readable");
            assert_eq!((echo.src.ip(), echo.dst.ip(), echo.content), (src.ip(), dst.ip(), Content::Icmp));
        }
    }

    #[test]
    fn families_are_not_mixed_and_rubbish_is_not_read() {
        let (v4, v6) = ("10.0.0.1:1".parse().expect("valid"), "[fd00::1]:1".parse().expect("valid"));
        assert_eq!(build(Kind::Datagram, LINK, v4, v6), None);
        assert_eq!(parse(&[0; 20]), None);
    }
}
