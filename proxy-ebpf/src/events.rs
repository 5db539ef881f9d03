//! What happens, told to `shunt monitor` by a ring buffer: connections that are opened and refused, and what is dropped; never other packets of one.
//!
//! While nobody watches, an event costs a look at one word. Who watches says so again and again, so that nothing is told any
//! more a moment after he is gone. A full buffer loses events, and counts them.

use crate::maps;
use crate::tables::{nanos, now};
use aya_ebpf::bindings::BPF_RB_NO_WAKEUP;
use aya_ebpf::helpers::generated::{bpf_get_current_comm, bpf_get_current_pid_tgid};
use proxy_common::abi::event::{EventKind, EventRecord, Watch};
use proxy_common::addr::{Addr, Be16};
use proxy_common::lb::packet::Target;
use proxy_common::lb::socket::Dial;
use proxy_common::lb::tuple::Tuple;
use proxy_common::verdict::DropReason;

/// Who watches, if anybody does and wants this kind.
#[inline(always)]
fn watch(kind: EventKind) -> Option<&'static mut Watch> {
    // SAFETY: a map element of plain words, valid until the program ends; the reader replaces it as a whole, and a count of
    // what is lost may be wrong by what other CPUs lose at the same time.
    let watch = unsafe { &mut *maps::watch.get_ptr_mut(0)? };
    if now().0 < watch.until && watch.kinds & kind.bit() != 0 { Some(watch) } else { None }
}

#[inline(always)]
fn tell(watch: &mut Watch, fill: impl FnOnce(&mut EventRecord)) {
    let Some(mut entry) = maps::events.reserve(0) else {
        watch.lost = watch.lost.wrapping_add(1);
        return;
    };
    // SAFETY: integers only, for which zero bytes are a value.
    let record = unsafe {
        entry.as_mut_ptr().write_bytes(0, 1);
        entry.assume_init_mut()
    };
    record.time = nanos().0;
    fill(record);
    // The reader looks now and then: waking it for each event would slow down what it watches.
    if watch.wants(record) { entry.submit(BPF_RB_NO_WAKEUP as u64) } else { entry.discard(BPF_RB_NO_WAKEUP as u64) }
}

#[inline(always)]
fn set_ends(record: &mut EventRecord, tuple: &Tuple) {
    record.client = tuple.src;
    record.client_port = tuple.sport;
    record.frontend = tuple.dst;
    record.frontend_port = tuple.dport;
    record.proto = tuple.proto.0;
}

/// A packet opened a flow. (A function of its own in the object: it takes its turn on the stack of 512 bytes.)
#[inline(never)]
pub fn flow(ifindex: u32, tuple: &Tuple, target: &Target) {
    let Some(watch) = watch(EventKind::Flow) else { return };
    tell(watch, |record| {
        set_ends(record, tuple);
        record.backend = target.addr;
        record.backend_port = target.port;
        record.nat = target.nat;
        record.service = target.service;
        record.ifindex = ifindex;
        record.kind = EventKind::Flow as u8;
    });
}

/// A packet was dropped or refused. (Likewise.)
#[inline(never)]
pub fn drop(ifindex: u32, tuple: &Tuple, reason: DropReason) {
    let Some(watch) = watch(EventKind::Drop) else { return };
    tell(watch, |record| {
        set_ends(record, tuple);
        record.reason = reason as u32;
        record.ifindex = ifindex;
        record.kind = EventKind::Drop as u8;
    });
}

/// Where a process goes that dialled a frontend.
#[derive(Clone, Copy)]
pub struct Backend {
    pub addr: Addr,
    pub port: Be16,
}

/// A process dialled a frontend: `to` its backend, or nowhere, for a `reason`.
#[inline(always)]
pub fn socket(kind: EventKind, dial: &Dial, to: Option<&Backend>, reason: u32) {
    let Some(watch) = watch(kind) else { return };
    tell(watch, |record| {
        record.frontend = dial.addr;
        record.frontend_port = dial.port;
        record.proto = dial.proto.0;
        if let Some(to) = to {
            record.backend = to.addr;
            record.backend_port = to.port;
        }
        record.reason = reason;
        record.kind = kind as u8;
        // SAFETY: no pointers, and a buffer of the given size.
        unsafe {
            record.process = (bpf_get_current_pid_tgid() >> 32) as u32;
            bpf_get_current_comm(record.comm.as_mut_ptr().cast(), size_of_val(&record.comm) as u32);
        }
    });
}
