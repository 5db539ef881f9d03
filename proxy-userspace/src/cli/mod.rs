//! The subcommands of `shunt`: arguments in, exit code out.
//!
//! | module | subcommand |
//! |---|---|
//! | [`agent`] | agent |
//! | [`show`] | status, services, backends, flows |
//! | [`explain`] | explain |
//! | [`monitor`] | monitor |
//! | [`cleanup`] | cleanup |
//! | [`host`] | install, uninstall |
//! | [`doctor`] | doctor |
//! | [`table`] | (how lists are printed) |

mod agent;
mod cleanup;
mod doctor;
mod explain;
mod host;
mod monitor;
mod show;
mod table;

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::config::raw::{DEFAULT_ADMIN_SOCKET, DEFAULT_BPFFS};
use crate::config::setting::AgentArgs;
use crate::config::{self};
use crate::datapath::kernel;
use crate::datapath::pins::Pins;
use table::Format;

/// Bad usage, bad configuration, or a kernel that cannot do what is wanted (sysexits(3): EX_USAGE).
const BAD_USAGE: u8 = 64;

const EXAMPLES: &str = "\
Examples:
  shunt example > manifests/web.yaml        a service to start from
  sudo shunt agent --manifests manifests    serve what the folder says, and follow its changes
  sudo shunt services                       what is programmed; works with or without an agent
  sudo shunt cleanup                        take everything out of the kernel again

Exit codes: 0 done, 1 failed, 64 bad usage or configuration.";

const AGENT_EXAMPLES: &str = "\
Examples:
  shunt agent --manifests /etc/shunt
  shunt agent --manifests /etc/shunt --cluster-cidr 10.244.0.0/16,fd00:10:244::/56 --nodeport-addresses all
  shunt agent --manifests /etc/shunt --exclude-devices 'docker*,wg0' --log-format json
  shunt agent --config /var/lib/kube-proxy/config.conf --log-level debug    what kubeadm wrote for kube-proxy, but one option

The agent can be stopped, killed and replaced at any moment: what it has programmed stays pinned below --bpffs and goes
on working, and the next agent takes it over. `shunt cleanup` removes it.";

const EXAMPLE_EXAMPLES: &str = "\
Examples:
  shunt example > manifests/web.yaml
  shunt example config > agent.yaml && sudo shunt agent --config agent.yaml";

const STATUS_EXAMPLES: &str = "\
Examples:
  sudo shunt status
  sudo shunt status -o json | jq '.report.sources[] | {name, stale, outages, rejected}'

Tables, attachments and drops are read from the kernel, with or without an agent. A running agent adds how its sources
stand (what they listed, since when one is silent and its part of the tables stale, which objects they reject), what the
tables refused, and what services ask for and do not get.";

const SERVICES_EXAMPLES: &str = "\
Examples:
  sudo shunt services
  sudo shunt services -o json | jq -r '.[] | select(.cluster == \"reject\") | .name'    services without backends

CLUSTER and LOCAL are the two sets of backends of a service: how many are in each, or what clients get because there is
none. FRONTENDS with `-o json` tell which clients get which set.";

const BACKENDS_EXAMPLES: &str = "\
Examples:
  sudo shunt backends
  sudo shunt backends -o json | jq -r '.[] | select(.local) | .address'    those on this node";

const FLOWS_EXAMPLES: &str = "\
Examples:
  sudo shunt flows
  sudo shunt flows -o json | jq -r '.[] | select(.state == \"established\") | .client'

A connection is listed while packets carry it. Those that a socket hook translated at connect are not: the kernel keeps
them as plain connections to the backend (`ss -t` shows them).";

const EXPLAIN_EXAMPLES: &str = "\
Examples:
  sudo shunt explain 10.244.1.5 10.96.0.10:53 udp      a pod of this node asks the name service
  sudo shunt explain 203.0.113.7 192.0.2.1:30080       somebody outside dials a NodePort of this node
  sudo shunt explain 10.244.1.5 10.96.0.10:80 --by packet    the same for a process that no socket hook sees
  sudo shunt explain 203.0.113.7 192.0.2.1:443 --device eth1 -o json | jq -r .result

Nothing is sent, opened or counted. The packet programs run on a made packet, over the tables that count, hook by hook in the
order of the packet's way, and then on the answer to it; routes, neighbours and bridges are the kernel's own; what sockets
get is decided by the same code as in the kernel. Firewalls are not asked. The programs are those of this binary: after
an upgrade, restart the agent first.";

const MONITOR_EXAMPLES: &str = "\
Examples:
  sudo shunt monitor                                  all that happens
  sudo shunt monitor --kinds drop,refused             what is refused, and why
  sudo shunt monitor --service shop/ --address 10.244.1.5 --for 1m
  sudo shunt monitor -o json | jq -r 'select(.kind == \"moved\") | .backend'

