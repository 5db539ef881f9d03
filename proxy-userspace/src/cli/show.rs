//! `shunt status | services | backends | flows`: what the pinned tables say, without an agent.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::Range;
use proxy_common::verdict::DropReason;
use serde::Serialize;

use super::table::{Format, Row, print_json, print_rows};
use super::{ShowArgs, StatusArgs};
use crate::datapath::device::Means;
use crate::datapath::inspect::{self, Attached, FlowView, Traffic};
use crate::datapath::kernel::MapFds;
use crate::datapath::pins::{self, Pins};
use crate::datapath::restore;
use crate::error::chain;
use crate::planner::{BackendId, ServiceId, Tables};
use crate::telemetry::admin::{self, Report};
use crate::telemetry::source::{OutageReport, SourceReport};

fn open(args: &ShowArgs) -> Result<(Pins, MapFds)> {
    let pins = args.pins.pins();
    let maps = open_maps(&pins)?;
    Ok((pins, maps))
}

/// The tables that count, if this program can read them.
pub(super) fn open_maps(pins: &Pins) -> Result<MapFds> {
    let maps = MapFds::open_pinned(pins)?;
    let others = pins.layouts()?;
    if maps.get("services").is_err() {
        match others.last() {
            Some(other) => bail!("tables of layout version {} cannot be read by this program", other.version),
            None => bail!(
                "nothing is pinned below {}; does an agent run here, or with another --bpffs?",
                pins.base().display()
            ),
        }
    }
    Ok(maps)
}

/// What `shunt status` shows.
#[derive(Serialize)]
struct StatusView {
    layout: u32,
    agent: bool,
    socket_hooks: usize,
    devices: Vec<String>,
    /// How they have their programs; two ways while one takes the place of the other.
    attach: Vec<&'static str>,
    /// Those that run the XDP program.
    xdp_devices: Vec<String>,
    tables: BTreeMap<&'static str, Use>,
    drops: BTreeMap<&'static str, u64>,
    /// What a running agent says.
    report: Option<Report>,
}

/// How full a table is.
#[derive(Serialize)]
struct Use {
    used: u64,
    capacity: u64,
}

/// Prints the state in short.
pub(super) fn status(args: &StatusArgs) -> Result<()> {
    let (pins, maps) = open(&args.show)?;
    let mut view = status_view(&pins, &maps)?;
    if view.agent {
        match admin::ask(&args.admin_socket) {
            Ok(report) => view.report = Some(report),
            Err(error) => eprintln!("note: {}; does it listen at another --admin-socket?", chain(&error)),
        }
    }
    match args.show.output {
        Format::Json => print_json(&view),
        Format::Table => super::print(&status_text(&view)),
    }
}

fn status_view(pins: &Pins, maps: &MapFds) -> Result<StatusView> {
    let tables = restore::read_tables(maps)?;
    let limits = restore::read_limits(maps)?;
    let used = |used: usize, capacity: u32| Use { used: used as u64, capacity: u64::from(capacity) };
    let (flows, flow_capacity) = inspect::count(maps, "flows")?;
    let (pending, pending_capacity) = inspect::count(maps, "flows_pending")?;
    let drops = inspect::read_drops(maps)?;
    Ok(StatusView {
        layout: pins.current()?.map_or(pins.version(), |layout| layout.version),
        agent: pins.is_locked()?,
        socket_hooks: pins::list(&pins.cgroup_links())?.len(),
        devices: inspect::attached(pins)?.into_iter().map(device_name).collect(),
        attach: inspect::means(pins)?.into_iter().map(Means::name).collect(),
        xdp_devices: inspect::attached_xdp(pins)?.into_iter().map(device_name).collect(),
        tables: BTreeMap::from([
            ("services", used(tables.services.len(), limits.services)),
            ("backends", used(tables.backends.len(), limits.backends)),
            ("slots", used(tables.slots.len(), limits.slots)),
            ("frontends", used(tables.frontends.len(), inspect::capacity(maps, "frontends")?)),
            ("addresses", used(tables.addresses.len(), inspect::capacity(maps, "addresses")?)),
            ("flows", used(flows, flow_capacity)),
            ("flows_pending", used(pending, pending_capacity)),
        ]),
        report: None,
        drops: DropReason::ALL.iter().map(|reason| (reason.name(), drops[*reason as usize])).collect(),
    })
}

