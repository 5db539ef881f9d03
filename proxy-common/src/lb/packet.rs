//! The packet path: what happens to a packet at ingress and at egress (design: translate the destination on the way in,
//! the source on the way out).
//!
//! | at | packet | found by | changes |
//! |---|---|---|---|
//! | ingress | client to frontend | front | destination: the backend |
//! | ingress | backend to our rewritten source | snat | destination: the client |
//! | egress | client to a remote backend | plain | source: ours |
//! | egress | backend to client | plain | source: the frontend |
//!
//! An ICMP error travels against the packet it quotes; it is treated as a packet of its own direction of travel, with
//! the opposite end of the quote changed too.

use crate::abi::address::{AddressClass, PortUse};
use crate::abi::config::Config;
use crate::abi::flow::{FlowKey, FlowRef, FlowValue};
use crate::abi::fragment::{FragmentKey, FragmentValue};
use crate::abi::frontend::FrontendValue;
use crate::addr::{Addr, Be16, Port, Proto};
use crate::lb::flow::{self, Hold, Hot, Proof};
use crate::lb::pick::{self, Client, Frontend, Pick};
use crate::lb::select;
use crate::lb::tuple::Tuple;
use crate::tables::{Event, Flows, Lookups, Neighbour, Tables, Tracked};
use crate::verdict::{DropReason, Refusal};
use crate::wire::header::tcp;
use crate::wire::{Kind, Parsed};

/// What to do with a packet.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Leave it alone.
    Pass,
    /// Change one end of it, then let the stack go on: the destination at ingress, the source at egress.
    Rewrite(Rewrite),
    /// Drop it, and perhaps answer.
    Refuse(DropReason, Refusal),
}

/// New values for one end of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rewrite {
    /// New address of the end.
    pub addr: Addr,
    /// New port of the end.
    pub port: Be16,
    /// New port of the other end; zero keeps it.
    pub other_port: Be16,
    /// New destination MAC address; zero keeps it.
    pub mac: [u16; 3],
    /// The service that is counted.
    pub service: u32,
}

impl Rewrite {
    /// Nothing yet.
    pub const NONE: Self =
        Self { addr: Addr::UNSPECIFIED_V6, port: Be16::ZERO, other_port: Be16::ZERO, mac: [0; 3], service: 0 };
}

const PASS: Verdict = Verdict::Pass;

/// Why a packet opens no flow: it is refused, or, with `None`, left to the stack. (Less than a [`Verdict`], so that there is
/// no room for a rewriting: its content would be undefined here, and LLVM 22 keeps that in registers which the verifier of
/// Linux 6.18 does not let it store, "invalid size of register spill".)
pub type Unopened = Option<(DropReason, Refusal)>;

/// The verdict on a packet that opens no flow.
#[inline(always)]
fn unopened(unopened: Unopened) -> Verdict {
    match unopened {
        None => PASS,
        Some((reason, refusal)) => Verdict::Refuse(reason, refusal),
    }
}

/// While the tables are handed over to another layout, they stay as they are: what would open or remove a flow comes again.
const HELD: (DropReason, Refusal) = (DropReason::Settling, Refusal::Drop);

// What only opening, promoting and ending a flow need is marked `inline(never)`: in the kernel half each such function
// takes its turn on a stack of 512 bytes. Everything else is inlined, so that a decision stays in registers.

/// Where a packet hook is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hook {
    Ingress = 0,
    Egress = 1,
}

/// What look-ups alone tell about a packet. (Without content: what a variant lacks would be undefined in a register that LLVM
/// keeps across look-ups all the same, and the verifier refuses that. Seen with LLVM 22 and Linux 6.18, "R3 !read_ok".)
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Glance {
    /// It is not ours, or needs no change.
    Pass,
    /// It is changed as the function has written.
    Rewrite,
    /// More than look-ups is needed.
    Unknown,
}

impl Glance {
    /// The verdict, if it is one; `rewrite` is what the function has written.
    pub const fn verdict(self, rewrite: Rewrite) -> Option<Verdict> {
        match self {
            Self::Pass => Some(PASS),
            Self::Rewrite => Some(Verdict::Rewrite(rewrite)),
            Self::Unknown => None,
        }
    }
}

/// Decides on a packet that enters by a device, if that takes nothing but look-ups: traffic that is not ours, and packets
/// in the middle of an established flow. [`Glance::Unknown`]: ask [`ingress`], which gives the same answer where this one
/// gives one.
///
/// The kernel half runs the two as separate programs, so that the many packets do not carry the weight of the few.
#[inline(always)]
pub fn ingress_known<F: Lookups>(flows: &F, packet: &Parsed, rewrite: &mut Rewrite) -> Glance {
    let tuple = &packet.tuple;
    if tuple.dst.is_multicast_or_broadcast() {
        return Glance::Pass;
    }
    let class = flows.address(&tuple.dst);
    if class.flags == 0 && packet.kind != Kind::IcmpError {
        return Glance::Pass;
    }
    if packet.kind != Kind::Transport || packet.first_fragment {
        return Glance::Unknown;
    }
    let ports = uses_of(flows, class, packet);
    if class.has(AddressClass::NODE) && ports.has(PortUse::SNAT) {
        // One a connection, and it may be that of another by the same port.
        if packet.tcp_flags & tcp::SYN != 0 {
            return Glance::Unknown;
        }
        let key = tuple.snat_key();
        if let Some(flow) = flows.established(&key) {
            *rewrite = to_peer(flow);
            return Glance::Rewrite;
        }
        if flows.pending(&key).is_some() {
            return Glance::Unknown;
        }
    }
    let is_tcp = tuple.proto == Proto::TCP;
    let opens = packet.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN || !is_tcp;
    if !is_dialled(class, ports) {
        let is_direct = class.has(AddressClass::BACKEND) && opens;
        return if is_direct && clashing(flows, packet).is_some() { Glance::Unknown } else { Glance::Pass };
    }
    // If it is none, there may be flows to it all the same: it was a frontend or a backend, or is a backend whose direct
    // connections clash with flows.
    let is_frontend = class.has(AddressClass::FRONTEND | AddressClass::CLUSTER_IP | AddressClass::NODE);
    let turns = packet.tcp_flags & (tcp::SYN | tcp::FIN | tcp::RST) != 0;
    if turns && is_frontend {
        return Glance::Unknown;
    }
    let key = tuple.front_key();
    let Some(front) = flows.established(&key) else {
        let is_ours = opens || is_frontend || flows.pending(&key).is_some();
        return if is_ours { Glance::Unknown } else { Glance::Pass };
    };
    if turns {
        return Glance::Unknown;
    }
    *rewrite = to_peer(front);
    rewrite.mac = front.fixed(|value| value.mac);
    let wants_mac = wants_mac(flows, front);
    let direct = front.fixed(|value| value.has(FlowValue::DIRECT));
    if direct && front.fixed(|value| value.ifindex) != flows.ifindex() {
        return Glance::Pass;
    }
    let is_stale = is_tcp && front.fixed(|value| value.has(FlowValue::STALE));
    if is_stale || wants_mac || !is_tcp && !direct && !may_go_on(flows, front, rewrite) {
        return Glance::Unknown;
    }
    Glance::Rewrite
}

/// True if [`ingress_known`] finds nothing left to do about a packet once `rewrite` is applied to it: what a hook that comes
/// before it on the same device may translate.
///
/// Mostly so. But the translated packet may look like one of a direct connection that was given another port because of
/// this very flow, which only the order of the hooks tells apart; and a backend may stand where another service is.
#[inline(always)]
pub fn is_final<F: Lookups>(flows: &F, packet: &Parsed, rewrite: &Rewrite) -> bool {
    let after = Parsed { tuple: plain_tuple(&packet.tuple, rewrite), outer_dst: rewrite.addr, ..*packet };
    let mut unused = Rewrite::NONE;
    rewrite.mac == [0; 3] && ingress_known(flows, &after, &mut unused) == Glance::Pass
}

/// True if a frame that a bridge switches past this node may concern us all the same: it goes to a backend itself, and its
/// sender may have a translated connection with the same ends. What it dials otherwise is another machine's affair.
#[inline(always)]
pub fn may_be_direct<T: Tables>(tables: &T, packet: &Parsed) -> bool {
    let class = tables.address(&packet.outer_dst);
    class.has(AddressClass::BACKEND) && !class.has(AddressClass::FRONTEND | AddressClass::NODE)
}

