//! `cargo xtask ci`: all checks in order. A failed one does not keep the others from running.

use anyhow::Result;

use crate::{lint, test, verify};

/// Runs all checks; the last line printed holds the counts, in which a failed lint or verify counts as one failure.
///
/// Errors: one of them failed, which has been reported by then.
pub fn run() -> Result<()> {
    let mut failed_before = Vec::new();
    for (name, result) in [("cargo xtask lint", lint::run()), ("cargo xtask verify", verify::run())] {
        if let Err(error) = result {
            eprintln!("error: {name}: {error:#}");
            failed_before.push(name.to_owned());
        }
    }
    test::run(&test::Args { failed_before, ..Default::default() })
}
