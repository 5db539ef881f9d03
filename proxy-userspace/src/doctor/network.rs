//! Checks of settings, devices, ports, firewall and other proxies.

use std::net::IpAddr;

use proxy_common::abi::frontend::FrontendValue;

use super::hook::attached;
use super::{Facts, Outcome, list};
use crate::datapath::other_proxies::Proxy;
use crate::datapath::reserve::PortSet;
use crate::datapath::survey::Seen;
use crate::datapath::survey::hook::DeviceHooks;

/// The node passes packets on.
pub(super) fn forwarding(facts: &Facts) -> Seen<Outcome> {
    let settings = &facts.survey.settings;
    let is_off = |family: &str| settings.forwarding_off.iter().any(|path| path.contains(family));
    let (v4, v6) = (is_off("ipv4"), is_off("ipv6"));
    Ok(match (v4 && settings.has_global(true), v6 && settings.has_global(false)) {
        (true, _) => Outcome::failure(
            "net.ipv4.ip_forward is 0: packets of pods and outside clients go nowhere",
            "sysctl -w net.ipv4.ip_forward=1, and the same line in /etc/sysctl.d for the next boot",
        ),
        (false, true) => Outcome::failure(
            "net.ipv6.conf.all.forwarding is 0: IPv6 packets of pods and outside clients go nowhere",
            "set accept_ra=2 on devices that learn their routes from routers, then \
             sysctl -w net.ipv6.conf.all.forwarding=1, and the same lines in /etc/sysctl.d",
        ),
        (false, false) if v4 || v6 => {
            Outcome::ok("the node forwards packets of the families in which it has an address")
        }
        (false, false) => Outcome::ok("the node forwards packets of both families"),
    })
}

/// No served device is left out of forwarding.
pub(super) fn device_forwarding(facts: &Facts) -> Seen<Outcome> {
    let settings = &facts.survey.settings;
    let is_on = |family: &str| !settings.forwarding_off.iter().any(|path| path.contains(family));
    let mut off = Vec::new();
    for hooks in attached(facts)? {
        let name = &hooks.device.name;
        // A bridge port routes nothing: its bridge does.
        if hooks.device.controller.is_some() {
            continue;
        }
        let (v4, v6) = (hooks.settings.forwards_v4, hooks.settings.forwards_v6);
        off.extend((is_on("ipv4") && v4 == Some(false)).then(|| format!("net.ipv4.conf.{name}.forwarding")));
        off.extend((is_on("ipv6") && v6 == Some(false)).then(|| format!("net.ipv6.conf.{name}.forwarding")));
    }
    Ok(match off.is_empty() {
        true => Outcome::ok("no device that is served is left out of forwarding"),
        false => Outcome::warning(
            format!("0, while the node forwards: {}", list(off)),
            "set them to 1: what comes in there is not passed on, whatever service it is for",
        ),
    })
}

/// Forwarding does not cost a default route.
pub(super) fn router_advertisements(facts: &Facts) -> Seen<Outcome> {
    let settings = &facts.survey.settings;
    let devices = facts.survey.devices.as_ref()?;
    let is_at_risk = |hooks: &&DeviceHooks| {
        let heeded = hooks.settings.accept_ra == Some(1) && hooks.settings.forwards_v6 == Some(true);
        heeded && settings.announced_routes.contains(&hooks.device.name)
    };
    let at_risk: Vec<_> = devices.iter().filter(is_at_risk).map(|hooks| &hooks.device.name).collect();
    Ok(match at_risk.is_empty() {
        true => Outcome::ok("no default route depends on announcements that a forwarding node does not heed"),
        false => Outcome::warning(
            format!(
                "the IPv6 default route by {} ends: it was announced, and with forwarding on it is not renewed",
                list(at_risk)
            ),
            "sysctl -w net.ipv6.conf.DEVICE.accept_ra=2, and the same line in /etc/sysctl.d",
        ),
    })
}

/// The filter of reverse paths does not stand in the way.
pub(super) fn reverse_path_filter(facts: &Facts) -> Seen<Outcome> {
    const STRICT: u32 = 1;
    let settings = &facts.survey.settings;
    let all = settings.rp_filter.unwrap_or(0);
    let strict: Vec<_> = attached(facts)?
        .filter(|hooks| hooks.settings.rp_filter.unwrap_or(0).max(all) == STRICT)
        .map(|hooks| &hooks.device.name)
        .collect();
    Ok(match (strict.is_empty(), settings.reverse_path_drops) {
        (true, _) => Outcome::ok("no device that is served checks reverse paths strictly"),
        (false, 0) => Outcome::ok(format!(
            "strict on {}, which does no harm: the kernel sees one plain flow from client to backend",
            list(strict)
        )),
        (false, drops) => Outcome::note(
            format!("strict on {}; {drops} packets were dropped since the boot for their source address", list(strict)),
            "if the number grows while connections fail, a client is reached by another device than it comes from: \
             rp_filter=2 on these two",
        ),
    })
}

