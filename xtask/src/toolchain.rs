//! The compilers that can build the eBPF crate, the linker they need, and the flags both are given. Everything
//! particular to them is here; what is built with them is not.
//!
//! Two are known. *Nightly*: rustup's nightly with the component rust-src, which compiles `core` for the target on the
//! way (`-Z build-std`). *Debian*: the package rustc-web with `core` for the target ready-made, a stable compiler told to
//! accept unstable features. bpf-linker reads the compilers' LLVM bitcode, so it must be built against an LLVM that is
//! not older than theirs.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    need::{self, Host, Need, Step},
    run::{self, Cmd},
    workspace,
};

/// The target's name.
pub const TARGET: &str = "bpfel-unknown-none";

const LINKER_VERSION: &str = "0.13.0";
/// The newest LLVM that this bpf-linker can be built against.
const LINKER_NEWEST_LLVM: u32 = 23;
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";
const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "rust-web-src"];

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

/// A kind of compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// rustup's nightly.
    Nightly,
    /// Debian's rustc-web.
    Debian,
}

/// The compilers of this machine that can build the eBPF crate, each by the LLVM it brings.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    nightly: Option<u32>,
    debian: Option<u32>,
}

/// A compiler and a linker, both there.
#[derive(Debug)]
pub struct Toolchain {
    /// Which compiler.
    pub kind: Kind,
    /// bpf-linker.
    pub linker: PathBuf,
}

impl Toolchain {
    /// `cargo SUBCOMMAND` in the eBPF crate, for its target, with its flags and without the outer cargo's variables.
    pub fn cargo(&self, subcommand: &str) -> Cmd {
        let cmd = match self.kind {
            Kind::Nightly => Cmd::new("rustup").args(["run", "nightly", "cargo", subcommand, "-Zbuild-std=core"]),
            // What is called through cargo is looked for in the user's directories first, and would be rustup's.
            Kind::Debian if subcommand == "clippy" => {
                Cmd::new(DEBIAN_CLIPPY).arg(subcommand).env("CARGO", DEBIAN_CARGO)
            }
            Kind::Debian => Cmd::new(DEBIAN_CARGO).arg(subcommand),
        };
        self.with_flags(cmd)
    }

