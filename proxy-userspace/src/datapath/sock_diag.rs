//! Sockets of a network namespace with what the hooks keep with them, and the end of single ones: the kernel's sock_diag.
//!
//! A list names each socket by its cookie, which no other ever has, and the order to close one is obeyed only if cookie and
//! both ends are still the same (net/ipv4/inet_diag.c, `inet_diag_find_one_icsk`; net/ipv4/udp_diag.c, `udp_diag_destroy`).
//! A TCP socket's storage is listed by the map that it is of (net/core/bpf_sk_storage.c, `bpf_sk_storage_diag_put`, Linux 5.6);
//! that of others is not, and read by their owners' descriptors ([`socket_owner`]).
//! May touch: sockets of the namespace of the thread that opens a [`Diag`].

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::Path;

use proxy_common::abi::socket::SocketEntry;
use proxy_common::addr::{Addr, Be16, Proto};

use super::netlink::{self, Message, NLM_F_ACK, NLM_F_DUMP, attribute, attributes};
use super::socket_owner;
use super::sys::NetlinkSocket;
use crate::planner::{BackendAddr, FrontendAddr, Link};

// linux/sock_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
// linux/inet_diag.h
const REQ_BYTECODE: u16 = 1;
const REQ_SK_BPF_STORAGES: u16 = 2;
const SK_BPF_STORAGES: u16 = 20;
const BC_JMP: u8 = 1;
const BC_D_COND: u8 = 8;
// linux/sock_diag.h
const STORAGE_REQ_MAP_FD: u16 = 1;
const STORAGE: u16 = 1;
const STORAGE_MAP_VALUE: u16 = 3;

/// States in which a connection may be waited for (include/net/tcp_states.h): ESTABLISHED (a connected UDP socket is that
/// too), SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// Bytes of `struct inet_diag_sockid`: what names a socket.
const ID: usize = 48;
/// Where the id stands in `struct inet_diag_msg`, after family, state, timer and retransmissions.
const ID_AT: usize = 4;
/// Bytes of `struct inet_diag_msg`.
const BODY: usize = ID_AT + ID + 20;

/// Backends that the kernel is asked to look for itself; of more, all sockets are listed. It compares one after the other.
const MOST_CONDITIONS: usize = 64;

/// A socket that went through a frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What it dialled and where it was sent.
    pub link: Link,
    /// AF_INET or AF_INET6.
    family: u8,
    /// Its `struct inet_diag_sockid`.
    id: [u8; ID],
}

/// A view of the sockets of one network namespace.
pub struct Diag(NetlinkSocket);

impl Diag {
    /// Of the namespace that the calling thread is in.
    pub fn open() -> io::Result<Self> {
        NetlinkSocket::open(libc::NETLINK_SOCK_DIAG).map(Self)
    }

    /// Connected sockets of a protocol with an entry in the socket storage `map`, whose peer is that entry's backend, and is one
    /// of `backends` if these are given. `processes`: directories of /proc, of those that may hold such sockets. With the last
    /// refusal to look at a process's sockets.
    pub fn sockets<'a>(
        &self,
        proto: Proto,
        backends: Option<&[BackendAddr]>,
        map: BorrowedFd<'_>,
        processes: impl IntoIterator<Item = &'a Path>,
    ) -> io::Result<(Vec<Found>, Option<io::Error>)> {
        let mut listed = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = list_request(family as u8, proto, backends, map.as_raw_fd());
            netlink::dump(&self.0, &request, |_, body| listed.extend(parse_socket(body)))?;
        }
        if let Some(backends) = backends {
            let peers: BTreeSet<_> = backends.iter().map(|backend| (backend.addr, backend.port.be())).collect();
            listed.retain(|socket| peers.contains(&socket.peer()));
        }
        let (entries, refused) = if proto == Proto::TCP || listed.is_empty() {
            Default::default()
        } else {
            let wanted = listed.iter().map(|socket| (socket.inode, socket.cookie())).collect();
            socket_owner::entries(processes, &wanted, map)
        };
        let entry = |socket: &Listed| socket.entry.or_else(|| entries.get(&socket.cookie()).copied());
        let found = listed.iter().filter_map(|socket| socket.found(&entry(socket)?, proto)).collect();
        Ok((found, refused))
    }

    /// Closes a socket: its owner gets ECONNABORTED, a TCP peer a reset. False if it is not there any more, or has another
    /// peer. Errors: EOPNOTSUPP without CONFIG_INET_DIAG_DESTROY.
    pub fn close(&self, socket: &Found) -> io::Result<bool> {
        match netlink::ask(&self.0, &close_request(socket)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// False if the kernel cannot close sockets for others: it was built without CONFIG_INET_DIAG_DESTROY.
    pub fn can_close(&self) -> io::Result<bool> {
        // No socket has no ends.
        let header = request_header(libc::AF_INET as u8, Proto::TCP, 0, &[0; ID]);
        match netlink::ask(&self.0, &Message::new(SOCK_DESTROY, NLM_F_ACK, 1, &header).finish()) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(true),
        }
    }
}

