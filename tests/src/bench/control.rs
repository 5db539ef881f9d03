//! The agent with many services: processor time and memory of a cold start, and the time of one change.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::path::{fill, filler};
use super::{Row, median};
use crate::agent::Agent;
use crate::manifests::Manifests;
use crate::topology::{Cluster, Family, Plan, SERVICES};

/// Changes measured.
const CHANGES: usize = 21;

/// Measures with so many services of ten endpoints.
pub fn rows(services: usize) -> Vec<Row> {
    eprintln!("control: {services} services");
    let cluster = Cluster::build(Plan::default());
    let manifests = Manifests::of(&cluster);
    fill(&manifests, 0, services);
    let agent = Agent::start_on(&cluster, &cluster.nodes[0], &manifests);
    let start = usage(agent.process().id());
    let change = median((0..CHANGES).map(|turn| change(&agent, &manifests, turn).as_secs_f64() * 1e3).collect());
    let now = usage(agent.process().id());
    vec![
        Row {
            what: format!("cold start with {services} services from manifests, processor time of the agent"),
            goal: "under 1 s",
            found: format!("{:.2} s", start.cpu.as_secs_f64()),
            reached: Some(start.cpu < Duration::from_secs(1)),
        },
        Row {
            what: format!("memory of the agent with {services} services (RSS)"),
            goal: "under 60 MiB",
            found: format!("{:.0} MiB", now.rss_mib),
            reached: Some(now.rss_mib < 60.0),
        },
        Row {
            what: format!("one endpoint changed among {services} services: file written to tables changed"),
            goal: "under 10 ms",
            found: format!("{change:.1} ms"),
            reached: Some(change < 10.0),
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

struct Usage {
    cpu: Duration,
    rss_mib: f64,
}

/// Processor time and resident memory of a process (proc_pid_stat(5)).
fn usage(pid: u32) -> Usage {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the agent runs");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("its name is in parentheses").1.split_whitespace().collect();
    let field = |number: usize| fields[number - 3].parse::<u64>().expect("a number");
    // Ticks of 1/100 s and pages of 4 KiB, as on every Linux this runs on.
    let cpu = Duration::from_millis((field(14) + field(15)) * 10);
    Usage { cpu, rss_mib: (field(24) * 4) as f64 / 1024.0 }
}
