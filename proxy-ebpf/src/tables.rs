//! `proxy-common`'s tables over the maps. The same for every program; what differs is the context in `C`.

use crate::{counter, dry_run, maps};
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_loop};
use core::ffi::c_void;
use proxy_common::abi::address::{
    AddressClass, KEPT_GENERATION, KEPT_WORDS, PortUse, PortWord, kept_index, port_index,
};
use proxy_common::abi::affinity::{AffinityKey, AffinityValue};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::Config;
use proxy_common::abi::flow::{FlowKey, FlowRef, FlowValue};
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{Range, Slot};
use proxy_common::abi::source::SourceRangeKey;
use proxy_common::addr::{Addr, Port};
use proxy_common::lb::flow::{Nanos, Seconds};
use proxy_common::tables::{Event, Tables};
use proxy_common::verdict::DropReason;

/// The tables, and the context `C` of the running program.
pub struct Env<C> {
    /// What the program was called with.
    pub ctx: C,
}

/// The clock: CLOCK_MONOTONIC_COARSE.
#[inline(always)]
pub fn now() -> Seconds {
    Seconds::from_nanos(nanos().0)
}

/// The clock, finer.
#[inline(always)]
pub fn nanos() -> Nanos {
    // SAFETY: no arguments.
    Nanos(unsafe { bpf_ktime_get_coarse_ns() })
}

/// Sets bits in a word shared with other CPUs.
#[inline(always)]
fn atomic_or(word: *mut u64, bits: u64) {
    // SAFETY: `word` is a map element of eight bytes.
    unsafe {
        core::arch::asm!("lock *(u64 *)({word} + 0) |= {bits}", word = in(reg) word, bits = in(reg) bits);
    }
}

/// Calls `found` with 0, 1, 2 … below `tries` until it answers true; answers whether it did.
#[inline(always)]
pub fn search<F: FnMut(u32) -> bool>(tries: u32, found: F) -> bool {
    struct State<F> {
        found: F,
        done: u64,
    }
    extern "C" fn step<F: FnMut(u32) -> bool>(index: u64, state: *mut c_void) -> i64 {
        // SAFETY: the state below, which outlives the loop and is used by it alone.
        let state = unsafe { &mut *state.cast::<State<F>>() };
        if (state.found)(index as u32) {
            state.done = 1;
            return 1;
        }
        0
    }
    let mut state = State { found, done: 0 };
    // SAFETY: the callback has the helper's signature; `state` lives on this frame until the helper returns.
    unsafe { bpf_loop(tries, step::<F> as *mut c_void, core::ptr::from_mut(&mut state).cast(), 0) };
    state.done != 0
}

#[inline(always)]
fn port_bits(word: Option<&PortWord>, shift: u32) -> u64 {
    match word {
        Some(word) => word.bits >> shift,
        None => 0,
    }
}

/// How far above those of generation 0 the marks of the current one lie.
#[inline(always)]
fn kept_generation() -> u32 {
    match maps::kept_ports.get_ptr(KEPT_WORDS) {
        // SAFETY: one aligned word; the agent changes it by one store.
        Some(word) => (unsafe { (&raw const (*word).bits).read_volatile() } as u32 & 1) * KEPT_GENERATION,
        None => 0,
    }
}

