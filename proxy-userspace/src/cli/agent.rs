//! `shunt agent`.

use anyhow::Result;

use crate::config::Loaded;
use crate::config::setting::AgentArgs;
use crate::{daemon, telemetry};

/// Runs the agent until it is told to stop.
pub(super) fn run(args: AgentArgs) -> Result<()> {
    let Loaded { config, notes } = Loaded::load(args)?;
    telemetry::init_log(&config.log);
    notes.log();
    daemon::run(config)
}
