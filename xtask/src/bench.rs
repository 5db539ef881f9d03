//! `cargo xtask bench`: builds and runs the measurements of the package shunt-tests as root.

use anyhow::Result;

use crate::{
    control_plane::{self, Availability},
    demo,
    run::say,
};

/// The group of measurements that wants the real Kubernetes control plane.
const WITH_CONTROL_PLANE: &str = "rivals";
/// The other ones.
const WITHOUT: [&str; 3] = ["path", "program", "control"];

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Arguments for the measurements themselves.
    #[arg(last = true)]
    args: Vec<String>,
}

/// Prints the measurements. Errors: they cannot be built, or one could not be taken.
pub fn run(args: &Args) -> Result<()> {
    let mut env = Vec::new();
    if wants_control_plane(&args.args) {
        match control_plane::ensure()? {
            Availability::Ready { bin_dir } => env.push(("SHUNT_CONTROL_PLANE_BIN", bin_dir.display().to_string())),
            // The table says that it was not measured.
            Availability::Missing { why } => say(&why),
        }
    }
    demo::run_tests_binary("bench", &args.args, env)
}

/// True if the group is named, or no group is and help is not asked for.
fn wants_control_plane(words: &[String]) -> bool {
    let has = |names: &[&str]| words.iter().any(|word| names.contains(&word.as_str()));
    has(&[WITH_CONTROL_PLANE]) || !(has(&WITHOUT) || has(&["--help", "-h"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_plane_is_built_for_its_group_and_for_all() {
        let wants =
            |words: &[&str]| wants_control_plane(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        assert!(wants(&[]) && wants(&["--rounds", "3"]) && wants(&["path", "rivals"]));
        assert!(!wants(&["path"]) && !wants(&["--help"]));
    }
}