impl<C> Tables for Env<C> {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        maps::config.get(0)
    }

    #[inline(always)]
    fn address(&self, addr: &Addr) -> AddressClass {
        // SAFETY: one aligned word, read once; the agent replaces elements as a whole.
        match unsafe { maps::addresses.get(addr) } {
            Some(class) => *class,
            None => AddressClass::ZERO,
        }
    }

    #[inline(always)]
    fn set_flows_of(&self, addr: &Addr) {
        if dry_run::is_on() {
            return;
        }
        if let Some(class) = maps::addresses.get_ptr_mut(addr) {
            // SAFETY: one aligned word. The agent may replace it at the same time; it keeps this bit by reading first.
            unsafe { (*class).flags |= AddressClass::FLOWS };
        }
    }

    #[inline(always)]
    fn port_use(&self, port: Port) -> PortUse {
        let (word, shift) = port_index(port);
        let configured = port_bits(maps::ports.get(word), shift);
        let (word, shift) = kept_index(port);
        let kept = port_bits(maps::kept_ports.get(word), shift);
        PortUse((configured | kept | kept >> KEPT_GENERATION) & (PortUse::NODE_PORT | PortUse::SNAT))
    }

    #[inline(always)]
    fn mark_port(&self, port: Port, usage: u64) {
        if dry_run::is_on() {
            return;
        }
        let (word, shift) = kept_index(port);
        let shift = shift + kept_generation();
        if let Some(word) = maps::kept_ports.get_ptr_mut(word) {
            // Most are marked already; a locked write would take the word away from the other CPUs.
            // SAFETY: one aligned word.
            if unsafe { (&raw const (*word).bits).read_volatile() } >> shift & usage == 0 {
                atomic_or(word.cast(), usage << shift);
            }
        }
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<FrontendValue> {
        // SAFETY: plain words; the agent replaces elements as a whole.
        unsafe { maps::frontends.get(key).copied() }
    }

    #[inline(always)]
    fn range(&self, service: u32, local: bool) -> Option<Range> {
        let record = maps::services.get_ptr(service)?;
        // SAFETY: a mapped element of the service array; one aligned load of the word that userspace publishes.
        let word = unsafe {
            if local {
                (&raw const (*record).local).read_volatile()
            } else {
                (&raw const (*record).cluster).read_volatile()
            }
        };
        Some(Range::unpack(word))
    }

    #[inline(always)]
    fn affinity_timeout(&self, service: u32) -> u32 {
        match maps::services.get_ptr(service) {
            // SAFETY: as in `range`.
            Some(record) => unsafe { (&raw const (*record).affinity).read_volatile() },
            None => 0,
        }
    }

    #[inline(always)]
    fn fingerprint(&self, service: u32) -> u32 {
        match maps::services.get_ptr(service) {
            // SAFETY: as in `range`.
            Some(record) => unsafe { (&raw const (*record).fingerprint).read_volatile() },
            None => 0,
        }
    }

    #[inline(always)]
    fn is_allowed(&self, service: u32, client: &Addr) -> bool {
        let key = SourceRangeKey::new(service, *client, 128);
        maps::source_ranges.get(&Key::new(key.bits, key.range)).is_some()
    }

    #[inline(always)]
    fn slot(&self, position: u32) -> Option<Slot> {
        let slot = maps::slots.get_ptr(position)?;
        // SAFETY: a mapped element of the slot array, eight bytes, read by one load.
        let word = unsafe { slot.cast::<u64>().read_volatile() };
        Some(Slot { backend: word as u32, owner: (word >> 32) as u32 })
    }

    #[inline(always)]
    fn range_contains(&self, range: Range, backend: u32) -> bool {
        search(range.count, |step| match self.slot(range.base.wrapping_add(step)) {
            Some(slot) => slot.backend == backend,
            None => false,
        })
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<BackendRecord> {
        // SAFETY: plain words; a new backend's state is written last, and an id waits a grace period before its next use.
        maps::backends.get_ptr(id).map(|record| unsafe { record.read() })
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        // SAFETY: two words; a torn pair names a live backend all the same.
        unsafe { maps::affinity.get(key).copied() }
    }

    #[inline(always)]
    fn set_affinity(&self, key: &AffinityKey, value: &AffinityValue) {
        if dry_run::is_on() {
            return;
        }
        // What cannot be remembered is picked anew.
        let _ = maps::affinity.insert(key, value, BPF_ANY as u64);
    }

    #[inline(always)]
    fn count(&self, service: u32, event: Event) {
        counter::event(service, event);
    }

    #[inline(always)]
    fn count_drop(&self, reason: DropReason) {
        counter::drop(reason);
    }
}

/// An established flow entry.
#[inline(always)]
pub fn established<'a>(key: &FlowKey) -> Option<FlowRef<'a>> {
    if dry_run::is_on() {
        return dry_run::established(key);
    }
    // SAFETY: a map element, valid until the program ends.
    maps::flows.get_ptr_mut(key).map(|entry| unsafe { FlowRef::new(entry) })
}

/// A pending flow entry.
#[inline(always)]
pub fn pending<'a>(key: &FlowKey) -> Option<FlowRef<'a>> {
    if dry_run::is_on() {
        return dry_run::pending(key);
    }
    // SAFETY: as in `established`.
    maps::flows_pending.get_ptr_mut(key).map(|entry| unsafe { FlowRef::new(entry) })
}

/// Stores a pending entry.
#[inline(always)]
pub fn insert_pending(key: &FlowKey, value: &FlowValue, new_only: bool) -> bool {
    if dry_run::is_on() {
        return dry_run::insert_pending(key, value, new_only);
    }
    let flags = if new_only { BPF_NOEXIST } else { BPF_ANY };
    maps::flows_pending.insert(key, value, flags as u64).is_ok()
}

/// Copies a pending entry to the established ones.
#[inline(always)]
pub fn establish(key: &FlowKey, value: FlowRef<'_>) -> bool {
    if dry_run::is_on() {
        return dry_run::establish(key, value);
    }
    value.with(|value| maps::flows.insert(key, value, BPF_NOEXIST as u64).is_ok())
}

/// Removes an established entry.
#[inline(always)]
pub fn remove_established(key: &FlowKey) {
    if dry_run::is_on() {
        return dry_run::remove_established(key);
    }
    let _ = maps::flows.remove(key);
}

/// Removes a pending entry.
#[inline(always)]
pub fn remove_pending(key: &FlowKey) {
    if dry_run::is_on() {
        return dry_run::remove_pending(key);
    }
    let _ = maps::flows_pending.remove(key);
}
