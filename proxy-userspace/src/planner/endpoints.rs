//! Endpoint selection: which endpoints of a service port get whose connections.
//!
//! The rules are kube-proxy's (pkg/proxy/topology.go, endpointslicecache.go at v1.36); where it leaves an order open, this
//! file states one.

use proxy_common::addr::Proto;

use super::key::BackendAddr;
use super::node::NodeView;
use super::service::PlannedBackend;
use crate::model::{Conditions, Endpoint, Endpoints, Family, Name, Protocol};

/// The backends of a service port, in order of their addresses: everything that may have flows (ready, or still
/// serving), and who gets new connections.
pub(super) fn select(
    endpoints: &Endpoints,
    port: (&Name, Protocol, Proto),
    family: Family,
    node: &NodeView,
) -> Vec<PlannedBackend> {
    let merged = merge(endpoints, port, family);
    let ready = || merged.iter().map(|(_, endpoint)| *endpoint).filter(|endpoint| endpoint.conditions.is_ready());
    let hints = HintUse::of(ready(), node);
    let any_ready = ready().next().is_some();
    let any_local_ready = ready().any(|endpoint| node.is_local(endpoint));
    let listed = merged.iter().filter(|(_, endpoint)| has_flows(endpoint.conditions));
    let backend = |(at, endpoint): &(BackendAddr, &Endpoint)| {
        let is_local = node.is_local(endpoint);
        PlannedBackend {
            at: *at,
            is_local,
            is_ready: endpoint.conditions.is_ready(),
            in_cluster: takes(endpoint.conditions, any_ready) && (!any_ready || hints.allow(endpoint, node)),
            in_local: is_local && takes(endpoint.conditions, any_local_ready),
        }
    };
    listed.map(backend).collect()
}

/// True if connections to it may be alive.
const fn has_flows(conditions: Conditions) -> bool {
    conditions.is_ready() || conditions.is_serving()
}

/// True if it gets new connections in a set that has ready endpoints, or in one that has none (KEP-1669).
const fn takes(conditions: Conditions, any_ready: bool) -> bool {
    match any_ready {
        true => conditions.is_ready(),
        false => conditions.is_serving() && conditions.is_terminating(),
    }
}

/// The endpoints of a service port: each (address, port) once, in order.
///
/// Of duplicates one that is not terminating beats one that is (a pod's address used again). Of several that are not, the
/// last listed counts, of several that are, the first; slices are taken in the order of their names.
fn merge<'a>(
    endpoints: &'a Endpoints,
    (name, protocol, proto): (&Name, Protocol, Proto),
    family: Family,
) -> Vec<(BackendAddr, &'a Endpoint)> {
    let mut all = Vec::new();
    for subset in endpoints.groups().iter().flat_map(|group| group.subsets.iter()) {
        for port in subset.ports.iter().filter(|port| port.protocol == protocol && port.name == *name) {
            let of_family = subset.endpoints.iter().filter(|endpoint| Family::of(&endpoint.addr) == family);
            let at = |endpoint: &'a Endpoint| BackendAddr { addr: endpoint.addr, port: port.port, proto };
            all.extend(of_family.map(|endpoint| (at(endpoint), endpoint)));
        }
    }
    // Stable: duplicates stay in the order in which they were listed.
    all.sort_by_key(|(at, _)| *at);
    all.dedup_by(|later, kept| {
        let same = later.0 == kept.0;
        if same && !later.1.conditions.is_terminating() {
            *kept = *later;
        }
        same
    });
    all
}

/// Which hints count. They count only if every ready endpoint has them and one of them is for us; so one endpoint without
/// hints, or a zone without endpoints, turns them off rather than taking the service away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum HintUse {
    SameNode,
    SameZone,
    None,
}

impl HintUse {
    fn of<'a>(ready: impl Iterator<Item = &'a Endpoint> + Clone, node: &NodeView) -> Self {
        let counts = |given: fn(&Endpoint) -> &[Name], own: &Name| {
            ready.clone().all(|endpoint| !given(endpoint).is_empty())
                && ready.clone().any(|endpoint| given(endpoint).contains(own))
        };
        if counts(node_hints, &node.name) {
            return Self::SameNode;
        }
        match &node.zone {
            Some(zone) if counts(zone_hints, zone) => Self::SameZone,
            _ => Self::None,
        }
    }

    fn allow(self, endpoint: &Endpoint, node: &NodeView) -> bool {
        match (self, &node.zone) {
            (Self::SameNode, _) => node_hints(endpoint).contains(&node.name),
            (Self::SameZone, Some(zone)) => zone_hints(endpoint).contains(zone),
            _ => true,
        }
    }
}

fn node_hints(endpoint: &Endpoint) -> &[Name] {
    endpoint.hints.as_deref().map_or(&[], |hints| &hints.nodes)
}

fn zone_hints(endpoint: &Endpoint) -> &[Name] {
    endpoint.hints.as_deref().map_or(&[], |hints| &hints.zones)
}
