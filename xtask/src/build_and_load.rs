//! `cargo xtask build-and-load`: the agent as it is, on this machine or in one of its network namespaces. What the agent
//! leaves pinned stays, by design; this says what it is and how to remove it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::{
    build, namespace, privilege,
    run::{self, Cmd},
    toolchain::Choice,
    workspace,
};

/// The agent's default for its pinned things.
const DEFAULT_BPFFS: &str = "/sys/fs/bpf/shunt";
/// The agent's arguments that name a source, or a file that may.
const SOURCES: [&str; 6] = ["--manifests", "--kubernetes", "--kubeconfig", "--consul", "--registry", "--config"];

/// Arguments of `build-and-load`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run in this network namespace, one of `ip netns list`.
    #[arg(long, value_name = "NAME")]
    netns: Option<String>,
    /// The compiler for the eBPF crate.
    #[arg(long, value_enum, default_value_t)]
    toolchain: Choice,
    /// Run what was built last.
    #[arg(long, hide = true)]
    no_build: bool,
    /// Arguments for `shunt agent`; without a source among them: `--manifests examples`.
    #[arg(last = true)]
    agent: Vec<String>,
}

/// Builds and runs the agent until it ends.
///
/// Errors: the build fails, or the agent does.
pub fn run(args: &Args) -> Result<()> {
    if !args.no_build {
        build::run(&build::Args { toolchain: args.toolchain, ..Default::default() })?;
    }
    if !nix::unistd::geteuid().is_root() {
        return again_as_root(args);
    }
    let agent = agent_args(&args.agent, &workspace::root());
    let cmd = Cmd::new(workspace::shunt()).arg("agent").args(&agent);
    let status = namespace::run(cmd, args.netns.as_deref())?;
    tell_what_stays(bpffs(&agent), args.netns.as_deref());
    if !status.success() {
        bail!("`shunt agent` ended: {status}; its last lines above say why");
    }
    Ok(())
}

fn again_as_root(args: &Args) -> Result<()> {
    privilege::ensure("cargo xtask test --unit")?;
    let xtask = std::env::current_exe().context("the path of this program is not known")?;
    let root = ("CARGO_MANIFEST_DIR", workspace::root().join("xtask").display().to_string());
    let target = ("CARGO_TARGET_DIR", workspace::target().display().to_string());
    let cmd = privilege::as_root(&xtask, [root, target]).args(["build-and-load", "--no-build"]);
    let cmd = args.netns.iter().fold(cmd, |cmd, name| cmd.args(["--netns", name]));
    let status = namespace::run(cmd.arg("--").args(&args.agent), None)?;
    if status.success() { Ok(()) } else { Err(crate::Reported.into()) }
}

/// The agent's arguments with a source among them.
fn agent_args(given: &[String], root: &Path) -> Vec<String> {
    let names = |arg: &String, name: &str| arg == name || arg.starts_with(&format!("{name}="));
    let has_source = given.iter().any(|arg| SOURCES.iter().any(|name| names(arg, name)));
    let mut args = given.to_vec();
    if !has_source {
        args.extend(["--manifests".into(), root.join("examples").display().to_string()]);
    }
    args
}

/// The directory of pinned things that the agent's arguments name.
fn bpffs(agent: &[String]) -> &str {
    let joined = agent.iter().find_map(|arg| arg.strip_prefix("--bpffs="));
    let apart = agent.iter().position(|arg| arg == "--bpffs").and_then(|at| agent.get(at + 1));
    joined.or(apart.map(String::as_str)).unwrap_or(DEFAULT_BPFFS)
}

fn tell_what_stays(bpffs: &str, netns: Option<&str>) {
    let pinned = count_files(Path::new(bpffs));
    if pinned == 0 {
        run::say(&format!("nothing stays pinned under {bpffs}"));
        return;
    }
    let enter = netns.map_or(String::new(), |name| format!("nsenter --net=/run/netns/{name} "));
    let other = if bpffs == DEFAULT_BPFFS { String::new() } else { format!(" --bpffs {bpffs}") };
    run::say(&format!(
        "{pinned} maps, programs and links stay pinned under {bpffs}: services go on working without the agent, and the \
         next agent adopts them.\nto remove them: sudo {enter}{} cleanup{other}",
        workspace::shunt().display()
    ));
}

fn count_files(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { count_files(&entry.path()) } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(Into::into).collect()
    }

    #[test]
    fn examples_are_the_source_unless_another_is_named() {
        let args = |given| agent_args(&words(given), Path::new("/src")).join(" ");
        assert_eq!(args(""), "--manifests /src/examples");
        assert_eq!(args("--node-name a"), "--node-name a --manifests /src/examples");
        assert_eq!(args("--manifests=/m"), "--manifests=/m");
        assert_eq!(args("--registry"), "--registry");
    }

    #[test]
    fn pin_directory_is_the_one_given_to_the_agent() {
        assert_eq!(bpffs(&words("--manifests m")), DEFAULT_BPFFS);
        assert_eq!(bpffs(&words("--bpffs /a")), "/a");
        assert_eq!(bpffs(&words("--bpffs=/b")), "/b");
    }
}
