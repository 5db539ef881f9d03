//! Calls of kernel functions: marker instructions in the object become calls by BTF id, or `r0 = 0` where the kernel has no such function.
//!
//! The BPF toolchain has no way to name a kernel function, so the programs carry a call instruction whose immediate is a
//! marker. Its form is fixed between the halves: `85 20 00 00 ID 4b fc 7a`.
//! May touch: the bytes of the object.

use object::{Object, ObjectSection, SectionKind};

/// A kernel function that the programs call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kfunc {
    /// First byte of the marker's immediate.
    pub id: u8,
    /// Name in the kernel's BTF.
    pub name: &'static str,
}

/// Kernel functions that the programs may call.
pub const KFUNCS: [Kfunc; 3] = [
    Kfunc { id: 1, name: "bpf_skb_ct_lookup" },
    Kfunc { id: 2, name: "bpf_ct_release" },
    Kfunc { id: 3, name: "bpf_xdp_ct_lookup" },
];

/// Bytes of a BPF instruction.
const INSTRUCTION: usize = 8;
/// `call`, source register 2 (BPF_PSEUDO_KFUNC_CALL), offset 0.
const CALL_KFUNC: [u8; 4] = [0x85, 0x20, 0, 0];
/// What follows the id in the marker's immediate.
const MARK: [u8; 3] = [0x4b, 0xfc, 0x7a];
/// `r0 = 0`: the programs take a null pointer for "not found".
const RETURN_NULL: [u8; INSTRUCTION] = [0xb7, 0, 0, 0, 0, 0, 0, 0];

/// Not an ELF file.
#[derive(Debug, thiserror::Error)]
#[error("the BPF object is not readable")]
pub struct Error(#[from] object::Error);

/// Replaces every marker in the executable sections of `object`; returns the functions that the kernel does not have.
///
/// `id_of` tells the BTF id of a kernel function.
pub fn resolve(object: &mut [u8], id_of: impl Fn(&str) -> Option<u32>) -> Result<Vec<Kfunc>, Error> {
    let mut missing = Vec::new();
    for (offset, kfunc) in markers(object)? {
        let id = id_of(kfunc.name);
        patch(&mut object[offset..offset + INSTRUCTION], id);
        if id.is_none() && !missing.contains(&kfunc) {
            missing.push(kfunc);
        }
    }
    Ok(missing)
}

/// File offsets of the markers.
fn markers(bytes: &[u8]) -> Result<Vec<(usize, Kfunc)>, Error> {
    let file = object::File::parse(bytes)?;
    let mut sites = Vec::new();
    for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
        let Some((start, length)) = section.file_range() else {
            continue;
        };
        let code = &bytes[start as usize..(start + length) as usize];
        for (index, instruction) in code.chunks_exact(INSTRUCTION).enumerate() {
            if let Some(kfunc) = marked(instruction) {
                sites.push((start as usize + index * INSTRUCTION, kfunc));
            }
        }
    }
    Ok(sites)
}

fn marked(instruction: &[u8]) -> Option<Kfunc> {
    let is_marker = instruction[..4] == CALL_KFUNC && instruction[5..] == MARK;
    KFUNCS.into_iter().find(|kfunc| is_marker && kfunc.id == instruction[4])
}

fn patch(instruction: &mut [u8], id: Option<u32>) {
    match id {
        Some(id) => instruction[4..].copy_from_slice(&id.to_ne_bytes()),
        None => instruction.copy_from_slice(&RETURN_NULL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_become_calls_or_null() {
        let marker = [0x85, 0x20, 0, 0, 2, 0x4b, 0xfc, 0x7a];
        assert_eq!(marked(&marker), Some(KFUNCS[1]));
        assert_eq!(marked(&[0x85, 0x20, 0, 0, 9, 0x4b, 0xfc, 0x7a]), None);
        assert_eq!(marked(&[0x85, 0x10, 0, 0, 2, 0x4b, 0xfc, 0x7a]), None);
        let mut instruction = marker;
        patch(&mut instruction, Some(0x0102_0304));
        assert_eq!(instruction[..4], CALL_KFUNC);
        assert_eq!(instruction[4..], 0x0102_0304u32.to_ne_bytes());
        patch(&mut instruction, None);
        assert_eq!(instruction, RETURN_NULL);
    }
}
