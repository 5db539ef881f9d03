//! `cargo xtask demo`: builds and runs the demo of the package shunt-tests as root, in namespaces that it makes itself.

use anyhow::{Context as _, Result};

use crate::{build, cargo_test::Names, privilege, run::Cmd, test, workspace};

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Arguments for the demo itself.
    #[arg(last = true)]
    args: Vec<String>,
}

/// Shows the demo. Errors: it cannot be built, or something in it did not hold.
pub fn run(args: &Args) -> Result<()> {
    run_tests_binary("demo", &args.args, vec![])
}

/// Builds the agent and the package shunt-tests, and runs the latter's program `tests/src/bin/SOURCE.rs` as root, with `env`
/// beside the variables that suites get.
pub fn run_tests_binary(source: &str, args: &[String], env: Vec<(&'static str, String)>) -> Result<()> {
    test::ensure_suites_can_run()?;
    build::run(&build::Args::default())?;
    let missing = || format!("there is no tests/src/bin/{source}.rs yet");
    let name = Names::look()?.program(source).with_context(missing)?;
    // All its programs: servers and clients of the harness lie beside the one that starts them.
    Cmd::new("cargo")
        .args(["build", "--release", "--package", "shunt-tests", "--bins"])
        .dir(workspace::root())
        .run()?;
    privilege::as_root(&workspace::target().join("release").join(name), test::suite_vars().into_iter().chain(env))
        .args(args)
        .run()
}
