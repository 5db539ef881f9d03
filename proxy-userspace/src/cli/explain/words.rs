//! What tables and programs decide, in words. Pure: from look-ups to sentences.

use proxy_common::abi::address::{AddressClass, PortUse};
use proxy_common::abi::flow::FlowValue;
use proxy_common::abi::service::Range;
use proxy_common::addr::{Addr, Be16};
use proxy_common::lb::packet::is_inside;
use proxy_common::lb::pick::{self, Frontend};
use proxy_common::lb::socket::Verdict;
use proxy_common::lb::tuple::Tuple;
use proxy_common::tables::Tables;
use proxy_common::verdict::DropReason;

use crate::datapath::inspect::backend_text;
use crate::datapath::lookup::Lookup;

/// Backends that are named one by one; of more, the number is told.
const NAMED: usize = 5;

/// The frontend that a packet or a process dials.
pub fn frontend(lookup: &Lookup, tuple: &Tuple, of_node: bool) -> Option<Frontend> {
    let mut class = lookup.address(&tuple.dst);
    if of_node && tuple.dst.is_loopback() {
        class.flags |= AddressClass::NODE | AddressClass::NODE_PORT;
    }
    let ports = if class.has(AddressClass::NODE) {
        lookup.port_use(tuple.dport.host())
    } else {
        PortUse(PortUse::NODE_PORT | PortUse::SNAT)
    };
    pick::find_frontend(lookup, class, ports, &tuple.dst, tuple.dport, tuple.proto)
}

/// `shop/web:http/TCP, by its ClusterIP`.
pub fn frontend_text(lookup: &Lookup, frontend: &Frontend) -> String {
    use proxy_common::abi::frontend::FrontendValue;
    let kind = if frontend.value.has(FrontendValue::CLUSTER_IP) {
        "its ClusterIP"
    } else if frontend.by_node_port {
        "its NodePort"
    } else {
        "one of its external addresses"
    };
    let restricted = match frontend.value.has(FrontendValue::RESTRICTED) {
        true => ", which loadBalancerSourceRanges restrict",
        false => "",
    };
    format!("{}, by {kind}{restricted}", lookup.name(frontend.value.service))
}

/// Which set a client gets and who is in it.
pub fn set_text(lookup: &Lookup, frontend: &Frontend, inside: bool) -> String {
    use proxy_common::abi::frontend::FrontendValue;
    let flag = if inside { FrontendValue::INSIDE_LOCAL } else { FrontendValue::OUTSIDE_LOCAL };
    let (set, why) = match frontend.value.has(flag) {
        true => ("the local set", "traffic policy Local"),
        false => ("the cluster set", "all nodes"),
    };
    let client = if inside { "inside" } else { "outside" };
    let members = match pick::set_for(lookup, frontend.value, inside) {
        Ok(range) => members_text(lookup, range),
        Err((reason, _)) => format!("nobody: {}", reason_text(reason)),
    };
    format!("clients {client} the cluster get {set} ({why}): {members}")
}

fn members_text(lookup: &Lookup, range: Range) -> String {
    let mut members: Vec<_> = lookup.backends_of(range).iter().map(backend_text).collect();
    members.sort();
    members.dedup();
    match members.len() {
        0..=NAMED => members.join(", "),
        count => format!("{}, and {} more", members[..NAMED].join(", "), count - NAMED),
    }
}

/// True if the sender of a packet counts as inside.
pub fn is_client_inside(lookup: &Lookup, tuple: &Tuple) -> bool {
    is_inside(lookup, tuple)
}

