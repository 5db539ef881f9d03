//! What can be said about the BPF object without the kernel: symbols and calls. Reads bytes; loads nothing.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex, SectionKind, SymbolKind,
};

/// `call` in the eBPF instruction set (RFC 9669, section 4.3).
const CALL: u8 = 0x85;
/// The source register of a call that goes to another function of the same object: BPF_PSEUDO_CALL.
const TO_FUNCTION: u8 = 1;
const INSTRUCTION_LEN: usize = 8;

/// The functions that copy or clear memory byte by byte, at a cost of 15 % per packet where they are called.
const BYTE_LOOPS: [&str; 5] = ["memset", "memcpy", "memmove", "memcmp", "bcmp"];

/// Complaints about the object, each a line for a reader; none if it is fit to be loaded.
///
/// Errors: the bytes are no ELF file.
pub fn complaints(bytes: &[u8]) -> Result<BTreeSet<String>> {
    let file = object::File::parse(bytes).context("the BPF object is no ELF file")?;
    let mut found = panics(&file);
    found.extend(byte_loop_calls(&file)?);
    Ok(found)
}

/// A program that can reach a panic does not load: its last instruction is neither exit nor jump.
fn panics(file: &object::File<'_>) -> BTreeSet<String> {
    let names = file.symbols().filter_map(|symbol| symbol.name().ok().map(str::to_owned));
    let panicking = names.filter(|name| name.contains("panicking"));
    panicking.map(|name| format!("panic path: {name}")).collect()
}

fn byte_loop_calls(file: &object::File<'_>) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
        for (at, call) in calls(section.data()?) {
            let Some(callee) = callee(file, &section, at, call) else {
                continue;
            };
            let caller = function_at(file, section.index(), at).unwrap_or_else(|| "?".into());
            // memcmp calling bcmp and the like is not our program's doing.
            if BYTE_LOOPS.contains(&callee.as_str()) && !BYTE_LOOPS.contains(&caller.as_str()) {
                found.insert(format!("byte-wise copy: {caller} (section {}) calls {callee}", section.name()?));
            }
        }
    }
    Ok(found)
}

/// Offset and relative target of every call of a function of the object, in a section's bytes.
fn calls(code: &[u8]) -> impl Iterator<Item = (u64, i32)> {
    code.chunks_exact(INSTRUCTION_LEN).enumerate().filter_map(|(index, instruction)| {
        let is_call = instruction[0] == CALL && instruction[1] >> 4 == TO_FUNCTION;
        let relative = i32::from_le_bytes([instruction[4], instruction[5], instruction[6], instruction[7]]);
        is_call.then_some(((index * INSTRUCTION_LEN) as u64, relative))
    })
}

/// The name of the function that the call at offset `at` goes to.
///
/// A relocation names the function, or its section with the place in the instruction; without one the call stays within
/// its section. Places are counted in instructions, from the one after the call (relocation.rst of LLVM's BPF target).
fn callee(file: &object::File<'_>, section: &object::Section<'_, '_>, at: u64, relative: i32) -> Option<String> {
    let place = |base: u64| base.checked_add_signed((i64::from(relative) + 1) * INSTRUCTION_LEN as i64);
    let relocation = section.relocations().find(|(offset, _)| *offset == at);
    let Some((_, relocation)) = relocation else {
        return function_at(file, section.index(), place(at)?);
    };
    let RelocationTarget::Symbol(index) = relocation.target() else {
        return None;
    };
    let symbol = file.symbol_by_index(index).ok()?;
    match symbol.kind() {
        SymbolKind::Section => function_at(file, symbol.section_index()?, place(0)?),
        _ => symbol.name().ok().map(str::to_owned),
    }
}

fn function_at(file: &object::File<'_>, section: SectionIndex, at: u64) -> Option<String> {
    let is_there = |symbol: &object::Symbol<'_, '_>| {
        symbol.kind() == SymbolKind::Text
            && symbol.section_index() == Some(section)
            && (symbol.address()..symbol.address() + symbol.size().max(1)).contains(&at)
    };
    let symbol = file.symbols().find(is_there)?;
    symbol.name().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_functions_are_told_from_calls_of_helpers() {
        let helper = [CALL, 0, 0, 0, 5, 0, 0, 0];
        let function = [CALL, 0x10, 0, 0, 0xfe, 0xff, 0xff, 0xff];
        let code = [helper, function].concat();
        assert_eq!(calls(&code).collect::<Vec<_>>(), [(8, -2)]);
    }

    #[test]
    fn bytes_that_are_no_object_are_an_error() {
        assert!(complaints(b"not an object").is_err());
    }
}
