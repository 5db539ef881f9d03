//! What Shunt asks of netfilter, over netlink: which connections the kernel translates the destination of, that it goes on
//! doing so, which chains there are, and which ports of this node are translated for containers.
//!
//! The kernel translates by hooks that it registers with the first NAT chain of a network namespace and removes with the
//! last one, and it tracks connections while some rule asks about them: a kube-proxy that takes its rules away takes the
//! translation of all its connections with them, unless others have such. [`keep_translating`] makes one chain with one rule
//! that asks and decides nothing.
//! May touch: the connection table and all rules of nf_tables, for reading; one table of nf_tables, named [`TABLE`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use proxy_common::addr::{Addr, Port, Proto};

use super::netlink::{
    self, Message, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLMSG_ERROR, answer, attributes, messages,
};
use super::sys::NetlinkSocket;

/// Name of the table.
pub const TABLE: &str = "shunt-keeps-translating";

// linux/netfilter/nfnetlink.h
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const CONNTRACK: u16 = 1 << 8;
const NF_TABLES: u16 = 10 << 8;

// linux/netfilter/nfnetlink_conntrack.h
const CT_GET: u16 = CONNTRACK | 1;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_STATUS: u16 = 3;
const CTA_STATUS_MASK: u16 = 26;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
/// linux/netfilter/nf_conntrack_common.h
const IPS_DST_NAT: u32 = 1 << 5;

// linux/netfilter/nf_tables.h
const NEW_TABLE: u16 = NF_TABLES;
const DELETE_TABLE: u16 = NF_TABLES | 2;
const NEW_CHAIN: u16 = NF_TABLES | 3;
const GET_CHAIN: u16 = NF_TABLES | 4;
const NEW_RULE: u16 = NF_TABLES | 6;
const GET_RULE: u16 = NF_TABLES | 7;
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const CT_REGISTER: u16 = 1;
const CT_KEY: u16 = 2;
const CT_KEY_STATE: u32 = 0;
const CT_KEY_DIRECTION: u32 = 1;
const META_KEY: u16 = 2;
const META_L4PROTO: u32 = 16;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_NETWORK: u32 = 1;
const PAYLOAD_TRANSPORT: u32 = 2;
const NAT_TYPE: u16 = 1;
const NAT_DESTINATION: u32 = 1;
/// linux/netfilter/nf_tables_compat.h
const TARGET_NAME: u16 = 1;
const BITWISE_MASK: u16 = 4;
const DATA_VERDICT: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const LOOKUP_DESTINATION: u16 = 3;
const REGISTER_VERDICT: u32 = 0;
const MATCH_NAME: u16 = 1;
const MATCH_INFO: u16 = 3;
/// linux/netfilter/nf_conntrack_common.h, NF_CT_STATE_INVALID_BIT, and linux/netfilter/xt_conntrack.h,
/// XT_CONNTRACK_STATE_INVALID.
const STATE_INVALID: u32 = 1;
// linux/netfilter.h
const VERDICT_DROP: i32 = 0;
const VERDICT_ACCEPT: i32 = 1;
const FORWARD: u32 = 2;
const COMPARE_REGISTER: u16 = 1;
const COMPARE_OPERATION: u16 = 2;
const COMPARE_WITH: u16 = 3;
const COMPARE_EQUAL: u32 = 0;
const DATA_VALUE: u16 = 1;
const REGISTER_1: u32 = 1;
/// linux/netfilter.h: both IP families.
const NFPROTO_INET: u8 = 1;
/// linux/netfilter.h
const PRE_ROUTING: u32 = 0;
/// linux/netfilter_ipv4.h, NF_IP_PRI_NAT_DST.
const PRIORITY: i32 = -100;

/// A destination as its client dialled it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialled {
    /// Address.
    pub addr: Addr,
    /// Port.
    pub port: Port,
    /// Protocol.
    pub proto: Proto,
}

const CHAIN: &str = "prerouting";

