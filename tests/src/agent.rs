//! The agent under test, on a node: started, killed, replaced; its state shown when a test fails.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::manifests::{Manifests, cluster_cidr};
use crate::place::Place;
use crate::process::{Command, Process};
use crate::topology::{Cluster, Node};

/// What the agent logs when the tables are as its sources want them for the first time.
const APPLIED: &str = "first plan applied";
/// The option of agents and commands by which the layout of the tables has another version.
pub const LAYOUT_VERSION: &str = "--layout-version";
/// The commands whose output is shown when a test fails.
const STATE: [&str; 4] = ["status", "services", "backends", "flows"];

/// The `shunt` program: `SHUNT_BIN`, else what `cargo xtask build` left in the target directory.
#[track_caller]
pub fn program() -> PathBuf {
    if let Some(program) = env::var_os("SHUNT_BIN") {
        return program.into();
    }
    let test = env::current_exe().expect("the path of the running program is known");
    let found = test.ancestors().map(|dir| dir.join("release/shunt")).find(|path| path.is_file());
    found.expect("target/release/shunt is not there: cargo xtask build")
}

/// An agent of a node, with a BPF file system and a control group of its own.
///
/// Dropped, it is killed; what it pinned goes with the test's directory, what it attached with the node.
#[derive(Debug)]
pub struct Agent {
    place: Place,
    program: PathBuf,
    args: Vec<OsString>,
    bpffs: PathBuf,
    socket: PathBuf,
    process: Option<Process>,
}

impl Agent {
    /// One that is not started yet and reads no source.
    #[track_caller]
    pub fn new(cluster: &Cluster, node: &Node) -> Self {
        let bpffs = cluster.bed.bpffs(&format!("bpf-{}", node.name())).join("shunt");
        let socket = cluster.bed.subdir(&format!("run-{}", node.name())).join("agent.sock");
        let cgroup = node.place.cgroup().expect("a node has a control group").dir();
        let agent = Self {
            place: node.place.clone(),
            program: program(),
            args: vec![],
            bpffs,
            socket: socket.clone(),
            process: None,
        };
        agent
            .with("--node-name", node.name())
            .with("--cluster-cidr", cluster_cidr())
            .with("--cgroup", cgroup)
            .with("--admin-socket", socket)
    }

    /// One that reads `manifests`, started and with its first plan applied.
    #[track_caller]
    pub fn start_on(cluster: &Cluster, node: &Node, manifests: &Manifests) -> Self {
        let mut agent = Self::new(cluster, node).with("--manifests", manifests.dir());
        agent.start();
        agent
    }

    /// With an option and its value.
    pub fn with(self, option: &str, value: impl Into<OsString>) -> Self {
        self.with_flag(option).with_flag(value)
    }

    /// With an argument.
    pub fn with_flag(mut self, flag: impl Into<OsString>) -> Self {
        self.args.push(flag.into());
        self
    }

    /// From the next start on, an option has this value.
    pub fn set(&mut self, option: &str, value: impl Into<OsString>) {
        match self.args.iter().position(|arg| arg == option) {
            Some(position) => self.args[position + 1] = value.into(),
            None => self.args.extend([option.into(), value.into()]),
        }
    }

    /// From the next start on, this program is run.
    pub fn set_program(&mut self, program: &Path) {
        self.program = program.to_owned();
    }

    /// Where it pins.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// Starts it and waits until its first plan is applied.
    #[track_caller]
    pub fn start(&mut self) {
        self.spawn();
        self.wait_log(APPLIED);
    }

    /// Starts it and returns at once.
    #[track_caller]
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "the agent of {} is running", self.place.name());
        let mut command = self.command("agent");
        command.args(&self.args);
        self.process = Some(Process::start(&format!("agent of {}", self.place.name()), command));
    }

    /// Its process; panics if it does not run.
    #[track_caller]
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("the agent was started")
    }

    /// Waits until it has logged a line that holds `text`, since its start.
    #[track_caller]
    pub fn wait_log(&self, text: &str) -> String {
        self.process().wait_line(0, &format!("the line {text:?}"), |line| line.contains(text).then(|| line.to_owned()))
    }

    /// Kills it as a crash does.
    #[track_caller]
    pub fn crash(&mut self) {
        self.process.take().expect("the agent was started").kill();
    }

    /// Ends it as an operator does and returns how it ended.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("the agent was started");
        process.signal(Signal::SIGTERM);
        process.wait()
    }

    /// How it ended by itself.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        self.process.take().expect("the agent was started").wait()
    }

    /// What a `shunt` subcommand prints on this node; panics if it fails.
    #[track_caller]
    pub fn shunt<const N: usize>(&self, words: [&str; N]) -> String {
        let mut command = self.command(words[0]);
        command.args(&words[1..]);
        // What the tables are called is for all to know.
        if let Some(position) = self.args.iter().position(|arg| arg == LAYOUT_VERSION) {
            command.args(&self.args[position..position + 2]);
        }
        self.place.ns().feed(command, "")
    }

    /// A `shunt` subcommand on this node that is not waited for.
    #[track_caller]
    pub fn spawn_shunt(&self, words: &[&str]) -> Process {
        let mut command = self.command(words[0]);
        command.args(&words[1..]);
        Process::start(&format!("shunt {} on {}", words[0], self.place.name()), command)
    }

    /// What the running agent says of itself, as `shunt status -o json` shows it.
    #[track_caller]
    pub fn report(&self) -> Value {
        let socket = self.socket.to_str().expect("paths of tests are text");
        let text = self.shunt(["status", "-o", "json", "--admin-socket", socket]);
        let status: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(status["report"].is_object(), "the agent was not asked: {text}");
        status["report"].clone()
    }

    fn command(&self, subcommand: &str) -> Command {
        let mut command = self.place.command(&self.program);
        command.arg(subcommand).arg("--bpffs").arg(&self.bpffs);
        command
    }

    /// Prints the log and all that is programmed.
    fn show(&self) {
        if let Some(process) = &self.process {
            eprintln!("{process}");
        }
        for subcommand in STATE {
            match self.command(subcommand).output() {
                Ok(output) => eprintln!(
                    "--- {} on {}\n{}{}",
                    subcommand,
                    self.place.name(),
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr)
                ),
                Err(error) => eprintln!("cannot run {}: {error}", self.program.display()),
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            self.show();
        }
    }
}
