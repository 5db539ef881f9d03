//! Nodes and ServiceCIDRs.

use std::sync::Arc;

use ipnet::IpNet;

use super::field::{parse_cidr, parse_ip};
use super::{Context, Decoded, Error, Meaning, raw};
use crate::model::{Family, Interner, Kind, Node, Object, PrimaryAddresses, ServiceCidr};

/// Where a node stands.
const ZONE: &str = "topology.kubernetes.io/zone";

/// Taint by which the cluster autoscaler announces that a node goes (KEP-3836).
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What a Node object means.
pub fn decode_node(object: raw::Node, interner: &mut Interner) -> Result<Decoded, Error> {
    let mut context = Context::new(Kind::Node, &object.metadata, interner)?;
    let spec = object.spec.unwrap_or_default();
    let is_leaving = object.metadata.deletion_timestamp.is_some() || is_to_be_deleted(&spec);
    let listed = spec.pod_cidrs.filter(|cidrs| !cidrs.is_empty());
    let pod_cidrs = listed.unwrap_or_else(|| spec.pod_cidr.into_iter().filter(|cidr| !cidr.is_empty()).collect());
    let zone = object.metadata.label(ZONE).filter(|zone| !zone.is_empty()).map(|zone| context.interner.name(zone));
    let node = Node {
        zone,
        pod_cidrs: cidrs("spec.podCIDRs", &pod_cidrs, &mut context),
        addresses: primary_addresses(object.status.and_then(|status| status.addresses).unwrap_or_default()),
        is_leaving,
    };
    let name = context.key.name.clone();
    Ok(context.is(Meaning::Object(Object::Node { name, node: Arc::new(node) })))
}

/// True if the cluster autoscaler has said that it will delete the node, whatever value and effect it gave the taint.
fn is_to_be_deleted(spec: &raw::NodeSpec) -> bool {
    spec.taints.iter().flatten().any(|taint| taint.key.as_deref() == Some(TO_BE_DELETED))
}

/// What a ServiceCIDR object means.
pub fn decode_service_cidr(object: raw::ServiceCidr, interner: &mut Interner) -> Result<Decoded, Error> {
    let mut context = Context::new(Kind::ServiceCidr, &object.metadata, interner)?;
    let listed = object.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
    let cidr = ServiceCidr { cidrs: cidrs("spec.cidrs", &listed, &mut context) };
    let name = context.key.name.clone();
    Ok(context.is(Meaning::Object(Object::ServiceCidr { name, cidr: Arc::new(cidr) })))
}

fn cidrs(field: &str, listed: &[String], context: &mut Context<'_>) -> Box<[IpNet]> {
    let mut usable = Vec::new();
    for (position, text) in listed.iter().enumerate() {
        match parse_cidr(text) {
            Ok(net) => usable.push(net),
            Err(message) => context.left_out(format!("{field}[{position}]"), message),
        }
    }
    usable.into()
}

/// The first InternalIP of each family, else the first ExternalIP. Host names stand in the same list and are passed over.
fn primary_addresses(addresses: Vec<raw::NodeAddress>) -> PrimaryAddresses {
    let mut primary = PrimaryAddresses::default();
    for kind in ["InternalIP", "ExternalIP"] {
        let of_kind = addresses.iter().filter(|address| address.r#type.as_deref() == Some(kind));
        for ip in of_kind.filter_map(|address| parse_ip(address.address.as_deref()?)) {
            let addr = ip.into();
            primary.get_mut(Family::of(&addr)).get_or_insert(addr);
        }
    }
    primary
}
