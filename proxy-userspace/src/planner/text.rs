//! The text form of tables and plans: one for the command line, for scenarios and for what a failed test prints.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::abi::address::{AddressClass, PORT_WORDS, PortUse, port_index};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::Cidr;
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::{Range, ServiceRecord};
use proxy_common::addr::{Addr, Port, Proto};

use super::ids::{BackendId, ServiceId};
use super::key::{BackendAddr, FrontendAddr};
use super::plan::{Cidrs, Op, Plan, Subject};
use super::tables::Tables;

/// Names of the flags that are set.
fn flag_names(flags: u32, names: &[(u32, &'static str)]) -> String {
    let set = names.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name);
    set.collect::<Vec<_>>().join(" ")
}

fn class_names(flags: u32) -> String {
    let names = [
        (AddressClass::FRONTEND, "frontend"),
        (AddressClass::CLUSTER_IP, "cluster-ip"),
        (AddressClass::NODE, "node"),
        (AddressClass::NODE_PORT, "node-port"),
        (AddressClass::BACKEND, "backend"),
        (AddressClass::FLOWS, "flows"),
        (AddressClass::ANY_PORT, "any-port"),
    ];
    flag_names(flags, &names)
}

fn frontend_names(at: &FrontendAddr, flags: u32) -> String {
    let names = [
        (FrontendValue::CLUSTER_IP, "cluster-ip"),
        (FrontendValue::INSIDE_LOCAL, "inside-local"),
        (FrontendValue::OUTSIDE_LOCAL, "outside-local"),
        (FrontendValue::PACKETS_ONLY, "packets-only"),
        (FrontendValue::RESTRICTED, "restricted"),
        (FrontendValue::CLOSED_TO_NODE, "closed-to-node"),
    ];
    let kind = if at.is_node_port() { "node-port " } else { "" };
    format!("{kind}{}", flag_names(flags, &names)).trim_end().to_owned()
}

/// `10.96.0.10:80`, `[fd00::1]:80`.
fn socket(addr: &Addr, port: Port) -> String {
    if addr.is_v4() { format!("{addr}:{port}") } else { format!("[{addr}]:{port}") }
}

fn address_of(record: &BackendRecord) -> BackendAddr {
    BackendAddr { addr: record.addr, port: record.port.host(), proto: Proto(record.proto) }
}

fn locality(record: &BackendRecord) -> &'static str {
    if record.is_local() { " (local)" } else { "" }
}

impl fmt::Display for Tables {
    /// Services by name, each with its sets and frontends; then addresses, ports and prefixes. Ids and positions are left
    /// out: they tell nothing about what happens to traffic.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_services(f)?;
        self.write_idle_backends(f)?;
        self.write_addresses(f)?;
        write_ports(f, "node-ports", self.ports_used_for(PortUse::NODE_PORT))?;
        write_ports(f, "snat-ports", self.ports_used_for(PortUse::SNAT))?;
        write_cidrs(f, "service-cidrs", &self.cidrs.service)?;
        write_cidrs(f, "cluster-cidrs", &self.cidrs.cluster)?;
        write_cidrs(f, "pod-cidrs", &self.cidrs.pod)
    }
}

impl Tables {
    fn write_services(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut frontends: BTreeMap<ServiceId, Vec<_>> = BTreeMap::new();
        for (at, value) in &self.frontends {
            frontends.entry(ServiceId(value.service)).or_default().push((at, value));
        }
        let mut names: Vec<_> = self.names.iter().map(|(id, name)| (name.clone(), *id)).collect();
        let unnamed = frontends.keys().filter(|id| !self.names.contains_key(id));
        names.extend(unnamed.map(|id| (format!("without a name, id {id}"), *id)));
        names.sort();
        for (name, id) in names {
            writeln!(f, "service {name}")?;
            self.write_sets(f, id)?;
            if let Some(nets) = self.sources.get(&id) {
                let nets: Vec<_> = nets.iter().map(IpNet::to_string).collect();
                writeln!(f, "  sources  {}", nets.join(", "))?;
            }
            for (at, value) in frontends.remove(&id).unwrap_or_default() {
                let text = format!("  frontend {:<24} {}", socket(&at.addr, at.port), frontend_names(at, value.flags));
                writeln!(f, "{}", text.trim_end())?;
            }
        }
        Ok(())
    }