/// Makes the kernel translate the connections that it translates now for as long as the table is there. May be repeated.
pub fn keep_translating() -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(NEW_TABLE, NLM_F_CREATE | NLM_F_EXCL, |message| message.text(TABLE_NAME, TABLE));
    batch.message(NEW_CHAIN, NLM_F_CREATE, |message| {
        message.text(CHAIN_TABLE, TABLE);
        message.text(CHAIN_NAME, CHAIN);
        message.nested(CHAIN_HOOK, |hook| {
            hook.attribute(HOOK_NUMBER, &PRE_ROUTING.to_be_bytes());
            hook.attribute(HOOK_PRIORITY, &PRIORITY.to_be_bytes());
        });
        message.text(CHAIN_TYPE, "nat");
    });
    batch.message(NEW_RULE, NLM_F_CREATE, |message| {
        message.text(RULE_TABLE, TABLE);
        message.text(RULE_CHAIN, CHAIN);
        // As nft writes it: ct direction original.
        message.nested(RULE_EXPRESSIONS, |list| {
            expression(list, "ct", |data| {
                data.attribute(CT_REGISTER, &REGISTER_1.to_be_bytes());
                data.attribute(CT_KEY, &CT_KEY_DIRECTION.to_be_bytes());
            });
            expression(list, "cmp", |data| {
                data.attribute(COMPARE_REGISTER, &REGISTER_1.to_be_bytes());
                data.attribute(COMPARE_OPERATION, &COMPARE_EQUAL.to_be_bytes());
                data.nested(COMPARE_WITH, |with| with.attribute(DATA_VALUE, &[0]));
            });
        });
    });
    match batch.send() {
        // The messages took effect together: who has the table has all.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Undoes [`keep_translating`]. May be repeated.
pub fn stop_translating() -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(DELETE_TABLE, 0, |message| message.text(TABLE_NAME, TABLE));
    match batch.send() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// True if a connection whose destination the kernel translates, and whose client dialled what `is_ours` says, is there.
pub fn has_translated(mut is_ours: impl FnMut(Dialled) -> bool) -> io::Result<bool> {
    let mut request = message(CT_GET, NLM_F_DUMP, 1, libc::AF_UNSPEC as u8);
    // Older kernels do not heed the two and list all connections.
    request.attribute(CTA_STATUS, &IPS_DST_NAT.to_be_bytes());
    request.attribute(CTA_STATUS_MASK, &IPS_DST_NAT.to_be_bytes());
    let mut found = false;
    dump(request, |body| found = found || translated(body).is_some_and(&mut is_ours))?;
    Ok(found)
}

/// Table and name of every chain of nf_tables, those of iptables among them.
pub fn chains() -> io::Result<Vec<(String, String)>> {
    let mut chains = Vec::new();
    dump(message(GET_CHAIN, NLM_F_DUMP, 1, libc::AF_UNSPEC as u8), |body| chains.extend(parse_chain(body)))?;
    Ok(chains)
}

fn parse_chain(body: &[u8]) -> Option<(String, String)> {
    let of_chain = body.get(HEADER..)?;
    Some((text(find(of_chain, CHAIN_TABLE)?)?, text(find(of_chain, CHAIN_NAME)?)?))
}

/// A chain by family (`NFPROTO_` number), table and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ChainName {
    family: u8,
    table: String,
    name: String,
}

/// What the rules of a chain can do, as far as they can be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ChainUse {
    /// Hangs at the forward hook and drops what no rule decides on.
    drops_forwarded: bool,
    accepts: bool,
    /// A rule looks its verdict up in a map, which may accept or lead anywhere.
    looks_up: bool,
    drops_invalid: bool,
    leads_to: BTreeSet<String>,
}

/// A chain that drops what is forwarded unless a rule accepts it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dropping {
    /// The chain as `nft` names it: family, table, name.
    pub chain: String,
    /// A rule in it, or in a chain that it leads to, accepts something.
    pub accepts_some: bool,
}

/// What the rules of this network namespace do to what is forwarded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Chains whose policy for forwarded packets is to drop.
    pub dropping: Vec<Dropping>,
    /// Chains with a rule that drops what connection tracking calls invalid, as `nft` names them.
    pub invalid_dropping: Vec<String>,
}

