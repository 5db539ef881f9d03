//! `shunt install` and `shunt uninstall`: this program as a service of systemd on a plain host.
//!
//! What belongs where is decided by [`places`]; the rest writes it, and tells systemd. May touch: the files named there,
//! `systemctl`.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::{ExampleFile, cleanup, print};
use crate::config::raw::DEFAULT_BPFFS;
use crate::datapath::pins::Pins;

/// The unit's text; it names the paths of [`places`].
const UNIT: &str = include_str!("../../../deploy/systemd/shunt.service");
/// The unit's name.
const UNIT_NAME: &str = "shunt.service";

/// What is installed, and where.
#[derive(Debug, Args)]
pub(super) struct InstallArgs {
    /// Install into the file system below this directory, which is not running: systemd is told nothing
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Start it at the next boot, not now
    #[arg(long)]
    no_start: bool,
}

/// What is removed, and where.
#[derive(Debug, Args)]
pub(super) struct UninstallArgs {
    /// Remove from the file system below this directory, which is not running
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Leave what is programmed in the kernel
    #[arg(long)]
    keep_services: bool,
    /// Where the agent pins, if its configuration names another directory
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    bpffs: PathBuf,
}

/// Where things are below a root.
struct Places {
    program: PathBuf,
    unit: PathBuf,
    /// The link by which the unit is started at boot.
    wanted: PathBuf,
    config: PathBuf,
    manifests: PathBuf,
}

fn places(root: &Path) -> Places {
    let units = root.join("etc/systemd/system");
    Places {
        program: root.join("usr/local/bin/shunt"),
        unit: units.join(UNIT_NAME),
        wanted: units.join("multi-user.target.wants").join(UNIT_NAME),
        config: root.join("etc/shunt/agent.yaml"),
        manifests: root.join("etc/shunt/manifests"),
    }
}

/// Writes program, unit and, if there is none, a configuration; then has systemd start it.
pub(super) fn install(args: &InstallArgs) -> Result<()> {
    let places = places(&args.root);
    let own = std::env::current_exe().context("the running program is not found")?;
    let program = fs::read(&own).with_context(|| format!("cannot read {}", own.display()))?;
    replace(&places.program, &program, 0o755)?;
    replace(&places.unit, UNIT.as_bytes(), 0o644)?;
    enable(&places.wanted)?;
    make_dir(&places.manifests)?;
    let is_new = !places.config.exists();
    if is_new {
        replace(&places.config, ExampleFile::Config.text().as_bytes(), 0o600)?;
    }
    if is_running(&args.root) {
        systemctl(&["daemon-reload"])?;
        if !args.no_start {
            // Also starts what does not run; an agent that runs is replaced, its services go on.
            systemctl(&["restart", UNIT_NAME])?;
        }
    }
    let config = places.config.display();
    let which = if is_new { "written, with services to be put into" } else { "kept; services may be put into" };
    print(&format!("{} is installed\n{config} is {which} {}\n", places.unit.display(), places.manifests.display()))
}

/// Stops the agent, takes everything out of the kernel unless it shall stay, and removes what [`install`] wrote but for the
/// configuration.
pub(super) fn uninstall(args: &UninstallArgs) -> Result<()> {
    let places = places(&args.root);
    let is_here = is_running(&args.root);
    if is_here && places.unit.exists() {
        systemctl(&["stop", UNIT_NAME])?;
    }
    if is_here && !args.keep_services {
        cleanup::run(&Pins::new(&args.bpffs), None)?;
    }
    for file in [&places.wanted, &places.unit, &places.program] {
        remove(file)?;
    }
    if is_here {
        systemctl(&["daemon-reload"])?;
    }
    print(&format!("removed; {} and what is beside it stay\n", places.config.display()))
}

/// Whether the file system below `root` is the one that runs.
fn is_running(root: &Path) -> bool {
    root == Path::new("/")
}

/// Makes `path` a file with this content and mode; whoever opens it gets the old one or the new one.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    make_dir(path.parent().expect("all our files are below a root"))?;
    let draft = path.with_extension("new");
    let write = || {
        remove_if_there(&draft)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Makes the link that `systemctl enable` makes, which a file system that does not run wants too.
fn enable(link: &Path) -> Result<()> {
    make_dir(link.parent().expect("the link is in a directory"))?;
    let make = || {
        remove_if_there(link)?;
        std::os::unix::fs::symlink(Path::new("/etc/systemd/system").join(UNIT_NAME), link)
    };
    make().with_context(|| format!("cannot make the link {}", link.display()))
}

fn make_dir(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.with_context(|| format!("cannot make the directory {}", path.display()))
}

fn remove(path: &Path) -> Result<()> {
    remove_if_there(path).with_context(|| format!("cannot remove {}", path.display()))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn systemctl(words: &[&str]) -> Result<()> {
    let shown = format!("systemctl {}", words.join(" "));
    let status = Command::new("systemctl").args(words).status().with_context(|| format!("cannot run `{shown}`"))?;
    ensure!(status.success(), "`{shown}`: {status}; `journalctl -u shunt` may say why");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_runs_what_is_installed_with_the_configuration_that_is_installed() {
        let places = places(Path::new("/"));
        let start = format!("ExecStart={} agent --config {}\n", places.program.display(), places.config.display());
        assert!(UNIT.contains(&start), "{UNIT}");
    }

    #[test]
    fn the_configuration_reads_the_folder_that_is_made() {
        let line = format!("manifests: {}\n", places(Path::new("/")).manifests.display());
        assert!(ExampleFile::Config.text().contains(&line), "{line}");
    }

    #[test]
    fn what_was_installed_is_removed_and_the_configuration_stays() {
        let root = tempfile::tempdir().expect("a directory for the test");
        let args = || InstallArgs { root: root.path().to_owned(), no_start: false };
        install(&args()).expect("a first time");
        let places = places(root.path());
        fs::write(&places.config, "mine").expect("the configuration is written");
        install(&args()).expect("a second time");
        assert_eq!(fs::read_to_string(&places.config).expect("it is there"), "mine");
        assert_eq!(fs::read_to_string(&places.unit).expect("it is there"), UNIT);
        assert!(places.wanted.is_symlink() && places.program.is_file());
        let undo = UninstallArgs { root: root.path().to_owned(), keep_services: false, bpffs: DEFAULT_BPFFS.into() };
        uninstall(&undo).expect("it is removed");
        uninstall(&undo).expect("nothing is left to remove");
        let left = [&places.wanted, &places.unit, &places.program].map(|path| path.is_symlink() || path.exists());
        assert_eq!(left, [false; 3]);
        assert_eq!(fs::read_to_string(&places.config).expect("it stays"), "mine");
    }
}
