//! Calls of kernel functions: marker instructions in the object become calls by BTF id, or `r0 = 0` where the kernel has no such function.
//!
//! The BPF toolchain has no way to name a kernel function, so the programs carry a call instruction whose immediate is a
//! marker. Its form is fixed between the halves: `85 20 00 00 ID 4b fc 7a`.
//! May touch: the bytes of the object, and /sys/kernel/btf for reading.

use std::fs;
use std::io;
use std::path::Path;

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
    Kfunc {
        id: 1,
        name: "bpf_skb_ct_lookup",
    },
    Kfunc {
        id: 2,
        name: "bpf_ct_release",
    },
    Kfunc {
        id: 3,
        name: "bpf_xdp_ct_lookup",
    },
];

const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Bytes of a BPF instruction.
const INSTRUCTION: usize = 8;
/// `call`, source register 2 (BPF_PSEUDO_KFUNC_CALL), offset 0.
const CALL_KFUNC: [u8; 4] = [0x85, 0x20, 0, 0];
/// What follows the id in the marker's immediate.
const MARK: [u8; 3] = [0x4b, 0xfc, 0x7a];
/// `r0 = 0`: the programs take a null pointer for "not found".
const RETURN_NULL: [u8; INSTRUCTION] = [0xb7, 0, 0, 0, 0, 0, 0, 0];