/// Reads all chains and rules of nf_tables, those of iptables among them (but for the old kind of iptables).
pub fn firewall() -> io::Result<Firewall> {
    let mut chains = BTreeMap::new();
    dump(message(GET_CHAIN, NLM_F_DUMP, 1, libc::AF_UNSPEC as u8), |body| chains.extend(parse_chain_use(body)))?;
    if chains.is_empty() {
        return Ok(Firewall::default());
    }
    dump(message(GET_RULE, NLM_F_DUMP, 1, libc::AF_UNSPEC as u8), |body| {
        add_rule(&mut chains, body);
    })?;
    Ok(summarize(&chains))
}

fn summarize(chains: &BTreeMap<ChainName, ChainUse>) -> Firewall {
    let dropping = chains.iter().filter(|(_, chain)| chain.drops_forwarded);
    let invalid = chains.iter().filter(|(_, chain)| chain.drops_invalid);
    Firewall {
        dropping: dropping
            .map(|(name, _)| Dropping { chain: name.to_string(), accepts_some: can_accept(chains, name) })
            .collect(),
        invalid_dropping: invalid.map(|(name, _)| name.to_string()).collect(),
    }
}

/// True if the chain, or one that it leads to, has a rule that accepts.
fn can_accept(chains: &BTreeMap<ChainName, ChainUse>, start: &ChainName) -> bool {
    let mut seen = BTreeSet::from([start.name.as_str()]);
    let mut open = vec![start.name.as_str()];
    while let Some(name) = open.pop() {
        let Some(chain) = chains.get(&ChainName { name: name.to_owned(), ..start.clone() }) else { continue };
        if chain.accepts || chain.looks_up {
            return true;
        }
        open.extend(chain.leads_to.iter().map(String::as_str).filter(|next| seen.insert(next)));
    }
    false
}

impl std::fmt::Display for ChainName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // linux/netfilter.h
        let family = match self.family {
            1 => "inet",
            2 => "ip",
            5 => "netdev",
            7 => "bridge",
            10 => "ip6",
            _ => "?",
        };
        write!(f, "{family} {} {}", self.table, self.name)
    }
}

fn parse_chain_use(body: &[u8]) -> Option<(ChainName, ChainUse)> {
    let (table, name) = parse_chain(body)?;
    let (mut hook, mut policy) = (None, None);
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            CHAIN_HOOK => hook = find(value, HOOK_NUMBER).and_then(number),
            CHAIN_POLICY => policy = number(value),
            _ => {}
        }
    }
    // NFPROTO_BRIDGE and others number their hooks otherwise, or see other packets.
    let is_ip = [1, 2, 10].contains(body.first()?);
    let drops_forwarded = is_ip && hook == Some(FORWARD) && policy == Some(VERDICT_DROP as u32);
    Some((ChainName { family: *body.first()?, table, name }, ChainUse { drops_forwarded, ..ChainUse::default() }))
}

/// Adds what a rule does to what is known of its chain.
fn add_rule(chains: &mut BTreeMap<ChainName, ChainUse>, body: &[u8]) -> Option<()> {
    let attributes_of_rule = body.get(HEADER..)?;
    let name = ChainName {
        family: *body.first()?,
        table: text(find(attributes_of_rule, RULE_TABLE)?)?,
        name: text(find(attributes_of_rule, RULE_CHAIN)?)?,
    };
    let chain = chains.entry(name).or_default();
    let mut sees_invalid = false;
    let mut asks_for_state = false;
    for (_, expression) in attributes(find(attributes_of_rule, RULE_EXPRESSIONS)?) {
        let data = find(expression, EXPRESSION_DATA).unwrap_or_default();
        match find(expression, EXPRESSION_NAME)?.strip_suffix(&[0])? {
            b"ct" => asks_for_state = find(data, CT_KEY).and_then(number) == Some(CT_KEY_STATE),
            b"bitwise" if asks_for_state => {
                // Not a number of the network: a mask as the kernel keeps it.
                let mask = find(data, BITWISE_MASK).and_then(|mask| find(mask, DATA_VALUE));
                let mask = mask.and_then(|mask| mask.try_into().ok()).map_or(0, u32::from_ne_bytes);
                sees_invalid |= mask & STATE_INVALID != 0;
            }
            b"match" => sees_invalid |= matches_invalid(data),
            b"lookup" => {
                chain.looks_up |= find(data, LOOKUP_DESTINATION).and_then(number) == Some(REGISTER_VERDICT);
            }
            b"immediate" => {
                let verdict = find(data, IMMEDIATE_DATA).and_then(|data| find(data, DATA_VERDICT));
                let Some(verdict) = verdict else { continue };
                match find(verdict, VERDICT_CODE).and_then(number).map(u32::cast_signed) {
                    Some(VERDICT_ACCEPT) => chain.accepts = true,
                    Some(VERDICT_DROP) => chain.drops_invalid |= sees_invalid,
                    _ => chain.leads_to.extend(find(verdict, VERDICT_CHAIN).and_then(text)),
                }
            }
            _ => {}
        }
    }
    Some(())
}

