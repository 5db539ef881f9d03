//! What a command cannot do without: looks for it, installs it where that can be done unasked (root with apt, or a
//! component of rustup), and otherwise says exactly what to type. Knows nothing of what the needs are for.

use std::path::Path;

use anyhow::{Result, bail};

use crate::run::{self, Cmd};

/// One thing a command cannot do without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// A program, and the Debian packages that bring it, separated by blanks.
    Program(&'static str, &'static str),
    /// A file, and the Debian packages that bring it, separated by blanks.
    File(String, String),
    /// A cargo subcommand, and the component of rustup it comes in.
    Component(&'static str, &'static str),
}

/// The ways this machine lets us install things.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// We may install packages.
    pub is_root: bool,
    /// There is apt.
    pub has_apt: bool,
    /// There is rustup.
    pub has_rustup: bool,
}

/// One act that makes up for what is missing.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// A command we run ourselves.
    Run(Vec<String>),
    /// What the reader is asked to do.
    Ask(String),
}

impl Host {
    /// The machine we run on.
    pub fn look() -> Self {
        Self {
            is_root: nix::unistd::geteuid().is_root(),
            has_apt: run::find_program("apt-get").is_some(),
            has_rustup: run::find_program("rustup").is_some(),
        }
    }
}

impl Need {
    fn is_met(&self) -> bool {
        match self {
            Self::Program(name, _) | Self::Component(name, _) => run::find_program(name).is_some(),
            Self::File(path, _) => Path::new(path).exists(),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Program(name, _) | Self::Component(name, _) => name,
            Self::File(path, _) => path,
        }
    }

    fn packages(&self) -> Option<&str> {
        match self {
            Self::Program(_, packages) => Some(packages),
            Self::File(_, packages) => Some(packages),
            Self::Component(..) => None,
        }
    }

    fn component(&self) -> Option<&str> {
        match self {
            Self::Component(_, component) => Some(component),
            _ => None,
        }
    }
}

/// Every need is met when this returns.
///
/// Errors: something is missing and could not be installed; the text says what to type.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|need| need.name()).collect();
    run::say(&format!("missing: {}", names.join(", ")));
    take(plan(&missing, Host::look()))?;
    match self::missing(needs).first() {
        Some(need) => bail!("`{}` is still missing after its installation", need.name()),
        None => Ok(()),
    }
}

/// The needs that are not met.
pub fn missing(needs: &[Need]) -> Vec<Need> {
    needs.iter().filter(|need| !need.is_met()).cloned().collect()
}

/// Runs the steps that can be run. Errors: one fails, or some are the reader's to do; those are listed.
pub fn take(steps: Vec<Step>) -> Result<()> {
    let mut asked = Vec::new();
    for step in steps {
        match step {
            Step::Run(words) => command(&words).run()?,
            Step::Ask(text) => asked.push(text),
        }
    }
    if !asked.is_empty() {
        bail!("please type this, then try again:\n  {}", asked.join("\n  "));
    }
    Ok(())
}

fn command(words: &[String]) -> Cmd {
    let (program, args) = words.split_first().expect("a step names its program");
    let cmd = Cmd::new(program).args(args);
    if program == "apt-get" { cmd.env("DEBIAN_FRONTEND", "noninteractive") } else { cmd }
}

/// The steps that install what is missing: packages in one go, after a fresh package list.
pub fn plan(missing: &[Need], host: Host) -> Vec<Step> {
    let mut packages: Vec<_> = missing.iter().filter_map(Need::packages).flat_map(str::split_whitespace).collect();
    packages.sort_unstable();
    packages.dedup();
    let components: Vec<_> = missing.iter().filter_map(Need::component).collect();

    let mut steps = Vec::new();
    if !packages.is_empty() {
        steps.extend(install_packages(&packages, host));
    }
    if !components.is_empty() {
        let words: Vec<_> = ["rustup", "component", "add"].iter().chain(&components).map(|w| w.to_string()).collect();
        let ask = || Step::Ask(format!("install from your distribution: {}", components.join(" ")));
        steps.push(if host.has_rustup { Step::Run(words) } else { ask() });
    }
    steps
}

fn install_packages(packages: &[&str], host: Host) -> Vec<Step> {
    let list = packages.join(" ");
    if !host.has_apt {
        return vec![Step::Ask(format!("install with your package manager what Debian calls: {list}"))];
    }
    if !host.is_root {
        let install = format!("sudo apt-get update && sudo apt-get install -y --no-install-recommends {list}");
        return vec![Step::Ask(install)];
    }
    let update = vec!["apt-get".into(), "update".into()];
    let mut install: Vec<String> = ["apt-get", "install", "-y", "--no-install-recommends"].map(Into::into).into();
    install.extend(packages.iter().map(|p| p.to_string()));
    vec![Step::Run(update), Step::Run(install)]
}

/// Whether apt knows a package of this name, as far as its present lists say.
pub fn apt_offers(package: &str) -> bool {
    run::find_program("apt-cache").is_some() && Cmd::new("apt-cache").args(["show", package]).succeeds()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Host = Host { is_root: true, has_apt: true, has_rustup: true };
    const USER: Host = Host { is_root: false, ..ROOT };

    fn words(text: &str) -> Step {
        Step::Run(text.split(' ').map(Into::into).collect())
    }

    #[test]
    fn root_installs_each_package_once_after_an_update() {
        let missing =
            [Need::Program("nft", "nftables"), Need::Program("ip", "iproute2"), Need::Program("tc", "iproute2")];
        let install = "apt-get install -y --no-install-recommends iproute2 nftables";
        assert_eq!(plan(&missing, ROOT), [words("apt-get update"), words(install)]);
    }

    #[test]
    fn others_are_told_the_sudo_line() {
        let steps = plan(&[Need::Program("nft", "nftables")], USER);
        let line = "sudo apt-get update && sudo apt-get install -y --no-install-recommends nftables";
        assert_eq!(steps, [Step::Ask(line.into())]);
    }

    #[test]
    fn components_come_from_rustup_without_root() {
        let missing = [Need::Component("cargo-clippy", "clippy"), Need::Component("cargo-fmt", "rustfmt")];
        assert_eq!(plan(&missing, USER), [words("rustup component add clippy rustfmt")]);
        let bare = Host { has_rustup: false, ..USER };
        assert_eq!(plan(&missing, bare), [Step::Ask("install from your distribution: clippy rustfmt".into())]);
    }

    #[test]
    fn nothing_missing_needs_no_step() {
        assert_eq!(plan(&[], ROOT), []);
    }

    #[test]
    fn what_cannot_be_run_is_asked_for_in_the_error() {
        let error = take(vec![Step::Ask("sudo make coffee".into())]).expect_err("there is something to ask");
        assert!(format!("{error:#}").contains("sudo make coffee"));
    }
}
