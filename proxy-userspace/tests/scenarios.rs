//! Runs `tests/scenarios/*.txt`: Kubernetes objects in, tables out, without a kernel.
//!
//! A file begins with its claim as comment lines. Then come sections, each with a header line `== NAME [SOURCE]`:
//!
//! | section | body |
//! |---|---|
//! | `node` | facts about this node, a line each: `name N`, `address A DEVICE`, `primary A`, `nodeport-addresses primary`, `all` or prefixes, `cluster-cidr PREFIXES`, `snat-ports A-B`, `limits SERVICES BACKENDS SLOTS` |
//! | `objects` | YAML: everything that the source lists (again: what is missing is gone) |
//! | `apply` | YAML: objects that are new or different |
//! | `delete` | objects that are gone, a line each: `KIND NAMESPACE/NAME` |
//! | `restart` | the agent dies and starts again: it knows the tables, and no source has listed |
//! | `tables` | what the tables hold after the steps before |
//! | `plan` | what the last step did |
//! | `lost` | what the last step may have left connections behind of |
//! | `connections` | what is to become of connections, a line each: `FRONTEND BACKEND` as in `10.96.0.10:80/TCP 10.244.1.2:8080/TCP`, and the outcome |
//! | `health-checks` | what load balancers are told of services: where, by port, and the count of local endpoints |
//! | `problems` | what sources and services cannot get, after the steps before |
//! | `packets` | run elsewhere, on the tables that the steps before lead to |
//!
//! The source is `manifests` unless the header names another. `SHUNT_BLESS=1` writes what comes out into the files: then the
//! diff is what has to be read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs};

use proxy_common::addr::{Addr, Port, Proto};
use proxy_userspace::model::content::Content;
use proxy_userspace::model::{
    Event, Family, Interner, Kind, LocalAddress, Name, NodeFacts, NodePortAddresses, ObjectKey, ObjectProblem,
    SourceId, SourceSpec, Update,
};
use proxy_userspace::planner::{BackendAddr, FrontendAddr, Limits, Link, Op, Plan, SnatPorts, State, Tables};
use proxy_userspace::source::decode::document::Item;
use proxy_userspace::source::decode::field::{parse_cidr, parse_ip};
use proxy_userspace::source::decode::{Decoded, Meaning};
use proxy_userspace::source::manifests::parse::{Format, parse_file};

/// A piece of a file: its header and the lines below, comments included.
#[derive(Clone)]
struct Section {
    header: String,
    body: String,
}

impl Section {
    fn name(&self) -> &str {
        self.header.split_whitespace().next().unwrap_or_default()
    }

    fn source(&self) -> SourceId {
        let named = self.header.split_whitespace().nth(1);
        named
            .map_or(SourceId::Manifests, |name| SourceId::from_name(name).unwrap_or_else(|| panic!("no source {name}")))
    }

    /// Lines with content.
    fn lines(&self) -> impl Iterator<Item = &str> {
        self.body.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    }
}

/// A file: the claim, then sections.
struct Scenario {
    claim: String,
    sections: Vec<Section>,
}

impl Scenario {
    fn parse(text: &str) -> Self {
        let mut scenario = Self { claim: String::new(), sections: Vec::new() };
        for line in text.lines() {
            match (line.strip_prefix("== "), scenario.sections.last_mut()) {
                (Some(header), _) => {
                    scenario.sections.push(Section { header: header.trim().to_owned(), body: String::new() });
                }
                (None, Some(section)) => writeln!(section.body, "{line}").expect("strings take anything"),
                (None, None) => writeln!(scenario.claim, "{line}").expect("strings take anything"),
            }
        }
        scenario
    }

    fn text(&self) -> String {
        let sections = self.sections.iter().map(|section| format!("== {}\n{}", section.header, section.body));
        format!("{}{}", self.claim, sections.collect::<String>())
    }

    fn sources(&self) -> Vec<SourceSpec> {
        let steps = self.sections.iter().filter(|section| ["objects", "apply", "delete"].contains(&section.name()));
        let ids: BTreeSet<_> = steps.map(Section::source).collect();
        ids.into_iter().map(|id| SourceSpec { id, kinds: &Kind::ALL }).collect()
    }
}