/// True for iptables' `-m conntrack --ctstate INVALID` (linux/netfilter/xt_conntrack.h, xt_conntrack_mtinfo3).
fn matches_invalid(data: &[u8]) -> bool {
    const BY_STATE: u16 = 1;
    const FLAGS: usize = 146;
    let half = |info: &[u8], at: usize| info.get(at..at + 2).map(|half| u16::from_ne_bytes([half[0], half[1]]));
    let read = || {
        let info = find(data, MATCH_INFO)?;
        let [flags, inverted, states] = [FLAGS, FLAGS + 2, FLAGS + 4].map(|at| half(info, at));
        Some(flags? & BY_STATE != 0 && inverted? & BY_STATE == 0 && u32::from(states?) & STATE_INVALID != 0)
    };
    find(data, MATCH_NAME).and_then(text).as_deref() == Some("conntrack") && read().unwrap_or(false)
}

/// The value of an attribute.
fn find(attributes_in: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(attributes_in).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

fn text(value: &[u8]) -> Option<String> {
    String::from_utf8(value.strip_suffix(&[0]).unwrap_or(value).to_vec()).ok()
}

/// A rule that translates the destination of packets to one port of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRule {
    /// The chain that it is in.
    pub chain: String,
    /// At which address; none: at all of them.
    pub addr: Option<Addr>,
    /// The port.
    pub port: Port,
    /// Its protocol.
    pub proto: Proto,
}

/// Chains and tables in which containers get ports of this node: CNI's `portmap` by iptables and by nftables, Docker.
const PORT_CHAINS: [&str; 3] = ["CNI-DN-", "CNI-HOSTPORT-", "DOCKER"];
const PORT_TABLES: [&str; 1] = ["cni_hostport"];

/// Such rules, in chains that are made for containers.
pub fn port_rules() -> io::Result<Vec<PortRule>> {
    let is_for_ports = |table: &str, chain: &str| {
        PORT_TABLES.contains(&table) || PORT_CHAINS.iter().any(|start| chain.starts_with(start))
    };
    let mut tables: Vec<_> =
        chains()?.into_iter().filter(|(table, chain)| is_for_ports(table, chain)).map(|(table, _)| table).collect();
    tables.sort();
    tables.dedup();
    let mut rules = Vec::new();
    for table in tables {
        let mut request = message(GET_RULE, NLM_F_DUMP, 1, libc::AF_UNSPEC as u8);
        request.text(RULE_TABLE, &table);
        dump(request, |body| rules.extend(parse_port_rule(body).filter(|rule| is_for_ports(&table, &rule.chain))))?;
    }
    Ok(rules)
}

/// A rule as far as it tells one port of a destination that it translates; none if it does not.
fn parse_port_rule(body: &[u8]) -> Option<PortRule> {
    let (mut chain, mut reading) = (None, Reading::default());
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            RULE_CHAIN => chain = text(value),
            RULE_EXPRESSIONS => attributes(value).for_each(|(_, expression)| reading.take(expression)),
            _ => {}
        }
    }
    let Reading { addr, port, proto, is_translated, .. } = reading;
    let (port, proto) = (Port(port?), Proto(proto?));
    is_translated.then_some(PortRule { chain: chain?, addr, port, proto })
}

