//! What is programmed and what goes through it, read while somebody looks, and what of it is shown: found, sorted, cut.
//!
//! Counters are read at most once a second, whoever asks how often; tables again only when plans have changed them. When
//! nobody has asked for a while, all of it is dropped. May touch: the pinned tables, for reading.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_common::abi::service::Range;
use proxy_common::verdict::DropReason;
use serde::Serialize;

use crate::datapath::inspect::{self, Traffic};
use crate::datapath::kernel::MapFds;
use crate::datapath::maps::Error;
use crate::datapath::pins::Pins;
use crate::datapath::restore;
use crate::planner::{ServiceId, Tables};

/// Between two readings.
const PERIOD: Duration = Duration::from_millis(900);
/// Rates are told by two readings that are no further apart.
const TRUSTED: Duration = Duration::from_secs(10);
/// The most rows of one answer.
pub const MOST_ROWS: usize = 200;

/// A service port as it is programmed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Service {
    id: ServiceId,
    name: String,
    frontends: Vec<String>,
    /// Addresses of its backends, and whether each is on this node.
    backends: Vec<(String, bool)>,
    /// What clients get while there are none.
    refusal: &'static str,
}

/// The tables, as they are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    services: Vec<Service>,
    /// How many there are.
    pub counts: Counts,
}

/// How many there are of what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    services: usize,
    frontends: usize,
    backends: usize,
    /// Services that nobody serves.
    without_backends: usize,
}

impl View {
    fn new(tables: &Tables) -> Self {
        let mut frontends: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        for (at, value) in &tables.frontends {
            frontends.entry(value.service).or_default().push(at.to_string());
        }
        let service = |(id, name): (&ServiceId, &String)| {
            let record = tables.services.get(id);
            let ranges = record.map_or([Range::REJECT; 2], |record| [record.cluster, record.local].map(Range::unpack));
            Service {
                id: *id,
                name: name.clone(),
                frontends: frontends.remove(&id.0).unwrap_or_default(),
                backends: backends(tables, ranges),
                refusal: if ranges[0] == Range::DROP { "dropped" } else { "refused" },
            }
        };
        let mut services: Vec<_> = tables.names.iter().map(service).collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        let counts = Counts {
            services: services.len(),
            frontends: tables.frontends.len(),
            backends: tables.backends.len(),
            without_backends: services.iter().filter(|service| service.backends.is_empty()).count(),
        };
        Self { services, counts }
    }
}

/// Backends of either set, each once.
fn backends(tables: &Tables, ranges: [Range; 2]) -> Vec<(String, bool)> {
    let positions = ranges.into_iter().flat_map(|range| range.base..range.base.saturating_add(range.count));
    let ids: BTreeSet<_> =
        positions.filter_map(|position| tables.slots.get(&position)).map(|slot| slot.backend).collect();
    let records = ids.into_iter().filter_map(|id| tables.backends.get(&crate::planner::BackendId(id)));
    records.map(|record| (inspect::backend_text(record), record.is_local())).collect()
}

/// Counters at one moment.
#[derive(Clone, Debug)]
struct Reading {
    at: Instant,
    traffic: BTreeMap<ServiceId, Traffic>,
    drops: Vec<u64>,
}

/// How much a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Rates {
    connections: f64,
    packets: f64,
    bytes: f64,
    refused: f64,
}

impl Rates {
    fn between(old: &Traffic, new: &Traffic, seconds: f64) -> Self {
        // A service that took the id of another begins anew: its counters are below.
        let rate = |old: u64, new: u64| new.saturating_sub(old) as f64 / seconds;
        Self {
            connections: rate(old.sockets + old.flows, new.sockets + new.flows),
            packets: rate(old.packets, new.packets),
            bytes: rate(old.bytes, new.bytes),
            refused: rate(old.refused, new.refused),
        }
    }
}

/// What was read last.
#[derive(Debug, Default)]
pub struct Look {
    view: Option<(u64, Arc<View>)>,
    before: Option<Reading>,
    last: Option<Reading>,
}