    fn write_sets(&self, f: &mut fmt::Formatter<'_>, id: ServiceId) -> fmt::Result {
        let record = self.services.get(&id).copied().unwrap_or(ServiceRecord::ZERO);
        writeln!(f, "  cluster  {}", self.set(id, Range::unpack(record.cluster)))?;
        match record.local == record.cluster {
            true => writeln!(f, "  local    the same")?,
            false => writeln!(f, "  local    {}", self.set(id, Range::unpack(record.local)))?,
        }
        match record.affinity {
            0 => Ok(()),
            seconds => writeln!(f, "  affinity {seconds}s"),
        }
    }

    /// The backends of a set, or what happens to connections without one.
    fn set(&self, id: ServiceId, range: Range) -> String {
        match range {
            Range::REJECT => return "reject".to_owned(),
            Range::DROP => return "drop".to_owned(),
            _ => {}
        }
        let slots = (range.base..range.base.saturating_add(range.count)).map(|position| self.slots.get(&position));
        let backends = slots.map(|slot| match slot {
            Some(slot) if slot.owner == id.0 => self.backend(BackendId(slot.backend)),
            Some(slot) => format!("(slot of service {})", slot.owner),
            None => "(unwritten slot)".to_owned(),
        });
        backends.collect::<Vec<_>>().join(", ")
    }

    fn backend(&self, id: BackendId) -> String {
        match self.backends.get(&id).filter(|record| record.is_live()) {
            Some(record) => format!("{}{}", socket(&record.addr, record.port.host()), locality(record)),
            None => format!("(backend {id} is not there)"),
        }
    }

    /// Backends that keep their flows and get no new ones.
    fn write_idle_backends(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.services.values().flat_map(|record| [record.cluster, record.local]).map(Range::unpack);
        let slots = ranges.flat_map(|range| self.slots.range(range.base..range.base.saturating_add(range.count)));
        let listed: BTreeSet<_> = slots.map(|(_, slot)| BackendId(slot.backend)).collect();
        let live = self.backends.iter().filter(|(id, record)| record.is_live() && !listed.contains(id));
        let mut idle: Vec<_> = live.map(|(_, record)| (address_of(record), locality(record))).collect();
        idle.sort();
        idle.iter().try_for_each(|(at, locality)| writeln!(f, "idle-backend {at}{locality}"))
    }

    fn write_addresses(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut addresses: Vec<_> = self.addresses.iter().map(|(addr, class)| (IpAddr::from(*addr), class)).collect();
        addresses.sort_by_key(|(addr, _)| *addr);
        addresses.iter().try_for_each(|(addr, class)| writeln!(f, "address {addr:<16} {}", class_names(class.flags)))
    }

    fn ports_used_for(&self, usage: u64) -> Vec<u16> {
        let used = |port: &u16| {
            let (word, shift) = port_index(Port(*port));
            self.ports.get(&word).is_some_and(|word| word.bits >> shift & usage != 0)
        };
        debug_assert!(self.ports.keys().all(|word| *word < PORT_WORDS));
        (0..=u16::MAX).filter(used).collect()
    }
}

