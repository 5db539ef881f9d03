//! Child processes: where they run, what they print, and that they end with the test.
//!
//! The harness's unsafe code is here and in `probe/tcp_info.rs`: what a child does between fork and exec.

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStdin, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, OnceLock, mpsc};
use std::thread;
use std::time::Instant;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

pub use std::process::Stdio;

use crate::wait::PATIENCE;

/// A command of the harness: its process is killed when the thread that spawned it ends ([`Process`] takes care of that).
///
/// It can be interrupted, also if the tests cannot: a shell that starts them in the background has them ignore SIGINT, which
/// children inherit.
#[derive(Debug)]
pub struct Command(std::process::Command);

impl Command {
    /// A command to be run where the test itself runs.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = std::process::Command::new(program);
        let parent = std::process::id();
        let prepare = move || {
            // SAFETY: all calls are async-signal-safe and touch no memory of ours.
            let has_failed = unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                    || libc::getppid() != parent as i32
                    || libc::signal(libc::SIGINT, libc::SIG_DFL) == libc::SIG_ERR
            };
            if has_failed { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: the closure makes three system calls and allocates nothing.
        unsafe { command.pre_exec(prepare) };
        Self(command)
    }
}

impl std::ops::Deref for Command {
    type Target = std::process::Command;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl std::ops::DerefMut for Command {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// The command's process will run in the network namespace that `ns` stands for.
pub(crate) fn enter_netns(command: &mut Command, ns: OwnedFd) {
    // SAFETY: one system call on a file the closure owns; no allocation.
    let enter = move || match unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: the closure is async-signal-safe, as said above.
    unsafe { command.0.pre_exec(enter) };
}

/// The command's process will join the control group whose `cgroup.procs` this is.
pub(crate) fn join_cgroup(command: &mut Command, procs: OwnedFd) {
    // SAFETY: one system call on a file the closure owns, one byte of static memory. "0" is the writer itself.
    let join = move || match unsafe { libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: the closure is async-signal-safe, as said above.
    unsafe { command.0.pre_exec(join) };
}

/// Spawns from a thread that lives as long as the test process: the kernel sends a parent's death signal when the spawning
/// *thread* ends, which may be long before the test does.
fn spawn(command: std::process::Command) -> io::Result<Child> {
    type Request = (std::process::Command, mpsc::SyncSender<io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Request>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        let serve = move || {
            for (mut command, answer) in requests {
                // The asker waits for the answer.
                let _ = answer.send(command.spawn());
            }
        };
        thread::Builder::new().name("spawner".into()).spawn(serve).expect("a thread can be started");
        Mutex::new(sender)
    });
    let (answer, receiver) = mpsc::sync_channel(1);
    let sent = spawner.lock().expect("no user of the spawner panics").send((command, answer));
    sent.expect("the spawner lives as long as the process");
    receiver.recv().expect("the spawner answers every request")
}

/// Lines that a process printed, and whether more can come.
#[derive(Debug, Default)]
struct Output {
    state: Mutex<OutputState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct OutputState {
    lines: Vec<String>,
    ended_streams: u8,
}

/// A running child; dropped, it and its process group are killed and reaped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    output: Arc<Output>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; `name` stands before its lines when they are shown.
    #[track_caller]
    pub fn start(name: &str, mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let shown = format!("{command:?}");
        let mut child = spawn(command.0).unwrap_or_else(|error| panic!("cannot run {shown}: {error}"));
        let output = Arc::new(Output::default());
        read_lines(child.stdout.take().expect("it is piped"), &output);
        read_lines(child.stderr.take().expect("it is piped"), &output);
        Self { name: name.to_owned(), stdin: child.stdin.take(), child, output, status: None }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far, standard output and error together.
    pub fn lines(&self) -> Vec<String> {
        self.output.state.lock().expect("readers do not panic").lines.clone()
    }

    /// What it has printed so far from line number `from` on.
    pub fn lines_from(&self, from: usize) -> Vec<String> {
        self.output.state.lock().expect("readers do not panic").lines[from..].to_vec()
    }

    /// True if nothing more can come.
    pub fn has_ended_output(&self) -> bool {
        self.output.state.lock().expect("readers do not panic").ended_streams == 2
    }

    /// The number of lines printed so far, to be given to [`Self::wait_line`].
    pub fn line_count(&self) -> usize {
        self.output.state.lock().expect("readers do not panic").lines.len()
    }

    /// The first of `find`'s answers for the lines from number `from` on, waited for; panics if the process ends without
    /// it, or nothing comes for long.
    #[track_caller]
    pub fn wait_line<T>(&self, from: usize, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut next = from;
        let mut state = self.output.state.lock().expect("readers do not panic");
        loop {
            if let Some(found) = state.lines[next..].iter().find_map(|line| find(line)) {
                return found;
            }
            next = state.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended_streams == 2 || left.is_zero() {
                let why = if left.is_zero() { "kept silent" } else { "ended" };
                drop(state);
                panic!("{} {why} without {what}; it printed:\n{self}", self.name);
            }
            state = self.output.changed.wait_timeout(state, left).expect("readers do not panic").0;
        }
    }

    /// Writes a line to its standard input; nothing happens if it has ended.
    pub fn send_line(&mut self, line: &str) {
        if let Some(stdin) = &mut self.stdin {
            let _ = writeln!(stdin, "{line}").and_then(|()| stdin.flush());
        }
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: Signal) {
        // It has ended if this fails: the child is reaped by this guard only.
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }

    /// How it ended, waited for.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        self.stdin = None;
        let status = crate::wait::until_some(&format!("the end of {}", self.name), || self.try_wait());
        let mut state = self.output.state.lock().expect("readers do not panic");
        // A grandchild may hold the streams open; do not wait for it.
        while state.ended_streams < 2 {
            let (guard, timeout) = self
                .output
                .changed
                .wait_timeout(state, std::time::Duration::from_secs(1))
                .expect("readers do not panic");
            state = guard;
            if timeout.timed_out() {
                break;
            }
        }
        status
    }

    /// How it ended, or `None` while it runs.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("only this guard reaps the child");
        }
        self.status
    }

    /// Kills it with everything in its process group, and reaps it.
    pub fn kill(&mut self) {
        if self.try_wait().is_none() {
            // Its process group bears its id, which is not given away before it is reaped.
            let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
            self.status = Some(self.child.wait().unwrap_or(ExitStatus::from_raw(0)));
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines().iter().try_for_each(|line| writeln!(f, "{} | {line}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn read_lines(stream: impl Read + Send + 'static, output: &Arc<Output>) {
    let output = output.clone();
    let read = move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            output.state.lock().expect("users do not panic with the lock held").lines.push(text);
            output.changed.notify_all();
            line.clear();
        }
        output.state.lock().expect("users do not panic with the lock held").ended_streams += 1;
        output.changed.notify_all();
    };
    thread::Builder::new().name("reader".into()).spawn(read).expect("a thread can be started");
}
