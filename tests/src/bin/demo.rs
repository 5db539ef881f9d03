//! The demo: two nodes, pods and a machine outside, in namespaces of this machine; a service that grows, loses a pod, is
//! replaced pod by pod and runs without an agent, while clients dial it without end; and a table of what became of that.
//!
//! Clients never dial twice for one attempt: each failure is shown with its errno, and ends the demo with exit code 1.
//! What each hook has served is read from the counters in the kernel, not from the clients.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use shunt_tests::agent::Agent;
use shunt_tests::bed::Bed;
use shunt_tests::manifests::{Endpoint, Manifests, service};
use shunt_tests::place::Place;
use shunt_tests::probe::{LongLived, Stats, TcpLoop};
use shunt_tests::process::Command;
use shunt_tests::tables::Opened;
use shunt_tests::topology::{Addrs, Cluster, Family, Plan, Pod, SERVICES};
use shunt_tests::traffic::{Load, Ports, Server};

/// Asks this program for the demo itself; without it, it runs that as a child and removes what a killed child leaves.
const SHOW: &str = "--show";
/// What the service's pods listen on.
const TARGET: u16 = 8080;
/// What the service listens on.
const PORT: u16 = 80;
/// What it listens on at the nodes' addresses.
const NODE_PORT: u16 = 30080;
/// Connections per second of each client.
const RATE: u32 = 150;

