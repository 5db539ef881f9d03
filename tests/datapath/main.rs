//! The agent's side of the datapath on a real kernel: tables, adoption, attachments, lifetime, cleanup.
//!
//! ```text
//!   [ node: veth "eth0" (10.244.1.1, fd00:1::1) ── "peer", devices as tests make them ]   no route out
//! ```
//! One namespace, one control group and one BPF file system a test. What packets look like is the business of other suites.

mod cleanup;
mod clsact;
mod command;
mod devices;
mod doctor;
mod install;
mod lifetime;
mod node;
mod other_proxies;
mod overlap;
mod predecessor;
mod reserve;
mod tables;
mod takeover;
mod tamper;
mod trouble;
mod xdp;