/// The refusal of a TCP segment that would open a connection nobody can serve; `None` for everything else. What
/// [`ingress`] says too, for hooks that come before it.
#[inline(always)]
pub fn refusal<F: Lookups>(flows: &F, packet: &Parsed) -> Option<(DropReason, Refusal)> {
    let tuple = &packet.tuple;
    let opens = packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
    let class = flows.address(&tuple.dst);
    let ports = uses_of(flows, class, packet);
    if !opens || packet.kind != Kind::Transport || packet.first_fragment || !is_dialled(class, ports) {
        return None;
    }
    if find(flows, &tuple.front_key()).is_some() {
        return None;
    }
    match pick::find_frontend(flows, class, ports, &tuple.dst, tuple.dport, tuple.proto) {
        // Whether it may dial is asked behind: an answer would tell a stranger that something is there.
        Some(frontend) if frontend.value.has(FrontendValue::RESTRICTED) => None,
        Some(frontend) => {
            let refused = pick::set_for(flows, frontend.value, is_inside(flows, tuple)).err()?;
            flows.count(frontend.value.service, Event::NoBackend);
            Some(refused)
        }
        None if class.has(AddressClass::CLUSTER_IP) => Some((DropReason::UnknownPort, Refusal::Reject)),
        None => None,
    }
}

/// What the destination port is used for, if the destination is this node; any use for other addresses.
#[inline(always)]
fn uses_of<T: Tables>(flows: &T, class: AddressClass, packet: &Parsed) -> PortUse {
    if class.has(AddressClass::NODE) && packet.kind != Kind::LaterFragment {
        flows.port_use(packet.tuple.dport.host())
    } else {
        PortUse(PortUse::NODE_PORT | PortUse::SNAT)
    }
}

/// True if the destination may be a frontend, or was one.
#[inline(always)]
const fn is_dialled(class: AddressClass, ports: PortUse) -> bool {
    class.has(AddressClass::FRONTEND | AddressClass::FLOWS)
        || class.has(AddressClass::NODE) && ports.has(PortUse::NODE_PORT)
}

/// Decides on a packet that enters by a device: the stages below, one after the other.
#[inline(always)]
pub fn ingress<F: Flows>(flows: &F, packet: &mut Parsed) -> Verdict {
    match ingress_flow(flows, packet) {
        Step::Done(verdict) => verdict,
        Step::Open { clash } => match ingress_open(flows, packet, clash) {
            Ok(target) => create(flows, packet, &target),
            Err(refusal) => unopened(refusal),
        },
    }
}

/// What the first stage of [`ingress`] comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The answer.
    Done(Verdict),
    /// No flow has this packet; [`ingress_open`] is asked.
    Open {
        /// Its client port towards the backend is known to be another connection's.
        clash: bool,
    },
}

/// First stage: fragments, ICMP errors, packets of known flows; these are promoted and ended here.
#[inline(always)]
pub fn ingress_flow<F: Flows>(flows: &F, packet: &mut Parsed) -> Step {
    // Broadcast and multicast are nobody's VIP, and an error is only ours if it goes to the sender of what it quotes.
    if packet.outer_dst.is_multicast_or_broadcast() || packet.outer_dst != packet.tuple.dst {
        return Step::Done(PASS);
    }
    let class = flows.address(&packet.tuple.dst);
    if class.flags == 0 {
        return Step::Done(PASS);
    }
    let ports = uses_of(flows, class, packet);
    let ours = is_dialled(class, ports) || class.has(AddressClass::BACKEND) || ports.has(PortUse::SNAT);
    match packet.kind {
        _ if !ours => Step::Done(PASS),
        Kind::Transport | Kind::LaterFragment => {
            if !fragment_ports(flows, packet, Hook::Ingress) {
                return Step::Done(unknown_fragment(class));
            }
            transport(flows, packet, class, ports)
        }
        Kind::IcmpError => Step::Done(icmp_error(flows, packet, class, ports)),
        Kind::IcmpRedirect => Step::Done(match icmp_error(flows, packet, class, ports) {
            Verdict::Rewrite(_) => Verdict::Refuse(DropReason::Redirect, Refusal::Drop),
            other => other,
        }),
        Kind::Echo | Kind::Other if class.has(AddressClass::CLUSTER_IP) => {
            let reason =
                if packet.kind == Kind::Echo { DropReason::UnknownPort } else { DropReason::UnsupportedProtocol };
            Step::Done(Verdict::Refuse(reason, Refusal::Reject))
        }
        Kind::Unanswerable if class.has(AddressClass::CLUSTER_IP) => {
            Step::Done(Verdict::Refuse(DropReason::UnsupportedProtocol, Refusal::Drop))
        }
        Kind::Echo | Kind::Other | Kind::Unanswerable => Step::Done(PASS),
    }
}

#[inline(always)]
const fn unknown_fragment(class: AddressClass) -> Verdict {
    // To a node's own or a backend's address it may be anybody's.
    if class.has(AddressClass::FRONTEND) && !class.has(AddressClass::NODE) {
        Verdict::Refuse(DropReason::FragmentUnknown, Refusal::Drop)
    } else {
        PASS
    }
}

/// Remembers the ports of a first fragment, fills in those of a later one; false if they are not known.
#[inline(never)]
fn fragment_ports<F: Flows>(flows: &F, packet: &mut Parsed, hook: Hook) -> bool {
    if packet.kind == Kind::Transport && !packet.first_fragment {
        return true;
    }
    let key = FragmentKey {
        src: packet.tuple.src,
        dst: packet.tuple.dst,
        id: packet.fragment_id,
        proto: packet.tuple.proto.0,
        hook: hook as u8,
        reserved: 0,
    };
    if packet.first_fragment {
        flows.set_fragment(&key, &FragmentValue { sport: packet.tuple.sport, dport: packet.tuple.dport });
        return true;
    }
    let Some(ports) = flows.fragment(&key) else { return false };
    packet.tuple.sport = ports.sport;
    packet.tuple.dport = ports.dport;
    true
}

#[inline(always)]
fn find<'a, F: Lookups>(flows: &'a F, key: &FlowKey) -> Option<FlowRef<'a>> {
    match flows.established(key) {
        Some(flow) => Some(flow),
        None => flows.pending(key),
    }
}

#[inline(always)]
fn to_peer(flow: FlowRef<'_>) -> Rewrite {
    Rewrite {
        addr: flow.fixed(|value| value.peer),
        port: flow.fixed(|value| value.peer_port),
        other_port: flow.fixed(|value| value.alias_port),
        mac: [0; 3],
        service: flow.fixed(|value| value.service),
    }
}

/// TCP and UDP at ingress.
#[inline(always)]
fn transport<F: Flows>(flows: &F, packet: &Parsed, class: AddressClass, ports: PortUse) -> Step {
    if class.has(AddressClass::NODE)
        && ports.has(PortUse::SNAT)
        && let Some(flow) = snat_entry(flows, packet)
    {
        return Step::Done(if is_foreign(flows, packet, flow) { PASS } else { Verdict::Rewrite(to_peer(flow)) });
    }
    if !is_dialled(class, ports) {
        return if class.has(AddressClass::BACKEND) { Step::Open { clash: false } } else { Step::Done(PASS) };
    }
    match known(flows, packet) {
        Known::Rewrite(rewrite) => Step::Done(Verdict::Rewrite(rewrite)),
        Known::Nothing => Step::Open { clash: false },
        Known::Clash => Step::Open { clash: true },
        Known::Other => Step::Done(PASS),
        Known::Stray => Step::Done(Verdict::Refuse(DropReason::NoConnection, Refusal::Drop)),
        Known::Stale => Step::Done(Verdict::Refuse(DropReason::NoConnection, Refusal::Reject)),
        Known::Held => Step::Done(Verdict::Refuse(HELD.0, HELD.1)),
    }
}

/// True while the tables are handed over to another layout. Asked only where a flow would be opened or removed.
#[inline(never)]
fn is_settling<F: Flows>(flows: &F) -> bool {
    flows.config().is_some_and(|config| config.is_settling(flows.now()))
}

/// The snat entry of a packet that may be a reply.
#[inline(never)]
fn snat_entry<'a, F: Flows>(flows: &'a F, packet: &Parsed) -> Option<FlowRef<'a>> {
    let key = packet.tuple.snat_key();
    if let Some(flow) = flows.established(&key) {
        return Some(flow);
    }
    let flow = flows.pending(&key)?;
    if Hold(flow.hot()).has_left() { Some(flow) } else { None }
}

/// True for what a backend may send first; for TCP, what it says to the SYN that `pending` (a plain or snat entry) was
/// made of: what acknowledges that (RFC 9293 section 3.10.7.3).
#[inline(always)]
fn is_answer(packet: &Parsed, pending: FlowRef<'_>) -> bool {
    packet.tuple.proto != Proto::TCP
        // One test: for two, LLVM 22 keeps a value across a look-up that the verifier calls unreadable (Linux 6.18).
        || ANSWERS >> (packet.tcp_flags & (tcp::SYN | tcp::RST | tcp::ACK)) & 1 != 0
            && Proof(pending.proof()).is_answered_by(packet.acknowledgment)
}

