//! `cargo xtask test`: builds, runs every selected test binary, adds up what they say, looks for what they left behind,
//! and ends on one line with the counts. How binaries are found is in `cargo_test`, how output is read in `libtest`.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use anyhow::{Context as _, Result};

use crate::{
    Reported, build,
    cargo_test::{self, Names, Selection, TestBinary},
    control_plane::{self, Availability},
    image, leftover,
    libtest::{self, Counts, Outcome},
    machine,
    need::{self, Need},
    privilege,
    run::Cmd,
    toolchain::{self, Choice},
    workspace,
};

/// Arguments of `test`.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Only what needs no privilege.
    #[arg(long)]
    pub unit: bool,
    /// A suite, a package, a file of tests, or a part of the names of tests.
    pub name: Option<String>,
    /// Arguments for the test binaries, such as `--nocapture`.
    #[arg(last = true)]
    pub libtest: Vec<String>,
    /// Variables for the test binaries.
    #[arg(skip)]
    pub env: Vec<(&'static str, String)>,
    /// Checks that failed before; each counts as a failure.
    #[arg(skip)]
    pub failed_before: Vec<String>,
}

/// What the suites run.
pub const NEEDS: [Need; 9] = [
    Need::Program("ip", "iproute2"),
    Need::Program("tc", "iproute2"),
    Need::Program("nft", "nftables"),
    Need::Program("iptables", "iptables"),
    Need::Program("ethtool", "ethtool"),
    Need::Program("conntrack", "conntrack"),
    Need::Program("iperf3", "iperf3"),
    Need::Program("sysctl", "procps"),
    Need::Program("nsenter", "util-linux"),
];

/// What single suites run besides.
pub const NEEDS_OF_SUITES: [(&str, Need); 4] = [
    ("control-plane-deploy", Need::Program("runc", "runc")),
    ("control-plane-deploy", Need::Program("skopeo", "skopeo")),
    ("datapath", Need::Program("systemd-analyze", "systemd")),
    ("page", Need::Program("chromium", "chromium fonts-dejavu-core")),
];

/// How the names of the suites begin that want the real Kubernetes control plane.
const CONTROL_PLANE_SUITES: &str = "control-plane";

/// The suite that runs the container image.
const IMAGE_SUITE: &str = "control-plane-deploy";

/// Runs the tests; the last line printed holds the counts.
///
/// Errors: a test failed or none ran, which has been reported by then.
pub fn run(args: &Args) -> Result<()> {
    let mut report = Report::default();
    args.failed_before.iter().for_each(|name| report.add_failure(name));
    if let Err(error) = run_selected(args, &mut report) {
        eprintln!("error: {error:#}");
        report.add_failure("the run itself");
    }
    report.print();
    if report.counts.is_success() { Ok(()) } else { Err(Reported.into()) }
}

fn run_selected(args: &Args, report: &mut Report) -> Result<()> {
    let names = Names::look()?;
    let selection = names.select(args.unit, args.name.as_deref())?;
    prepare(&selection, args.unit)?;
    let binaries = cargo_test::build(&selection)?;
    let mut libtest_args = args.libtest.clone();
    if let Selection::Filter(filter) = &selection {
        libtest_args.insert(0, filter.clone());
    }
    let (suites, units): (Vec<_>, Vec<_>) = binaries.into_iter().partition(|binary| binary.is_privileged);
    let suites = if args.unit { Vec::new() } else { suites };

    let runner = Runner { args: libtest_args, env: args.env.clone() };
    for binary in &units {
        report.add(&binary.label(), runner.run(binary, Vec::new())?);
    }
    for package in names.documented(&selection) {
        report.add(&format!("{package}/documentation"), runner.run_documentation(package)?);
    }
    run_suites(&runner, &suites, report)
}

/// Makes sure of what the selection needs before anything is run.
fn prepare(selection: &Selection, is_unit: bool) -> Result<()> {
    need::ensure(&build::NEEDS)?;
    match selection {
        // These two embed no BPF object.
        Selection::Package(name) if name == "proxy-common" || name == "xtask" => Ok(()),
        Selection::Unit | Selection::Package(_) | Selection::File(..) => {
            build::object(&toolchain::ensure(Choice::Auto)?)
        }
        Selection::Filter(_) if is_unit => build::object(&toolchain::ensure(Choice::Auto)?),
        Selection::All | Selection::Suite(_) | Selection::Filter(_) => {
            ensure_suites_can_run()?;
            build::run(&build::Args::default())
        }
    }
}

/// Everything is there that suites, demo and measurements run.
pub fn ensure_suites_can_run() -> Result<()> {
    privilege::ensure("cargo xtask test --unit")?;
    machine::ensure()?;
    need::ensure(&NEEDS)
}