/// Sections that say what comes out.
const EXPECTING: [&str; 6] = ["tables", "plan", "lost", "connections", "health-checks", "problems"];

/// What the `node` section says.
struct Setup {
    facts: NodeFacts,
    snat: SnatPorts,
    limits: Limits,
}

#[expect(clippy::reversed_empty_ranges, reason = "no ports at all")]
fn setup(section: &Section) -> Setup {
    // Without `snat-ports` none, so that the tables show only what the file is about.
    let mut setup = Setup {
        facts: NodeFacts::named(Name::from("node-a")),
        snat: SnatPorts(1..=0),
        limits: Limits { services: 1000, backends: 1000, slots: 1000 },
    };
    let mut addresses = Vec::new();
    for line in section.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let prefixes = || rest.split(',').map(|text| parse_cidr(text).unwrap()).collect();
        match word {
            "name" => setup.facts.name = Name::from(rest),
            "address" => addresses.push(local_address(rest)),
            "primary" => {
                let addr = parse_ip(rest).unwrap().into();
                *setup.facts.routed.get_mut(Family::of(&addr)) = Some(addr);
            }
            "nodeport-addresses" => {
                setup.facts.node_ports = match rest {
                    "primary" => NodePortAddresses::Primary,
                    "all" => NodePortAddresses::All,
                    _ => NodePortAddresses::Within(prefixes()),
                }
            }
            "cluster-cidr" => setup.facts.cluster_cidrs = prefixes(),
            "snat-ports" => {
                let (first, last) = rest.split_once('-').unwrap();
                setup.snat = SnatPorts(first.parse().unwrap()..=last.parse().unwrap());
            }
            "limits" => {
                let numbers: Vec<u32> = rest.split_whitespace().map(|number| number.parse().unwrap()).collect();
                setup.limits = Limits { services: numbers[0], backends: numbers[1], slots: numbers[2] };
            }
            other => panic!("no fact about a node: {other}"),
        }
    }
    setup.facts.addresses = addresses.into();
    setup
}

fn local_address(text: &str) -> LocalAddress {
    let (addr, device) = text.split_once(' ').unwrap_or((text, "eth0"));
    LocalAddress { addr: parse_ip(addr).unwrap().into(), device: Name::from(device) }
}

/// `10.96.0.10:80/TCP` in its parts.
fn transport(text: &str) -> (Addr, Port, Proto) {
    let (socket, proto) = text.split_once('/').unwrap();
    let socket: SocketAddr = socket.parse().unwrap();
    let proto = [Proto::TCP, Proto::UDP].into_iter().find(|known| known.to_string() == proto).unwrap();
    (socket.ip().into(), Port(socket.port()), proto)
}

/// An agent without a kernel.
struct World {
    specs: Vec<SourceSpec>,
    setup: Setup,
    content: Content,
    interner: Interner,
    state: Option<State>,
    tables: Tables,
    plan: Plan,
    /// What could not be used of each source's objects.
    problems: BTreeMap<(SourceId, String), Vec<ObjectProblem>>,
}

impl World {
    fn new(setup: Setup, specs: Vec<SourceSpec>) -> Self {
        let content = Content::new(Arc::new(setup.facts.clone()), &specs);
        let state = Some(State::empty(setup.limits, setup.snat.clone()));
        Self {
            specs,
            setup,
            content,
            interner: Interner::default(),
            state,
            tables: Tables::default(),
            plan: Plan::default(),
            problems: BTreeMap::new(),
        }
    }

    /// Takes a step; false if the section is none.
    fn step(&mut self, section: &Section) -> bool {
        match section.name() {
            "node" => _ = self.content.set_facts(Arc::new(setup(section).facts)),
            "objects" => self.list(section),
            "apply" => self.apply(section),
            "delete" => self.delete(section),
            "restart" => self.restart(),
            _ => return false,
        }
        self.advance();
        true
    }

    fn send(&mut self, source: SourceId, event: Event) {
        self.content.apply(Update { source, events: vec![event] });
    }

