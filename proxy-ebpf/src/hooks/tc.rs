//! tcx (or clsact) programs: `ingress` and `egress` for Ethernet devices, `ingress_l3` and `egress_l3` for devices without
//! a link layer, `ingress_port` for ports of a bridge.

use crate::answer;
use crate::counter;
use crate::events;
use crate::kernel::Device;
use crate::maps;
use crate::packet::SkBuff;
use crate::tables::Env;
use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::btf_maps::ProgramArray;
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use core::mem::MaybeUninit;
use proxy_common::continuation::Continuation;
use proxy_common::lb::packet::{self, Glance, Rewrite, Step, Target, Verdict};
use proxy_common::lb::rewrite::{self, End};
use proxy_common::verdict::{DropReason, Refusal};
use proxy_common::wire::{self, Kind, Packet, Parsed, header};

/// Go on to the next program, then to the stack (TCX_NEXT is the same number).
const NEXT: i32 = TC_ACT_UNSPEC;

/// To this host (linux/if_packet.h).
const PACKET_HOST: u32 = 0;

/// Whether packets begin with an Ethernet header.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// They do.
    Ethernet,
    /// They begin with the IP header.
    None,
}

/// Where a packet is: what the programs that are tail-called must know, kept in the packet's control block.
#[derive(Clone, Copy)]
pub struct Place {
    /// Its link layer.
    pub link: Link,
    /// The end that changes here: the destination at ingress, the source at egress.
    pub end: End,
    /// The device is a port of a bridge.
    pub is_port: bool,
    /// What `packet::ingress_flow` said of the client's port.
    pub clash: bool,
}

impl Place {
    const L3: u32 = 1;
    const EGRESS: u32 = 1 << 1;
    const PORT: u32 = 1 << 2;
    const CLASH: u32 = 1 << 3;

    #[inline(always)]
    fn pack(self) -> u32 {
        let link = if self.link == Link::None { Self::L3 } else { 0 };
        let end = if self.end == End::Source { Self::EGRESS } else { 0 };
        let port = if self.is_port { Self::PORT } else { 0 };
        link | end | port | if self.clash { Self::CLASH } else { 0 }
    }

    #[inline(always)]
    fn unpack(word: u32) -> Self {
        Self {
            link: if word & Self::L3 != 0 { Link::None } else { Link::Ethernet },
            end: if word & Self::EGRESS != 0 { End::Source } else { End::Destination },
            is_port: word & Self::PORT != 0,
            clash: word & Self::CLASH != 0,
        }
    }
}

/// Programs that others go on in: they have a stack of their own, and re-read the packet.
#[btf_map]
static programs: ProgramArray<{ Continuation::ALL.len() }> = ProgramArray::new();

/// Goes on in another program. Comes back only if the agent has not filled the array yet.
#[inline(always)]
fn go_on(skb: SkBuff, place: Place, program: Continuation) {
    skb.set_control(place.pack());
    // SAFETY: the context of the running program.
    unsafe { programs.tail_call(&TcContext::new(skb.0), program as u32) };
}

#[classifier]
pub fn ingress(ctx: TcContext) -> i32 {
    enter(
        SkBuff(ctx.skb.skb),
        Place { link: Link::Ethernet, end: End::Destination, is_port: false, clash: false },
        false,
    )
}

#[classifier]
pub fn ingress_l3(ctx: TcContext) -> i32 {
    enter(SkBuff(ctx.skb.skb), Place { link: Link::None, end: End::Destination, is_port: false, clash: false }, false)
}

#[classifier]
pub fn ingress_port(ctx: TcContext) -> i32 {
    let skb = SkBuff(ctx.skb.skb);
    let place = Place { link: Link::Ethernet, end: End::Destination, is_port: true, clash: false };
    let is_switched = !goes_to_bridge(&skb);
    enter(skb, place, is_switched)
}

#[classifier]
pub fn egress(ctx: TcContext) -> i32 {
    leave(SkBuff(ctx.skb.skb), Place { link: Link::Ethernet, end: End::Source, is_port: false, clash: false })
}

#[classifier]
pub fn egress_l3(ctx: TcContext) -> i32 {
    leave(SkBuff(ctx.skb.skb), Place { link: Link::None, end: End::Source, is_port: false, clash: false })
}

/// The room of this CPU for a parsed packet. Packet programs run with bottom halves off, one at a time, and those that are
/// tail-called find here what the one before them left.
#[inline(always)]
fn parsed_room() -> Option<&'static mut MaybeUninit<Parsed>> {
    // SAFETY: the map's element for this CPU, which only the running program uses; large and aligned enough.
    maps::parsed_packets.get_ptr_mut(0).map(|room| unsafe { &mut *room.cast() })
}

