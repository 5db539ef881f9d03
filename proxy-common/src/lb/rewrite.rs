//! From a decision to bytes: which fields change, and the checksums that follow (RFC 1624, RFC 8200 section 8.1).

use crate::addr::{Addr, Be16, Proto};
use crate::lb::packet::Rewrite;
use crate::wire::checksum::Diff;
use crate::wire::header::{Ethernet, Header, Ipv4, Tcp, Udp};
use crate::wire::{Kind, Packet, Parsed};

/// Which end of a packet changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// At egress.
    Source,
    /// At ingress.
    Destination,
}

/// A transport checksum's relation to the change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct L4 {
    /// The change is in the pseudo-header, not in the data (this matters where the device completes checksums).
    pub pseudo: bool,
    /// IPv6.
    pub v6: bool,
    /// UDP: zero means "no checksum" and stays so.
    pub zero_means_none: bool,
}

/// Bytes that can be changed. All answer false if the packet cannot take it; it is dropped then.
pub trait Edit: Packet {
    /// Stores one 16-bit number as it lies.
    fn store_u16(&mut self, offset: usize, value: u16) -> bool;
    /// Stores one word as it lies.
    fn store_u32(&mut self, offset: usize, value: u32) -> bool;
    /// Stores four words as they lie.
    fn store_words(&mut self, offset: usize, value: &[u32; 4]) -> bool;
    /// Updates an IPv4 header checksum.
    fn update_l3(&mut self, offset: usize, diff: Diff) -> bool;
    /// Updates a transport or ICMP checksum.
    fn update_l4(&mut self, offset: usize, diff: Diff, how: L4) -> bool;
}

/// Applies a rewrite to one end of a packet. False: it could not be applied wholly, the packet must be dropped.
#[inline(always)]
pub fn apply<E: Edit>(packet: &mut E, parsed: &Parsed, end: End, rewrite: &Rewrite) -> bool {
    let v6 = !parsed.outer_src.is_v4();
    if rewrite.addr.is_v4() == v6 {
        return false;
    }
    if rewrite.mac != [0; 3] && !store_mac(packet, &rewrite.mac) {
        return false;
    }
    if parsed.kind == Kind::IcmpError {
        apply_icmp(packet, parsed, end, rewrite, v6)
    } else {
        apply_transport(packet, parsed, end, rewrite, v6)
    }
}

#[inline(always)]
fn store_mac<E: Edit>(packet: &mut E, mac: &[u16; 3]) -> bool {
    packet.load::<Ethernet>(0).is_some()
        && packet.store_u16(0, mac[0])
        && packet.store_u16(2, mac[1])
        && packet.store_u16(4, mac[2])
}

/// Offset of an address in its IP header.
#[inline(always)]
const fn addr_offset(v6: bool, end: End) -> usize {
    match (v6, end) {
        (false, End::Source) => 12,
        (false, End::Destination) => 16,
        (true, End::Source) => 8,
        (true, End::Destination) => 24,
    }
}

/// Offset of a port in its transport header.
#[inline(always)]
const fn port_offset(end: End) -> usize {
    match end {
        End::Source => 0,
        End::Destination => 2,
    }
}

const IPV4_CHECKSUM: usize = 10;
const ICMP_CHECKSUM: usize = 2;

#[inline(always)]
const fn l4_checksum(proto: Proto) -> usize {
    if proto.0 == Proto::TCP.0 { 16 } else { 6 }
}

#[inline(always)]
const fn opposite(end: End) -> End {
    match end {
        End::Source => End::Destination,
        End::Destination => End::Source,
    }
}

#[inline(always)]
fn store_addr<E: Edit>(packet: &mut E, offset: usize, addr: &Addr) -> bool {
    if addr.is_v4() { packet.store_u32(offset, addr.v4_word()) } else { packet.store_words(offset, &addr.0) }
}

/// The address and port that stand at an end now.
#[inline(always)]
fn current(parsed: &Parsed, end: End) -> (Addr, Be16) {
    match end {
        End::Source => (parsed.tuple.src, parsed.tuple.sport),
        End::Destination => (parsed.tuple.dst, parsed.tuple.dport),
    }
}

#[inline(always)]
fn apply_transport<E: Edit>(packet: &mut E, parsed: &Parsed, end: End, rewrite: &Rewrite, v6: bool) -> bool {
    let (l3, l4) = (parsed.l3 as usize, parsed.l4 as usize);
    let (old_addr, old_port) = current(parsed, end);
    let (_, old_other) = current(parsed, opposite(end));
    let addr_diff = Diff::NONE.words(&old_addr.0, &rewrite.addr.0);
    if parsed.kind == Kind::Transport {
        let checksum = l4 + l4_checksum(parsed.tuple.proto);
        let how = L4 { pseudo: true, v6, zero_means_none: parsed.tuple.proto == Proto::UDP };
        let mut ports = Diff::NONE.half(old_port.0, rewrite.port.0);
        if !rewrite.other_port.is_zero() {
            ports = ports.half(old_other.0, rewrite.other_port.0);
        }
        if !packet.update_l4(checksum, addr_diff, how)
            || !packet.update_l4(checksum, ports, L4 { pseudo: false, ..how })
            || !packet.store_u16(l4 + port_offset(end), rewrite.port.0)
        {
            return false;
        }
        if !rewrite.other_port.is_zero() && !packet.store_u16(l4 + port_offset(opposite(end)), rewrite.other_port.0) {
            return false;
        }
    }
    (v6 || packet.update_l3(l3 + IPV4_CHECKSUM, addr_diff))
        && store_addr(packet, l3 + addr_offset(v6, end), &rewrite.addr)
}

