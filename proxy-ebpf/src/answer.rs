//! Resets and unreachables: the refused packet is turned round in place and sent back by the device it is on.
//!
//! Rate-limited, and never in answer to a reset, an ICMP error, a fragment, or a packet without a single sender
//! (RFC 1122 section 3.2.2, RFC 4443 section 2.4 e).

use crate::frame::Frame;
use crate::hooks::Link;
use crate::maps;
use crate::packet::SkBuff;
use crate::tables;
use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::{
    bpf_l4_csum_replace, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_store_bytes,
    bpf_xdp_adjust_tail,
};
use proxy_common::addr::{Addr, Proto};
use proxy_common::lb::rewrite::{Edit, End};
use proxy_common::wire::checksum::{Diff, fold};
use proxy_common::wire::header::{self, tcp};
use proxy_common::wire::{Kind, Packet, Parsed};

/// Answers a second and CPU.
const RATE: u32 = 1000;
const IPV4: usize = size_of::<header::Ipv4>();
const IPV6: usize = size_of::<header::Ipv6>();
const TCP: usize = size_of::<header::Tcp>();
const ICMP: usize = size_of::<header::Icmp>();
const HOP_LIMIT: u8 = 64;
/// `BPF_ADJ_ROOM_MAC`: room between the link layer and the network layer.
const BPF_ADJ_ROOM_MAC: u32 = 1;

/// Answers a refused packet if that is allowed; the packet itself is gone either way.
#[inline(always)]
pub fn reject(skb: SkBuff, link: Link, parsed: &Parsed, end: End) -> i32 {
    if parsed.outer_src.is_multicast_or_broadcast() || parsed.first_fragment || !is_within_rate() {
        return TC_ACT_SHOT;
    }
    let built = match parsed.kind {
        Kind::Transport if parsed.tuple.proto == Proto::TCP => {
            parsed.tcp_flags & tcp::RST == 0 && reset(skb, link, parsed).is_some()
        }
        Kind::Transport | Kind::Echo | Kind::Other => unreachable(skb, link, parsed).is_some(),
        _ => false,
    };
    if !built {
        return TC_ACT_SHOT;
    }
    // Refused on the way in: back out by the same device. Refused on the way out: back to the sender on this node.
    let flags = match end {
        End::Destination => 0,
        End::Source => BPF_F_INGRESS as u64,
    };
    // SAFETY: no pointers.
    unsafe { bpf_redirect(skb.ifindex(), flags) as i32 }
}

#[inline(always)]
fn is_within_rate() -> bool {
    let Some(used) = maps::answers.get_ptr_mut(0) else { return false };
    let now = tables::now().0;
    // SAFETY: the map's element for this CPU.
    let [second, count] = unsafe { &mut *used };
    if *second != now {
        *second = now;
        *count = 0;
    }
    *count += 1;
    *count <= RATE
}

#[inline(always)]
fn store<T>(skb: SkBuff, offset: usize, value: &T) -> Option<()> {
    // SAFETY: `value` is readable for its size; the helper checks the packet's bounds.
    let failed = unsafe {
        bpf_skb_store_bytes(skb.0, offset as u32, core::ptr::from_ref(value).cast(), size_of::<T>() as u32, 0)
    };
    done(failed == 0)
}

#[inline(always)]
fn done(done: bool) -> Option<()> {
    if done { Some(()) } else { None }
}

/// Sends the frame back where it came from.
#[inline(always)]
fn turn_frame(skb: SkBuff, link: Link) -> Option<()> {
    if link == Link::None {
        return Some(());
    }
    let mut frame = skb.load::<header::Ethernet>(0)?;
    core::mem::swap(&mut frame.destination, &mut frame.source);
    store(skb, 0, &frame)
}

/// One's complement sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1).
#[inline(always)]
fn pseudo_sum(a: &Addr, b: &Addr, proto: u8, length: usize) -> u64 {
    // The mapped prefixes of two IPv4 addresses add ffff twice, which is zero in one's complement.
    let words = |addr: &Addr| addr.0[0] as u64 + addr.0[1] as u64 + addr.0[2] as u64 + addr.0[3] as u64;
    words(a) + words(b) + (proto as u16).to_be() as u64 + (length as u16).to_be() as u64
}

