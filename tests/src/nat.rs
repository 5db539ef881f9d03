//! The reference NAT: what must come out of a node's hooks for a packet, in plain words, slow and obvious.
//!
//! Written apart from `proxy-common`, after the design alone: at ingress only the destination changes (and the client's
//! port, if another flow has the tuple), at egress only the source (and the client's port back). So the node's own stack sees one
//! plain flow between client and backend. ICMP errors are translated as the packet they quote was, backwards.
//!
//! What is a matter of choice (the backend, a free port) is read from what the real program did, and checked to be allowed.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use crate::packet::{Body, Error, Packet, error, flag, proto};

/// An address prefix.
#[derive(Clone, Copy, Debug)]
pub struct Prefix {
    /// First address.
    pub first: IpAddr,
    /// Leading bits that count.
    pub bits: u8,
}

impl Prefix {
    /// True if `addr` lies in it.
    pub fn contains(&self, addr: IpAddr) -> bool {
        let bits = |addr: IpAddr| match addr {
            IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let differ = bits(self.first) ^ bits(addr);
        self.first.is_ipv4() == addr.is_ipv4() && differ.leading_zeros() >= u32::from(self.bits)
    }
}

/// What the hooks know about their node.
#[derive(Clone, Debug)]
pub struct Facts {
    /// `--cluster-cidr`.
    pub cluster: Vec<Prefix>,
    /// Pod addresses of this node.
    pub pods: Vec<Prefix>,
    /// ServiceCIDRs.
    pub services: Vec<Prefix>,
    /// Addresses of this node; NodePorts answer on all of them.
    pub node: Vec<IpAddr>,
    /// The kernel's source address towards a prefix; the first that fits counts.
    pub sources: Vec<(Prefix, IpAddr)>,
    /// The bridge of its pods, if they have one.
    pub bridge: Option<Bridge>,
    /// `--snat-ports`.
    pub snat_ports: RangeInclusive<u16>,
    /// `net.ipv4.ip_local_port_range`.
    pub local_ports: RangeInclusive<u16>,
}

/// A bridge with pods on its ports.
#[derive(Clone, Debug)]
pub struct Bridge {
    /// Its own address; frames to others are switched, and nobody's business.
    pub mac: [u8; 6],
    /// Pods on it whose addresses are resolved.
    pub neighbours: Vec<(IpAddr, [u8; 6])>,
}

/// One port of a service.
#[derive(Clone, Debug)]
pub struct Service {
    /// Protocol number of TCP or UDP.
    pub proto: u8,
    /// What clients dial.
    pub frontends: Vec<Frontend>,
    /// Endpoints anywhere.
    pub cluster: Set,
    /// Endpoints on this node.
    pub local: Set,
    /// Who may dial its restricted frontends.
    pub sources: Vec<Prefix>,
}

/// What clients dial.
#[derive(Clone, Copy, Debug)]
pub struct Frontend {
    /// An address and port, or the port on every address of the node.
    pub at: At,
    /// A ClusterIP.
    pub is_cluster_ip: bool,
    /// Clients inside the cluster get the local set.
    pub is_local_inside: bool,
    /// Clients outside get the local set.
    pub is_local_outside: bool,
    /// Only the service's sources may dial it.
    pub is_restricted: bool,
}

/// Where a frontend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// At one address.
    Addr(SocketAddr),
    /// At every address of the node of one family.
    NodePort {
        /// Of IPv4, else of IPv6.
        is_v4: bool,
        /// The port.
        port: u16,
    },
}

/// Endpoints that may be picked, or what happens instead.
#[derive(Clone, Debug)]
pub enum Set {
    /// One of these; more than none.
    Of(Vec<Backend>),
    /// None anywhere: an answer says so.
    Reject,
    /// None for this client, but others have some: no answer.
    Drop,
}

/// A backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Where it listens.
    pub addr: SocketAddr,
    /// It runs on this node.
    pub is_local: bool,
}

/// What must come out of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The packet as it went in.
    Same,
    /// This packet instead.
    Packet(Box<Packet>),
    /// Nothing.
    Drop,
    /// An answer to the sender instead, see [`check_answer`].
    Reject,
}

