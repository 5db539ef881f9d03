//! Services.

use std::collections::BTreeSet;
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::addr::{Addr, Port};

use super::field::{check_part, parse_cidr, parse_port, parse_protocol, parse_unicast};
use super::{Context, Decoded, Error, FieldError, Ignored, Meaning, raw};
use crate::model::{ByFamily, Family, Interner, Kind, Object, Service, ServicePort, StalePolicy, TrafficPolicy};

/// Presence alone means that another proxy serves the service (KEP-2447).
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Where the annotation of [`raw::Annotations::stale_connections`] stands.
const STALE_FIELD: &str = "metadata.annotations[shunt/stale-connections]";
/// core/v1, DefaultClientIPServiceAffinitySeconds.
const DEFAULT_AFFINITY: NonZeroU32 = NonZeroU32::new(10800).expect("not zero");
/// core/v1, the most that validation allows: one day.
const LONGEST_AFFINITY: u32 = 86400;

/// What a Service object means.
pub fn decode_service(object: raw::Service, interner: &mut Interner) -> Result<Decoded, Error> {
    let mut context = Context::new(Kind::Service, &object.metadata, interner)?;
    let spec = object.spec.unwrap_or_default();
    if let Some(reason) = ignored(&object.metadata, &spec) {
        return Ok(context.is(Meaning::Ignored(reason)));
    }
    let service = Service {
        created: created(&object.metadata, &mut context),
        cluster_ips: cluster_ips(&spec, &mut context),
        ports: ports(&spec, &mut context).map_err(|error| context.refuse(error))?,
        external_ips: addresses("spec.externalIPs", spec.external_ips.as_deref(), &mut context),
        load_balancer_ips: load_balancer_ips(object.status.as_ref(), &mut context),
        internal_policy: policy("spec.internalTrafficPolicy", &spec.internal_traffic_policy, &mut context),
        external_policy: external_policy(&spec, &mut context),
        affinity: affinity(&spec, &mut context),
        health_check: health_check(&spec, &mut context),
        source_ranges: source_ranges(&spec, &mut context),
        stale: stale(&object.metadata, &mut context),
    };
    let (namespace, name) = (context.key.namespace.clone(), context.key.name.clone());
    Ok(context.is(Meaning::Object(Object::Service { namespace, name, service: Arc::new(service) })))
}

fn ignored(metadata: &raw::Metadata, spec: &raw::ServiceSpec) -> Option<Ignored> {
    if metadata.label(OTHER_PROXY).is_some() {
        return Some(Ignored::OtherProxy);
    }
    if spec.r#type.as_deref() == Some("ExternalName") {
        return Some(Ignored::ExternalName);
    }
    let first = spec.cluster_ips.as_ref().and_then(|ips| ips.first());
    let is_headless = spec.cluster_ip.as_ref().or(first).is_some_and(|ip| ip == "None");
    is_headless.then_some(Ignored::Headless)
}

fn created(metadata: &raw::Metadata, context: &mut Context<'_>) -> Option<NonZeroU64> {
    let text = metadata.creation_timestamp.as_ref()?;
    match text.parse::<jiff::Timestamp>() {
        Ok(time) => u64::try_from(time.as_second()).ok().and_then(NonZeroU64::new),
        Err(_) => {
            context.left_out("metadata.creationTimestamp", format!("{text:?} is not a time (RFC 3339)"));
            None
        }
    }
}

/// The ClusterIP of each family: `clusterIPs[i]` is of family `ipFamilies[i]`. As the API server does, `clusterIP` stands for a
/// missing `clusterIPs`, and the addresses' own families for missing `ipFamilies`.
fn cluster_ips(spec: &raw::ServiceSpec, context: &mut Context<'_>) -> ByFamily<Option<Addr>> {
    let listed = spec.cluster_ips.clone().filter(|ips| !ips.is_empty());
    let ips = listed.unwrap_or_else(|| spec.cluster_ip.iter().cloned().collect());
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let mut by_family: ByFamily<Option<Addr>> = ByFamily::default();
    for (position, text) in ips.iter().enumerate().filter(|(_, text)| !text.is_empty()) {
        let field = format!("spec.clusterIPs[{position}]");
        let addr = match parse_unicast(text) {
            Ok(addr) => addr,
            Err(message) => {
                context.left_out(field, message);
                continue;
            }
        };
        let family = Family::of(&addr);
        match families.get(position) {
            Some(stated) if *stated != family.name() => {
                context.left_out(field, format!("{text} is not {stated}, as spec.ipFamilies[{position}] says"));
            }
            None if !families.is_empty() => {
                context.left_out(field, format!("spec.ipFamilies has no entry {position} for {text}"));
            }
            _ => _ = by_family.get_mut(family).get_or_insert(addr),
        }
    }
    by_family
}

fn ports(spec: &raw::ServiceSpec, context: &mut Context<'_>) -> Result<Box<[ServicePort]>, FieldError> {
    let ports = spec.ports.iter().flatten().enumerate();
    ports.map(|(position, port)| service_port(&format!("spec.ports[{position}]"), port, context)).collect()
}

fn service_port(field: &str, port: &raw::ServicePort, context: &mut Context<'_>) -> Result<ServicePort, FieldError> {
    let name = port.name.as_deref().unwrap_or_default();
    check_part(&format!("{field}.name"), name)?;
    Ok(ServicePort {
        name: context.interner.name(name),
        protocol: parse_protocol(&format!("{field}.protocol"), port.protocol.as_deref())?,
        port: parse_port(&format!("{field}.port"), port.port.unwrap_or(0))?,
        node_port: node_port(&format!("{field}.nodePort"), port.node_port)?,
    })
}

