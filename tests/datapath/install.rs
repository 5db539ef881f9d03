//! A plain host: what `shunt install` makes of it, and an agent with the rights of the unit.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use shunt_tests::agent;
use shunt_tests::bed::Bed;
use shunt_tests::process::{Command, Process, Stdio};
use shunt_tests::traffic::Ports;

use crate::node::{Lone, service};

/// A host whose /etc and /usr/local are seen through, and whose systemd only notes what it is told. It is as long as one
/// script, which runs in a mount namespace of its own.
struct Host {
    bed: std::sync::Arc<Bed>,
}

impl Host {
    fn new() -> Self {
        let bed = Bed::new();
        let systemctl = bed.subdir("bin").join("systemctl");
        let text = format!("#!/bin/sh\necho \"$@\" >> {}\n", bed.dir().join("told").display());
        fs::write(&systemctl, text).expect("the test's directory can be written");
        fs::set_permissions(&systemctl, fs::Permissions::from_mode(0o755)).expect("it is ours");
        Self { bed }
    }

    /// What the script prints; panics if it fails. `$SHUNT` is the program, `$PINS` where nothing is pinned.
    #[track_caller]
    fn run(&self, script: &str) -> String {
        let covered = ["etc", "usr/local"].map(|dir| {
            let [upper, work] = ["upper", "work"].map(|kind| self.bed.subdir(&format!("{kind}/{dir}")));
            let options = format!("lowerdir=/{dir},upperdir={},workdir={}", upper.display(), work.display());
            format!("mount -t overlay -o {options} overlay /{dir}\n")
        });
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-euc"]);
        command.arg(format!("{}{script}", covered.concat()));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.bed.dir().join("bin").display()));
        command.env("SHUNT", agent::program()).env("PINS", self.bed.dir().join("absent"));
        let output = command.stdin(Stdio::null()).output().expect("unshare is there");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{script}: {}{}", text(&output.stdout), text(&output.stderr));
        text(&output.stdout)
    }

    /// What systemd was told since the last time, a line each.
    fn told(&self) -> Vec<String> {
        let file = self.bed.dir().join("told");
        let lines = fs::read_to_string(&file).unwrap_or_default().lines().map(str::to_owned).collect();
        // Nothing was told if there is none.
        let _ = fs::remove_file(file);
        lines
    }
}

#[test]
fn systemd_takes_the_unit_and_runs_what_is_installed() {
    let host = Host::new();
    host.run("$SHUNT install");
    assert_eq!(host.told(), ["daemon-reload", "restart shunt.service"]);
    host.run(
        "systemd-analyze verify --man=no /etc/systemd/system/shunt.service
         test /etc/systemd/system/multi-user.target.wants/shunt.service -ef /etc/systemd/system/shunt.service
         test -d /etc/shunt/manifests
         /usr/local/bin/shunt version",
    );
    // The installed program installs itself once more, over a configuration that is the operator's by now.
    host.run("echo mine > /etc/shunt/agent.yaml; /usr/local/bin/shunt install --no-start; grep -qx mine /etc/shunt/agent.yaml");
    assert_eq!(host.told(), ["daemon-reload"]);
    host.run("/usr/local/bin/shunt uninstall --bpffs $PINS; grep -qx mine /etc/shunt/agent.yaml");
    assert_eq!(host.told(), ["stop shunt.service", "daemon-reload"]);
    let left = host.run("find /etc/systemd/system /usr/local/bin -name 'shunt*'");
    assert_eq!(left, "");
}

#[test]
fn the_configuration_that_is_installed_can_be_used() {
    let mut node = Lone::new();
    let root = node.bed.subdir("root");
    assert!(node_shunt(&["install", "--root", root.to_str().expect("text")]));
    let config = root.join("etc/shunt/agent.yaml");
    node.spawn(["--config", config.to_str().expect("text")]);
    node.log("first plan applied");
    node.stop();
}

fn node_shunt(words: &[&str]) -> bool {
    let mut command = Command::new(agent::program());
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).status().expect("shunt can be run").success()
}

/// The value of a line of the unit.
#[track_caller]
fn unit(key: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd/shunt.service");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned));
    value.unwrap_or_else(|| panic!("the unit has no {key}"))
}

#[test]
fn the_rights_of_the_unit_are_enough_to_mount_to_load_and_to_attach() {
    let mut node = Lone::new();
    node.bpffs = node.bed.subdir("plain").join("shunt");
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    let capabilities: Vec<_> = unit("CapabilityBoundingSet")
        .split(' ')
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    assert_eq!(unit("NoNewPrivileges"), "yes");
    let agent = node.agent_command([]);
    let mut command = node.place.command("setpriv");
    command.arg(format!("--bounding-set=-all,{}", capabilities.join(",")));
    command.args(["--inh-caps=-all", "--no-new-privs"]).arg(agent.get_program()).args(agent.get_args());
    let agent = Process::start("agent", command);
    agent.wait_line(0, "first plan applied", |line| line.contains("first plan applied").then_some(()));
    let status = fs::read_to_string(format!("/proc/{}/status", agent.id())).expect("it runs");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).expect("it is there");
    let effective = u64::from_str_radix(effective, 16).expect("a set of bits");
    assert_eq!(effective.count_ones() as usize, capabilities.len(), "it has these rights and no other");
    let vip = "10.96.0.10:80".parse().expect("an address");
    assert_eq!(node.place.tcp(vip).expect("an answer").server, "node");
}