/// What the expressions of a rule have said so far.
#[derive(Default)]
struct Reading {
    /// What was loaded last: what is compared next.
    loaded: Option<Field>,
    addr: Option<Addr>,
    port: Option<u16>,
    proto: Option<u8>,
    is_translated: bool,
}

/// Something of a packet that a rule compares.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Proto,
    Destination,
    Port,
}

impl Reading {
    fn take(&mut self, expression: &[u8]) {
        let find = |kind| attributes(expression).find(|(found, _)| *found == kind).map(|(_, value)| value);
        let (Some(name), data) = (find(EXPRESSION_NAME), find(EXPRESSION_DATA).unwrap_or_default()) else { return };
        let word = |wanted| {
            let (_, value) = attributes(data).find(|(kind, _)| *kind == wanted)?;
            Some(u32::from_be_bytes(value.try_into().ok()?))
        };
        match name.strip_suffix(&[0]).unwrap_or(name) {
            b"meta" => self.loaded = (word(META_KEY) == Some(META_L4PROTO)).then_some(Field::Proto),
            b"payload" => self.loaded = loaded(word(PAYLOAD_BASE), word(PAYLOAD_OFFSET)),
            b"cmp" if word(COMPARE_OPERATION) == Some(COMPARE_EQUAL) => self.compare(data),
            b"nat" => self.is_translated |= word(NAT_TYPE) == Some(NAT_DESTINATION),
            b"target" => {
                let target = attributes(data).find(|(kind, _)| *kind == TARGET_NAME);
                self.is_translated |= target.is_some_and(|(_, name)| name.starts_with(b"DNAT\0"));
            }
            _ => {}
        }
    }

    fn compare(&mut self, data: &[u8]) {
        let with = attributes(data).find(|(kind, _)| *kind == COMPARE_WITH).map(|(_, with)| with).unwrap_or_default();
        let value = attributes(with).find(|(kind, _)| *kind == DATA_VALUE).map(|(_, value)| value).unwrap_or_default();
        match (self.loaded.take(), value) {
            (Some(Field::Proto), [proto]) => self.proto = Some(*proto),
            (Some(Field::Port), [high, low]) => self.port = Some(u16::from_be_bytes([*high, *low])),
            (Some(Field::Destination), value) => {
                let v4 = <[u8; 4]>::try_from(value).map(|bytes| Addr::from(Ipv4Addr::from(bytes)));
                let v6 = || <[u8; 16]>::try_from(value).map(|bytes| Addr::from(Ipv6Addr::from(bytes)));
                self.addr = v4.or_else(|_| v6()).ok();
            }
            _ => {}
        }
    }
}

/// What a part of a packet is: RFC 791 and 8200 have the destination address at 16 and 24, TCP and UDP the port at 2.
fn loaded(base: Option<u32>, offset: Option<u32>) -> Option<Field> {
    match (base?, offset?) {
        (PAYLOAD_NETWORK, 16 | 24) => Some(Field::Destination),
        (PAYLOAD_TRANSPORT, 2) => Some(Field::Port),
        _ => None,
    }
}

/// Calls `visit` with every element of a list.
fn dump(request: Message, mut visit: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = NetlinkSocket::open(libc::NETLINK_NETFILTER)?;
    netlink::dump(&socket, &request.finish(), |_, body| visit(body))
}

/// What was dialled, if this connection's destination is translated.
fn translated(body: &[u8]) -> Option<Dialled> {
    let (mut status, mut dialled) = (0, None);
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            CTA_STATUS => status = u32::from_be_bytes(value.try_into().ok()?),
            CTA_TUPLE_ORIG => dialled = parse_tuple(value),
            _ => {}
        }
    }
    dialled.filter(|_| status & IPS_DST_NAT != 0)
}

