//! Kubernetes objects as files: what a test wants the source `manifests` to read.
//!
//! Objects are written as YAML, each file replaced as a whole: a reader sees the old one or the new one.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::bed::Bed;
use crate::topology::{Addrs, CLUSTER, Cluster, Family, Node, Pod, SERVICES};

/// A folder of objects.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    draft: PathBuf,
    _bed: Arc<Bed>,
}

impl Manifests {
    /// An empty folder.
    #[track_caller]
    pub fn new(bed: &Arc<Bed>) -> Self {
        // Drafts lie beside the folder, on the same file system, where no source looks.
        Self { dir: bed.subdir("manifests"), draft: bed.dir().join("draft"), _bed: bed.clone() }
    }

    /// The nodes of `cluster` and its ServiceCIDR.
    #[track_caller]
    pub fn of(cluster: &Cluster) -> Self {
        let manifests = Self::new(&cluster.bed);
        manifests.write("cluster", &cluster.nodes.iter().map(node).chain([service_cidr()]).collect::<Vec<_>>());
        manifests
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a service and its endpoints, in the place of what was there under its name.
    #[track_caller]
    pub fn apply(&self, service: &Service) {
        self.write(&service.name, &service.objects());
    }

    /// Removes a service and its endpoints.
    #[track_caller]
    pub fn delete(&self, service: &str) {
        let path = self.path(service);
        fs::remove_file(&path).unwrap_or_else(|error| panic!("cannot remove {}: {error}", path.display()));
    }

    /// Writes the file `NAME.yaml` with these objects.
    #[track_caller]
    pub fn write(&self, name: &str, objects: &[Value]) {
        let text: String = objects.iter().map(|object| format!("---\n{}", yaml(object))).collect();
        self.write_text(name, &text);
    }

    /// Writes the file `NAME.yaml` with any text.
    #[track_caller]
    pub fn write_text(&self, name: &str, text: &str) {
        let path = self.path(name);
        let written = fs::write(&self.draft, text).and_then(|()| fs::rename(&self.draft, &path));
        written.unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.yaml"))
    }
}

/// One endpoint of a service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Where it listens, in both families.
    pub addrs: Addrs,
    /// The name of its node.
    pub node: Option<String>,
    /// Takes new connections.
    pub is_ready: bool,
    /// Could serve, if nothing else can.
    pub is_serving: bool,
    /// Is about to end.
    pub is_terminating: bool,
    /// Its zone.
    pub zone: Option<String>,
    /// The zones it is hinted for.
    pub for_zones: Vec<String>,
}

impl Endpoint {
    /// One that is ready.
    pub fn ready(addrs: Addrs, node: &str) -> Self {
        let node = Some(node.to_owned());
        Self { addrs, node, is_ready: true, is_serving: true, is_terminating: false, zone: None, for_zones: vec![] }
    }

    /// One that ends, and still serves or not.
    pub fn terminating(self, is_serving: bool) -> Self {
        Self { is_ready: false, is_serving, is_terminating: true, ..self }
    }

    fn object(&self, family: Family) -> Value {
        let mut object = json!({
            "addresses": [self.addrs.get(family)],
            "conditions": { "ready": self.is_ready, "serving": self.is_serving, "terminating": self.is_terminating },
        });
        if let Some(node) = &self.node {
            object["nodeName"] = json!(node);
        }
        if let Some(zone) = &self.zone {
            object["zone"] = json!(zone);
        }
        if !self.for_zones.is_empty() {
            let zones: Vec<_> = self.for_zones.iter().map(|zone| json!({ "name": zone })).collect();
            object["hints"] = json!({ "forZones": zones });
        }
        object
    }
}

impl From<&Pod> for Endpoint {
    fn from(pod: &Pod) -> Self {
        Self::ready(pod.addrs, &pod.node)
    }
}

/// A pod with the host's network.
impl From<&Node> for Endpoint {
    fn from(node: &Node) -> Self {
        Self::ready(node.addrs, node.name())
    }
}

