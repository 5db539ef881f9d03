//! What both halves of Shunt share: the layout of every table, the parsing of packets, and every decision the
//! datapath takes, as functions of values.
//!
//! | module | holds |
//! |---|---|
//! | [`addr`] | addresses, ports, protocols: the only byte-order conversions |
//! | [`abi`] | keys and values of the BPF maps |
//! | [`wire`] | headers from bytes, checksum arithmetic |
//! | [`lb`] | tuple to decision: selection, flows, socket and packet hooks |
//! | [`tables`] | the look-ups and writes that `lb` needs, as a trait |
//! | [`verdict`] | what a hook may do with a packet, and why it was dropped |
//!
//! The kernel half implements [`tables::Tables`] over BPF maps and [`wire::Packet`] over its contexts; tests do so over
//! hash maps and byte slices. So each decision is made by one piece of code, in the kernel and in a host test alike.
//!
//! May touch: `core` only. No allocation, no clock (time is an argument), no randomness (keys come from the
//! configuration table), no I/O. Unsafe code lives in `abi` alone.
#![no_std]
#![deny(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod abi;
pub mod addr;
pub mod continuation;
pub mod lb;
pub mod tables;
pub mod verdict;
pub mod wire;
