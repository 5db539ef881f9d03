//! Two questions to the kernel's BTF: the id of a function, the offset of a field.
//!
//! A scan of the raw bytes: aya's parser would build all of 100,000 types for these few answers.
//! Layout: Documentation/bpf/btf.rst of the kernel, sections 2 and 3.
//! May touch: /sys/kernel/btf/vmlinux, for reading.

use std::fs;
use std::io;

const KERNEL: &str = "/sys/kernel/btf/vmlinux";
const KIND_STRUCT: u32 = 4;
const KIND_FUNC: u32 = 12;

/// Why the kernel's types cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// BTF whose structure is not understood.
    #[error("{KERNEL} is not readable: {0}")]
    Content(&'static str),
    /// The file.
    #[error("cannot read {KERNEL}")]
    Io(#[source] io::Error),
}

/// The answers about the running kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    functions: Vec<(String, u32)>,
    fields: Vec<(Field, u32)>,
}

/// A field of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name of the structure.
    pub structure: &'static str,
    /// Name of the field.
    pub field: &'static str,
}

impl Answers {
    /// Reads the kernel's own types; a kernel without BTF knows nothing.
    pub fn of_kernel(functions: &[&str], fields: &[Field]) -> Result<Self, Error> {
        match fs::read(KERNEL) {
            Ok(btf) => Self::find(&btf, functions, fields),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::Io(error)),
        }
    }

    /// True if any type, field or constant of the kernel bears this name; nothing where the kernel has no BTF.
    pub fn kernel_names(name: &str) -> Result<Option<bool>, Error> {
        match fs::read(KERNEL) {
            Ok(btf) => Sections::parse(&btf).map(|sections| Some(sections.has_string(name))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::Io(error)),
        }
    }

    /// BTF id of a function.
    pub fn function(&self, name: &str) -> Option<u32> {
        self.functions.iter().find(|(known, _)| known == name).map(|&(_, id)| id)
    }

    /// Offset of a field, in bytes.
    pub fn offset(&self, field: Field) -> Option<u32> {
        self.fields.iter().find(|(known, _)| *known == field).map(|&(_, offset)| offset)
    }

    fn find(btf: &[u8], functions: &[&str], fields: &[Field]) -> Result<Self, Error> {
        let sections = Sections::parse(btf)?;
        let mut answers = Self::default();
        let (mut position, mut id) = (0, 0);
        while position < sections.types.len() {
            id += 1;
            let found = sections.type_at(position)?;
            position += 12 + found.extra.len();
            match found.kind {
                KIND_FUNC => {
                    let wanted = functions.iter().find(|wanted| sections.is_string_at(found.name, wanted));
                    answers.functions.extend(wanted.map(|name| ((*name).to_owned(), id)));
                }
                KIND_STRUCT => {
                    for &field in fields.iter().filter(|wanted| sections.is_string_at(found.name, wanted.structure)) {
                        let offset = sections.member_offset(&found, field.field)?;
                        answers.fields.extend(offset.map(|offset| (field, offset)));
                    }
                }
                _ => {}
            }
        }
        Ok(answers)
    }
}

struct Sections<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

struct Type<'a> {
    name: u32,
    kind: u32,
    /// The `kind_flag` bit: offsets of members carry a bit-field size in their upper byte.
    flag: bool,
    extra: &'a [u8],
}

impl<'a> Sections<'a> {
    fn parse(btf: &'a [u8]) -> Result<Self, Error> {
        const MAGIC: u32 = 0xeb9f;
        if word(btf, 0)? & 0xffff != MAGIC {
            return Err(Error::Content("wrong magic number"));
        }
        let header = word(btf, 4)? as usize;
        let section = |at: usize| {
            let (start, length) = (header + word(btf, at)? as usize, word(btf, at + 4)? as usize);
            btf.get(start..start + length).ok_or(Error::Content("a section ends past the file"))
        };
        Ok(Self { types: section(8)?, strings: section(16)? })
    }