/// Sets of control bits that answer a SYN, as bits.
const ANSWERS: u32 = 1 << (tcp::SYN | tcp::ACK) | 1 << (tcp::RST | tcp::ACK);

/// True for what a backend says to a SYN that it takes for one of another connection with the same ends: a challenge ACK (RFC
/// 5961). `state`: of the flow that the SYN was for.
///
/// The client is told once: its stack has no use for it, but sends the SYN again at once (Linux since 5.6) instead of a second
/// later, and that one avoids the clash. What else the client says to it goes nowhere (see [`known`]). If this is an
/// acknowledgment that the other connection waits for after all, its sender repeats it.
#[inline(always)]
const fn tells_of_clash(packet: &Parsed, state: u32) -> bool {
    packet.tcp_flags & (tcp::SYN | tcp::FIN | tcp::RST | tcp::ACK | tcp::DATA) == tcp::ACK && state & Hot::TOLD == 0
}

/// True if the backend took the SYN of a flow with a rewritten source for one of another connection with the same ends (a
/// forged one that it still waits for, say): what it sends then is the stack's affair, which resets such a connection or
/// knows it; the next SYN of the flow avoids the clash.
///
/// True also for the SYN-ACK that follows the end of a flow: somebody else translates connections to addresses of this node
/// (a CNI's masquerade, a kube-proxy), knows nothing of our ports, and has taken this one. It has it from now on.
#[inline(never)]
fn is_foreign<F: Flows>(flows: &F, packet: &Parsed, snat: FlowRef<'_>) -> bool {
    let established = packet.tcp_flags & tcp::SYN != 0 && flows.established(&packet.tuple.snat_key()).is_some();
    if is_answer(packet, snat) && !established {
        return false;
    }
    let tuple = Tuple {
        src: packet.tuple.src,
        dst: snat.fixed(|value| value.peer),
        sport: packet.tuple.sport,
        dport: snat.fixed(|value| value.peer_port),
        proto: packet.tuple.proto,
    };
    let Some(plain) = find(flows, &tuple.plain_key().0) else { return false };
    let hot = Hot::unpack(plain.hot());
    // One that the client has reset may have been opened anew by itself.
    let is_reset = hot.state & Hot::RESET_CLIENT != 0;
    let is_left = is_reset && !Proof::syn(plain.stamp()).is_answered_by(packet.acknowledgment);
    if established && (is_left || is_over(flows, packet.tuple.proto, plain)) {
        flows.remove(&packet.tuple.snat_key());
        return true;
    }
    let is_proven = established || hot.state & Hot::ESTABLISHED != 0 || Proof(plain.proof()).is_some();
    // What tells the client of the clash is noted on its way out.
    if is_proven || tells_of_clash(packet, hot.state) {
        return false;
    }
    plain.set_hot(Hot { seen: hot.seen, state: hot.state | Hot::CLASH }.pack());
    true
}

/// The front entry of a client's packet; `established` tells from which table.
#[inline(never)]
fn front_entry<'a, F: Flows>(flows: &'a F, packet: &Parsed, established: &mut bool) -> Option<FlowRef<'a>> {
    let key = packet.tuple.front_key();
    let front = flows.established(&key);
    *established = front.is_some();
    if front.is_some() { front } else { flows.pending(&key) }
}

/// The plain entry of a flow, given its client's packet and the rewrite of its front entry. `None` also if another flow has
/// taken the place since: what happens to that one is not this one's affair.
#[inline(never)]
fn plain_entry<'a, F: Flows>(flows: &'a F, packet: &Parsed, rewrite: &Rewrite) -> Option<FlowRef<'a>> {
    let plain = find(flows, &plain_tuple(&packet.tuple, rewrite).plain_key().0)?;
    let own_port = if rewrite.other_port.is_zero() { Be16::ZERO } else { packet.tuple.sport };
    let is_ours = plain.fixed(|value| {
        value.peer == packet.tuple.dst && value.peer_port == packet.tuple.dport && value.alias_port == own_port
    });
    if is_ours { Some(plain) } else { None }
}

/// What becomes of a client's packet by the entries that exist.
enum Known {
    /// It goes to the flow's backend.
    Rewrite(Rewrite),
    /// There is no flow, or it is over and has been removed.
    Nothing,
    /// Its tuple towards the backend belongs to another connection; it has been removed.
    Clash,
    /// It is a translated packet, met again at another device, that looks like one of a direct connection.
    Other,
    /// What the client says to an answer that was another connection's.
    Stray,
    /// What the client says to an endpoint that is gone; the flow has been removed.
    Stale,
    /// It would end the flow, which must stay for now.
    Held,
}

/// A packet from a client: of which flow, and what it changes about it.
#[inline(always)]
fn known<F: Flows>(flows: &F, packet: &Parsed) -> Known {
    let mut established = false;
    let Some(front) = front_entry(flows, packet, &mut established) else { return Known::Nothing };
    let mut rewrite = to_peer(front);
    let is_tcp = packet.tuple.proto == Proto::TCP;
    let opens = is_tcp && packet.tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    let closes = is_tcp && packet.tcp_flags & (tcp::FIN | tcp::RST) != 0;
    let direct = front.fixed(|value| value.has(FlowValue::DIRECT));
    if direct && front.fixed(|value| value.ifindex) != flows.ifindex() {
        return if opens { Known::Nothing } else { Known::Other };
    }
    let stale = is_tcp && front.fixed(|value| value.has(FlowValue::STALE));
    let gone = stale
        || (opens || !is_tcp)
            && !direct
            && (!is_same_backend(flows, front.fixed(|value| value.backend), &rewrite)
                || !is_tcp && !is_in_set(flows, &packet.tuple, front));
    if opens || closes || !established || gone {
        let Some(plain) = plain_entry(flows, packet, &rewrite) else {
            if is_settling(flows) {
                return Known::Held;
            }
            remove_front(flows, packet);
            return Known::Nothing;
        };
        let hot = Hot::unpack(plain.hot());
        let clash = hot.state & Hot::CLASH != 0;
        if clash && !opens {
            return Known::Stray;
        }
        // After the client's reset it is most likely a new connection, which gets no backend that its service has dropped.
        let is_dropped = hot.state & Hot::RESET_CLIENT != 0 && !direct && !is_in_set(flows, &packet.tuple, front);
        let anew = opens && (hot.is_finished() || is_dropped || Proof(plain.proof()).is_other_syn(packet.sequence));
        if gone || clash || anew {
            if is_settling(flows) {
                return Known::Held;
            }
            remove_flow(flows, &packet.tuple, &rewrite, plain);
            return match (clash, stale && !opens) {
                (true, _) => Known::Clash,
                (false, true) => Known::Stale,
                (false, false) => Known::Nothing,
            };
        }
        let after = hot.after(flows.now(), packet.tcp_flags, true);
        if after != hot {
            plain.set_hot(after.pack());
        }
        if opens && plain.stamp() != packet.sequence {
            plain.set_stamp(packet.sequence);
        }
        if !established
            && front.fixed(|value| value.has(FlowValue::SNAT))
            && !restore_snat(flows, packet, &rewrite, front, plain)
        {
            remove_beginning(flows, packet, &rewrite);
            return Known::Nothing;
        }
        if !established && is_proven(packet, plain) {
            promote(flows, packet, &rewrite, front, plain);
        }
    }
    rewrite.mac = bridge_mac(flows, packet, front, &rewrite);
    Known::Rewrite(rewrite)
}

/// Sees to it that a pending flow has its snat entry, which the LRU may have taken. False if another flow has that place now.
#[inline(never)]
fn restore_snat<F: Flows>(
    flows: &F,
    packet: &Parsed,
    rewrite: &Rewrite,
    front: FlowRef<'_>,
    plain: FlowRef<'_>,
) -> bool {
    let key = snat_tuple(packet, rewrite, front).snat_key();
    let sport = if rewrite.other_port.is_zero() { packet.tuple.sport } else { rewrite.other_port };
    if let Some(entry) = find(flows, &key) {
        return leads_to(entry, &packet.tuple.src, sport);
    }
    let Some(value) = flows.draft() else { return true };
    front.with(|front| *value = *front);
    let claimed = Hold::claimed(flows.nanos());
    value.hot = if has_left(plain) { claimed.left().0 } else { claimed.0 };
    value.peer = packet.tuple.src;
    value.peer_port = sport;
    value.alias_port = Be16::ZERO;
    flows.insert_pending(&key, value, true)
}

