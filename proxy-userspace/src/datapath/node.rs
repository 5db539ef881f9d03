//! Facts about this node from netlink and /proc, and the one kernel setting that Shunt needs: reserved source ports.
//!
//! May touch: /proc/sys/net for reading, net.ipv4.ip_local_reserved_ports for writing, markers in the pin directory, and
//! a socket that is connected but never sends.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use proxy_common::addr::{Addr, Port};
use tracing::info;

use super::network::Network;
use super::pins::{self, Pins};
use crate::model::{ByFamily, LocalAddress, Name, NodeFacts, PrimaryAddresses};

/// Why a fact or a setting is out of reach.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of /proc/sys.
    #[error("cannot {action} {path}")]
    Sysctl {
        /// "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file of /proc/sys with unexpected content.
    #[error("{path} holds {text:?}, which is no list of port ranges")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// The markers.
    #[error(transparent)]
    Pins(#[from] pins::Error),
}

const LOCAL_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
const FORWARDING: [&str; 2] = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];

/// A range of ports.
pub type PortRange = RangeInclusive<u16>;

/// The parts of a node's facts that the configuration fixes, completed by what the network says now. Without IPv6 link-local
/// addresses: every device has one, pods' too, and nothing is served on them.
pub fn facts(fixed: &NodeFacts, network: &Network) -> NodeFacts {
    let name_of = |index: &u32| network.devices.get(index).map_or("", |device| device.name.as_str());
    let addresses =
        network.bindings.iter().filter(|binding| !Addr::from(binding.addr).is_v6_link_local()).map(|binding| {
            LocalAddress { addr: Addr::from(binding.addr), device: Name::from(name_of(&binding.device)) }
        });
    NodeFacts { addresses: addresses.collect(), routed: routed_addresses(network), ..fixed.clone() }
}

/// The address of each family that leads out: the source of the default route, else the first global one.
fn routed_addresses(network: &Network) -> PrimaryAddresses {
    // Documentation addresses (RFC 5737, RFC 3849): only a default route leads there, and nothing is sent.
    let beyond: [IpAddr; 2] =
        [Ipv4Addr::new(192, 0, 2, 1).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()];
    let [v4, v6] = beyond.map(|beyond| {
        let is_bound = |addr: &IpAddr| network.bindings.iter().any(|binding| binding.addr == *addr);
        let first = || first_global(network, beyond.is_ipv4());
        source_towards(beyond).filter(is_bound).or_else(first).map(Addr::from)
    });
    ByFamily { v4, v6 }
}

fn first_global(network: &Network, v4: bool) -> Option<IpAddr> {
    let on_loopback = |index: &u32| network.devices.get(index).is_some_and(|device| device.is_loopback);
    let mut global = network.bindings.iter().filter(|binding| binding.is_global && !on_loopback(&binding.device));
    global.find(|binding| binding.addr.is_ipv4() == v4).map(|binding| binding.addr)
}

