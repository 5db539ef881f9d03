//! Tables, counters and attachments as metrics, read when they are asked for.
//!
//! Counters of services are read in batches, as far as ids go; tables that may be huge are not walked: how many flows there
//! are is what the sweep last saw. May touch: map entries and pins, for reading.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use proxy_common::abi::address::AddressClass;
use proxy_common::abi::affinity::{AffinityKey, AffinityValue};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::device::DeviceRecord;
use proxy_common::abi::fragment::{FragmentKey, FragmentValue};
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::abi::service::{Range, ServiceName, ServiceRecord};
use proxy_common::addr::Addr;
use proxy_common::verdict::DropReason;
use tokio::sync::watch;
use tracing::warn;

use super::inspect::{self, FlowState, Traffic};
use super::kernel::MapFds;
use super::maps::{Error, MappedArray, Table};
use super::pins::{self, Pins};
use super::{sweep, sys};
use crate::error::chain;
use crate::model::Family;
use crate::planner::ServiceId;

/// Reads what the kernel holds whenever metrics are asked for.
#[derive(Clone, Debug)]
pub struct Tables {
    maps: Arc<MapFds>,
    pins: Pins,
    sweep: watch::Receiver<sweep::Report>,
}

impl Tables {
    /// Makes the tables' metrics known to `registry`. Gives back who reads them.
    pub fn register(
        registry: &mut Registry,
        maps: Arc<MapFds>,
        pins: Pins,
        sweep: watch::Receiver<sweep::Report>,
    ) -> Self {
        registry.sub_registry_with_prefix("kubeproxy").register_collector(Box::new(Locality(maps.clone())));
        let tables = Self { maps, pins, sweep };
        registry.sub_registry_with_prefix("shunt").register_collector(Box::new(tables.clone()));
        tables
    }

    /// How many entries of a table are in use, and how many fit; none where that is not known.
    pub fn usage(&self, name: &str) -> Result<Option<(usize, u32)>, Error> {
        let capacity = sys::map_info(self.maps.get(name)?).map_err(super::kernel::on_map("examine", name))?.max_entries;
        let sweep = *self.sweep.borrow();
        Ok(self.entries(name, &sweep)?.map(|used| (used, capacity)))
    }

    fn read(&self) -> Result<Reading, Error> {
        let sweep = *self.sweep.borrow();
        Ok(Reading {
            services: read_services(&self.maps)?,
            drops: inspect::read_drops(&self.maps)?,
            maps: self
                .maps
                .iter()
                .filter_map(|(name, fd)| self.read_map(name, fd, &sweep).transpose())
                .collect::<Result<_, _>>()?,
            devices: count(inspect::attached(&self.pins)),
            xdp_devices: count(inspect::attached_xdp(&self.pins)),
            socket_hooks: count(pins::list(&self.pins.cgroup_links())),
            sweep,
        })
    }

    /// Nothing for a map without a capacity: what sockets keep lies with the sockets.
    fn read_map(&self, name: &str, fd: BorrowedFd<'_>, sweep: &sweep::Report) -> Result<Option<MapUse>, Error> {
        let capacity = sys::map_info(fd).map_err(super::kernel::on_map("examine", name))?.max_entries;
        let name = name.to_owned();
        if capacity == 0 {
            return Ok(None);
        }
        Ok(Some(MapUse { entries: self.entries(&name, sweep)?, capacity, bytes: inspect::bytes(fd), name }))
    }

