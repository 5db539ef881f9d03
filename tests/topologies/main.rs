//! The packet path and the socket path end to end: real agents, real traffic, clusters as CNIs build them.
//!
//! | module | claims |
//! |---|---|
//! | [`reach`] | every client reaches every kind of frontend, by the path it should, and with the source it should |
//! | [`three`] | the client on one node, the NodePort on another, the backend on a third |
//! | [`bulk`] | large transfers, with offloads and without, and where a link is narrower than both ends believe |
//! | [`fragment`] | datagrams larger than a link |
//! | [`ports`] | one client port to two services and to their pod |
//! | [`hairpin`] | a pod that is its own backend |
//! | [`source`] | what backends see as their client; traffic policies |
//! | [`refusal`] | who is refused, who is dropped, and what counts it |
//! | [`change`] | endpoints and frontends that come and go under traffic |
//! | [`layout`] | tables of another version, of other sizes, under traffic |
//! | [`handover`] | a successor takes over: connections end in their own time, new ones are its own |
//! | [`explain`] | explanations come true and change nothing; what happens is told to who watches |
//! | [`lifetime`] | agents that die and are replaced every second, under load |
//! | [`flood`] | a million forged SYNs beside live connections |
//! | [`xdp`] | the same with XDP on the uplink |
//!
//! [`rig`] builds what they share; [`talk`] holds conversations open. Topologies are drawn in `shunt_tests::topology`.

mod bulk;
mod change;
mod explain;
mod flood;
mod fragment;
mod hairpin;
mod handover;
mod layout;
mod lifetime;
mod ports;
mod reach;
mod refusal;
mod rig;
mod source;
mod talk;
mod three;
mod xdp;