/// Why the object or the kernel's types cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an ELF file.
    #[error("the BPF object is not readable")]
    Object(#[source] object::Error),
    /// BTF whose structure is not understood.
    #[error("the kernel's BTF is not readable: {0}")]
    Btf(&'static str),
    /// The kernel was built without BTF, or /sys is not there.
    #[error("cannot read {KERNEL_BTF}")]
    Io(#[source] io::Error),
}

/// Replaces every marker in the executable sections of `object`; returns the functions that the kernel does not have.
pub fn resolve(object: &mut [u8]) -> Result<Vec<Kfunc>, Error> {
    let sites = markers(object)?;
    if sites.is_empty() {
        return Ok(Vec::new());
    }
    let names = KFUNCS.map(|kfunc| kfunc.name);
    let ids = match fs::read(Path::new(KERNEL_BTF)) {
        Ok(btf) => function_ids(&btf, &names)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => vec![None; names.len()],
        Err(error) => return Err(Error::Io(error)),
    };
    let mut missing = Vec::new();
    for (offset, position) in sites {
        patch(&mut object[offset..offset + INSTRUCTION], ids[position]);
        if ids[position].is_none() && !missing.contains(&KFUNCS[position]) {
            missing.push(KFUNCS[position]);
        }
    }
    Ok(missing)
}

/// File offsets of the markers, each with its position in [`KFUNCS`].
fn markers(bytes: &[u8]) -> Result<Vec<(usize, usize)>, Error> {
    let file = object::File::parse(bytes).map_err(Error::Object)?;
    let mut sites = Vec::new();
    for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
        let Some((start, length)) = section.file_range() else {
            continue;
        };
        let code = &bytes[start as usize..(start + length) as usize];
        for (index, instruction) in code.chunks_exact(INSTRUCTION).enumerate() {
            if let Some(position) = marked(instruction) {
                sites.push((start as usize + index * INSTRUCTION, position));
            }
        }
    }
    Ok(sites)
}

fn marked(instruction: &[u8]) -> Option<usize> {
    let is_marker = instruction[..4] == CALL_KFUNC && instruction[5..] == MARK;
    is_marker
        .then(|| KFUNCS.iter().position(|kfunc| kfunc.id == instruction[4]))
        .flatten()
}

fn patch(instruction: &mut [u8], id: Option<u32>) {
    match id {
        Some(id) => instruction[4..].copy_from_slice(&id.to_ne_bytes()),
        None => instruction.copy_from_slice(&RETURN_NULL),
    }
}

/// BTF ids of functions by name. A scan of the raw types: aya's parser would build all 100,000 of them for these three.
///
/// Layout: Documentation/bpf/btf.rst, sections 2 and 3.
fn function_ids(btf: &[u8], names: &[&str]) -> Result<Vec<Option<u32>>, Error> {
    const KIND_FUNC: u32 = 12;
    let header = Header::parse(btf)?;
    let strings = section(btf, header.strings)?;
    let types = section(btf, header.types)?;
    let mut ids = vec![None; names.len()];
    let mut position = 0;
    let mut id = 1;
    while position < types.len() {
        let name = word(types, position)?;
        let info = word(types, position + 4)?;
        let (kind, length) = (info >> 24 & 0x1f, info & 0xffff);
        if kind == KIND_FUNC
            && let Some(found) = names.iter().position(|wanted| is_string_at(strings, name, wanted))
        {
            ids[found] = Some(id);
        }
        position += 12 + extra_bytes(kind, length)?;
        id += 1;
    }
    Ok(ids)
}

struct Header {
    types: (usize, usize),
    strings: (usize, usize),
}

impl Header {
    fn parse(btf: &[u8]) -> Result<Self, Error> {
        const MAGIC: u32 = 0xeb9f;
        if word(btf, 0)? & 0xffff != MAGIC {
            return Err(Error::Btf("wrong magic number"));
        }
        let length = word(btf, 4)?;
        let part = |at: usize| Ok(((length + word(btf, at)?) as usize, word(btf, at + 4)? as usize));
        Ok(Self {
            types: part(8)?,
            strings: part(16)?,
        })
    }
}

/// Bytes after the common part of a type.
fn extra_bytes(kind: u32, length: u32) -> Result<usize, Error> {
    let length = length as usize;
    Ok(match kind {
        1 | 14 | 17 => 4,               // INT, VAR, DECL_TAG
        3 => 12,                        // ARRAY
        4 | 5 | 15 | 19 => 12 * length, // STRUCT, UNION, DATASEC, ENUM64
        6 | 13 => 8 * length,           // ENUM, FUNC_PROTO
        2 | 7..=12 | 16 | 18 => 0,      // PTR, FWD, TYPEDEF, modifiers, FUNC, FLOAT, TYPE_TAG
        _ => return Err(Error::Btf("unknown kind of type")),
    })
}

fn section(btf: &[u8], (start, length): (usize, usize)) -> Result<&[u8], Error> {
    btf.get(start..start + length)
        .ok_or(Error::Btf("a section ends past the file"))
}

fn word(bytes: &[u8], at: usize) -> Result<u32, Error> {
    let bytes = bytes.get(at..at + 4).ok_or(Error::Btf("cut short"))?;
    Ok(u32::from_ne_bytes(bytes.try_into().expect("four bytes were taken")))
}

/// True if the string that starts at `offset` is `wanted`. Compared as text: tools may store one string as the end of another.
fn is_string_at(strings: &[u8], offset: u32, wanted: &str) -> bool {
    let rest = strings.get(offset as usize..).unwrap_or_default();
    rest.strip_prefix(wanted.as_bytes())
        .is_some_and(|rest| rest.first() == Some(&0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BTF with the types `int` (id 1), a struct of one member (id 2), and one function for each name (ids from 3).
    fn made_up_btf(functions: &[&str]) -> Vec<u8> {
        let mut strings = vec![0];
        let mut types: Vec<u32> = vec![0, 1 << 24, 4, 32, 0, 4 << 24 | 1, 4, 0, 1, 0];
        for name in functions {
            types.extend([strings.len() as u32, 12 << 24, 1]);
            strings.extend(name.bytes().chain([0]));
        }
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let header = [
            0x0001_eb9f,
            24,
            0,
            types.len() as u32,
            types.len() as u32,
            strings.len() as u32,
        ];
        header
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .chain(types)
            .chain(strings)
            .collect()
    }

    #[test]
    fn functions_are_found_by_whole_name() {
        let btf = made_up_btf(&["xbpf_ct_release", "bpf_ct_release", "bpf_ct_release_more"]);
        assert_eq!(
            function_ids(&btf, &["bpf_ct_release", "absent"]).unwrap(),
            [Some(4), None]
        );
    }

    #[test]
    fn btf_cut_anywhere_is_an_error_or_empty_never_a_panic() {
        let btf = made_up_btf(&["bpf_ct_release"]);
        for length in 0..btf.len() {
            assert!(
                function_ids(&btf[..length], &["bpf_ct_release"]).is_err(),
                "cut at {length}"
            );
        }
    }

    #[test]
    fn markers_become_calls_or_null() {
        let marker = [0x85, 0x20, 0, 0, 2, 0x4b, 0xfc, 0x7a];
        assert_eq!(marked(&marker), Some(1));
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