/// Name of a device of this namespace, else its index.
fn device_name(attached: Attached) -> String {
    inspect::device_name(attached.ifindex).unwrap_or_else(|| format!("#{}", attached.ifindex))
}

fn status_text(view: &StatusView) -> String {
    let agent = if view.agent { "running" } else { "not running; what is programmed works on" };
    let list = |devices: &[String]| if devices.is_empty() { "none".to_owned() } else { devices.join(" ") };
    let mut lines = vec![
        format!("agent         {agent}"),
        format!("table layout  {}", view.layout),
        format!("socket hooks  {} attached", view.socket_hooks),
        format!("devices       {}", list(&view.devices)),
        format!("attached by   {}", if view.attach.is_empty() { "-".to_owned() } else { view.attach.join(" ") }),
        format!("XDP           {}", list(&view.xdp_devices)),
        String::new(),
    ];
    lines.extend(view.tables.iter().map(|(name, table)| format!("{name:<13} {} of {}", table.used, table.capacity)));
    lines.push(String::new());
    let dropped: Vec<_> = view.drops.iter().filter(|(_, count)| **count > 0).collect();
    match dropped.is_empty() {
        true => lines.push("drops         none".to_owned()),
        false => lines.extend(dropped.iter().map(|(reason, count)| format!("dropped       {count} {reason}"))),
    }
    lines.extend(view.report.iter().flat_map(report_lines));
    lines.join("\n") + "\n"
}

fn report_lines(report: &Report) -> Vec<String> {
    let sources = report.sources.iter().flat_map(source_lines);
    let refused =
        report.refused.iter().map(|trouble| format!("refused       {}: {}", trouble.subject, trouble.message));
    let problems =
        report.problems.iter().map(|trouble| format!("problem       {}: {}", trouble.subject, trouble.message));
    let xdp =
        report.xdp_refused.iter().map(|trouble| format!("no XDP        {}: {}", trouble.subject, trouble.message));
    let full =
        report.nearly_full.iter().map(|trouble| format!("table         {}: {}", trouble.subject, trouble.message));
    let off =
        report.families_off.iter().map(|trouble| format!("family        {}: {}", trouble.subject, trouble.message));
    sources.chain(refused).chain(problems).chain(xdp).chain(full).chain(off).collect()
}

/// What a source has listed, and what is wrong with it.
fn source_lines(source: &SourceReport) -> Vec<String> {
    let counts = source.objects.iter().filter(|(_, count)| **count > 0).map(|(kind, count)| format!("{count} {kind}"));
    let objects = match counts.collect::<Vec<_>>() {
        counts if counts.is_empty() => "no objects".to_owned(),
        counts => counts.join(", "),
    };
    let listed = match source.listed {
        true => objects,
        false => "not listed yet; what was programmed for it stays".to_owned(),
    };
    let heard = source.last_contact_age.map_or("never heard".to_owned(), |age| format!("heard {} ago", age_text(age)));
    let mut lines = vec![format!("source        {}: {listed}; {heard}", source.name)];
    lines.extend(source.outages.iter().map(|outage| {
        let OutageReport { what, since, age, why } = outage;
        let age = age_text(*age);
        format!("stale         {}: no news of {what} since {since} ({age}): {why}; what was known stays", source.name)
    }));
    let rejected = source.rejected.iter();
    lines.extend(
        rejected.map(|trouble| format!("rejected      {}: {}: {}", source.name, trouble.subject, trouble.message)),
    );
    lines
}

