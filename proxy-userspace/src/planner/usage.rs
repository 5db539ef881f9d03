//! What addresses and ports are used for, counted over all users, and what the tables say of them.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use proxy_common::abi::address::{AddressClass, PORT_WORDS, PortUse, PortWord, port_index};
use proxy_common::addr::{Addr, Port};

use super::plan::Op;

/// Users of one address, and its class in the table. There is one of these for each address of the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct AddressUse {
    /// Frontends with this address.
    pub frontends: u32,
    /// ClusterIPs among them.
    pub cluster_ips: u32,
    /// Backends with this address.
    pub backends: u32,
    node: Flags,
    programmed: Flags,
}

/// Flags of an [`AddressClass`], stored as narrow as they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Flags(u8);

const _: () = assert!(AddressClass::ANY_PORT <= u8::MAX as u32, "the flags of an address class no longer fit");

impl From<u32> for Flags {
    fn from(flags: u32) -> Self {
        Self(flags as u8)
    }
}

impl From<Flags> for u32 {
    fn from(flags: Flags) -> Self {
        flags.0.into()
    }
}

impl AddressUse {
    /// NODE and NODE_PORT, or zero.
    pub(super) fn node(&self) -> u32 {
        self.node.into()
    }

    /// Sets what the address is to this node.
    pub(super) fn set_node(&mut self, flags: u32) {
        self.node = flags.into();
    }

    /// Flags in the table; 0: no entry.
    fn programmed(&self) -> u32 {
        self.programmed.into()
    }

    /// Takes over what the table says.
    pub(super) fn restore(&mut self, flags: u32) {
        self.programmed = flags.into();
        self.set_node(flags & (AddressClass::NODE | AddressClass::NODE_PORT));
    }

    /// The flags its users want. An address of this node is never rejected on unknown ports, whatever else it is.
    fn wanted(&self) -> u32 {
        let flag = |count: u32, flag: u32| if count > 0 { flag } else { 0 };
        let cluster_ips = if self.node() != 0 { 0 } else { self.cluster_ips };
        self.node()
            | flag(self.frontends, AddressClass::FRONTEND)
            | flag(cluster_ips, AddressClass::CLUSTER_IP)
            | flag(self.backends, AddressClass::BACKEND)
    }

    /// The flags it should have in the end: flows to an address that was a frontend or a backend may live on.
    fn target(&self) -> u32 {
        let lost = self.programmed() & !self.wanted() & (AddressClass::FRONTEND | AddressClass::BACKEND) != 0;
        let lingers = lost || self.programmed() & AddressClass::FLOWS != 0;
        self.wanted() | if lingers { AddressClass::FLOWS } else { 0 }
    }

    /// The flags it may have while frontends still come and go.
    fn meanwhile(&self) -> u32 {
        let forbidden = if self.node() != 0 { AddressClass::CLUSTER_IP } else { 0 };
        (self.programmed() | self.wanted()) & !forbidden
    }

    fn is_unused(&self) -> bool {
        *self == Self::default()
    }
}

/// All addresses.
#[derive(Default, Debug)]
pub(super) struct Addresses(BTreeMap<Addr, AddressUse>);

impl Addresses {
    /// The users of an address, to change them.
    pub(super) fn at(&mut self, addr: Addr) -> &mut AddressUse {
        self.0.entry(addr).or_default()
    }

    /// True if a backend has the address.
    pub(super) fn has_backends(&self, addr: &Addr) -> bool {
        self.0.get(addr).is_some_and(|uses| uses.backends > 0)
    }

    /// Every known address.
    pub(super) fn all(&self) -> impl Iterator<Item = (Addr, &AddressUse)> {
        self.0.iter().map(|(addr, uses)| (*addr, uses))
    }

    /// What the table says of an address, as a change that leaves alone what the programs mark.
    pub(super) fn stated(&self, addr: Addr) -> Option<Op> {
        let flags = self.0.get(&addr)?.programmed();
        (flags != 0).then(|| put_address(addr, flags, flags))
    }

