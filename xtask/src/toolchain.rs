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

use anyhow::{Result, bail};
use object::{Object as _, ObjectSection as _};

use crate::{
    need::{self, Host, Need, Step},
    run::{self, Cmd},
    workspace,
};

/// The target's name.
pub const TARGET: &str = "bpfel-unknown-none";

const LINKER_VERSION: &str = "0.13.0";
/// The versions of LLVM that this bpf-linker can be built against.
const LINKER_LLVMS: [u32; 3] = [23, 22, 21];
const INSTALL_NIGHTLY: &str = "rustup toolchain install nightly --profile minimal --component rust-src";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";
const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", DEBIAN_CORE, "rust-web-src"];
/// `core` for the target: the package that not every release with rustc-web has.
const DEBIAN_CORE: &str = "libstd-rust-web-dev-bpf";

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

/// A compiler and the LLVM it brings.
type WithLlvm = (Compiler, u32);

/// What is on this machine: compilers, those to be preferred first, and the linker.
#[derive(Clone, Debug, Default)]
struct Found {
    compilers: Vec<WithLlvm>,
    linker: Option<Linker>,
}

/// A bpf-linker, and the LLVM it was built against unless that is inside.
#[derive(Clone, Debug)]
struct Linker {
    path: PathBuf,
    llvm: Option<u32>,
}