/// A connection through a frontend.
#[derive(Clone, Copy, Debug)]
struct Connection {
    proto: u8,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: Backend,
    /// The client as the node's stack sees it: its port may be another.
    seen_client: SocketAddr,
    /// The client as the backend sees it, once a packet has left, if that is this node.
    nat: Option<SocketAddr>,
    wants_nat: bool,
    end: End,
    /// By which device the client's packets come.
    device: u32,
    /// Of the client's last SYN.
    syn: Option<u32>,
    /// Not through a frontend: to a backend, with a port that another connection has.
    is_direct: bool,
    /// The backend has answered, as it answers to this very beginning.
    is_answered: bool,
    /// The backend has answered as one that knows these ends from another connection.
    is_clash: bool,
    /// The client has seen such an answer.
    is_told: bool,
}

/// What a TCP connection has seen of its end.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    fin_by_client: bool,
    fin_by_backend: bool,
    /// By a packet of the client's address: perhaps not its own.
    reset_by_client: bool,
    reset_by_backend: bool,
}

impl End {
    fn is_over(self) -> bool {
        self.reset_by_backend || self.fin_by_client && self.fin_by_backend
    }

    fn note(&mut self, flags: u8, is_by_client: bool) {
        let has = |flag: u8| flags & flag != 0;
        match (has(flag::RST), is_by_client) {
            (true, true) => self.reset_by_client = true,
            (true, false) => self.reset_by_backend = true,
            (false, true) => self.reset_by_client &= has(flag::SYN),
            // The backend, which alone can tell, opens anew.
            (false, false) if self.reset_by_client && has(flag::SYN) => *self = Self::default(),
            (false, false) => (self.reset_by_client, self.reset_by_backend) = (false, false),
        }
        self.fin_by_client |= has(flag::FIN) && is_by_client;
        self.fin_by_backend |= has(flag::FIN) && !is_by_client;
    }
}

impl Connection {
    fn new(spot: Spot, packet: &Packet, backend: Backend, seen_client: SocketAddr, wants_nat: bool) -> Self {
        Self {
            proto: packet.proto(),
            client: packet.src(),
            frontend: packet.dst(),
            backend,
            seen_client,
            nat: None,
            wants_nat,
            end: End::default(),
            device: spot.device,
            syn: syn_of(packet),
            is_direct: false,
            is_answered: false,
            is_clash: false,
            is_told: false,
        }
    }

    fn is_reply_to_nat(&self, proto: u8, src: SocketAddr, dst: SocketAddr) -> bool {
        self.proto == proto && src == self.backend.addr && self.nat == Some(dst)
    }

    fn is_to_frontend(&self, proto: u8, src: SocketAddr, dst: SocketAddr) -> bool {
        self.proto == proto && src == self.client && dst == self.frontend
    }

    fn is_plain_forward(&self, proto: u8, src: SocketAddr, dst: SocketAddr) -> bool {
        self.proto == proto && src == self.seen_client && dst == self.backend.addr
    }

    fn is_plain_reply(&self, proto: u8, src: SocketAddr, dst: SocketAddr) -> bool {
        self.is_plain_forward(proto, dst, src)
    }

    /// What a backend's packet says about the beginning of this connection.
    fn hear(&self, packet: &Packet) -> Word {
        let Body::Tcp(tcp) = &packet.body else { return Word::Ours };
        let has = |flag: u8| tcp.flags & flag != 0;
        // An answer acknowledges the SYN (RFC 9293), and perhaps what came with it.
        let acknowledges =
            has(flag::ACK) && tcp.ack.wrapping_sub(self.syn.unwrap_or_default().wrapping_add(1)) < 1 << 14;
        if self.is_answered || acknowledges && (has(flag::SYN) || has(flag::RST)) {
            return Word::Ours;
        }
        // A challenge ACK (RFC 5961) makes a client that waits for a SYN-ACK try again.
        let is_challenge = has(flag::ACK) && !has(flag::SYN | flag::FIN | flag::RST) && tcp.data.is_empty();
        if is_challenge && !self.is_told { Word::Challenge } else { Word::Foreign }
    }
}