fn parse_tuple(tuple: &[u8]) -> Option<Dialled> {
    let (ip, proto) = (find(tuple, CTA_TUPLE_IP)?, find(tuple, CTA_TUPLE_PROTO)?);
    let v4 = || Some(Addr::from(Ipv4Addr::from(<[u8; 4]>::try_from(find(ip, CTA_IP_V4_DST)?).ok()?)));
    let v6 = || Some(Addr::from(Ipv6Addr::from(<[u8; 16]>::try_from(find(ip, CTA_IP_V6_DST)?).ok()?)));
    let port = find(proto, CTA_PROTO_DST_PORT)?;
    Some(Dialled {
        addr: v4().or_else(v6)?,
        port: Port(u16::from_be_bytes(port.try_into().ok()?)),
        proto: Proto(*find(proto, CTA_PROTO_NUM)?.first()?),
    })
}

/// Bytes of `struct nfgenmsg`, which opens every message's body.
const HEADER: usize = 4;

/// A message in the making, with its `struct nfgenmsg`.
fn message(kind: u16, flags: u16, sequence: u32, family: u8) -> Message {
    // Of a batch, the subsystem that it is for; of other messages, nothing.
    let resource = if kind == BATCH_BEGIN || kind == BATCH_END { NF_TABLES >> 8 } else { 0 };
    let [high, low] = resource.to_be_bytes();
    Message::new(kind, flags, sequence, &[family, 0, high, low])
}

fn expression(list: &mut Message, name: &str, fill: impl FnOnce(&mut Message)) {
    list.nested(LIST_ELEMENT, |element| {
        element.text(EXPRESSION_NAME, name);
        element.nested(EXPRESSION_DATA, fill);
    });
}

