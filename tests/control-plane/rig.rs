//! A control plane, two nodes with agents that follow it, and pods that are namespaces with servers.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use shunt_tests::agent::Agent;
use shunt_tests::control_plane::kubelet::{FakeKubelet, NodeSpec, Pod, PodRuntime};
use shunt_tests::control_plane::{Api, ControlPlane, Identity, Kind, Options};
use shunt_tests::place::Place;
use shunt_tests::topology::{self, Cluster, Family, Plan, UNDERLAY};
use shunt_tests::traffic::{Ports, Server};
use shunt_tests::wait::{until, until_some};

/// Where the servers of pods listen.
pub const TARGET: u16 = 8080;
/// Where services listen.
pub const PORT: u16 = 80;

/// Everything a test needs; fields are dropped in this order.
pub struct Rig {
    pub kubelet: FakeKubelet,
    pub agents: Vec<Agent>,
    pub plane: ControlPlane,
    pub pods: Arc<Pods>,
}

impl Rig {
    /// A control plane and two nodes, each with an agent that follows it.
    #[track_caller]
    pub fn new() -> Self {
        let mut rig = Self::without_agents();
        rig.start_agents();
        rig
    }

    /// Starts the agents and waits until they serve.
    #[track_caller]
    pub fn start_agents(&mut self) {
        self.agents.iter_mut().for_each(Agent::spawn);
        self.agents.iter().for_each(|agent| drop(agent.wait_log("first plan applied")));
    }

    /// The same with agents that are not started yet.
    #[track_caller]
    pub fn without_agents() -> Self {
        let cluster = Cluster::build(Plan { nodes: 2, pods: 2, ..Plan::default() });
        // On the router of the underlay: reached before any service is.
        let options = Options { address: UNDERLAY.host(1).v4.into(), ..Options::default() };
        let plane = ControlPlane::start_with(&cluster.bed, cluster.net.ns(), options);
        let kubeconfig = plane.kubeconfig(Identity::KubeProxy);
        let agent = |node| Agent::new(&cluster, node).with("--kubeconfig", &kubeconfig);
        let agents = cluster.nodes.iter().map(agent).collect();
        let nodes: Vec<_> = cluster.nodes.iter().map(node_spec).collect();
        let pods = Arc::new(Pods { cluster: Mutex::new(cluster), running: Mutex::default() });
        let kubelet = FakeKubelet::start(plane.api(), nodes, pods.clone());
        Self { kubelet, agents, plane, pods }
    }

    pub fn api(&self) -> &Api {
        self.plane.api()
    }

    /// Clients of every kind.
    pub fn clients(&self) -> Clients {
        let cluster = self.pods.cluster();
        let [one, two] = [0, 1].map(|pod| cluster.nodes[0].pods[pod].place.clone());
        Clients { by_socket: one, by_packets: two.unhooked(), outside: cluster.client.place.clone() }
    }

    /// Where a service is reached from inside: its ClusterIP of each family.
    pub fn cluster_addresses(&self, service: &Value) -> Vec<SocketAddr> {
        let ips = service["spec"]["clusterIPs"].as_array().expect("the server gives them");
        let ip = |ip: &Value| ip.as_str().expect("text").parse::<IpAddr>().expect("an address");
        ips.iter().map(|text| SocketAddr::new(ip(text), PORT)).collect()
    }

    /// Where a service is reached from outside: its NodePort on every node, in each family.
    pub fn node_addresses(&self, service: &Value) -> Vec<SocketAddr> {
        self.node_addresses_of(service, 0)
    }

    /// The same for the port of a position among the service's ports.
    pub fn node_addresses_of(&self, service: &Value, position: usize) -> Vec<SocketAddr> {
        let port = service["spec"]["ports"][position]["nodePort"].as_u64().expect("the server gives one");
        let port = u16::try_from(port).expect("a port");
        let cluster = self.pods.cluster();
        let addrs = cluster.nodes.iter().map(|node| node.addrs);
        addrs.flat_map(|addrs| Family::ALL.map(|family| addrs.port(family, port))).collect()
    }

    /// The answer of a node's agent to a request from the node itself.
    #[track_caller]
    pub fn get(&self, node: usize, port: u16, path: &str) -> String {
        let place = self.pods.cluster().nodes[node].place.clone();
        let answer = place.run(|| get(SocketAddr::from(([127, 0, 0, 1], port)), path));
        answer.unwrap_or_else(|error| panic!("GET {path} on port {port} of node {node}: {error}"))
    }

    /// The answer to a request from outside, if there is one.
    pub fn try_get_at(&self, to: SocketAddr, path: &str) -> io::Result<String> {
        let client = self.pods.cluster().client.place.clone();
        client.run(|| get(to, path))
    }

    /// The samples of a metric of a node's agent, as they are written.
    #[track_caller]
    pub fn scrape(&self, node: usize, metric: &str) -> Vec<String> {
        let text = self.get(node, 10249, "/metrics");
        text.lines().filter(|line| line.starts_with(metric)).map(str::to_owned).collect()
    }

    /// To which addresses the tables of a node lead the clients of a service.
    #[track_caller]
    pub fn backends(&self, node: usize, service: &str) -> BTreeSet<IpAddr> {
        let rows: Value = serde_json::from_str(&self.agents[node].shunt(["services", "-o", "json"])).expect("a list");
        let rows = rows.as_array().expect("a list").iter();
        let rows = rows.filter(|row| row["name"].as_str().is_some_and(|name| name.contains(&format!("/{service}"))));
        // A word in place of a list: there is none.
        let backends = rows.flat_map(|row| row["cluster"].as_array().cloned().unwrap_or_default());
        // ADDRESS:PORT/PROTOCOL
        let address = |backend: &Value| backend.as_str()?.split('/').next()?.parse::<SocketAddr>().ok();
        backends.filter_map(|backend| address(&backend)).map(|address| address.ip()).collect()
    }