/// What a backend's packet is to a connection that has its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// The answer, or what comes after it.
    Ours,
    /// Another connection's, but the client is to see it.
    Challenge,
    /// Another connection's.
    Foreign,
}

/// Which hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// tcx ingress.
    Ingress,
    /// tcx ingress of a bridge's port.
    IngressPort,
    /// tcx egress.
    Egress,
}

/// Where a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The hook.
    pub hook: Hook,
    /// Any number that tells the devices of the node apart.
    pub device: u32,
}

/// A fragmented packet as the hooks of one direction see it.
type FragmentKey = (bool, IpAddr, IpAddr, u8, u32);

/// Services, and the connections made so far.
#[derive(Clone, Debug)]
pub struct Nat {
    facts: Facts,
    services: Vec<Service>,
    connections: Vec<Connection>,
    fragments: HashMap<FragmentKey, (u16, u16)>,
}

impl Nat {
    /// Without connections.
    pub fn new(facts: Facts, services: Vec<Service>) -> Self {
        Self { facts, services, connections: vec![], fragments: HashMap::new() }
    }

    /// Other services from now on; connections stay.
    pub fn set_services(&mut self, services: Vec<Service>) {
        self.services = services;
    }

    /// Forgets all connections and fragments.
    pub fn forget(&mut self) {
        self.connections.clear();
        self.fragments.clear();
    }

    /// What must come out at `spot` for `packet`. `got` is what did come out, read for choices only; panics if a choice is
    /// not allowed.
    #[track_caller]
    pub fn expect(&mut self, spot: Spot, packet: &Packet, got: &[u8]) -> Expected {
        let got = packet.read_ends(got);
        if spot.hook == Hook::IngressPort
            && self.facts.bridge.as_ref().is_none_or(|bridge| packet.link.dst != bridge.mac)
        {
            return Expected::Same;
        }
        match &packet.body {
            Body::Tcp(_) | Body::Udp(_) => self.transport(spot, packet, got),
            Body::Error(error) => self.error(spot.hook, packet, error),
            // Services have TCP and UDP ports alone. Fragments are never answered.
            Body::Icmp(_) | Body::Other(..) if self.is_cluster_ip(packet.ip.dst) && packet.part.is_some() => {
                Expected::Drop
            }
            Body::Icmp(_) | Body::Other(..) if self.is_cluster_ip(packet.ip.dst) => Expected::Reject,
            Body::Icmp(_) | Body::Other(..) if spot.hook == Hook::Egress => self.untranslated(packet),
            Body::Icmp(_) | Body::Other(..) => Expected::Same,
        }
    }

    #[track_caller]
    fn transport(&mut self, spot: Spot, packet: &Packet, got: Option<(SocketAddr, SocketAddr)>) -> Expected {
        let is_egress = spot.hook == Hook::Egress;
        if let Some(part) = packet.part {
            let key = (is_egress, packet.ip.src, packet.ip.dst, packet.proto(), part.id);
            if part.from == 0 {
                self.fragments.insert(key, packet.ports().expect("it has ports"));
            } else if !self.fragments.contains_key(&key) {
                return self.unknown_fragment(is_egress, packet);
            }
        }
        if is_egress { self.egress(packet, got) } else { self.ingress(spot, packet, got) }
    }

    /// A fragment that says no ports, of a packet whose ports nobody knows.
    fn unknown_fragment(&self, is_egress: bool, packet: &Packet) -> Expected {
        let is_ours = if is_egress {
            self.is_service_address(packet.ip.dst)
        } else {
            self.frontends().any(|(_, frontend)| matches!(frontend.at, At::Addr(at) if at.ip() == packet.ip.dst))
        };
        if is_ours { Expected::Drop } else { Expected::Same }
    }

