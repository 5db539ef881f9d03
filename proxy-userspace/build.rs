//! Finds the BPF object that the agent embeds: `SHUNT_BPF_OBJECT` in the environment, or what `cargo xtask build` left in
//! the target directory. Compiles nothing itself: the object has its own compiler, which not everyone who reads code needs.

use std::{
    env,
    path::{Path, PathBuf},
};

const VARIABLE: &str = "SHUNT_BPF_OBJECT";

fn main() {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let object = env::var_os(VARIABLE).map_or_else(in_target_dir, PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    if !object.is_file() {
        println!("cargo::error=there is no BPF object at {}: run `cargo xtask build`", object.display());
        return;
    }
    println!("cargo::rustc-env={VARIABLE}={}", object.display());
}

/// The object in the target directory that this very build writes to.
fn in_target_dir() -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for build scripts"));
    let found = out.ancestors().map(object_below).find(|object| object.is_file());
    found.unwrap_or_else(|| object_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../target")))
}

fn object_below(target: &Path) -> PathBuf {
    target.join("bpf/shunt.bpf.o")
}
