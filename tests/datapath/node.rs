//! A node alone: what most tests of this suite need, without a cluster around it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Output;
use std::sync::Arc;

use aya::programs::{SchedClassifier, TcAttachType};
use proxy_userspace::datapath::pins::{self, Pins};
use serde_json::Value;
use shunt_tests::agent;
use shunt_tests::bed::Bed;
use shunt_tests::cgroup::Cgroup;
use shunt_tests::manifests::Manifests;
use shunt_tests::netns::Netns;
use shunt_tests::place::Place;
use shunt_tests::process::{Command, Process, Stdio};

/// What the agent logs when everything the sources listed is in effect.
const APPLIED: &str = "first plan applied";

/// A node with one device, an empty folder of manifests, and no agent yet.
pub struct Lone {
    pub place: Place,
    pub manifests: Manifests,
    pub bpffs: PathBuf,
    pub bed: Arc<Bed>,
    agent: Option<Process>,
}

impl Lone {
    /// A fresh one.
    #[track_caller]
    pub fn new() -> Self {
        let bed = Bed::new();
        let ns = Netns::new(&bed, "node");
        ns.ip([
            "link add eth0 type veth peer name peer",
            "link set eth0 up",
            "link set peer up",
            "addr add 10.244.1.1/24 dev eth0",
            "addr add fd00:1::1/64 dev eth0 nodad",
        ]);
        let cgroup = Cgroup::new(&bed, "node");
        let bpffs = bed.bpffs("bpf").join("shunt");
        let manifests = Manifests::new(&bed);
        Self { place: Place::new("node", ns, Some(cgroup)), manifests, bpffs, bed, agent: None }
    }

    /// Starts an agent and waits until what the manifests say is in effect.
    #[track_caller]
    pub fn start<const N: usize>(&mut self, flags: [&str; N]) {
        self.spawn(flags);
        self.log(APPLIED);
    }

    /// Starts an agent and returns at once.
    #[track_caller]
    pub fn spawn<const N: usize>(&mut self, flags: [&str; N]) {
        assert!(self.agent.is_none(), "an agent is running");
        self.agent = Some(Process::start("agent", self.agent_command(flags)));
    }

    /// The command line of an agent here; a flag given here comes last and may repeat a default.
    #[track_caller]
    pub fn agent_command<const N: usize>(&self, flags: [&str; N]) -> Command {
        let mut command = self.command("agent");
        command.arg("--node-name").arg("node").arg("--manifests").arg(self.manifests.dir());
        command.arg("--admin-socket").arg(self.admin_socket());
        if !flags.contains(&"--cgroup") {
            command.arg("--cgroup").arg(self.place.cgroup().expect("a lone node has one").dir());
        }
        command.args(flags);
        command
    }

    /// Where the agent is asked.
    pub fn admin_socket(&self) -> PathBuf {
        self.bed.dir().join("agent.sock")
    }

    /// Waits for a line of the agent's log.
    #[track_caller]
    pub fn log(&self, text: &str) -> String {
        self.agent().wait_line(0, &format!("the line {text:?}"), |line| line.contains(text).then(|| line.to_owned()))
    }

    /// The running agent.
    #[track_caller]
    pub fn agent(&self) -> &Process {
        self.agent.as_ref().expect("an agent is running")
    }

    /// Kills the agent as a crash does.
    #[track_caller]
    pub fn crash(&mut self) {
        self.agent.take().expect("an agent is running").kill();
    }

    /// Ends the agent as an operator does.
    #[track_caller]
    pub fn stop(&mut self) {
        let mut agent = self.agent.take().expect("an agent is running");
        agent.signal(nix::sys::signal::Signal::SIGTERM);
        let status = agent.wait();
        assert!(status.success(), "the agent ended with {status}:\n{agent}");
    }

    /// A `shunt` command on this node.
    #[track_caller]
    fn command(&self, subcommand: &str) -> Command {
        let mut command = self.place.command(agent::program());
        command.arg(subcommand).arg("--bpffs").arg(&self.bpffs);
        command
    }

    /// What a `shunt` command does.
    #[track_caller]
    pub fn shunt<const N: usize>(&self, words: [&str; N]) -> Output {
        let mut command = self.command(words[0]);
        command.args(&words[1..]).stdin(Stdio::null());
        command.output().expect("shunt can be run")
    }

    /// What a `shunt` command prints as JSON; panics if it fails.
    #[track_caller]
    pub fn json(&self, subcommand: &str) -> Value {
        self.json_of([subcommand, "-o", "json"])
    }