impl Look {
    /// Reads what is due. `plans`: how many plans have changed the tables until now.
    pub fn refresh(&mut self, pins: &Pins, plans: u64) -> Result<(), Error> {
        let now = Instant::now();
        if self.last.as_ref().is_some_and(|last| now.duration_since(last.at) < PERIOD) {
            return Ok(());
        }
        let maps = MapFds::open_pinned(pins)?;
        if self.view.as_ref().is_none_or(|(known, _)| *known != plans) {
            self.view = Some((plans, Arc::new(View::new(&restore::read_tables(&maps)?))));
        }
        let ids = self.view().services.iter().map(|service| service.id).collect::<Vec<_>>();
        let traffic = inspect::read_traffic(&maps, ids.into_iter())?;
        self.add(Reading { at: now, traffic, drops: inspect::read_drops(&maps)? });
        Ok(())
    }

    fn add(&mut self, reading: Reading) {
        self.before = self.last.take().filter(|before| reading.at.duration_since(before.at) < TRUSTED);
        self.last = Some(reading);
    }

    /// When counters were read last.
    pub fn read_at(&self) -> Option<Instant> {
        self.last.as_ref().map(|last| last.at)
    }

    /// The tables.
    pub fn view(&self) -> Arc<View> {
        self.view.as_ref().map(|(_, view)| view.clone()).unwrap_or_default()
    }

    fn seconds(&self) -> Option<f64> {
        let (before, last) = (self.before.as_ref()?, self.last.as_ref()?);
        Some(last.at.duration_since(before.at).as_secs_f64()).filter(|seconds| *seconds > 0.0)
    }

    fn traffic(&self, id: ServiceId) -> Traffic {
        self.last.as_ref().and_then(|last| last.traffic.get(&id)).copied().unwrap_or_default()
    }

    /// Nothing, if it is not known yet.
    fn rates(&self, id: ServiceId) -> Option<Rates> {
        let old = self.before.as_ref()?.traffic.get(&id)?;
        Some(Rates::between(old, &self.traffic(id), self.seconds()?))
    }

    /// All services together: totals and rates.
    pub fn total(&self) -> (Traffic, Option<Rates>) {
        let view = self.view();
        let mut total = Traffic::default();
        let mut rates = self.seconds().map(|_| Rates::default());
        for service in &view.services {
            let traffic = self.traffic(service.id);
            total.sockets += traffic.sockets;
            total.flows += traffic.flows;
            total.packets += traffic.packets;
            total.bytes += traffic.bytes;
            total.refused += traffic.refused;
            if let (Some(rates), Some(of_one)) = (&mut rates, self.rates(service.id)) {
                rates.connections += of_one.connections;
                rates.packets += of_one.packets;
                rates.bytes += of_one.bytes;
                rates.refused += of_one.refused;
            }
        }
        (total, rates)
    }

    /// Drops by reason, those that never happened left out.
    pub fn drops(&self) -> Vec<Drops> {
        let Some(last) = &self.last else { return Vec::new() };
        let drops = DropReason::ALL.into_iter().filter_map(|reason| {
            let count = *last.drops.get(reason as usize)?;
            let before = self.before.as_ref().and_then(|before| before.drops.get(reason as usize));
            let rate = before.zip(self.seconds()).map(|(old, seconds)| count.saturating_sub(*old) as f64 / seconds);
            (count > 0).then_some(Drops { reason: reason.name(), count, rate })
        });
        drops.collect()
    }

    /// The rows that a question asks for.
    pub fn rows(&self, question: &Wanted) -> Rows {
        let view = self.view();
        let needle = question.find.to_lowercase();
        let mut found: Vec<_> = view.services.iter().filter(|service| is_found(service, &needle)).collect();
        self.sort(&mut found, question);
        let matched = found.len();
        let limit = question.limit.min(MOST_ROWS);
        let rows = found.into_iter().skip(question.offset).take(limit).map(|service| self.row(service));
        Rows { total: view.services.len(), matched, offset: question.offset, rows: rows.collect() }
    }