    #[track_caller]
    fn ingress(&mut self, spot: Spot, packet: &Packet, got: Option<(SocketAddr, SocketAddr)>) -> Expected {
        let (proto, src, dst) = (packet.proto(), packet.src(), packet.dst());
        if let Some(connection) = self.connections.iter_mut().find(|it| it.is_reply_to_nat(proto, src, dst)) {
            if connection.hear(packet) == Word::Foreign {
                connection.is_clash = true;
                return Expected::Same;
            }
            return changed(packet.clone().with_dst(connection.seen_client));
        }
        let is_clash = self.forget_if_new(packet);
        if let Some(connection) = self.note_end(packet, true, |connection| connection.is_to_frontend(proto, src, dst)) {
            if !connection.is_direct || connection.device == spot.device {
                // What the client says to the answer that was another connection's.
                if connection.is_clash {
                    return Expected::Drop;
                }
                return self.to_backend(spot, packet, &connection);
            }
            // A direct connection's ends are those of another's translated packets, met again at another device.
            if !opens(packet) {
                return Expected::Same;
            }
        }
        if let Some(other) = self.find(|connection| connection.is_plain_forward(proto, src, dst)) {
            // The other's own SYN may be met again at another device.
            let is_another = other.device == spot.device || opens(packet) && other.syn != syn_of(packet);
            let is_direct = begins(packet) && is_another && !other.end.is_over();
            return if is_direct { self.open_direct(spot, packet, got) } else { Expected::Same };
        }
        match self.frontend(proto, dst) {
            Some((service, frontend)) => self.open(spot, packet, &service, frontend, got, is_clash),
            None => self.no_frontend(packet),
        }
    }

    /// A client's packet with the backend as its destination, straight to it if it is on the client's bridge.
    fn to_backend(&self, spot: Spot, packet: &Packet, connection: &Connection) -> Expected {
        let mut packet = packet.clone().with_src(connection.seen_client).with_dst(connection.backend.addr);
        let neighbours = self.facts.bridge.iter().flat_map(|bridge| &bridge.neighbours);
        if spot.hook == Hook::IngressPort
            && let Some((_, mac)) = neighbours.into_iter().find(|(addr, _)| *addr == packet.ip.dst)
        {
            packet.link.dst = *mac;
        }
        changed(packet)
    }

    /// Forgets the packet's connection if the packet must be the beginning of a new one: the old one is over, its backend is
    /// gone, or the backend knew its ends from a connection that we do not know. True in the last case.
    fn forget_if_new(&mut self, packet: &Packet) -> bool {
        let (proto, src, dst) = (packet.proto(), packet.src(), packet.dst());
        let mut is_clash = false;
        let mut connections = std::mem::take(&mut self.connections);
        connections.retain(|connection| {
            if !connection.is_to_frontend(proto, src, dst) || !begins(packet) {
                return true;
            }
            is_clash |= connection.is_clash;
            let is_gone = !connection.is_direct && !self.is_there(connection);
            let is_other = !connection.is_answered && syn_of(packet) != connection.syn;
            !(is_gone || opens(packet) && (connection.end.is_over() || connection.is_clash || is_other))
        });
        self.connections = connections;
        is_clash
    }

    /// True if a connection's backend may get more of it: a datagram, if the client would get it anew; a SYN, if any
    /// service has it.
    fn is_there(&self, connection: &Connection) -> bool {
        if connection.proto == proto::TCP {
            return self.is_listed(connection.proto, connection.backend);
        }
        let Some((service, frontend)) = self.frontend(connection.proto, connection.frontend) else { return false };
        let is_inside = self.is_inside(connection.client.ip());
        let is_local = if is_inside { frontend.is_local_inside } else { frontend.is_local_outside };
        matches!(if is_local { &service.local } else { &service.cluster }, Set::Of(all) if all.contains(&connection.backend))
    }

    fn is_listed(&self, proto: u8, backend: Backend) -> bool {
        let is_in = |set: &Set| matches!(set, Set::Of(backends) if backends.contains(&backend));
        self.services.iter().any(|service| service.proto == proto && (is_in(&service.cluster) || is_in(&service.local)))
    }