/// `struct inet_diag_req_v2`.
fn request_header(family: u8, proto: Proto, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut header = vec![family, proto.0, 0, 0];
    header.extend(states.to_ne_bytes());
    header.extend(id);
    header
}

fn list_request(family: u8, proto: Proto, backends: Option<&[BackendAddr]>, map: i32) -> Vec<u8> {
    let header = request_header(family, proto, STATES, &[0; ID]);
    let mut message = Message::new(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, 1, &header);
    if let Some(backends) = backends.filter(|backends| backends.len() <= MOST_CONDITIONS) {
        message.attribute(REQ_BYTECODE, &any_of(backends));
    }
    message.nested(REQ_SK_BPF_STORAGES, |storages| storages.attribute(STORAGE_REQ_MAP_FD, &map.to_ne_bytes()));
    message.finish()
}

fn close_request(socket: &Found) -> Vec<u8> {
    let header = request_header(socket.family, socket.link.frontend.proto, STATES, &socket.id);
    Message::new(SOCK_DESTROY, NLM_F_ACK, 1, &header).finish()
}

/// A program of inet_diag's own bytecode that accepts sockets whose peer is one of `backends`. An operation is a code and how
/// many bytes to go on when it is true or false; the end of the program accepts, four bytes behind it refuse.
fn any_of(backends: &[BackendAddr]) -> Vec<u8> {
    let mut program = Vec::new();
    // From the last to the first: each needs to know what is behind it.
    for backend in backends.iter().rev() {
        let condition = host_condition(backend);
        let length = (4 + condition.len()) as u8;
        let is_last = program.is_empty();
        let mut part = operation(BC_D_COND, length, u16::from(length) + 4);
        part.extend(condition);
        if !is_last {
            part.extend(operation(BC_JMP, 4, (4 + program.len()) as u16));
        }
        part.extend(program);
        program = part;
    }
    program
}

/// `struct inet_diag_bc_op`.
fn operation(code: u8, yes: u8, no: u16) -> Vec<u8> {
    let [low, high] = no.to_ne_bytes();
    vec![code, yes, low, high]
}

/// `struct inet_diag_hostcond`: the whole address, and the port. An IPv4 one fits mapped peers of IPv6 sockets too.
fn host_condition(backend: &BackendAddr) -> Vec<u8> {
    let words = &backend.addr.0[if backend.addr.is_v4() { 3.. } else { 0.. }];
    let family = if backend.addr.is_v4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut condition = vec![family as u8, 32 * words.len() as u8, 0, 0];
    condition.extend(i32::from(backend.port.0).to_ne_bytes());
    condition.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    condition
}

/// A socket of a list.
#[derive(Clone, Debug)]
struct Listed {
    family: u8,
    id: [u8; ID],
    inode: u32,
    /// What is kept with it, where the kernel says so.
    entry: Option<SocketEntry>,
}

impl Listed {
    fn word(&self, at: usize) -> u32 {
        word_at(&self.id, at).expect("ids are longer")
    }

    /// The other end: source port, destination port, source address, destination address, four words each.
    fn peer(&self) -> (Addr, Be16) {
        let addr = match i32::from(self.family) == libc::AF_INET {
            true => Addr::from_v4_word(self.word(20)),
            false => Addr([self.word(20), self.word(24), self.word(28), self.word(32)]),
        };
        (addr, Be16(u16::from_ne_bytes([self.id[2], self.id[3]])))
    }

    /// SO_COOKIE: the last two words, the lower half first.
    fn cookie(&self) -> u64 {
        u64::from(self.word(44)) << 32 | u64::from(self.word(40))
    }

    /// The socket by its entry, if it is connected to that entry's backend.
    fn found(&self, entry: &SocketEntry, proto: Proto) -> Option<Found> {
        let frontend = FrontendAddr { addr: entry.frontend, port: entry.frontend_port.host(), proto };
        let backend = BackendAddr { addr: entry.backend, port: entry.backend_port.host(), proto };
        let is_there = self.peer() == (entry.backend, entry.backend_port);
        is_there.then_some(Found { link: Link { frontend, backend }, family: self.family, id: self.id })
    }
}

