//! `cargo xtask verify`: has the kernel check every program of the BPF object, and prints what each costs it. Loads
//! programs and drops them again; attaches and pins nothing.

use std::{fs, process::Stdio};

use anyhow::{Context as _, Result, bail};
use aya::{
    EbpfLoader,
    programs::{Program, ProgramInfo},
};

use crate::{
    build, lint, need, object_file, privilege,
    toolchain::{self, Choice},
    workspace,
};

/// The kernel's own limit (BPF_COMPLEXITY_LIMIT_INSNS).
const KERNEL_LIMIT: u32 = 1_000_000;
/// Our limits on the instructions that the kernel goes through to check a program, by the beginning of its name; the first
/// that fits counts. They lie well above what was measured, and are there so that growth is seen and decided upon.
const LIMITS: [(&str, u32); 1] = [("", 200_000)];

/// What the kernel says of one program.
struct Row {
    name: String,
    kind: String,
    /// Instructions after the kernel's rewriting.
    instructions: u32,
    verified: u32,
    jited_bytes: u32,
    limit: u32,
}

/// Checks, loads and prints every program; as root, or by sudo.
///
/// Errors: a panic path or a byte-wise copy in the object, a program the kernel refuses, or one above its limit.
pub fn run() -> Result<()> {
    need::ensure(&build::NEEDS)?;
    build::object(&toolchain::ensure(Choice::Auto)?)?;
    if !nix::unistd::geteuid().is_root() {
        return again_as_root();
    }
    load()
}

/// The part of [`run`] that wants root.
pub fn load() -> Result<()> {
    let bytes =
        fs::read(workspace::bpf_object()).context("cannot read the BPF object: `cargo xtask build` makes it")?;
    lint::refuse("the BPF object", object_file::complaints(&bytes)?)?;
    let mut rows = load_all(&bytes)?;
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    print!("{}", table(&rows));
    let above = rows.iter().filter(|row| row.verified > row.limit);
    lint::refuse(
        "above the limit",
        above.map(|row| format!("{}: {} > {}", row.name, row.verified, row.limit)),
    )
}

fn again_as_root() -> Result<()> {
    privilege::ensure("cargo xtask lint")?;
    let xtask = std::env::current_exe().context("the path of this program is not known")?;
    let root = (
        "CARGO_MANIFEST_DIR",
        workspace::root().join("xtask").display().to_string(),
    );
    let target = ("CARGO_TARGET_DIR", workspace::target().display().to_string());
    privilege::as_root(&xtask, [root, target])
        .arg("verify-load")
        .stdin(Stdio::null())
        .run()
}

fn load_all(bytes: &[u8]) -> Result<Vec<Row>> {
    let mut ebpf = EbpfLoader::new()
        .load(bytes)
        .context("the object's maps cannot be made")?;
    ebpf.programs_mut()
        .map(|(name, program)| load_one(name, program))
        .collect()
}

fn load_one(name: &str, program: &mut Program) -> Result<Row> {
    let loaded = match program {
        Program::Xdp(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SockOps(program) => program.load(),
        other => bail!("{name}: a program of type {:?} is not known here", other.prog_type()),
    };
    loaded.with_context(|| format!("the kernel refuses {name}"))?;
    let kind = format!("{:?}", program.prog_type());
    row(name, kind, &program.info()?)
}

fn row(name: &str, kind: String, info: &ProgramInfo) -> Result<Row> {
    let bytes = info
        .size_translated()
        .context("this kernel does not tell a program's size")?;
    Ok(Row {
        name: name.to_owned(),
        kind,
        instructions: bytes / 8,
        verified: info
            .verified_instruction_count()
            .context("this kernel does not tell verified instructions")?,
        jited_bytes: info.size_jitted(),
        limit: limit(name),
    })
}

fn limit(name: &str) -> u32 {
    LIMITS
        .iter()
        .find(|(start, _)| name.starts_with(start))
        .map_or(KERNEL_LIMIT, |(_, limit)| *limit)
}

fn table(rows: &[Row]) -> String {
    let head = ["program", "type", "instructions", "verified", "jited bytes", "limit"].map(String::from);
    let cells = |row: &Row| {
        let numbers = [row.instructions, row.verified, row.jited_bytes, row.limit].map(|number| number.to_string());
        let [instructions, verified, jited, limit] = numbers;
        [row.name.clone(), row.kind.clone(), instructions, verified, jited, limit]
    };
    let lines: Vec<_> = std::iter::once(head).chain(rows.iter().map(cells)).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or_default();
    let widths: [usize; 6] = std::array::from_fn(width);
    let text = |line: &[String; 6]| {
        let cell = |(column, cell): (usize, &String)| match column {
            0 | 1 => format!("{cell:<width$}", width = widths[column]),
            _ => format!("{cell:>width$}", width = widths[column]),
        };
        line.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ") + "\n"
    };
    lines.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_lines_up_names_left_and_numbers_right() {
        let row = |name: &str, verified| Row {
            name: name.into(),
            kind: "Xdp".into(),
            instructions: 10,
            verified,
            jited_bytes: 80,
            limit: limit(name),
        };
        let text = table(&[row("a", 7), row("longer_name", 123_456)]);
        let lengths: Vec<_> = text.lines().map(str::len).collect();
        assert_eq!(lengths.len(), 3);
        assert!(lengths.iter().all(|length| *length == lengths[0]), "{text}");
        assert!(text.contains("\na            Xdp"), "{text}");
    }

    #[test]
    fn no_limit_is_above_the_kernels() {
        assert!(LIMITS.iter().all(|(_, limit)| *limit <= KERNEL_LIMIT));
    }
}
