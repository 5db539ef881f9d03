//! The real tcx and XDP programs on made packets, one hook at a time (`BPF_PROG_TEST_RUN`), against the reference NAT.
//!
//! ```text
//!   client ── eth0 [ node: ingress, egress of each device ] veth-1-1 ── pod (10.244.1.0/24)
//!             192.0.2.10                                    remote backends lie behind eth0
//! ```
//! Nothing is attached and nothing is sent: a packet is given to a program, what comes out is compared byte by byte with
//! what [`shunt_tests::nat`] says, and is then given to the next hook that the node's stack would bring it to.

mod datapath;
mod lab;
mod tables;
mod world;

mod bridge;
mod clash;
mod errors;
mod flood;
mod forward;
mod fragments;
mod life;
mod refusals;
mod snat;
mod untouched;
mod walk;
mod xdp;