Told is the beginning of a connection, never its other packets; of a process that sends datagrams, each service that it
sends to for the first time. Works without an agent. While nobody watches, nothing is told and nothing is spent. One can
watch at a time.";

const CLEANUP_HELP: &str = "\
Refused while an agent runs. Nothing that others attached, mounted or reserved is touched. Running it twice is the same as
once.

Examples:
  shunt cleanup               everything goes at once, and with it the connections that packets made
  shunt cleanup --drain 10m   hand over to a kube-proxy that runs already: new connections are its own from the first moment

With --drain, start the successor first and stop the agent. Then:
  - New connections, from sockets and from packets, pass untouched.
  - Connections that packets made (`shunt flows`) keep their backends until they end, or until DURATION is over: what is
    left then is broken.
  - Connections of sockets that were translated when they connected go straight to their backends and outlive everything.
    Only their displayed peer changes, from the service's address to the backend's, when the last hook goes.
  - UDP sockets that are not connected leave their backends at once. A datagram flow ends when it pauses for two minutes.
Interrupting is safe. Once more `shunt cleanup --drain` goes on where it was; `shunt agent` takes everything back.";

const INSTALL_HELP: &str = "\
Copied is this very program. Written are the unit and, if there is none, a configuration, /etc/shunt/agent.yaml, which reads
services from the folder /etc/shunt/manifests. An installed version is replaced by this one: the agent is restarted, services
go on meanwhile.

Examples:
  sudo ./shunt install                    copy, enable, start
  sudo shunt install --no-start           the same for the next boot
  shunt install --root image              into a file system that will boot later; nothing is started
  systemctl status shunt; journalctl -u shunt";

const UNINSTALL_HELP: &str = "\
The configuration and the manifests below /etc/shunt stay.

Examples:
  sudo shunt uninstall                    services of this host end
  sudo shunt uninstall --keep-services    what is programmed works on until the next boot, or `shunt cleanup`
  shunt uninstall --root image";

const MOUNT_HELP: &str = "\
What is mounted in a container is seen by the node only where the container's mount point is shared with it (in a pod:
mountPropagation Bidirectional, for which it must be privileged). `shunt agent` mounts one for itself where it may.

Example:
  shunt mount-bpffs";
const DOCTOR_HELP: &str = "\
Looks, and changes nothing. To see whether the socket hooks are asked, this command connects a datagram socket to a port
that no service has, which sends no packet and counts as one drop, `unknown_port`.
  ok        as it should be
  note      worth knowing; nothing is wrong
  unknown   it could not be looked at; why is said
  warning   something works less well than it could, or may break
  failure   services do not work for somebody
Run it in the agent's network namespace, as root: in a cluster, in the agent's pod (there with --cgroup /host/cgroup). What it says of processes holds for
those that it sees (in a pod: with hostPID, all). A running agent adds how its sources stand, and which devices it was told
to serve.
  sudo shunt doctor
  sudo shunt doctor -o json | jq -r '.[] | select(.verdict == \"failure\") | .check + \": \" + .advice'
Exit codes: 0 nothing fails, 1 something does (or the command itself), 64 bad usage.";

/// Services in the kernel: virtual IPs, NodePorts and load-balancer addresses by eBPF, beside any network plugin
#[derive(Debug, Parser)]
#[command(name = "shunt", version, after_help = EXAMPLES, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve services on this node until stopped; what is programmed stays
    #[command(after_help = AGENT_EXAMPLES)]
    Agent(Box<AgentArgs>),
    /// What is programmed, attached and dropped, in short
    #[command(after_help = STATUS_EXAMPLES)]
    Status(StatusArgs),
    /// Services with their frontends, backends and traffic
    #[command(after_help = SERVICES_EXAMPLES)]
    Services(ShowArgs),
    /// Backends and the services that use them
    #[command(after_help = BACKENDS_EXAMPLES)]
    Backends(ShowArgs),
    /// Connections that packets made (translated sockets need no record)
    #[command(after_help = FLOWS_EXAMPLES)]
    Flows(ShowArgs),
    /// What would become of a connection, and why: hook by hook, without sending anything
    #[command(after_help = EXPLAIN_EXAMPLES)]
    Explain(explain::ExplainArgs),
    /// Connections as they are opened, moved and refused, as it happens
    #[command(after_help = MONITOR_EXAMPLES)]
    Monitor(monitor::MonitorArgs),
    /// Every precondition of this node, and what to do about each that fails
    #[command(after_help = DOCTOR_HELP)]
    Doctor(doctor::DoctorArgs),
    /// Detach and remove everything that is pinned; traffic to services stops, or goes on by a successor with --drain
    #[command(after_help = CLEANUP_HELP)]
    Cleanup(CleanupArgs),
    /// Run the agent on this host from now on, as a service of systemd
    #[command(after_help = INSTALL_HELP)]
    Install(host::InstallArgs),
    /// Undo `shunt install`: stop the agent, clean up, remove the unit and the program
    #[command(after_help = UNINSTALL_HELP)]
    Uninstall(host::UninstallArgs),
    /// Mount the BPF file system that an agent without the right to mount needs, if there is none
    #[command(after_help = MOUNT_HELP)]
    MountBpffs(MountArgs),
    /// Print the version and the layout of its tables
    Version,
    /// Print completions for a shell
    #[command(after_help = "Example:\n  shunt completions bash > /etc/bash_completion.d/shunt")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print a file to start from: a manifest, or a configuration of the agent
    #[command(after_help = EXAMPLE_EXAMPLES)]
    Example {
        /// Which file
        #[arg(value_enum, default_value_t)]
        file: ExampleFile,
    },
}

