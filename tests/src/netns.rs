//! Network namespaces: made without a device but `lo`, entered by thread, removed on drop.
//!
//! A namespace is bound to `/run/netns`, so `ip netns` lists it and `nsenter --net=/run/netns/NAME` enters it. It is never
//! entered by `ip netns exec`, which mounts a fresh /sys without control groups and BPF file system.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::bed::{self, Bed};
use crate::process::{self, Command, Stdio};

const DIR: &str = "/run/netns";

/// A network namespace; dropped, it is unbound and ends with its last process.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
    _bed: Arc<Bed>,
}

impl Netns {
    /// A fresh namespace, `lo` up, without IPv6 duplicate address detection (addresses are usable at once).
    #[track_caller]
    pub fn new(bed: &Arc<Bed>, name: &str) -> Arc<Self> {
        let name = format!("{}-{name}", bed.id());
        let file = create(&name).unwrap_or_else(|error| panic!("cannot make network namespace {name}: {error}"));
        let ns = Arc::new(Self { name, file, _bed: bed.clone() });
        for conf in ["all", "default"] {
            ns.sysctl(&format!("net/ipv6/conf/{conf}/accept_dad"), "0");
            ns.sysctl(&format!("net/ipv6/conf/{conf}/dad_transmits"), "0");
        }
        ns.ip(["link set lo up"]);
        ns
    }

    /// The name under which `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&self.name)
    }

    /// What `work` returns, run by a thread inside the namespace; sockets made there stay there. Its panic becomes ours.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .unwrap_or_else(|error| panic!("cannot enter {}: {error}", self.name));
            work()
        };
        // The name shows in what a panic prints, and names what is made inside.
        let name = thread::current().name().unwrap_or("thread").to_owned();
        let result = thread::scope(|scope| {
            let thread = thread::Builder::new().name(name).spawn_scoped(scope, enter).expect("a thread can be started");
            thread.join()
        });
        result.unwrap_or_else(|panic| panic::resume_unwind(panic))
    }

    /// A command to be run inside the namespace, in the control group of the test itself.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = self.file.try_clone().unwrap_or_else(|error| panic!("cannot copy a file handle: {error}"));
        process::enter_netns(&mut command, file.into());
        command
    }

    /// Sets a kernel variable of the namespace, its name written with slashes: `net/ipv4/ip_forward`.
    #[track_caller]
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{name}");
        let result = self.run(|| fs::write(&path, value));
        result.unwrap_or_else(|error| panic!("cannot set {name} to {value} in {}: {error}", self.name));
    }

    /// The value of a kernel variable of the namespace. Read in one piece: a second read of a list of ports gives nothing.
    #[track_caller]
    pub fn read_sysctl(&self, name: &str) -> String {
        let path = format!("/proc/sys/{name}");
        let read = || {
            let mut text = vec![0; 1 << 18];
            let length = File::open(&path)?.read(&mut text)?;
            text.truncate(length);
            String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into())
        };
        let value: io::Result<String> = self.run(read);
        value.unwrap_or_else(|error| panic!("cannot read {name} in {}: {error}", self.name)).trim().to_owned()
    }

    /// Runs commands of `ip` in the namespace, all in one process; panics at the first that fails.
    #[track_caller]
    pub fn ip(&self, commands: impl IntoIterator<Item = impl AsRef<str>>) {
        self.batch("ip", commands);
    }

    /// Runs commands of `bridge` in the namespace, all in one process; panics at the first that fails.
    #[track_caller]
    pub fn bridge(&self, commands: impl IntoIterator<Item = impl AsRef<str>>) {
        self.batch("bridge", commands);
    }

    /// Runs commands of `tc` in the namespace, all in one process; panics at the first that fails.
    #[track_caller]
    pub fn tc(&self, commands: impl IntoIterator<Item = impl AsRef<str>>) {
        self.batch("tc", commands);
    }

    #[track_caller]
    fn batch(&self, program: &str, commands: impl IntoIterator<Item = impl AsRef<str>>) {
        let batch: Vec<String> = commands.into_iter().map(|command| command.as_ref().to_owned()).collect();
        let mut command = self.command(program);
        command.args(["-batch", "-"]);
        self.feed(command, &batch.join("\n"));
    }

    /// Loads nftables rules in the namespace.
    #[track_caller]
    pub fn nft(&self, rules: &str) {
        let mut nft = self.command("nft");
        nft.args(["-f", "-"]);
        self.feed(nft, rules);
    }

    /// Runs `command` with `input` on its standard input and returns what it printed; panics if it fails.
    #[track_caller]
    pub fn feed(&self, mut command: Command, input: &str) -> String {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        let mut stdin = child.stdin.take().expect("it is piped");
        // A command that ends early shows why below; the broken pipe says less.
        let _ = stdin.write_all(input.as_bytes()).and_then(|()| stdin.write_all(b"\n"));
        drop(stdin);
        let output = child.wait_with_output().unwrap_or_else(|error| panic!("cannot wait for {command:?}: {error}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{command:?} in {} failed, {}:\n{errors}{text}\ninput:\n{input}",
            self.name,
            output.status
        );
        text
    }

    /// What a command prints, run in the namespace; panics if it fails.
    #[track_caller]
    pub fn output<const N: usize>(&self, words: [&str; N]) -> String {
        let mut command = self.command(words[0]);
        command.args(&words[1..]);
        self.feed(command, "")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if bed::keeps_remains() {
            eprintln!("kept: nsenter --net={}", self.path().display());
        } else {
            remove(&self.path());
        }
    }
}

fn create(name: &str) -> std::io::Result<File> {
    fs::create_dir_all(DIR)?;
    let path = Path::new(DIR).join(name);
    File::create_new(&path)?;
    let bind = || -> std::io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    };
    let bound = thread::scope(|scope| scope.spawn(bind).join().expect("making a namespace does not panic"));
    bound.and_then(|()| File::open(&path)).inspect_err(|_| remove(&path))
}

fn remove(path: &Path) {
    // Not mounted if its making failed half-way.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    if let Err(error) = fs::remove_file(path) {
        eprintln!("cannot remove {}: {error}", path.display());
    }
}

/// Removes the namespaces of test processes that have ended.
pub(crate) fn sweep() {
    for name in bed::names_in(Path::new(DIR)).filter(|name| bed::is_orphan(name)) {
        remove(&Path::new(DIR).join(name));
    }
}
