//! Devices, addresses and settings of this network namespace.
//!
//! May touch: a netlink socket and /proc, for reading.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage, LinkXdp};
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};
use rtnetlink::{Handle, new_connection};

use super::super::device::Device;
use super::super::network::{Binding, parse_binding, parse_device};
use super::super::node;
use super::super::reserve::{self, PortSet};
use super::{Seen, Unseen, read};
use proxy_common::addr::Port;

/// What netlink tells of a device, beyond what attaching needs.
#[derive(Debug)]
pub struct Link {
    pub(super) device: Device,
    pub(super) mtu: u32,
    pub(super) lower: Option<u32>,
    /// Id of its XDP program.
    pub(super) xdp: Option<u32>,
    pub(super) filters: Vec<String>,
}

/// All devices.
#[derive(Debug)]
pub struct Links(pub(super) Vec<Link>);

impl Links {
    pub(super) async fn list() -> Seen<Self> {
        let (connection, handle, _) =
            new_connection().map_err(|error| Unseen(format!("there is no netlink socket: {error}")))?;
        let connection = tokio::spawn(connection);
        let links = list(&handle).await.map_err(|error| Unseen(format!("devices cannot be listed: {error}")));
        connection.abort();
        links
    }
}

async fn list(handle: &Handle) -> Result<Links, rtnetlink::Error> {
    let messages: Vec<_> = handle.link().get().execute().try_collect().await?;
    let mut links: Vec<_> = messages
        .iter()
        .filter(|message| message.header.interface_family == AddressFamily::Unspec)
        .map(parse_link)
        .collect();
    let disciplines: Vec<_> = handle.qdisc().get().execute().try_collect().await?;
    let with_filters: Vec<_> = disciplines.iter().filter(|message| is_clsact(message)).collect();
    for link in &mut links {
        let index = link.device.index as i32;
        if with_filters.iter().any(|message| message.header.index == index) {
            link.filters = filters(handle, index).await?;
        }
    }
    Ok(Links(links))
}

/// The device holds filters that are no queueing.
fn is_clsact(message: &TcMessage) -> bool {
    let kinds = message.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    });
    kinds.into_iter().any(|kind| kind == "clsact" || kind == "ingress")
}

/// Names of the BPF filters of a device, for what comes in and what goes out.
async fn filters(handle: &Handle, index: i32) -> Result<Vec<String>, rtnetlink::Error> {
    let mut names = Vec::new();
    for request in [handle.traffic_filter(index).get().ingress(), handle.traffic_filter(index).get().egress()] {
        // A device with the older discipline `ingress` has no filters for what goes out.
        let found: Vec<TcMessage> = request.execute().try_collect().await.unwrap_or_default();
        names.extend(found.iter().flat_map(filter_names));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

fn filter_names(message: &TcMessage) -> Vec<String> {
    let options = message.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let names = options.flatten().filter_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    });
    names.collect()
}

fn parse_link(message: &LinkMessage) -> Link {
    let (mut mtu, mut lower, mut xdp) = (0, None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            LinkAttribute::Link(index) => lower = lower.or(Some(*index)),
            LinkAttribute::Xdp(parts) => xdp = parts.iter().find_map(program_of),
            LinkAttribute::LinkInfo(infos) => lower = infos.iter().find_map(below_vxlan).or(lower),
            _ => {}
        }
    }
    let lower = lower.filter(|index| *index != 0);
    Link { device: parse_device(message), mtu, lower, xdp, filters: Vec::new() }
}

fn program_of(part: &LinkXdp) -> Option<u32> {
    match part {
        LinkXdp::ProgId(id) => Some(*id).filter(|id| *id != 0),
        _ => None,
    }
}

fn below_vxlan(info: &LinkInfo) -> Option<u32> {
    let LinkInfo::Data(InfoData::Vxlan(parts)) = info else { return None };
    parts.iter().find_map(|part| match part {
        InfoVxlan::Link(index) => Some(*index),
        _ => None,
    })
}

/// Settings of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceSettings {
    /// net.ipv4.conf.DEVICE.forwarding.
    pub forwards_v4: Option<bool>,
    /// net.ipv6.conf.DEVICE.forwarding.
    pub forwards_v6: Option<bool>,
    /// net.ipv4.conf.DEVICE.rp_filter.
    pub rp_filter: Option<u32>,
    /// net.ipv6.conf.DEVICE.accept_ra.
    pub accept_ra: Option<u32>,
}

impl DeviceSettings {
    pub(super) fn read(device: &str) -> Self {
        let value = |family: &str, name: &str| -> Option<u32> {
            read(format!("/proc/sys/net/{family}/conf/{device}/{name}"))?.trim().parse().ok()
        };
        Self {
            forwards_v4: value("ipv4", "forwarding").map(|value| value != 0),
            forwards_v6: value("ipv6", "forwarding").map(|value| value != 0),
            rp_filter: value("ipv4", "rp_filter"),
            accept_ra: value("ipv6", "accept_ra"),
        }
    }
}

