//! `cargo xtask demo`: builds and runs the demo of the package shunt-tests as root, in namespaces that it makes itself.

use anyhow::Result;

use crate::{build, need, privilege, run::Cmd, test, workspace};

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Arguments for the demo itself.
    #[arg(last = true)]
    args: Vec<String>,
}

/// Shows the demo. Errors: it cannot be built, or something in it did not hold.
pub fn run(args: &Args) -> Result<()> {
    run_tests_binary("demo", &args.args)
}

/// Builds the agent and a program of the package shunt-tests, and runs that as root.
pub fn run_tests_binary(name: &str, args: &[String]) -> Result<()> {
    privilege::ensure("cargo xtask test --unit")?;
    need::ensure(&test::NEEDS)?;
    build::run(&build::Args::default())?;
    let build = Cmd::new("cargo").args(["build", "--release", "--package", "shunt-tests", "--bin", name]);
    build.dir(workspace::root()).run()?;
    privilege::as_root(&workspace::target().join("release").join(name), test::suite_vars()).args(args).run()
}
