//! `shunt agent`.

use anyhow::Result;

use crate::config::Config;
use crate::config::raw::AgentFlags;
use crate::{daemon, telemetry};

/// Runs the agent until it is told to stop.
pub(super) fn run(flags: AgentFlags) -> Result<()> {
    let config = Config::new(flags)?;
    telemetry::init_log(&config.log);
    daemon::run(config)
}