    /// Waits until every node sends to the ready pods of a deployment and to nobody else.
    #[track_caller]
    pub fn wait_backends(&self, app: &str, count: usize) -> BTreeSet<IpAddr> {
        let wanted = self.wait_ready(app, count);
        for node in 0..self.agents.len() {
            until(&format!("{wanted:?} on node {node}"), || self.backends(node, app) == wanted);
        }
        wanted
    }

    /// Waits until a deployment has so many ready pods, and the API says so.
    #[track_caller]
    pub fn wait_ready(&self, app: &str, count: usize) -> BTreeSet<IpAddr> {
        until_some(&format!("{count} ready pods of {app}"), || {
            let ready = self.pods.addresses(app);
            (ready.len() == 2 * count && self.ready_addresses(app) == ready).then_some(ready)
        })
    }

    /// The addresses of the ready endpoints of a service.
    fn ready_addresses(&self, service: &str) -> BTreeSet<IpAddr> {
        let selector = format!("kubernetes.io/service-name={service}");
        let slices = self.api().namespaced(Kind::ENDPOINT_SLICE, "default").list_labelled(&selector);
        let slices = slices.map(|list| list.items).unwrap_or_default();
        let endpoints = slices.iter().flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        let ready = endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true);
        ready.filter_map(|endpoint| endpoint["addresses"][0].as_str()?.parse().ok()).collect()
    }
}

fn get(to: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(to)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map(|_| text)
}

/// Where connections begin.
pub struct Clients {
    /// In a pod, translated at connect.
    pub by_socket: Place,
    /// In another pod of that node, where no socket hook is asked.
    pub by_packets: Place,
    /// On a machine that is no node.
    pub outside: Place,
}

fn node_spec(node: &topology::Node) -> NodeSpec {
    let addresses = Family::ALL.map(|family| node.addrs.get(family));
    let spec = NodeSpec::new(node.name(), addresses);
    spec.pod_cidr(&node.pod_cidr.v4()).pod_cidr(&node.pod_cidr.v6())
}

/// Pods as namespaces with servers, which answer with the pod's name.
pub struct Pods {
    cluster: Mutex<Cluster>,
    /// By uid.
    running: Mutex<BTreeMap<String, Running>>,
}

struct Running {
    app: String,
    pod: topology::Pod,
    /// None once it was asked to end.
    server: Option<Server>,
}

impl Pods {
    pub fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().expect("nobody panics with this lock held")
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().expect("nobody panics with this lock held")
    }

    /// Addresses of the pods of a deployment that serve.
    pub fn addresses(&self, app: &str) -> BTreeSet<IpAddr> {
        let running = self.running();
        let serving = running.values().filter(|running| running.app == app && running.server.is_some());
        serving.flat_map(|running| Family::ALL.map(|family| running.pod.addrs.get(family))).collect()
    }
}

impl PodRuntime for Pods {
    fn start(&self, pod: &Pod) -> Vec<IpAddr> {
        let made = {
            let mut cluster = self.cluster();
            let node = cluster.nodes.iter_mut().find(|node| node.name() == pod.node());
            node.expect("a pod is bound to one of our nodes").add_pod()
        };
        // Where it listens, no socket hook is asked: answers must not depend on it.
        let place = made.place.unhooked().named(pod.name());
        let server = place.serve(Ports { tcp: &[TARGET], udp: &[TARGET] });
        let addresses = Family::ALL.map(|family| made.addrs.get(family)).to_vec();
        let app = pod.label("app").unwrap_or_default().to_owned();
        self.running().insert(pod.uid().to_owned(), Running { app, pod: made, server: Some(server) });
        addresses
    }

    fn terminate(&self, pod: &Pod) {
        let server = self.running().get_mut(pod.uid()).and_then(|running| running.server.take());
        drop(server);
    }

    fn is_running(&self, pod: &Pod) -> bool {
        self.running().get(pod.uid()).is_some_and(|running| running.server.is_some())
    }

    fn remove(&self, pod: &Pod) {
        let removed = self.running().remove(pod.uid());
        drop(removed);
    }
}

/// A Deployment whose pods the service of the same name selects. Another `version` rolls it, never with fewer pods than
/// `replicas`; a pod that has to go serves on for two seconds, as it should where proxies have to learn of it.
pub fn deployment(name: &str, replicas: u32, version: &str) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": {"app": name, "version": version}},
                "spec": {
                    "terminationGracePeriodSeconds": 600,
                    "containers": [{
                        "name": "web", "image": "web",
                        "ports": [{"name": "http", "containerPort": TARGET}],
                        "lifecycle": {"preStop": {"sleep": {"seconds": 2}}},
                    }],
                },
            },
        },
    })
}

/// As [`service`], with a second port for datagrams.
pub fn service_with_datagrams(name: &str) -> Value {
    let mut service = service(name);
    service["spec"]["ports"] = json!([
        {"name": "http", "port": PORT, "targetPort": TARGET},
        {"name": "dns", "port": PORT, "targetPort": TARGET, "protocol": "UDP"},
    ]);
    service
}

/// A service of both families with a NodePort.
pub fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "NodePort",
            "ipFamilyPolicy": "RequireDualStack",
            "selector": {"app": name},
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        },
    })
}
