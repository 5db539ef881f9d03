//! From desired state to the exact changes of the tables: pure functions of values.
//!
//! | module | holds |
//! |---|---|
//! | [`key`] | what frontends, backends and service ports are known by |
//! | [`node`] | this node as planning needs it: zone, addresses, which of them answer NodePorts, prefixes |
//! | `endpoints` | endpoint selection: policies, readiness, hints (kube-proxy's rules) |
//! | [`service`] | [`plan_service`]: one service, its endpoints, this node: what should be programmed |
//! | [`health_check`] | what load balancers are told of services, by healthCheckNodePort |
//! | [`ids`] | allocators of ids and slot ranges |
//! | `backends` | backends by id and by address |
//! | `claims` | who owns a frontend that several services claim |
//! | [`usage`] | what addresses and ports are used for, counted over all users |
//! | [`state`] | everything that is programmed: restored from the tables, advanced from snapshot to snapshot |
//! | [`stale`] | connections whose endpoint is gone |
//! | `restore` | the state that the tables show |
//! | `work` | one step under way |
//! | [`plan`] | [`Plan`]: the changes |
//! | [`tables`] | [`Tables`]: all entries of the maps, and what a change does to them |
//! | [`audit`] | what the tables say if nobody else writes them |
//! | `text` | the text form of plans and tables |
//! | [`problem`] | what a service asks for that cannot be done |
//!
//! What always holds:
//! - No I/O, no clock, no randomness, neither tokio nor aya: the same state and snapshot give the same plan.
//! - Work follows the change: snapshots share what is equal, and only services that differ are planned again.
//! - A plan leaves nothing to choose. Applying its changes in order, no frontend that had backends before and has some
//!   after is ever without one between, and no slot of a published range belongs to another service or names a backend
//!   that is not written.
//! - Planning everything from nothing leads to the same tables as any sequence of changes (but for ids and positions,
//!   and for addresses that linger because flows may still use them).

pub mod audit;
mod backends;
mod claims;
mod endpoints;
pub mod health_check;
pub mod ids;
pub mod key;
pub mod node;
pub mod plan;
pub mod problem;
mod restore;
pub mod service;
pub mod stale;
pub mod state;
pub mod tables;
mod text;
pub mod usage;
mod work;

#[cfg(test)]
mod tests;

pub use audit::{Place, Stated};
pub use health_check::{HealthCheck, HealthChecks};
pub use ids::{BackendId, Epoch, Limits, ServiceId};
pub use key::{BackendAddr, FrontendAddr, PortName};
pub use node::NodeView;
pub use plan::{Cidrs, Group, Op, Plan, Stage, Subject};
pub use problem::Problem;
pub use service::{FrontendKind, Layout, PlannedBackend, PlannedFrontend, PortPlan, ServicePlan, plan_service};
pub use stale::{Link, Lost, Standing};
pub use state::State;
pub use tables::{Tables, is_class};
pub use usage::SnatPorts;