/// What tunnels carry fits into what is below them.
pub(super) fn overlay_mtu(facts: &Facts) -> Seen<Outcome> {
    let devices = facts.survey.devices.as_ref()?;
    let uplink = devices.iter().filter(|hooks| is_uplink(facts, hooks)).map(|hooks| hooks.mtu).min();
    let mut large = Vec::new();
    let mut fitting = Vec::new();
    for hooks in devices {
        let Some(overhead) = overhead(&hooks.device.kind) else { continue };
        let below = devices.iter().find(|below| Some(below.device.index) == hooks.lower).map(|below| below.mtu);
        let Some(below) = below.or(uplink) else { continue };
        let (name, mtu) = (&hooks.device.name, hooks.mtu);
        match mtu + overhead > below {
            true => large.push(format!("{name} has {mtu}, at most {} fits", below.saturating_sub(overhead))),
            false => fitting.push(name),
        }
    }
    Ok(if !large.is_empty() {
        Outcome::warning(
            format!("too large an MTU for what is below: {}", list(large)),
            "lower the MTU in the settings of the network plugin (or of the tunnel): large packets between nodes are lost",
        )
    } else if fitting.is_empty() {
        Outcome::ok("there are no tunnels")
    } else {
        Outcome::ok(format!("the MTU of {} fits into what is below", list(fitting)))
    })
}

/// Bytes that a tunnel adds to a packet, IPv4 outside (RFC 7348, RFC 8926, RFC 2003, RFC 2784; WireGuard: white paper 5.4.6).
fn overhead(kind: &str) -> Option<u32> {
    match kind {
        // Ethernet 14, outer IP 20, UDP 8, VXLAN or Geneve 8.
        "vxlan" | "geneve" => Some(50),
        "ipip" | "sit" => Some(20),
        "gre" => Some(24),
        "wireguard" => Some(60),
        _ => None,
    }
}

/// A device with an address that others can reach, and neither a tunnel nor a place for pods.
fn is_uplink(facts: &Facts, hooks: &DeviceHooks) -> bool {
    let has_address = facts.survey.settings.device_of().values().any(|index| *index == hooks.device.index);
    let is_plain = ["", "bond", "team", "vlan"].contains(&hooks.device.kind.as_str());
    has_address && is_plain && !hooks.device.is_loopback
}

/// The kernel gives ports of ours to no local socket.
pub(super) fn reserved_ports(facts: &Facts) -> Seen<Outcome> {
    let tables = facts.survey.tables.as_ref()?;
    let reserved = facts.survey.settings.reserved_ports.as_ref()?;
    let lacking = |ports: &PortSet| ports.without(reserved).text();
    let (sources, nodes) = (lacking(&tables.source_ports()), lacking(&tables.node_ports()));
    let what = |ports: &str, kind: &str| (!ports.is_empty()).then(|| format!("{kind} {}", shortened(ports)));
    let missing: Vec<_> = [what(&sources, "source ports"), what(&nodes, "NodePorts")].into_iter().flatten().collect();
    Ok(match missing.is_empty() {
        true => Outcome::ok("source ports and NodePorts are reserved: the kernel gives none of them to a socket"),
        false => Outcome::warning(
            format!("not in net.ipv4.ip_local_reserved_ports: {}", list(missing)),
            "start the agent anew, which reserves them, and look for who overwrites the list: a line in /etc/sysctl.d \
             replaces it as a whole",
        ),
    })
}

/// The beginning of a long list of ports.
fn shortened(ports: &str) -> String {
    const MOST: usize = 60;
    match ports.len() > MOST {
        true => format!("{}...", ports[..MOST].rsplit_once(',').map_or("", |(start, _)| start)),
        false => ports.to_owned(),
    }
}

/// The programs know from where the kernel takes ports.
pub(super) fn local_ports(facts: &Facts) -> Seen<Outcome> {
    let config = &facts.survey.tables.as_ref()?.config;
    let (first, last) = facts.survey.settings.local_ports.as_ref()?;
    let known = (config.local_first, config.local_last);
    Ok(match known == (first.0, last.0) {
        true => Outcome::ok(format!("the kernel takes ports of sockets from {first} to {last}, as the programs know")),
        false => Outcome::warning(
            format!(
                "net.ipv4.ip_local_port_range is {first} to {last} now; the programs were told {} to {}, and may let \
                 a client keep a port that a socket of this node takes too",
                known.0, known.1
            ),
            "start the agent anew",
        ),
    })
}

/// Ports of rewritten sources are nobody's NodePorts.
pub(super) fn source_ports(facts: &Facts) -> Seen<Outcome> {
    let tables = facts.survey.tables.as_ref()?;
    let (sources, nodes) = (tables.source_ports(), tables.node_ports());
    let free = nodes.without(&sources);
    let shared = nodes.without(&free).text();
    Ok(match shared.is_empty() {
        true => Outcome::ok(format!("no NodePort is among the source ports {}", sources.text())),
        false => Outcome::warning(
            format!("NodePorts are among the source ports {}: {}", sources.text(), shortened(&shared)),
            "move one of the two ranges: --snat-ports of the agent, or --service-node-port-range of the API server",
        ),
    })
}

