//! `cargo xtask bless`: the scenario tests write down what they now give instead of comparing.

use anyhow::Result;

use crate::test;

/// Tells the scenario tests to rewrite their expectations.
const BLESS: &str = "SHUNT_BLESS";

/// Arguments of `bless`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tests to bless: a suite, a package, a file of tests, or a part of the names of tests.
    #[arg(default_value = "scenarios")]
    name: String,
}

/// Rewrites the expectations. Errors: a test fails for another reason, or none has the name.
pub fn run(args: &Args) -> Result<()> {
    let name = Some(args.name.clone());
    test::run(&test::Args { name, env: vec![(BLESS, "1".into())], ..Default::default() })
}
