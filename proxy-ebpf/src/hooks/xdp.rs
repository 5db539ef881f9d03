//! The XDP program `uplink`: what can be told before the kernel has made a packet of a frame.
//!
//! It drops what goes to unallocated service addresses, resets connections that nobody can serve, and sends the segments of
//! established TCP connections to their backends; then the stack goes on, and the tcx programs find nothing left to do.
//! Everything that opens, promotes or ends a flow, and all UDP (whose tcx program would take a translated datagram for
//! a direct one), passes to them.

use crate::answer;
use crate::counter;
use crate::frame::Frame;
use crate::tables::{self, Env};
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use proxy_common::abi::flow::{FlowKey, FlowRef};
use proxy_common::addr::Proto;
use proxy_common::lb::flow::Seconds;
use proxy_common::lb::packet::{self, Verdict};
use proxy_common::lb::rewrite::{self, End};
use proxy_common::tables::Lookups;
use proxy_common::verdict::{DropReason, Refusal};
use proxy_common::wire::{self, Kind, Parsed};

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

#[xdp]
pub fn uplink(ctx: XdpContext) -> u32 {
    let frame = Frame(ctx.ctx);
    let Some(parsed) = wire::parse_ethernet::<_, false>(&frame) else { return XDP_PASS };
    if parsed.kind != Kind::Transport || parsed.tuple.proto != Proto::TCP {
        return XDP_PASS;
    }
    let env = Env { ctx: frame };
    match packet::ingress_known(&env, &parsed) {
        Some(Verdict::Pass) => XDP_PASS,
        Some(Verdict::Rewrite(change)) => translate(frame, &parsed, &change),
        Some(Verdict::Refuse(reason, refusal)) => refuse(frame, &parsed, reason, refusal),
        None => match packet::refusal(&env, &parsed) {
            Some((reason, refusal)) => refuse(frame, &parsed, reason, refusal),
            None => XDP_PASS,
        },
    }
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
    if refusal == Refusal::Reject && answer::reset_frame(frame, parsed) { XDP_TX } else { XDP_DROP }
}