/// Messages that take effect together or not at all.
struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn new() -> Self {
        Self { bytes: message(BATCH_BEGIN, 0, 0, 0).finish(), sequence: 0 }
    }

    fn message(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Message)) {
        self.sequence += 1;
        let mut one = message(kind, flags | NLM_F_ACK, self.sequence, NFPROTO_INET);
        fill(&mut one);
        self.bytes.extend(one.finish());
    }

    /// Sends it and waits for what becomes of each message.
    fn send(mut self) -> io::Result<()> {
        self.bytes.extend(message(BATCH_END, 0, self.sequence + 1, 0).finish());
        let socket = NetlinkSocket::open(libc::NETLINK_NETFILTER)?;
        socket.send(&self.bytes)?;
        let mut buffer = vec![0; 1 << 13];
        let mut answered = 0;
        while answered < self.sequence {
            let length = socket.receive(&mut buffer)?;
            for (kind, body) in messages(&buffer[..length]) {
                if kind == NLMSG_ERROR {
                    answer(body)?;
                    answered += 1;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection as the kernel lists it.
    fn connection(ip: (u16, &[u8]), status: u32) -> Vec<u8> {
        let mut message = super::message(CONNTRACK, 0, 1, 2);
        message.nested(CTA_TUPLE_ORIG, |tuple| {
            tuple.nested(CTA_TUPLE_IP, |inside| inside.attribute(ip.0, ip.1));
            tuple.nested(CTA_TUPLE_PROTO, |proto| {
                proto.attribute(CTA_PROTO_NUM, &[17]);
                proto.attribute(CTA_PROTO_DST_PORT, &53u16.to_be_bytes());
            });
        });
        message.attribute(CTA_STATUS, &status.to_be_bytes());
        message.finish()
    }

    #[test]
    fn a_translated_connection_tells_what_was_dialled() {
        let v6 = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 7);
        let bytes = [
            connection((CTA_IP_V4_DST, &[10, 96, 0, 10]), IPS_DST_NAT | 1),
            connection((CTA_IP_V6_DST, &v6.octets()), IPS_DST_NAT),
            connection((CTA_IP_V4_DST, &[10, 96, 0, 11]), 1),
        ];
        let found: Vec<_> = messages(&bytes.concat()).map(|(_, body)| translated(body)).collect();
        let dialled = |addr| Some(Dialled { addr, port: Port(53), proto: Proto::UDP });
        let wanted = [dialled(Ipv4Addr::new(10, 96, 0, 10).into()), dialled(v6.into()), None];
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_chain_tells_its_table_and_its_name() {
        let mut message = super::message(NEW_CHAIN, 0, 1, NFPROTO_INET);
        message.text(CHAIN_TABLE, "nat");
        message.text(CHAIN_NAME, "KUBE-SERVICES");
        let bytes = message.finish();
        let found: Vec<_> = messages(&bytes).filter_map(|(_, body)| parse_chain(body)).collect();
        assert_eq!(found, [("nat".to_owned(), "KUBE-SERVICES".to_owned())]);
        for end in 0..bytes.len() {
            assert_eq!(messages(&bytes[..end]).filter_map(|(_, body)| parse_chain(body)).count(), 0, "{end} bytes");
        }
    }

    /// A rule as iptables writes it: -p tcp -d ADDR --dport 30080 -j DNAT.
    fn port_rule(target: &[u8]) -> Vec<u8> {
        let load = |message: &mut Message, base: u32, offset: u32| {
            expression(message, "payload", |data| {
                data.attribute(PAYLOAD_BASE, &base.to_be_bytes());
                data.attribute(PAYLOAD_OFFSET, &offset.to_be_bytes());
            });
        };
        let compare = |message: &mut Message, value: &[u8]| {
            expression(message, "cmp", |data| {
                data.attribute(COMPARE_OPERATION, &COMPARE_EQUAL.to_be_bytes());
                data.nested(COMPARE_WITH, |with| with.attribute(DATA_VALUE, value));
            });
        };
        let mut message = super::message(NEW_RULE, 0, 1, 2);
        message.text(RULE_TABLE, "nat");
        message.text(RULE_CHAIN, "CNI-DN-1");
        message.nested(RULE_EXPRESSIONS, |list| {
            expression(list, "meta", |data| data.attribute(META_KEY, &META_L4PROTO.to_be_bytes()));
            compare(list, &[6]);
            // The source is none of it.
            load(list, PAYLOAD_NETWORK, 12);
            compare(list, &[10, 0, 0, 9]);
            load(list, PAYLOAD_NETWORK, 16);
            compare(list, &[10, 0, 0, 7]);
            load(list, PAYLOAD_TRANSPORT, 2);
            compare(list, &30080u16.to_be_bytes());
            expression(list, "target", |data| data.attribute(TARGET_NAME, target));
        });
        message.finish()
    }

    #[test]
    fn a_rule_tells_the_port_that_it_translates() {
        let parse = |bytes: &[u8]| messages(bytes).find_map(|(_, body)| parse_port_rule(body));
        let addr = Some(Ipv4Addr::new(10, 0, 0, 7).into());
        let expected = PortRule { chain: "CNI-DN-1".into(), addr, port: Port(30080), proto: Proto::TCP };
        assert_eq!(parse(&port_rule(b"DNAT\0")), Some(expected));
        assert_eq!(parse(&port_rule(b"MARK\0")), None, "it translates nothing");
        let whole = port_rule(b"DNAT\0");
        let (_, body) = messages(&whole).next().expect("it is whole");
        for length in 0..body.len() {
            let _ = parse_port_rule(&body[..length]);
        }
    }

    /// A rule of `ip filter`, as the kernel lists it.
    fn rule(chain: &str, fill: impl FnOnce(&mut Message)) -> Vec<u8> {
        let mut message = super::message(NEW_RULE, 0, 1, 2);
        message.text(RULE_TABLE, "filter");
        message.text(RULE_CHAIN, chain);
        message.nested(RULE_EXPRESSIONS, fill);
        message.finish()
    }

    fn decide(list: &mut Message, code: i32, chain: Option<&str>) {
        expression(list, "immediate", |data| {
            data.nested(IMMEDIATE_DATA, |data| {
                data.nested(DATA_VERDICT, |verdict| {
                    verdict.attribute(VERDICT_CODE, &code.to_be_bytes());
                    chain.into_iter().for_each(|chain| verdict.text(VERDICT_CHAIN, chain));
                });
            });
        });
    }

    fn chain(name: &str, hook: Option<(u32, i32)>) -> Vec<u8> {
        let mut message = super::message(NEW_CHAIN, 0, 1, 2);
        message.text(CHAIN_TABLE, "filter");
        message.text(CHAIN_NAME, name);
        if let Some((hook, policy)) = hook {
            message.nested(CHAIN_HOOK, |inside| inside.attribute(HOOK_NUMBER, &hook.to_be_bytes()));
            message.attribute(CHAIN_POLICY, &policy.to_be_bytes());
        }
        message.finish()
    }

    fn firewall_of(listed: &[Vec<u8>], rules: &[Vec<u8>]) -> Firewall {
        let mut chains = BTreeMap::new();
        messages(&listed.concat()).for_each(|(_, body)| chains.extend(parse_chain_use(body)));
        messages(&rules.concat()).for_each(|(_, body)| assert_eq!(add_rule(&mut chains, body), Some(())));
        summarize(&chains)
    }

    #[test]
    fn a_policy_of_drop_counts_at_the_forward_hook_and_accepting_rules_are_looked_for_in_all_chains_it_leads_to() {
        const JUMP: i32 = -3;
        let chains = [
            chain("FORWARD", Some((FORWARD, VERDICT_DROP))),
            chain("INPUT", Some((1, VERDICT_DROP))),
            chain("OPEN", Some((FORWARD, VERDICT_ACCEPT))),
            chain("A", None),
            chain("B", None),
        ];
        let leads = |from, to| rule(from, |list| decide(list, JUMP, Some(to)));
        let dropping = |rules: &[Vec<u8>]| firewall_of(&chains, rules).dropping;
        let wanted = |accepts_some| [Dropping { chain: "ip filter FORWARD".into(), accepts_some }];
        assert_eq!(dropping(&[]), wanted(false));
        let accept = |chain| rule(chain, |list| decide(list, VERDICT_ACCEPT, None));
        assert_eq!(dropping(&[accept("FORWARD")]), wanted(true));
        assert_eq!(dropping(&[accept("B")]), wanted(false), "nothing leads there");
        let circle = [leads("FORWARD", "A"), leads("A", "B"), leads("B", "A")];
        assert_eq!(dropping(&circle), wanted(false));
        assert_eq!(dropping(&[&circle[..], &[accept("B")]].concat()), wanted(true));
    }

    #[test]
    fn rules_that_drop_what_is_invalid_are_known_in_both_forms() {
        let native = |mask: u32, verdict| {
            rule("A", |list| {
                expression(list, "ct", |data| data.attribute(CT_KEY, &CT_KEY_STATE.to_be_bytes()));
                expression(list, "bitwise", |data| {
                    data.nested(BITWISE_MASK, |inside| inside.attribute(DATA_VALUE, &mask.to_ne_bytes()));
                });
                decide(list, verdict, None);
            })
        };
        let of_iptables = |states: u16, inverted: u16| {
            let mut info = vec![0; 160];
            for (at, half) in [(146, 1u16), (148, inverted), (150, states)] {
                info[at..at + 2].copy_from_slice(&half.to_ne_bytes());
            }
            rule("A", |list| {
                expression(list, "match", |data| {
                    data.text(MATCH_NAME, "conntrack");
                    data.attribute(MATCH_INFO, &info);
                });
                decide(list, VERDICT_DROP, None);
            })
        };
        for (rule, is_so) in [
            (native(1, VERDICT_DROP), true),
            (native(1, VERDICT_ACCEPT), false),
            (native(6, VERDICT_DROP), false),
            (of_iptables(1, 0), true),
            (of_iptables(1, 1), false),
            (of_iptables(2, 0), false),
        ] {
            assert_eq!(!firewall_of(&[], &[rule]).invalid_dropping.is_empty(), is_so);
        }
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        let whole = connection((CTA_IP_V4_DST, &[10, 96, 0, 10]), IPS_DST_NAT);
        for length in 0..whole.len() {
            assert!(messages(&whole[..length]).next().is_none());
        }
        let (_, body) = messages(&whole).next().expect("it is whole");
        for length in 0..body.len() {
            let _ = translated(&body[..length]);
        }
    }
}