    fn sort(&self, services: &mut [&Service], question: &Wanted) {
        let by_number = |number: &dyn Fn(&Service) -> f64, services: &mut [&Service]| {
            services.sort_by(|a, b| number(b).total_cmp(&number(a)));
        };
        let rates = |service: &Service| self.rates(service.id).unwrap_or_default();
        let traffic = |service: &Service| self.traffic(service.id);
        match question.sort {
            Sort::Name => {}
            Sort::Backends => by_number(&|service| service.backends.len() as f64, services),
            Sort::Connections => {
                by_number(&|service| (traffic(service).sockets + traffic(service).flows) as f64, services)
            }
            Sort::Rate => by_number(&|service| rates(service).connections, services),
            Sort::Packets => by_number(&|service| rates(service).packets, services),
            Sort::Bytes => by_number(&|service| rates(service).bytes, services),
            Sort::Refused => by_number(&|service| traffic(service).refused as f64, services),
        }
        if question.is_reversed {
            services.reverse();
        }
    }

    fn row(&self, service: &Service) -> Row {
        Row {
            id: service.id.0,
            name: service.name.clone(),
            frontends: service.frontends.clone(),
            backends: service.backends.len(),
            local: service.backends.iter().filter(|(_, is_local)| *is_local).count(),
            refusal: service.backends.is_empty().then_some(service.refusal),
            traffic: self.traffic(service.id),
            rates: self.rates(service.id),
        }
    }

    /// The backends of a service.
    pub fn backends(&self, id: u32) -> Option<Vec<Backend>> {
        let view = self.view();
        let service = view.services.iter().find(|service| service.id.0 == id)?;
        let backend = |(address, is_local): &(String, bool)| Backend { address: address.clone(), local: *is_local };
        Some(service.backends.iter().map(backend).collect())
    }
}

/// A part of its name, of a frontend or of a backend.
fn is_found(service: &Service, needle: &str) -> bool {
    needle.is_empty()
        || service.name.to_lowercase().contains(needle)
        || service.frontends.iter().any(|frontend| frontend.to_lowercase().contains(needle))
        || service.backends.iter().any(|(backend, _)| backend.to_lowercase().contains(needle))
}

/// By what rows are sorted: by name upwards, by all else the largest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Name.
    #[default]
    Name,
    /// How many backends.
    Backends,
    /// Connections until now.
    Connections,
    /// Connections a second.
    Rate,
    /// Packets a second.
    Packets,
    /// Bytes a second.
    Bytes,
    /// Connections that found nobody.
    Refused,
}

/// Which rows are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Text to be found.
    pub find: String,
    /// Order.
    pub sort: Sort,
    /// The other way round.
    pub is_reversed: bool,
    /// How many are skipped.
    pub offset: usize,
    /// How many are wanted.
    pub limit: usize,
}

impl Wanted {
    /// From the query of an address (`find=x&sort=rate`); what is not understood is left out.
    pub fn parse(query: &str) -> Self {
        let mut wanted = Self { find: String::new(), sort: Sort::Name, is_reversed: false, offset: 0, limit: 50 };
        for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let value = decode(value);
            match name {
                "find" => wanted.find = value.trim().to_owned(),
                "sort" => wanted.sort = parse_sort(&value),
                "reverse" => wanted.is_reversed = value == "1",
                "offset" => wanted.offset = value.parse().unwrap_or(0),
                "limit" => wanted.limit = value.parse().unwrap_or(wanted.limit),
                _ => {}
            }
        }
        wanted
    }
}

fn parse_sort(text: &str) -> Sort {
    match text {
        "backends" => Sort::Backends,
        "connections" => Sort::Connections,
        "rate" => Sort::Rate,
        "packets" => Sort::Packets,
        "bytes" => Sort::Bytes,
        "refused" => Sort::Refused,
        _ => Sort::Name,
    }
}

/// A value of a query as it was meant (WHATWG URL, application/x-www-form-urlencoded).
pub fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut position = 0;
    while let Some(&byte) = bytes.get(position) {
        let escaped = text.get(position + 1..position + 3).filter(|_| byte == b'%');
        match (escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()), byte) {
            (Some(escaped), _) => {
                decoded.push(escaped);
                position += 2;
            }
            (None, b'+') => decoded.push(b' '),
            (None, byte) => decoded.push(byte),
        }
        position += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// A part of the services.
