//! The compilers that can build the eBPF crate, the linker they need, and the flags both are given. Everything
//! particular to them is here; what is built with them is not.
//!
//! Two are known. *Nightly*: rustup's nightly with the component rust-src, which compiles `core` for the target on the
//! way (`-Z build-std`). *Debian*: the package rustc-web with `core` for the target ready-made, a stable compiler told to
//! accept unstable features. bpf-linker reads the compilers' LLVM bitcode, so it must be built against an LLVM that is
//! not older than theirs.

mod found;
mod plan;

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

use self::{
    found::Found,
    plan::{Offers, Plan, plan},
};
use crate::{
    need::{self, Host, Need},
    run::{self, Cmd},
    workspace,
};

/// The target's name.
pub const TARGET: &str = "bpfel-unknown-none";

const LINKER_VERSION: &str = "0.13.0";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// Nightly with rust-src where it is there, else Debian's.
    #[default]
    Auto,
    /// rustup's nightly with the component rust-src.
    Nightly,
    /// Debian's package rustc-web.
    Debian,
}

/// A compiler that can build the eBPF crate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// One of rustup's nightlies, by its name.
    Nightly(String),
    /// Debian's rustc-web.
    Debian,
}

/// A compiler and a linker that fit each other.
#[derive(Debug)]
pub struct Toolchain {
    /// The compiler.
    pub compiler: Compiler,
    /// bpf-linker.
    pub linker: PathBuf,
}

impl Toolchain {
    /// `cargo SUBCOMMAND` in the eBPF crate, for its target, with its flags and without the outer cargo's variables.
    pub fn cargo(&self, subcommand: &str) -> Cmd {
        let cmd = match &self.compiler {
            Compiler::Nightly(name) => Cmd::new("rustup").args(["run", name, "cargo", subcommand, "-Zbuild-std=core"]),
            // What is called through cargo is looked for in the user's directories first, and would be rustup's.
            Compiler::Debian if subcommand == "clippy" => {
                Cmd::new(DEBIAN_CLIPPY).arg(subcommand).env("CARGO", DEBIAN_CARGO)
            }
            Compiler::Debian => Cmd::new(DEBIAN_CARGO).arg(subcommand),
        };
        self.with_flags(cmd)
    }

    fn with_flags(&self, cmd: Cmd) -> Cmd {
        let cmd = cmd.args(["--release", "--target", TARGET, "--target-dir"]).arg(workspace::bpf_target());
        let scrubbed = env::vars_os().map(|(name, _)| name).filter(|name| is_scrubbed(&name.to_string_lossy()));
        let cmd =
            scrubbed.fold(cmd, Cmd::env_remove).dir(workspace::bpf_crate()).env_quietly("PATH", run::search_path());
        let cmd = cmd.env_quietly("LD_LIBRARY_PATH", library_path(&env::var("LD_LIBRARY_PATH").unwrap_or_default()));
        let cmd = cmd.env("RUSTFLAGS", rustflags(env::consts::ARCH).join(" "));
        match &self.compiler {
            Compiler::Nightly(_) => cmd,
            Compiler::Debian => cmd.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1"),
        }
    }

    /// Clippy on the eBPF crate, or the compiler's own warnings where this compiler's clippy cannot be had; no warning passes.
    ///
    /// Errors: clippy could be installed, but that failed.
    pub fn lint(&self) -> Result<Cmd> {
        if self.has_clippy()? {
            return Ok(self.cargo("clippy").args(["--", "-D", "warnings"]));
        }
        run::say("this compiler has no clippy here: the eBPF crate is only checked");
        Ok(self.cargo("check"))
    }

    fn has_clippy(&self) -> Result<bool> {
        let host = Host::look();
        match &self.compiler {
            Compiler::Nightly(name) => {
                Ok(Cmd::new("rustup").args(["run", name, "cargo", "clippy", "--version"]).succeeds())
            }
            Compiler::Debian if host.is_root && host.has_apt => {
                need::ensure(&[Need::File(DEBIAN_CLIPPY.into(), "rust-web-clippy".into())]).map(|()| true)
            }
            Compiler::Debian => Ok(Path::new(DEBIAN_CLIPPY).exists()),
        }
    }
}