    /// The change that gives an address what it lacks.
    pub(super) fn reveal(&mut self, addr: Addr) -> Option<Op> {
        let uses = self.at(addr);
        let (known, flags) = (uses.programmed(), uses.meanwhile());
        uses.programmed = flags.into();
        (flags != known).then(|| put_address(addr, flags, known))
    }

    /// The change that leaves an address with what it should have in the end.
    pub(super) fn conceal(&mut self, addr: Addr) -> Option<Op> {
        let uses = self.at(addr);
        let (known, flags) = (uses.programmed(), uses.target());
        uses.programmed = flags.into();
        if uses.is_unused() {
            self.0.remove(&addr);
        }
        match flags {
            _ if flags == known => None,
            0 => Some(Op::DeleteAddress { addr }),
            _ => Some(put_address(addr, flags, known)),
        }
    }

    /// The change that ends looking for flows to an address.
    pub(super) fn prune(&mut self, addr: Addr) -> Option<Op> {
        let uses = self.0.get_mut(&addr)?;
        // Even if the flag is not known here: the programs may have set it.
        let flags = uses.programmed() & !AddressClass::FLOWS;
        uses.programmed = flags.into();
        match flags {
            0 => {
                self.0.remove(&addr);
                Some(Op::DeleteAddress { addr })
            }
            flags => Some(Op::PutAddress { addr, class: AddressClass { flags }, keep: 0 }),
        }
    }
}

fn put_address(addr: Addr, flags: u32, known: u32) -> Op {
    // The programs mark only addresses that the table has.
    let keep = if known == 0 { 0 } else { AddressClass::FLOWS };
    Op::PutAddress { addr, class: AddressClass { flags }, keep }
}

/// Ports for rewritten sources (`--snat-ports`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnatPorts(pub RangeInclusive<u16>);

impl SnatPorts {
    /// The SNAT bits of one word of the `ports` table.
    pub fn word(&self, index: u32) -> u64 {
        let ports = (0..32).map(|port| (index * 32 + port) as u16);
        ports.filter(|port| self.0.contains(port)).fold(0, |word, port| word | bit(Port(port), PortUse::SNAT))
    }
}

const fn bit(port: Port, usage: u64) -> u64 {
    usage << port_index(port).1
}

/// The SNAT bits of all ports of a word.
const SNAT_BITS: u64 = u64::MAX / 3 * PortUse::SNAT;

/// All ports.
#[derive(Debug)]
pub(super) struct Ports {
    snat: SnatPorts,
    /// Frontends of each NodePort: protocols and families.
    node_ports: BTreeMap<Port, u32>,
    /// Words in the table, without what the programs mark by themselves; zero if absent.
    programmed: BTreeMap<u32, u64>,
}

impl Ports {
    /// Ports as the table has them.
    pub(super) fn restore(snat: SnatPorts, words: &BTreeMap<u32, PortWord>) -> Self {
        let ours = |(index, word): (&u32, &PortWord)| (*index, word.bits & !marked(&snat, *index));
        let programmed = words.iter().map(ours).collect();
        Self { snat, node_ports: BTreeMap::new(), programmed }
    }

    /// Counts a NodePort frontend in.
    pub(super) fn add(&mut self, port: Port) {
        *self.node_ports.entry(port).or_default() += 1;
    }

    /// Counts a NodePort frontend out.
    pub(super) fn remove(&mut self, port: Port) {
        if let Some(count) = self.node_ports.get_mut(&port) {
            *count -= 1;
            if *count == 0 {
                self.node_ports.remove(&port);
            }
        }
    }

    /// Every word.
    pub(super) fn words() -> impl Iterator<Item = u32> {
        0..PORT_WORDS
    }

    /// What the table says in a word, as a change; none if that is nothing.
    pub(super) fn stated(&self, index: u32) -> Option<Op> {
        let bits = *self.programmed.get(&index)?;
        Some(Op::PutPorts { index, word: PortWord { bits }, keep: marked(&self.snat, index) })
    }

