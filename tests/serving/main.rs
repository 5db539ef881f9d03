//! What the agent tells over HTTP: health, readiness, metrics, its configuration. The requests come from where they come from in life: a load
//! balancer outside asks for health, a scraper on the node for metrics.
//!
//! ```text
//!   client ── net ── node-1: agent ──┬── pod-1-1: server
//!   (/healthz)      (/metrics on lo) └── pod-1-2: client of services
//! ```

mod http;
mod lease;
mod samples;

mod config;
mod dashboard;
mod family;
mod health;
mod metrics;
mod node_port;
mod page;