/// True if a snat entry is that of a client's flow.
#[inline(always)]
fn leads_to(snat: FlowRef<'_>, client: &Addr, port: Be16) -> bool {
    snat.fixed(|value| value.peer == *client && value.peer_port == port)
}

/// Removes the front and plain entries of a pending flow.
#[inline(never)]
fn remove_beginning<F: Flows>(flows: &F, packet: &Parsed, rewrite: &Rewrite) {
    flows.remove_pending(&packet.tuple.front_key());
    flows.remove_pending(&plain_tuple(&packet.tuple, rewrite).plain_key().0);
}

#[inline(never)]
fn remove_front<F: Flows>(flows: &F, packet: &Parsed) {
    flows.remove(&packet.tuple.front_key());
}

/// True if the id still names the backend of a flow.
#[inline(always)]
fn is_same_backend<T: Tables>(flows: &T, id: u32, rewrite: &Rewrite) -> bool {
    match flows.backend(id) {
        Some(backend) => backend.is_live() && backend.addr == rewrite.addr && backend.port == rewrite.port,
        None => false,
    }
}

/// True if a datagram follows its flow without more ado: the backend is there, and the sets of its service are as they were.
#[inline(always)]
fn may_go_on<F: Lookups>(flows: &F, front: FlowRef<'_>, rewrite: &Rewrite) -> bool {
    front.stamp() == flows.fingerprint(rewrite.service)
        && is_same_backend(flows, front.fixed(|value| value.backend), rewrite)
}

/// True if the backend of a datagram's flow is still in the set that its client gets; other services may have it too. Looked
/// up only when the service's sets have changed.
#[inline(never)]
fn is_in_set<F: Flows>(flows: &F, tuple: &Tuple, front: FlowRef<'_>) -> bool {
    let fingerprint = flows.fingerprint(front.fixed(|value| value.service));
    if front.stamp() == fingerprint {
        return true;
    }
    let is_listed = is_listed(flows, tuple, front);
    if is_listed {
        front.set_stamp(fingerprint);
    }
    is_listed
}

#[inline(never)]
fn is_listed<F: Flows>(flows: &F, tuple: &Tuple, front: FlowRef<'_>) -> bool {
    let (class, ports) = (flows.address(&tuple.dst), flows.port_use(tuple.dport.host()));
    let found = pick::find_frontend(flows, class, ports, &tuple.dst, tuple.dport, tuple.proto);
    let Some(frontend) = found else { return false };
    match pick::set_for(flows, frontend.value, is_inside(flows, tuple)) {
        Ok(range) => {
            frontend.value.service == front.fixed(|value| value.service)
                && flows.range_contains(range, front.fixed(|value| value.backend))
        }
        Err(_) => false,
    }
}

/// The client's tuple as it leaves ingress.
#[inline(always)]
fn plain_tuple(tuple: &Tuple, rewrite: &Rewrite) -> Tuple {
    let sport = if rewrite.other_port.is_zero() { tuple.sport } else { rewrite.other_port };
    Tuple { src: tuple.src, dst: rewrite.addr, sport, dport: rewrite.port, proto: tuple.proto }
}

#[inline(always)]
fn is_proven(packet: &Parsed, plain: FlowRef<'_>) -> bool {
    let proof = Proof(plain.proof());
    if packet.tuple.proto != Proto::TCP {
        return proof.is_some();
    }
    packet.tcp_flags & (tcp::SYN | tcp::RST | tcp::ACK) == tcp::ACK && proof.is_met_by(packet.acknowledgment)
}

/// Moves a flow to the established ones: the entries that replies need first. If they have no room it stays pending.
#[inline(always)]
fn promote<F: Flows>(flows: &F, packet: &Parsed, rewrite: &Rewrite, front: FlowRef<'_>, plain: FlowRef<'_>) {
    let hot = Hot::unpack(plain.hot());
    plain.set_hot(Hot { seen: hot.seen, state: hot.state | Hot::ESTABLISHED }.pack());
    if !promote_plain(flows, packet, rewrite, plain) {
        flows.count_drop(DropReason::FlowTable);
        return;
    }
    let snat = front.fixed(|value| value.has(FlowValue::SNAT));
    if snat && !promote_snat(flows, packet, rewrite, front) || !promote_front(flows, packet, front) {
        flows.count_drop(DropReason::FlowTable);
        demote(flows, packet, rewrite, front);
        return;
    }
    let service = rewrite.service;
    keep_node_port(flows, packet);
    flows.count(service, Event::Flow);
    if front.fixed(|value| value.has(FlowValue::AFFINITY)) {
        let backend = front.fixed(|value| value.backend);
        pick::remember(flows, &pick::affinity_of_address(&packet.tuple.src, service), backend, flows.now());
    }
}

/// Marks the NodePort of a flow: the flow outlives its frontend.
#[inline(never)]
fn keep_node_port<F: Flows>(flows: &F, packet: &Parsed) {
    let port = packet.tuple.dport.host();
    if flows.address(&packet.tuple.dst).has(AddressClass::NODE) && flows.port_use(port).has(PortUse::NODE_PORT) {
        flows.mark_port(port, PortUse::NODE_PORT);
    }
}

// The pending entries stay where they are: an established one is found first, and the LRU forgets the others.

#[inline(never)]
fn promote_plain<F: Flows>(flows: &F, packet: &Parsed, rewrite: &Rewrite, plain: FlowRef<'_>) -> bool {
    flows.establish(&plain_tuple(&packet.tuple, rewrite).plain_key().0, plain)
}

#[inline(never)]
fn promote_snat<F: Flows>(flows: &F, packet: &Parsed, rewrite: &Rewrite, front: FlowRef<'_>) -> bool {
    let key = snat_tuple(packet, rewrite, front).snat_key();
    // Just looked after by `restore_snat`.
    match flows.pending(&key) {
        Some(entry) if Hold(entry.hot()).has_left() => flows.establish(&key, entry),
        // The CNI rewrites the source of this flow.
        Some(_) => {
            flows.remove_pending(&key);
            true
        }
        None => false,
    }
}

#[inline(never)]
fn promote_front<F: Flows>(flows: &F, packet: &Parsed, front: FlowRef<'_>) -> bool {
    flows.establish(&packet.tuple.front_key(), front)
}

/// Takes back a promotion that came half way.
#[inline(never)]
fn demote<F: Flows>(flows: &F, packet: &Parsed, rewrite: &Rewrite, front: FlowRef<'_>) {
    flows.remove_established(&plain_tuple(&packet.tuple, rewrite).plain_key().0);
    if front.fixed(|value| value.has(FlowValue::SNAT)) {
        flows.remove_established(&snat_tuple(packet, rewrite, front).snat_key());
    }
}

/// From the backend to the rewritten source of a front entry.
#[inline(always)]
fn snat_tuple(packet: &Parsed, rewrite: &Rewrite, front: FlowRef<'_>) -> Tuple {
    Tuple {
        src: rewrite.addr,
        dst: front.fixed(|value| value.nat),
        sport: rewrite.port,
        dport: front.fixed(|value| value.nat_port),
        proto: packet.tuple.proto,
    }
}

/// Removes all entries of a flow, the forward ones first.
#[inline(never)]
fn remove_flow<F: Flows>(flows: &F, tuple: &Tuple, rewrite: &Rewrite, plain: FlowRef<'_>) {
    flows.remove(&tuple.front_key());
    let forward = plain_tuple(tuple, rewrite);
    if plain.fixed(|value| value.has(FlowValue::SNAT)) {
        forget_snat(flows, &forward, true, plain);
    }
    flows.remove(&forward.plain_key().0);
}

/// How long the MAC address of a backend on the client's bridge is believed, in [`Seconds`]: then the kernel is asked again,
/// since a backend may come back under another one. (The kernel learns that from the first packet it gets from there.)
const MAC_BELIEVED: u32 = 2;

/// True if the kernel is to be asked where on the bridge the backend is.
#[inline(always)]
fn wants_mac<F: Lookups>(flows: &F, front: FlowRef<'_>) -> bool {
    if front.fixed(|value| value.mac) == [0; 3] {
        return front.fixed(|value| value.has(FlowValue::WANTS_MAC));
    }
    Hot::unpack(front.hot()).seen.age(flows.now()) > MAC_BELIEVED
}

