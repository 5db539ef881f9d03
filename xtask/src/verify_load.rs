//! `verify-load OBJECT`: brings every program of a BPF object into the kernel by the agent's own loader and prints what
//! each costs. What it pins lies on a file system that only this process sees, and goes with it; nothing is attached.

use std::{collections::BTreeMap, env, fs, os::fd::AsRawFd as _, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use aya::programs::{ProgramInfo, loaded_programs};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use object::{Object as _, ObjectSymbol as _, SymbolKind};
use proxy_userspace::datapath::{
    kernel::{self, Programs, Sizes},
    pins::Pins,
};

/// Limits on the instructions that the kernel goes through to check a program, by the program's type. They are twice what
/// was measured on Linux 6.18, so that growth is seen and decided upon; the kernel's own limit is a million.
const LIMITS: [(&str, u32); 3] = [("cgroup_sock_addr", 45_000), ("sched_cls", 150_000), ("xdp", 380_000)];
/// Capacities are no part of what is checked: small ones load fast.
const SIZES: Sizes = Sizes { services: 1024, backends: 1024, flows: 1024 };

/// How much of a long message is shown.
const FIRST_LINES: usize = 3;
const LAST_LINES: usize = 40;

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

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", ends(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let object = env::args_os().nth(1).context("usage: verify-load OBJECT")?;
    let bytes = fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    let pins = private_pins()?;
    let loaded = kernel::load(&bytes, &pins, &SIZES)?;
    for kfunc in &loaded.missing_kfuncs {
        println!("this kernel has no {}: the programs are checked without it", kfunc.name);
    }
    let rows = rows(&bytes, &loaded.programs)?;
    print!("{}", table(&rows));
    let above: Vec<_> = rows.iter().filter(|row| row.verified > row.limit).map(|row| row.name.as_str()).collect();
    if !above.is_empty() {
        bail!("above the limit of {}: {}", file!(), above.join(", "));
    }
    Ok(())
}

/// The text's beginning and end: what a verifier says in between can be a million lines.
fn ends(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let Some(left_out) = lines.len().checked_sub(FIRST_LINES + LAST_LINES).filter(|count| *count > 0) else {
        return text.to_owned();
    };
    let (first, last) = (&lines[..FIRST_LINES], &lines[FIRST_LINES + left_out..]);
    format!("{}\n... {left_out} lines ...\n{}", first.join("\n"), last.join("\n"))
}

/// A pin directory on a BPF file system of a mount namespace that ends with this process.
fn private_pins() -> Result<Pins> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace: root is needed")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make mounts private")?;
    mount(Some("tmpfs"), "/mnt", Some("tmpfs"), MsFlags::empty(), none).context("cannot mount at /mnt")?;
    let pins = Pins::new("/mnt/shunt");
    pins.prepare()?;
    Ok(pins)
}

fn rows(object: &[u8], programs: &Programs) -> Result<Vec<Row>> {
    let mut infos = BTreeMap::new();
    for info in loaded_programs() {
        let info = info.context("the kernel's programs cannot be listed")?;
        infos.insert(info.id(), info);
    }
    let row = |name: String| {
        let fd = programs.get(&name)?;
        let info = infos.get(&program_id(fd.as_raw_fd())?).context("a loaded program is not among the kernel's")?;
        row(&name, info)
    };
    names(object)?.into_iter().map(row).collect()
}

/// The names of the object's programs: the functions outside `.text`, which holds what they call.
fn names(object: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(object).context("the BPF object is no ELF file")?;
    let text = file.section_by_name(".text").map(|section| object::ObjectSection::index(&section));
    let is_program =
        |symbol: &object::Symbol<'_, '_>| symbol.kind() == SymbolKind::Text && symbol.section_index() != text;
    let names = file.symbols().filter(is_program).filter_map(|symbol| symbol.name().ok().map(str::to_owned));
    let mut names: Vec<_> = names.filter(|name| !name.is_empty()).collect();
    names.sort();
    Ok(names)
}

/// The kernel's id of the program behind a descriptor of ours.
fn program_id(fd: i32) -> Result<u32> {
    let info = fs::read_to_string(Path::new("/proc/self/fdinfo").join(fd.to_string()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("prog_id:"));
    id.and_then(|id| id.trim().parse().ok()).context("the kernel does not tell a program's id")
}

fn row(name: &str, info: &ProgramInfo) -> Result<Row> {
    let bytes = info.size_translated().context("this kernel does not tell a program's size")?;
    let kind = format!("{:?}", info.program_type()).trim_start_matches("BPF_PROG_TYPE_").to_lowercase();
    Ok(Row {
        name: name.to_owned(),
        limit: limit(&kind).with_context(|| format!("programs of type {kind} have no limit in {}", file!()))?,
        kind,
        instructions: bytes / 8,
        verified: info.verified_instruction_count().context("this kernel does not tell verified instructions")?,
        jited_bytes: info.size_jitted(),
    })
}

fn limit(kind: &str) -> Option<u32> {
    LIMITS.iter().find(|(known, _)| *known == kind).map(|(_, limit)| *limit)
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
            kind: "xdp".into(),
            instructions: 10,
            verified,
            jited_bytes: 80,
            limit: 1000,
        };
        let text = table(&[row("a", 7), row("longer_name", 123_456)]);
        let lengths: Vec<_> = text.lines().map(str::len).collect();
        assert_eq!(lengths.len(), 3);
        assert!(lengths.iter().all(|length| *length == lengths[0]), "{text}");
        assert!(text.contains("\na            xdp"), "{text}");
    }

    #[test]
    fn long_messages_keep_their_ends() {
        let text: Vec<_> = (0..100).map(|line| line.to_string()).collect();
        let short = ends(&text.join("\n"));
        assert!(short.starts_with("0\n1\n2\n... 57 lines ...\n60\n") && short.ends_with("\n99"), "{short}");
        assert_eq!(ends("a\nb"), "a\nb");
    }
}