/// The compiler's flags for BPF on a host of architecture `arch`.
///
/// Measured: without target-cpu v3 and with the linker's in-order expansion every zeroed or copied struct becomes a call
/// of a byte loop, 15 % per packet and twice the verified instructions.
fn rustflags(arch: &str) -> Vec<String> {
    vec![
        "-Clinker=bpf-linker".into(),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        "-Ctarget-cpu=v3".into(),
        "-Clink-arg=--disable-expand-memcpy-in-order".into(),
        format!("--cfg=bpf_target_arch=\"{arch}\""),
    ]
}

/// Whether the outer cargo's or rustup's variable must not reach the inner build; what configures network and output stays.
fn is_scrubbed(name: &str) -> bool {
    let kept = ["CARGO_HOME", "RUST_BACKTRACE"].contains(&name)
        || ["CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_"]
            .iter()
            .any(|p| name.starts_with(p))
        || (name.starts_with("RUSTUP_") && name != "RUSTUP_TOOLCHAIN");
    (name.starts_with("CARGO") || name.starts_with("RUST")) && !kept
}

/// The library path without what the outer cargo put there: its compiler's LLVM must not be taken for the linker's.
fn library_path(path: &str) -> String {
    let is_cargos = |dir: &&str| dir.contains("/toolchains/") || dir.contains("/target/");
    path.split(':').filter(|dir| !is_cargos(dir)).collect::<Vec<_>>().join(":")
}

/// A compiler and a linker that fit each other, installed now if they were missing.
///
/// Errors: they cannot be installed; the text says what to type.
pub fn ensure(choice: Choice) -> Result<Toolchain> {
    // Anything has at most to be installed twice: a compiler, then a linker for it.
    for _ in 0..3 {
        let found = found::look();
        let linker = found.linker.as_ref().map(|linker| linker.path.clone());
        match (plan(choice, &found, None), linker) {
            (Some(Plan::Use(compiler)), Some(linker)) => return Ok(Toolchain { compiler, linker }),
            _ => install(choice, &found)?,
        }
    }
    bail!("compiler or linker for eBPF are still not usable after their installation")
}

fn install(choice: Choice, found: &Found) -> Result<()> {
    run::say(
        "missing for eBPF: rustup's nightly with rust-src or Debian's rustc-web, or a bpf-linker not older than their LLVM",
    );
    let host = Host::look();
    if host.is_root && host.has_apt {
        // A fresh machine knows no packages yet.
        Cmd::new("apt-get").arg("update").run()?;
    }
    match plan(choice, found, Some(&Offers::look(host))) {
        Some(Plan::Take(steps)) => need::take(steps),
        _ => Ok(()),
    }
}

/// What to do when the build of the eBPF crate fails for a reason that is not in its source.
pub fn hint() -> String {
    format!("the message above says why; tried with bpf-linker {LINKER_VERSION} and `--toolchain debian`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_the_outer_cargo_are_removed_and_the_users_are_kept() {
        let gone = ["CARGO", "CARGO_MANIFEST_DIR", "CARGO_ENCODED_RUSTFLAGS", "RUSTC", "RUSTFLAGS", "RUSTUP_TOOLCHAIN"];
        let kept =
            ["CARGO_HOME", "CARGO_HTTP_CAINFO", "CARGO_REGISTRIES_X_INDEX", "RUSTUP_HOME", "PATH", "HTTPS_PROXY"];
        assert!(gone.iter().all(|name| is_scrubbed(name)));
        assert!(!kept.iter().any(|name| is_scrubbed(name)));
    }

    #[test]
    fn libraries_of_the_outer_compiler_are_not_searched() {
        let path = "/src/target/debug/deps:/root/.rustup/toolchains/stable/lib:/opt/lib";
        assert_eq!(library_path(path), "/opt/lib");
    }

    #[test]
    fn flags_carry_the_linker_and_the_hosts_architecture() {
        let flags = rustflags("aarch64").join(" ");
        assert!(flags.starts_with("-Clinker=bpf-linker "), "{flags}");
        assert!(flags.ends_with("--cfg=bpf_target_arch=\"aarch64\""), "{flags}");
    }
}