/// A Service in the namespace `default`, and its EndpointSlices.
#[derive(Clone, Debug)]
pub struct Service {
    name: String,
    spec: Map<String, Value>,
    metadata: Map<String, Value>,
    ingress: Vec<IpAddr>,
    ports: Vec<ServicePort>,
    endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug)]
struct ServicePort {
    proto: &'static str,
    port: u16,
    target: u16,
    node_port: Option<u16>,
}

impl ServicePort {
    /// Unique in its service: `tcp-80`.
    fn name(&self) -> String {
        format!("{}-{}", self.proto.to_lowercase(), self.port)
    }
}

/// A service without addresses, ports and endpoints.
pub fn service(name: &str) -> Service {
    Service {
        name: name.to_owned(),
        spec: Map::new(),
        metadata: Map::new(),
        ingress: vec![],
        ports: vec![],
        endpoints: vec![],
    }
}

impl Service {
    /// With ClusterIPs.
    pub fn cluster_ips(self, addrs: Addrs) -> Self {
        self.spec("clusterIPs", json!([addrs.v4, addrs.v6])).spec("clusterIP", json!(addrs.v4))
    }

    /// With a TCP port that leads to the endpoints' port `target`.
    pub fn tcp(self, port: u16, target: u16) -> Self {
        self.port(ServicePort { proto: "TCP", port, target, node_port: None })
    }

    /// With a UDP port that leads to the endpoints' port `target`.
    pub fn udp(self, port: u16, target: u16) -> Self {
        self.port(ServicePort { proto: "UDP", port, target, node_port: None })
    }

    fn port(mut self, port: ServicePort) -> Self {
        self.ports.push(port);
        self
    }

    /// The port added last gets a NodePort; the service's type becomes NodePort unless it is LoadBalancer.
    pub fn node_port(mut self, node_port: u16) -> Self {
        self.ports.last_mut().expect("a port was added before").node_port = Some(node_port);
        self.at_least("NodePort")
    }

    /// With external addresses.
    pub fn external_ips(self, addrs: Addrs) -> Self {
        self.spec("externalIPs", json!([addrs.v4, addrs.v6]))
    }

    /// With addresses of a load balancer.
    pub fn load_balancer(mut self, addrs: Addrs) -> Self {
        self.ingress = vec![addrs.v4.into(), addrs.v6.into()];
        self.spec("type", json!("LoadBalancer"))
    }

    fn at_least(mut self, kind: &str) -> Self {
        self.spec.entry("type").or_insert_with(|| json!(kind));
        self
    }

    /// With a field of the specification, for example `externalTrafficPolicy`.
    pub fn spec(mut self, field: &str, value: Value) -> Self {
        self.spec.insert(field.to_owned(), value);
        self
    }

    /// With a field of the metadata, for example `annotations`.
    pub fn metadata(mut self, field: &str, value: Value) -> Self {
        self.metadata.insert(field.to_owned(), value);
        self
    }

    /// With these endpoints and no others.
    pub fn endpoints(mut self, endpoints: impl IntoIterator<Item = impl Into<Endpoint>>) -> Self {
        self.endpoints = endpoints.into_iter().map(Into::into).collect();
        self
    }

    /// The Service and one EndpointSlice a family.
    pub fn objects(&self) -> Vec<Value> {
        let slices = [("IPv4", Family::V4), ("IPv6", Family::V6)].map(|(name, family)| self.slice(name, family));
        std::iter::once(self.object()).chain(slices).collect()
    }