    /// A packet straight to a backend, whose ends are those that another connection of the client has inside the node.
    #[track_caller]
    fn open_direct(&mut self, spot: Spot, packet: &Packet, got: Option<(SocketAddr, SocketAddr)>) -> Expected {
        let (seen_client, got_dst) = got.expect("a direct packet comes out");
        assert_eq!(got_dst, packet.dst(), "a direct packet keeps its destination");
        // One that somebody else began is over.
        self.connections.retain(|other| !other.is_to_frontend(packet.proto(), packet.src(), packet.dst()));
        let backend = Backend { addr: packet.dst(), is_local: false };
        self.check_seen_port(packet.proto(), packet.src(), seen_client, backend, true);
        let connection = Connection { is_direct: true, ..Connection::new(spot, packet, backend, seen_client, false) };
        self.connections.push(connection);
        self.to_backend(spot, packet, &connection)
    }

    /// A packet to a frontend that belongs to no connection.
    #[track_caller]
    fn open(
        &mut self,
        spot: Spot,
        packet: &Packet,
        service: &Service,
        frontend: Frontend,
        got: Option<(SocketAddr, SocketAddr)>,
        is_clash: bool,
    ) -> Expected {
        let (src, dst) = (packet.src(), packet.dst());
        if let Body::Tcp(tcp) = &packet.body
            && !opens(packet)
        {
            // Only at a ClusterIP it can be nobody else's.
            let is_reset = tcp.flags & flag::RST != 0;
            return match frontend.is_cluster_ip {
                true if is_reset => Expected::Drop,
                true => Expected::Reject,
                false => Expected::Same,
            };
        }
        if frontend.is_restricted && !service.sources.iter().any(|prefix| prefix.contains(src.ip())) {
            return Expected::Drop;
        }
        let is_inside = self.is_inside(src.ip());
        let is_local = if is_inside { frontend.is_local_inside } else { frontend.is_local_outside };
        let backends = match if is_local { &service.local } else { &service.cluster } {
            Set::Of(backends) => backends,
            Set::Reject => return Expected::Reject,
            Set::Drop => return Expected::Drop,
        };
        let (got_src, got_dst) = got.expect("a new connection's packet comes out");
        let backend = backends.iter().find(|backend| backend.addr == got_dst);
        let backend = *backend.unwrap_or_else(|| panic!("{got_dst} is no backend for {src} at {dst}: {backends:?}"));
        self.check_seen_port(packet.proto(), src, got_src, backend, is_clash);
        let wants_nat = self.wants_nat(src.ip(), frontend, backend);
        let connection = Connection::new(spot, packet, backend, got_src, wants_nat);
        self.connections.push(connection);
        self.to_backend(spot, packet, &connection)
    }

    /// The client's port is kept unless the tuple is another connection's; then it is a free one of our own.
    #[track_caller]
    fn check_seen_port(&self, proto: u8, client: SocketAddr, seen: SocketAddr, backend: Backend, is_clash: bool) {
        assert_eq!(seen.ip(), client.ip(), "the client's address is changed at ingress");
        let is_taken = |src: SocketAddr| self.find(|other| other.is_plain_forward(proto, src, backend.addr)).is_some();
        assert!(!is_taken(seen), "{seen} to {} is another connection's", backend.addr);
        if is_clash || is_taken(client) {
            assert!(self.facts.snat_ports.contains(&seen.port()), "port {} is not ours to give", seen.port());
        } else {
            assert_eq!(seen, client, "the client's port is changed without need");
        }
    }

    /// A packet to what is no frontend.
    fn no_frontend(&self, packet: &Packet) -> Expected {
        let dst = packet.ip.dst;
        if self.is_cluster_ip(dst) {
            let is_reset = matches!(&packet.body, Body::Tcp(tcp) if tcp.flags & flag::RST != 0);
            return if is_reset { Expected::Drop } else { Expected::Reject };
        }
        Expected::Same
    }

    #[track_caller]
    fn egress(&mut self, packet: &Packet, got: Option<(SocketAddr, SocketAddr)>) -> Expected {
        let (proto, src, dst) = (packet.proto(), packet.src(), packet.dst());
        if self.note_answer(packet) == Word::Foreign {
            return Expected::Same;
        }
        if let Some(connection) = self.note_end(packet, false, |connection| connection.is_plain_reply(proto, src, dst))
        {
            return changed(packet.clone().with_src(connection.frontend).with_dst(connection.client));
        }
        let position = self.connections.iter().position(|connection| connection.is_plain_forward(proto, src, dst));
        if let Some(position) = position {
            return self.leave(position, packet, got);
        }
        self.untranslated(packet)
    }

