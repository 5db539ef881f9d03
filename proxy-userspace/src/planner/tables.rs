//! All entries of the maps that a plan changes, and what a change does to them.
//!
//! The same type is what is read back from the kernel at start, the fake of tests, and what people are shown.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use proxy_common::abi::address::{AddressClass, PortWord};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::{ServiceRecord, Slot};
use proxy_common::addr::Addr;

use super::ids::{BackendId, ServiceId};
use super::key::FrontendAddr;
use super::plan::{Cidrs, Op};

/// Contents of the tables. What is all zero may be left out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tables {
    /// Prefixes of the configuration.
    pub cidrs: Cidrs,
    /// `service_names`, as text.
    pub names: BTreeMap<ServiceId, String>,
    /// `services`.
    pub services: BTreeMap<ServiceId, ServiceRecord>,
    /// `slots`; those that no published range contains may be left out.
    pub slots: BTreeMap<u32, Slot>,
    /// `backends`; those that are not live may be left out.
    pub backends: BTreeMap<BackendId, BackendRecord>,
    /// `frontends`.
    pub frontends: BTreeMap<FrontendAddr, FrontendValue>,
    /// `source_ranges`.
    pub sources: BTreeMap<ServiceId, BTreeSet<IpNet>>,
    /// `addresses`.
    pub addresses: BTreeMap<Addr, AddressClass>,
    /// `ports`.
    pub ports: BTreeMap<u32, PortWord>,
}

impl Tables {
    /// Does one change.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::PutCidrs(cidrs) => self.cidrs = Cidrs::clone(cidrs),
            Op::PutName { id, name } => {
                self.names.insert(*id, name.to_string());
            }
            Op::PutBackend { id, record } => {
                self.backends.insert(*id, *record);
            }
            Op::AllowSource { id, net } => {
                self.sources.entry(*id).or_default().insert(*net);
            }
            Op::ForbidSource { id, net } => self.forbid_source(*id, net),
            Op::WriteSlots { base, slots } => self.slots.extend((*base..).zip(slots.iter().copied())),
            Op::PublishService { id, record } => {
                self.services.insert(*id, *record);
            }
            Op::PutFrontend { at, value } => {
                self.frontends.insert(*at, *value);
            }
            Op::DeleteFrontend { at } => {
                self.frontends.remove(at);
            }
            Op::PutAddress { addr, class, keep } => {
                let known = self.addresses.get(addr).map_or(0, |class| class.flags);
                self.addresses.insert(*addr, AddressClass { flags: class.flags | known & keep });
            }
            Op::DeleteAddress { addr } => {
                self.addresses.remove(addr);
            }
            Op::PutPorts { index, word, keep } => self.put_ports(*index, word.bits, *keep),
            Op::RetireBackend { id } => {
                self.backends.remove(id);
            }
            Op::RetireService { id } => {
                self.services.remove(id);
                self.names.remove(id);
            }
        }
    }

    /// True if they are as a change would leave them; of what it would take away, that it is not there. What the programs mark
    /// by themselves may be there.
    pub fn holds(&self, op: &Op) -> bool {
        match op {
            Op::PutCidrs(cidrs) => self.cidrs == **cidrs,
            Op::PutName { id, name } => self.names.get(id).is_some_and(|known| *known == name.to_string()),
            Op::PutBackend { id, record } => self.backends.get(id) == Some(record),
            Op::AllowSource { id, net } => self.sources.get(id).is_some_and(|known| known.contains(net)),
            Op::ForbidSource { id, net } => !self.sources.get(id).is_some_and(|known| known.contains(net)),
            Op::WriteSlots { base, slots } => {
                (*base..).zip(slots).all(|(position, slot)| self.slots.get(&position) == Some(slot))
            }
            Op::PublishService { id, record } => self.services.get(id) == Some(record),
            Op::PutFrontend { at, value } => self.frontends.get(at) == Some(value),
            Op::DeleteFrontend { at } => !self.frontends.contains_key(at),
            Op::PutAddress { addr, class, keep } => is_class(self.addresses.get(addr), *class, *keep),
            Op::DeleteAddress { addr } => !self.addresses.contains_key(addr),
            Op::PutPorts { index, word, keep } => {
                self.ports.get(index).map_or(0, |known| known.bits) & !keep == word.bits & !keep
            }
            Op::RetireBackend { id } => !self.backends.contains_key(id),
            Op::RetireService { id } => !self.services.contains_key(id),
        }
    }

    fn forbid_source(&mut self, id: ServiceId, net: &IpNet) {
        let Some(known) = self.sources.get_mut(&id) else { return };
        known.remove(net);
        if known.is_empty() {
            self.sources.remove(&id);
        }
    }

    fn put_ports(&mut self, index: u32, bits: u64, keep: u64) {
        let known = self.ports.get(&index).map_or(0, |word| word.bits);
        match bits | known & keep {
            0 => self.ports.remove(&index),
            bits => self.ports.insert(index, PortWord { bits }),
        };
    }
}

/// True if an address has this class, and maybe flags of `keep` beside.
pub fn is_class(known: Option<&AddressClass>, wanted: AddressClass, keep: u32) -> bool {
    known.is_some_and(|known| known.flags & !keep == wanted.flags & !keep && known.flags & wanted.flags == wanted.flags)
}