    fn type_at(&self, position: usize) -> Result<Type<'a>, Error> {
        let name = word(self.types, position)?;
        let info = word(self.types, position + 4)?;
        let (kind, length) = (info >> 24 & 0x1f, info & 0xffff);
        let start = position + 12;
        let extra = self.types.get(start..start + extra_bytes(kind, length)?).ok_or(Error::Content("cut short"))?;
        Ok(Type { name, kind, flag: info >> 31 == 1, extra })
    }

    /// Compared as text: tools may store one string as the end of another.
    fn is_string_at(&self, offset: u32, wanted: &str) -> bool {
        let rest = self.strings.get(offset as usize..).unwrap_or_default();
        rest.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// True for the end of a string too: tools may store one string as the end of another.
    fn has_string(&self, wanted: &str) -> bool {
        self.strings.split(|byte| *byte == 0).any(|string| string.ends_with(wanted.as_bytes()))
    }

    fn member_offset(&self, structure: &Type<'_>, name: &str) -> Result<Option<u32>, Error> {
        const MEMBER: usize = 12;
        for at in (0..structure.extra.len()).step_by(MEMBER) {
            if self.is_string_at(word(structure.extra, at)?, name) {
                let bits = word(structure.extra, at + 8)?;
                let bits = if structure.flag { bits & 0x00ff_ffff } else { bits };
                return Ok(Some(bits / 8));
            }
        }
        Ok(None)
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
        _ => return Err(Error::Content("unknown kind of type")),
    })
}

fn word(bytes: &[u8], at: usize) -> Result<u32, Error> {
    let bytes = bytes.get(at..at + 4).ok_or(Error::Content("cut short"))?;
    Ok(u32::from_ne_bytes(bytes.try_into().expect("four bytes were taken")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: Field = Field { structure: "nf_conn", field: "status" };

    /// BTF with `int` (id 1), `struct nf_conn { int mark; int status; }` (id 2), then one function for each name.
    fn made_up_btf(functions: &[&str]) -> Vec<u8> {
        let mut strings = b"\0nf_conn\0mark\0status\0".to_vec();
        let mut types: Vec<u32> = vec![0, 1 << 24, 4, 32];
        types.extend([1, 4 << 24 | 2, 8, 9, 1, 0, 14, 1, 32]);
        for name in functions {
            types.extend([strings.len() as u32, 12 << 24, 1]);
            strings.extend(name.bytes().chain([0]));
        }
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let header = [0x0001_eb9f, 24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        header.iter().flat_map(|word| word.to_ne_bytes()).chain(types).chain(strings).collect()
    }

    #[test]
    fn names_are_found_whatever_they_name() {
        let btf = made_up_btf(&["bpf_ct_release"]);
        let sections = Sections::parse(&btf).unwrap();
        assert!(sections.has_string("mark") && sections.has_string("bpf_ct_release"));
        assert!(!sections.has_string("bpf_ct") && !sections.has_string("absent"));
    }

    #[test]
    fn functions_and_fields_are_found_by_whole_name() {
        let btf = made_up_btf(&["xbpf_ct_release", "bpf_ct_release", "bpf_ct_release_more"]);
        let absent = Field { structure: "nf_conn", field: "stat" };
        let answers = Answers::find(&btf, &["bpf_ct_release", "absent"], &[STATUS, absent]).unwrap();
        assert_eq!(answers.function("bpf_ct_release"), Some(4));
        assert_eq!(answers.function("absent"), None);
        assert_eq!(answers.offset(STATUS), Some(4));
        assert_eq!(answers.offset(absent), None);
    }

    #[test]
    fn btf_cut_anywhere_is_an_error_never_a_panic() {
        let btf = made_up_btf(&["bpf_ct_release"]);
        for length in 0..btf.len() {
            assert!(Answers::find(&btf[..length], &["bpf_ct_release"], &[STATUS]).is_err(), "cut at {length}");
        }
    }
}