/// No address of a service is bound to a device.
pub(super) fn bound_addresses(facts: &Facts) -> Seen<Outcome> {
    let tables = &facts.survey.tables.as_ref()?.tables;
    facts.survey.settings.bindings.as_ref()?;
    let devices = facts.survey.devices.as_ref()?;
    let bound = facts.survey.settings.device_of();
    let (mut cluster, mut cache, mut left, mut other) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (at, value) in &tables.frontends {
        let addr = IpAddr::from(at.addr);
        let Some(index) = bound.get(&addr).filter(|_| !at.is_node_port()) else { continue };
        let device = devices.iter().find(|hooks| hooks.device.index == *index);
        let device = device.map_or("?", |hooks| hooks.device.name.as_str());
        let text = format!("{addr} on {device}");
        let place = match (device, value.has(FrontendValue::CLUSTER_IP)) {
            ("kube-ipvs0", _) => &mut left,
            ("nodelocaldns", _) => &mut cache,
            (_, true) => &mut cluster,
            (_, false) => &mut other,
        };
        if !place.contains(&text) {
            place.push(text);
        }
    }
    Ok(if !left.is_empty() {
        Outcome::warning(
            format!("a kube-proxy in mode ipvs has left addresses of services behind: {}", list(left)),
            "kube-proxy --cleanup, or: ip link delete kube-ipvs0",
        )
    } else if !cache.is_empty() {
        Outcome::warning(
            format!("NodeLocal DNSCache has bound a service's address: {}", list(cache)),
            "queries to it are translated to the DNS service before they reach the cache: give pods the cache's own \
             address (169.254.20.10) as name server",
        )
    } else if !cluster.is_empty() {
        Outcome::warning(
            format!("ClusterIPs are bound to devices of this node: {}", list(cluster)),
            "remove them there: ports of them that no service has are this node's own, and not refused",
        )
    } else if !other.is_empty() {
        Outcome::known(format!("external addresses of services are bound here: {}", list(other)))
    } else {
        Outcome::ok("no address of a service is bound to a device of this node")
    })
}

/// What is forwarded is not dropped by a firewall.
pub(super) fn forward_policy(facts: &Facts) -> Seen<Outcome> {
    let dropping = &facts.survey.firewall.as_ref()?.dropping;
    let closed: Vec<_> = dropping.iter().filter(|chain| !chain.accepts_some).map(|chain| &chain.chain).collect();
    let calls = match facts.survey.settings.bridges_call_netfilter {
        Some(true) => ", frames between pods of one bridge too",
        _ => "",
    };
    Ok(if !closed.is_empty() {
        Outcome::failure(
            format!("{} drops all that is forwarded{calls}: no rule accepts anything", list(closed)),
            "have it accept packets from and to pods (for iptables: iptables -A FORWARD -s CLUSTER-CIDR -j ACCEPT, and \
             the same with -d), or set its policy to accept",
        )
    } else if !dropping.is_empty() {
        Outcome::note(
            format!("{} drops what no rule accepts{calls}", list(dropping.iter().map(|chain| &chain.chain))),
            "if clients from outside or of pods get no answer, look whether a rule accepts packets from and to pods, \
             by their own addresses: services are translated before",
        )
    } else {
        Outcome::ok("no firewall drops what is forwarded as a matter of policy")
    })
}

/// Rules against invalid packets do no harm.
pub(super) fn invalid_packets(facts: &Facts) -> Seen<Outcome> {
    let chains = &facts.survey.firewall.as_ref()?.invalid_dropping;
    Ok(match chains.is_empty() {
        true => Outcome::ok("no rule drops packets that connection tracking calls invalid"),
        false => Outcome::known(format!(
            "rules drop packets that connection tracking calls invalid ({}): connections of services are none, since \
             the kernel sees both directions of them",
            list(chains)
        )),
    })
}

/// No other proxy translates the same services.
pub(super) fn other_proxies(facts: &Facts) -> Seen<Outcome> {
    let proxies = &facts.survey.proxies;
    let device = facts
        .survey
        .devices
        .as_ref()
        .is_ok_and(|devices| devices.iter().any(|hooks| hooks.device.name == "kube-ipvs0"));
    let mut names: Vec<_> = proxies.iter().map(ToString::to_string).collect();
    let mut advice: Vec<_> = proxies.iter().map(|proxy| proxy.advice()).collect();
    if device && !proxies.contains(&Proxy::Ipvs) {
        names.push("the device kube-ipvs0".to_owned());
        advice.push("ip link delete kube-ipvs0, if no kube-proxy runs");
    }
    Ok(match names.is_empty() {
        true => Outcome::ok("no other service proxy has left a trace"),
        false => Outcome::warning(format!("on this node, beside shunt: {}", list(names)), advice.join("; ")),
    })
}

#[cfg(test)]
#[test]
fn long_lists_of_ports_are_cut_at_a_comma() {
    let ports = (0..40).map(|port| (30000 + 2 * port).to_string()).collect::<Vec<_>>().join(",");
    let short = shortened(&ports);
    assert!(short.len() < 64 && short.ends_with("...") && ports.starts_with(short.trim_end_matches("...")), "{short}");
    assert_eq!(shortened("1-2"), "1-2");
}
