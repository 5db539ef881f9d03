//! Starts a program in a network namespace, and passes signals on to it. Threads enter namespaces; the process stays.

use std::{
    fs::File,
    os::fd::AsFd,
    process::{Child, ExitStatus},
    thread,
};

use anyhow::{Context as _, Result};
use nix::{
    libc,
    sched::{CloneFlags, setns},
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};

use crate::run::Cmd;

/// The signals by which a user or a supervisor ends a program or talks to it.
const FORWARDED: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1];

/// Runs the command to its end, in the namespace /run/netns/`name` if one is given.
///
/// A signal sent to us is sent on; what a terminal sends reaches the command by itself, since it is in our group.
/// Must be called before any other thread exists: blocked signals are a matter of each thread.
/// Errors: the namespace cannot be entered, the command cannot be started.
pub fn run(mut cmd: Cmd, name: Option<&str>) -> Result<ExitStatus> {
    let mut signals: SigSet = FORWARDED.into_iter().collect();
    signals.add(Signal::SIGCHLD);
    signals.thread_block().context("cannot block signals")?;
    let events = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("cannot open a signal descriptor")?;

    let start = || start_in(&mut cmd, name, &signals);
    let mut child =
        thread::scope(|scope| scope.spawn(start).join()).expect("the starting thread returns its errors")?;
    loop {
        let event = events.read_signal().context("cannot read a signal")?;
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if let Some(event) = event.filter(|event| is_from_a_process(event.ssi_code)) {
            forward(&child, event.ssi_signo);
        }
    }
}

/// Starts the command from this thread, which enters the namespace first and is not used again.
fn start_in(cmd: &mut Cmd, name: Option<&str>, signals: &SigSet) -> Result<Child> {
    if let Some(name) = name {
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).with_context(|| format!("no network namespace {path}: `ip netns add {name}`"))?;
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter {path}: root is needed"))?;
    }
    // A program inherits the mask of the thread that starts it.
    signals.thread_unblock().context("cannot unblock signals")?;
    cmd.spawn()
}

/// The kernel's own signals come from the terminal, or speak of the child's end.
fn is_from_a_process(code: i32) -> bool {
    code == libc::SI_USER || code == libc::SI_QUEUE || code == libc::SI_TKILL
}

fn forward(child: &Child, signal: u32) {
    let signal = i32::try_from(signal).ok().and_then(|number| Signal::try_from(number).ok());
    let pid = i32::try_from(child.id()).expect("process ids fit into an i32");
    // The child may end in between: then there is nobody to tell.
    let _ = kill(Pid::from_raw(pid), signal);
}