/// Where to send the frame when client and backend are ports of one bridge: the reply will be switched past the IP stack,
/// so this packet must be too (else the kernel's connection tracking sees half a connection). While the neighbour is not
/// known the stack finds it.
#[inline(always)]
fn bridge_mac<F: Flows>(flows: &F, packet: &Parsed, front: FlowRef<'_>, rewrite: &Rewrite) -> [u16; 3] {
    let known = front.fixed(|value| value.mac);
    if !wants_mac(flows, front) {
        return known;
    }
    front.set_hot(Hot { seen: flows.now(), state: 0 }.pack());
    match flows.bridge_neighbour(&packet.tuple.src, &rewrite.addr) {
        Neighbour::At(mac) => {
            front.set_mac(mac);
            mac
        }
        // What the kernel has forgotten is still the best guess: these frames pass it by, it has no use for the neighbour.
        Neighbour::Unresolved | Neighbour::Elsewhere => known,
    }
}

/// Second stage: where a packet without a flow goes, if it opens one. `clash`: as the first stage said.
#[inline(always)]
pub fn ingress_open<F: Flows>(flows: &F, packet: &Parsed, clash: bool) -> Result<Target, Unopened> {
    let tuple = &packet.tuple;
    let class = flows.address(&tuple.dst);
    let ports = uses_of(flows, class, packet);
    let found = pick::find_frontend(flows, class, ports, &tuple.dst, tuple.dport, tuple.proto);
    let is_tcp = tuple.proto == Proto::TCP;
    let opens = !is_tcp || packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN;
    let Some(frontend) = found else {
        return if class.has(AddressClass::CLUSTER_IP) {
            Err(no_frontend(flows, packet, opens))
        } else if class.has(AddressClass::BACKEND) && opens {
            direct(flows, packet)
        } else {
            Err(None)
        };
    };
    if packet.kind == Kind::LaterFragment {
        // The first fragment was refused, or its flow is gone.
        return Err(Some((DropReason::FragmentUnknown, Refusal::Drop)));
    }
    // A connection that a predecessor translates by the kernel's connection tracking lives on there.
    if (!opens || !is_tcp) && flows.tracked(tuple) == Tracked::Translated {
        return Err(None);
    }
    if !is_tcp && frontend.by_node_port && flows.has_connected_socket(tuple) {
        return Err(None);
    }
    if is_settling(flows) {
        return Err(Some(HELD));
    }
    if !opens {
        return Err(if frontend.value.has(FrontendValue::CLUSTER_IP) {
            Some((DropReason::NoConnection, Refusal::Reject))
        } else {
            None
        });
    }
    // Asked once a flow, before its endpoints: a range that becomes narrower cuts no connection.
    if is_closed(flows, packet, frontend) {
        return Err(Some((DropReason::SourceRange, Refusal::Drop)));
    }
    backend(flows, packet, frontend, if clash { FlowValue::ALIAS } else { 0 })
}

/// True if the sender may not dial the frontend.
#[inline(never)]
fn is_closed<F: Flows>(flows: &F, packet: &Parsed, frontend: Frontend) -> bool {
    frontend.value.has(FrontendValue::RESTRICTED) && !flows.is_allowed(frontend.value.service, &packet.tuple.src)
}

/// A port of a ClusterIP that no service has.
#[inline(always)]
fn no_frontend<F: Flows>(flows: &F, packet: &Parsed, opens: bool) -> Unopened {
    if (!opens || packet.tuple.proto != Proto::TCP) && flows.tracked(&packet.tuple) == Tracked::Translated {
        return None;
    }
    if !opens && is_settling(flows) {
        return Some(HELD);
    }
    Some((DropReason::UnknownPort, Refusal::Reject))
}

/// True if the client is this node itself, or has an address of the cluster.
#[inline(never)]
pub fn is_inside<T: Tables>(flows: &T, tuple: &Tuple) -> bool {
    flows.config().is_some_and(|config| config.is_cluster_address(&tuple.src))
        || flows.address(&tuple.src).has(AddressClass::NODE)
}

#[inline(never)]
fn tuple_hash<F: Flows>(flows: &F, tuple: &Tuple) -> u64 {
    flows.config().map_or(0, |config| select::hash_tuple(config.hash_key, tuple))
}

#[inline(always)]
fn client_of<F: Flows>(flows: &F, tuple: &Tuple, service: u32) -> Client {
    Client {
        inside: is_inside(flows, tuple),
        affinity: pick::affinity_of_address(&tuple.src, service),
        hash: tuple_hash(flows, tuple),
    }
}

/// True if replies would not come back through this node unless the source is rewritten, or if it always is.
#[inline(always)]
fn needs_snat<F: Flows>(flows: &F, tuple: &Tuple, frontend: FrontendValue, pick: &Pick) -> bool {
    if pick.backend.addr == tuple.src {
        return true;
    }
    let to_cluster_ip = frontend.has(FrontendValue::CLUSTER_IP);
    let always = to_cluster_ip && flows.config().is_some_and(|config| config.has(Config::MASQUERADE_ALL));
    if always || pick.backend.is_local() {
        return always;
    }
    match flows.config() {
        Some(config) => {
            let from_cluster = to_cluster_ip && config.is_cluster_address(&tuple.src);
            !from_cluster && !config.is_own_pod_address(&tuple.src)
        }
        None => true,
    }
}

/// The backend that a frontend gives a client, and the source that the backend is to see.
#[inline(never)]
fn backend<F: Flows>(flows: &F, packet: &Parsed, frontend: Frontend, mut flags: u32) -> Result<Target, Unopened> {
    let tuple = &packet.tuple;
    let service = frontend.value.service;
    let client = client_of(flows, tuple, service);
    // Read before the sets: if they change meanwhile, they are looked at again.
    let fingerprint = flows.fingerprint(service);
    let pick = match pick::pick(flows, frontend.value, &client, flows.now()) {
        Ok(pick) => pick,
        Err((reason, refusal)) => {
            flows.count(service, Event::NoBackend);
            return Err(Some((reason, refusal)));
        }
    };
    flags |= if pick.affine { FlowValue::AFFINITY } else { 0 };
    let mut nat = Addr::UNSPECIFIED_V6;
    if needs_snat(flows, tuple, frontend.value, &pick) {
        match flows.source_towards(&tuple.src, &pick.backend.addr) {
            Some(source) if !source.is_v6_link_local() => nat = source,
            _ => return Err(Some((DropReason::NoRouteToBackend, Refusal::Drop))),
        }
        flags |= FlowValue::SNAT;
    }
    Ok(Target { addr: pick.backend.addr, port: pick.backend.port, id: pick.id, service, fingerprint, nat, flags })
}

/// The translated flow that has this very tuple. (The other way round the packet would be a reply; met again at another
/// device, the translated packet itself. A SYN of another connection is told from that by its sequence number: somebody may
/// have opened the flow in the sender's name, by a device of his own.)
#[inline(always)]
fn clashing<'a, F: Lookups>(flows: &'a F, packet: &Parsed) -> Option<FlowRef<'a>> {
    let (key, src_first) = packet.tuple.plain_key();
    let plain = find(flows, &key)?;
    let is_another = plain.fixed(|value| value.ifindex) == flows.ifindex()
        || packet.tcp_flags & tcp::SYN != 0 && plain.stamp() != packet.sequence;
    let clashes = is_another
        && plain.fixed(|value| value.has(FlowValue::CLIENT_IS_A)) == src_first
        && !plain.fixed(|value| value.has(FlowValue::DIRECT));
    if clashes { Some(plain) } else { None }
}

/// What stands in the way of a direct connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Clash {
    /// Nothing.
    None,
    /// A flow that is over.
    Over,
    /// A flow.
    Alive,
}

#[inline(never)]
fn clash_of<F: Flows>(flows: &F, packet: &Parsed) -> Clash {
    match clashing(flows, packet) {
        None => Clash::None,
        Some(other) if is_over(flows, packet.tuple.proto, other) => Clash::Over,
        Some(_) => Clash::Alive,
    }
}

/// A direct connection to a backend whose tuple a translated flow already has: it gets another
/// source port, so that the backend's replies can be told apart. If that flow is over, it goes.
#[inline(always)]
fn direct<F: Flows>(flows: &F, packet: &Parsed) -> Result<Target, Unopened> {
    let tuple = &packet.tuple;
    if packet.kind == Kind::LaterFragment {
        return Err(None);
    }
    match clash_of(flows, packet) {
        Clash::None => return Err(None),
        Clash::Over | Clash::Alive if is_settling(flows) => return Err(Some(HELD)),
        Clash::Over => {
            forget_over(flows, tuple);
            return Err(None);
        }
        Clash::Alive => {}
    }
    flows.set_flows_of(&tuple.dst);
    Ok(Target {
        addr: tuple.dst,
        port: tuple.dport,
        id: 0,
        service: 0,
        fingerprint: 0,
        nat: Addr::UNSPECIFIED_V6,
        flags: FlowValue::DIRECT | FlowValue::ALIAS,
    })
}

