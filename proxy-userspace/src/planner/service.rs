//! One service, its endpoints and this node: what should be programmed.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::Range;
use proxy_common::addr::{Addr, Port, Proto};

use super::endpoints;
use super::health_check::PlannedCheck;
use super::key::{BackendAddr, FrontendAddr};
use super::node::NodeView;
use super::problem::Problem;
use crate::model::{Endpoints, Family, Name, Service, ServicePort, TrafficPolicy};

/// What should be programmed for one service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServicePlan {
    /// Its ports, each once per family.
    pub ports: Vec<PortPlan>,
    /// What it tells load balancers of this node.
    pub health_check: Option<PlannedCheck>,
    /// What it asks for that cannot be done.
    pub problems: Vec<Problem>,
}

/// What should be programmed for one service port in one family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortPlan {
    /// Name of the port.
    pub port: Name,
    /// Its protocol.
    pub proto: Proto,
    /// The family.
    pub family: Family,
    /// Every backend that may have flows, in order of their addresses.
    pub backends: Vec<PlannedBackend>,
    /// Seconds of session affinity; 0: none.
    pub affinity: u32,
    /// What clients dial, the strongest claim first; each address once.
    pub frontends: Vec<PlannedFrontend>,
    /// Who may dial its restricted frontends; each prefix once, in order.
    pub sources: Vec<IpNet>,
}

/// A backend of one service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedBackend {
    /// Where it listens.
    pub at: BackendAddr,
    /// It runs on this node.
    pub is_local: bool,
    /// It is ready.
    pub is_ready: bool,
    /// It gets new connections of those who get the cluster set.
    pub in_cluster: bool,
    /// It gets new connections of those who get the local set.
    pub in_local: bool,
}

/// Kinds of frontends, the stronger claim first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum FrontendKind {
    /// A ClusterIP.
    ClusterIp,
    /// An address in the status of the load balancer.
    LoadBalancer,
    /// One of externalIPs.
    ExternalIp,
    /// A port of the node's own addresses.
    NodePort,
}

/// A frontend of one service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PlannedFrontend {
    /// What clients dial.
    pub at: FrontendAddr,
    /// Its kind.
    pub kind: FrontendKind,
    /// Flags of its record.
    pub flags: u32,
}

/// The slots of a service port, and which of them are its sets. Ranges count from the first slot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Backends in slot order.
    pub slots: Vec<BackendAddr>,
    /// The cluster set.
    pub cluster: Range,
    /// The local set.
    pub local: Range,
}

/// What should be programmed for a service with these endpoints on this node.
pub fn plan_service(service: &Service, endpoints: &Endpoints, node: &NodeView) -> ServicePlan {
    let mut plan = ServicePlan::default();
    let families = Family::ALL.into_iter().filter_map(|family| Some((family, (*service.cluster_ips.get(family))?)));
    let families: Vec<_> = families.collect();
    if families.is_empty() {
        plan.problems.push(Problem::NoClusterIp);
        return plan;
    }
    for (position, port) in service.ports.iter().enumerate() {
        let Some(proto) = usable_protocol(&service.ports[..position], port, &mut plan.problems) else { continue };
        for (family, cluster_ip) in &families {
            plan.ports.push(plan_port(service, endpoints, node, (port, proto), (*family, *cluster_ip)));
        }
    }
    plan.health_check = service.health_check.map(|port| PlannedCheck::new(port, service, &plan.ports));
    plan
}

/// The protocol of a port, unless the port has to be left out.
fn usable_protocol(before: &[ServicePort], port: &ServicePort, problems: &mut Vec<Problem>) -> Option<Proto> {
    let Some(proto) = port.protocol.proto() else {
        problems.push(Problem::Sctp { name: port.name.clone(), port: port.port });
        return None;
    };
    if before.iter().any(|other| other.name == port.name && other.protocol == port.protocol) {
        problems.push(Problem::DuplicatePort { name: port.name.clone(), port: port.port });
        return None;
    }
    Some(proto)
}

fn plan_port(
    service: &Service,
    endpoints: &Endpoints,
    node: &NodeView,
    (port, proto): (&ServicePort, Proto),
    (family, cluster_ip): (Family, Addr),
) -> PortPlan {
    PortPlan {
        port: port.name.clone(),
        proto,
        family,
        backends: endpoints::select(endpoints, (&port.name, port.protocol, proto), family, node),
        affinity: service.affinity.map_or(0, |seconds| seconds.get()),
        frontends: frontends(service, node, (port, proto), (family, cluster_ip)),
        sources: sources(service, node, family),
    }
}

/// Clients that may dial the load-balancer addresses; empty also if all may. A node in the ranges may dial them by their own
/// address too: it has that where it announces them.
fn sources(service: &Service, node: &NodeView, family: Family) -> Vec<IpNet> {
    let Some(listed) = service.source_ranges.get(family) else { return Vec::new() };
    let balanced = service.load_balancer_ips.iter().filter(|addr| Family::of(addr) == family);
    if balanced.clone().next().is_none() {
        return Vec::new();
    }
    let own = balanced.filter(|_| is_in(listed, node, family)).map(|addr| IpNet::from(IpAddr::from(*addr)));
    let all: BTreeSet<_> = listed.iter().copied().chain(own).collect();
    all.into_iter().collect()
}

