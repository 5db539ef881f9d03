//! `shunt monitor`: connections as they are opened, moved and refused, told by the programs themselves.

use std::io::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use jiff::{SignedDuration, Timestamp};
use proxy_common::abi::address::{AddressClass, PortUse};
use proxy_common::abi::event::{EventKind, EventRecord, Watch};
use proxy_common::addr::{Addr, Proto};
use proxy_common::lb::pick;
use proxy_common::tables::Tables as _;
use proxy_common::verdict::DropReason;
use serde::Serialize;

use super::table::Format;
use super::{PinArgs, explain, show};
use crate::datapath::inspect;
use crate::datapath::lookup::Lookup;
use crate::datapath::monitor::Monitor;
use crate::datapath::sys;

/// What is shown, of what, for how long.
#[derive(Debug, Args)]
pub(super) struct MonitorArgs {
    /// Only these kinds
    #[arg(long, value_name = "KIND", value_enum, value_delimiter = ',', default_values_t = Kind::ALL)]
    kinds: Vec<Kind>,
    /// Only what has this address at one of its ends: what is dialled, the backend, or a packet's sender (sockets that dial have
    /// no address yet: they are told by process)
    #[arg(long, value_name = "ADDR")]
    address: Option<IpAddr>,
    /// Only services whose name has this in it, such as `shop/` or `web:http`
    #[arg(long, value_name = "TEXT")]
    service: Option<String>,
    /// End after so many events
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// End after this time (as in 90s, 10m)
    #[arg(long = "for", value_name = "DURATION", value_parser = super::cleanup::parse_duration)]
    duration: Option<Duration>,
    /// Form of the output; JSON is one object a line
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    pins: PinArgs,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A process dialled a service and goes to a backend
    Socket,
    /// A UDP socket goes to another backend than before
    Moved,
    /// A process dialled a service and sees "connection refused"
    Refused,
    /// A packet opened a connection through a service
    Flow,
    /// A packet was dropped, or answered with a reset or an unreachable
    Drop,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Socket, Self::Moved, Self::Refused, Self::Flow, Self::Drop];

    const fn in_kernel(self) -> EventKind {
        match self {
            Self::Socket => EventKind::Socket,
            Self::Moved => EventKind::SocketMoved,
            Self::Refused => EventKind::SocketRefused,
            Self::Flow => EventKind::Flow,
            Self::Drop => EventKind::Drop,
        }
    }

    fn of(record: &EventRecord) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.in_kernel() as u8 == record.kind)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Moved => "moved",
            Self::Refused => "refused",
            Self::Flow => "flow",
            Self::Drop => "drop",
        }
    }
}

/// How often the buffer is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How often the programs are told that somebody watches.
const RENEW: Duration = Duration::from_secs(1);

/// Prints events until there were enough, or until it is interrupted.
pub(super) fn run(args: &MonitorArgs) -> Result<()> {
    let pins = args.pins.pins();
    let maps = show::open_maps(&pins)?;
    if maps.get("events").is_err() {
        bail!("the programs below {} tell no events: restart the agent", pins.base().display());
    }
    let lookup = Lookup::open(&maps)?;
    let kinds = args.kinds.iter().fold(0, |bits, kind| bits | kind.in_kernel().bit());
    let addr = args.address.map_or(Addr::UNSPECIFIED_V6, Addr::from);
    let mut monitor = Monitor::open(&pins, &maps, Watch { kinds, addr, ..Watch::ZERO })?;
    let (begun, mut renewed, mut shown) = (Instant::now(), Instant::now(), 0);
    loop {
        let is_over = || args.duration.is_some_and(|duration| begun.elapsed() >= duration);
        while !is_over()
            && renewed.elapsed() < RENEW
            && let Some(record) = monitor.take()
        {
            let Some(event) = Event::of(&record, &lookup) else { continue };
            if args.service.as_ref().is_some_and(|text| !event.service.contains(text.as_str())) {
                continue;
            }
            show_event(&event, args.output)?;
            shown += 1;
            if args.count.is_some_and(|count| shown >= count) {
                return Ok(());
            }
        }
        if is_over() {
            return Ok(());
        }
        if renewed.elapsed() >= RENEW {
            let lost = monitor.lost();
            monitor.renew()?;
            renewed = Instant::now();
            if monitor.lost() > lost {
                eprintln!("note: about {} events found no room and are not shown", monitor.lost() - lost);
            }
            continue;
        }
        std::thread::sleep(LOOK);
    }
}

fn show_event(event: &Event, format: Format) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match format {
        Format::Json => writeln!(out, "{}", serde_json::to_string(event)?)?,
        Format::Table => writeln!(out, "{}", event.text())?,
    }
    Ok(out.flush()?)
}