/// Ports, neighbours as ranges; nothing if there is none.
fn write_ports(f: &mut fmt::Formatter<'_>, what: &str, ports: Vec<u16>) -> fmt::Result {
    if ports.is_empty() {
        return Ok(());
    }
    let runs = ports.chunk_by(|a, b| b - a == 1);
    let text = runs.map(|run| match run {
        [port] => port.to_string(),
        _ => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    writeln!(f, "{what} {}", text.collect::<Vec<_>>().join(" "))
}

fn write_cidrs(f: &mut fmt::Formatter<'_>, what: &str, cidrs: &[Cidr]) -> fmt::Result {
    match cidrs.is_empty() {
        true => Ok(()),
        false => writeln!(f, "{what} {}", cidr_list(cidrs)),
    }
}

fn cidr_list(cidrs: &[Cidr]) -> String {
    cidrs.iter().map(cidr_text).collect::<Vec<_>>().join(" ")
}

/// `10.96.0.0/16`. The mask of an IPv4 prefix covers the mapped part, which is not counted.
fn cidr_text(cidr: &Cidr) -> String {
    let ones: u32 = cidr.mask.0.iter().map(|word| word.count_ones()).sum();
    format!("{}/{}", cidr.addr, if cidr.addr.is_v4() { ones - 96 } else { ones })
}

impl fmt::Display for Plan {
    /// Groups with their changes in order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for group in &self.groups {
            writeln!(f, "{}", group.subject)?;
            group.now.iter().try_for_each(|op| writeln!(f, "  {op}"))?;
            group.after_grace.iter().try_for_each(|op| writeln!(f, "  after grace: {op}"))?;
        }
        for (service, problems) in &self.problems {
            match problems.as_slice() {
                [] => writeln!(f, "problem {service}: none any more")?,
                _ => problems.iter().try_for_each(|problem| writeln!(f, "problem {service}: {problem}"))?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("node"),
            Self::Service(key) => write!(f, "service {key}"),
            Self::Leftovers => f.write_str("leftovers"),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PutCidrs(cidrs) => write!(f, "put cidrs {cidrs}"),
            Self::PutName { id, name } => write!(f, "put name {id} {name}"),
            Self::PutBackend { id, record } => write!(f, "put backend {id} {}{}", address_of(record), locality(record)),
            Self::AllowSource { id, net } => write!(f, "let {net} dial service {id}"),
            Self::ForbidSource { id, net } => write!(f, "let {net} dial service {id} no more"),
            Self::WriteSlots { base, slots } => {
                let backends: Vec<_> = slots.iter().map(|slot| slot.backend.to_string()).collect();
                let owner = slots.first().map_or(0, |slot| slot.owner);
                write!(f, "write slots of service {owner} from {base}: backends {}", backends.join(" "))
            }
            Self::PublishService { id, record } => {
                let (cluster, local) = (range_text(record.cluster), range_text(record.local));
                write!(f, "publish service {id}: cluster {cluster}, local {local}, affinity {}s", record.affinity)
            }
            Self::PutFrontend { at, value } => {
                let text =
                    format!("put frontend {at} of service {} {}", value.service, frontend_names(at, value.flags));
                f.write_str(text.trim_end())
            }
            Self::DeleteFrontend { at } => write!(f, "delete frontend {at}"),
            Self::PutAddress { addr, class, .. } => write!(f, "put address {addr} {}", class_names(class.flags)),
            Self::DeleteAddress { addr } => write!(f, "delete address {addr}"),
            Self::PutPorts { index, word, .. } => {
                write!(f, "put ports {}-{} {:#x}", index * 32, index * 32 + 31, word.bits)
            }
            Self::RetireBackend { id } => write!(f, "retire backend {id}"),
            Self::RetireService { id } => write!(f, "retire service {id}"),
        }
    }
}

impl fmt::Display for Cidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (service, cluster, pod) = (cidr_list(&self.service), cidr_list(&self.cluster), cidr_list(&self.pod));
        write!(f, "service [{service}] cluster [{cluster}] pod [{pod}]")
    }
}

/// `slots 0 to 2`, or what happens without slots.
fn range_text(word: u64) -> String {
    match Range::unpack(word) {
        Range::REJECT => "reject".to_owned(),
        Range::DROP => "drop".to_owned(),
        range => format!("slots {} to {}", range.base, u64::from(range.base) + u64::from(range.count) - 1),
    }
}