fn node_port(field: &str, number: Option<i64>) -> Result<Option<Port>, FieldError> {
    match number.unwrap_or(0) {
        0 => Ok(None),
        number => parse_port(field, number).map(Some),
    }
}

fn addresses(field: &str, listed: Option<&[String]>, context: &mut Context<'_>) -> Box<[Addr]> {
    let mut usable = Vec::new();
    for (position, text) in listed.unwrap_or_default().iter().enumerate() {
        match parse_unicast(text) {
            Ok(addr) => usable.push(addr),
            Err(message) => context.left_out(format!("{field}[{position}]"), message),
        }
    }
    usable.into()
}

/// Addresses that this node serves in place of the load balancer. With ipMode `Proxy` the traffic has to go there (KEP-1860).
fn load_balancer_ips(status: Option<&raw::ServiceStatus>, context: &mut Context<'_>) -> Box<[Addr]> {
    let ingress = status.and_then(|status| status.load_balancer.as_ref()).and_then(|status| status.ingress.as_ref());
    let mut usable = Vec::new();
    for (position, entry) in ingress.into_iter().flatten().enumerate() {
        let Some(text) = entry.ip.as_deref().filter(|text| !text.is_empty()) else { continue };
        if entry.ip_mode.as_deref() == Some("Proxy") {
            continue;
        }
        match parse_unicast(text) {
            Ok(addr) => usable.push(addr),
            Err(message) => context.left_out(format!("status.loadBalancer.ingress[{position}].ip"), message),
        }
    }
    usable.into()
}

fn policy(field: &str, name: &Option<String>, context: &mut Context<'_>) -> TrafficPolicy {
    match name.as_deref() {
        None | Some("Cluster" | "") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            context.left_out(field, format!("{other:?} is neither Cluster nor Local; Cluster is used"));
            TrafficPolicy::Cluster
        }
    }
}

/// The external policy, where the API gives it a meaning: services with NodePorts, of type LoadBalancer, or with externalIPs.
fn external_policy(spec: &raw::ServiceSpec, context: &mut Context<'_>) -> TrafficPolicy {
    let policy = policy("spec.externalTrafficPolicy", &spec.external_traffic_policy, context);
    let by_type = matches!(spec.r#type.as_deref(), Some("NodePort" | "LoadBalancer"));
    match by_type || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty()) {
        true => policy,
        false => TrafficPolicy::Cluster,
    }
}

/// The port for health checks, where the API gives it a meaning. Another service is no worse off for a wrong number.
fn health_check(spec: &raw::ServiceSpec, context: &mut Context<'_>) -> Option<Port> {
    const FIELD: &str = "spec.healthCheckNodePort";
    let is_local = spec.external_traffic_policy.as_deref() == Some("Local");
    let number = spec.health_check_node_port.filter(|number| *number != 0)?;
    if spec.r#type.as_deref() != Some("LoadBalancer") || !is_local {
        return None;
    }
    match parse_port(FIELD, number) {
        Ok(port) => Some(port),
        Err(error) => {
            context.left_out(FIELD, error.message + "; no health is served for the service");
            None
        }
    }
}

fn affinity(spec: &raw::ServiceSpec, context: &mut Context<'_>) -> Option<NonZeroU32> {
    match spec.session_affinity.as_deref() {
        None | Some("None" | "") => None,
        Some("ClientIP") => Some(affinity_timeout(spec, context)),
        Some(other) => {
            context.left_out("spec.sessionAffinity", format!("{other:?} is neither ClientIP nor None; None is used"));
            None
        }
    }
}

fn affinity_timeout(spec: &raw::ServiceSpec, context: &mut Context<'_>) -> NonZeroU32 {
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(seconds) = config.and_then(|config| config.timeout_seconds) else { return DEFAULT_AFFINITY };
    let usable = u32::try_from(seconds).ok().filter(|seconds| *seconds <= LONGEST_AFFINITY).and_then(NonZeroU32::new);
    usable.unwrap_or_else(|| {
        let message = format!("{seconds} is not 1 to {LONGEST_AFFINITY} seconds; {DEFAULT_AFFINITY} are used");
        context.left_out("spec.sessionAffinityConfig.clientIP.timeoutSeconds", message);
        DEFAULT_AFFINITY
    })
}

/// What the service says of connections whose endpoint is gone.
fn stale(metadata: &raw::Metadata, context: &mut Context<'_>) -> Option<StalePolicy> {
    let text = metadata.annotations.as_ref()?.stale_connections.as_ref()?;
    text.parse().map_err(|error| context.left_out(STALE_FIELD, format!("{error}; the agent's default is used"))).ok()
}

/// The prefixes that are listed, by family. One of length zero opens its family to all; where one cannot be read, nobody
/// gets in by it, in either family.
fn source_ranges(spec: &raw::ServiceSpec, context: &mut Context<'_>) -> ByFamily<Option<Box<[IpNet]>>> {
    let mut listed: ByFamily<Option<BTreeSet<IpNet>>> = ByFamily::default();
    for (position, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match parse_cidr(text) {
            Ok(net) => _ = listed.get_mut(Family::of(&net.addr().into())).get_or_insert_default().insert(net),
            Err(message) => {
                Family::ALL.into_iter().for_each(|family| _ = listed.get_mut(family).get_or_insert_default());
                context.left_out(format!("spec.loadBalancerSourceRanges[{position}]"), message);
            }
        }
    }
    let allowed = |nets: Option<BTreeSet<IpNet>>| {
        nets.filter(|nets| nets.iter().all(|net| net.prefix_len() != 0)).map(|nets| nets.into_iter().collect())
    };
    ByFamily { v4: allowed(listed.v4), v6: allowed(listed.v6) }
}