/// Settings of the namespace.
#[derive(Clone, Debug)]
pub struct Settings {
    /// SO_NETNS_COOKIE.
    pub netns: Seen<u64>,
    /// Switches of forwarding that are off.
    pub forwarding_off: Vec<&'static str>,
    /// net.ipv4.conf.all.rp_filter.
    pub rp_filter: Option<u32>,
    /// Packets that the reverse path filter has dropped, and sources that no such packet can have.
    pub reverse_path_drops: u64,
    /// net.bridge.bridge-nf-call-iptables, if bridges know netfilter.
    pub bridges_call_netfilter: Option<bool>,
    /// net.ipv4.ip_local_port_range.
    pub local_ports: Seen<(Port, Port)>,
    /// net.ipv4.ip_local_reserved_ports.
    pub reserved_ports: Seen<PortSet>,
    /// Devices with a default route that a router announced.
    pub announced_routes: Vec<String>,
    /// Addresses bound to devices.
    pub bindings: Seen<Vec<Binding>>,
}

impl Settings {
    pub(super) async fn read() -> Self {
        Self {
            netns: super::super::sys::netns_cookie()
                .map_err(|error| Unseen(format!("this namespace has no cookie: {error}"))),
            forwarding_off: node::forwarding_off(),
            rp_filter: read("/proc/sys/net/ipv4/conf/all/rp_filter").and_then(|text| text.trim().parse().ok()),
            reverse_path_drops: read("/proc/net/netstat").map_or(0, |text| parse_reverse_path(&text))
                + read("/proc/net/stat/rt_cache").map_or(0, |text| parse_martians(&text)),
            bridges_call_netfilter: read("/proc/sys/net/bridge/bridge-nf-call-iptables").map(|text| text.trim() != "0"),
            local_ports: node::local_port_range().map_err(|error| Unseen::because(&error)),
            reserved_ports: reserve::read_reserved().map_err(|error| Unseen::because(&error)),
            announced_routes: read("/proc/net/ipv6_route").map_or_else(Vec::new, |text| parse_announced(&text)),
            bindings: bindings().await,
        }
    }

    /// A device has an address of this family that others can reach.
    pub fn has_global(&self, v4: bool) -> bool {
        let bindings = self.bindings.as_ref().map(Vec::as_slice).unwrap_or_default();
        bindings.iter().any(|binding| binding.is_global && binding.addr.is_ipv4() == v4)
    }

    /// The device that an address is bound to, by interface index.
    pub fn device_of(&self) -> BTreeMap<IpAddr, u32> {
        let bindings = self.bindings.as_ref().map(Vec::as_slice).unwrap_or_default();
        bindings.iter().map(|binding| (binding.addr, binding.device)).collect()
    }
}

async fn bindings() -> Seen<Vec<Binding>> {
    let (connection, handle, _) =
        new_connection().map_err(|error| Unseen(format!("there is no netlink socket: {error}")))?;
    let connection = tokio::spawn(connection);
    let addresses: Result<Vec<_>, _> = handle.address().get().execute().try_collect().await;
    connection.abort();
    let addresses = addresses.map_err(|error| Unseen(format!("addresses cannot be listed: {error}")))?;
    Ok(addresses.iter().filter_map(parse_binding).collect())
}

/// `IPReversePathFilter` in the text of /proc/net/netstat: a line of names, a line of numbers.
fn parse_reverse_path(text: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (Some(names), Some(numbers)) = (lines.next(), lines.next()) else { return 0 };
    let mut pairs = names.split(' ').zip(numbers.split(' '));
    pairs.find(|(name, _)| *name == "IPReversePathFilter").and_then(|(_, number)| number.parse().ok()).unwrap_or(0)
}

/// `in_martian_src` of all processors in the text of /proc/net/stat/rt_cache, whose numbers are hexadecimal.
fn parse_martians(text: &str) -> u64 {
    let mut lines = text.lines();
    let names = lines.next().unwrap_or_default();
    let Some(column) = names.split_whitespace().position(|name| name == "in_martian_src") else { return 0 };
    let number = |line: &str| u64::from_str_radix(line.split_whitespace().nth(column)?, 16).ok();
    lines.filter_map(number).sum()
}

/// Devices of announced default routes in the text of /proc/net/ipv6_route.
fn parse_announced(text: &str) -> Vec<String> {
    /// include/uapi/linux/ipv6_route.h
    const RTF_ADDRCONF: u32 = 0x0004_0000;
    const RTF_GATEWAY: u32 = 2;
    let mut devices: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
            let is_default = fields[1] == "00" && flags & RTF_GATEWAY != 0;
            (is_default && flags & RTF_ADDRCONF != 0).then(|| fields.get(9).map(|name| (*name).to_owned()))?
        })
        .collect();
    devices.sort();
    devices.dedup();
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let netstat = "TcpExt: SyncookiesSent IPReversePathFilter X\nTcpExt: 1 7 2\nIpExt: A\nIpExt: 5\n";
        assert_eq!(parse_reverse_path(netstat), 7);
        assert_eq!(parse_reverse_path("IpExt: A\n"), 0);
        let cache = "entries in_martian_src out\n00000001 0000000a 1\n00000001 00000002 1\n";
        assert_eq!(parse_martians(cache), 12);
        assert_eq!(parse_martians(""), 0);
    }

    #[test]
    fn announced_default_routes_tell_their_device() {
        let zero = "0".repeat(32);
        let gateway = "fe80000000000000000000000000abcd";
        let line = |dest: &str, length: &str, flags: &str, device: &str| {
            format!("{dest} {length} {zero} 00 {gateway} 00000400 00000001 00000000 {flags} {device}\n")
        };
        let text = [
            line(&zero, "00", "00450003", "eth0"),
            line(&zero, "00", "00000003", "eth1"),
            line("fd000000000000000000000000000000", "40", "00440001", "eth2"),
        ];
        assert_eq!(parse_announced(&text.concat()), ["eth0"]);
    }
}