/// Removes a flow that is over, found by its client's packet as the stack sees it.
#[inline(never)]
fn forget_over<F: Flows>(flows: &F, plain: &Tuple) {
    let (key, client_is_a) = plain.plain_key();
    if let Some(other) = find(flows, &key) {
        forget_others(flows, plain, client_is_a, other);
        flows.remove(&key);
    }
}

/// Where a new flow goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// The backend.
    pub addr: Addr,
    /// The backend.
    pub port: Be16,
    /// Its id.
    pub id: u32,
    /// The service.
    pub service: u32,
    /// That of the service when the backend was picked.
    pub fingerprint: u32,
    /// The rewritten source, if `flags` say so.
    pub nat: Addr,
    /// Flags of [`FlowValue`].
    pub flags: u32,
}

/// Last stage: stores the entries of a new flow: plain, under a source port that nobody else uses towards the backend; snat
/// likewise; front last, since it is what packets find.
#[inline(always)]
pub fn create<F: Flows>(flows: &F, packet: &Parsed, target: &Target) -> Verdict {
    let tuple = &packet.tuple;
    let Some(value) = flows.draft() else {
        return Verdict::Refuse(DropReason::FlowTable, Refusal::Drop);
    };
    *value = FlowValue {
        hot: Hot { seen: flows.now(), state: 0 }.pack(),
        proof: if tuple.proto == Proto::TCP { Proof::syn(packet.sequence).0 } else { Proof::NONE.0 },
        peer: tuple.dst,
        peer_port: tuple.dport,
        nat: target.nat,
        service: target.service,
        backend: target.id,
        ifindex: flows.ifindex(),
        flags: target.flags,
        stamp: packet.sequence,
        ..FlowValue::ZERO
    };
    let sport = take_source_port(flows, tuple, target, value);
    if sport.is_zero() {
        return Verdict::Refuse(DropReason::SnatPortsExhausted, Refusal::Drop);
    }
    if value.has(FlowValue::SNAT) {
        let mut claim = claim_nat_port(flows, tuple, target, value, sport);
        if claim == PENDING {
            end_pending(flows, tuple.proto, target, value);
            claim = take_over(flows, tuple.proto, target, value);
        }
        if claim != CLAIMED || !store_plain(flows, tuple, target, value, sport) {
            remove_plain(flows, tuple, target, sport);
            return Verdict::Refuse(DropReason::SnatPortsExhausted, Refusal::Drop);
        }
    }
    value.alias_port = if sport == tuple.sport { Be16::ZERO } else { sport };
    store_front(flows, tuple, target, value);
    Verdict::Rewrite(Rewrite {
        addr: target.addr,
        port: target.port,
        other_port: value.alias_port,
        mac: value.mac,
        service: target.service,
    })
}

#[inline(always)]
fn towards(tuple: &Tuple, target: &Target, sport: Be16) -> Tuple {
    Tuple { src: tuple.src, dst: target.addr, sport, dport: target.port, proto: tuple.proto }
}

/// Stores the plain entry under the client's own port, or under an alias if that is taken; the port it got, or zero.
#[inline(never)]
fn take_source_port<F: Flows>(flows: &F, tuple: &Tuple, target: &Target, value: &mut FlowValue) -> Be16 {
    let mut plain = towards(tuple, target, tuple.sport);
    // Zero, which a datagram without use for answers may have (RFC 768), means "none" here.
    let taken = value.has(FlowValue::ALIAS)
        || tuple.sport.is_zero()
        || tuple.proto != Proto::TCP && is_tracked(flows, &plain, value);
    if !taken && claim_plain(flows, &plain, value) {
        return tuple.sport;
    }
    value.alias_port = tuple.sport;
    let found = search_port(flows, tuple, |port, _| {
        plain.sport = port;
        claim_plain(flows, &plain, value)
    });
    if found { plain.sport } else { Be16::ZERO }
}

/// True if the kernel knows a datagram's tuple from another flow than this one.
#[inline(never)]
fn is_tracked<F: Flows>(flows: &F, plain: &Tuple, value: &FlowValue) -> bool {
    let (key, client_is_a) = plain.plain_key();
    !find(flows, &key).is_some_and(|other| is_own(other, value, client_is_a))
        && flows.tracked(plain) != Tracked::Unknown
}

/// Stores the snat entry under a free port of its new source; as [`claim_snat`].
#[inline(never)]
fn claim_nat_port<F: Flows>(flows: &F, tuple: &Tuple, target: &Target, value: &mut FlowValue, sport: Be16) -> u32 {
    claim_snat(flows, &towards(tuple, target, sport), value)
}

/// Stores the plain entry again, with the rewritten source that the flow got.
#[inline(never)]
fn store_plain<F: Flows>(flows: &F, tuple: &Tuple, target: &Target, value: &mut FlowValue, sport: Be16) -> bool {
    value.peer = tuple.dst;
    value.peer_port = tuple.dport;
    value.alias_port = if sport == tuple.sport { Be16::ZERO } else { tuple.sport };
    value.hot = Hot { seen: flows.now(), state: 0 }.pack();
    flows.insert_pending(&towards(tuple, target, sport).plain_key().0, value, false)
}

#[inline(never)]
fn remove_plain<F: Flows>(flows: &F, tuple: &Tuple, target: &Target, sport: Be16) {
    flows.remove_pending(&towards(tuple, target, sport).plain_key().0);
}

/// Stores the front entry. If it cannot be, the pick can be derived again: the packet goes on.
#[inline(never)]
fn store_front<F: Flows>(flows: &F, tuple: &Tuple, target: &Target, value: &mut FlowValue) {
    value.peer = target.addr;
    value.peer_port = target.port;
    value.stamp = target.fingerprint;
    if !value.has(FlowValue::SNAT) {
        match flows.bridge_neighbour(&tuple.src, &target.addr) {
            Neighbour::At(mac) => value.mac = mac,
            Neighbour::Unresolved => value.flags |= FlowValue::WANTS_MAC,
            Neighbour::Elsewhere => {}
        }
    }
    if !flows.insert_pending(&tuple.front_key(), value, false) {
        flows.count_drop(DropReason::FlowTable);
    }
}

/// Stores the plain entry of a flow if its key is free; a finished or outlived one is no hindrance.
#[inline(never)]
fn claim_plain<F: Flows>(flows: &F, plain: &Tuple, value: &mut FlowValue) -> bool {
    let (key, client_is_a) = plain.plain_key();
    value.flags = value.flags & !FlowValue::CLIENT_IS_A | if client_is_a { FlowValue::CLIENT_IS_A } else { 0 };
    if let Some(other) = find(flows, &key) {
        if is_own(other, value, client_is_a) {
            value.nat_port = other.fixed(|value| value.nat_port);
        } else if is_over(flows, plain.proto, other) {
            forget_others(flows, plain, client_is_a, other);
        } else {
            return false;
        }
        flows.remove(&key);
    }
    flows.insert_pending(&key, value, true)
}

/// True if a plain entry is of the very flow that is made, whose front entry the LRU has taken: it begins again in its place,
/// since the backend may have heard of it.
#[inline(always)]
fn is_own(plain: FlowRef<'_>, value: &FlowValue, client_is_a: bool) -> bool {
    let is_same = plain.fixed(|other| {
        other.peer == value.peer
            && other.peer_port == value.peer_port
            && other.alias_port == value.alias_port
            && other.has(FlowValue::CLIENT_IS_A) == client_is_a
            && other.has(FlowValue::DIRECT) == value.has(FlowValue::DIRECT)
    });
    is_same && Hot::unpack(plain.hot()).state & Hot::CLASH == 0
}

/// Removes what a flow that is over has besides its plain entry, which another takes: packets that straggle would follow
/// its front entry into the new flow.
#[inline(always)]
fn forget_others<F: Flows>(flows: &F, plain: &Tuple, client_is_a: bool, other: FlowRef<'_>) {
    let same_way = other.fixed(|value| value.has(FlowValue::CLIENT_IS_A)) == client_is_a;
    if other.fixed(|value| value.has(FlowValue::SNAT)) {
        forget_snat(flows, plain, same_way, other);
    }
    forget_front(flows, plain, same_way, other);
}

/// Removes the snat entry of a flow; its place may be another's by now, if a CNI rewrote the flow's source.
#[inline(never)]
fn forget_snat<F: Flows>(flows: &F, plain: &Tuple, same_way: bool, other: FlowRef<'_>) {
    let (client, port) = if same_way { (&plain.src, plain.sport) } else { (&plain.dst, plain.dport) };
    let mut reply = if same_way { plain.reversed() } else { *plain };
    reply.dst = other.fixed(|value| value.nat);
    reply.dport = other.fixed(|value| value.nat_port);
    let key = reply.snat_key();
    if find(flows, &key).is_some_and(|snat| leads_to(snat, client, port)) {
        flows.remove(&key);
    }
}

