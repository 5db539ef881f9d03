//! `cargo xtask lint`: format, clippy, and the rules of `source_rule` and `object_file`, for the host's crates and the eBPF
//! crate, each by its own compiler.

use anyhow::{Context as _, Result, bail};

use crate::{
    build,
    need::{self, Need},
    object_file,
    run::{self, Cmd},
    source_rule,
    toolchain::{self, Choice},
    workspace,
};

/// What the checks run.
pub const NEEDS: [Need; 3] = [
    Need::Program("cc", "gcc libc6-dev"),
    Need::Component("cargo-fmt", "rustfmt"),
    Need::Component("cargo-clippy", "clippy"),
];

/// Everything holds when this returns. Errors: the checks that do not; each has said why by then.
pub fn run() -> Result<()> {
    need::ensure(&NEEDS)?;
    let toolchain = toolchain::ensure(Choice::Auto)?;
    let mut failed = Vec::new();
    let mut check = |name: &str, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("error: {error:#}");
            failed.push(name.to_owned());
        }
    };
    let format = "`cargo fmt --all` and `cargo fmt --manifest-path proxy-ebpf/Cargo.toml` put it right";
    let ebpf = "proxy-ebpf/Cargo.toml";
    check("format", cargo(["fmt", "--all", "--check", "--", "-l"]).hint(format).run());
    check("format of proxy-ebpf", cargo(["fmt", "--manifest-path", ebpf, "--check", "--", "-l"]).hint(format).run());
    check("source rules", source_rule::breaches(&workspace::root()).and_then(|found| refuse("source rules", found)));
    // The agent's crate embeds the object, so it comes before clippy.
    check("the BPF object", build::object(&toolchain).and_then(|()| check_object()));
    check("clippy on proxy-ebpf", toolchain.lint()?.run());
    // The feature, so that all of xtask is looked at.
    let features = ["--workspace", "--all-targets", "--features", "xtask/loader"];
    let clippy = cargo(["clippy"]).args(features).args(["--", "-D", "warnings"]);
    check("clippy", clippy.run());
    refuse("lint failed", failed)?;
    run::say("lint: all well");
    Ok(())
}

fn check_object() -> Result<()> {
    let object = std::fs::read(workspace::bpf_object()).context("cannot read the BPF object")?;
    refuse("the BPF object", object_file::complaints(&object)?)
}

fn cargo<const N: usize>(args: [&str; N]) -> Cmd {
    Cmd::new("cargo").args(args).dir(workspace::root())
}

/// Fails with all findings of a check, if there are any.
pub fn refuse(what: &str, findings: impl IntoIterator<Item = String>) -> Result<()> {
    let findings: Vec<_> = findings.into_iter().collect();
    if !findings.is_empty() {
        bail!("{what}:\n  {}", findings.join("\n  "));
    }
    Ok(())
}