    /// The state as JSON, with what the running agent says of it.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.json_of(["status", "-o", "json", "--admin-socket", &text(self.admin_socket())])
    }

    #[track_caller]
    fn json_of<const N: usize>(&self, words: [&str; N]) -> Value {
        let output = self.shunt(words);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("it prints JSON")
    }

    /// The pins below `--bpffs`.
    pub fn pins(&self) -> Pins {
        Pins::new(&self.bpffs)
    }

    /// Names of the pinned links to devices.
    #[track_caller]
    pub fn device_pins(&self) -> Vec<String> {
        let pins = pins::list(&self.pins().tcx_links()).expect("pins can be listed");
        pins.iter().filter_map(|pin| pins::file_name(pin)).map(str::to_owned).collect()
    }

    /// Names and ids of the programs at a hook of a device, in the order in which they run.
    #[track_caller]
    pub fn programs(&self, device: &str, hook: TcAttachType) -> Vec<(String, u32)> {
        let query = || {
            let (_, programs) = SchedClassifier::query_tcx(device, hook).ok()?;
            Some(programs.iter().map(|info| (info.name_as_str().unwrap_or("?").to_owned(), info.id())).collect())
        };
        self.place.run(query).unwrap_or_default()
    }

    /// Names of the programs of both hooks of a device.
    #[track_caller]
    pub fn pair(&self, device: &str) -> (String, String) {
        let names = |hook| {
            let names: Vec<_> = self.programs(device, hook).into_iter().map(|(name, _)| name).collect();
            names.join("+")
        };
        (names(TcAttachType::Ingress), names(TcAttachType::Egress))
    }

    /// Names of the pinned programs of filters.
    #[track_caller]
    pub fn filter_pins(&self) -> Vec<String> {
        let pins = pins::list(&self.pins().filters()).expect("pins can be listed");
        pins.iter().filter_map(|pin| pins::file_name(pin)).map(str::to_owned).collect()
    }

    /// Filters at a hook of a device's clsact qdisc, in the order in which they run.
    #[track_caller]
    pub fn filters(&self, device: &str, hook: &str) -> Vec<Filter> {
        let text = self.place.ns().output(["tc", "-j", "filter", "show", "dev", device, hook]);
        // Nothing at all is printed of a device without the qdisc.
        let rows: Vec<Value> = if text.trim().is_empty() { vec![] } else { serde_json::from_str(&text).expect("JSON") };
        // The first row of a priority speaks of all its filters together; u32 has one that speaks of a table.
        let is_filter = |row: &&Value| row["options"].is_object() && row["options"].get("ht_divisor").is_none();
        let filter = |row: &Value| {
            let (kind, options) = (&row["kind"], &row["options"]);
            Filter {
                name: options["bpf_name"].as_str().or(kind.as_str()).expect("a kind").to_owned(),
                priority: row["pref"].as_u64().expect("a number"),
                program: options["prog"]["id"].as_u64().unwrap_or_default(),
            }
        };
        rows.iter().filter(is_filter).map(filter).collect()
    }

    /// Names of the filters of both hooks of a device.
    #[track_caller]
    pub fn filter_pair(&self, device: &str) -> (String, String) {
        let names = |hook| {
            let names: Vec<_> = self.filters(device, hook).into_iter().map(|filter| filter.name).collect();
            names.join("+")
        };
        (names("ingress"), names("egress"))
    }

    /// Mode (1: in the driver, 2: generic) and program id of the XDP program of a device.
    #[track_caller]
    pub fn xdp(&self, device: &str) -> Option<(u64, u64)> {
        let text = self.place.ns().output(["ip", "-j", "link", "show", device]);
        let links: Value = serde_json::from_str(&text).expect("ip prints JSON");
        let xdp = links[0].get("xdp")?;
        Some((xdp["mode"].as_u64()?, xdp["prog"]["id"].as_u64()?))
    }

    /// Interface index of a device.
    #[track_caller]
    pub fn index(&self, device: &str) -> u32 {
        let text = self.place.run(|| nix::net::if_::if_nametoindex(device));
        text.unwrap_or_else(|error| panic!("there is no {device}: {error}"))
    }
}

/// A filter as `tc` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The name that who made it gave it, else its kind.
    pub name: String,
    /// Lower ones run first.
    pub priority: u64,
    /// Id of its program, 0 if it has none.
    pub program: u64,
}

/// A pair of names, for comparisons.
pub fn pair(ingress: &str, egress: &str) -> (String, String) {
    (ingress.to_owned(), egress.to_owned())
}

/// A flag's value as text.
pub fn text(value: impl Into<OsString>) -> String {
    value.into().into_string().expect("names of tests are text")
}

/// A service with ClusterIP `vip` and TCP port 80, whose endpoints listen on `port` of `endpoints`.
pub fn service(name: &str, vip: &str, endpoints: &[&str], port: u16) -> String {
    let endpoints: Vec<String> =
        endpoints.iter().map(|addr| format!("{{addresses: [{addr}], nodeName: node}}")).collect();
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec: {{type: ClusterIP, clusterIP: {vip}, clusterIPs: [{vip}], ipFamilies: [IPv4], ports: [{{port: 80, protocol: TCP}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: '', port: {port}, protocol: TCP}}]
endpoints: [{}]
",
        endpoints.join(", ")
    )
}