#[inline(never)]
fn forget_front<F: Flows>(flows: &F, plain: &Tuple, same_way: bool, other: FlowRef<'_>) {
    let (src, sport) = if same_way { (&plain.src, plain.sport) } else { (&plain.dst, plain.dport) };
    let (backend, backend_port) = if same_way { (&plain.dst, plain.dport) } else { (&plain.src, plain.sport) };
    let own_port = other.fixed(|value| value.alias_port);
    let (client_port, alias) = if own_port.is_zero() { (sport, Be16::ZERO) } else { (own_port, sport) };
    let key = FlowKey {
        a: *src,
        b: other.fixed(|value| value.peer),
        a_port: client_port,
        b_port: other.fixed(|value| value.peer_port),
        proto: plain.proto.0,
        kind: FlowKey::FRONT,
        reserved: 0,
    };
    // The client may have begun anew there, to another backend or by another port.
    let leads_here = |front: FlowRef<'_>| {
        front.fixed(|value| value.peer == *backend && value.peer_port == backend_port && value.alias_port == alias)
    };
    if find(flows, &key).is_some_and(leads_here) {
        flows.remove(&key);
    }
}

#[inline(always)]
fn is_over<F: Flows>(flows: &F, proto: Proto, plain: FlowRef<'_>) -> bool {
    let hot = Hot::unpack(plain.hot());
    hot.is_finished() || flow::is_expired(proto, hot, flows.now())
}

/// Stores the snat entry of a flow under a free port of its new source: the client's own if it may be kept. [`CLAIMED`]; or
/// [`PENDING`] if the port now in `value` is only a pending flow's; or [`TAKEN`] if all are established ones'.
#[inline(always)]
fn claim_snat<F: Flows>(flows: &F, plain: &Tuple, value: &mut FlowValue) -> u32 {
    let mut reply =
        Tuple { src: plain.dst, dst: value.nat, sport: plain.dport, dport: plain.sport, proto: plain.proto };
    value.peer = plain.src;
    value.peer_port = plain.sport;
    value.alias_port = Be16::ZERO;
    value.hot = Hold::claimed(flows.nanos()).0;
    // Of a flow that begins again: it goes by the port that the backend knows.
    let own = value.nat_port;
    if !own.is_zero() {
        reply.dport = own;
    }
    let may_keep = !own.is_zero() || may_keep_port(flows, plain.sport.host());
    if may_keep && claim_reply(flows, &reply, value) == FREE {
        if own.is_zero() {
            flows.mark_port(plain.sport.host(), PortUse::SNAT);
        }
        value.nat_port = reply.dport;
        return CLAIMED;
    }
    let mut least = ESTABLISHED;
    search_port(flows, plain, |port, step| {
        reply.dport = port;
        least = least.min(claim_reply(flows, &reply, value));
        least == FREE || least != ESTABLISHED && step + 1 >= PENDING_PORTS
    });
    value.nat_port = if least == FREE { reply.dport } else { Be16(least as u16) };
    match least {
        FREE => CLAIMED,
        ESTABLISHED => TAKEN,
        _ => PENDING,
    }
}

/// Ports that are tried before the one is taken that a flow which is only pending has held longest: a flood of forged
/// beginnings keeps nobody out, and costs no search through all that it holds.
///
/// The oldest of so many is old, which keeps handshakes safe: while the flood goes round all ports once (a fifth of a second
/// with 20,000 ports and 100,000 beginnings a second), one that takes half of that time loses its port in less than a
/// hundredth of the cases.
/// It is not always the oldest of all, since a backend in a flood remembers beginnings in waves that come back every second,
/// as the SYN of a client does that met one: it must meet a port of another age then.
const PENDING_PORTS: u32 = 8;

/// Nobody holds a port.
const FREE: u64 = 0;
/// A flow that is not pending holds it, or a socket.
const ESTABLISHED: u64 = u64::MAX;
/// The ranks of pending flows lie between: by the moment at which they took the port (2^20 [`flow::Nanos`], that is about a
/// millisecond), and the port itself in the lowest 16 bits.
#[inline(always)]
fn rank(pending: FlowRef<'_>, port: Be16) -> u64 {
    Hold(pending.hot()).0 >> 20 << 16 | port.0 as u64
}

const CLAIMED: u32 = 0;
const PENDING: u32 = 1;
const TAKEN: u32 = 2;

/// Stores a snat entry: [`FREE`], or the rank of who holds the port.
#[inline(never)]
fn claim_reply<F: Flows>(flows: &F, reply: &Tuple, value: &FlowValue) -> u64 {
    let key = reply.snat_key();
    if flows.established(&key).is_some() {
        return ESTABLISHED;
    }
    // Looked up first: an insertion that fails has pushed out another entry all the same (an LRU makes room beforehand).
    let new_only = match flows.pending(&key) {
        Some(other) if !leads_to(other, &value.peer, value.peer_port) => return rank(other, reply.dport),
        // Its own, of a beginning before this one.
        own => own.is_none(),
    };
    if !flows.insert_pending(&key, value, new_only) {
        return ESTABLISHED;
    }
    // A connection of this node itself with the same ends would lose its replies to us.
    if flows.has_connected_socket(reply) {
        flows.remove_pending(&key);
        return ESTABLISHED;
    }
    FREE
}

/// From the backend to the rewritten source.
#[inline(always)]
fn reply_to(proto: Proto, target: &Target, value: &FlowValue) -> Tuple {
    Tuple { src: target.addr, dst: value.nat, sport: target.port, dport: value.nat_port, proto }
}

/// Ends the pending flow that has the port in `value`.
#[inline(never)]
fn end_pending<F: Flows>(flows: &F, proto: Proto, target: &Target, value: &FlowValue) {
    if let Some(old) = flows.pending(&reply_to(proto, target, value).snat_key()) {
        let src = old.fixed(|value| value.peer);
        let sport = old.fixed(|value| value.peer_port);
        forget_beginning(flows, &Tuple { src, dst: target.addr, sport, dport: target.port, proto });
    }
}

/// Stores the snat entry under the port in `value`, whoever has it.
#[inline(never)]
fn take_over<F: Flows>(flows: &F, proto: Proto, target: &Target, value: &FlowValue) -> u32 {
    if flows.insert_pending(&reply_to(proto, target, value).snat_key(), value, false) { CLAIMED } else { TAKEN }
}

/// Removes the plain and front entries of a pending flow; `plain` goes from its client to its backend.
#[inline(never)]
fn forget_beginning<F: Flows>(flows: &F, plain: &Tuple) {
    let (key, _) = plain.plain_key();
    if let Some(entry) = flows.pending(&key) {
        forget_front(flows, plain, true, entry);
        flows.remove_pending(&key);
    }
}

/// A client's port is kept as the port of a rewritten source if the kernel does not hand it out itself.
#[inline(always)]
fn may_keep_port<F: Flows>(flows: &F, port: Port) -> bool {
    match flows.config() {
        Some(config) => {
            port.0 != 0
                && (port.0 < config.local_first || port.0 > config.local_last)
                && !flows.port_use(port).has(PortUse::NODE_PORT)
        }
        None => false,
    }
}

/// Tries every port of the SNAT range (and says how many tries came before), beginning at one that depends on the connection
/// and on the time: a connection that met a clash where it began meets another port when it tries again. The first
/// [`PENDING_PORTS`] lie far apart: neighbours were often taken at about the same time.
#[inline(always)]
fn search_port<F: Flows>(flows: &F, tuple: &Tuple, mut claim: impl FnMut(Be16, u32) -> bool) -> bool {
    let Some(config) = flows.config() else { return false };
    let (first, last) = (config.snat_first as u32, config.snat_last as u32);
    if last < first {
        return false;
    }
    let count = last - first + 1;
    // Milliseconds or so; 2^32 divided by the golden ratio: what differs by one ends far apart (Knuth, volume 3, section 6.4).
    let salt = ((flows.nanos().0 >> 20) as u32).wrapping_mul(0x9e37_79b9) as u64;
    let start = select::position((tuple_hash(flows, tuple) >> 32) ^ salt, count);
    let stride = count / PENDING_PORTS;
    flows.search(count + PENDING_PORTS, |step| {
        let offset = start + if step < PENDING_PORTS { step * stride } else { step - PENDING_PORTS };
        let offset = if offset >= count { offset - count } else { offset };
        claim(Port((first + offset) as u16).be(), step)
    })
}