fn main() -> ExitCode {
    let interrupts = SigSet::from_iter([Signal::SIGINT]);
    if env::args().nth(1).as_deref() == Some(SHOW) {
        // Inherited from the parent, which waits for our end.
        interrupts.thread_unblock().expect("a signal can be unblocked");
        return show();
    }
    interrupts.thread_block().expect("a signal can be blocked");
    let mut child = Command::new(env::current_exe().expect("the path of the running program is known"));
    child.arg(SHOW);
    match child.status() {
        Ok(status) if status.code().is_some() => ExitCode::from(status.code().unwrap_or(1) as u8),
        Ok(_) => {
            println!("\ninterrupted; removing the namespaces");
            // A new bed removes what ended processes have left.
            drop(Bed::new());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: cannot run the demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show() -> ExitCode {
    let screen = Screen::new();
    screen.title("Shunt: a service in the kernel, in network namespaces of this machine");
    let mut demo = Demo::build(&screen);
    demo.deploy(&screen);
    demo.spread(&screen);
    let mut clients = demo.start_clients(&screen);
    demo.scale(&screen, &mut clients);
    demo.lose_one(&screen, &mut clients);
    demo.roll(&screen, &mut clients);
    demo.restart_agents(&screen, &mut clients);
    if demo.sum_up(&screen, clients) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A pod that serves, under the name that it answers with.
struct Backend {
    name: String,
    endpoint: Endpoint,
    server: Server,
    _pod: Pod,
}

/// Everything that runs. Fields are dropped in this order.
struct Demo {
    agents: Vec<Agent>,
    backends: Vec<Backend>,
    manifests: Manifests,
    cluster: Cluster,
}

impl Demo {
    fn build(screen: &Screen) -> Self {
        screen.step("Two nodes, each with an agent; a machine outside");
        let cluster = Cluster::build(Plan { nodes: 2, pods: 1, ..Plan::default() });
        let manifests = Manifests::of(&cluster);
        let mut agents = Vec::new();
        for node in &cluster.nodes {
            agents.push(Agent::start_on(&cluster, node, &manifests));
            screen.line(&format!("{}  {}   pods in {}", node.name(), node.addrs.v4, node.pod_cidr.v4()));
        }
        screen.line(&format!("client  {}  outside of the cluster", cluster.client.addrs.v4));
        screen.line("No firewall rule was added; no packet can leave these namespaces.");
        Self { agents, backends: Vec::new(), manifests, cluster }
    }

    /// One more pod that serves, on the nodes in turn.
    fn add_backend(&mut self, name: &str, node: usize) -> Backend {
        let pod = self.cluster.nodes[node].add_pod();
        let server = pod.place.named(name).serve(Ports { tcp: &[TARGET], udp: &[] });
        Backend { name: name.to_owned(), endpoint: Endpoint::from(&pod), server, _pod: pod }
    }

    /// Writes the service with its present backends, and waits until both kernels have them. How long that took.
    fn apply(&self) -> Duration {
        let web = service("web").cluster_ips(cluster_ip()).tcp(PORT, TARGET).node_port(NODE_PORT);
        let begin = Instant::now();
        self.manifests.apply(&web.endpoints(self.backends.iter().map(|backend| backend.endpoint.clone())));
        for agent in &self.agents {
            agent.wait_service("web", "its endpoints", |port| {
                let endpoints = port.cluster.endpoints().len();
                endpoints == self.backends.len()
                    && self.backends.iter().all(|backend| is_in(backend, port.cluster.endpoints()))
            });
        }
        begin.elapsed()
    }

    fn deploy(&mut self, screen: &Screen) {
        screen.step("A service, as a file of plain Kubernetes objects");
        for (name, node) in [("v1-a", 0), ("v1-b", 1)] {
            let backend = self.add_backend(name, node);
            self.backends.push(backend);
        }
        let took = self.apply();
        let node = &self.cluster.nodes[0].addrs;
        let ip = cluster_ip();
        screen.line(&format!("ClusterIP  {}  {}", ip.port(Family::V4, PORT), ip.port(Family::V6, PORT)));
        screen.line(&format!("NodePort   {}  {}", node.port(Family::V4, NODE_PORT), node.port(Family::V6, NODE_PORT)));
        screen.line(&format!("backends   {}", self.names()));
        screen.line(&format!("In the tables of both kernels {} ms after the file was written.", took.as_millis()));
    }

    fn spread(&self, screen: &Screen) {
        screen.step("400 connections from a pod of node-1 to the ClusterIP");
        let to = both(cluster_ip(), PORT);
        let count = Some(400);
        let mut load = self.socket_client().tcp_loop(TcpLoop { to, rate: 0, workers: 4, count });
        load.wait_for("the last of them", |stats| stats.answered + stats.failures() == 400);
        let stats = load.finish();
        screen.bars(&stats);
        screen.failures(&stats);
    }

    fn socket_client(&self) -> &Place {
        &self.cluster.nodes[0].pods[0].place
    }

    fn start_clients(&self, screen: &Screen) -> Clients {
        screen.step(&format!("Three clients, {RATE} new connections a second each, from here to the end"));
        let outside = &self.cluster.client.place;
        let packets = self.cluster.nodes[1].pods[0].place.unhooked();
        let cluster_ips = both(cluster_ip(), PORT);
        let node_ports = both(self.cluster.nodes[0].addrs, NODE_PORT);
        let before = self.agents.iter().map(Agent::opened).collect();
        let start = |who: &'static str, place: &Place, dials: &'static str, to: Vec<_>, hook, node| {
            screen.line(&format!("{who:<33} dials the {dials:<19} {}", Hook::name(hook)));
            let load = place.tcp_loop(TcpLoop { to, rate: RATE, workers: 4, count: None });
            Client { who, dials, hook, node, load }
        };
        let one = start("a pod of node-1", self.socket_client(), "ClusterIP", cluster_ips.clone(), Hook::Socket, 0);
        let two = start("a VM on node-2 (no socket hook)", &packets, "ClusterIP", cluster_ips, Hook::Packet, 1);
        let three = start("the machine outside", outside, "NodePort of node-1", node_ports, Hook::Packet, 0);
        let mut clients = Clients { all: vec![one, two, three], before, begin: Instant::now(), stayed: None };
        clients.more(30);
        screen.line("Each over IPv4 and IPv6 in turn. Nobody tries twice.");
        screen.progress(&mut clients);
        clients
    }

    fn scale(&mut self, screen: &Screen, clients: &mut Clients) {
        screen.step("Scale: two pods become five");
        for (name, node) in [("v1-c", 0), ("v1-d", 1), ("v1-e", 0)] {
            let backend = self.add_backend(name, node);
            self.backends.push(backend);
        }
        let took = self.apply();
        clients.wait_answers_of(&["v1-c", "v1-d", "v1-e"]);
        screen.line(&format!("backends   {} ({} ms)", self.names(), took.as_millis()));
        screen.progress(clients);
    }

    fn lose_one(&mut self, screen: &Screen, clients: &mut Clients) {
        screen.step("One pod goes: its endpoint is withdrawn, then its process is killed (SIGKILL)");
        let gone = self.backends.remove(0);
        let took = self.apply();
        // The grace that a kubelet gives: what was under way is answered.
        clients.more(20);
        gone.server.kill();
        clients.more(30);
        screen.line(&format!("{} is gone; left: {} ({} ms)", gone.name, self.names(), took.as_millis()));
        screen.progress(clients);
    }

    fn roll(&mut self, screen: &Screen, clients: &mut Clients) {
        screen.step("Rolling update: every pod of v1 is replaced by one of v2");
        let new = ["v2-a", "v2-b", "v2-c", "v2-d"];
        for (index, name) in new.iter().enumerate() {
            let backend = self.add_backend(name, index % 2);
            self.backends.push(backend);
            self.apply();
            let old = self.backends.remove(0);
            self.apply();
            clients.more(20);
            old.server.kill();
            screen.line(&format!("{} -> {name}", old.name));
        }
        clients.wait_answers_of(&new);
        screen.progress(clients);
    }

    fn restart_agents(&mut self, screen: &Screen, clients: &mut Clients) {
        screen.step("The agents are killed (SIGKILL), later started again");
        let long = LongLived { to: cluster_ip().port(Family::V4, PORT), connections: 5, interval_ms: 10 };
        let mut open = self.cluster.nodes[1].pods[0].place.unhooked().long_lived(long);
        open.wait_for("five open connections", |stats| stats.open == 5);
        self.agents.iter_mut().for_each(Agent::crash);
        let before = clients.stats().answered;
        clients.more(150);
        open.wait_answers(100);
        let meanwhile = clients.stats().answered - before;
        let meanwhile = thousands(meanwhile);
        screen.line(&format!("No agent runs: {meanwhile} new connections answered, five open ones went on."));
        self.agents.iter_mut().for_each(Agent::start);
        open.wait_answers(100);
        clients.more(30);
        screen.line("The new agents took over what was there; the five connections are still the same.");
        let who = "the same VM, lines on five that stay";
        let long = Client { who, dials: "ClusterIP", hook: Hook::Packet, node: 1, load: open };
        clients.stayed = Some(long.finish(Some(5)));
        screen.progress(clients);
    }

    /// The table at the end; true if all that the demo claims held.
    fn sum_up(&self, screen: &Screen, clients: Clients) -> bool {
        let Clients { all, before, begin, stayed } = clients;
        let seconds = begin.elapsed().as_secs_f64();
        let results: Vec<_> = all.into_iter().map(|client| client.finish(None)).chain(stayed).collect();
        let served: Vec<_> = self.agents.iter().zip(before).map(|(agent, before)| agent.opened() - before).collect();
        screen.table(&results, &served);
        let sum = results.iter().fold(Stats::default(), |sum, result| sum.plus(&result.stats));
        let opened: u64 = results.iter().map(|result| result.opened).sum();
        let is_clean = sum.failures() == 0 && sum.answered == sum.sent;
        let is_counted = results.iter().all(|result| result.counted(&results, &served) == Some(result.opened));
        if is_clean && is_counted {
            screen.conclusion(&format!(
                "What you just saw: {} connections in {seconds:.0} s, each sent to a pod by eBPF in the kernel, while the \
                 service grew, lost a pod, was replaced pod by pod and ran without an agent. None failed.",
                thousands(opened)
            ));
        } else {
            let what =
                if is_clean { "the kernel's counters do not add up to what was sent" } else { "connections failed" };
            screen.conclusion(&format!("This did not hold: {what}."));
        }
        is_clean && is_counted
    }

    fn names(&self) -> String {
        self.backends.iter().map(|backend| backend.name.as_str()).collect::<Vec<_>>().join(" ")
    }
}

fn cluster_ip() -> Addrs {
    SERVICES.host(10)
}

fn both(addrs: Addrs, port: u16) -> Vec<std::net::SocketAddr> {
    Family::ALL.map(|family| addrs.port(family, port)).to_vec()
}

fn is_in(backend: &Backend, endpoints: &[String]) -> bool {
    Family::ALL.iter().any(|&family| {
        let text = format!("{}/TCP", backend.endpoint.addrs.port(family, TARGET));
        endpoints.contains(&text)
    })
}

/// What serves a client.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hook {
    /// connect4 and connect6 of the control group.
    Socket,
    /// The tcx pair of the node's devices.
    Packet,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket hook",
            Self::Packet => "packet path",
        }
    }

    fn count(self, opened: &Opened) -> u64 {
        match self {
            Self::Socket => opened.sockets,
            Self::Packet => opened.flows,
        }
    }
}

/// A client that dials without end, the hook that serves it, and the node whose counters say so.
struct Client {
    who: &'static str,
    dials: &'static str,
    hook: Hook,
    node: usize,
    load: Load,
}

impl Client {
    /// Ends it. It has opened so many connections; `None`: one for each attempt.
    fn finish(self, opened: Option<u64>) -> Outcome {
        let Self { who, dials, hook, node, load } = self;
        let stats = load.finish();
        Outcome { who, dials, hook, node, opened: opened.unwrap_or(stats.sent), stats }
    }
}

/// What a client did.
struct Outcome {
    who: &'static str,
    dials: &'static str,
    hook: Hook,
    node: usize,
    opened: u64,
    stats: Stats,
}

impl Outcome {
    /// Connections that the kernel counted for it: by its hook on its node, less what other clients opened there.
    fn counted(&self, all: &[Self], nodes: &[Opened]) -> Option<u64> {
        let has_same_counter = |other: &&Self| other.hook == self.hook && other.node == self.node;
        let together: u64 = all.iter().filter(has_same_counter).map(|other| other.opened).sum();
        self.hook.count(&nodes[self.node]).checked_sub(together - self.opened)
    }
}

/// The clients, and the nodes' counters before they began.
struct Clients {
    all: Vec<Client>,
    before: Vec<Opened>,
    begin: Instant,
    /// What became of the connections that stayed open.
    stayed: Option<Outcome>,
}

impl Clients {
    /// Waits until each has made so many more attempts, however they ended.
    fn more(&mut self, count: u64) {
        for client in &mut self.all {
            let ended = |stats: &Stats| stats.answered + stats.failures();
            let goal = ended(&client.load.stats()) + count;
            client.load.wait_for("more attempts", |stats| ended(stats) >= goal);
        }
    }

    /// Waits until each was answered by each of these servers.
    fn wait_answers_of(&mut self, names: &[&str]) {
        for client in &mut self.all {
            client
                .load
                .wait_for("answers of new pods", |stats| names.iter().all(|&name| stats.by_server.contains_key(name)));
        }
    }

    fn stats(&mut self) -> Stats {
        self.all.iter_mut().fold(Stats::default(), |sum, client| sum.plus(&client.load.stats()))
    }
}

/// Where the demo is shown.
struct Screen {
    has_colour: bool,
    steps: std::cell::Cell<u32>,
}

impl Screen {
    fn new() -> Self {
        let has_colour = io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none();
        Self { has_colour, steps: std::cell::Cell::new(0) }
    }

    /// `text` with an SGR code (ECMA-48, section 8.3.117), if that is wanted here.
    fn paint(&self, code: &str, text: &str) -> String {
        if self.has_colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn print(&self, text: &str) {
        // Whoever watched has gone; the demo ends soon.
        let _ = writeln!(io::stdout(), "{text}").and_then(|()| io::stdout().flush());
    }

    fn title(&self, text: &str) {
        self.print(&self.paint("1", text));
    }

    fn step(&self, text: &str) {
        self.steps.set(self.steps.get() + 1);
        let number = self.paint("1;36", &format!("{:>2}", self.steps.get()));
        self.print(&format!("\n{number}  {}", self.paint("1", text)));
    }

    fn line(&self, text: &str) {
        self.print(&format!("    {text}"));
    }

    /// The share of each server in the answers.
    fn bars(&self, stats: &Stats) {
        for (server, &count) in &stats.by_server {
            let share = count as f64 / stats.answered.max(1) as f64;
            let bar = self.paint("32", &"█".repeat((share * 50.0).round() as usize));
            self.line(&format!("{server:<6} {bar} {count} ({:.0} %)", share * 100.0));
        }
    }

    /// What the clients have done so far.
    fn progress(&self, clients: &mut Clients) {
        let stats = clients.stats();
        let answered = thousands(stats.answered);
        let failed = self.failed(stats.failures());
        self.line(&format!("so far: {} answered, {failed}", self.paint("1", &answered)));
        self.failures(&stats);
    }

    fn failed(&self, count: u64) -> String {
        self.paint(if count == 0 { "32" } else { "1;31" }, &format!("{count} failed"))
    }

    /// Each kind of failure, if there are any.
    fn failures(&self, stats: &Stats) {
        for (kind, count) in &stats.failed {
            self.line(&self.paint("1;31", &format!("failed: {count} times {kind}")));
        }
    }

    /// What was sent, answered and failed, and what the kernel counted.
    fn table(&self, results: &[Outcome], served: &[Opened]) {
        self.step("What became of it");
        let head = ["CLIENT", "DIALLED", "SENT", "ANSWERED", "FAILED", "SERVED BY", "COUNTED IN THE KERNEL"];
        let row = |result: &Outcome| {
            let what = if result.hook == Hook::Socket { "sockets" } else { "flows" };
            let counted = result.counted(results, served).map_or("less than others sent".to_owned(), thousands);
            let counted = format!("{counted} {what} on node-{}", result.node + 1);
            let Outcome { who, dials, hook, stats, .. } = result;
            let (sent, answered, failed) = (stats.sent, stats.answered, stats.failures());
            let [sent, answered, failed] = [sent, answered, failed].map(thousands);
            [who.to_string(), dials.to_string(), sent, answered, failed, hook.name().to_owned(), counted]
        };
        let rows: Vec<_> = std::iter::once(head.map(str::to_owned)).chain(results.iter().map(row)).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<_> = (0..head.len()).map(width).collect();
        for (index, row) in rows.iter().enumerate() {
            let cell = |(column, text): (usize, &String)| {
                let width = widths[column];
                // Numbers end at the same place.
                if (2..5).contains(&column) { format!("{text:>width$}") } else { format!("{text:<width$}") }
            };
            let line = row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ");
            self.line(&if index == 0 { self.paint("1", line.trim_end()) } else { line.trim_end().to_owned() });
        }
        results.iter().for_each(|result| self.failures(&result.stats));
    }

    fn conclusion(&self, text: &str) {
        self.print(&format!("\n{}", self.paint("1", text)));
    }
}

/// `12345` as `12,345`.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
