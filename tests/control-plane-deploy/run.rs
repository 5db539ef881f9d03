//! The pod of the manifest, run on a node: with its arguments, its rights, its mounts and its service account.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use serde_json::{Value, json};
use shunt_tests::control_plane::{ControlPlane, Identity, Options};
use shunt_tests::probe::{LongLived, TcpLoop};
use shunt_tests::topology::{CLUSTER, Cluster, Family, Plan, UNDERLAY};
use shunt_tests::traffic::{Load, Ports, Server};
use shunt_tests::wait::until;

use crate::container::{Container, Mounts};
use crate::image::Layout;
use crate::pod::{self, Host};
use crate::rig::{NAMESPACE, Tools, guide};

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const APPLIED: &str = "first plan applied";

/// A control plane with the chart's objects, and a node for its pod; fields are dropped in this order.
struct Rig {
    _server: Server,
    mounts: Arc<Mounts>,
    host: Host,
    plane: ControlPlane,
    /// Where the service answers.
    service: SocketAddr,
    cluster: Cluster,
}

impl Rig {
    #[track_caller]
    fn new() -> Self {
        let cluster = Cluster::build(Plan { pods: 3, ..Plan::default() });
        let options = Options { address: UNDERLAY.host(1).v4.into(), ..Options::default() };
        let plane = ControlPlane::start_with(&cluster.bed, cluster.net.ns(), options);
        let host = host(&cluster);
        Layout::find().unpack(&host.rootfs);
        let backend = &cluster.nodes[0].pods[0];
        let server = backend.place.unhooked().serve(Ports { tcp: &[TARGET], udp: &[] });
        let service = declare(&plane, &cluster);
        Self { _server: server, mounts: Mounts::new(&cluster.bed), host, plane, service, cluster }
    }

    /// The DaemonSet of the chart with these values, as the server has it; and its service account on the node.
    #[track_caller]
    fn install(&self, values: &[&str]) -> Value {
        let tools = Tools::new(&self.plane, &self.cluster.bed);
        tools.kubectl(["apply", "-f", "-"], &tools.helm_text(values));
        let token = tools.kubectl(["create", "token", "shunt", "--namespace", NAMESPACE], "");
        let account = self.host.service_account();
        fs::write(account.join("token"), token.trim()).expect("the directory was made");
        fs::copy(ca(&self.plane), account.join("ca.crt")).expect("the control plane has a CA");
        let set = tools.kubectl(["get", "daemonset", "shunt", "--namespace", NAMESPACE, "--output", "json"], "");
        let set: Value = serde_json::from_str(&set).expect("kubectl prints JSON");
        set["spec"]["template"]["spec"].clone()
    }

    /// The values of a cluster whose API server is here.
    fn values(&self) -> Vec<String> {
        vec![
            format!("apiServer=https://{}", UNDERLAY.host(1).port(Family::V4, 6443)),
            format!("clusterCIDR={{{},{}}}", CLUSTER.v4(), CLUSTER.v6()),
        ]
    }

