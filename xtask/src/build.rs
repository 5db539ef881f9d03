//! `cargo xtask build`: the BPF object, then the one binary that carries it. Toolchain particulars are in `toolchain`.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    condense::Condenser,
    need::{self, Need},
    run::{self, Cmd},
    toolchain::{self, Choice, Toolchain},
    workspace,
};

/// Arguments of `build`.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// The compiler for the eBPF crate.
    #[arg(long, value_enum, default_value_t)]
    pub toolchain: Choice,
    /// Stop after the BPF object.
    #[arg(long)]
    pub bpf_only: bool,
}

/// What every build needs.
pub const NEEDS: [Need; 1] = [Need::Program("cc", "gcc libc6-dev")];

/// The BPF object, and `target/release/shunt`, are up to date.
pub fn run(args: &Args) -> Result<()> {
    need::ensure(&NEEDS)?;
    object(&toolchain::ensure(args.toolchain)?)?;
    if args.bpf_only {
        return Ok(());
    }
    let build = Cmd::new("cargo").args(["build", "--release", "--package", "proxy-userspace", "--bin", "shunt"]);
    build.dir(workspace::root()).hint("the compiler's message above says why").run()?;
    run::say(&format!("built {}", workspace::shunt().display()));
    Ok(())
}

/// The BPF object is up to date; its file is touched only if its bytes changed, so that nothing is rebuilt needlessly.
pub fn object(toolchain: &Toolchain) -> Result<()> {
    let mut condenser = Condenser::default();
    let result = toolchain.cargo("build").hint(toolchain::hint()).run_filtered(|line| condenser.keep(line));
    condenser.summary().iter().for_each(|line| run::say(line));
    result?;
    let built = workspace::bpf_target().join(toolchain::TARGET).join("release/shunt-bpf");
    replace_if_changed(&built, &workspace::bpf_object())
}

fn replace_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    // Renamed into place: a build that runs meanwhile sees the old object or the new one.
    let draft = to.with_extension("new");
    fs::write(&draft, new).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, to).with_context(|| format!("cannot write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_file_is_left_alone_when_nothing_changed() {
        let dir = std::env::temp_dir().join(format!("shunt-xtask-build-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a temporary directory can be made");
        let (from, to) = (dir.join("from"), dir.join("to.o"));
        fs::write(&from, b"one").expect("write");
        replace_if_changed(&from, &to).expect("first copy");
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).expect("metadata"));
        let first = inode(&to);
        replace_if_changed(&from, &to).expect("same content");
        assert_eq!(inode(&to), first);
        fs::write(&from, b"two").expect("write");
        replace_if_changed(&from, &to).expect("new content");
        assert_eq!(fs::read(&to).expect("read"), b"two");
        fs::remove_dir_all(&dir).expect("the temporary directory is ours");
    }
}
