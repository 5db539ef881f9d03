//! `cargo xtask setup`: installs what the other commands need. Each of them does so for itself too; this one asks at once.

use anyhow::Result;

use crate::{
    build, lint,
    need::{self, Need},
    run, test,
    toolchain::{self, Choice},
};

/// Arguments of `setup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The compiler for the eBPF crate.
    #[arg(long, value_enum, default_value_t)]
    toolchain: Choice,
}

/// Everything that can be installed is there.
pub fn run(args: &Args) -> Result<()> {
    let of_suites = test::NEEDS_OF_SUITES.map(|(_, need)| need);
    let needs: Vec<Need> = [&build::NEEDS[..], &test::NEEDS, &of_suites, &lint::NEEDS].concat();
    need::ensure(&needs)?;
    let toolchain = toolchain::ensure(args.toolchain)?;
    run::say(&format!(
        "ready; the eBPF crate is built by {:?}, linked by {}",
        toolchain.compiler,
        toolchain.linker.display()
    ));
    Ok(())
}