/// True if the node's main address of the family is in one of the prefixes.
fn is_in(listed: &[IpNet], node: &NodeView, family: Family) -> bool {
    node.primary.get(family).is_some_and(|addr| listed.iter().any(|net| net.contains(&IpAddr::from(addr))))
}

/// What clients of a service port can dial in one family.
fn frontends(
    service: &Service,
    node: &NodeView,
    (port, proto): (&ServicePort, Proto),
    (family, cluster_ip): (Family, Addr),
) -> Vec<PlannedFrontend> {
    let of_family = move |addr: &&Addr| Family::of(addr) == family;
    let at = |addr: Addr, port: Port| FrontendAddr { addr, port, proto };
    let balanced = service.load_balancer_ips.iter().filter(of_family);
    let external = service.external_ips.iter().filter(of_family);
    let mut all = vec![(FrontendKind::ClusterIp, at(cluster_ip, port.port))];
    all.extend(balanced.map(|addr| (FrontendKind::LoadBalancer, at(*addr, port.port))));
    all.extend(external.map(|addr| (FrontendKind::ExternalIp, at(*addr, port.port))));
    all.extend(port.node_port.map(|port| (FrontendKind::NodePort, at(family.wildcard(), port))));
    // Stable: of one address with several kinds the strongest is kept.
    all.sort_by_key(|(_, at)| *at);
    all.dedup_by_key(|(_, at)| *at);
    all.sort_by_key(|(kind, at)| (*kind, *at));
    let closed = closed(service, node, family);
    let flags = |kind| flags(service, kind) | if kind == FrontendKind::LoadBalancer { closed } else { 0 };
    all.into_iter().map(|(kind, at)| PlannedFrontend { at, kind, flags: flags(kind) }).collect()
}

/// Who gets the local set by a frontend of this kind. To an external address, clients inside always get the cluster set.
fn flags(service: &Service, kind: FrontendKind) -> u32 {
    let local = |policy: TrafficPolicy, flags: u32| if policy == TrafficPolicy::Local { flags } else { 0 };
    let both = FrontendValue::INSIDE_LOCAL | FrontendValue::OUTSIDE_LOCAL;
    match kind {
        FrontendKind::ClusterIp => FrontendValue::CLUSTER_IP | local(service.internal_policy, both),
        _ => local(service.external_policy, FrontendValue::OUTSIDE_LOCAL),
    }
}

/// To whom the load-balancer addresses of a family are closed. Source ranges are asked by the packet path, which knows the
/// client's address; for the node's own processes they are asked here.
fn closed(service: &Service, node: &NodeView, family: Family) -> u32 {
    match service.source_ranges.get(family) {
        None => 0,
        Some(listed) if is_in(listed, node, family) => FrontendValue::RESTRICTED | FrontendValue::PACKETS_ONLY,
        Some(_) => FrontendValue::RESTRICTED | FrontendValue::PACKETS_ONLY | FrontendValue::CLOSED_TO_NODE,
    }
}

impl PortPlan {
    /// The slots, and the two sets in them.
    ///
    /// Equal sets share their slots. A set that no frontend uses is the other one, so that a frontend whose policy is
    /// about to change meets backends at every moment.
    pub fn layout(&self) -> Layout {
        let members = |of: fn(&PlannedBackend) -> bool| -> Vec<BackendAddr> {
            self.backends.iter().filter(|backend| of(backend)).map(|backend| backend.at).collect()
        };
        let (cluster, local) = (members(|backend| backend.in_cluster), members(|backend| backend.in_local));
        let cluster_range = range(0, &cluster, Range::REJECT);
        let if_no_local = if cluster.is_empty() { Range::REJECT } else { Range::DROP };
        let share = |slots: Vec<BackendAddr>, range: Range| Layout { slots, cluster: range, local: range };
        if !self.uses_local() || cluster == local {
            return share(cluster, cluster_range);
        }
        if !self.uses_cluster() {
            let range = range(0, &local, if_no_local);
            return share(local, range);
        }
        let local_range = range(cluster.len() as u32, &local, if_no_local);
        Layout { slots: [cluster, local].concat(), cluster: cluster_range, local: local_range }
    }

    /// True if some frontend sends some clients to the local set.
    fn uses_local(&self) -> bool {
        self.frontends.iter().any(|frontend| frontend.flags & LOCAL_FLAGS != 0)
    }

    /// True if some frontend sends some clients to the cluster set.
    fn uses_cluster(&self) -> bool {
        self.frontends.iter().any(|frontend| frontend.flags & LOCAL_FLAGS != LOCAL_FLAGS)
    }
}

const LOCAL_FLAGS: u32 = FrontendValue::INSIDE_LOCAL | FrontendValue::OUTSIDE_LOCAL;

fn range(base: u32, members: &[BackendAddr], if_empty: Range) -> Range {
    match members.len() as u32 {
        0 => if_empty,
        count => Range { base, count },
    }
}