    /// A packet that leaves and is no connection's.
    fn untranslated(&self, packet: &Packet) -> Expected {
        if self.is_cluster_ip(packet.ip.dst) {
            Expected::Reject
        } else if self.is_service_address(packet.ip.dst) {
            Expected::Drop
        } else {
            Expected::Same
        }
    }

    /// A client's packet on its way to the backend.
    #[track_caller]
    fn leave(&mut self, position: usize, packet: &Packet, got: Option<(SocketAddr, SocketAddr)>) -> Expected {
        let connection = self.connections[position];
        if !connection.wants_nat {
            return Expected::Same;
        }
        let nat = connection.nat.unwrap_or_else(|| {
            let (got_src, _) = got.expect("a client's packet comes out");
            self.check_nat(&connection, got_src);
            got_src
        });
        self.connections[position].nat = Some(nat);
        changed(packet.clone().with_src(nat))
    }

    /// The source that a backend sees: this node, with the client's port where that may be kept, else one of our own.
    #[track_caller]
    fn check_nat(&self, connection: &Connection, nat: SocketAddr) {
        let (proto, backend) = (connection.proto, connection.backend.addr);
        let source = self.facts.sources.iter().find(|(prefix, _)| prefix.contains(backend.ip()));
        assert_eq!(Some(nat.ip()), source.map(|(_, source)| *source), "the source towards {backend}");
        let is_taken = |nat: SocketAddr| self.find(|other| other.is_reply_to_nat(proto, backend, nat)).is_some();
        assert!(!is_taken(nat), "{backend} to {nat} is another connection's");
        let wish = SocketAddr::new(nat.ip(), connection.seen_client.port());
        let may_keep = !self.facts.local_ports.contains(&wish.port()) && !is_taken(wish);
        if nat != wish {
            assert!(!may_keep, "port {} could have been kept", wish.port());
            assert!(self.facts.snat_ports.contains(&nat.port()), "port {} is not ours to give", nat.port());
        } else {
            assert!(may_keep || self.facts.snat_ports.contains(&nat.port()), "port {} is the host's", nat.port());
        }
    }

    /// An ICMP error: who sees it must find its own packet quoted.
    fn error(&self, hook: Hook, packet: &Packet, error: &Error) -> Expected {
        let quoted = &error.quoted;
        let (proto, src, dst) = (quoted.proto(), quoted.src(), quoted.dst());
        let has_ports = quoted.ports().is_some() && quoted.part.is_none_or(|part| part.from == 0);
        if !has_ports || error.quoted_bytes < quoted.header_bytes() + 4 {
            return if self.is_cluster_ip(packet.ip.dst) { Expected::Drop } else { Expected::Same };
        }
        let found = match hook {
            // From beyond a backend, about a packet that left with our source; or from a client, about an answer.
            Hook::Ingress | Hook::IngressPort => self
                .find(|connection| connection.is_reply_to_nat(proto, dst, src))
                .map(|connection| {
                    let nat = connection.nat.expect("it is a reply to it");
                    (with_outer_dst(packet, nat.ip(), connection.client.ip()), (connection.seen_client, dst))
                })
                .or_else(|| {
                    let connection = self.find(|connection| connection.is_to_frontend(proto, dst, src))?;
                    let outer = with_outer_dst(packet, connection.frontend.ip(), connection.backend.addr.ip());
                    Some((outer, (connection.backend.addr, connection.seen_client)))
                }),
            // To a client, about its packet; or to a backend, about its answer to our source.
            Hook::Egress => self
                .find(|connection| connection.is_plain_forward(proto, src, dst))
                .map(|connection| {
                    let outer = with_outer_src(packet, connection.backend.addr.ip(), connection.frontend.ip());
                    (outer, (connection.client, connection.frontend))
                })
                .or_else(|| {
                    let connection = self.find(|connection| connection.is_plain_reply(proto, src, dst))?;
                    let nat = connection.nat?;
                    Some((with_outer_src(packet, connection.client.ip(), nat.ip()), (src, nat)))
                }),
        };
        match found {
            None => Expected::Same,
            Some(_) if is_redirect(packet, error) => Expected::Drop,
            Some((outer, (src, dst))) => {
                let quoted = Box::new(error.quoted.as_ref().clone().with_src(src).with_dst(dst));
                let error = Error { quoted, ..error.clone() };
                changed(Packet { body: Body::Error(error), ..outer })
            }
        }
    }