fn word_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn parse_socket(body: &[u8]) -> Option<Listed> {
    let id: [u8; ID] = body.get(ID_AT..ID_AT + ID)?.try_into().ok()?;
    let storages = attribute(body.get(BODY..)?, SK_BPF_STORAGES).unwrap_or_default();
    let entry = attributes(storages)
        .filter(|(kind, _)| *kind == STORAGE)
        .find_map(|(_, storage)| parse_entry(attribute(storage, STORAGE_MAP_VALUE)?));
    Some(Listed { family: *body.first()?, id, inode: word_at(body, BODY - 4)?, entry })
}

/// The bytes of a [`SocketEntry`], field by field.
fn parse_entry(bytes: &[u8]) -> Option<SocketEntry> {
    let word = |at: usize| word_at(bytes, at);
    let half = |at: usize| Some(Be16(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?)));
    let addr = |at: usize| Some(Addr([word(at)?, word(at + 4)?, word(at + 8)?, word(at + 12)?]));
    (bytes.len() == size_of::<SocketEntry>()).then_some(())?;
    Some(SocketEntry {
        frontend: addr(0)?,
        backend: addr(16)?,
        frontend_port: half(32)?,
        backend_port: half(34)?,
        stamp: word(36)?,
        backend_id: word(40)?,
    })
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proxy_common::addr::Port;

    use super::*;

    const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 1, 2);
    const V4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
    const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

    fn backend(addr: impl Into<IpAddr>) -> BackendAddr {
        BackendAddr { addr: Addr::from(addr.into()), port: Port(8080), proto: Proto::TCP }
    }

    /// What the kernel does with a program: net/ipv4/inet_diag.c, `inet_diag_bc_run`, of conditions on the peer.
    fn accepts(program: &[u8], peer: &BackendAddr) -> bool {
        let mut at = 0;
        while at < program.len() {
            let (code, yes) = (program[at], program[at + 1]);
            let no = u16::from_ne_bytes([program[at + 2], program[at + 3]]);
            let is_true = code == BC_D_COND && program[at + 4..at + usize::from(yes)] == host_condition(peer);
            at += if is_true { usize::from(yes) } else { usize::from(no) };
        }
        at == program.len()
    }

    #[test]
    fn a_program_accepts_each_of_its_backends_and_no_other() {
        let listed: Vec<_> = (0..MOST_CONDITIONS as u16)
            .map(|number| {
                let one = backend(Ipv4Addr::new(10, 244, 9, number as u8));
                if number % 3 == 0 { backend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 9, number)) } else { one }
            })
            .collect();
        for count in [1, 2, 7, MOST_CONDITIONS] {
            let program = any_of(&listed[..count]);
            assert_eq!(program.len() % 4, 0);
            assert!(listed[..count].iter().all(|backend| accepts(&program, backend)), "{count}");
            assert!(!listed[count..].iter().any(|backend| accepts(&program, backend)), "{count}");
            assert!(!accepts(&program, &backend(V4)));
            assert!(!accepts(&program, &BackendAddr { port: Port(8081), ..listed[0] }));
        }
    }

    #[test]
    fn a_condition_is_as_the_kernel_reads_it() {
        assert_eq!(host_condition(&backend(V4)), [2, 32, 0, 0, 0x90, 0x1f, 0, 0, 10, 244, 1, 2]);
        let v6 = host_condition(&backend(V6));
        assert_eq!(v6[..8], [10, 128, 0, 0, 0x90, 0x1f, 0, 0]);
        assert_eq!(v6[8..], V6.octets());
    }

    fn entry_bytes(entry: &SocketEntry) -> Vec<u8> {
        let words = entry.frontend.0.into_iter().chain(entry.backend.0).flat_map(u32::to_ne_bytes);
        let ports = [entry.frontend_port, entry.backend_port].into_iter().flat_map(|port| port.0.to_ne_bytes());
        words.chain(ports).chain([entry.stamp, entry.backend_id].into_iter().flat_map(u32::to_ne_bytes)).collect()
    }

    fn entry() -> SocketEntry {
        SocketEntry {
            frontend: VIP.into(),
            backend: V4.into(),
            frontend_port: Port(80).be(),
            backend_port: Port(8080).be(),
            stamp: 3,
            backend_id: 7,
        }
    }

    /// A socket as the kernel lists it.
    fn listed(family: i32, peer: &[u8], entry: Option<&SocketEntry>) -> Vec<u8> {
        let mut body = vec![family as u8, 1, 0, 0];
        body.extend([0xab, 0xcd]);
        body.extend(8080u16.to_be_bytes());
        body.extend([1; 16]);
        body.extend(peer);
        body.resize(ID_AT + 36, 0);
        body.extend([9; 12]);
        body.resize(BODY - 4, 0);
        body.extend(0x0506_0708u32.to_ne_bytes());
        let mut message = Message::new(SOCK_DIAG_BY_FAMILY, 0, 1, &body);
        message.attribute(8, &[0]);
        if let Some(entry) = entry {
            message.nested(SK_BPF_STORAGES, |storages| {
                storages.nested(STORAGE, |storage| {
                    storage.attribute(2, &77u32.to_ne_bytes());
                    storage.attribute(STORAGE_MAP_VALUE, &entry_bytes(entry));
                });
            });
        }
        message.finish()
    }

    fn parse(bytes: &[u8]) -> Option<Found> {
        let (kind, body) = netlink::messages(bytes).next()?;
        assert_eq!(kind, SOCK_DIAG_BY_FAMILY);
        let listed = parse_socket(body)?;
        listed.found(&listed.entry?, Proto::TCP)
    }

    #[test]
    fn a_socket_without_a_listed_entry_is_known_by_inode_and_cookie() {
        let bytes = listed(libc::AF_INET, &V4.octets(), None);
        let (_, body) = netlink::messages(&bytes).next().expect("it is whole");
        let socket = parse_socket(body).expect("it is whole");
        assert_eq!((socket.inode, socket.cookie()), (0x0506_0708, 0x0909_0909_0909_0909));
        assert_eq!(socket.peer(), (V4.into(), Port(8080).be()));
        assert_eq!(socket.found(&entry(), Proto::UDP).expect("it is connected there").link.backend.proto, Proto::UDP);
    }

    #[test]
    fn a_listed_socket_tells_its_link() {
        let link = Link {
            frontend: FrontendAddr { addr: VIP.into(), port: Port(80), proto: Proto::TCP },
            backend: backend(V4),
        };
        let plain = parse(&listed(libc::AF_INET, &V4.octets(), Some(&entry()))).expect("it has an entry");
        assert_eq!(plain.link, link);
        let mapped = parse(&listed(libc::AF_INET6, &V4.to_ipv6_mapped().octets(), Some(&entry())));
        assert_eq!(mapped.expect("it has an entry").link, link);
    }

    #[test]
    fn a_socket_without_an_entry_or_with_another_peer_is_nobodys() {
        assert_eq!(parse(&listed(libc::AF_INET, &V4.octets(), None)), None);
        assert_eq!(parse(&listed(libc::AF_INET, &VIP.octets(), Some(&entry()))), None);
        assert_eq!(parse(&listed(libc::AF_INET6, &V6.octets(), Some(&entry()))), None);
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        let whole = listed(libc::AF_INET, &V4.octets(), Some(&entry()));
        let (_, body) = netlink::messages(&whole).next().expect("it is whole");
        for length in 0..body.len() {
            let socket = parse_socket(&body[..length]);
            assert!(socket.is_none_or(|socket| socket.entry.is_none() && length >= BODY), "{length}");
        }
    }

    #[test]
    fn the_order_to_close_names_the_socket_as_it_was_listed() {
        let bytes = listed(libc::AF_INET, &V4.octets(), Some(&entry()));
        let request = close_request(&parse(&bytes).expect("it has an entry"));
        let (kind, body) = netlink::messages(&request).next().expect("it is whole");
        assert_eq!((kind, body.len()), (SOCK_DESTROY, 8 + ID));
        assert_eq!(body[..4], [2, 6, 0, 0]);
        assert_eq!(body[8..], bytes[16 + ID_AT..16 + ID_AT + ID]);
    }

    #[test]
    fn a_list_is_asked_for_with_the_map_and_the_backends() {
        let request = list_request(2, Proto::UDP, Some(&[backend(V4)]), 5);
        let (_, body) = netlink::messages(&request).next().expect("it is whole");
        assert_eq!(body[..8], [2, 17, 0, 0, 0x36, 0x0b, 0, 0]);
        let of = |wanted| attribute(&body[8 + ID..], wanted);
        assert_eq!(of(REQ_BYTECODE), Some(&*any_of(&[backend(V4)])));
        let storages = of(REQ_SK_BPF_STORAGES).expect("it is asked for");
        assert_eq!(attribute(storages, STORAGE_REQ_MAP_FD), Some(&5i32.to_ne_bytes()[..]));
        let many = vec![backend(V4); MOST_CONDITIONS + 1];
        let request = list_request(2, Proto::UDP, Some(&many), 5);
        let (_, body) = netlink::messages(&request).next().expect("it is whole");
        assert_eq!(attribute(&body[8 + ID..], REQ_BYTECODE), None, "more than the kernel shall compare");
    }
}
