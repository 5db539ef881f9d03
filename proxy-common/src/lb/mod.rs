//! Every decision of the datapath, on values: no packet is touched here, no clock read.
//!
//! | module | decides |
//! |---|---|
//! | [`pick`] | frontend, set, affinity, backend; shared by sockets and packets |
//! | [`socket`] | what becomes of a connect or a datagram of a process |
//! | [`packet`] | what becomes of a packet at ingress and at egress; opens, promotes and ends flows |
//! | [`rewrite`] | the bytes and checksums that a decision changes |
//! | [`flow`] | the life of a flow: states, proof of the return path, lifetimes |
//! | [`select`] | the keyed hash and the slot |
//! | [`tuple`] | the connection, and the keys of its entries |

pub mod flow;
pub mod packet;
pub mod pick;
pub mod rewrite;
pub mod select;
pub mod socket;
pub mod tuple;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod world;