/// True if the device, not the packet, holds the rest of the checksum at `offset`: then only the pseudo-header counts in
/// it. The kernel leaves such a field alone when told of a change in the data.
#[inline(always)]
fn is_partial(skb: SkBuff, offset: usize) -> Option<bool> {
    let before = skb.load::<header::Extension>(offset)?;
    // SAFETY: the context of the running program; the helper checks the packet's bounds.
    done(unsafe { bpf_l4_csum_replace(skb.0, offset as u32, 0, 1, 0) } == 0)?;
    Some(skb.load::<header::Extension>(offset)? == before)
}

/// Turns a TCP segment into the reset that answers it (RFC 9293 section 3.10.7.1). The IP header stays, turned round.
#[inline(always)]
fn reset(mut skb: SkBuff, link: Link, parsed: &Parsed) -> Option<()> {
    let (l3, l4) = (parsed.l3 as usize, parsed.l4 as usize);
    let v6 = !parsed.tuple.src.is_v4();
    let old = skb.load::<header::Tcp>(l4)?;
    let partial = is_partial(skb, l4 + 16)?;
    let mut answer = reset_to(&old, parsed, end_of(&skb, parsed, skb.len())?);
    let pseudo = pseudo_sum(&parsed.tuple.src, &parsed.tuple.dst, Proto::TCP.0, TCP);
    answer.checksum = if partial { fold(pseudo) } else { !fold(pseudo + tcp_sum(&answer)) };
    // SAFETY: the context of the running program.
    done(unsafe { bpf_skb_change_tail(skb.0, (l4 + TCP) as u32, 0) } == 0)?;
    store(skb, l4, &answer)?;
    if v6 {
        let mut ip = skb.load::<header::Ipv6>(l3)?;
        core::mem::swap(&mut ip.source, &mut ip.destination);
        ip.length = ((l4 + TCP - l3 - IPV6) as u16).to_be();
        ip.hop_limit = HOP_LIMIT;
        store(skb, l3, &ip)?;
    } else {
        let mut ip = skb.load::<header::Ipv4>(l3)?;
        let length = ((l4 + TCP - l3) as u16).to_be();
        let ttl = |ttl: u8| u16::from_ne_bytes([ttl, ip.protocol]);
        let diff = Diff::NONE.half(ip.length, length).half(ttl(ip.ttl), ttl(HOP_LIMIT));
        core::mem::swap(&mut ip.source, &mut ip.destination);
        ip.length = length;
        ip.ttl = HOP_LIMIT;
        store(skb, l3, &ip)?;
        done(skb.update_l3(l3 + 10, diff))?;
    }
    turn_frame(skb, link)
}

/// Where the packet in a frame of `length` bytes ends: a short one is padded (IEEE 802.3).
#[inline(always)]
fn end_of<P: Packet>(packet: &P, parsed: &Parsed, length: u32) -> Option<u32> {
    let l3 = parsed.l3 as usize;
    let end = if parsed.tuple.src.is_v4() {
        l3 as u32 + u16::from_be(packet.load::<header::Ipv4>(l3)?.length) as u32
    } else {
        (l3 + IPV6) as u32 + u16::from_be(packet.load::<header::Ipv6>(l3)?.length) as u32
    };
    Some(if end < length { end } else { length })
}

/// The reset that answers a segment of a packet that ends at `end`, without its checksum.
#[inline(always)]
fn reset_to(segment: &header::Tcp, parsed: &Parsed, end: u32) -> header::Tcp {
    let mut answer = header::Tcp {
        source: segment.destination,
        destination: segment.source,
        sequence: 0,
        acknowledgment: 0,
        offset: (TCP as u8 / 4) << 4,
        flags: tcp::RST,
        window: 0,
        checksum: 0,
        urgent: 0,
    };
    if segment.flags & tcp::ACK != 0 {
        answer.sequence = segment.acknowledgment;
    } else {
        answer.flags |= tcp::ACK;
        let next = u32::from_be(segment.sequence).wrapping_add(sequence_length(segment, parsed, end));
        answer.acknowledgment = next.to_be();
    }
    answer
}

