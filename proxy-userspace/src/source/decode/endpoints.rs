//! EndpointSlices and legacy Endpoints.

use std::num::NonZeroU64;
use std::sync::Arc;

use super::field::{check_part, parse_port, parse_protocol, parse_unicast};
use super::{Context, Decoded, Error, FieldError, Ignored, Meaning, raw};
use crate::model::{
    Conditions, Endpoint, EndpointGroup, EndpointPort, EndpointSubset, Family, GroupKind, Hints, Interner, Kind, Name,
    Object,
};

/// Names the service of a slice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Presence alone means that the endpoints belong to a headless service.
const HEADLESS: &str = "service.kubernetes.io/headless";

/// What an EndpointSlice object means.
pub fn decode_slice(object: raw::EndpointSlice, interner: &mut Interner) -> Result<Decoded, Error> {
    let mut context = Context::new(Kind::EndpointSlice, &object.metadata, interner)?;
    if object.metadata.label(HEADLESS).is_some() {
        return Ok(context.is(Meaning::Ignored(Ignored::Headless)));
    }
    let Some(service) = object.metadata.label(SERVICE_NAME).filter(|name| !name.is_empty()) else {
        context.left_out("metadata.labels", format!("{SERVICE_NAME} is missing: the slice belongs to no service"));
        return Ok(context.is(Meaning::Ignored(Ignored::NoService)));
    };
    let service = context.interner.name(service);
    let triggered = triggered(&object.metadata, &mut context);
    let family = address_type(object.address_type.as_deref()).map_err(|error| context.refuse(error))?;
    let ports = ports("ports", object.ports, &mut context).map_err(|error| context.refuse(error))?;
    let listed = object.endpoints.unwrap_or_default().into_iter().enumerate();
    let endpoints =
        listed.filter_map(|(position, endpoint)| slice_endpoint(position, endpoint, family, &mut context)).collect();
    let subsets = Box::new([EndpointSubset { ports, endpoints }]);
    Ok(group(context, service, GroupKind::Slice, subsets, triggered))
}

/// What a legacy Endpoints object means.
pub fn decode_endpoints(object: raw::Endpoints, interner: &mut Interner) -> Result<Decoded, Error> {
    let mut context = Context::new(Kind::Endpoints, &object.metadata, interner)?;
    if object.metadata.label(HEADLESS).is_some() {
        return Ok(context.is(Meaning::Ignored(Ignored::Headless)));
    }
    let listed = object.subsets.unwrap_or_default().into_iter().enumerate();
    let subsets: Result<Box<[_]>, _> =
        listed.map(|(position, listed)| subset(position, listed, &mut context)).collect();
    let subsets = subsets.map_err(|error| context.refuse(error))?;
    let service = context.key.name.clone();
    let triggered = triggered(&object.metadata, &mut context);
    Ok(group(context, service, GroupKind::Legacy, subsets, triggered))
}

/// When the change happened that led to this state of the object: nanoseconds since 1970.
fn triggered(metadata: &raw::Metadata, context: &mut Context<'_>) -> Option<NonZeroU64> {
    let text = metadata.annotations.as_ref()?.trigger_time.as_ref()?;
    match text.parse::<jiff::Timestamp>() {
        Ok(time) => u64::try_from(time.as_nanosecond()).ok().and_then(NonZeroU64::new),
        Err(_) => {
            context.left_out("metadata.annotations", format!("{text:?} is not a time (RFC 3339)"));
            None
        }
    }
}

fn group(
    context: Context<'_>,
    service: Name,
    kind: GroupKind,
    subsets: Box<[EndpointSubset]>,
    triggered: Option<NonZeroU64>,
) -> Decoded {
    let (namespace, name) = (context.key.namespace.clone(), context.key.name.clone());
    let group = Arc::new(EndpointGroup { kind, name, subsets });
    context.is(Meaning::Object(Object::Endpoints { namespace, service, group, triggered }))
}

fn address_type(name: Option<&str>) -> Result<Family, FieldError> {
    let name = name.unwrap_or_default();
    Family::from_name(name)
        .ok_or_else(|| FieldError::new("addressType", format!("{name:?} is not supported: slices are IPv4 or IPv6")))
}