    #[track_caller]
    fn install_here(&self) -> Value {
        let values = self.values();
        self.install(&values.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Runs the pod's containers one after the other as a kubelet does; returns the last, which goes on.
    #[track_caller]
    fn run(&self, pod: &Value, round: &str) -> Container {
        for container in pod["initContainers"].as_array().into_iter().flatten() {
            let name = format!("{}-{round}", container["name"].as_str().expect("it has a name"));
            let mut init = self.mounts.start(&name, &pod::config(pod, container, &self.host));
            let status = init.ended();
            assert!(status.success(), "{status}: {}", init.log());
        }
        self.mounts.start(&format!("agent-{round}"), &pod::config(pod, &pod["containers"][0], &self.host))
    }

    /// Whether the node's kubelet finds a probe answered.
    fn probe(&self, pod: &Value, name: &str) -> bool {
        let (container, probe) = (&pod["containers"][0], &pod["containers"][0][name]["httpGet"]);
        let ports = container["ports"].as_array().expect("the probed port is declared");
        let port = ports.iter().find(|port| port["name"] == probe["port"]).expect("it is declared");
        let address = format!("{}:{}", probe["host"].as_str().expect("the node's own"), port["containerPort"]);
        let (to, path) = (address.parse().expect("an address"), probe["path"].as_str().expect("a path"));
        self.cluster.nodes[0].place.run(|| status_of(to, path)).is_ok_and(|status| status == "200")
    }

    #[track_caller]
    fn wait_ready(&self, pod: &Value) {
        until("a ready pod", || self.probe(pod, "readinessProbe"));
    }
}

/// What the kubelet knows of the only node.
fn host(cluster: &Cluster) -> Host {
    let (node, bed) = (&cluster.nodes[0], &cluster.bed);
    let host = Host {
        name: node.name().to_owned(),
        netns: node.place.ns().path(),
        rootfs: bed.subdir("rootfs"),
        cgroup: node.place.cgroup().expect("a node has a control group").dir().to_owned(),
        pod_dir: bed.subdir("pod"),
        containers: format!("{}-containers", bed.id()),
    };
    for dir in [host.service_account(), host.own_dir("run")] {
        fs::create_dir_all(dir).expect("the test's directory can be written");
    }
    let names = format!("{} kubernetes.default.svc\n", UNDERLAY.host(1).v4);
    fs::write(host.hosts(), names).expect("the test's directory can be written");
    host
}

/// Declares a node, and a service with a backend in its first pod; returns the service's address.
#[track_caller]
fn declare(plane: &ControlPlane, cluster: &Cluster) -> SocketAddr {
    let (node, backend) = (&cluster.nodes[0], &cluster.nodes[0].pods[0]);
    let create = |object: &Value| plane.api().create(object).unwrap_or_else(|error| panic!("{error}: {object}"));
    create(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()}}));
    create(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "http", "port": TARGET, "protocol": "TCP"}],
        "endpoints": [{
            "addresses": [backend.addrs.v4], "conditions": {"ready": true}, "nodeName": node.name(),
        }],
    }));
    let service = create(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"ports": [{"name": "http", "port": PORT, "targetPort": TARGET}]},
    }));
    let ip = service["spec"]["clusterIP"].as_str().expect("the server gives one");
    SocketAddr::new(ip.parse().expect("an address"), PORT)
}

/// The file of the CA that a kubeconfig names.
#[track_caller]
fn ca(plane: &ControlPlane) -> String {
    let text = fs::read_to_string(plane.kubeconfig(Identity::Admin)).expect("the control plane wrote it");
    let config: Value = serde_json::from_str(&text).expect("in JSON");
    config["clusters"][0]["cluster"]["certificate-authority"].as_str().expect("by a file").to_owned()
}

fn status_of(to: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(to)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.split(' ').nth(1).unwrap_or_default().to_owned())
}

#[test]
fn the_pod_comes_up_by_itself_on_a_node_without_bpf_file_system_and_without_proxy() {
    let rig = Rig::new();
    let pod = rig.install_here();
    assert!(!rig.mounts.has_mount("/sys/fs/bpf", "bpf"));
    let agent = rig.run(&pod, "1");
    rig.wait_ready(&pod);
    assert!(rig.probe(&pod, "livenessProbe") && rig.probe(&pod, "startupProbe"), "all probes are answered");
    assert!(rig.mounts.has_mount("/sys/fs/bpf", "bpf"), "what the pod mounts is the node's, and outlives the pod");

    let client = &rig.cluster.nodes[0].pods[1].place;
    client.tcp(rig.service).expect("a socket of a pod is served");
    client.unhooked().tcp(rig.service).expect("packets of a pod are served");
    let reserved = rig.cluster.nodes[0].place.ns().read_sysctl("net/ipv4/ip_local_reserved_ports");
    assert!(reserved.contains("10000-29999"), "{reserved}");
    let status: Value = serde_json::from_str(&agent.exec(["shunt", "status", "-o", "json"])).expect("JSON");
    assert!(status["report"].is_object(), "the agent is asked from within its container: {status}");
    assert!(!agent.log().contains(" WARN ") && !agent.log().contains(" ERROR "), "{}", agent.log());
}

