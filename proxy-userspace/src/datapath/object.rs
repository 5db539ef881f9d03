//! The BPF object that this binary carries.

/// An ELF file, as `cargo xtask build` made it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SHUNT_BPF_OBJECT"));