    fn with_flags(&self, cmd: Cmd) -> Cmd {
        let cmd = cmd.args(["--release", "--target", TARGET, "--target-dir"]).arg(workspace::bpf_target());
        let scrubbed = env::vars_os().map(|(name, _)| name).filter(|name| is_scrubbed(&name.to_string_lossy()));
        let cmd =
            scrubbed.fold(cmd, Cmd::env_remove).dir(workspace::bpf_crate()).env_quietly("PATH", run::search_path());
        let cmd = cmd.env_quietly("LD_LIBRARY_PATH", library_path(&env::var("LD_LIBRARY_PATH").unwrap_or_default()));
        let cmd = cmd.env("RUSTFLAGS", rustflags(&self.linker, env::consts::ARCH).join(" "));
        match self.kind {
            Kind::Nightly => cmd,
            Kind::Debian => cmd.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1"),
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
        match self.kind {
            Kind::Nightly => Ok(Cmd::new("rustup").args(["run", "nightly", "cargo", "clippy", "--version"]).succeeds()),
            Kind::Debian if host.is_root && host.has_apt => {
                need::ensure(&[Need::File(DEBIAN_CLIPPY.into(), "rust-web-clippy".into())]).map(|()| true)
            }
            Kind::Debian => Ok(Path::new(DEBIAN_CLIPPY).exists()),
        }
    }
}

/// The compiler's flags for BPF on a host of architecture `arch`.
///
/// Measured: without target-cpu v3 and with the linker's in-order expansion every zeroed or copied struct becomes a call
/// of a byte loop, 15 % per packet and twice the verified instructions.
fn rustflags(linker: &Path, arch: &str) -> Vec<String> {
    vec![
        format!("-Clinker={}", linker.display()),
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

/// The kind that serves the choice, or `None` if what it asks for is not there.
fn choose(choice: Choice, found: Found) -> Option<(Kind, u32)> {
    let nightly = found.nightly.map(|llvm| (Kind::Nightly, llvm));
    let debian = found.debian.map(|llvm| (Kind::Debian, llvm));
    match choice {
        Choice::Auto => nightly.or(debian),
        Choice::Nightly => nightly,
        Choice::Debian => debian,
    }
}

/// A compiler and the linker, installed now if they were missing.
///
/// Errors: they cannot be installed; the text says what to type.
pub fn ensure(choice: Choice) -> Result<Toolchain> {
    let (kind, llvm) = match choose(choice, look()) {
        Some(chosen) => chosen,
        None => {
            install_compiler(choice)?;
            choose(choice, look()).context("the compiler for eBPF is still not usable after its installation")?
        }
    };
    Ok(Toolchain { kind, linker: ensure_linker(llvm)? })
}

fn look() -> Found {
    Found { nightly: find_nightly(), debian: find_debian() }
}

fn find_nightly() -> Option<u32> {
    let rustc = || Cmd::new("rustup").args(["run", "nightly", "rustc"]).env("RUSTUP_AUTO_INSTALL", "0");
    let sysroot = rustc().args(["--print", "sysroot"]).read().ok()?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !core.exists() {
        return None;
    }
    llvm_major(&rustc().arg("-vV").read().ok()?)
}

fn find_debian() -> Option<u32> {
    let rustc = || Cmd::new(DEBIAN_RUSTC);
    let libs = rustc().args(["--print", "target-libdir", "--target", TARGET]).read().ok()?;
    let is_core = |entry: fs::DirEntry| entry.file_name().to_string_lossy().starts_with("libcore-");
    let has_core = fs::read_dir(libs.trim()).ok()?.flatten().any(is_core);
    if !has_core || !Path::new(DEBIAN_CARGO).exists() {
        return None;
    }
    llvm_major(&rustc().arg("-vV").read().ok()?)
}

/// The LLVM version's first number in what `rustc -vV` prints.
fn llvm_major(version: &str) -> Option<u32> {
    let line = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    line.split('.').next()?.parse().ok()
}

fn install_compiler(choice: Choice) -> Result<()> {
    run::say("no compiler for eBPF yet: it needs rustup's nightly with rust-src, or Debian's rustc-web");
    let host = Host::look();
    if host.is_root && host.has_apt && choice != Choice::Nightly {
        // The names are looked up in the package list, which a fresh machine does not have yet.
        Cmd::new("apt-get").arg("update").run()?;
    }
    need::take(compiler_steps(choice, host, need::apt_offers(DEBIAN_PACKAGES[2])))
}

/// The steps that bring a compiler: Debian's packages where they can be had unasked, else rustup's nightly.
fn compiler_steps(choice: Choice, host: Host, apt_offers: bool) -> Vec<Step> {
    let packages = DEBIAN_PACKAGES.join(" ");
    let nightly = "rustup toolchain install nightly --profile minimal --component rust-src";
    let run = |line: &str| vec![Step::Run(line.split(' ').map(Into::into).collect())];
    let ask = |line: String| vec![Step::Ask(line)];
    let can_debian = choice != Choice::Nightly && apt_offers;
    let can_nightly = choice != Choice::Debian && host.has_rustup;
    match (can_debian, can_nightly) {
        (true, _) if host.is_root => run(&format!("apt-get install -y --no-install-recommends {packages}")),
        (_, true) => run(nightly),
        (true, false) => ask(format!("sudo apt-get install -y --no-install-recommends {packages}")),
        (false, false) if choice == Choice::Debian => ask(format!("apt-get install {packages}   # Debian 12 or newer")),
        (false, false) => ask(format!("install rustup from https://rustup.rs, then: {nightly}")),
    }
}

fn ensure_linker(llvm: u32) -> Result<PathBuf> {
    if let Some(linker) = run::find_program("bpf-linker") {
        return Ok(linker);
    }
    run::say("missing: bpf-linker");
    let host = Host::look();
    let library = format!("llvm-{llvm}-dev");
    if !Path::new(&format!("/usr/lib/llvm-{llvm}/lib")).exists() && host.is_root && host.has_apt {
        Cmd::new("apt-get").arg("update").run()?;
    }
    let ways = LinkerWays {
        has_binstall: run::find_program("cargo-binstall").is_some(),
        apt_offers_llvm: need::apt_offers(&library),
        has_llvm: Path::new(&format!("/usr/lib/llvm-{llvm}/bin/llvm-config")).exists(),
    };
    need::take(linker_steps(llvm, env::consts::ARCH, host, ways))?;
    match run::find_program("bpf-linker") {
        Some(linker) => Ok(linker),
        None => bail!("bpf-linker was installed, but neither PATH nor {} has it", workspace::cargo_home().display()),
    }
}

/// The ways to a bpf-linker that this machine offers.
#[derive(Clone, Copy, Debug)]
struct LinkerWays {
    has_binstall: bool,
    apt_offers_llvm: bool,
    has_llvm: bool,
}

/// The steps that bring a bpf-linker that reads the bitcode of LLVM `llvm`.
fn linker_steps(llvm: u32, arch: &str, host: Host, ways: LinkerWays) -> Vec<Step> {
    let run = |line: String| Step::Run(line.split(' ').map(Into::into).collect());
    let packages = format!("llvm-{llvm}-dev libzstd-dev zlib1g-dev g++");
    let build = format!(
        "env LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo install bpf-linker --version {LINKER_VERSION} --locked \
         --no-default-features --features llvm-{llvm}"
    );
    let can_build = llvm <= LINKER_NEWEST_LLVM;
    if ways.has_binstall {
        return vec![run(format!("cargo binstall --no-confirm bpf-linker@{LINKER_VERSION}"))];
    }
    if can_build && ways.apt_offers_llvm && host.is_root {
        return vec![run(format!("apt-get install -y --no-install-recommends {packages}")), run(build)];
    }
    if can_build && ways.has_llvm {
        return vec![run(build)];
    }
    if can_build && ways.apt_offers_llvm {
        return vec![Step::Ask(format!("sudo apt-get install -y --no-install-recommends {packages} && {build}"))];
    }
    // Built by the project for every Linux, with an LLVM inside.
    let url = "https://github.com/aya-rs/bpf-linker/releases/latest/download";
    let file = format!("bpf-linker-{arch}-unknown-linux-musl.tar.zst");
    let unpack = "tar -x --zstd -C ~/.cargo/bin";
    vec![Step::Ask(format!("curl -fL {url}/{file} | {unpack}   # or: cargo binstall bpf-linker"))]
}

/// What to do when the build of the eBPF crate fails for a reason that is not in its source.
pub fn hint() -> String {
    format!(
        "if the linker speaks of bitcode or an unknown attribute, it was built against an older LLVM than the compiler's: \
         `cargo uninstall bpf-linker`, then `cargo xtask setup`; version {LINKER_VERSION} is the one tried here"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Host = Host { is_root: true, has_apt: true, has_rustup: true };
    const USER: Host = Host { is_root: false, ..ROOT };
    const NO_WAY: LinkerWays = LinkerWays { has_binstall: false, apt_offers_llvm: false, has_llvm: false };

    fn line(steps: &[Step]) -> String {
        let words = |step: &Step| match step {
            Step::Run(words) => format!("run {}", words.join(" ")),
            Step::Ask(text) => format!("ask {text}"),
        };
        steps.iter().map(words).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn nightly_with_sources_is_preferred_but_not_to_a_plain_wish() {
        let both = Found { nightly: Some(23), debian: Some(22) };
        assert_eq!(choose(Choice::Auto, both), Some((Kind::Nightly, 23)));
        assert_eq!(choose(Choice::Debian, both), Some((Kind::Debian, 22)));
        let debian = Found { nightly: None, ..both };
        assert_eq!(choose(Choice::Auto, debian), Some((Kind::Debian, 22)));
        assert_eq!(choose(Choice::Nightly, debian), None);
    }

    #[test]
    fn variables_of_the_outer_cargo_are_removed_and_the_users_are_kept() {
        let gone = ["CARGO", "CARGO_MANIFEST_DIR", "CARGO_ENCODED_RUSTFLAGS", "RUSTC", "RUSTFLAGS", "RUSTUP_TOOLCHAIN"];
        let kept =
            ["CARGO_HOME", "CARGO_HTTP_CAINFO", "CARGO_REGISTRIES_X_INDEX", "RUSTUP_HOME", "PATH", "HTTPS_PROXY"];
        assert_eq!(
            gone.iter().filter(|name| !is_scrubbed(name)).collect::<Vec<_>>(),
            [""; 0].iter().collect::<Vec<_>>()
        );
        assert_eq!(
            kept.iter().filter(|name| is_scrubbed(name)).collect::<Vec<_>>(),
            [""; 0].iter().collect::<Vec<_>>()
        );
    }

    #[test]
    fn libraries_of_the_outer_compiler_are_not_searched() {
        let path = "/src/target/debug/deps:/root/.rustup/toolchains/stable/lib:/opt/lib";
        assert_eq!(library_path(path), "/opt/lib");
    }

    #[test]
    fn flags_carry_the_linker_and_the_hosts_architecture() {
        let flags = rustflags(Path::new("/x/bpf-linker"), "aarch64").join(" ");
        assert!(flags.starts_with("-Clinker=/x/bpf-linker "), "{flags}");
        assert!(flags.ends_with("--cfg=bpf_target_arch=\"aarch64\""), "{flags}");
    }

    #[test]
    fn llvm_version_is_read_from_rustc() {
        assert_eq!(llvm_major("rustc 1.97.0-nightly\nrelease: 1.97.0\nLLVM version: 22.1.4\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.0"), None);
    }

    #[test]
    fn root_on_debian_gets_packages_and_all_others_nightly() {
        let steps = |choice, host, offers| line(&compiler_steps(choice, host, offers));
        assert!(steps(Choice::Auto, ROOT, true).starts_with("run apt-get install"));
        assert!(steps(Choice::Auto, ROOT, false).starts_with("run rustup toolchain install nightly"));
        assert!(steps(Choice::Auto, USER, true).starts_with("run rustup toolchain install nightly"));
        assert!(steps(Choice::Debian, USER, true).starts_with("ask sudo apt-get install"));
        assert!(steps(Choice::Nightly, ROOT, true).starts_with("run rustup toolchain install nightly"));
        assert!(steps(Choice::Nightly, Host { has_rustup: false, ..ROOT }, true).starts_with("ask install rustup"));
    }

    #[test]
    fn linker_is_built_against_the_compilers_llvm_or_fetched() {
        let offered = LinkerWays { apt_offers_llvm: true, ..NO_WAY };
        let root = line(&linker_steps(22, "x86_64", ROOT, offered));
        assert!(root.starts_with("run apt-get install -y --no-install-recommends llvm-22-dev "), "{root}");
        assert!(root.ends_with("--features llvm-22"), "{root}");
        assert!(line(&linker_steps(22, "x86_64", USER, offered)).starts_with("ask sudo apt-get install"));
        let there = LinkerWays { has_llvm: true, ..NO_WAY };
        assert!(line(&linker_steps(22, "x86_64", USER, there)).starts_with("run env LLVM_PREFIX=/usr/lib/llvm-22 "));
        assert!(line(&linker_steps(24, "aarch64", ROOT, there)).contains("bpf-linker-aarch64-unknown-linux-musl"));
    }
}
