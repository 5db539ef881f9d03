//! The fields that are read, as the API spells them. Everything may be missing or null; what is not here is not read.
#![expect(missing_docs, reason = "the Kubernetes API reference documents these fields")]

use std::collections::BTreeMap;

use serde::Deserialize;

/// `metadata` of any object.
#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    pub name: Option<String>,
    pub namespace: Option<String>,
    pub labels: Option<BTreeMap<String, Option<String>>>,
    pub creation_timestamp: Option<String>,
    pub deletion_timestamp: Option<String>,
    pub annotations: Option<Annotations>,
}

/// The annotations that are read; the others cost nothing.
#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Annotations {
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    pub trigger_time: Option<String>,
    #[serde(rename = "shunt/stale-connections")]
    pub stale_connections: Option<String>,
}

impl Metadata {
    /// A label's value; an empty one if it has none.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.as_ref()?.get(name).map(|value| value.as_deref().unwrap_or_default())
    }
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Service {
    pub metadata: Metadata,
    pub spec: Option<ServiceSpec>,
    pub status: Option<ServiceStatus>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    pub r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Option<Vec<String>>,
    pub ip_families: Option<Vec<String>>,
    pub ports: Option<Vec<ServicePort>>,
    #[serde(rename = "externalIPs")]
    pub external_ips: Option<Vec<String>>,
    pub external_traffic_policy: Option<String>,
    pub health_check_node_port: Option<i64>,
    pub internal_traffic_policy: Option<String>,
    pub session_affinity: Option<String>,
    pub session_affinity_config: Option<SessionAffinityConfig>,
    pub load_balancer_source_ranges: Option<Vec<String>>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<i64>,
    pub node_port: Option<i64>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct SessionAffinityConfig {
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIp>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientIp {
    pub timeout_seconds: Option<i64>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    pub load_balancer: Option<LoadBalancer>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct LoadBalancer {
    pub ingress: Option<Vec<Ingress>>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Ingress {
    pub ip: Option<String>,
    pub ip_mode: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    pub metadata: Metadata,
    pub address_type: Option<String>,
    pub endpoints: Option<Vec<Endpoint>>,
    pub ports: Option<Vec<EndpointPort>>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    pub addresses: Option<Vec<String>>,
    pub conditions: Option<Conditions>,
    pub node_name: Option<String>,
    pub hints: Option<Hints>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Hints {
    pub for_zones: Option<Vec<Hint>>,
    pub for_nodes: Option<Vec<Hint>>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Hint {
    pub name: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct EndpointPort {
    pub name: Option<String>,
    pub port: Option<i64>,
    pub protocol: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Endpoints {
    pub metadata: Metadata,
    pub subsets: Option<Vec<Subset>>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct Subset {
    pub addresses: Option<Vec<SubsetAddress>>,
    pub not_ready_addresses: Option<Vec<SubsetAddress>>,
    pub ports: Option<Vec<EndpointPort>>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct SubsetAddress {
    pub ip: Option<String>,
    pub node_name: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Node {
    pub metadata: Metadata,
    pub spec: Option<NodeSpec>,
    pub status: Option<NodeStatus>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<String>>,
    pub taints: Option<Vec<Taint>>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct Taint {
    pub key: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct NodeStatus {
    pub addresses: Option<Vec<NodeAddress>>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct NodeAddress {
    pub r#type: Option<String>,
    pub address: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct ServiceCidr {
    pub metadata: Metadata,
    pub spec: Option<ServiceCidrSpec>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default)]
pub struct ServiceCidrSpec {
    pub cidrs: Option<Vec<String>>,
}