    fn object(&self) -> Value {
        let mut metadata = self.metadata.clone();
        metadata.insert("name".into(), json!(self.name));
        metadata.insert("namespace".into(), json!("default"));
        let mut spec = self.spec.clone();
        spec.entry("type").or_insert_with(|| json!("ClusterIP"));
        spec.insert("ipFamilies".into(), json!(["IPv4", "IPv6"]));
        spec.insert("ipFamilyPolicy".into(), json!("RequireDualStack"));
        spec.insert("ports".into(), self.ports.iter().map(port_object).collect());
        let ingress: Vec<_> = self.ingress.iter().map(|ip| json!({ "ip": ip, "ipMode": "VIP" })).collect();
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec,
            "status": { "loadBalancer": { "ingress": ingress } },
        })
    }

    fn slice(&self, name: &str, family: Family) -> Value {
        let port = |port: &ServicePort| json!({ "name": port.name(), "protocol": port.proto, "port": port.target });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": name,
            "metadata": {
                "name": format!("{}-{}", self.name, name.to_lowercase()), "namespace": "default",
                "labels": { "kubernetes.io/service-name": self.name },
            },
            "ports": self.ports.iter().map(port).collect::<Vec<_>>(),
            "endpoints": self.endpoints.iter().map(|endpoint| endpoint.object(family)).collect::<Vec<_>>(),
        })
    }
}

fn port_object(port: &ServicePort) -> Value {
    let mut object =
        json!({ "name": port.name(), "protocol": port.proto, "port": port.port, "targetPort": port.target });
    if let Some(node_port) = port.node_port {
        object["nodePort"] = json!(node_port);
    }
    object
}

/// The Node object of a node.
pub fn node(node: &Node) -> Value {
    let addresses: Vec<_> =
        Family::ALL.map(|family| json!({ "type": "InternalIP", "address": node.addrs.get(family) })).to_vec();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": node.name(), "labels": { "kubernetes.io/hostname": node.name() } },
        "spec": { "podCIDR": node.pod_cidr.v4(), "podCIDRs": [node.pod_cidr.v4(), node.pod_cidr.v6()] },
        "status": { "addresses": addresses },
    })
}

/// The ServiceCIDR object of every cluster here.
pub fn service_cidr() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": [SERVICES.v4(), SERVICES.v6()] },
    })
}

/// The value of `--cluster-cidr`.
pub fn cluster_cidr() -> String {
    CLUSTER.to_string()
}

/// A value as YAML in block style, ended by a line break.
fn yaml(value: &Value) -> String {
    let mut text = String::new();
    write_yaml(value, 0, &mut text);
    text
}

/// Writes `value` as lines indented by `depth`; JSON's scalars and empty collections are YAML's too (YAML 1.2, section 1.3).
fn write_yaml(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                text.push_str(&format!("{indent}{name}:"));
                write_field(field, depth, text);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                text.push_str(&format!("{indent}-"));
                write_field(item, depth, text);
            }
        }
        scalar => text.push_str(&format!("{indent}{scalar}\n")),
    }
}

fn write_field(value: &Value, depth: usize, text: &mut String) {
    let is_block = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if is_block {
        text.push('\n');
        write_yaml(value, depth + 1, text);
    } else {
        text.push_str(&format!(" {value}\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_in_blocks_with_quoted_scalars() {
        let value =
            json!({ "kind": "Service", "list": [1, { "a": true, "b": [] }], "none": null, "deep": { "x": "a: b" } });
        let lines = [
            "deep:",
            "  x: \"a: b\"",
            "kind: \"Service\"",
            "list:",
            "  - 1",
            "  -",
            "    a: true",
            "    b: []",
            "none: null",
        ];
        assert_eq!(yaml(&value).lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn services_name_their_slices_and_ports() {
        let web = service("web").cluster_ips(SERVICES.host(10)).tcp(80, 8080).node_port(30080).udp(53, 5353);
        let objects = web.endpoints([Endpoint::ready(CLUSTER.host(10), "node-1")]).objects();
        assert_eq!(objects[0]["spec"]["type"], "NodePort");
        assert_eq!(objects[0]["spec"]["ports"][0]["nodePort"], 30080);
        assert_eq!(objects[0]["spec"]["clusterIPs"], json!(["10.96.0.10", "fd00:10:96::a"]));
        assert_eq!(objects[2]["metadata"]["labels"]["kubernetes.io/service-name"], "web");
        assert_eq!(objects[2]["endpoints"][0]["addresses"][0], "fd00:10:244::a");
        assert_eq!(objects[1]["ports"][1], json!({ "name": "udp-53", "protocol": "UDP", "port": 5353 }));
    }
}
