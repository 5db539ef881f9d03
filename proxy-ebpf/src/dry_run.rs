//! A dry run: the programs, loaded once more over the same tables, that change none of them (`shunt explain`).
//!
//! Flows that they would make, change or end stay in two tables of their own in front of the real ones: what is looked up in
//! those is copied first, what is removed is marked. So a dry run sees what it did itself, over all the hooks on a packet's
//! way. Everything else that it would write it leaves out; counters and rooms belong to each load of the programs anyway.
//!
//! Whether this is a dry run is a constant to the verifier: of the programs that serve, it cuts all of this out.

use crate::maps;
use aya_ebpf::bindings::BPF_ANY;
use proxy_common::abi::flow::{FlowKey, FlowRef, FlowValue};

/// Set at load. 0: the programs serve.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.cfg")]
static DRY_RUN: aya_ebpf::Global<u32> = aya_ebpf::Global::new(0);

/// True in programs that change nothing.
#[inline(always)]
pub fn is_on() -> bool {
    DRY_RUN.load() != 0
}

/// As `tables::established`.
#[inline(always)]
pub fn established<'a>(key: &FlowKey) -> Option<FlowRef<'a>> {
    entry(copy_established(key))
}

/// As `tables::pending`.
#[inline(always)]
pub fn pending<'a>(key: &FlowKey) -> Option<FlowRef<'a>> {
    entry(copy_pending(key))
}

#[inline(always)]
fn entry<'a>(copy: *mut FlowValue) -> Option<FlowRef<'a>> {
    if copy.is_null() {
        return None;
    }
    // SAFETY: a map element, valid until the program ends.
    let (gone, entry) = unsafe { ((*copy).has(FlowValue::GONE), FlowRef::new(copy)) };
    if gone { None } else { Some(entry) }
}

// Functions of their own in the object: their callers' frames stay as they are.

#[inline(never)]
fn copy_established(key: &FlowKey) -> *mut FlowValue {
    if let Some(copy) = maps::dry_flows.get_ptr_mut(key) {
        return copy;
    }
    let Some(real) = maps::flows.get_ptr(key) else { return core::ptr::null_mut() };
    // SAFETY: a map element, valid until the program ends.
    let real = unsafe { &*real };
    let _ = maps::dry_flows.insert(key, real, BPF_ANY as u64);
    maps::dry_flows.get_ptr_mut(key).unwrap_or(core::ptr::null_mut())
}

#[inline(never)]
fn copy_pending(key: &FlowKey) -> *mut FlowValue {
    if let Some(copy) = maps::dry_flows_pending.get_ptr_mut(key) {
        return copy;
    }
    let Some(real) = maps::flows_pending.get_ptr(key) else { return core::ptr::null_mut() };
    // SAFETY: a map element, valid until the program ends.
    let real = unsafe { &*real };
    let _ = maps::dry_flows_pending.insert(key, real, BPF_ANY as u64);
    maps::dry_flows_pending.get_ptr_mut(key).unwrap_or(core::ptr::null_mut())
}

/// As `tables::insert_pending`.
#[inline(always)]
pub fn insert_pending(key: &FlowKey, value: &FlowValue, new_only: bool) -> bool {
    if new_only && pending(key).is_some() {
        return false;
    }
    maps::dry_flows_pending.insert(key, value, BPF_ANY as u64).is_ok()
}

/// As `tables::establish`.
#[inline(always)]
pub fn establish(key: &FlowKey, value: FlowRef<'_>) -> bool {
    established(key).is_none() && value.with(|value| maps::dry_flows.insert(key, value, BPF_ANY as u64).is_ok())
}

/// As `Flows::remove_established`.
#[inline(always)]
pub fn remove_established(key: &FlowKey) {
    mark_gone(copy_established(key));
}

/// As `Flows::remove_pending`.
#[inline(always)]
pub fn remove_pending(key: &FlowKey) {
    mark_gone(copy_pending(key));
}

#[inline(always)]
fn mark_gone(copy: *mut FlowValue) {
    if !copy.is_null() {
        // SAFETY: a map element, valid until the program ends; only this run uses it.
        unsafe { (*copy).flags = FlowValue::GONE };
    }
}
