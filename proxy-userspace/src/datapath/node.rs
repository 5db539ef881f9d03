//! Facts about this node from netlink and /proc.
//!
//! May touch: /proc/sys/net for reading, and a socket that is connected but never sends.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};

use proxy_common::addr::{Addr, Port};

use super::network::Network;
use crate::model::{ByFamily, LocalAddress, Name, NodeFacts, PrimaryAddresses};

/// Why a fact or a setting is out of reach.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of /proc/sys.
    #[error("cannot read {path}")]
    Sysctl {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file of /proc/sys with unexpected content.
    #[error("{path} holds {text:?}, which is no range of ports")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
}

const LOCAL_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const FORWARDING: [&str; 2] = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];
const IPV6: &str = "/proc/sys/net/ipv6";
const IPV6_OFF: &str = "/proc/sys/net/ipv6/conf/all/disable_ipv6";

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

/// Why IPv6 is not served on this node, in words; none if it is.
pub fn ipv6_off() -> Option<&'static str> {
    if !Path::new(IPV6).exists() {
        return Some("the kernel has no IPv6 here: addresses of services in it are not served");
    }
    let is_off = fs::read_to_string(IPV6_OFF).is_ok_and(|text| text.trim() == "1");
    is_off.then_some(
        "it is switched off on this node (net.ipv6.conf.all.disable_ipv6): addresses of services in it are not served",
    )
}

fn read(path: &str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Sysctl { path: Path::new(path).to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::device::{Device, Layer};
    use crate::datapath::network::Binding;

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
}
