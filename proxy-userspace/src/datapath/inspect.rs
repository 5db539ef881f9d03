//! Tables, attachments and counters in words, for people who ask.
//!
//! May touch: map entries and pins, for reading.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;

use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::counter::ServiceCounters;
use proxy_common::abi::flow::{FlowKey, FlowValue};
use proxy_common::abi::service::ServiceName;
use proxy_common::addr::{Addr, Be16, Proto};
use proxy_common::lb::flow::{Hot, Seconds};
use proxy_common::verdict::DropReason;
use serde::Serialize;

use super::device::Means;
use super::filter;
use super::kernel::{MapFds, on_map};
use super::maps::{Error, PerCpu, Table};
use super::pins::{self, Pins};
use super::sys::{self, LinkTarget};
use crate::planner::{BackendAddr, ServiceId};

/// A device with a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attached {
    /// Interface index in the node's namespace.
    pub ifindex: u32,
}

/// Devices that have programs now.
pub fn attached(pins: &Pins) -> Result<Vec<Attached>, pins::Error> {
    let by_means = Means::ALL.map(|means| attached_by_means(pins, means));
    let mut devices = by_means.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    devices.sort();
    devices.dedup();
    Ok(devices)
}

/// By which means they have them; two while one takes the place of the other.
pub fn means(pins: &Pins) -> Result<Vec<Means>, pins::Error> {
    let by_means = Means::ALL.map(|means| Ok((means, attached_by_means(pins, means)?)));
    let by_means = by_means.into_iter().collect::<Result<Vec<_>, pins::Error>>()?;
    Ok(by_means.into_iter().filter(|(_, devices)| !devices.is_empty()).map(|(means, _)| means).collect())
}

fn attached_by_means(pins: &Pins, means: Means) -> Result<Vec<Attached>, pins::Error> {
    match means {
        Means::Tcx => attached_by(&pins.tcx_links()),
        Means::Clsact => {
            let filters = pins::list(&pins.filters())?.into_iter().filter(|pin| filter::is_there(pin));
            let devices = filters.filter_map(|pin| pins::device_of(&pin));
            Ok(devices.map(|(_, ifindex)| Attached { ifindex }).collect())
        }
    }
}

/// Devices that run the XDP program now.
pub fn attached_xdp(pins: &Pins) -> Result<Vec<Attached>, pins::Error> {
    attached_by(&pins.xdp_links())
}

fn attached_by(links: &Path) -> Result<Vec<Attached>, pins::Error> {
    let mut devices: Vec<_> = pins::list(links)?.iter().filter_map(|pin| attached_to(pin)).collect();
    devices.sort();
    devices.dedup();
    Ok(devices)
}

fn attached_to(pin: &Path) -> Option<Attached> {
    let link = sys::open_pin(pin).ok()?;
    match sys::link_info(link.as_fd()).ok()?.target {
        LinkTarget::Tcx(ifindex) | LinkTarget::Xdp(ifindex) if ifindex != 0 => Some(Attached { ifindex }),
        _ => None,
    }
}

/// Name of a device in the namespace of this thread.
pub fn device_name(ifindex: u32) -> Option<String> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that the function wants.
    let found = unsafe { libc::if_indextoname(ifindex, name.as_mut_ptr().cast()) };
    if found.is_null() {
        return None;
    }
    Some(CStr::from_bytes_until_nul(&name).ok()?.to_string_lossy().into_owned())
}

/// Entries that a map can hold.
pub fn capacity(maps: &MapFds, name: &'static str) -> Result<u32, Error> {
    Ok(sys::map_info(maps.get(name)?).map_err(on_map("examine", name))?.max_entries)
}

