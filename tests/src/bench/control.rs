//! The agent with many services: processor time and memory of a cold start, by where the objects come from, and the time of
//! one change.
//!
//! Processor time is that of the agent's process, the kernel's part in it included; most of that is the verifier's, which
//! reads the programs at every start: a start without any service shows it by itself. Memory is what is resident without the
//! pages of tables that are mapped: those are part of the bytes that maps hold, which stand beside it.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::path::{fill, filler};
use super::{Row, api, median};
use crate::agent::Agent;
use crate::manifests::Manifests;
use crate::topology::{Cluster, Family, Plan, SERVICES};

/// Changes measured.
const CHANGES: usize = 21;

/// Measures with so many services of ten endpoints.
pub fn rows(services: usize) -> Vec<Row> {
    let mut rows = vec![bare_start()];
    rows.extend(from_api(services));
    rows.extend(from_json(services));
    rows.extend(from_yaml(services));
    rows
}

/// A start without any service.
fn bare_start() -> Row {
    eprintln!("control: no services");
    let cluster = Cluster::build(Plan::default());
    let agent = Agent::start_on(&cluster, &cluster.nodes[0], &Manifests::of(&cluster));
    let usage = usage(agent.process().id());
    let found = format!("{:.2} s user, {:.2} s kernel", usage.user.as_secs_f64(), usage.kernel.as_secs_f64());
    Row::note("start without services, processor time of the agent".to_owned(), found)
}

fn from_api(services: usize) -> Vec<Row> {
    eprintln!("control: {services} services from an API server");
    let cluster = Cluster::build(Plan::default());
    let node = &cluster.nodes[0];
    let server = api::Server::start(&node.place, (0..services).map(filler));
    let mut agent = Agent::new(&cluster, node).with("--kubeconfig", server.kubeconfig(&cluster.bed));
    agent.start();
    start_rows("the Kubernetes API", services, &usage(agent.process().id()))
}

fn from_json(services: usize) -> Vec<Row> {
    eprintln!("control: {services} services from JSON");
    let cluster = Cluster::build(Plan::default());
    let manifests = Manifests::of(&cluster);
    for number in (0..services).step_by(100) {
        let objects = (number..(number + 100).min(services)).flat_map(filler);
        let text: String = objects.map(|object| format!("{object}\n")).collect();
        fs::write(manifests.dir().join(format!("filler-{number}.json")), text).expect("the folder takes files");
    }
    let agent = Agent::start_on(&cluster, &cluster.nodes[0], &manifests);
    start_rows("JSON manifests", services, &usage(agent.process().id()))
}

fn from_yaml(services: usize) -> Vec<Row> {
    eprintln!("control: {services} services from YAML");
    let cluster = Cluster::build(Plan::default());
    let manifests = Manifests::of(&cluster);
    fill(&manifests, 0, services);
    let agent = Agent::start_on(&cluster, &cluster.nodes[0], &manifests);
    let mut rows = start_rows("YAML manifests", services, &usage(agent.process().id()));
    let change = median((0..CHANGES).map(|turn| change(&agent, &manifests, turn).as_secs_f64() * 1e3).collect());
    rows.push(Row {
        what: format!("one endpoint changed among {services} services: file written to tables changed"),
        goal: "under 10 ms",
        found: format!("{change:.1} ms"),
        reached: Some(change < 10.0),
    });
    rows
}

fn start_rows(source: &str, services: usize, usage: &Usage) -> Vec<Row> {
    let cpu = usage.user + usage.kernel;
    vec![
        Row {
            what: format!("cold start with {services} services from {source}, processor time of the agent"),
            goal: "under 1 s",
            found: format!(
                "{:.2} s: {:.2} s user, {:.2} s kernel",
                cpu.as_secs_f64(),
                usage.user.as_secs_f64(),
                usage.kernel.as_secs_f64()
            ),
            reached: Some(cpu < Duration::from_secs(1)),
        },
        Row {
            what: format!("memory of the agent with {services} services from {source} (RSS)"),
            goal: "under 60 MiB",
            found: format!("{:.0} MiB, and {:.0} MiB of tables", usage.rss_mib, usage.maps_mib),
            reached: Some(usage.rss_mib < 60.0),
        },
    ]
}

/// Writes a service with one endpoint more or less and waits until the tables show it.
fn change(agent: &Agent, manifests: &Manifests, turn: usize) -> Duration {
    let mut objects = filler(0);
    objects[0]["metadata"]["name"] = "changed".into();
    let vip = SERVICES.host(2).get(Family::V4).to_string();
    objects[0]["spec"]["clusterIP"] = vip.as_str().into();
    objects[0]["spec"]["clusterIPs"] = Value::from(vec![vip]);
    objects[1]["metadata"]["labels"]["kubernetes.io/service-name"] = "changed".into();
    objects[1]["metadata"]["name"] = "changed-a".into();
    if turn % 2 == 1 {
        objects[1]["endpoints"].as_array_mut().expect("it is one").pop();
    }
    let before = tables::published(agent, "changed");
    let start = Instant::now();
    manifests.write("changed", &objects);
    while tables::published(agent, "changed") == before {
        assert!(start.elapsed() < Duration::from_secs(10), "the change never shows");
    }
    start.elapsed()
}

