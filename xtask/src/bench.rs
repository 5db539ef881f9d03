//! `cargo xtask bench`: builds and runs the measurements of the package shunt-tests as root.

use anyhow::Result;

use crate::demo;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Arguments for the measurements themselves.
    #[arg(last = true)]
    args: Vec<String>,
}

/// Prints the measurements. Errors: they cannot be built, or one could not be taken.
pub fn run(args: &Args) -> Result<()> {
    demo::run_tests_binary("bench", &args.args)
}