/// Bytes that the kernel holds for a map, as it says itself.
pub fn bytes(map: BorrowedFd<'_>) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}

/// Entries of a table of flows, and how many it can hold.
pub fn count(maps: &MapFds, name: &'static str) -> Result<(usize, u32), Error> {
    let mut count = 0;
    Table::<FlowKey, FlowValue>::open(maps, name)?.for_each(|_, _| count += 1)?;
    Ok((count, capacity(maps, name)?))
}

/// Dropped packets and connections, by [`DropReason`] number.
pub fn read_drops(maps: &MapFds) -> Result<Vec<u64>, Error> {
    let counters = PerCpu::<u64>::open(maps, "drop_counters")?;
    let sum = |reason: &DropReason| Ok(counters.get(*reason as u32)?.iter().sum());
    DropReason::ALL.iter().map(sum).collect()
}

/// What went through a service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Connections that the socket hooks opened.
    pub sockets: u64,
    /// Connections that packets opened.
    pub flows: u64,
    /// Packets translated, both directions.
    pub packets: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// New connections that found no backend.
    pub refused: u64,
}

/// Traffic of each of `services`.
pub fn read_traffic(
    maps: &MapFds,
    services: impl Iterator<Item = ServiceId>,
) -> Result<BTreeMap<ServiceId, Traffic>, Error> {
    let counters = PerCpu::<ServiceCounters>::open(maps, "service_counters")?;
    let mut traffic: BTreeMap<_, _> = services.map(|id| (id, Traffic::default())).collect();
    // Ids are dense.
    let count = traffic.keys().next_back().map_or(0, |last| last.0 + 1);
    counters.for_each(count, |id, copies| {
        if let Some(traffic) = traffic.get_mut(&ServiceId(id)) {
            *traffic = copies.iter().fold(Traffic::default(), add);
        }
    })?;
    Ok(traffic)
}

fn add(sum: Traffic, cpu: &ServiceCounters) -> Traffic {
    Traffic {
        sockets: sum.sockets + cpu.sockets,
        flows: sum.flows + cpu.flows,
        packets: sum.packets + cpu.packets,
        bytes: sum.bytes + cpu.bytes,
        refused: sum.refused + cpu.no_backend,
    }
}

/// `10.0.0.1:80/TCP`.
pub fn backend_text(record: &BackendRecord) -> String {
    transport_text(record.addr, record.port, Proto(record.proto))
}

fn transport_text(addr: Addr, port: Be16, proto: Proto) -> String {
    BackendAddr { addr, port: port.host(), proto }.to_string()
}

/// One connection, from its plain entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowView {
    /// Protocol.
    pub proto: String,
    /// Who dialled, as the client knows itself.
    pub client: String,
    /// What it dialled.
    pub frontend: String,
    /// Who serves it.
    pub backend: String,
    /// The source that the backend sees, if it is not the client's own.
    pub rewritten_source: Option<String>,
    /// How far the connection has come.
    pub state: &'static str,
    /// Since the last packet.
    pub idle_seconds: u64,
    /// Name of the service; empty if it is gone.
    pub service: String,
}

/// All connections that packets made.
pub fn read_flows(maps: &MapFds) -> Result<Vec<FlowView>, Error> {
    let mut names = BTreeMap::new();
    Table::<u32, ServiceName>::open(maps, "service_names")?.for_each(|id, name| {
        names.insert(*id, name.as_str().unwrap_or_default().to_owned());
    })?;
    let now = Seconds::from_nanos(sys::monotonic().as_nanos() as u64);
    let mut plain = BTreeMap::new();
    for table in ["flows", "flows_pending"] {
        Table::<FlowKey, FlowValue>::open(maps, table)?.for_each(|key, value| add_plain(&mut plain, key, value))?;
    }
    let view = |(key, value): &(FlowKey, FlowValue)| {
        let service = names.get(&value.service).cloned().unwrap_or_default();
        flow_view(key, value, now, service)
    };
    Ok(plain.values().map(view).collect())
}

/// Ends of a connection, to sort by.
type Ends = (u8, Addr, Be16, Addr, Be16);

/// Adds an entry if it is a plain one and its connection has none yet: established ones are read first, what promotion left
/// behind among the pending ones is an older copy.
fn add_plain(plain: &mut BTreeMap<Ends, (FlowKey, FlowValue)>, key: &FlowKey, value: &FlowValue) {
    if key.kind == FlowKey::PLAIN {
        plain.entry((key.proto, key.a, key.a_port, key.b, key.b_port)).or_insert((*key, *value));
    }
}