    /// How many entries of a map are in use; nothing where that is not known or means nothing.
    fn entries(&self, name: &str, sweep: &sweep::Report) -> Result<Option<usize>, Error> {
        let maps = &self.maps;
        let is_swept = sweep.rounds > 0;
        Ok(match name {
            "services" | "service_names" => Some(entries::<u32, ServiceName>(maps, "service_names")?),
            "slots" => Some(used_slots(maps)?),
            "backends" => Some(live_backends(maps)?),
            "frontends" => Some(entries::<FrontendKey, FrontendValue>(maps, "frontends")?),
            "addresses" => Some(entries::<Addr, AddressClass>(maps, "addresses")?),
            "affinity" => Some(entries::<AffinityKey, AffinityValue>(maps, "affinity")?),
            "fragments" => Some(entries::<FragmentKey, FragmentValue>(maps, "fragments")?),
            "devices" => Some(entries::<u32, DeviceRecord>(maps, "devices")?),
            "flows" => is_swept.then_some(sweep.last.established),
            "flows_pending" => is_swept.then_some(sweep.last.pending),
            _ => None,
        })
    }
}

/// What an unreadable list has is not known; the next scrape looks again.
fn count<T>(list: Result<Vec<T>, pins::Error>) -> Option<usize> {
    list.inspect_err(|error| warn!(error = chain(error), "attachments cannot be counted")).ok().map(|list| list.len())
}

fn read_services(maps: &MapFds) -> Result<Vec<(Service, Traffic)>, Error> {
    let mut names = Vec::new();
    Table::<u32, ServiceName>::open(maps, "service_names")?.for_each(|id, name| {
        names.extend(name.as_str().and_then(Service::parse).map(|service| (ServiceId(*id), service)));
    })?;
    let traffic = inspect::read_traffic(maps, names.iter().map(|(id, _)| *id))?;
    Ok(names.into_iter().map(|(id, service)| (service, traffic[&id])).collect())
}

fn entries<K: aya::Pod, V: aya::Pod>(maps: &MapFds, name: &'static str) -> Result<usize, Error> {
    let mut count = 0;
    Table::<K, V>::open(maps, name)?.for_each(|_, _| count += 1)?;
    Ok(count)
}

fn live_backends(maps: &MapFds) -> Result<usize, Error> {
    let mut count = 0;
    MappedArray::open(maps, "backends", false)?
        .for_each(|record: &BackendRecord| count += usize::from(record.is_live()));
    Ok(count)
}

/// Slots in published ranges.
fn used_slots(maps: &MapFds) -> Result<usize, Error> {
    let mut count = 0;
    MappedArray::open(maps, "services", false)?.for_each(|record: &ServiceRecord| count += slots_of(record));
    Ok(count)
}

/// The two sets of a service may share slots.
fn slots_of(record: &ServiceRecord) -> usize {
    let [a, b] = [record.cluster, record.local].map(Range::unpack);
    let end = |range: Range| range.base.saturating_add(range.count);
    let shared = end(a).min(end(b)).saturating_sub(a.base.max(b.base));
    (a.count + b.count - shared) as usize
}

/// Under kube-proxy's name, which services a traffic policy Local leaves without endpoints on this node.
#[derive(Debug)]
struct Locality(Arc<MapFds>);

/// Traffic policy and family.
type Policy = (&'static str, Family);

impl Collector for Locality {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let counts = match without_local(&self.0) {
            Ok(counts) => counts,
            Err(error) => {
                warn!(error = chain(&error), "the tables cannot be read for metrics");
                return Ok(());
            }
        };
        let help = "Service ports that have endpoints, but a traffic policy Local and no endpoint on this node";
        let series = counts.into_iter().map(|((policy, family), count)| {
            ([("traffic_policy", policy), ("ip_family", family.name())], count as u64)
        });
        gauges(&mut encoder, "sync_proxy_rules_no_local_endpoints_total", help, series)
    }
}

/// How many service ports drop the clients of a policy, for want of an endpoint on this node and not of all endpoints.
fn without_local(maps: &MapFds) -> Result<BTreeMap<Policy, usize>, Error> {
    let (mut dropping, mut id) = (BTreeSet::new(), 0);
    MappedArray::open(maps, "services", false)?.for_each(|record: &ServiceRecord| {
        if Range::unpack(record.local) == Range::DROP {
            dropping.insert(id);
        }
        id += 1;
    });
    let mut frontends = Vec::new();
    if !dropping.is_empty() {
        Table::open(maps, "frontends")?.for_each(|key: &FrontendKey, value: &FrontendValue| {
            frontends.extend(dropping.contains(&value.service).then_some((key.addr, *value)));
        })?;
    }
    Ok(count_policies(&frontends))
}

