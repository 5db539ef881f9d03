//! Rules about the source text that no compiler checks: where unsafe code lives, and that the links of its pages lead somewhere.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The homes of unsafe code, then the exceptions, as beginnings of paths.
const UNSAFE_HOMES: [&str; 7] = [
    "proxy-ebpf/",
    "proxy-common/src/abi",
    "proxy-userspace/src/datapath",
    // Maps in memory for the tests of the logic; their entries are handed out as the kernel's would be.
    "proxy-common/src/lb/world.rs",
    // What runs between fork and exec: entering a namespace, a control group.
    "tests/src/process.rs",
    // A socket option that no library reads.
    "tests/src/probe/tcp_info.rs",
    // A lease on a file, which holds up those who open it.
    "tests/serving/lease.rs",
];
/// What users read.
const PAGES: [&str; 3] = ["README.md", "deploy/README.md", "deploy/MIGRATION.md"];
const SOURCES: [&str; 5] = ["proxy-common", "proxy-ebpf", "proxy-userspace", "tests", "xtask"];

/// Every breach of a rule, each as a line for a reader.
///
/// Errors: a file of the source tree cannot be read.
pub fn breaches(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in rust_files(root)? {
        let name = file.strip_prefix(root).expect("found below the root").display().to_string();
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {name}"))?;
        if !UNSAFE_HOMES.iter().any(|home| name.starts_with(home)) {
            found.extend(unsafe_lines(&text).map(|line| format!("{name}:{line}: unsafe code outside its homes")));
        }
        if !text.starts_with("//!") {
            found.push(format!("{name}:1: does not open with `//!`: what it holds, what it may not touch"));
        }
    }
    for name in PAGES {
        let path = root.join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {name}"))?;
        let dir = path.parent().expect("a page is in a directory");
        let dead = links(&text).filter(|link| !dir.join(link).exists());
        found.extend(dead.map(|link| format!("{name}: the link to {link} leads nowhere")));
    }
    Ok(found)
}

fn rust_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut dirs: Vec<_> = SOURCES.iter().map(|dir| root.join(dir)).collect();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// The numbers of the lines that hold unsafe code; comments and the names of lints are none.
fn unsafe_lines(text: &str) -> impl Iterator<Item = usize> {
    let code = |line: &str| line.split("//").next().unwrap_or_default().to_owned();
    let is_unsafe = move |line: &str| {
        let line = code(line);
        ["{", "fn ", "impl ", "impl<", "extern ", "trait "]
            .iter()
            .any(|next| line.contains(&["unsafe ", next].concat()))
            || line.contains(&["#[unsafe", "("].concat())
    };
    text.lines().enumerate().filter(move |(_, line)| is_unsafe(line)).map(|(index, _)| index + 1)
}

/// The links of a Markdown text to files beside it.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    let files =
        targets.filter(|target| !target.contains("://")).map(|target| target.split('#').next().unwrap_or(target));
    files.filter(|file| !file.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_code_is_found_and_talk_about_it_is_not() {
        let word = "unsafe";
        let text = format!(
            "// {word} {{\nlet x = {word} {{ 1 }};\n{word}_op = 1\npub {word} fn f() {{}}\n#![forbid({word}_code)]"
        );
        assert_eq!(unsafe_lines(&text).collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn links_to_files_are_told_from_links_elsewhere() {
        let text = "[a](tests/a.md) [b](https://x.y/z) [c](#d) [e](Cargo.toml) [f](b.md#part)";
        assert_eq!(links(text).collect::<Vec<_>>(), ["tests/a.md", "Cargo.toml", "b.md"]);
    }
}
