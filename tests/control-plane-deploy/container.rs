//! Containers by runc, in a mount namespace that stands for a node: its mounts are its own, and it has no BPF file system.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;

use nix::sys::signal::Signal;
use serde_json::Value;
use shunt_tests::bed::Bed;
use shunt_tests::process::{Command, Process};
use shunt_tests::wait::until_some;

/// A mount namespace; it goes with its last process.
#[derive(Debug)]
pub struct Mounts {
    holder: Process,
    dir: PathBuf,
    bed: Arc<Bed>,
}

impl Mounts {
    /// One in which mounts are shared, as systemd has them at boot, but with nobody outside. Nothing is mounted on
    /// /sys/fs/bpf.
    #[track_caller]
    pub fn new(bed: &Arc<Bed>) -> Arc<Self> {
        let script = "while umount /sys/fs/bpf; do :; done 2>/dev/null; echo ready; exec sleep infinity";
        let mut command = Command::new("unshare");
        // Cut off first, so that what is shared afterwards is shared inside.
        command.args(["--mount", "--propagation", "private"]);
        command.args(["unshare", "--mount", "--propagation", "shared", "sh", "-c", script]);
        let holder = Process::start("mount namespace", command);
        holder.wait_line(0, "ready", |line| (line == "ready").then_some(()));
        Arc::new(Self { holder, dir: bed.subdir("runc"), bed: bed.clone() })
    }

    /// A command to be run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.id())).arg("--").arg(program);
        command
    }

    /// What a command prints inside; panics if it fails.
    #[track_caller]
    pub fn output<const N: usize>(&self, words: [&str; N]) -> String {
        let mut command = self.command(words[0]);
        command.args(&words[1..]);
        printed(command)
    }

    /// True if a file system of this kind is mounted there, inside.
    #[track_caller]
    pub fn has_mount(&self, path: &str, kind: &str) -> bool {
        let mounts = self.output(["cat", "/proc/self/mounts"]);
        mounts.lines().any(|line| line.split(' ').skip(1).take(2).eq([path, kind]))
    }

    fn runc(&self) -> Command {
        let mut command = self.command("runc");
        command.arg("--root").arg(&self.dir);
        command
    }

    /// Starts a container by the configuration of runc.
    #[track_caller]
    pub fn start(self: &Arc<Self>, name: &str, config: &Value) -> Container {
        let id = format!("{}-{name}", self.bed.id());
        let bundle = self.bed.subdir(&format!("bundle-{name}"));
        fs::write(bundle.join("config.json"), config.to_string()).expect("the bundle's directory was made");
        let mut command = self.runc();
        command.args(["run", "--bundle"]).arg(&bundle).arg(&id);
        Container { process: Process::start(name, command), id, mounts: self.clone() }
    }
}

/// What a command prints; panics if it fails.
#[track_caller]
pub fn printed(mut command: Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

/// A container; dropped, it is killed and forgotten.
#[derive(Debug)]
pub struct Container {
    process: Process,
    id: String,
    mounts: Arc<Mounts>,
}

impl Container {
    /// What it printed so far.
    pub fn log(&self) -> String {
        self.process.lines().join("\n")
    }

    /// Waits for a line that holds `text`.
    #[track_caller]
    pub fn wait_log(&self, text: &str) {
        self.process.wait_line(0, &format!("the line {text:?}"), |line| line.contains(text).then_some(()));
    }

    /// What a command prints in it; panics if it fails.
    #[track_caller]
    pub fn exec<const N: usize>(&self, words: [&str; N]) -> String {
        let mut command = self.mounts.runc();
        command.arg("exec").arg(&self.id).args(words);
        printed(command)
    }

    /// Ends it as a kubelet does, and returns how it ended.
    #[track_caller]
    pub fn stop(mut self) -> ExitStatus {
        self.process.signal(Signal::SIGTERM);
        self.process.wait()
    }

    /// How it ended by itself.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        self.process.wait()
    }

    /// How it ended, or that it did what `look` waits for, if that comes first.
    #[track_caller]
    pub fn ended_or(&mut self, what: &str, look: impl Fn() -> bool) -> Option<ExitStatus> {
        until_some(&format!("{what} or the end"), || match self.process.try_wait() {
            Some(status) => Some(Some(status)),
            None => look().then_some(None),
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.process);
        }
        let mut delete = self.mounts.runc();
        // It is gone already if it ended by itself.
        let _ = delete.args(["delete", "--force"]).arg(&self.id).output();
    }
}

/// Unpacks the image's only layer into `dir`.
#[track_caller]
pub fn unpack(layer: &Path, dir: &Path) {
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--gzip").arg("--file").arg(layer).arg("--directory").arg(dir);
    printed(tar);
}