/// Counts services by the policies that lead clients of their frontends to the local set.
fn count_policies(frontends: &[(Addr, FrontendValue)]) -> BTreeMap<Policy, usize> {
    let mut services: BTreeMap<Policy, BTreeSet<u32>> = ["internal", "external"]
        .into_iter()
        .flat_map(|policy| Family::ALL.map(|family| ((policy, family), BTreeSet::new())))
        .collect();
    for (addr, value) in frontends {
        let policy = match (value.has(FrontendValue::CLUSTER_IP), value.has(FrontendValue::OUTSIDE_LOCAL)) {
            (true, true) => "internal",
            (false, true) => "external",
            (_, false) => continue,
        };
        services.entry((policy, Family::of(addr))).or_default().insert(value.service);
    }
    services.into_iter().map(|(policy, services)| (policy, services.len())).collect()
}

/// A service port by its labels.
#[derive(Debug, PartialEq, Eq)]
struct Service {
    name: String,
    family: String,
}

impl Service {
    /// From its name in the tables, `manifests/default/web:http/TCP/IPv4`.
    fn parse(text: &str) -> Option<Self> {
        let (name, family) = text.rsplit_once('/')?;
        Some(Self { name: name.to_owned(), family: family.to_owned() })
    }

    fn labels(&self) -> [(&'static str, &str); 2] {
        [("service", &self.name), ("family", &self.family)]
    }

    fn labels_via(&self, via: &'static str) -> [(&'static str, &str); 3] {
        [("service", &self.name), ("family", &self.family), ("via", via)]
    }
}

#[derive(Debug)]
struct MapUse {
    name: String,
    entries: Option<usize>,
    capacity: u32,
    bytes: Option<u64>,
}

/// What was read at one time.
#[derive(Debug)]
struct Reading {
    services: Vec<(Service, Traffic)>,
    /// By [`DropReason`] number.
    drops: Vec<u64>,
    maps: Vec<MapUse>,
    devices: Option<usize>,
    xdp_devices: Option<usize>,
    socket_hooks: Option<usize>,
    sweep: sweep::Report,
}

impl Collector for Tables {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        match self.read() {
            Ok(reading) => reading.encode(&mut encoder),
            Err(error) => {
                warn!(error = chain(&error), "the tables cannot be read for metrics");
                Ok(())
            }
        }
    }
}

