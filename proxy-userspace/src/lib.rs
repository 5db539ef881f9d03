//! The Shunt agent: sources to model to planner to reconciler to kernel, one direction.
//!
//! ```text
//!  sources ──▶ model ──▶ planner ──▶ reconciler ──▶ kernel
//!  kubernetes    │        pure        only writer      maps, programs, links (all pinned)
//!  manifests     ├──▶ cli, metrics
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`source`] | from a foreign API to model types |
//! | [`model`] | desired state as immutable snapshots |
//! | [`planner`] | snapshots to exact changes; pure |
//! | [`datapath`] | the kernel's tables, programs and attachments |
//! | [`config`] | flags and the configuration file, as written and as used |
//! | [`cli`] | the subcommands of `shunt` |
//! | [`doctor`] | what shunt needs of a node, checked |
//! | [`telemetry`] | logs, metrics, the admin socket |
//! | [`health`] | what load balancers and kubelets ask, of the node and of single services |
//! | [`daemon`] | builds the parts of the agent and runs them |
//! | [`drain`] | the wish that the agent ends |
//! | [`error`] | errors as text |
//!
//! What always holds: desired state moves right, only status moves left; the reconciler is the only writer of the tables
//! (where no agent runs, `shunt cleanup --drain` may take frontends out of them);
//! unsafe code lives in `datapath` alone; the datapath works on without this process.

pub mod cli;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod doctor;
pub mod drain;
pub mod error;
pub mod health;
pub mod model;
pub mod planner;
pub mod source;
pub mod telemetry;