#[inline(always)]
fn apply_icmp<E: Edit>(packet: &mut E, parsed: &Parsed, end: End, rewrite: &Rewrite, v6: bool) -> bool {
    let Some(quoted) = apply_quote(packet, parsed, end, rewrite, v6) else { return false };
    let checksum = parsed.l4 as usize + ICMP_CHECKSUM;
    let how = L4 { pseudo: false, v6, zero_means_none: false };
    if !packet.update_l4(checksum, quoted, how) {
        return false;
    }
    // A router's error keeps the router as its source; the end's own carries the end's new address.
    let outer = match end {
        End::Source => parsed.outer_src,
        End::Destination => parsed.outer_dst,
    };
    if outer != current(parsed, end).0 {
        return true;
    }
    let l3 = parsed.l3 as usize;
    let diff = Diff::NONE.words(&outer.0, &rewrite.addr.0);
    let checksums = if v6 {
        packet.update_l4(checksum, diff, L4 { pseudo: true, ..how })
    } else {
        packet.update_l3(l3 + IPV4_CHECKSUM, diff)
    };
    checksums && store_addr(packet, l3 + addr_offset(v6, end), &rewrite.addr)
}

/// Changes the quoted packet and returns what that does to the bytes under the ICMP checksum. The quote travelled the
/// other way: what is the error's source is the quote's destination.
#[inline(always)]
fn apply_quote<E: Edit>(packet: &mut E, parsed: &Parsed, end: End, rewrite: &Rewrite, v6: bool) -> Option<Diff> {
    let (l3, l4) = (parsed.quoted_l3 as usize, parsed.quoted_l4 as usize);
    let quoted_end = opposite(end);
    let (old_addr, old_port) = current(parsed, end);
    let (_, old_other) = current(parsed, quoted_end);
    let addr_diff = Diff::NONE.words(&old_addr.0, &rewrite.addr.0);
    let mut ports = Diff::NONE.half(old_port.0, rewrite.port.0);
    if !rewrite.other_port.is_zero() {
        ports = ports.half(old_other.0, rewrite.other_port.0);
        store(packet.store_u16(l4 + port_offset(end), rewrite.other_port.0))?;
    }
    let mut changed = Diff(addr_diff.0 + ports.0);
    if parsed.quoted_checksum {
        let offset = l4 + l4_checksum(parsed.tuple.proto);
        let old = quoted_checksum(packet, l4, parsed.tuple.proto)?;
        if old != 0 || parsed.tuple.proto == Proto::TCP {
            let new = Diff(addr_diff.0 + ports.0).apply(old);
            changed = changed.half(old, new);
            store(packet.store_u16(offset, new))?;
        }
    }
    if !v6 {
        let old = packet.load::<Ipv4>(l3)?.checksum;
        let new = addr_diff.apply(old);
        changed = changed.half(old, new);
        store(packet.store_u16(l3 + IPV4_CHECKSUM, new))?;
    }
    store(packet.store_u16(l4 + port_offset(quoted_end), rewrite.port.0))?;
    store(store_addr(packet, l3 + addr_offset(v6, quoted_end), &rewrite.addr))?;
    Some(changed)
}

#[inline(always)]
fn store(stored: bool) -> Option<()> {
    if stored { Some(()) } else { None }
}

#[inline(always)]
fn quoted_checksum<E: Edit>(packet: &E, l4: usize, proto: Proto) -> Option<u16> {
    if proto == Proto::TCP { Some(packet.load::<Tcp>(l4)?.checksum) } else { Some(packet.load::<Udp>(l4)?.checksum) }
}

/// A packet in a slice, whose checksums are all complete: for tests and for tools.
pub struct Slice<'a>(pub &'a mut [u8]);

impl Packet for Slice<'_> {
    fn load<T: Header>(&self, offset: usize) -> Option<T> {
        T::from_bytes(self.0.get(offset..)?)
    }
}

impl Slice<'_> {
    fn store(&mut self, offset: usize, bytes: &[u8]) -> bool {
        match self.0.get_mut(offset..offset + bytes.len()) {
            Some(place) => {
                place.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }

    fn update(&mut self, offset: usize, diff: Diff, zero_means_none: bool) -> bool {
        let Some(bytes) = self.0.get(offset..offset + 2) else { return false };
        let old = u16::from_ne_bytes([bytes[0], bytes[1]]);
        if zero_means_none && old == 0 {
            return true;
        }
        let new = diff.apply(old);
        let new = if zero_means_none && new == 0 { 0xffff } else { new };
        self.store(offset, &new.to_ne_bytes())
    }
}

impl Edit for Slice<'_> {
    fn store_u16(&mut self, offset: usize, value: u16) -> bool {
        self.store(offset, &value.to_ne_bytes())
    }

    fn store_u32(&mut self, offset: usize, value: u32) -> bool {
        self.store(offset, &value.to_ne_bytes())
    }

    fn store_words(&mut self, offset: usize, value: &[u32; 4]) -> bool {
        value.iter().enumerate().all(|(i, word)| self.store_u32(offset + 4 * i, *word))
    }

    fn update_l3(&mut self, offset: usize, diff: Diff) -> bool {
        self.update(offset, diff, false)
    }

    fn update_l4(&mut self, offset: usize, diff: Diff, how: L4) -> bool {
        self.update(offset, diff, how.zero_means_none)
    }
}