/// Writes all series of a counter.
fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in series {
        ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

/// Writes all series of a gauge.
fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in series {
        ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

/// Writes a counter without labels.
fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    ConstCounter::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
}

/// Writes a gauge without labels, if its value is known.
fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: Option<usize>) -> fmt::Result {
    let Some(value) = value else { return Ok(()) };
    ConstGauge::new(value as u64).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

impl Reading {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_services(encoder)?;
        self.encode_maps(encoder)?;
        self.encode_sweep(encoder)?;
        let drops =
            DropReason::ALL.iter().zip(&self.drops).map(|(reason, count)| ([("reason", reason.name())], *count));
        counters(encoder, "drops", "Packets and connections dropped or rejected, by reason", drops)?;
        gauge(encoder, "attached_devices", "Network devices with programs", self.devices)?;
        gauge(encoder, "attached_xdp_devices", "Network devices that run the XDP program", self.xdp_devices)?;
        gauge(encoder, "attached_socket_hooks", "Socket hooks with programs", self.socket_hooks)
    }

    fn encode_services(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let services = &self.services;
        let connections = services.iter().flat_map(|(service, traffic)| {
            let socket = (service.labels_via("socket"), traffic.sockets);
            [socket, (service.labels_via("packet"), traffic.flows)]
        });
        let help = "Connections to a service port, by who picked the backend: the socket hooks or the packet path";
        counters(encoder, "service_connections", help, connections)?;
        let packets = services.iter().map(|(service, traffic)| (service.labels(), traffic.packets));
        counters(encoder, "service_packets", "Packets translated for a service port, both directions", packets)?;
        let bytes = services.iter().map(|(service, traffic)| (service.labels(), traffic.bytes));
        counters(encoder, "service_bytes", "Bytes of translated packets, headers included, both directions", bytes)?;
        let refused = services.iter().map(|(service, traffic)| (service.labels(), traffic.refused));
        counters(encoder, "service_no_backend", "Connections to a service port that found no backend", refused)
    }

    fn encode_maps(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let label = |map: &MapUse| [("map", map.name.clone())];
        let entries = self.maps.iter().filter_map(|map| Some((label(map), map.entries? as u64)));
        gauges(encoder, "map_entries", "Entries in use, where they are counted; of flows as last swept", entries)?;
        let capacity = self.maps.iter().map(|map| (label(map), u64::from(map.capacity)));
        gauges(encoder, "map_max_entries", "Entries that fit", capacity)?;
        let bytes = self.maps.iter().filter_map(|map| Some((label(map), map.bytes?)));
        gauges(encoder, "map_bytes", "Kernel memory of a map", bytes)
    }

    fn encode_sweep(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let sweep = &self.sweep;
        counter(encoder, "sweep_rounds", "Rounds through the tables of flows", sweep.rounds)?;
        counter(encoder, "sweep_expired_flows", "Flows removed because they were over", sweep.expired)?;
        counter(encoder, "sweep_orphaned_entries", "Entries removed because their flow was gone", sweep.orphans)?;
        let is_swept = sweep.rounds > 0;
        let flows = FlowState::ALL.iter().filter(|_| is_swept);
        let flows = flows.map(|state| ([("state", state.name())], sweep.last.flows[*state as usize] as u64));
        gauges(encoder, "flows", "Connections by packets, by state, as last swept", flows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text::encode_registry;

    #[derive(Debug)]
    struct Fixed(Reading);

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            self.0.encode(&mut encoder)
        }
    }

    fn text(reading: Reading) -> String {
        let mut registry = Registry::default();
        registry.sub_registry_with_prefix("shunt").register_collector(Box::new(Fixed(reading)));
        let mut text = String::new();
        encode_registry(&mut text, &registry).unwrap();
        text
    }

    fn reading() -> Reading {
        let traffic = Traffic { sockets: 1, flows: 2, packets: 3, bytes: 4, refused: 5 };
        let map = |name: &str, entries, bytes| MapUse { name: name.to_owned(), entries, capacity: 9, bytes };
        Reading {
            services: vec![(Service::parse("manifests/default/web:http/TCP/IPv4").unwrap(), traffic)],
            drops: vec![7; DropReason::ALL.len()],
            maps: vec![map("flows", Some(6), Some(800)), map("ports", None, None)],
            devices: Some(3),
            xdp_devices: Some(1),
            socket_hooks: None,
            sweep: sweep::Report::default(),
        }
    }

    fn samples(text: &str) -> Vec<&str> {
        text.lines().filter(|line| !line.starts_with('#')).collect()
    }

    #[test]
    fn services_without_local_endpoints_are_counted_once_by_policy_and_family() {
        let both = FrontendValue::INSIDE_LOCAL | FrontendValue::OUTSIDE_LOCAL;
        let frontend = |addr: &str, service, flags| {
            (Addr::from(addr.parse::<std::net::IpAddr>().unwrap()), FrontendValue { service, flags })
        };
        let frontends = [
            frontend("10.96.0.1", 1, FrontendValue::CLUSTER_IP | both),
            frontend("10.96.0.2", 2, FrontendValue::CLUSTER_IP),
            frontend("203.0.113.1", 2, FrontendValue::OUTSIDE_LOCAL),
            frontend("0.0.0.0", 2, FrontendValue::OUTSIDE_LOCAL),
            frontend("::", 3, FrontendValue::OUTSIDE_LOCAL),
        ];
        let counts = count_policies(&frontends).into_iter();
        let counts: Vec<_> = counts.map(|((policy, family), count)| (policy, family.name(), count)).collect();
        let expected =
            [("external", "IPv4", 1), ("external", "IPv6", 1), ("internal", "IPv4", 1), ("internal", "IPv6", 0)];
        assert_eq!(counts, expected);
    }

    #[test]
    fn every_counter_of_a_service_has_its_series() {
        let text = text(reading());
        let of_service = |line: &&&str| line.starts_with("shunt_service_");
        let samples: Vec<_> = samples(&text).iter().filter(of_service).copied().collect();
        let expected = [
            r#"shunt_service_connections_total{service="manifests/default/web:http/TCP",family="IPv4",via="socket"} 1"#,
            r#"shunt_service_connections_total{service="manifests/default/web:http/TCP",family="IPv4",via="packet"} 2"#,
            r#"shunt_service_packets_total{service="manifests/default/web:http/TCP",family="IPv4"} 3"#,
            r#"shunt_service_bytes_total{service="manifests/default/web:http/TCP",family="IPv4"} 4"#,
            r#"shunt_service_no_backend_total{service="manifests/default/web:http/TCP",family="IPv4"} 5"#,
        ];
        assert_eq!(samples, expected);
    }

    #[test]
    fn every_drop_reason_has_a_series() {
        let text = text(reading());
        for reason in DropReason::ALL {
            let line = format!(r#"shunt_drops_total{{reason="{}"}} 7"#, reason.name());
            assert!(samples(&text).contains(&line.as_str()), "{line}\n{text}");
        }
    }

    #[test]
    fn what_is_not_known_has_no_series() {
        let text = text(reading());
        let samples = samples(&text);
        for line in [r#"shunt_map_entries{map="flows"} 6"#, r#"shunt_map_max_entries{map="ports"} 9"#] {
            assert!(samples.contains(&line), "{line}\n{text}");
        }
        for name in [r#"shunt_map_entries{map="ports"}"#, r#"shunt_map_bytes{map="ports"}"#, "shunt_flows"] {
            assert!(!samples.iter().any(|line| line.starts_with(name)), "{name}\n{text}");
        }
        assert!(samples.contains(&"shunt_attached_devices 3"), "{text}");
        assert!(samples.contains(&"shunt_attached_xdp_devices 1"), "{text}");
        assert!(!samples.iter().any(|line| line.starts_with("shunt_attached_socket_hooks")), "{text}");
    }

    #[test]
    fn flows_are_told_after_the_first_sweep() {
        let last = sweep::Outcome { flows: [1, 2, 3, 4], ..Default::default() };
        let text = text(Reading { sweep: sweep::Report { rounds: 1, last, ..Default::default() }, ..reading() });
        let flows: Vec<_> = samples(&text).into_iter().filter(|line| line.starts_with("shunt_flows")).collect();
        let expected = [
            r#"shunt_flows{state="opening"} 1"#,
            r#"shunt_flows{state="established"} 2"#,
            r#"shunt_flows{state="closing"} 3"#,
            r#"shunt_flows{state="finished"} 4"#,
        ];
        assert_eq!(flows, expected);
    }

    #[test]
    fn shared_slots_count_once() {
        let record = |cluster: (u32, u32), local: (u32, u32)| {
            let pack = |(base, count)| Range { base, count }.pack();
            ServiceRecord { cluster: pack(cluster), local: pack(local), ..ServiceRecord::ZERO }
        };
        assert_eq!(slots_of(&record((10, 4), (12, 2))), 4);
        assert_eq!(slots_of(&record((10, 4), (14, 2))), 6);
        assert_eq!(
            slots_of(&ServiceRecord {
                cluster: Range::REJECT.pack(),
                local: Range::DROP.pack(),
                ..ServiceRecord::ZERO
            }),
            0
        );
    }
}
