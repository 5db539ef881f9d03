//! The socket path end to end: manifests in, an agent on a node, and what the processes of the node and of its pods see
//! when they dial a frontend.
//!
//! ```text
//!   node-1 (the agent; its control group is hooked) ──┬── pod-1-1   serves, and dials
//!          dials                                      ├── pod-1-2   serves
//!                                                     └── pod-1-3   serves
//!   node-2 (no agent), where a test says so ──────────── pod-2-1 …
//! ```
//!
//! | module | claims |
//! |---|---|
//! | [`reach`] | every kind of socket reaches every kind of frontend, and sees what it dialled |
//! | [`datagrams`] | UDP sockets that are not connected, or connected anew |
//! | [`refuse`] | what is refused, and how |
//! | [`node_port`] | NodePorts, loopback, bound ports: what is left alone |
//! | [`policy`] | affinity and traffic policy |
//! | [`change`] | endpoints come and go under load; bad manifests |
//! | [`stale`] | sockets whose endpoint is gone are closed, and no others |
//!
//! [`rig`] builds what the tests share.

mod change;
mod datagrams;
mod node_port;
mod policy;
mod reach;
mod refuse;
mod rig;
mod stale;
