//! The Shunt agent: sources to model to planner to reconciler to kernel, one direction.
//!
//! ```text
//!  sources ──▶ model ──▶ planner ──▶ reconciler ──▶ kernel
//!  kubernetes    │        pure        only writer      maps, programs, links (all pinned)
//!  manifests     ├──▶ cli, metrics
//! ```
pub mod datapath;
pub mod model;
pub mod planner;
pub mod source;