/// The source address that routing would choose. Connecting a datagram socket looks up a route and sends nothing.
fn source_towards(destination: IpAddr) -> Option<IpAddr> {
    const DISCARD: u16 = 9;
    let any: IpAddr = if destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(SocketAddr::new(destination, DISCARD)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// net.ipv4.ip_local_port_range: where the kernel takes source ports from.
pub fn local_port_range() -> Result<(Port, Port), Error> {
    let text = read(LOCAL_RANGE)?;
    let ports: Vec<u16> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match ports[..] {
        [first, last] => Ok((Port(first), Port(last))),
        _ => Err(Error::Unreadable { path: LOCAL_RANGE.into(), text }),
    }
}

/// Names of the forwarding switches that are off; without them the node forwards no packet of a pod or an outside client.
pub fn forwarding_off() -> Vec<&'static str> {
    let is_off = |path: &&str| fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
    FORWARDING.into_iter().filter(is_off).collect()
}

/// Keeps the kernel from giving `range` to local sockets. What was reserved before stays; what is added is remembered in
/// the pin directory for [`release_ports`].
pub fn reserve_ports(pins: &Pins, range: &PortRange) -> Result<(), Error> {
    let reserved = read_reserved()?;
    let added = subtract(range, &reserved);
    if added.is_empty() {
        return Ok(());
    }
    for piece in &added {
        pins.mark(&marker(piece))?;
    }
    write_reserved(&[reserved, added].concat())?;
    info!(first = range.start(), last = range.end(), "source ports reserved");
    Ok(())
}

/// Undoes what [`reserve_ports`] has added.
pub fn release_ports(pins: &Pins) -> Result<(), Error> {
    let marks = pins.marks()?;
    let added: Vec<(String, PortRange)> =
        marks.into_iter().filter_map(|mark| parse_marker(&mark).map(|range| (mark, range))).collect();
    if added.is_empty() {
        return Ok(());
    }
    let mut reserved = read_reserved()?;
    for (_, piece) in &added {
        reserved = reserved.iter().flat_map(|range| subtract(range, std::slice::from_ref(piece))).collect();
    }
    write_reserved(&reserved)?;
    for (mark, _) in &added {
        pins.unmark(mark)?;
    }
    Ok(())
}

const MARKER: &str = "reserved-";

fn marker(range: &PortRange) -> String {
    format!("{MARKER}{}-{}", range.start(), range.end())
}

fn parse_marker(name: &str) -> Option<PortRange> {
    parse_range(name.strip_prefix(MARKER)?)
}

fn parse_range(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

/// The parts of `range` that none of `others` covers, in order.
fn subtract(range: &PortRange, others: &[PortRange]) -> Vec<PortRange> {
    let mut rest = vec![range.clone()];
    for other in others {
        rest = rest.iter().flat_map(|piece| cut(piece, other)).collect();
    }
    rest
}

/// What `other` leaves of `piece`: at most a part below and a part above.
fn cut(piece: &PortRange, other: &PortRange) -> Vec<PortRange> {
    if other.end() < piece.start() || other.start() > piece.end() {
        return vec![piece.clone()];
    }
    let below = (other.start() > piece.start()).then(|| *piece.start()..=other.start() - 1);
    let above = (other.end() < piece.end()).then(|| other.end() + 1..=*piece.end());
    below.into_iter().chain(above).collect()
}

fn read_reserved() -> Result<Vec<PortRange>, Error> {
    let text = read(RESERVED)?;
    let parse =
        |text: &str| text.trim().split(',').filter(|part| !part.is_empty()).map(parse_range).collect::<Option<_>>();
    parse(&text).ok_or(Error::Unreadable { path: RESERVED.into(), text })
}

fn write_reserved(ranges: &[PortRange]) -> Result<(), Error> {
    let parts: Vec<String> = ranges.iter().map(|range| format!("{}-{}", range.start(), range.end())).collect();
    // An empty list is an empty line; an empty write changes nothing.
    fs::write(RESERVED, parts.join(",") + "\n").map_err(sysctl("write", RESERVED))
}

fn read(path: &str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(sysctl("read", path))
}

fn sysctl(action: &'static str, path: &str) -> impl FnOnce(io::Error) -> Error {
    let path = Path::new(path).to_owned();
    move |source| Error::Sysctl { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::device::{Device, Layer};
    use crate::datapath::network::Binding;
    use proptest::prelude::*;

    fn device(index: u32, name: &str) -> Device {
        Device {
            index,
            name: name.into(),
            kind: String::new(),
            layer: Layer::Ethernet,
            is_loopback: name == "lo",
            controller: None,
            mac: [0; 6],
            is_hardware: false,
        }
    }

    #[test]
    fn facts_list_addresses_with_their_devices_and_pick_a_global_one() {
        let bindings =
            [(1, "127.0.0.1", false), (1, "203.0.113.200", true), (2, "203.0.113.7", true), (2, "fe80::1", false)];
        let network = Network {
            devices: [(1u32, device(1, "lo")), (2, device(2, "eth0"))].into_iter().collect(),
            bindings: bindings
                .iter()
                .map(|&(device, addr, is_global)| Binding { device, addr: addr.parse().unwrap(), is_global })
                .collect(),
            listing: 1,
            routing: 0,
        };
        let facts = facts(&NodeFacts::named(Name::from("n")), &network);
        let seen: Vec<_> = facts.addresses.iter().map(|a| (a.addr.to_string(), a.device.to_string())).collect();
        assert!(seen.contains(&("127.0.0.1".into(), "lo".into())));
        assert_eq!(seen.len(), 3, "link-local addresses are left out");
        assert_eq!(facts.routed.v4, Some(Addr::from("203.0.113.7".parse::<IpAddr>().unwrap())));
        assert_eq!(facts.routed.v6, None);
    }

    #[test]
    fn markers_come_back() {
        assert_eq!(parse_marker(&marker(&(10000..=29999))), Some(10000..=29999));
        assert_eq!(parse_marker("reserved-x"), None);
        assert_eq!(parse_range("80"), Some(80..=80));
    }

    proptest! {
        #[test]
        fn subtraction_is_that_of_sets(
            range in (0u16..60, 0u16..60),
            others in proptest::collection::vec((0u16..60, 0u16..60), 0..5),
        ) {
            let order = |(a, b): (u16, u16)| a.min(b)..=a.max(b);
            let (range, others) = (order(range), others.into_iter().map(order).collect::<Vec<_>>());
            let rest = subtract(&range, &others);
            for port in 0..60 {
                let wanted = range.contains(&port) && !others.iter().any(|other| other.contains(&port));
                prop_assert_eq!(rest.iter().filter(|piece| piece.contains(&port)).count(), usize::from(wanted));
            }
        }
    }
}
