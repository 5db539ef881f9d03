//! Two clusters that follow one control plane: kube-proxy on the nodes of the first, agents on those of the second.

use std::net::TcpStream;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use shunt_tests::agent::Agent;
use shunt_tests::control_plane::{Api, ControlPlane, Identity, Kind, KubeProxyMode, Patch};
use shunt_tests::manifests::{self, Endpoint, cluster_cidr, service};
use shunt_tests::place::Place;
use shunt_tests::probe::{TcpOnce, tcp_once};
use shunt_tests::process::Process;
use shunt_tests::topology::{Cluster, Family, Plan, SERVICES};
use shunt_tests::traffic::{Ports, Server};
use shunt_tests::wait;

/// Where servers listen.
pub const TARGET: u16 = 8080;
/// Where they listen as well.
pub const OTHER_TARGET: u16 = 8081;
/// Where services listen.
pub const PORT: u16 = 80;
/// The zones of the two nodes.
pub const ZONES: [&str; 2] = ["east", "west"];
/// Before the marker of [`Pair::settle`] is dialled again; longer than any answer takes.
const GLANCE: Duration = Duration::from_millis(300);

/// Who serves the nodes of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    KubeProxy,
    Shunt,
}

/// One of the two clusters; fields are dropped in this order.
pub struct World {
    _servers: Vec<Server>,
    _proxies: Vec<Process>,
    _agents: Vec<Agent>,
    pub cluster: Cluster,
}

/// Everything that a test needs; fields are dropped in this order.
pub struct Pair {
    /// By kube-proxy, by Shunt.
    pub worlds: [World; 2],
    plane: ControlPlane,
}

impl Pair {
    /// Both clusters, served, without any service of the test.
    #[track_caller]
    pub fn new() -> Self {
        let plane = ControlPlane::start_apart();
        let clusters = [0, 1].map(|link| {
            let cluster = Cluster::build(Plan { nodes: 2, pods: 3, ..Plan::default() });
            plane.connect(link, &cluster);
            cluster.route_vips(&cluster.nodes[0]);
            cluster
        });
        add_nodes(&plane, &clusters[0]);
        let [one, two] = clusters;
        let pair = Self {
            worlds: [World::start(Side::KubeProxy, one, &plane), World::start(Side::Shunt, two, &plane)],
            plane,
        };
        pair.settle();
        pair
    }

    pub fn api(&self) -> &Api {
        self.plane.api()
    }

    /// The topology of either.
    pub fn cluster(&self) -> &Cluster {
        &self.worlds[0].cluster
    }

    /// Stores objects, a service's status too.
    #[track_caller]
    pub fn apply(&self, objects: &[Value]) {
        for object in objects {
            let mut spec = object.clone();
            let status = spec.as_object_mut().expect("an object").remove("status");
            self.api().apply(&spec).unwrap_or_else(|error| panic!("{error}: {object:#}"));
            if let Some(status) = status.filter(|_| object["kind"] == "Service") {
                let name = object["metadata"]["name"].as_str().expect("a name");
                let patch = Patch::Merge(json!({ "status": status }));
                let stored = self.api().namespaced(Kind::SERVICE, "default").patch_status(name, &patch);
                stored.unwrap_or_else(|error| panic!("the status of {name}: {error}"));
            }
        }
    }

    /// Deletes a service and its slices.
    #[track_caller]
    pub fn delete(&self, name: &str) {
        let slices = self.api().namespaced(Kind::ENDPOINT_SLICE, "default");
        for slice in
            slices.list_labelled(&format!("kubernetes.io/service-name={name}")).expect("slices can be listed").items
        {
            slices.delete(slice["metadata"]["name"].as_str().expect("a name")).expect("a slice can be deleted");
        }
        self.api().namespaced(Kind::SERVICE, "default").delete(name).expect("a service can be deleted");
    }

