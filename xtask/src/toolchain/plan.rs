//! What to do so that the eBPF crate can be built: use what is there, or install a compiler, or a linker. Pure, but for
//! the look at what can be installed.

use super::{Choice, Compiler, LINKER_VERSION, found::Found};
use crate::{
    need::{self, Host, Step},
    run,
};

/// The versions of LLVM that this bpf-linker can be built against.
const LINKER_LLVMS: [u32; 3] = [23, 22, 21];
const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", DEBIAN_CORE, "rust-web-src"];
/// `core` for the target: the package that not every release with rustc-web has.
const DEBIAN_CORE: &str = "libstd-rust-web-dev-bpf";

const INSTALL_NIGHTLY: &str = "rustup toolchain install nightly --profile minimal --component rust-src";

/// What can be installed on this machine.
#[derive(Clone, Debug)]
pub struct Offers {
    host: Host,
    has_binstall: bool,
    /// Those of the packages asked for that apt knows.
    packages: Vec<String>,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan {
    /// This compiler and the linker that is there.
    Use(Compiler),
    /// These steps, and then look again.
    Take(Vec<Step>),
}

impl Offers {
    /// Looks at what this machine can install.
    pub fn look(host: Host) -> Self {
        let libraries = LINKER_LLVMS.map(|llvm| format!("llvm-{llvm}-dev"));
        let asked = libraries.into_iter().chain([DEBIAN_CORE.to_owned()]);
        let packages = asked.filter(|package| need::apt_offers(package)).collect();
        Self { host, has_binstall: run::find_program("cargo-binstall").is_some(), packages }
    }

    fn has(&self, package: &str) -> bool {
        self.packages.iter().any(|known| known == package)
    }
}

/// What to do so that the choice can be served, or `None` if it cannot be and nothing may be installed.
///
/// Preferred, in this order: what is there and fits; a linker built here for a compiler that is there; Debian's compiler;
/// rustup's; a linker built elsewhere; in the end, asking the reader.
pub fn plan(choice: Choice, found: &Found, offers: Option<&Offers>) -> Option<Plan> {
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
    let ready_made = || wanted.first().map(|_| download_linker(offers));
    let ask = || vec![Step::Ask(advice(choice))];
    Some(Plan::Take(linker.or_else(debian).or_else(nightly).or_else(ready_made).unwrap_or_else(ask)))
}

/// The steps that bring a linker for LLVM `llvm`, if they can be taken unasked.
fn install_linker(llvm: u32, offers: &Offers) -> Option<Vec<Step>> {
    let library = format!("llvm-{llvm}-dev");
    let build = format!(
        "env LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo install bpf-linker --version {LINKER_VERSION} --locked --force \
         --no-default-features --features llvm-{llvm}"
    );
    let packages = format!("apt-get install -y --no-install-recommends {library} libzstd-dev zlib1g-dev g++");
    let can_build = LINKER_LLVMS.contains(&llvm) && offers.host.is_root && offers.has(&library);
    can_build.then(|| vec![step(&packages), step(&build)])
}

/// The steps that fetch the linker as its makers build it, with an LLVM inside.
fn download_linker(offers: &Offers) -> Vec<Step> {
    let fetch = step(&format!("cargo binstall --no-confirm --force bpf-linker@{LINKER_VERSION}"));
    if offers.has_binstall { vec![fetch] } else { vec![step("cargo install --locked cargo-binstall"), fetch] }
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

/// What to type where no compiler can be installed unasked.
fn advice(choice: Choice) -> String {
    let debian = format!("sudo apt-get update && sudo apt-get install -y {}", DEBIAN_PACKAGES.join(" "));
    match choice {
        Choice::Debian => format!("{debian}   (Debian 12 has them)"),
        Choice::Auto | Choice::Nightly => {
            format!("install rustup (https://rustup.rs), then: {INSTALL_NIGHTLY}\n  or, on Debian 12: {debian}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::found::{Linker, WithLlvm};
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
        assert!(
            taken(Choice::Nightly, &new, &root).starts_with("cargo install --locked cargo-binstall; cargo binstall")
        );
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
}