    fn list(&mut self, section: &Section) {
        let source = section.source();
        self.problems.retain(|(known, _), _| *known != source);
        Kind::ALL.into_iter().for_each(|kind| self.send(source, Event::Init(kind)));
        self.decode(section, Event::InitApply);
        Kind::ALL.into_iter().for_each(|kind| self.send(source, Event::InitDone(kind)));
    }

    fn apply(&mut self, section: &Section) {
        self.decode(section, Event::Apply);
    }

    fn decode(&mut self, section: &Section, event: fn(proxy_userspace::model::Object) -> Event) {
        let source = section.source();
        let items = parse_file(Format::Yaml, section.body.as_bytes(), &mut self.interner).unwrap();
        for item in items {
            match item {
                Item::OtherKind { kind } => panic!("{kind} is not read"),
                Item::Object(Ok(decoded)) => self.take(source, decoded, event),
                Item::Object(Err(error)) => {
                    let problem = ObjectProblem::from(&error);
                    self.problems.insert((source, problem.place.clone()), vec![problem]);
                }
            }
        }
    }

    fn take(&mut self, source: SourceId, decoded: Decoded, event: fn(proxy_userspace::model::Object) -> Event) {
        let place = decoded.key.to_string();
        let problem = |error: &dyn std::fmt::Display| ObjectProblem {
            place: place.clone(),
            object: None,
            message: error.to_string(),
        };
        let mut problems: Vec<_> = decoded.problems.iter().map(|error| problem(error)).collect();
        match decoded.meaning {
            Meaning::Object(object) => self.send(source, event(object)),
            Meaning::Ignored(reason) => {
                problems.push(problem(&format!("ignored: {reason}")));
                self.send(source, Event::Delete(decoded.key));
            }
        }
        self.problems.insert((source, place), problems);
    }

    fn delete(&mut self, section: &Section) {
        for line in section.lines() {
            let (kind, name) = line.split_once(' ').unwrap();
            let kind = Kind::ALL.into_iter().find(|known| known.name() == kind).unwrap();
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            let key = ObjectKey { kind, namespace: Name::from(namespace), name: Name::from(name) };
            self.problems.remove(&(section.source(), key.to_string()));
            self.send(section.source(), Event::Delete(key));
        }
    }

    fn restart(&mut self) {
        self.content = Content::new(Arc::new(self.setup.facts.clone()), &self.specs);
        self.state = Some(State::restore(self.setup.limits, self.setup.snat.clone(), &self.tables));
        self.problems.clear();
    }

    fn advance(&mut self) {
        let snapshot = Arc::new(self.content.snapshot().clone());
        let (state, plan) = self.state.take().expect("put back below").advance(&snapshot);
        let ops: Vec<Op> =
            plan.groups.iter().flat_map(|group| group.now.iter().chain(&group.after_grace)).cloned().collect();
        ops.iter().for_each(|op| self.tables.apply(op));
        let (state, _) = state.grace_passed(plan.epoch);
        self.state = Some(state);
        self.plan = plan;
    }

    /// What an expecting section should say; `None` if it expects nothing here.
    fn outcome(&self, section: &Section) -> Option<String> {
        match section.name() {
            "tables" => Some(self.tables.to_string()),
            "plan" => Some(self.plan.to_string()),
            "lost" => Some(self.plan.lost.iter().map(|lost| format!("{lost}\n")).collect()),
            "connections" => Some(section.lines().map(|line| self.connection(line)).collect()),
            "health-checks" => Some(self.health_checks()),
            "problems" => Some(self.all_problems()),
            "packets" => None,
            other => panic!("no section is called {other}"),
        }
    }

    /// A line of `connections` with its outcome.
    fn connection(&self, line: &str) -> String {
        let words: Vec<_> = line.split_whitespace().collect();
        let [(addr, port, proto), (backend, target, _)] = [words[0], words[1]].map(transport);
        let link = Link {
            frontend: FrontendAddr { addr, port, proto },
            backend: BackendAddr { addr: backend, port: target, proto },
        };
        let standing = self.state.as_ref().expect("put back after each step").standing(&link);
        format!("{:<24} {:<24} {standing}\n", words[0], words[1])
    }