fn run_suites(runner: &Runner, suites: &[TestBinary], report: &mut Report) -> Result<()> {
    let before = leftover::look();
    for suite in suites {
        let listed = runner.list(suite)?;
        if listed == 0 {
            continue;
        }
        // What one suite lacks is no reason not to run the others.
        match suite_env(suite) {
            Ok(Ok(env)) => report.add(&suite.label(), runner.run(suite, env)?),
            Ok(Err(why)) => report.skip(&suite.label(), listed, &why),
            Err(error) => {
                eprintln!("error: {error:#}");
                report.add_failure(&suite.label());
            }
        }
    }
    for left in leftover::look().difference(&before) {
        report.add_failure(&format!("left behind: {left}"));
    }
    Ok(())
}

/// The variables a suite wants, or why it cannot be run here.
fn suite_env(suite: &TestBinary) -> Result<Result<Vec<(&'static str, String)>, String>> {
    let mut env = suite_vars();
    let needs: Vec<_> = NEEDS_OF_SUITES.into_iter().filter(|(name, _)| *name == suite.target).collect();
    need::ensure(&needs.into_iter().map(|(_, need)| need).collect::<Vec<_>>())?;
    if suite.target.starts_with(CONTROL_PLANE_SUITES) {
        match control_plane::ensure()? {
            Availability::Ready { bin_dir } => env.push(("SHUNT_CONTROL_PLANE_BIN", bin_dir.display().to_string())),
            Availability::Missing { why } => return Ok(Err(why)),
        }
    }
    if suite.target == IMAGE_SUITE {
        image::run(&image::Args::default())?;
        env.push(("SHUNT_IMAGE", workspace::image().display().to_string()));
    }
    Ok(Ok(env))
}

/// The variables that tell the harness what was built.
pub fn suite_vars() -> Vec<(&'static str, String)> {
    let shunt = ("SHUNT_BIN", workspace::shunt().display().to_string());
    vec![shunt, ("SHUNT_BPF_OBJECT", workspace::bpf_object().display().to_string())]
}

/// Runs test binaries with the same arguments.
struct Runner {
    args: Vec<String>,
    env: Vec<(&'static str, String)>,
}

impl Runner {
    /// The number of tests that the arguments leave in the binary.
    fn list(&self, binary: &TestBinary) -> Result<usize> {
        let list = Cmd::new(&binary.path).args(&self.args).args(["--list", "--format", "terse"]);
        Ok(libtest::count_listed(&list.read()?))
    }

    /// Runs a binary in its package's directory, as cargo would; a suite as root.
    fn run(&self, binary: &TestBinary, env: Vec<(&'static str, String)>) -> Result<Outcome> {
        let env = env.into_iter().chain(self.env.iter().cloned());
        let cmd = if binary.is_privileged { privilege::as_root(&binary.path, env) } else { plain(binary, env) };
        let dir = if binary.package == "shunt-tests" { "tests" } else { &binary.package };
        stream(cmd.args(&self.args).dir(workspace::root().join(dir)))
    }

    /// Has rustdoc compile and run the examples of a package's documentation.
    fn run_documentation(&self, package: &str) -> Result<Outcome> {
        stream(Cmd::new("cargo").args(["test", "--quiet", "--doc", "--package", package]).dir(workspace::root()))
    }
}

fn plain(binary: &TestBinary, env: impl Iterator<Item = (&'static str, String)>) -> Cmd {
    env.fold(Cmd::new(&binary.path), |cmd, (name, value)| cmd.env(name, value))
}

/// Runs a test process to its end, without input; prints its lines as they come, and counts.
fn stream(cmd: Cmd) -> Result<Outcome> {
    let mut child = cmd.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().expect("standard output was asked to be a pipe");
    let mut reader = libtest::Reader::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("a test's output cannot be read")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        reader.line(&line);
    }
    Ok(reader.finish(child.wait()?.success()))
}

/// What all binaries together say.
#[derive(Default)]
struct Report {
    counts: Counts,
    failed: Vec<String>,
    skipped: Vec<String>,
}

impl Report {
    fn add(&mut self, label: &str, outcome: Outcome) {
        self.counts = self.counts.plus(outcome.counts);
        self.failed.extend(outcome.failed.into_iter().map(|name| format!("{label}: {name}")));
    }

    fn add_failure(&mut self, what: &str) {
        self.counts.failed += 1;
        self.failed.push(what.to_owned());
    }

    fn skip(&mut self, label: &str, tests: usize, why: &str) {
        self.counts.skipped += tests;
        self.skipped.push(format!("{label} ({tests} tests): {why}"));
    }

    fn print(&self) {
        for (title, lines) in [("skipped:", &self.skipped), ("failed:", &self.failed)] {
            if !lines.is_empty() {
                println!("\n{title}\n  {}", lines.join("\n  "));
            }
        }
        println!("\n{}", self.counts);
    }
}