/// Reads the pinned tables directly: a command would take longer than what is measured.
mod tables {
    use std::path::PathBuf;

    use aya::maps::{Array, HashMap, Map, MapData};
    use proxy_common::abi::service::{ServiceName, ServiceRecord};
    use std::cell::RefCell;

    use crate::agent::Agent;

    thread_local! {
        /// The id of the service that is looked at, once found.
        static ID: RefCell<Option<u32>> = const { RefCell::new(None) };
    }

    fn pinned(agent: &Agent, name: &str) -> MapData {
        let layouts = std::fs::read_dir(agent.bpffs()).expect("the agent has pinned");
        let mut paths = layouts.flatten().flat_map(|entry| {
            let base: PathBuf = entry.path();
            [base.join(name), base.join("maps").join(name)]
        });
        let path = paths.find(|path| path.exists()).unwrap_or_else(|| panic!("{name} is not pinned"));
        MapData::from_pin(path).expect("it is a map")
    }

    fn id(agent: &Agent, service: &str) -> Option<u32> {
        let names = HashMap::<_, u32, ServiceName>::try_from(Map::HashMap(pinned(agent, "service_names")));
        let names = names.expect("its types are known");
        let part = format!("/{service}:");
        names
            .iter()
            .flatten()
            .find(|(_, name)| name.as_str().is_some_and(|name| name.contains(&part)))
            .map(|(id, _)| id)
    }

    /// The published cluster set of a service; `None` while it has none.
    pub fn published(agent: &Agent, service: &str) -> Option<u64> {
        let known = ID.with_borrow(|id| *id);
        let id = match known {
            Some(id) => id,
            None => {
                let id = id(agent, service)?;
                ID.set(Some(id));
                id
            }
        };
        let services = Array::<_, ServiceRecord>::try_from(Map::Array(pinned(agent, "services")));
        services.expect("its types are known").get(&id, 0).ok().map(|record| record.cluster)
    }
}

/// What a process has used.
pub struct Usage {
    /// Processor time outside of the kernel.
    pub user: Duration,
    /// Processor time in the kernel.
    pub kernel: Duration,
    /// Processor time of children that have ended, both together.
    pub children: Duration,
    /// Resident memory without mapped tables.
    pub rss_mib: f64,
    /// What the kernel holds for the process's maps.
    pub maps_mib: f64,
}

/// Processor time (proc_pid_stat(5)) and memory of a running process.
pub fn usage(id: u32) -> Usage {
    let process = format!("/proc/{id}");
    let stat = fs::read_to_string(format!("{process}/stat")).expect("the process runs");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("its name is in parentheses").1.split_whitespace().collect();
    // Ticks of 1/100 s, as on every Linux this runs on.
    let ticks = |number: usize| Duration::from_millis(fields[number - 3].parse::<u64>().expect("a number") * 10);
    let smaps = fs::read_to_string(format!("{process}/smaps")).expect("root may read it");
    let maps = map_bytes(&process) as f64 / f64::from(1 << 20);
    let children = ticks(16) + ticks(17);
    Usage {
        user: ticks(14),
        kernel: ticks(15),
        children,
        rss_mib: resident_kib(&smaps) as f64 / 1024.0,
        maps_mib: maps,
    }
}

/// Resident KiB of everything but mapped BPF maps (proc_pid_smaps(5)).
fn resident_kib(smaps: &str) -> u64 {
    let mut is_table = false;
    let mut sum = 0;
    for line in smaps.lines() {
        match line.strip_prefix("Rss:") {
            Some(size) if !is_table => {
                sum += size.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok()).expect("KiB");
            }
            Some(_) => {}
            None if line.split_whitespace().next().is_some_and(|word| !word.ends_with(':')) => {
                is_table = line.ends_with("bpf-map");
            }
            None => {}
        }
    }
    sum
}

/// Bytes that the kernel holds for a process's maps, each counted once.
fn map_bytes(process: &str) -> u64 {
    let fds = fs::read_dir(format!("{process}/fdinfo")).expect("root may read it");
    let infos = fds.flatten().filter_map(|fd| fs::read_to_string(fd.path()).ok());
    let of_map = |info: String| {
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        Some((field("map_id:")?, field("memlock:")?))
    };
    infos.filter_map(of_map).collect::<BTreeMap<_, _>>().into_values().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_tables_are_not_counted_as_resident() {
        let smaps = "7f00-7f10 rw-s 00000000 00:0e 1076 anon_inode:bpf-map\nSize: 64 kB\nRss:      40 kB\n\
                     7f20-7f30 rw-p 00000000 00:00 0 \nSize: 64 kB\nRss:      7 kB\nVmFlags: rd wr\n\
                     7f40-7f50 r-xp 00000000 00:1f 3 /usr/bin/shunt\nRss:  5 kB\n";
        assert_eq!(resident_kib(smaps), 12);
    }
}
