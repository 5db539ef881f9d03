//! Where things are in the source tree and in the target directory. Knows names only; runs nothing.

use std::{
    env,
    path::{Path, PathBuf},
};

/// The repository's top directory.
pub fn root() -> PathBuf {
    // Cargo sets the variable when it runs us; the binary alone falls back to where it was built.
    let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest).parent().expect("the xtask directory lies inside the repository").to_path_buf()
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The eBPF crate.
pub fn bpf_crate() -> PathBuf {
    root().join("proxy-ebpf")
}

/// The target directory of the eBPF build, apart from the host's: another compiler and another lock.
pub fn bpf_target() -> PathBuf {
    target().join("bpf")
}

/// The finished BPF object, which the agent's build embeds.
pub fn bpf_object() -> PathBuf {
    bpf_target().join("shunt.bpf.o")
}

/// The agent, as `cargo xtask build` leaves it.
pub fn shunt() -> PathBuf {
    target().join("release/shunt")
}

/// The container image, as `cargo xtask image` leaves it.
pub fn image() -> PathBuf {
    target().join("image-layout")
}

/// Where cargo keeps what it installs.
pub fn cargo_home() -> PathBuf {
    let home = || PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cargo");
    env::var_os("CARGO_HOME").map_or_else(home, PathBuf::from)
}