/// The room of this CPU for what a flow is made of, likewise.
#[inline(always)]
fn target_room() -> Option<&'static mut MaybeUninit<Target>> {
    // SAFETY: as in `parsed_room`.
    maps::targets.get_ptr_mut(0).map(|room| unsafe { &mut *room.cast() })
}

/// Tail-called for a packet that the programs of a device do not know: reads all of it that matters, then goes on.
#[classifier]
pub fn read(ctx: TcContext) -> i32 {
    let skb = SkBuff(ctx.skb.skb);
    let place = Place::unpack(skb.control());
    if skb.is_short() {
        skb.pull();
    }
    let Some(room) = parsed_room() else { return NEXT };
    let Some(parsed) = parse::<true>(&skb, place.link) else { return NEXT };
    room.write(parsed);
    go_on(skb, place, if place.end == End::Source { Continuation::Rest } else { Continuation::Flow });
    NEXT
}

/// Tail-called by [`read`] for a packet that enters: `packet::ingress_flow`.
#[classifier]
pub fn flow(ctx: TcContext) -> i32 {
    let skb = SkBuff(ctx.skb.skb);
    let place = Place::unpack(skb.control());
    let Some(room) = parsed_room() else { return NEXT };
    // SAFETY: `read`, which alone goes on here, has filled it.
    let parsed = unsafe { room.assume_init_mut() };
    let env = Env { ctx: Device { skb, is_port: place.is_port } };
    match packet::ingress_flow(&env, parsed) {
        Step::Done(verdict) => act_apart(skb, place, parsed, verdict),
        Step::Open { clash } => {
            go_on(skb, Place { clash, ..place }, Continuation::Open);
            NEXT
        }
    }
}

/// Tail-called by [`flow`] for a packet without one: `packet::ingress_open`.
#[classifier]
pub fn open(ctx: TcContext) -> i32 {
    let skb = SkBuff(ctx.skb.skb);
    let place = Place::unpack(skb.control());
    let (Some(parsed), Some(room)) = (parsed_room(), target_room()) else { return NEXT };
    // SAFETY: `flow`, which alone goes on here, has filled it.
    let parsed = unsafe { parsed.assume_init_ref() };
    let env = Env { ctx: Device { skb, is_port: place.is_port } };
    match packet::ingress_open(&env, parsed, place.clash) {
        Ok(target) => {
            room.write(target);
            go_on(skb, place, Continuation::Create);
            NEXT
        }
        Err(None) => NEXT,
        Err(Some((reason, refusal))) => refuse(skb, place, reason, refusal),
    }
}

/// Tail-called by [`open`] for a packet that opens a flow: `packet::create`.
#[classifier]
pub fn create(ctx: TcContext) -> i32 {
    let skb = SkBuff(ctx.skb.skb);
    let place = Place::unpack(skb.control());
    let (Some(parsed), Some(room)) = (parsed_room(), target_room()) else { return NEXT };
    // SAFETY: `flow` and `open`, by which alone one comes here, have filled them.
    let (parsed, target) = unsafe { (parsed.assume_init_ref(), room.assume_init_ref()) };
    let env = Env { ctx: Device { skb, is_port: place.is_port } };
    let verdict = packet::create(&env, parsed, target);
    if matches!(verdict, Verdict::Rewrite(_)) {
        events::flow(skb.ifindex(), &parsed.tuple, target);
    }
    act_apart(skb, place, parsed, verdict)
}

// A function of its own in the object: it takes its turn on the stack of 512 bytes.

#[inline(never)]
fn apply(skb: *mut __sk_buff, parsed: &Parsed, end: End, rewrite: &Rewrite) -> bool {
    rewrite::apply(&mut SkBuff(skb), parsed, end, rewrite)
}

/// As [`act`], for the programs that are tail-called.
#[inline(always)]
fn act_apart(skb: SkBuff, place: Place, parsed: &Parsed, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Rewrite(rewrite) => {
            if !apply(skb.0, parsed, place.end, &rewrite) {
                counter::drop(DropReason::RewriteFailed);
                return TC_ACT_SHOT;
            }
            counter::packet(rewrite.service, skb.len());
            NEXT
        }
        Verdict::Pass => NEXT,
        Verdict::Refuse(reason, refusal) => refuse(skb, place, reason, refusal),
    }
}

/// Tail-called by [`read`] for a packet that leaves: `packet::egress`.
#[classifier]
pub fn rest(ctx: TcContext) -> i32 {
    let skb = SkBuff(ctx.skb.skb);
    let place = Place::unpack(skb.control());
    let Some(room) = parsed_room() else { return NEXT };
    // SAFETY: `read`, which alone goes on here, has filled it.
    let parsed = unsafe { room.assume_init_mut() };
    let env = Env { ctx: Device { skb, is_port: false } };
    let verdict = packet::egress(&env, parsed);
    act_apart(skb, place, parsed, verdict)
}

