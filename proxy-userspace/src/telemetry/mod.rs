//! What the agent tells about itself: logs here, its status in [`admin`], metrics.
//!
//! | module | holds |
//! |---|---|
//! | [`admin`] | the admin socket |
//! | [`event`] | Kubernetes events |
//! | [`http`] | small HTTP listeners |
//! | [`kube_proxy`] | what tools ask on kube-proxy's metrics address |
//! | [`metrics`] | the registry as text |
//! | [`page`] | a page for people |
//! | [`process`] | this process as metrics |
//! | [`source`] | how each source stands |
//! | [`status`] | what reconciler and sources report, as metrics |

pub mod admin;
pub mod event;
pub mod http;
pub mod kube_proxy;
pub mod metrics;
pub mod page;
pub mod process;
pub mod source;
pub mod status;

use std::io::{IsTerminal as _, stderr};

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt};

use crate::config::Log;
use crate::config::raw::LogFormat;

/// Sends the log of the whole process to standard error. To be called once; a later call does nothing.
pub fn init_log(log: &Log) {
    // The configuration has been checked.
    let filter: Targets = log.level.parse().unwrap_or_default();
    let filter = quiet_libraries(filter);
    let layer = match log.format {
        LogFormat::Text => {
            fmt::layer().with_writer(stderr).with_ansi(stderr().is_terminal()).with_target(false).boxed()
        }
        LogFormat::Json => fmt::layer().with_writer(stderr).json().flatten_event(true).boxed(),
    };
    // An error says that a log is set up already.
    let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
}

/// Libraries that describe each of their steps tell warnings only, unless they are named.
fn quiet_libraries(filter: Targets) -> Targets {
    const LIBRARIES: [&str; 4] = ["aya", "aya_obj", "netlink_proto", "netlink_packet_route"];
    let is_named = |name: &str| filter.iter().any(|(target, _)| target == name);
    let quiet: Vec<_> = LIBRARIES.into_iter().filter(|name| !is_named(name)).collect();
    filter.with_targets(quiet.into_iter().map(|name| (name, tracing::Level::WARN)))
}
