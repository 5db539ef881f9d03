//! The kernel half of Shunt: one object with a program per hook.
//!
//! A hook builds its context, asks `proxy-common` what to do, and does it. Nothing is decided here.
//!
//! | module | holds |
//! |---|---|
//! | [`maps`] | every map, with its size and the reason for it |
//! | [`packet`], [`frame`] | the packet of a TC and of an XDP program: the only raw packet pointers of the project |
//! | [`tables`] | `proxy-common`'s look-ups over the maps |
//! | [`kernel`] | what only the kernel can tell: routes, neighbours, sockets, connection tracking |
//! | [`dry_run`] | the programs as `shunt explain` runs them: nothing is changed |
//! | [`events`] | what happens, while somebody watches |
//! | [`answer`] | resets and unreachables |
//! | [`hooks`] | the programs |
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod answer;
mod counter;
mod dry_run;
mod events;
mod frame;
mod hooks;
mod kernel;
mod maps;
mod packet;
mod tables;

/// Kernel helpers and functions that look at connections ask for a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// No program may reach it: `cargo xtask verify` fails on any panic path.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