/// A time span in its largest unit.
fn age_text(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// One line of `shunt services`.
#[derive(Serialize)]
struct ServiceView {
    id: u32,
    name: String,
    frontends: Vec<FrontendView>,
    cluster: SetView,
    local: SetView,
    affinity_seconds: u32,
    #[serde(flatten)]
    traffic: Traffic,
}

#[derive(Serialize)]
struct FrontendView {
    at: String,
    inside: &'static str,
    outside: &'static str,
}

/// A set of backends, or what happens to clients because it is empty.
#[derive(Serialize)]
#[serde(untagged)]
enum SetView {
    Backends(Vec<String>),
    Empty(&'static str),
}

impl SetView {
    fn cell(&self) -> String {
        match self {
            Self::Backends(backends) => backends.len().to_string(),
            Self::Empty(what) => (*what).to_owned(),
        }
    }
}

impl Row for ServiceView {
    const TITLES: &'static [&'static str] = &[
        "ID",
        "SERVICE",
        "FRONTENDS",
        "CLUSTER",
        "LOCAL",
        "AFFINITY",
        "SOCKETS",
        "FLOWS",
        "PACKETS",
        "BYTES",
        "REFUSED",
    ];

    fn cells(&self) -> Vec<String> {
        let affinity = match self.affinity_seconds {
            0 => "-".to_owned(),
            seconds => format!("{seconds}s"),
        };
        vec![
            self.id.to_string(),
            self.name.clone(),
            self.frontends.iter().map(|frontend| frontend.at.as_str()).collect::<Vec<_>>().join(","),
            self.cluster.cell(),
            self.local.cell(),
            affinity,
            self.traffic.sockets.to_string(),
            self.traffic.flows.to_string(),
            self.traffic.packets.to_string(),
            self.traffic.bytes.to_string(),
            self.traffic.refused.to_string(),
        ]
    }
}

/// Prints the services.
pub(super) fn services(args: &ShowArgs) -> Result<()> {
    let (_, maps) = open(args)?;
    let tables = restore::read_tables(&maps)?;
    let traffic = inspect::read_traffic(&maps, tables.names.keys().copied())?;
    let mut frontends: BTreeMap<ServiceId, Vec<FrontendView>> = BTreeMap::new();
    for (at, value) in &tables.frontends {
        frontends.entry(ServiceId(value.service)).or_default().push(frontend_view(at.to_string(), value));
    }
    let mut view = |id: &ServiceId| service_view(*id, &tables, frontends.remove(id).unwrap_or_default(), traffic[id]);
    let rows: Vec<_> = tables.names.keys().map(&mut view).collect();
    print_rows(&rows, args.output)
}

fn service_view(id: ServiceId, tables: &Tables, frontends: Vec<FrontendView>, traffic: Traffic) -> ServiceView {
    let record = tables.services.get(&id);
    // A record that was never written reads as what it means: nobody is there.
    let set = |packed: Option<u64>| set_view(packed.unwrap_or(Range::REJECT.pack()), tables);
    ServiceView {
        id: id.0,
        name: tables.names.get(&id).cloned().unwrap_or_default(),
        frontends,
        cluster: set(record.map(|record| record.cluster)),
        local: set(record.map(|record| record.local)),
        affinity_seconds: record.map_or(0, |record| record.affinity),
        traffic,
    }
}

fn frontend_view(at: String, value: &FrontendValue) -> FrontendView {
    let set = |flag| if value.has(flag) { "local" } else { "cluster" };
    FrontendView { at, inside: set(FrontendValue::INSIDE_LOCAL), outside: set(FrontendValue::OUTSIDE_LOCAL) }
}

fn set_view(packed: u64, tables: &Tables) -> SetView {
    let range = Range::unpack(packed);
    if range.count == 0 {
        return SetView::Empty(if range == Range::DROP { "drop" } else { "reject" });
    }
    let backends = (range.base..range.base + range.count).filter_map(|position| tables.slots.get(&position));
    SetView::Backends(backends.map(|slot| backend_text(BackendId(slot.backend), tables)).collect())
}

fn backend_text(id: BackendId, tables: &Tables) -> String {
    tables.backends.get(&id).map_or_else(|| format!("backend {id} (gone)"), inspect::backend_text)
}

/// One line of `shunt backends`.
#[derive(Serialize)]
struct BackendView {
    id: u32,
    address: String,
    local: bool,
    services: Vec<String>,
}

impl Row for BackendView {
    const TITLES: &'static [&'static str] = &["ID", "BACKEND", "LOCAL", "SERVICES"];

    fn cells(&self) -> Vec<String> {
        let local = if self.local { "yes" } else { "-" };
        vec![self.id.to_string(), self.address.clone(), local.to_owned(), self.services.join(",")]
    }
}