    fn health_checks(&self) -> String {
        let checks = self.state.as_ref().expect("put back after each step").health_checks();
        let mut text = String::new();
        for (port, check) in &checks.by_port {
            writeln!(text, "{} {}", port, check.service).expect("strings take anything");
            for addr in checks.addresses_of(*port) {
                let count = check.local_endpoints.get(Family::of(&addr)).expect("a family that is served has a count");
                writeln!(text, "  {addr:<12} {count}").expect("strings take anything");
            }
        }
        text
    }

    fn all_problems(&self) -> String {
        let mut text = String::new();
        for problem in self.problems.values().flatten() {
            writeln!(text, "{problem}").expect("strings take anything");
        }
        for (service, problems) in self.state.as_ref().expect("put back after each step").problems() {
            problems.iter().for_each(|problem| writeln!(text, "{service}: {problem}").expect("strings take anything"));
        }
        text
    }
}

/// Runs a file: what it should look like.
fn run(scenario: &Scenario) -> Scenario {
    let first = scenario.sections.first().filter(|section| section.name() == "node");
    let first = first.expect("a scenario begins with its node");
    let mut world = World::new(setup(first), scenario.sources());
    let mut sections = vec![first.clone()];
    for section in &scenario.sections[1..] {
        let mut section = section.clone();
        if !world.step(&section)
            && let Some(outcome) = world.outcome(&section)
        {
            section.body = if outcome.is_empty() { "\n".to_owned() } else { format!("{outcome}\n") };
        }
        sections.push(section);
    }
    if let Some(last) = sections.last_mut() {
        last.body = format!("{}\n", last.body.trim_end());
    }
    Scenario { claim: scenario.claim.clone(), sections }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/scenarios")
}

/// Lines that differ, with the lines around them.
fn difference(expected: &str, actual: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (expected.lines().collect(), actual.lines().collect());
    let same_start = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let same_end =
        old[same_start..].iter().rev().zip(new[same_start..].iter().rev()).take_while(|(a, b)| a == b).count();
    let context = |lines: &[&str]| lines.iter().map(|line| format!("   {line}\n")).collect::<String>();
    let marked = |mark: &str, lines: &[&str]| lines.iter().map(|line| format!(" {mark} {line}\n")).collect::<String>();
    [
        context(&old[same_start.saturating_sub(5)..same_start]),
        marked("-", &old[same_start..old.len() - same_end]),
        marked("+", &new[same_start..new.len() - same_end]),
        context(&old[old.len() - same_end..].iter().take(3).copied().collect::<Vec<_>>()),
    ]
    .concat()
}

#[test]
fn every_scenario_holds() {
    let files = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == "txt")).collect();
    files.sort();
    assert!(files.len() >= 30, "only {} scenarios were found", files.len());
    let mut failed = Vec::new();
    for path in &files {
        let text = fs::read_to_string(path).unwrap();
        let outcome = std::panic::catch_unwind(|| run(&Scenario::parse(&text)).text());
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        match outcome {
            Ok(outcome) if outcome == text => {}
            Ok(outcome) if env::var_os("SHUNT_BLESS").is_some() => fs::write(path, outcome).unwrap(),
            Ok(outcome) => failed.push(format!("{name}:\n{}", difference(&text, &outcome))),
            Err(_) => failed.push(format!("{name}: panicked, see above\n")),
        }
    }
    assert!(failed.is_empty(), "{} of {} scenarios failed\n{}", failed.len(), files.len(), failed.join("\n"));
}

#[test]
fn scenarios_are_named_by_their_claim_and_expect_something() {
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let scenario = Scenario::parse(&fs::read_to_string(&path).unwrap());
        assert!(scenario.claim.starts_with("# "), "{} does not begin with its claim", path.display());
        let expects = |section: &Section| EXPECTING.contains(&section.name());
        assert!(scenario.sections.iter().any(expects), "{} expects nothing", path.display());
    }
}