#[derive(Debug, Serialize)]
pub struct Rows {
    total: usize,
    matched: usize,
    offset: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    id: u32,
    name: String,
    frontends: Vec<String>,
    backends: usize,
    local: usize,
    /// What clients get while there are no backends.
    refusal: Option<&'static str>,
    traffic: Traffic,
    rates: Option<Rates>,
}

/// A backend.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Backend {
    address: String,
    local: bool,
}

/// Drops for one reason.
#[derive(Debug, PartialEq, Serialize)]
pub struct Drops {
    reason: &'static str,
    count: u64,
    rate: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(id: u32, name: &str, backends: usize) -> Service {
        Service {
            id: ServiceId(id),
            name: name.to_owned(),
            frontends: vec![format!("10.96.0.{id}:80/TCP")],
            backends: (0..backends).map(|number| (format!("10.244.{id}.{number}:8080/TCP"), number == 0)).collect(),
            refusal: "refused",
        }
    }

    /// Three services; the second reading is two seconds after the first.
    fn look() -> Look {
        let services = vec![service(1, "api", 2), service(2, "db", 0), service(3, "Web", 1)];
        let counts = Counts { services: 3, frontends: 3, backends: 3, without_backends: 1 };
        let mut look = Look { view: Some((1, Arc::new(View { services, counts }))), ..Look::default() };
        let start = Instant::now();
        for (seconds, connections) in [(0, [0, 0, 10]), (2, [2, 0, 30])] {
            let traffic =
                (1..).zip(connections).map(|(id, sockets)| (ServiceId(id), Traffic { sockets, ..Traffic::default() }));
            let mut drops = vec![0; DropReason::ALL.len()];
            drops[DropReason::NoEndpoint as usize] = seconds * 3;
            look.add(Reading { at: start + Duration::from_secs(seconds), traffic: traffic.collect(), drops });
        }
        look
    }

    fn names(look: &Look, query: &str) -> Vec<String> {
        look.rows(&Wanted::parse(query)).rows.into_iter().map(|row| row.name).collect()
    }

    #[test]
    fn rates_are_of_the_time_between_two_readings() {
        let look = look();
        let rows = look.rows(&Wanted::parse(""));
        let rates: Vec<_> = rows.rows.iter().map(|row| row.rates.map(|rates| rates.connections)).collect();
        assert_eq!(rates, [Some(1.0), Some(0.0), Some(10.0)]);
        let (total, rates) = look.total();
        assert_eq!((total.sockets, rates.map(|rates| rates.connections)), (32, Some(11.0)));
        assert_eq!(look.drops(), [Drops { reason: "no_endpoint", count: 6, rate: Some(3.0) }]);
        let mut later = look;
        let at = later.read_at().unwrap() + TRUSTED;
        later.add(Reading { at, traffic: BTreeMap::new(), drops: Vec::new() });
        assert_eq!(later.total().1, None, "an old reading tells no rate");
    }

    #[test]
    fn rows_are_found_by_name_frontend_and_backend_and_sorted_and_cut() {
        let look = look();
        assert_eq!(names(&look, ""), ["api", "db", "Web"]);
        assert_eq!(names(&look, "find=WEB"), ["Web"]);
        assert_eq!(names(&look, "find=10.96.0.2%3A80"), ["db"]);
        assert_eq!(names(&look, "find=10.244.1."), ["api"]);
        assert_eq!(names(&look, "sort=rate"), ["Web", "api", "db"]);
        assert_eq!(names(&look, "sort=backends&reverse=1"), ["db", "Web", "api"]);
        assert_eq!(names(&look, "offset=1&limit=1"), ["db"]);
        let rows = look.rows(&Wanted::parse("find=b&limit=1"));
        assert_eq!((rows.total, rows.matched, rows.rows.len()), (3, 2, 1));
        assert_eq!(look.backends(3).map(|backends| backends.len()), Some(1));
        assert_eq!(look.backends(9), None);
    }

    #[test]
    fn queries_are_decoded_whatever_they_hold() {
        assert_eq!(decode("a%20b+c%2"), "a b c%2");
        assert_eq!(decode("%ff%zz%é"), "\u{fffd}%zz%é");
        assert_eq!(Wanted::parse("limit=x&&=&offset=-1&sort=none").limit, 50);
    }
}