    /// The packet's connection, which now knows of its end what the packet says.
    fn note_end(
        &mut self,
        packet: &Packet,
        is_by_client: bool,
        is_it: impl Fn(&Connection) -> bool,
    ) -> Option<Connection> {
        let connection = self.connections.iter_mut().find(|connection| is_it(connection))?;
        if let Body::Tcp(tcp) = &packet.body {
            connection.end.note(tcp.flags, is_by_client);
            connection.syn = if is_by_client { syn_of(packet).or(connection.syn) } else { connection.syn };
        }
        Some(*connection)
    }

    /// What a backend's packet is to the connection that has its ends, which remembers it.
    fn note_answer(&mut self, packet: &Packet) -> Word {
        let (proto, src, dst) = (packet.proto(), packet.src(), packet.dst());
        let Some(connection) =
            self.connections.iter_mut().find(|connection| connection.is_plain_reply(proto, src, dst))
        else {
            return Word::Ours;
        };
        let word = connection.hear(packet);
        let is_reset = matches!(&packet.body, Body::Tcp(tcp) if tcp.flags & flag::SYN == 0);
        if word == Word::Ours && !connection.is_answered && !is_reset {
            // What came before was another connection's.
            (connection.is_answered, connection.is_clash, connection.end) = (true, false, End::default());
        }
        connection.is_clash |= word != Word::Ours;
        connection.is_told |= word == Word::Challenge;
        word
    }

    fn find(&self, is_it: impl Fn(&Connection) -> bool) -> Option<Connection> {
        self.connections.iter().copied().find(|connection| is_it(connection))
    }

    fn frontends(&self) -> impl Iterator<Item = (&Service, Frontend)> {
        self.services.iter().flat_map(|service| service.frontends.iter().map(move |frontend| (service, *frontend)))
    }

    /// The frontend at `dst`: of this very address first, then the NodePort.
    fn frontend(&self, proto: u8, dst: SocketAddr) -> Option<(Service, Frontend)> {
        let at = |at: At| self.frontends().find(|(service, frontend)| service.proto == proto && frontend.at == at);
        let node_port = || {
            let is_node = self.facts.node.contains(&dst.ip());
            if is_node { at(At::NodePort { is_v4: dst.is_ipv4(), port: dst.port() }) } else { None }
        };
        at(At::Addr(dst)).or_else(node_port).map(|(service, frontend)| (service.clone(), frontend))
    }

    fn is_service_address(&self, addr: IpAddr) -> bool {
        self.facts.services.iter().any(|prefix| prefix.contains(addr))
    }

    fn is_cluster_ip(&self, addr: IpAddr) -> bool {
        self.frontends()
            .any(|(_, frontend)| frontend.is_cluster_ip && matches!(frontend.at, At::Addr(at) if at.ip() == addr))
    }

    fn is_inside(&self, client: IpAddr) -> bool {
        self.facts.cluster.iter().any(|prefix| prefix.contains(client)) || self.facts.node.contains(&client)
    }

    /// True if the backend's answers would not come back here by themselves.
    fn wants_nat(&self, client: IpAddr, frontend: Frontend, backend: Backend) -> bool {
        if client == backend.addr.ip() {
            return true;
        }
        let is_in = |prefixes: &[Prefix]| prefixes.iter().any(|prefix| prefix.contains(client));
        let comes_back =
            backend.is_local || is_in(&self.facts.pods) || frontend.is_cluster_ip && is_in(&self.facts.cluster);
        !comes_back
    }
}

/// True for the segment that begins a connection.
fn opens(packet: &Packet) -> bool {
    matches!(&packet.body, Body::Tcp(tcp) if tcp.flags & (flag::SYN | flag::ACK) == flag::SYN)
}