/// Prints the backends.
pub(super) fn backends(args: &ShowArgs) -> Result<()> {
    let (_, maps) = open(args)?;
    let tables = restore::read_tables(&maps)?;
    let users = users(&tables);
    let row = |(id, record): (&BackendId, &proxy_common::abi::backend::BackendRecord)| BackendView {
        id: id.0,
        address: inspect::backend_text(record),
        local: record.is_local(),
        services: users.get(id).cloned().unwrap_or_default(),
    };
    print_rows(&tables.backends.iter().map(row).collect::<Vec<_>>(), args.output)
}

/// Names of the services in whose sets a backend is.
fn users(tables: &Tables) -> BTreeMap<BackendId, Vec<String>> {
    let mut users: BTreeMap<BackendId, Vec<String>> = BTreeMap::new();
    for slot in tables.slots.values() {
        let Some(name) = tables.names.get(&ServiceId(slot.owner)) else { continue };
        let names = users.entry(BackendId(slot.backend)).or_default();
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    users
}

impl Row for FlowView {
    const TITLES: &'static [&'static str] =
        &["PROTO", "CLIENT", "FRONTEND", "BACKEND", "SOURCE", "STATE", "IDLE", "SERVICE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.proto.clone(),
            self.client.clone(),
            self.frontend.clone(),
            self.backend.clone(),
            self.rewritten_source.clone().unwrap_or_else(|| "kept".to_owned()),
            self.state.to_owned(),
            format!("{}s", self.idle_seconds),
            self.service.clone(),
        ]
    }
}

/// Prints the connections.
pub(super) fn flows(args: &ShowArgs) -> Result<()> {
    let (_, maps) = open(args)?;
    let mut rows = inspect::read_flows(&maps)?;
    rows.sort_by(|a, b| (&a.service, &a.client).cmp(&(&b.service, &b.client)));
    print_rows(&rows, args.output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_tells_what_it_has_and_what_is_wrong() {
        let outage = OutageReport {
            what: "Service".into(),
            since: "2026-01-01T00:00:00Z".into(),
            age: 300,
            why: "the API server cannot be reached".into(),
        };
        let rejected = admin::Trouble { subject: "Service default/web".into(), message: "no".into() };
        let mut source = SourceReport {
            name: "kubernetes".into(),
            listed: true,
            last_contact_age: Some(301),
            objects: [("Service".to_owned(), 3), ("Endpoints".to_owned(), 0)].into(),
            outages: vec![outage],
            rejected: vec![rejected],
            ..SourceReport::default()
        };
        let expected = [
            "source        kubernetes: 3 Service; heard 5 min ago",
            "stale         kubernetes: no news of Service since 2026-01-01T00:00:00Z (5 min): the API server cannot be \
             reached; what was known stays",
            "rejected      kubernetes: Service default/web: no",
        ];
        assert_eq!(source_lines(&source), expected);
        source = SourceReport { name: "manifests".into(), ..SourceReport::default() };
        let expected = ["source        manifests: not listed yet; what was programmed for it stays; never heard"];
        assert_eq!(source_lines(&source), expected);
    }

    #[test]
    fn empty_sets_say_what_clients_get() {
        let tables = Tables::default();
        assert_eq!(set_view(Range::REJECT.pack(), &tables).cell(), "reject");
        assert_eq!(set_view(Range::DROP.pack(), &tables).cell(), "drop");
    }
}