fn flow_view(key: &FlowKey, value: &FlowValue, now: Seconds, service: String) -> FlowView {
    let proto = Proto(key.proto);
    let (a, b) = ((key.a, key.a_port), (key.b, key.b_port));
    let (client, backend) = if value.has(FlowValue::CLIENT_IS_A) { (a, b) } else { (b, a) };
    let client_port = if value.alias_port.is_zero() { client.1 } else { value.alias_port };
    let hot = Hot::unpack(value.hot);
    let text = |addr, port| transport_text(addr, port, proto);
    let rewritten = match (value.has(FlowValue::SNAT), value.alias_port.is_zero()) {
        (true, _) => Some(text(value.nat, value.nat_port)),
        (false, false) => Some(text(client.0, client.1)),
        (false, true) => None,
    };
    FlowView {
        proto: proto.to_string(),
        client: text(client.0, client_port),
        frontend: text(value.peer, value.peer_port),
        backend: text(backend.0, backend.1),
        rewritten_source: rewritten,
        state: FlowState::of(hot).name(),
        idle_seconds: (u64::from(hot.seen.age(now)) << 30) / 1_000_000_000,
        service,
    }
}

/// How far a connection has come, in words for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowState {
    /// The return path is not proven.
    Opening,
    /// It is.
    Established,
    /// An end has said that it is done.
    Closing,
    /// Both have, or the backend has reset it; the record is kept for late packets.
    Finished,
}

impl FlowState {
    /// All of them, in numerical order.
    pub const ALL: [Self; 4] = [Self::Opening, Self::Established, Self::Closing, Self::Finished];

    /// From the changing word of a plain entry.
    pub fn of(hot: Hot) -> Self {
        if hot.is_finished() {
            Self::Finished
        } else if hot.state & Hot::ESTABLISHED == 0 {
            Self::Opening
        } else if hot.state & (Hot::FIN_CLIENT | Hot::FIN_BACKEND | Hot::RESET_CLIENT) != 0 {
            Self::Closing
        } else {
            Self::Established
        }
    }

    /// The name in output and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Finished => "finished",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn addr(last: u8) -> Addr {
        Addr::from(Ipv4Addr::new(10, 0, 0, last))
    }

    fn be(port: u16) -> Be16 {
        proxy_common::addr::Port(port).be()
    }

    #[test]
    fn a_flow_is_listed_once_as_its_established_entry_says() {
        let key = FlowKey { kind: FlowKey::PLAIN, a: addr(1), b: addr(2), proto: 6, ..FlowKey::ZERO };
        let other = FlowKey { a_port: be(1), ..key };
        let front = FlowKey { kind: FlowKey::FRONT, ..key };
        let [established, pending] = [Hot::ESTABLISHED, 0]
            .map(|state| FlowValue { hot: Hot { seen: Seconds(7), state }.pack(), ..FlowValue::ZERO });
        let mut plain = BTreeMap::new();
        for (key, value) in [(key, established), (front, established), (key, pending), (other, pending)] {
            add_plain(&mut plain, &key, &value);
        }
        assert_eq!(plain.into_values().collect::<Vec<_>>(), [(key, established), (other, pending)]);
    }

    #[test]
    fn a_flow_shows_the_client_by_its_own_port_whatever_end_of_the_key_it_is() {
        let key = FlowKey { a: addr(1), b: addr(9), a_port: be(80), b_port: be(50001), proto: 6, ..FlowKey::ZERO };
        let value = FlowValue { peer: addr(100), peer_port: be(443), alias_port: be(50000), ..FlowValue::ZERO };
        let view = flow_view(&key, &value, Seconds(0), String::new());
        assert_eq!((view.client.as_str(), view.backend.as_str()), ("10.0.0.9:50000/TCP", "10.0.0.1:80/TCP"));
        assert_eq!(view.rewritten_source.as_deref(), Some("10.0.0.9:50001/TCP"));
        let swapped = FlowValue { flags: FlowValue::CLIENT_IS_A, alias_port: Be16::ZERO, ..value };
        let view = flow_view(&key, &swapped, Seconds(0), String::new());
        assert_eq!((view.client.as_str(), view.rewritten_source), ("10.0.0.1:80/TCP", None));
    }
}