/// The sequence number with which a packet begins a connection.
fn syn_of(packet: &Packet) -> Option<u32> {
    match &packet.body {
        Body::Tcp(tcp) if opens(packet) => Some(tcp.seq),
        _ => None,
    }
}

/// True for a packet that may begin a connection.
fn begins(packet: &Packet) -> bool {
    opens(packet) || matches!(packet.body, Body::Udp(_))
}

fn changed(packet: Packet) -> Expected {
    Expected::Packet(Box::new(packet))
}

fn with_outer_dst(packet: &Packet, old: IpAddr, new: IpAddr) -> Packet {
    let mut packet = packet.clone();
    if packet.ip.dst == old {
        packet.ip.dst = new;
    }
    packet
}

fn with_outer_src(packet: &Packet, old: IpAddr, new: IpAddr) -> Packet {
    let mut packet = packet.clone();
    if packet.ip.src == old {
        packet.ip.src = new;
    }
    packet
}

fn is_redirect(packet: &Packet, error: &Error) -> bool {
    error.kind == if packet.is_v4() { error::V4_REDIRECT } else { error::V6_REDIRECT }
}

/// The packet as quoted by who does not know its checksum yet: left to the device, it is known to nobody.
fn without_udp_checksum(packet: &Packet) -> Vec<u8> {
    let mut bytes = packet.ip_bytes();
    if let (Body::Udp(_), Some(checksum)) =
        (&packet.body, bytes.get_mut(packet.header_bytes() + 6..packet.header_bytes() + 8))
    {
        checksum.fill(0);
    }
    bytes
}

/// What is wrong with `answer` as the refusal of `packet`, or nothing.
///
/// TCP: a reset as RFC 9293 section 3.10.7.1 wants it; else an unreachable port, quoting the packet (RFC 1122 section 3.2.2, RFC 4443
/// section 3.1); from whom the packet was for, to its sender.
pub fn check_answer(packet: &Packet, answer: &[u8]) -> Result<(), String> {
    let is = |what: &str, is_right: bool| if is_right { Ok(()) } else { Err(what.to_owned()) };
    crate::packet::check(answer)?;
    let parsed = crate::packet::parse(answer).ok_or("not a whole packet")?;
    is("ends", (parsed.ip.src, parsed.ip.dst) == (packet.ip.dst, packet.ip.src))?;
    is("Ethernet addresses", (parsed.link.src, parsed.link.dst) == (packet.link.dst, packet.link.src))?;
    is("time to live", parsed.ip.ttl >= 64)?;
    match (&packet.body, &parsed.body) {
        (Body::Tcp(tcp), Body::Tcp(reset)) => {
            is("ports", (reset.sport, reset.dport) == (tcp.dport, tcp.sport))?;
            is("data", reset.data.is_empty())?;
            if tcp.flags & flag::ACK != 0 {
                return is("flags and sequence", (reset.flags, reset.seq) == (flag::RST, tcp.ack));
            }
            let length =
                tcp.data.len() as u32 + u32::from(tcp.flags & flag::SYN != 0) + u32::from(tcp.flags & flag::FIN != 0);
            let wanted = (flag::RST | flag::ACK, 0, tcp.seq.wrapping_add(length));
            is("flags and sequence", (reset.flags, reset.seq, reset.ack) == wanted)
        }
        (Body::Tcp(_), _) => Err("not a reset".into()),
        (_, Body::Icmp(icmp)) => {
            let (kind, code, most) = match packet.is_v4() {
                true => (error::V4_UNREACHABLE, error::V4_PORT, 576),
                false => (error::V6_UNREACHABLE, error::V6_PORT, 1280),
            };
            is("type and code", (icmp.kind, icmp.code, icmp.rest) == (kind, code, 0))?;
            is("length", answer.len() <= 14 + most)?;
            let quoted = packet.ip_bytes();
            let least = quoted.len().min(packet.header_bytes() + 8);
            is("length of the quote", icmp.data.len() >= least)?;
            is("quoted bytes", quoted.starts_with(&icmp.data) || without_udp_checksum(packet).starts_with(&icmp.data))
        }
        _ => Err("no ICMP error".into()),
    }
}
