//! Frames against bytes that others made, and there and back.

use super::*;

const LINK: Link = Link { dst: [2, 0, 0, 0, 0, 1], src: [2, 0, 0, 0, 0, 2], tags: vec![] };

fn v4(last: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, last], port))
}

fn v6(last: u16, port: u16) -> SocketAddr {
    SocketAddr::from(([0x2001, 0xdb8, 0, 0, 0, 0, 0, last], port))
}

/// The worked example of RFC 1071, section 3.
#[test]
fn sum_is_that_of_rfc_1071() {
    assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    assert_eq!(sum(&[0xff, 0xff, 0x01]), 0x0100);
}

/// Captured between two namespaces of Linux 6.18: an ICMP port unreachable, a SYN over IPv6, an ICMPv6 port unreachable.
const CAPTURED: [&str; 3] = [
    "9a463c0be9db92667b55d3f7080045c0003d508f00004001a56dc0000202c00002010303811f0000000045000021e104400040\
     11d5c3c0000201c000020203e80035000d33e168656c6c6f",
    "92667b55d3f79a463c0be9db86dd600ac1880028064020010db800000000000000000000000120010db8000000000000000000\
     00000203e800500e8adbc400000000a002fd20cf7e0000020405a00402080ab8d7789e000000000103030a",
    "9a463c0be9db92667b55d3f786dd600fdd4f003b3a4020010db800000000000000000000000220010db8000000000000000000\
     00000101041fa500000000600f122e000b114020010db800000000000000000000000120010db8000000000000000000000002\
     03e90035000bcce06f6464",
];

#[test]
fn bodies_are_as_the_kernel_builds_them() {
    for captured in CAPTURED {
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("a number");
        let frame: Vec<u8> = captured.as_bytes().chunks(2).map(byte).collect();
        check(&frame).expect("the kernel's checksums are right");
        let parsed = parse(&frame).expect("a whole packet");
        let (_, body) = parsed.offsets();
        assert_eq!(parsed.body_bytes(), frame[body..]);
        assert_eq!(parsed.to_bytes().len(), frame.len());
    }
}

fn samples() -> Vec<Packet> {
    let mut tagged = Packet::tcp(LINK, v4(1, 1000), v4(2, 80), flag::SYN);
    tagged.link.tags = vec![(0x88a8, 5), (0x8100, 0x2007)];
    let mut options = Packet::udp(LINK, v4(1, 1000), v4(2, 53));
    options.ip.options = vec![7, 7, 4, 0, 0, 0, 0, 0];
    let mut extensions = Packet::tcp(LINK, v6(1, 1000), v6(2, 80), flag::ACK | flag::PSH);
    extensions.ip.extensions = vec![
        (proto::HOP_BY_HOP, vec![1, 4, 0, 0, 0, 0]),
        (proto::DESTINATION, vec![1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    ];
    let mut none = Packet::udp(LINK, v4(1, 1), v4(2, 2));
    let Body::Udp(udp) = &mut none.body else { unreachable!() };
    udp.checksum = Checksum::None;
    let mut wrong = Packet::tcp(LINK, v4(1, 1), v4(2, 2), flag::ACK);
    let Body::Tcp(tcp) = &mut wrong.body else { unreachable!() };
    (tcp.checksum, tcp.options) = (Checksum::Wrong(0x101), vec![2, 4, 5, 0xb4]);
    let other = Packet { body: Body::Other(132, vec![1, 2, 3]), ..Packet::udp(LINK, v6(1, 0), v6(2, 0)) };
    vec![tagged, options, extensions, Packet::udp(LINK, v6(1, 9), v6(2, 9)), none, wrong, other]
}

#[test]
fn frames_come_back_as_they_were() {
    for packet in samples() {
        assert_eq!(parse(&packet.to_bytes()), Some(packet));
    }
}

#[test]
fn only_right_checksums_pass_the_check() {
    for packet in samples() {
        let mut frame = packet.to_bytes();
        let is_wrong = matches!(&packet.body, Body::Tcp(tcp) if tcp.checksum != Checksum::Right);
        assert_eq!(check(&frame).is_err(), is_wrong, "{packet:?}");
        let has_checksum = !matches!(&packet.body, Body::Udp(Udp { checksum: Checksum::None, .. }) | Body::Other(..));
        if has_checksum && !is_wrong {
            *frame.last_mut().expect("a frame has bytes") ^= 1;
            assert!(check(&frame).is_err(), "{packet:?}");
        }
    }
}

#[test]
fn ends_are_read_behind_tags_options_and_extensions() {
    for packet in samples() {
        assert_eq!(packet.read_ends(&packet.to_bytes()), Some((packet.src(), packet.dst())));
    }
}

#[test]
fn fragments_share_one_body() {
    for whole in [Packet::udp(LINK, v4(1, 1), v4(2, 2)), Packet::udp(LINK, v6(1, 1), v6(2, 2))] {
        let (first, last) = (whole.fragment(77, 0, 48), whole.fragment(77, 48, 1000));
        let (
            Some(Packet { body: Body::Other(17, mut a), part: Some(first), .. }),
            Some(Packet { body: Body::Other(17, b), part, .. }),
        ) = (parse(&first.to_bytes()), parse(&last.to_bytes()))
        else {
            panic!("fragments of UDP")
        };
        assert_eq!((first, part), (Part { id: 77, from: 0, to: 48 }, Some(Part { id: 77, from: 48, to: 108 })));
        a.extend(b);
        assert_eq!(a, whole.body_bytes());
        assert_eq!(
            whole.fragment(77, 0, 48).read_ends(&whole.fragment(77, 0, 48).to_bytes()),
            Some((whole.src(), whole.dst()))
        );
    }
}

#[test]
fn errors_quote_what_fits() {
    let quoted = Packet::tcp(LINK, v6(1, 1000), v6(2, 80), flag::ACK);
    for quoted_bytes in [48, 60, 1000] {
        let error =
            Error { kind: error::V6_TOO_BIG, code: 0, rest: 1280, quoted: Box::new(quoted.clone()), quoted_bytes };
        let frame = Packet::error(LINK, v6(9, 0).ip(), v6(1, 0).ip(), error).to_bytes();
        check(&frame).expect("checksums are right");
        let Some(Packet { body: Body::Icmp(icmp), .. }) = parse(&frame) else { panic!("ICMPv6") };
        assert_eq!((icmp.kind, icmp.rest), (2, 1280));
        assert_eq!(icmp.data, quoted.ip_bytes()[..quoted_bytes.min(quoted.ip_bytes().len())]);
    }
}

#[test]
#[should_panic(expected = "frames differ at byte 33")]
fn a_difference_is_shown() {
    let packet = Packet::udp(LINK, v4(1, 1), v4(2, 2));
    let other = packet.clone().with_dst(v4(3, 2));
    // Byte 24 and 25, the header's checksum, differ first: put it right.
    let mut frame = other.to_bytes();
    frame[24..26].copy_from_slice(&packet.to_bytes()[24..26]);
    assert_frame("it", &frame, &packet);
}