    /// Waits until every node has taken in all Services and EndpointSlices that were stored before.
    ///
    /// Both watches are in the order of the changes, so a marker that is served says so, if its Service and its slice are the
    /// last; what is applied together with it is applied when a later change of it is.
    #[track_caller]
    pub fn settle(&self) {
        static NUMBER: AtomicU16 = AtomicU16::new(60_000);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let addrs = SERVICES.host(number);
        let marker = service(&format!("marker-{number}")).cluster_ips(addrs).tcp(PORT, TARGET);
        // Neither of the nodes' dialling pods.
        for pod in [&self.cluster().nodes[0].pods[0], &self.cluster().nodes[1].pods[0]] {
            self.apply(&marker.clone().endpoints([Endpoint::from(pod)]).objects());
            for dialling in self.worlds.iter().flat_map(|world| &world.cluster.nodes).map(|node| &node.pods[1].place) {
                for family in Family::ALL {
                    let to = addrs.port(family, PORT);
                    let what = format!("{to} to be served by {} on {}", pod.place.name(), dialling.name());
                    wait::until(&what, || dialling.run(|| who(to)).is_some_and(|name| name == pod.place.name()));
                }
            }
        }
        self.delete(&format!("marker-{number}"));
    }

    /// Stores these services with their endpoints, and waits until they are served.
    #[track_caller]
    pub fn serve(&self, objects: &[Value]) {
        self.apply(objects);
        self.settle();
    }
}

/// Who answers at an address that may be none yet.
fn who(to: std::net::SocketAddr) -> Option<String> {
    drop(TcpStream::connect_timeout(&to, GLANCE).ok()?);
    tcp_once(&TcpOnce { to, bind: None, mapped: false }).ok().map(|answer| answer.server)
}

/// Both clusters have the same nodes: each object stands for two machines.
#[track_caller]
fn add_nodes(plane: &ControlPlane, cluster: &Cluster) {
    for (node, zone) in cluster.nodes.iter().zip(ZONES) {
        let mut object = manifests::node(node);
        object["metadata"]["labels"]["topology.kubernetes.io/zone"] = json!(zone);
        let status = Patch::Merge(json!({ "status": object["status"] }));
        plane.api().create(&object).unwrap_or_else(|error| panic!("{error}: {object:#}"));
        plane.api().all(Kind::NODE).patch_status(node.name(), &status).expect("a node can have addresses");
    }
}

impl World {
    #[track_caller]
    fn start(side: Side, cluster: Cluster, plane: &ControlPlane) -> Self {
        for place in cluster.nodes.iter().map(|node| &node.place).chain([&cluster.net]) {
            // Many refusals at once are this suite's doing: none of them shall be held back.
            place.ns().sysctl("net/ipv4/icmp_ratemask", "0");
            place.ns().sysctl("net/ipv6/icmp/ratelimit", "0");
        }
        let ports = Ports { tcp: &[TARGET, OTHER_TARGET], udp: &[TARGET, OTHER_TARGET] };
        let places = cluster.pods().map(|pod| &pod.place).chain(cluster.nodes.iter().map(|node| &node.place));
        // Where they listen, no socket hook is asked: answers must not depend on it.
        let servers = places.map(|place| place.unhooked().serve(ports)).collect();
        let (mut proxies, mut agents) = (Vec::new(), Vec::new());
        for node in &cluster.nodes {
            match side {
                Side::KubeProxy => proxies.push(kube_proxy(&node.place, plane)),
                Side::Shunt => {
                    agents.push(Agent::new(&cluster, node).with("--kubeconfig", plane.kubeconfig(Identity::KubeProxy)));
                }
            }
        }
        agents.iter_mut().for_each(Agent::spawn);
        agents.iter().for_each(|agent| drop(agent.wait_log("first plan applied")));
        Self { _servers: servers, _proxies: proxies, _agents: agents, cluster }
    }
}

fn kube_proxy(node: &Place, plane: &ControlPlane) -> Process {
    let mut command = plane.kube_proxy(node, node.name(), KubeProxyMode::Nftables);
    command.arg(format!("--cluster-cidr={}", cluster_cidr()));
    Process::start(&format!("kube-proxy of {}", node.name()), command)
}