    /// The change that gives a word what it lacks.
    pub(super) fn reveal(&mut self, index: u32) -> Option<Op> {
        let word = self.programmed.get(&index).copied().unwrap_or(0) | self.wanted(index);
        self.put(index, word)
    }

    /// The change that leaves a word with what it should have in the end.
    pub(super) fn conceal(&mut self, index: u32) -> Option<Op> {
        self.put(index, self.wanted(index))
    }

    fn wanted(&self, index: u32) -> u64 {
        let first = index * 32;
        let used = self.node_ports.range(Port(first as u16)..=Port((first + 31) as u16));
        used.fold(self.snat.word(index), |word, (port, _)| word | bit(*port, PortUse::NODE_PORT))
    }

    fn put(&mut self, index: u32, bits: u64) -> Option<Op> {
        let known = match bits {
            0 => self.programmed.remove(&index),
            _ => self.programmed.insert(index, bits),
        };
        let op = Op::PutPorts { index, word: PortWord { bits }, keep: marked(&self.snat, index) };
        (known.unwrap_or(0) != bits).then_some(op)
    }
}

/// Bits that only the programs set: SNAT ports outside the configured range.
fn marked(snat: &SnatPorts, index: u32) -> u64 {
    SNAT_BITS & !snat.word(index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn class_after(change: impl FnOnce(&mut AddressUse)) -> Option<Op> {
        let addr = Addr::from(Ipv4Addr::new(10, 0, 0, 1));
        let mut addresses = Addresses::default();
        let uses = addresses.at(addr);
        uses.frontends = 1;
        uses.cluster_ips = 1;
        addresses.reveal(addr);
        change(addresses.at(addr));
        addresses.conceal(addr)
    }

    #[test]
    fn an_address_without_frontends_lingers_for_its_flows() {
        let op = class_after(|uses| (uses.frontends, uses.cluster_ips) = (0, 0));
        let Some(Op::PutAddress { class, keep, .. }) = op else { panic!("{op:?}") };
        assert_eq!((class.flags, keep), (AddressClass::FLOWS, AddressClass::FLOWS));
    }

    #[test]
    fn an_address_of_this_node_is_no_cluster_ip() {
        let op = class_after(|uses| uses.set_node(AddressClass::NODE));
        let Some(Op::PutAddress { class, .. }) = op else { panic!("{op:?}") };
        assert_eq!(class.flags, AddressClass::NODE | AddressClass::FRONTEND);
    }

    #[test]
    fn pruning_removes_what_only_flows_used() {
        let addr = Addr::from(Ipv4Addr::new(10, 0, 0, 1));
        let mut addresses = Addresses::default();
        addresses.at(addr).restore(AddressClass::FLOWS);
        assert_eq!(addresses.prune(addr), Some(Op::DeleteAddress { addr }));
        assert_eq!(addresses.prune(addr), None);
        addresses.at(addr).restore(AddressClass::FLOWS | AddressClass::NODE);
        let class = AddressClass { flags: AddressClass::NODE };
        assert_eq!(addresses.prune(addr), Some(Op::PutAddress { addr, class, keep: 0 }));
    }

    #[test]
    fn words_have_two_bits_a_port() {
        let snat = SnatPorts(33..=34);
        assert_eq!((snat.word(0), snat.word(1)), (0, 0b10_10 << 2));
        let mut ports = Ports::restore(snat, &BTreeMap::new());
        ports.add(Port(32));
        let Some(Op::PutPorts { index: 1, word, keep }) = ports.reveal(1) else { panic!() };
        assert_eq!(word.bits, 0b10_10 << 2 | 1);
        assert_eq!(keep & word.bits, 0);
        ports.remove(Port(32));
        let Some(Op::PutPorts { word, .. }) = ports.conceal(1) else { panic!() };
        assert_eq!(word.bits, 0b10_10 << 2);
    }
}