/// An ICMP error at ingress: about a packet we sent with a rewritten source, or about a reply from a frontend.
#[inline(never)]
fn icmp_error<F: Flows>(flows: &F, packet: &Parsed, class: AddressClass, ports: PortUse) -> Verdict {
    let tuple = &packet.tuple;
    if class.has(AddressClass::NODE)
        && ports.has(PortUse::SNAT)
        && let Some(flow) = snat_entry(flows, packet)
    {
        return Verdict::Rewrite(to_peer(flow));
    }
    if let Some(flow) = find(flows, &tuple.front_key()) {
        return Verdict::Rewrite(to_peer(flow));
    }
    if class.has(AddressClass::CLUSTER_IP) {
        return Verdict::Refuse(DropReason::NoConnection, Refusal::Drop);
    }
    PASS
}

/// Decides on a packet that leaves by a device, unless it is an ICMP error or a fragment: [`egress`] knows those.
#[inline(always)]
pub fn egress_known<F: Flows>(flows: &F, packet: &Parsed) -> Option<Verdict> {
    match packet.kind {
        Kind::Transport if !packet.first_fragment => Some(leaving(flows, packet)),
        Kind::Echo | Kind::Other | Kind::Unanswerable => Some(untranslated(flows, packet)),
        _ => None,
    }
}

/// Decides on a packet that leaves by a device.
#[inline(always)]
pub fn egress<F: Flows>(flows: &F, packet: &mut Parsed) -> Verdict {
    match packet.kind {
        Kind::Echo | Kind::Other | Kind::Unanswerable => return untranslated(flows, packet),
        // What no flow translates has no part that one does.
        Kind::Transport if packet.first_fragment && !is_of_flow(flows, &packet.tuple) => {
            return untranslated(flows, packet);
        }
        Kind::Transport | Kind::LaterFragment => {
            if !fragment_ports(flows, packet, Hook::Egress) {
                // To a service's address, its first fragment was refused.
                return match flows.config() {
                    Some(config) if config.is_service_address(&packet.outer_dst) => {
                        Verdict::Refuse(DropReason::FragmentUnknown, Refusal::Drop)
                    }
                    _ => PASS,
                };
            }
        }
        Kind::IcmpError | Kind::IcmpRedirect => {}
    }
    leaving(flows, packet)
}

#[inline(never)]
fn is_of_flow<F: Flows>(flows: &F, tuple: &Tuple) -> bool {
    find(flows, &tuple.plain_key().0).is_some()
}

/// A packet with a tuple, at egress.
#[inline(always)]
fn leaving<F: Flows>(flows: &F, packet: &Parsed) -> Verdict {
    let (key, src_first) = packet.tuple.plain_key();
    let Some(plain) = find(flows, &key) else { return untranslated(flows, packet) };
    let from_client = plain.fixed(|value| value.has(FlowValue::CLIENT_IS_A)) == src_first;
    // Once its port is put back, the reply of a direct connection looks like that of the flow it clashed with: it is
    // translated at the client's device alone, not at a bridge on the way there too.
    if !from_client
        && plain.fixed(|value| value.has(FlowValue::DIRECT))
        && plain.fixed(|value| value.ifindex) != flows.ifindex()
    {
        return PASS;
    }
    match packet.kind {
        Kind::IcmpRedirect => return Verdict::Refuse(DropReason::Redirect, Refusal::Drop),
        Kind::IcmpError => {}
        _ => {
            if !touch(flows, packet, plain, from_client) {
                return PASS;
            }
            if from_client && plain.fixed(|value| value.has(FlowValue::SNAT)) && !has_left(plain) {
                set_left(flows, packet, plain);
            }
        }
    }
    if !from_client {
        return Verdict::Rewrite(to_peer(plain));
    }
    if !plain.fixed(|value| value.has(FlowValue::SNAT)) {
        return PASS;
    }
    Verdict::Rewrite(Rewrite {
        addr: plain.fixed(|value| value.nat),
        port: plain.fixed(|value| value.nat_port),
        other_port: Be16::ZERO,
        mac: [0; 3],
        service: plain.fixed(|value| value.service),
    })
}

/// True if packets of a flow have left with the source that we rewrote, and not with one that the CNI gave them before us.
#[inline(always)]
fn has_left(plain: FlowRef<'_>) -> bool {
    Hot::unpack(plain.hot()).state & Hot::LEFT != 0
}

/// The first packet of a flow leaves with the source that we rewrite: from now on, what comes to that is a reply.
#[inline(never)]
fn set_left<F: Flows>(flows: &F, packet: &Parsed, plain: FlowRef<'_>) {
    let hot = Hot::unpack(plain.hot());
    plain.set_hot(Hot { seen: hot.seen, state: hot.state | Hot::LEFT }.pack());
    let mut reply = packet.tuple.reversed();
    reply.dst = plain.fixed(|value| value.nat);
    reply.dport = plain.fixed(|value| value.nat_port);
    if let Some(snat) = flows.pending(&reply.snat_key()) {
        snat.set_hot(Hold(snat.hot()).left().0);
    }
}

/// Notes a packet in its flow; writes only if the second or the state changed. False: the packet is not of this flow.
#[inline(always)]
fn touch<F: Flows>(flows: &F, packet: &Parsed, plain: FlowRef<'_>, from_client: bool) -> bool {
    let hot = Hot::unpack(plain.hot());
    let mut after = hot;
    if !from_client && hot.state & Hot::ESTABLISHED == 0 {
        let Some(state) = answer(packet, plain, hot.state) else {
            plain.set_hot(Hot { seen: hot.seen, state: hot.state | Hot::CLASH }.pack());
            return false;
        };
        after.state = state;
    }
    let after = after.after(flows.now(), packet.tcp_flags, from_client);
    if after != hot {
        plain.set_hot(after.pack());
    }
    true
}

/// The state of a pending flow after its backend's answer. `None`: that belongs to another connection with the same ends; it
/// passes untouched and the next SYN avoids the clash.
#[inline(always)]
fn answer(packet: &Parsed, plain: FlowRef<'_>, state: u32) -> Option<u32> {
    let is_answered = Proof(plain.proof()).is_some();
    if packet.tuple.proto != Proto::TCP {
        if !is_answered {
            plain.set_proof(Proof::ANSWERED.0);
        }
        return Some(state);
    }
    if !is_answered && !is_answer(packet, plain) {
        return if tells_of_clash(packet, state) { Some(state | Hot::CLASH | Hot::TOLD) } else { None };
    }
    if packet.tcp_flags & (tcp::SYN | tcp::ACK) != tcp::SYN | tcp::ACK {
        return Some(state);
    }
    plain.set_proof(Proof::syn_ack(packet.sequence).0);
    // What another connection with these ends has left here is over with it.
    Some(state & (Hot::TOLD | Hot::LEFT))
}

/// A packet that no flow translates.
#[inline(always)]
fn untranslated<F: Flows>(flows: &F, packet: &Parsed) -> Verdict {
    match flows.config() {
        Some(config) if config.is_service_address(&packet.outer_dst) => refuse_untranslated(flows, packet),
        _ => PASS,
    }
}

/// A packet to an address of the services' range. If a service has it, a process of this node made it that the socket hooks
/// do not see, or whose connection they leave alone since policy keeps it from all endpoints. If none has it, it is dropped
/// here and not on its way in: between the two another proxy may have found a service of its own.
#[inline(never)]
fn refuse_untranslated<F: Flows>(flows: &F, packet: &Parsed) -> Verdict {
    let class = flows.address(&packet.outer_dst);
    if !class.has(AddressClass::FRONTEND | AddressClass::BACKEND | AddressClass::NODE) {
        Verdict::Refuse(DropReason::UnallocatedServiceAddress, Refusal::Drop)
    } else if packet.kind == Kind::Transport && is_kept_from(flows, &packet.tuple) {
        Verdict::Refuse(DropReason::NoLocalEndpoint, Refusal::Drop)
    } else {
        Verdict::Refuse(DropReason::HostUnhooked, Refusal::Reject)
    }
}

/// True if a process of this node gets no endpoint by policy while there are some.
#[inline(never)]
fn is_kept_from<F: Flows>(flows: &F, tuple: &Tuple) -> bool {
    let (class, ports) = (flows.address(&tuple.dst), flows.port_use(tuple.dport.host()));
    match pick::find_frontend(flows, class, ports, &tuple.dst, tuple.dport, tuple.proto) {
        Some(frontend) => {
            pick::set_for(flows, frontend.value, true) == Err((DropReason::NoLocalEndpoint, Refusal::Drop))
        }
        None => false,
    }
}
