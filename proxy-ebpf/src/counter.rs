//! Counters: one copy a CPU, added to without atomics.

use crate::maps;
use proxy_common::abi::counter::ServiceCounters;
use proxy_common::tables::Event;
use proxy_common::verdict::DropReason;

#[inline(always)]
fn add(service: u32, change: impl FnOnce(&mut ServiceCounters)) {
    if let Some(counters) = maps::service_counters.get_ptr_mut(service) {
        // SAFETY: the map's element for this CPU, which no other CPU writes.
        change(unsafe { &mut *counters });
    }
}

/// Counts an event of a service.
#[inline(always)]
pub fn event(service: u32, event: Event) {
    add(service, |counters| match event {
        Event::Flow => counters.flows += 1,
        Event::Socket => counters.sockets += 1,
        Event::NoBackend => counters.no_backend += 1,
    });
}

/// Counts a translated packet of `bytes`.
#[inline(always)]
pub fn packet(service: u32, bytes: u32) {
    add(service, |counters| {
        counters.packets += 1;
        counters.bytes += bytes as u64;
    });
}

/// Counts a drop.
#[inline(always)]
pub fn drop(reason: DropReason) {
    if let Some(count) = maps::drop_counters.get_ptr_mut(reason as u32) {
        // SAFETY: as in `add`.
        unsafe { *count += 1 };
    }
}
