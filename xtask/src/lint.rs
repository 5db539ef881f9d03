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

/// Everything holds when this returns. Errors: the first check that does not.
pub fn run() -> Result<()> {
    need::ensure(&NEEDS)?;
    let toolchain = toolchain::ensure(Choice::Auto)?;
    let format = "`cargo fmt --all` and `cargo fmt --manifest-path proxy-ebpf/Cargo.toml` put it right";
    cargo(["fmt", "--all", "--check"]).hint(format).run()?;
    cargo(["fmt", "--manifest-path", "proxy-ebpf/Cargo.toml", "--check"]).hint(format).run()?;
    refuse("source rules", source_rule::breaches(&workspace::root())?)?;

    // The agent's crate embeds the object, so it comes before clippy.
    build::object(&toolchain)?;
    let object = std::fs::read(workspace::bpf_object()).context("cannot read the BPF object")?;
    refuse("the BPF object", object_file::complaints(&object)?)?;
    toolchain.lint()?.hint("the compiler's message above says why").run()?;
    cargo(["clippy", "--workspace", "--all-targets", "--features", "xtask/loader", "--", "-D", "warnings"]).run()?;
    run::say("lint: all well");
    Ok(())
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