/// Sequence numbers that a segment takes: data, SYN and FIN.
#[inline(always)]
fn sequence_length(segment: &header::Tcp, parsed: &Parsed, end: u32) -> u32 {
    let header = (segment.offset >> 4) as u32 * 4;
    let data = end.saturating_sub(parsed.l4 as u32 + header);
    let syn = segment.flags & tcp::SYN != 0;
    let fin = segment.flags & tcp::FIN != 0;
    data + syn as u32 + fin as u32
}

/// Turns the TCP segment of an XDP program into the reset that answers it; true if it may be sent.
#[inline(always)]
pub fn reset_frame(frame: Frame, parsed: &Parsed) -> bool {
    parsed.tcp_flags & tcp::RST == 0
        && !parsed.outer_src.is_multicast_or_broadcast()
        && is_within_rate()
        && build_reset_frame(frame, parsed).is_some()
}

#[inline(always)]
fn build_reset_frame(mut frame: Frame, parsed: &Parsed) -> Option<()> {
    let (l3, l4) = (parsed.l3 as usize, parsed.l4 as usize);
    let end = end_of(&frame, parsed, frame.len())?;
    let mut answer = reset_to(&frame.load::<header::Tcp>(l4)?, parsed, end);
    let pseudo = pseudo_sum(&parsed.tuple.src, &parsed.tuple.dst, Proto::TCP.0, TCP);
    answer.checksum = !fold(pseudo + tcp_sum(&answer));
    let surplus = (l4 + TCP) as i32 - frame.len() as i32;
    // SAFETY: the context of the running program.
    done(unsafe { bpf_xdp_adjust_tail(frame.0, surplus) } == 0)?;
    done(frame.put(l4, answer))?;
    if parsed.tuple.src.is_v4() {
        let mut ip = frame.load::<header::Ipv4>(l3)?;
        let length = ((l4 + TCP - l3) as u16).to_be();
        let ttl = |ttl: u8| u16::from_ne_bytes([ttl, ip.protocol]);
        ip.checksum = Diff::NONE.half(ip.length, length).half(ttl(ip.ttl), ttl(HOP_LIMIT)).apply(ip.checksum);
        core::mem::swap(&mut ip.source, &mut ip.destination);
        ip.length = length;
        ip.ttl = HOP_LIMIT;
        done(frame.put(l3, ip))?;
    } else {
        let mut ip = frame.load::<header::Ipv6>(l3)?;
        core::mem::swap(&mut ip.source, &mut ip.destination);
        ip.length = ((l4 + TCP - l3 - IPV6) as u16).to_be();
        ip.hop_limit = HOP_LIMIT;
        done(frame.put(l3, ip))?;
    }
    let mut ethernet = frame.load::<header::Ethernet>(0)?;
    core::mem::swap(&mut ethernet.destination, &mut ethernet.source);
    done(frame.put(0, ethernet))
}

#[inline(always)]
fn tcp_sum(tcp: &header::Tcp) -> u64 {
    tcp.source as u64
        + tcp.destination as u64
        + tcp.sequence as u64
        + tcp.acknowledgment as u64
        + u16::from_ne_bytes([tcp.offset, tcp.flags]) as u64
        + tcp.window as u64
}