/// Tail-called for a packet that is refused with an answer.
#[classifier]
pub fn answer(ctx: TcContext) -> i32 {
    let skb = SkBuff(ctx.skb.skb);
    let place = Place::unpack(skb.control());
    let Some(parsed) = parsed_room() else { return TC_ACT_SHOT };
    // SAFETY: `refuse`, by which alone one comes here, has filled it.
    let parsed = unsafe { parsed.assume_init_ref() };
    answer::reject(skb, place.link, parsed, place.end)
}

/// True if the frame is for the bridge itself, that is, for this node; the others are switched.
#[inline(always)]
fn goes_to_bridge(skb: &SkBuff) -> bool {
    // SAFETY: plain words; the agent replaces elements as a whole.
    let Some(device) = (unsafe { maps::devices.get(skb.ifindex()) }) else { return false };
    match skb.load::<header::Ethernet>(0) {
        Some(frame) => frame.destination == device.mac,
        None => false,
    }
}

#[inline(always)]
fn parse<const QUOTES: bool>(skb: &SkBuff, link: Link) -> Option<Parsed> {
    match link {
        Link::Ethernet => wire::parse_ethernet::<_, QUOTES>(skb),
        Link::None => wire::parse_ip::<_, QUOTES>(skb),
    }
}

/// `is_switched`: the frame will not come to this node.
#[inline(always)]
fn enter(skb: SkBuff, place: Place, is_switched: bool) -> i32 {
    // A frame that the device took for others (another MAC address) is none of ours; a bridge port's are asked above.
    if !place.is_port && skb.packet_type() != PACKET_HOST {
        return NEXT;
    }
    let Some(parsed) = parse::<false>(&skb, place.link) else {
        return if is_switched { NEXT } else { read_if_short(skb, place) };
    };
    let env = Env { ctx: Device { skb, is_port: place.is_port } };
    if is_switched && !packet::may_be_direct(&env, &parsed) {
        return NEXT;
    }
    if parsed.kind == Kind::Other && skb.is_short() {
        return read_if_short(skb, place);
    }
    let mut rewrite = Rewrite::NONE;
    match packet::ingress_known(&env, &parsed, &mut rewrite) {
        Glance::Pass => NEXT,
        Glance::Rewrite => translate(skb, place, &parsed, &rewrite),
        Glance::Unknown => {
            go_on(skb, place, Continuation::Read);
            NEXT
        }
    }
}

#[inline(always)]
fn leave(skb: SkBuff, place: Place) -> i32 {
    let Some(parsed) = parse::<false>(&skb, place.link) else { return read_if_short(skb, place) };
    if parsed.kind == Kind::Other && skb.is_short() {
        return read_if_short(skb, place);
    }
    let env = Env { ctx: Device { skb, is_port: false } };
    match packet::egress_known(&env, &parsed) {
        Some(verdict) => act(skb, place, &parsed, verdict),
        None => {
            go_on(skb, place, Continuation::Read);
            NEXT
        }
    }
}

/// What could not be read may lie beyond the linear part.
#[inline(always)]
fn read_if_short(skb: SkBuff, place: Place) -> i32 {
    if skb.is_short() {
        go_on(skb, place, Continuation::Read);
    }
    NEXT
}

#[inline(always)]
fn translate(mut skb: SkBuff, place: Place, parsed: &Parsed, rewrite: &Rewrite) -> i32 {
    if !rewrite::apply(&mut skb, parsed, place.end, rewrite) {
        counter::drop(DropReason::RewriteFailed);
        return TC_ACT_SHOT;
    }
    counter::packet(rewrite.service, skb.len());
    NEXT
}

/// Does what was decided.
#[inline(always)]
fn act(skb: SkBuff, place: Place, parsed: &Parsed, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass => NEXT,
        Verdict::Rewrite(rewrite) => translate(skb, place, parsed, &rewrite),
        Verdict::Refuse(reason, refusal) => {
            if let Some(room) = parsed_room() {
                room.write(*parsed);
            }
            refuse(skb, place, reason, refusal)
        }
    }
}

/// Refuses a packet; what was parsed of it lies in its room.
#[inline(always)]
fn refuse(skb: SkBuff, place: Place, reason: DropReason, refusal: Refusal) -> i32 {
    counter::drop(reason);
    if let Some(parsed) = parsed_room() {
        // SAFETY: all that refuse have filled it.
        events::drop(skb.ifindex(), unsafe { &parsed.assume_init_ref().tuple }, reason);
    }
    if refusal == Refusal::Reject {
        go_on(skb, place, Continuation::Answer);
    }
    TC_ACT_SHOT
}