/// Why a packet whose destination was translated got just this backend, and which source it will have.
pub fn flow_text(lookup: &Lookup, tuple: &Tuple, flow: &FlowValue, is_known: bool) -> Vec<String> {
    if flow.has(FlowValue::DIRECT) {
        return vec![
            "a direct connection whose ends are those of a translated one: it gets another source port".to_owned(),
        ];
    }
    let mut lines = vec![];
    match (is_known, frontend(lookup, tuple, false)) {
        (true, _) => {
            lines.push(format!("a connection that is there, of {}: it keeps its backend", lookup.name(flow.service)))
        }
        (false, Some(frontend)) => {
            lines.push(format!("service {}", frontend_text(lookup, &frontend)));
            lines.push(set_text(lookup, &frontend, is_client_inside(lookup, tuple)));
            lines.push(match lookup.affinity_timeout(frontend.value.service) {
                0 => "picked by a hash of the connection".to_owned(),
                seconds => format!(
                    "session affinity, {seconds} s: the client's last backend while it is in the set, else by hash"
                ),
            });
        }
        (false, None) => {}
    }
    if flow.has(FlowValue::SNAT) {
        let why = match flow.peer == tuple.src {
            true => "the backend is the client itself, which would take its own packet for a forged one",
            false => "the backend is on another node, and its answer must come back through this one",
        };
        lines.push(format!("its source will become {} where it leaves: {why}", end_text(&flow.nat, flow.nat_port)));
    }
    lines
}

/// `10.0.0.1:80`, `[fd00::1]:80`.
pub fn end_text(addr: &Addr, port: Be16) -> String {
    match std::net::IpAddr::from(*addr) {
        std::net::IpAddr::V4(addr) => format!("{addr}:{}", port.host().0),
        std::net::IpAddr::V6(addr) => format!("[{addr}]:{}", port.host().0),
    }
}

/// What the socket hooks do with a connect or a datagram of a process.
pub fn socket_text(lookup: &Lookup, tuple: &Tuple, of_node: bool, verdict: &Verdict) -> (String, Vec<String>) {
    let found = frontend(lookup, tuple, of_node);
    let inside = of_node || lookup.config().is_some_and(|config| config.cluster_cidr_count != 0);
    let details = |frontend: &Frontend| {
        vec![format!("service {}", frontend_text(lookup, frontend)), set_text(lookup, frontend, inside)]
    };
    match (verdict, &found) {
        (Verdict::Translate(entry), Some(frontend)) => {
            let mut lines = details(frontend);
            let how = match lookup.affinity_timeout(frontend.value.service) {
                0 => "each socket draws one of them; followed here: the one below".to_owned(),
                seconds => {
                    format!("session affinity of the network namespace, {seconds} s; followed here: the one below")
                }
            };
            lines.push(how);
            (format!("goes to {} before a packet is made", end_text(&entry.backend, entry.backend_port)), lines)
        }
        (Verdict::Reject(reason), Some(frontend)) => {
            (format!("\"connection refused\" ({}): {}", reason.name(), reason_text(*reason)), details(frontend))
        }
        (Verdict::Reject(reason), None) => {
            (format!("\"connection refused\" ({}): {}", reason.name(), reason_text(*reason)), vec![])
        }
        (_, Some(frontend)) => ("is left to the packet path".to_owned(), details(frontend)),
        (_, None) => ("is no service's: left alone".to_owned(), vec![]),
    }
}

/// A drop reason as a sentence.
pub const fn reason_text(reason: DropReason) -> &'static str {
    match reason {
        DropReason::NoEndpoint => "the service has no usable endpoint",
        DropReason::NoLocalEndpoint => "the traffic policy is Local, and no endpoint is on this node",
        DropReason::UnknownPort => "the ClusterIP has no such port",
        DropReason::UnallocatedServiceAddress => "the address is in a ServiceCIDR, but no service has it",
        DropReason::NoConnection => "a segment in the middle of a connection that nobody knows",
        DropReason::HostUnhooked => {
            "a process of this node sent it that the socket hooks do not see (is it in the hooked control group?)"
        }
        DropReason::SnatPortsExhausted => "every source port towards this backend is taken (--snat-ports)",
        DropReason::NoRouteToBackend => "the node has no route to the backend, or no source address for it",
        DropReason::FragmentUnknown => "the first fragment of this packet was not seen",
        DropReason::FlowTable => "the table of flows is full (--max-flows)",
        DropReason::RewriteFailed => "the packet could not be rewritten",
        DropReason::Redirect => "an ICMP redirect about a translated connection",
        DropReason::UnsupportedProtocol => "services do not support this protocol",
        DropReason::Settling => "tables are being handed over to another layout; try again in a moment",
        DropReason::SourceRange => "the client is in none of the service's loadBalancerSourceRanges",
    }
}