/// Turns a packet into the ICMP or ICMPv6 port unreachable that answers it, quoting its IP header and eight bytes.
#[inline(always)]
fn unreachable(skb: SkBuff, link: Link, parsed: &Parsed) -> Option<()> {
    let (l3, l4) = (parsed.l3 as usize, parsed.l4 as usize);
    // Headers in front of the transport are quoted too, unless that grows large.
    if l4 - l3 > 128 {
        return None;
    }
    let udp = parsed.tuple.proto == Proto::UDP && parsed.kind == Kind::Transport;
    let quoted = l4 - l3 + 8;
    let partial = udp && skb.load::<header::Udp>(l4)?.checksum != 0 && is_partial(skb, l4 + 6)?;
    // SAFETY: the context of the running program.
    done(unsafe { bpf_skb_change_tail(skb.0, (l4 + 8) as u32, 0) } == 0)?;
    if udp {
        // The probe above changed a complete checksum, and a partial one is yet to be completed by the device: what the
        // quote's checksum will be must be known now, since the answer's own covers it. None is a value it may have.
        let udp = skb.load::<header::Udp>(l4)?;
        let checksum = if partial {
            // The device stores the complement of the sum of the eight bytes: make that zero.
            !fold(udp.source as u64 + udp.destination as u64 + udp.length as u64)
        } else {
            0
        };
        store(skb, l4 + 6, &checksum)?;
    }
    let sum = quoted_sum(skb, l3, quoted)?;
    let v6 = !parsed.tuple.src.is_v4();
    let room = if v6 { IPV6 + ICMP } else { IPV4 + ICMP };
    // SAFETY: the context of the running program.
    done(unsafe { bpf_skb_adjust_room(skb.0, room as i32, BPF_ADJ_ROOM_MAC, 0) } == 0)?;
    // What the device will have made zero counts as zero.
    let sum = if partial {
        let udp = skb.load::<header::Udp>(l4 + room)?;
        Diff(sum).half(udp.checksum, 0).0
    } else {
        sum
    };
    if v6 {
        unreachable_v6(skb, parsed, l3, quoted, sum)?
    } else {
        unreachable_v4(skb, parsed, l3, quoted, sum)?
    }
    turn_frame(skb, link)
}

/// One's complement sum of `length` bytes (a multiple of four) from `offset`.
#[inline(always)]
fn quoted_sum(skb: SkBuff, offset: usize, length: usize) -> Option<u64> {
    let mut sum = 0;
    let complete = tables::search((length / 4) as u32 + 1, |word| {
        let at = word as usize * 4;
        if at >= length {
            return true;
        }
        if let Some(ports) = skb.load::<header::Ports>(offset + at) {
            sum += ports.source as u64 + ports.destination as u64;
        }
        false
    });
    if complete { Some(sum) } else { None }
}

#[inline(always)]
fn unreachable_v4(skb: SkBuff, parsed: &Parsed, l3: usize, quoted: usize, sum: u64) -> Option<()> {
    let mut ip = header::Ipv4 {
        version_ihl: 0x45,
        tos: 0,
        length: ((IPV4 + ICMP + quoted) as u16).to_be(),
        id: 0,
        fragment: 0,
        ttl: HOP_LIMIT,
        protocol: Proto::ICMP.0,
        checksum: 0,
        source: parsed.tuple.dst.v4_word(),
        destination: parsed.tuple.src.v4_word(),
    };
    ip.checksum = !fold(
        u16::from_ne_bytes([ip.version_ihl, ip.tos]) as u64
            + ip.length as u64
            + u16::from_ne_bytes([ip.ttl, ip.protocol]) as u64
            + ip.source as u64
            + ip.destination as u64,
    );
    store(skb, l3, &ip)?;
    // Destination unreachable, port unreachable (RFC 792).
    let mut icmp = header::Icmp { kind: 3, code: 3, checksum: 0, rest: 0 };
    icmp.checksum = !fold(sum + u16::from_ne_bytes([icmp.kind, icmp.code]) as u64);
    store(skb, l3 + IPV4, &icmp)
}

#[inline(always)]
fn unreachable_v6(skb: SkBuff, parsed: &Parsed, l3: usize, quoted: usize, sum: u64) -> Option<()> {
    let length = ICMP + quoted;
    let ip = header::Ipv6 {
        version: (6u32 << 28).to_be(),
        length: (length as u16).to_be(),
        next_header: Proto::ICMPV6.0,
        hop_limit: HOP_LIMIT,
        source: parsed.tuple.dst.0,
        destination: parsed.tuple.src.0,
    };
    store(skb, l3, &ip)?;
    // Destination unreachable, port unreachable (RFC 4443).
    let mut icmp = header::Icmp { kind: 1, code: 4, checksum: 0, rest: 0 };
    let pseudo = pseudo_sum(&parsed.tuple.src, &parsed.tuple.dst, Proto::ICMPV6.0, length);
    icmp.checksum = !fold(sum + pseudo + u16::from_ne_bytes([icmp.kind, icmp.code]) as u64);
    store(skb, l3 + IPV6, &icmp)
}
