//! The XDP program `uplink`: what can be told before the kernel has made a packet of a frame.
//!
//! It resets connections that nobody can serve (on hardware) and sends the segments of established TCP connections to their
//! backends; then the stack goes on, and the tcx programs of the same device find nothing left to do. What they would touch
//! again after a translation is left to them whole (`packet::is_final`), and so is everything that opens, promotes or ends a
//! flow, and all UDP (each datagram may open a flow).
//!
//! A device in promiscuous mode brings frames to other hosts; the kernel has not sorted them out yet. They pass: the
//! program acts on frames to the MAC address that the agent has noted for the device, and on none if it has noted none.
//!
//! Answers leave by the device they came by. On a veth pair such a frame waits in the far end's ring until something else
//! wakes that end, unless it runs XDP itself (`veth_xdp_flush`; seen with Linux 6.18): a reset that comes too late. So the
//! agent says where answers may be sent, and elsewhere the tcx program gives them.
//!
//! The program takes frames of several buffers, so that a large MTU is no obstacle to it.

use crate::answer;
use crate::counter;
use crate::events;
use crate::frame::Frame;
use crate::maps;
use crate::tables::{self, Env};
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use proxy_common::abi::device::DeviceRecord;
use proxy_common::abi::flow::{FlowKey, FlowRef};
use proxy_common::addr::Proto;
use proxy_common::lb::flow::Seconds;
use proxy_common::lb::packet::{self, Glance, Rewrite};
use proxy_common::lb::rewrite::{self, End};
use proxy_common::tables::Lookups;
use proxy_common::verdict::{DropReason, Refusal};
use proxy_common::wire::{self, Packet, Parsed, header};

impl Lookups for Env<Frame> {
    #[inline(always)]
    fn established(&self, key: &FlowKey) -> Option<FlowRef<'_>> {
        tables::established(key)
    }

    #[inline(always)]
    fn pending(&self, key: &FlowKey) -> Option<FlowRef<'_>> {
        tables::pending(key)
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ctx.ifindex()
    }

    #[inline(always)]
    fn now(&self) -> Seconds {
        tables::now()
    }
}

#[xdp(frags)]
pub fn uplink(ctx: XdpContext) -> u32 {
    let frame = Frame(ctx.ctx);
    let Some(parsed) = wire::parse_ethernet::<_, false>(&frame) else { return XDP_PASS };
    let env = Env { ctx: frame };
    let mut change = Rewrite::NONE;
    match packet::ingress_known(&env, &parsed, &mut change) {
        // Asked here and not before: that makes the verifier's work a third more.
        _ if parsed.tuple.proto != Proto::TCP => XDP_PASS,
        Glance::Rewrite if packet::is_final(&env, &parsed, &change) && receiver(&frame).is_some() => {
            translate(frame, &parsed, &change)
        }
        Glance::Unknown if receiver(&frame).is_some_and(|device| device.has(DeviceRecord::SENDS)) => {
            match packet::refusal(&env, &parsed) {
                Some((reason, refusal)) => refuse(frame, &parsed, reason, refusal),
                None => XDP_PASS,
            }
        }
        _ => XDP_PASS,
    }
}

/// The device that the frame came by, if the frame is for itself, as far as its MAC address is known.
#[inline(always)]
fn receiver(frame: &Frame) -> Option<DeviceRecord> {
    // SAFETY: plain words; the agent replaces elements as a whole.
    let device = *unsafe { maps::devices.get(frame.ifindex()) }?;
    if frame.load::<header::Ethernet>(0)?.destination == device.mac { Some(device) } else { None }
}

#[inline(always)]
fn translate(mut frame: Frame, parsed: &Parsed, change: &packet::Rewrite) -> u32 {
    let bytes = frame.len();
    if !rewrite::apply(&mut frame, parsed, End::Destination, change) {
        counter::drop(DropReason::RewriteFailed);
        return XDP_DROP;
    }
    counter::packet(change.service, bytes);
    XDP_PASS
}

#[inline(always)]
fn refuse(frame: Frame, parsed: &Parsed, reason: DropReason, refusal: Refusal) -> u32 {
    counter::drop(reason);
    events::drop(frame.ifindex(), &parsed.tuple, reason);
    if refusal == Refusal::Reject && answer::reset_frame(frame, parsed) { XDP_TX } else { XDP_DROP }
}