/// Ports; one without a number stands for every port, which services do not have, and is left out.
fn ports(
    field: &str,
    listed: Option<Vec<raw::EndpointPort>>,
    context: &mut Context<'_>,
) -> Result<Box<[EndpointPort]>, FieldError> {
    let mut ports = Vec::new();
    for (position, port) in listed.unwrap_or_default().into_iter().enumerate() {
        let field = format!("{field}[{position}]");
        let Some(number) = port.port.filter(|number| *number != 0) else { continue };
        let name = port.name.as_deref().unwrap_or_default();
        check_part(&format!("{field}.name"), name)?;
        ports.push(EndpointPort {
            name: context.interner.name(name),
            protocol: parse_protocol(&format!("{field}.protocol"), port.protocol.as_deref())?,
            port: parse_port(&format!("{field}.port"), number)?,
        });
    }
    Ok(ports.into())
}

/// An endpoint by the first of its addresses; the others are not used.
fn slice_endpoint(
    position: usize,
    endpoint: raw::Endpoint,
    family: Family,
    context: &mut Context<'_>,
) -> Option<Endpoint> {
    let text = endpoint.addresses.as_ref().and_then(|addresses| addresses.first())?;
    let field = format!("endpoints[{position}].addresses[0]");
    let addr = match parse_unicast(text) {
        Ok(addr) if Family::of(&addr) == family => addr,
        Ok(_) => {
            context.left_out(field, format!("{text} is not {family}, as addressType says"));
            return None;
        }
        Err(message) => {
            context.left_out(field, message);
            return None;
        }
    };
    let conditions = endpoint.conditions.unwrap_or_default();
    Some(Endpoint {
        addr,
        node: node_name(endpoint.node_name, context),
        hints: endpoint.hints.and_then(|hints| self::hints(hints, context)),
        conditions: Conditions::new(conditions.ready, conditions.serving, conditions.terminating),
    })
}

fn node_name(name: Option<String>, context: &mut Context<'_>) -> Option<Name> {
    name.filter(|name| !name.is_empty()).map(|name| context.interner.name(&name))
}

fn hints(hints: raw::Hints, context: &mut Context<'_>) -> Option<Arc<Hints>> {
    let mut names = |listed: Option<Vec<raw::Hint>>| -> Box<[Name]> {
        listed.into_iter().flatten().filter_map(|hint| node_name(hint.name, context)).collect()
    };
    let hints = Hints { zones: names(hints.for_zones), nodes: names(hints.for_nodes) };
    (hints != Hints::default()).then(|| context.interner.hints(hints))
}

fn subset(position: usize, subset: raw::Subset, context: &mut Context<'_>) -> Result<EndpointSubset, FieldError> {
    let field = format!("subsets[{position}]");
    let ports = ports(&format!("{field}.ports"), subset.ports, context)?;
    let ready = Conditions::new(Some(true), Some(true), None);
    let not_ready = Conditions::new(Some(false), Some(false), None);
    let mut endpoints = subset_endpoints(&format!("{field}.addresses"), subset.addresses, ready, context);
    endpoints.extend(subset_endpoints(
        &format!("{field}.notReadyAddresses"),
        subset.not_ready_addresses,
        not_ready,
        context,
    ));
    Ok(EndpointSubset { ports, endpoints: endpoints.into() })
}

fn subset_endpoints(
    field: &str,
    listed: Option<Vec<raw::SubsetAddress>>,
    conditions: Conditions,
    context: &mut Context<'_>,
) -> Vec<Endpoint> {
    let mut endpoints = Vec::new();
    for (position, address) in listed.unwrap_or_default().into_iter().enumerate() {
        match parse_unicast(address.ip.as_deref().unwrap_or_default()) {
            Ok(addr) => {
                let node = node_name(address.node_name, context);
                endpoints.push(Endpoint { addr, node, hints: None, conditions });
            }
            Err(message) => context.left_out(format!("{field}[{position}].ip"), message),
        }
    }
    endpoints
}