#[test]
fn an_update_of_the_agent_loses_nothing() {
    let rig = Rig::new();
    let pod = rig.install_here();
    let old = rig.run(&pod, "1");
    rig.wait_ready(&pod);
    let pods = &rig.cluster.nodes[0].pods;
    let clients = [pods[1].place.clone(), pods[2].place.unhooked()];
    let mut loads: Vec<Load> = Vec::new();
    for client in &clients {
        loads.push(client.long_lived(LongLived { to: rig.service, connections: 3, interval_ms: 20 }));
        loads.push(client.tcp_loop(TcpLoop { to: vec![rig.service], rate: 50, workers: 2, count: None }));
    }
    let go_on = |loads: &mut Vec<Load>| loads.iter_mut().for_each(|load| drop(load.wait_answers(20)));
    go_on(&mut loads);
    assert!(old.stop().success());
    go_on(&mut loads);
    let new = rig.run(&pod, "2");
    new.wait_log(APPLIED);
    rig.wait_ready(&pod);
    go_on(&mut loads);
    for load in loads {
        load.finish_clean();
    }
}

#[test]
fn the_way_back_in_the_guide_takes_everything_from_the_node() {
    let rig = Rig::new();
    let pod = rig.install_here();
    let agent = rig.run(&pod, "1");
    rig.wait_ready(&pod);
    assert!(agent.stop().success());
    let client = &rig.cluster.nodes[0].pods[1].place;
    client.tcp(rig.service).expect("what it programmed goes on");

    let tools = Tools::new(&rig.plane, &rig.cluster.bed);
    let mut commands = guide(&rig.host.name).into_iter();
    let command = commands.find(|words| words.iter().any(|word| word == "cleanup")).expect("the guide has it");
    assert!(tools.try_kubectl(&command.iter().map(String::as_str).collect::<Vec<_>>()), "{command:?}");
    let pods: Value = serde_json::from_str(&tools.kubectl(["get", "pods", "-o", "json"], "")).expect("JSON");
    let debugger = &pods["items"][0]["spec"];
    // Its host path is the whole node.
    let sys = rig.host.root().join("sys");
    fs::create_dir_all(&sys).expect("the test's directory can be written");
    rig.mounts.output(["mount", "--rbind", "/sys", sys.to_str().expect("text")]);
    let mut cleanup = rig.mounts.start("cleanup", &pod::config(debugger, &debugger["containers"][0], &rig.host));
    assert!(cleanup.ended().success(), "{}", cleanup.log());
    assert!(cleanup.log().contains("removed from"), "{}", cleanup.log());
    assert_eq!(rig.mounts.output(["find", "/sys/fs/bpf", "-mindepth", "1", "-type", "d"]), "", "nothing is pinned");
    client.tcp(rig.service).expect_err("nobody serves it");
}

#[test]
fn none_of_its_capabilities_can_be_left_out_but_those_for_stale_sockets() {
    let rig = Rig::new();
    let mut pod = rig.install_here();
    let path = "/containers/0/securityContext/capabilities/add";
    let all = pod.pointer(path).and_then(Value::as_array).expect("it asks for some").clone();
    let (for_stale, needed): (Vec<_>, Vec<_>) = all
        .iter()
        .partition(|name| ["SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH"].contains(&name.as_str().expect("a name")));
    assert_eq!((for_stale.len(), needed.len()), (3, 3), "{all:?}");
    // SYS_ADMIN has in it what two others allow: these are what an agent needs that shall not have it.
    for left_out in &needed {
        let rest: Vec<_> = needed.iter().filter(|name| *name != left_out).map(|name| Value::clone(name)).collect();
        *pod.pointer_mut(path).expect("it was there") = rest.into();
        let mut agent = rig.run(&pod, &format!("without-{}", left_out.as_str().expect("a name")));
        let ended = agent.ended_or("a ready pod", || rig.probe(&pod, "readinessProbe"));
        assert!(ended.is_some_and(|status| !status.success()), "it runs without {left_out}");
    }
    // Without the others it serves, and says what it cannot do.
    let rest: Vec<_> = needed.into_iter().cloned().collect();
    *pod.pointer_mut(path).expect("it was there") = rest.into();
    let agent = rig.run(&pod, "without-both");
    rig.wait_ready(&pod);
    shunt_tests::wait::until("words on what stays", || agent.log().contains("stale connections may stay"));
}