/// One event as people read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Event {
    time: String,
    kind: &'static str,
    proto: String,
    /// Address of a packet's sender, or name and id of a process.
    client: String,
    frontend: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    backend: Option<String>,
    /// The source that the backend sees, if it is not the client's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    /// Empty if no service is there.
    service: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

impl Event {
    fn of(record: &EventRecord, lookup: &Lookup) -> Option<Self> {
        let kind = Kind::of(record)?;
        let end = explain::end_text;
        let is_there = |addr: &Addr| *addr != Addr::UNSPECIFIED_V6;
        let client = match kind {
            Kind::Flow | Kind::Drop => end(&record.client, record.client_port),
            Kind::Socket | Kind::Moved | Kind::Refused => format!("{}[{}]", comm(record), record.process),
        };
        let reason = matches!(kind, Kind::Drop | Kind::Refused)
            .then(|| DropReason::ALL.get(record.reason as usize).map_or("unknown", |reason| reason.name()));
        let device = (record.ifindex != 0)
            .then(|| inspect::device_name(record.ifindex).unwrap_or_else(|| format!("#{}", record.ifindex)));
        Some(Self {
            time: wall_clock(record.time).strftime("%H:%M:%S%.3f").to_string(),
            kind: kind.name(),
            proto: Proto(record.proto).to_string(),
            client,
            frontend: end(&record.frontend, record.frontend_port),
            backend: is_there(&record.backend).then(|| end(&record.backend, record.backend_port)),
            source: is_there(&record.nat).then(|| IpAddr::from(record.nat).to_string()),
            service: service_of(record, lookup).map_or(String::new(), |id| lookup.name(id)),
            device,
            reason,
        })
    }

    fn text(&self) -> String {
        let mut text = format!("{}  {:<7}  {}  {} > {}", self.time, self.kind, self.proto, self.client, self.frontend);
        if let Some(backend) = &self.backend {
            text += &format!(" > {backend}");
        }
        if let Some(reason) = self.reason {
            text += &format!("  {reason}");
        }
        if !self.service.is_empty() {
            text += &format!("  {}", self.service);
        }
        if let Some(source) = &self.source {
            text += &format!("  source {source}");
        }
        if let Some(device) = &self.device {
            text += &format!("  on {device}");
        }
        text
    }
}

/// The service of an event; of a refused one, that of what was dialled, as the tables are now.
fn service_of(record: &EventRecord, lookup: &Lookup) -> Option<u32> {
    if record.service != 0 {
        return Some(record.service);
    }
    let class: AddressClass = lookup.address(&record.frontend);
    let ports: PortUse = lookup.port_use(record.frontend_port.host());
    let found = pick::find_frontend(lookup, class, ports, &record.frontend, record.frontend_port, Proto(record.proto));
    found.map(|frontend| frontend.value.service)
}

/// Name of a process, as far as it can be printed.
fn comm(record: &EventRecord) -> String {
    let bytes = record.comm.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).chars().map(|char| if char.is_control() { '?' } else { char }).collect()
}

/// The time of day of a moment of the monotonic clock.
fn wall_clock(nanos: u64) -> Timestamp {
    let age = sys::monotonic().saturating_sub(Duration::from_nanos(nanos));
    Timestamp::now() - SignedDuration::try_from(age).unwrap_or(SignedDuration::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_those_of_the_programs() {
        for (number, kind) in Kind::ALL.into_iter().enumerate() {
            let record = EventRecord { kind: number as u8, ..EventRecord::ZERO };
            assert_eq!(Kind::of(&record), Some(kind));
        }
        assert_eq!(Kind::of(&EventRecord { kind: 9, ..EventRecord::ZERO }), None);
    }

    #[test]
    fn names_of_processes_cannot_write_to_the_terminal() {
        let mut record = EventRecord::ZERO;
        record.comm[..4].copy_from_slice(b"a\x1b[m");
        assert_eq!(comm(&record), "a?[m");
    }

    #[test]
    fn an_event_is_one_line() {
        let event = Event {
            time: "12:00:00.000".to_owned(),
            kind: "drop",
            proto: "TCP".to_owned(),
            client: "10.0.0.1:1000".to_owned(),
            frontend: "10.96.0.1:80".to_owned(),
            backend: None,
            source: None,
            service: "shop/web:http/TCP".to_owned(),
            device: Some("eth0".to_owned()),
            reason: Some("no_endpoint"),
        };
        let text = "12:00:00.000  drop     TCP  10.0.0.1:1000 > 10.96.0.1:80  no_endpoint  shop/web:http/TCP  on eth0";
        assert_eq!(event.text(), text);
    }
}