/// What can be installed on this machine.
#[derive(Clone, Debug)]
struct Offers {
    host: Host,
    has_binstall: bool,
    /// Those of the packages asked for that apt knows.
    packages: Vec<String>,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Use(Compiler),
    Take(Vec<Step>),
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
        let cmd = cmd.env("RUSTFLAGS", rustflags(&self.linker, env::consts::ARCH).join(" "));
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

/// A compiler and a linker that fit each other, installed now if they were missing.
///
/// Errors: they cannot be installed; the text says what to type.
pub fn ensure(choice: Choice) -> Result<Toolchain> {
    // Anything has at most to be installed twice: a compiler, then a linker for it.
    for _ in 0..3 {
        let found = look();
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
    match plan(choice, found, Some(&look_for_offers(host))) {
        Some(Plan::Take(steps)) => need::take(steps),
        _ => Ok(()),
    }
}

fn look() -> Found {
    let nightlies = nightlies().into_iter().filter_map(|name| Some((nightly_llvm(&name)?, name)));
    let nightlies = nightlies.map(|(llvm, name)| (Compiler::Nightly(name), llvm));
    let debian = debian_llvm().map(|llvm| (Compiler::Debian, llvm));
    Found { compilers: nightlies.chain(debian).collect(), linker: find_linker() }
}

/// The names of rustup's nightlies, the undated one first.
fn nightlies() -> Vec<String> {
    let list = Cmd::new("rustup").args(["toolchain", "list"]).read().unwrap_or_default();
    let mut names: Vec<_> = list.lines().filter_map(|line| line.split_whitespace().next()).map(String::from).collect();
    names.retain(|name| name.starts_with("nightly"));
    names.sort_by_key(|name| name.starts_with("nightly-2"));
    names
}

/// The LLVM of a nightly that has the sources of `core`.
fn nightly_llvm(name: &str) -> Option<u32> {
    let rustc = || Cmd::new("rustup").args(["run", name, "rustc"]);
    let sysroot = rustc().args(["--print", "sysroot"]).read().ok()?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !core.exists() {
        return None;
    }
    llvm_major(&rustc().arg("-vV").read().ok()?)
}

/// The LLVM of Debian's compiler, if it has `core` for the target.
fn debian_llvm() -> Option<u32> {
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

fn find_linker() -> Option<Linker> {
    let path = run::find_program("bpf-linker")?;
    let llvm = fs::read(&path).ok().and_then(|bytes| linked_llvm(library_names(&bytes)?));
    Some(Linker { path, llvm })
}

/// The strings of a program for the dynamic linker, the names of its libraries among them.
fn library_names(program: &[u8]) -> Option<&[u8]> {
    object::File::parse(program).ok()?.section_by_name(".dynstr")?.data().ok()
}

/// The number in the name of the LLVM library among `names`: `libLLVM.so.22.1` or `libLLVM-22.so`.
fn linked_llvm(names: &[u8]) -> Option<u32> {
    [&b"libLLVM.so."[..], b"libLLVM-"].into_iter().find_map(|name| {
        let at = names.windows(name.len()).position(|window| window == name)? + name.len();
        let digits: Vec<_> = names[at..].iter().copied().take_while(u8::is_ascii_digit).collect();
        String::from_utf8(digits).ok()?.parse().ok()
    })
}

fn look_for_offers(host: Host) -> Offers {
    let libraries = LINKER_LLVMS.map(|llvm| format!("llvm-{llvm}-dev"));
    let asked = libraries.into_iter().chain([DEBIAN_CORE.to_owned()]);
    let packages = asked.filter(|package| need::apt_offers(package)).collect();
    Offers { host, has_binstall: run::find_program("cargo-binstall").is_some(), packages }
}

impl Found {
    fn is_readable(&self, llvm: u32) -> bool {
        self.linker.as_ref().is_some_and(|linker| linker.llvm.is_none_or(|newest| newest >= llvm))
    }
}

impl Offers {
    fn has(&self, package: &str) -> bool {
        self.packages.iter().any(|known| known == package)
    }
}

/// What to do so that the choice can be served, or `None` if it cannot be and nothing may be installed.
///
/// Preferred, in this order: what is there and fits; a linker for a compiler that is there; Debian's compiler; rustup's;
/// in the end, asking the reader.
fn plan(choice: Choice, found: &Found, offers: Option<&Offers>) -> Option<Plan> {
    let is_wanted = |compiler: &Compiler| match choice {
        Choice::Auto => true,
        Choice::Nightly => *compiler != Compiler::Debian,
        Choice::Debian => *compiler == Compiler::Debian,
    };
    let wanted: Vec<_> = found.compilers.iter().filter(|(compiler, _)| is_wanted(compiler)).collect();
    if let Some((compiler, _)) = wanted.iter().find(|(_, llvm)| found.is_readable(*llvm)) {
        return Some(Plan::Use(compiler.clone()));
    }
    let offers = offers?;
    let linker = wanted.iter().find_map(|(_, llvm)| install_linker(*llvm, offers));
    let has_debian = wanted.iter().any(|(compiler, _)| *compiler == Compiler::Debian);
    let debian = || (choice != Choice::Nightly && !has_debian).then(|| install_debian(offers)).flatten();
    let nightly = || (choice != Choice::Debian && wanted.is_empty()).then(|| install_nightly(offers)).flatten();
    let ask = || vec![Step::Ask(advice(choice, wanted.first().map(|(_, llvm)| *llvm)))];
    Some(Plan::Take(linker.or_else(debian).or_else(nightly).unwrap_or_else(ask)))
}

/// The steps that bring a linker for LLVM `llvm`, if they can be taken unasked.
fn install_linker(llvm: u32, offers: &Offers) -> Option<Vec<Step>> {
    let library = format!("llvm-{llvm}-dev");
    let build = format!(
        "env LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo install bpf-linker --version {LINKER_VERSION} --locked --force \
         --no-default-features --features llvm-{llvm}"
    );
    let can_build = LINKER_LLVMS.contains(&llvm) && offers.host.is_root && offers.has(&library);
    if can_build {
        let packages = format!("apt-get install -y --no-install-recommends {library} libzstd-dev zlib1g-dev g++");
        return Some(vec![step(&packages), step(&build)]);
    }
    offers.has_binstall.then(|| vec![step(&format!("cargo binstall --no-confirm --force bpf-linker@{LINKER_VERSION}"))])
}

fn install_debian(offers: &Offers) -> Option<Vec<Step>> {
    let line = format!("apt-get install -y --no-install-recommends {}", DEBIAN_PACKAGES.join(" "));
    (offers.host.is_root && offers.has(DEBIAN_CORE)).then(|| vec![step(&line)])
}

fn install_nightly(offers: &Offers) -> Option<Vec<Step>> {
    offers.host.has_rustup.then(|| vec![step(INSTALL_NIGHTLY)])
}

fn step(line: &str) -> Step {
    Step::Run(line.split(' ').map(Into::into).collect())
}

/// What to type where nothing can be installed unasked; `llvm` is that of the compiler, if there is one.
fn advice(choice: Choice, llvm: Option<u32>) -> String {
    let debian = format!("sudo apt-get update && sudo apt-get install -y {}", DEBIAN_PACKAGES.join(" "));
    match (llvm, choice) {
        (Some(llvm), _) => format!(
            "a bpf-linker that reads LLVM {llvm}: `cargo binstall bpf-linker`, or the file for {}-unknown-linux-musl at \
             https://github.com/aya-rs/bpf-linker/releases, unpacked into {}",
            env::consts::ARCH,
            workspace::cargo_home().join("bin").display()
        ),
        (None, Choice::Debian) => format!("{debian}   (Debian 12 has them)"),
        (None, _) => {
            format!("install rustup (https://rustup.rs), then: {INSTALL_NIGHTLY}\n  or, on Debian 12: {debian}")
        }
    }
}

/// What to do when the build of the eBPF crate fails for a reason that is not in its source.
pub fn hint() -> String {
    format!("the message above says why; tried with bpf-linker {LINKER_VERSION} and `--toolchain debian`")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Host = Host { is_root: true, has_apt: true, has_rustup: true };
    const USER: Host = Host { is_root: false, ..ROOT };

    fn nightly(llvm: u32) -> WithLlvm {
        (Compiler::Nightly("nightly".into()), llvm)
    }

    fn debian() -> WithLlvm {
        (Compiler::Debian, 22)
    }

    fn found<const N: usize>(compilers: [WithLlvm; N], linker: Option<u32>) -> Found {
        let linker = linker.map(|llvm| Linker { path: "/l".into(), llvm: Some(llvm).filter(|llvm| *llvm > 0) });
        Found { compilers: compilers.into(), linker }
    }

    fn offers<const N: usize>(host: Host, packages: [&str; N]) -> Offers {
        Offers { host, has_binstall: false, packages: packages.map(Into::into).into() }
    }

    fn used(choice: Choice, found: &Found) -> Option<Compiler> {
        match plan(choice, found, None)? {
            Plan::Use(compiler) => Some(compiler),
            Plan::Take(steps) => panic!("nothing may be installed: {steps:?}"),
        }
    }

    fn taken(choice: Choice, found: &Found, offers: &Offers) -> String {
        let words = |step: &Step| match step {
            Step::Run(words) => words.join(" "),
            Step::Ask(text) => format!("ask: {text}"),
        };
        match plan(choice, found, Some(offers)) {
            Some(Plan::Take(steps)) => steps.iter().map(words).collect::<Vec<_>>().join("; "),
            other => panic!("there is something to install: {other:?}"),
        }
    }

    #[test]
    fn nightly_is_preferred_unless_the_linker_cannot_read_it() {
        let auto = |nightly_llvm, linker| used(Choice::Auto, &found([nightly(nightly_llvm), debian()], Some(linker)));
        assert_eq!(auto(22, 22), Some(nightly(22).0));
        assert_eq!(auto(23, 23), Some(nightly(23).0));
        assert_eq!(auto(23, 22), Some(Compiler::Debian));
        // A linker with LLVM inside does not tell which.
        assert_eq!(auto(23, 0), Some(nightly(23).0));
    }

    #[test]
    fn a_choice_is_kept_to() {
        let both = found([nightly(22), debian()], Some(22));
        assert_eq!(used(Choice::Debian, &both), Some(Compiler::Debian));
        assert_eq!(used(Choice::Nightly, &found([debian()], Some(22))), None);
        assert_eq!(used(Choice::Auto, &found([nightly(22), debian()], None)), None);
    }

    #[test]
    fn a_linker_is_built_for_the_compiler_that_is_there() {
        let root = offers(ROOT, ["llvm-22-dev", DEBIAN_CORE]);
        let line = taken(Choice::Auto, &found([debian()], None), &root);
        assert!(line.starts_with("apt-get install -y --no-install-recommends llvm-22-dev "), "{line}");
        assert!(line.ends_with("--no-default-features --features llvm-22"), "{line}");
        // Nightly's LLVM has no package: Debian's compiler helps, unless nightly was asked for.
        let new = found([nightly(23)], None);
        assert!(taken(Choice::Auto, &new, &root).contains("rustc-web"));
        assert!(taken(Choice::Nightly, &new, &root).starts_with("ask: a bpf-linker that reads LLVM 23"));
        let binstall = Offers { has_binstall: true, ..root };
        assert!(taken(Choice::Nightly, &new, &binstall).starts_with("cargo binstall"));
    }

    #[test]
    fn a_compiler_comes_from_debian_for_root_and_else_from_rustup() {
        let none = found([], None);
        let debian = [DEBIAN_CORE];
        assert!(taken(Choice::Auto, &none, &offers(ROOT, debian)).starts_with("apt-get install"));
        assert!(taken(Choice::Auto, &none, &offers(ROOT, [])).starts_with("rustup toolchain install nightly"));
        assert!(taken(Choice::Auto, &none, &offers(USER, debian)).starts_with("rustup toolchain install nightly"));
        assert!(taken(Choice::Nightly, &none, &offers(ROOT, debian)).starts_with("rustup toolchain install nightly"));
        assert!(taken(Choice::Debian, &none, &offers(USER, debian)).starts_with("ask: sudo apt-get update"));
        let bare = Host { has_rustup: false, ..USER };
        assert!(taken(Choice::Auto, &none, &offers(bare, debian)).starts_with("ask: install rustup"));
    }

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
        let flags = rustflags(Path::new("/x/bpf-linker"), "aarch64").join(" ");
        assert!(flags.starts_with("-Clinker=/x/bpf-linker "), "{flags}");
        assert!(flags.ends_with("--cfg=bpf_target_arch=\"aarch64\""), "{flags}");
    }

    #[test]
    fn llvm_versions_are_read_from_compiler_and_linker() {
        assert_eq!(llvm_major("rustc 1.97.0-nightly\nrelease: 1.97.0\nLLVM version: 22.1.4\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.0"), None);
        assert_eq!(linked_llvm(b"\0libLLVM.so.22.1\0libc.so.6\0"), Some(22));
        assert_eq!(linked_llvm(b"\0libLLVM-19.so\0"), Some(19));
        assert_eq!(linked_llvm(b"\0libc.so.6\0"), None);
    }
}
