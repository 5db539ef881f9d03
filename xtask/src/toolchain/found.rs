//! What this machine has for eBPF: compilers, each with the LLVM it brings, and the linker. Looks only.

use std::{
    fs,
    path::{Path, PathBuf},
};

use object::{Object as _, ObjectSection as _};

use super::{Compiler, DEBIAN_CARGO, DEBIAN_RUSTC, TARGET};
use crate::run::{self, Cmd};

/// A compiler and the LLVM it brings.
pub type WithLlvm = (Compiler, u32);

/// What is on this machine: compilers and the linker.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Those to be preferred first.
    pub compilers: Vec<WithLlvm>,
    /// bpf-linker.
    pub linker: Option<Linker>,
}

/// A bpf-linker, and the LLVM it was built against unless that is inside.
#[derive(Clone, Debug)]
pub struct Linker {
    /// Its program file.
    pub path: PathBuf,
    /// The first number of that LLVM's version.
    pub llvm: Option<u32>,
}

impl Found {
    /// Whether the linker is there and reads what LLVM `llvm` writes, as far as can be told.
    pub fn is_readable(&self, llvm: u32) -> bool {
        self.linker.as_ref().is_some_and(|linker| linker.llvm.is_none_or(|newest| newest >= llvm))
    }
}

/// Looks.
pub fn look() -> Found {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_versions_are_read_from_compiler_and_linker() {
        assert_eq!(llvm_major("rustc 1.97.0-nightly\nrelease: 1.97.0\nLLVM version: 22.1.4\n"), Some(22));
        assert_eq!(llvm_major("rustc 1.0"), None);
        assert_eq!(linked_llvm(b"\0libLLVM.so.22.1\0libc.so.6\0"), Some(22));
        assert_eq!(linked_llvm(b"\0libLLVM-19.so\0"), Some(19));
        assert_eq!(linked_llvm(b"\0libc.so.6\0"), None);
    }
}