impl PinArgs {
    fn pins(&self) -> Pins {
        Pins::new(&self.bpffs).with_version(self.layout_version)
    }
}

/// Where things are pinned.
#[derive(Debug, Args)]
struct PinArgs {
    /// Where they are pinned
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    bpffs: PathBuf,
    /// As the agent's
    #[arg(long, value_name = "N", hide = true)]
    layout_version: Option<u32>,
}

/// What is mounted.
#[derive(Debug, Args)]
struct MountArgs {
    /// Where the agent will pin; mounted is /sys/fs/bpf if that is above it, else this directory
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    bpffs: PathBuf,
}

/// What is removed, and how.
#[derive(Debug, Args)]
struct CleanupArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// First leave new connections to others and wait until those that are there have ended, at most this long (as in
    /// 90s, 10m, 1h30m; without a value: as long as it takes)
    #[arg(long, value_name = "DURATION", value_parser = cleanup::parse_duration)]
    drain: Option<Option<std::time::Duration>>,
}

/// What is shown, and how.
#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// What is shown of the state.
#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    show: ShowArgs,
    /// Where a running agent is asked for what the tables cannot tell
    #[arg(long, value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET)]
    admin_socket: PathBuf,
}

/// What there is an example of.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum ExampleFile {
    /// A service, for `shunt agent --manifests`
    #[default]
    Manifest,
    /// For `shunt agent --config`
    Config,
}

impl ExampleFile {
    fn text(self) -> &'static str {
        match self {
            Self::Manifest => include_str!("../../../examples/web.yaml"),
            Self::Config => include_str!("../../../examples/agent.yaml"),
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    run(std::env::args_os())
}

/// Runs a command line, program name first.
pub fn run(words: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> ExitCode {
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match execute(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if is_denied(&error) && !is_root() {
                eprintln!("hint: this needs root");
            }
            exit_code(&error)
        }
    }
}

/// Help and version are no errors; all else is bad usage.
fn usage(error: &clap::Error) -> ExitCode {
    // Nothing can be told if standard error is closed.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(BAD_USAGE) } else { ExitCode::SUCCESS }
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    let is_usage = error.is::<config::Errors>()
        || error.is::<kernel::Unsupported>()
        || matches!(error.downcast_ref(), Some(kernel::Error::TooSmall(_)));
    if is_usage { ExitCode::from(BAD_USAGE) } else { ExitCode::FAILURE }
}

/// The kernel does not let us.
fn is_denied(error: &anyhow::Error) -> bool {
    let is_so = |error: &std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(is_so))
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Whoever read our output has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn execute(command: Command) -> Result<()> {
    match command {
        Command::Agent(args) => agent::run(*args),
        Command::Status(args) => show::status(&args),
        Command::Services(args) => show::services(&args),
        Command::Backends(args) => show::backends(&args),
        Command::Flows(args) => show::flows(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Monitor(args) => monitor::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Cleanup(args) => cleanup::run(&args.pins.pins(), args.drain),
        Command::Install(args) => host::install(&args),
        Command::Uninstall(args) => host::uninstall(&args),
        Command::MountBpffs(args) => match Pins::new(&args.bpffs).mount()? {
            Some(mounted) => print(&format!("a BPF file system is mounted on {}\n", mounted.display())),
            None => print(&format!("{} is on a BPF file system already\n", args.bpffs.display())),
        },
        Command::Version => {
            print(&format!("shunt {}\ntable layout {}\n", env!("CARGO_PKG_VERSION"), proxy_common::abi::ABI_VERSION))
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "shunt", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Command::Example { file } => print(file.text()),
    }
}

/// Writes to standard output; a closed pipe is an error, not a panic.
fn print(text: &str) -> Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn bad_usage_is_64_and_help_is_not() {
        assert_eq!(run(["shunt", "--no-such-flag"]), ExitCode::from(64));
        assert_eq!(run(["shunt", "agent", "--snat-ports", "x"]), ExitCode::from(64));
        assert_eq!(run(["shunt", "agent", "--config", "/no/such/file"]), ExitCode::from(64));
        assert_eq!(run(["shunt", "agent", "--help"]), ExitCode::SUCCESS);
        assert_eq!(run(["shunt", "version"]), ExitCode::SUCCESS);
    }
}
