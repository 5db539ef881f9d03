//! Root: whether we have it, how to get it for one program. Never raises our own privilege.

use std::path::Path;

use anyhow::{Result, bail};

use crate::run::{self, Cmd};

/// Programs can be run as root when this returns.
///
/// Errors: neither root nor sudo; `instead` names what works without.
pub fn ensure(instead: &str) -> Result<()> {
    if nix::unistd::geteuid().is_root() || run::find_program("sudo").is_some() {
        return Ok(());
    }
    bail!("this needs root, and there is no sudo: run it as root, or what works without: `{instead}`")
}

/// A command for `program` that runs as root with our environment and `env` on top.
pub fn as_root(program: &Path, env: impl IntoIterator<Item = (&'static str, String)>) -> Cmd {
    if nix::unistd::geteuid().is_root() {
        let cmd = Cmd::new(program).env_quietly("PATH", run::search_path());
        return env.into_iter().fold(cmd, |cmd, (name, value)| cmd.env(name, value));
    }
    // sudo may be set up to replace PATH and to drop variables, -E notwithstanding: env puts them back.
    let vars = env.into_iter().map(|(name, value)| format!("{name}={value}"));
    let path = format!("PATH={}", run::search_path().to_string_lossy());
    Cmd::new("sudo").args(["-E", "env", &path]).args(vars).arg(program)
}
