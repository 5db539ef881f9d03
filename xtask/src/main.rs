//! Build, load, test, measure: all about this project that is not the product itself.
//!
//! One file per command. Each makes sure of what it needs (`need`, `toolchain`, `privilege`), shows every command it runs
//! (`run`), and names the one that failed. What is decided here is decided in pure functions; the product's code is not
//! used, so that everything here builds before it does; the one program that does use it, `verify_load`, is built apart.

mod bench;
mod bless;
mod build;
mod build_and_load;
mod cargo_test;
mod ci;
mod condense;
mod control_plane;
mod demo;
mod image;
mod leftover;
mod libtest;
mod lint;
mod machine;
mod namespace;
mod need;
mod object_file;
mod oci;
mod privilege;
mod run;
mod setup;
mod source_rule;
mod test;
mod toolchain;
mod verify;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// Build, load, test and measure Shunt.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 120)]
enum Command {
    /// Install what the other commands need, or say what to type.
    Setup(setup::Args),
    /// Build the BPF object, then target/release/shunt, which carries it.
    Build(build::Args),
    /// Build, run the agent, and say afterwards what stays pinned and how to remove it.
    BuildAndLoad(build_and_load::Args),
    /// Build the container image, without a container engine: target/image-layout, an OCI layout.
    Image(image::Args),
    /// Show it working in throwaway network namespaces.
    Demo(demo::Args),
    /// Run the tests: all (root or sudo), --unit (no privilege), or by name.
    Test(test::Args),
    /// Check format, clippy, where unsafe code lives, and links, on the host's and the eBPF crate.
    Lint,
    /// Load every program and print its instruction counts; refuse panics and byte-wise copies.
    Verify,
    /// Rewrite the expectations of the scenario tests with what they now give; the diff is the review.
    Bless(bless::Args),
    /// Measure, as ratios in one run.
    Bench(bench::Args),
    /// Lint, verify and test, in this order; all of them, whatever fails.
    Ci,
}

/// A failure that has been told to the user already.
#[derive(Debug)]
struct Reported;

impl std::fmt::Display for Reported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failed as reported above")
    }
}

impl std::error::Error for Reported {}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Setup(args) => setup::run(&args),
        Command::Build(args) => build::run(&args),
        Command::BuildAndLoad(args) => build_and_load::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Lint => lint::run(),
        Command::Verify => verify::run(),
        Command::Bless(args) => bless::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Ci => ci::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.is::<Reported>() {
                eprintln!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