#[test]
fn the_api_server_may_have_a_name() {
    let rig = Rig::new();
    let pod = rig.install(&["apiServer=https://kubernetes.default.svc:6443"]);
    let agent = rig.run(&pod, "1");
    rig.wait_ready(&pod);
    assert!(agent.log().contains("kubernetes.default.svc"), "{}", agent.log());
}

/// The ConfigMap of kube-proxy, with what matters in it as kubeadm 1.36 writes it.
fn kubeadm_config(server: SocketAddr) -> Value {
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "bindAddress": "0.0.0.0", "clusterCIDR": format!("{},{}", CLUSTER.v4(), CLUSTER.v6()),
        "clientConnection": {"kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf", "acceptContentTypes": "", "qps": 0},
        "healthzBindAddress": "", "metricsBindAddress": "", "hostnameOverride": "", "mode": "", "nodePortAddresses": null,
    });
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "default",
        "clusters": [{"name": "default", "cluster": {
            "certificate-authority": format!("{account}/ca.crt"), "server": format!("https://{server}"),
        }}],
        "contexts": [{"name": "default", "context": {"cluster": "default", "namespace": "default", "user": "default"}}],
        "users": [{"name": "default", "user": {"tokenFile": format!("{account}/token")}}],
    });
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-proxy", "namespace": NAMESPACE},
        "data": {"config.conf": config.to_string(), "kubeconfig.conf": kubeconfig.to_string()},
    })
}

#[test]
fn the_config_map_that_kubeadm_wrote_for_kube_proxy_is_enough() {
    let rig = Rig::new();
    let config = kubeadm_config(UNDERLAY.host(1).port(Family::V4, 6443));
    Tools::new(&rig.plane, &rig.cluster.bed).kubectl(["create", "-f", "-"], &config.to_string());
    let pod = rig.install(&["kubeProxyConfigMap=kube-proxy"]);
    let files = rig.host.own_dir("kube-proxy");
    fs::create_dir_all(&files).expect("the test's directory can be written");
    for (name, text) in config["data"].as_object().expect("it has files") {
        fs::write(files.join(name), text.as_str().expect("text")).expect("the directory was made");
    }
    let agent = rig.run(&pod, "1");
    rig.wait_ready(&pod);
    rig.cluster.nodes[0].pods[1].place.tcp(rig.service).expect("a socket of a pod is served");
    assert!(!agent.log().contains(" WARN "), "{}", agent.log());
}

#[test]
fn the_service_account_reads_what_the_agent_reads_and_no_secrets() {
    let rig = Rig::new();
    rig.install_here();
    let tools = Tools::new(&rig.plane, &rig.cluster.bed);
    let account = format!("--as=system:serviceaccount:{NAMESPACE}:shunt");
    let may = |verb: &str, what: &str| {
        let question = ["auth", "can-i", verb, what, "--all-namespaces", "--quiet", &account];
        tools.try_kubectl(&question)
    };
    for kind in ["services", "nodes", "endpointslices.discovery.k8s.io", "servicecidrs.networking.k8s.io"] {
        assert!(may("list", kind) && may("watch", kind), "{kind}");
    }
    assert!(may("create", "events.events.k8s.io"));
    for (verb, kind) in [("list", "secrets"), ("list", "configmaps"), ("list", "pods"), ("patch", "services")] {
        assert!(!may(verb, kind), "{verb} {kind}");
    }
}

#[test]
fn a_base_without_an_api_server_says_what_is_missing() {
    let rig = Rig::new();
    rig.install_here();
    let tools = Tools::new(&rig.plane, &rig.cluster.bed);
    let base = tools.kustomize("base").into_iter().find(|object| object["kind"] == "DaemonSet").expect("it has one");
    let mut agent = rig.run(&base["spec"]["template"]["spec"], "1");
    assert_eq!(agent.ended().code(), Some(64));
    assert!(agent.log().contains("is no address of an API server, such as https://"), "{}", agent.log());
}
