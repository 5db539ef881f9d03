//! What Shunt asks of netfilter, over netlink: which connections the kernel translates the destination of, that it goes on
//! doing so, and which chains there are.
//!
//! The kernel translates by hooks that it registers with the first NAT chain of a network namespace and removes with the
//! last one, and it tracks connections while some rule asks about them: a kube-proxy that takes its rules away takes the
//! translation of all its connections with them, unless others have such. [`keep_translating`] makes one chain with one rule
//! that asks and decides nothing.
//! May touch: the connection table, for reading; one table of nf_tables, named [`TABLE`].

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
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
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
const CT_KEY_DIRECTION: u32 = 1;
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
    let text = |wanted| {
        let (_, value) = attributes(body.get(HEADER..)?).find(|(kind, _)| *kind == wanted)?;
        String::from_utf8(value.strip_suffix(&[0]).unwrap_or(value).to_vec()).ok()
    };
    Some((text(CHAIN_TABLE)?, text(CHAIN_NAME)?))
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
    let find = |inside: &'_ [u8], wanted| {
        attributes(inside).find(|(kind, _)| *kind == wanted).map(|(_, value)| value.to_vec())
    };
    let (ip, proto) = (find(tuple, CTA_TUPLE_IP)?, find(tuple, CTA_TUPLE_PROTO)?);
    let v4 = || Some(Addr::from(Ipv4Addr::from(<[u8; 4]>::try_from(find(&ip, CTA_IP_V4_DST)?).ok()?)));
    let v6 = || Some(Addr::from(Ipv6Addr::from(<[u8; 16]>::try_from(find(&ip, CTA_IP_V6_DST)?).ok()?)));
    let port = find(&proto, CTA_PROTO_DST_PORT)?;
    Some(Dialled {
        addr: v4().or_else(v6)?,
        port: Port(u16::from_be_bytes(port.try_into().ok()?)),
        proto: Proto(*find(&proto, CTA_PROTO_NUM)?.first()?),
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
