//! The same objects and the same clients, once with the real kube-proxy (mode nftables) on the nodes and once with Shunt:
//! every difference is listed, with its reason, in `reach.md`, `life.md` and `serving.md`; one that is not listed fails, and
//! so does a listed one that is no more.
//!
//! ```text
//!                        ┌── net ──┬── client                       the same once more, same names and addresses,
//!  control: etcd,        │         ├── node-1: kube-proxy, pods     with agents in the place of kube-proxy
//!  kube-apiserver, ──────┤         └── node-2: kube-proxy, pods
//!  controllers           └── net ── ...
//! ```
//! EndpointSlices are written by the tests. Neither side is looked into: what counts is who answers, whom the server saw,
//! and how a client is refused.

mod client;
mod difference;
#[expect(dead_code, reason = "the suite `serving`, whose module it is, asks in more ways")]
#[path = "../serving/http.rs"]
mod http;
mod life;
mod offer;
mod pair;
mod reach;
mod serving;
mod survey;
