//! `cargo xtask verify`: refuses panics and byte-wise copies in the BPF object, then has the agent's own loader bring every
//! program into the kernel, and prints what each costs. The loading is in `verify_load`, a program of its own, so that
//! the other commands build without the agent.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{
    build, lint, need, object_file, privilege,
    run::Cmd,
    toolchain::{self, Choice},
    workspace,
};

/// Checks, loads and prints every program; as root, or by sudo.
///
/// Errors: a panic path or a byte-wise copy in the object, a program the kernel refuses, or one above its limit.
pub fn run() -> Result<()> {
    need::ensure(&build::NEEDS)?;
    build::object(&toolchain::ensure(Choice::Auto)?)?;
    let object = workspace::bpf_object();
    let bytes = fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    lint::refuse("the BPF object", object_file::complaints(&bytes)?)?;

    privilege::ensure("cargo xtask lint")?;
    let build = ["build", "--package", "xtask", "--features", "loader", "--bin", "verify-load"];
    Cmd::new("cargo").args(build).dir(workspace::root()).run()?;
    let hint = "its message above names the program; the verifier's log says at which instruction";
    privilege::as_root(&workspace::target().join("debug/verify-load"), []).arg(&object).hint(hint).run()
}
