//! Health of single services by healthCheckNodePort: what an external load balancer asks each node.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};

use serde_json::json;
use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Endpoint, Manifests, Service, service};
use shunt_tests::topology::{CLUSTER, Cluster, Family, Plan, SERVICES};
use shunt_tests::wait;

use crate::http::{Reply, try_ask, try_get};
use crate::samples::Samples;

const PORT: u16 = 30100;

/// A node; its agent is started.
struct Rig {
    agent: Agent,
    manifests: Manifests,
    cluster: Cluster,
}

/// A load-balanced service whose health is served at `port`.
fn balanced(name: &str, host: u16, port: u16) -> Service {
    let local = service(name).cluster_ips(SERVICES.host(host)).tcp(80, 8080).spec("type", json!("LoadBalancer"));
    local.spec("externalTrafficPolicy", json!("Local")).spec("healthCheckNodePort", json!(port))
}

impl Rig {
    #[track_caller]
    fn start(services: impl Fn(&Cluster) -> Vec<Service>) -> Self {
        Self::start_with(services, |agent| agent)
    }

    #[track_caller]
    fn start_with(services: impl Fn(&Cluster) -> Vec<Service>, options: impl FnOnce(Agent) -> Agent) -> Self {
        let cluster = Cluster::build(Plan::default());
        let manifests = Manifests::of(&cluster);
        services(&cluster).iter().for_each(|service| manifests.apply(service));
        let agent = Agent::new(&cluster, &cluster.nodes[0]).with("--manifests", manifests.dir());
        let mut agent = options(agent);
        agent.start();
        Self { agent, manifests, cluster }
    }

    fn address(&self, family: Family, port: u16) -> SocketAddr {
        self.cluster.nodes[0].addrs.port(family, port)
    }

    /// What a load balancer outside gets, once somebody listens.
    #[track_caller]
    fn ask(&self, family: Family, port: u16) -> Reply {
        let (client, to) = (&self.cluster.client.place, self.address(family, port));
        wait::until_some(&format!("health at {to}"), || try_get(client, to, "/healthz").ok())
    }

    /// Waits until a load balancer outside is told of so many endpoints.
    #[track_caller]
    fn wait_weight(&self, port: u16, weight: usize) {
        for family in Family::ALL {
            let wanted = format!("x-load-balancing-endpoint-weight: {weight}\r\n");
            wait::until(&wanted, || (self.ask(family, port).head + "\r\n").contains(&wanted));
        }
    }

    /// Waits until nobody listens.
    #[track_caller]
    fn wait_closed(&self, port: u16) {
        Family::ALL.into_iter().for_each(|family| self.wait_closed_in(family, port));
    }

    #[track_caller]
    fn wait_closed_in(&self, family: Family, port: u16) {
        let (client, to) = (&self.cluster.client.place, self.address(family, port));
        wait::until(&format!("no health at {to}"), || {
            try_get(client, to, "/").is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        });
    }

    fn problems(&self) -> Vec<String> {
        let report = self.agent.report();
        let problems = report["problems"].as_array().expect("a list").iter();
        let text = |field: &serde_json::Value| field.as_str().expect("text").to_owned();
        problems.map(|problem| format!("{}: {}", text(&problem["subject"]), text(&problem["message"]))).collect()
    }
}

/// Endpoints of this node and of another one.
fn mixed(cluster: &Cluster) -> [Endpoint; 3] {
    let [one, two] = [0, 1].map(|pod| Endpoint::from(&cluster.nodes[0].pods[pod]));
    [one, two, Endpoint::ready(CLUSTER.host(0x909), "elsewhere")]
}

#[test]
fn a_load_balancer_is_told_as_kube_proxy_tells_it() {
    let rig = Rig::start(|cluster| vec![balanced("web", 1, PORT).endpoints(mixed(cluster))]);
    for family in Family::ALL {
        let reply = rig.ask(family, PORT);
        assert_eq!(reply.status, 200);
        let wanted = [
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 2",
        ];
        for header in wanted {
            assert!(reply.head.contains(header), "{header}: {}", reply.head);
        }
        let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\
                    \t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
        assert_eq!(reply.body, body);
    }
    // Any path and any method.
    let (client, to) = (&rig.cluster.client.place, rig.address(Family::V4, PORT));
    for method in ["POST", "PUT", "OPTIONS"] {
        let reply = try_ask(client, to, method, "/any/path?x=y").expect("it is answered");
        assert_eq!(reply, Reply { head: reply.head.clone(), ..rig.ask(Family::V4, PORT) }, "{method}");
    }
}

#[test]
fn health_follows_endpoints_and_services_while_they_change() {
    let rig = Rig::start(|cluster| vec![balanced("web", 1, PORT).endpoints(mixed(cluster))]);
    rig.wait_weight(PORT, 2);
    let [one, two, other] = mixed(&rig.cluster);
    // One that ends does not count, though it still gets the traffic.
    let web = balanced("web", 1, PORT);
    rig.manifests.apply(&web.clone().endpoints([one.clone(), two.clone().terminating(true), other.clone()]));
    rig.wait_weight(PORT, 1);
    rig.manifests.apply(&web.clone().endpoints([one.terminating(true), two.terminating(true), other.clone()]));
    rig.wait_weight(PORT, 0);
    let reply = rig.ask(Family::V6, PORT);
    assert_eq!(reply.status, 503);
    assert!(reply.body.contains("\"localEndpoints\": 0,\n\t\"serviceProxyHealthy\": true"), "{}", reply.body);
    // Another port.
    let [one, ..] = mixed(&rig.cluster);
    rig.manifests.apply(&balanced("web", 1, PORT + 1).endpoints([one.clone()]));
    rig.wait_weight(PORT + 1, 1);
    rig.wait_closed(PORT);
    // Policy Cluster has no use for it.
    let cluster_policy = balanced("web", 1, PORT + 1).spec("externalTrafficPolicy", json!("Cluster"));
    rig.manifests.apply(&cluster_policy.endpoints([one.clone()]));
    rig.wait_closed(PORT + 1);
    rig.manifests.apply(&balanced("web", 1, PORT).endpoints([one]));
    rig.wait_weight(PORT, 1);
    rig.manifests.delete("web");
    rig.wait_closed(PORT);
}

#[test]
fn a_family_without_the_service_has_no_listener() {
    let single = |cluster: &Cluster| {
        let ip = SERVICES.host(1).v4;
        let web = balanced("web", 1, PORT).endpoints(mixed(cluster)).spec("clusterIPs", json!([ip]));
        vec![web]
    };
    let rig = Rig::start(single);
    assert_eq!(rig.ask(Family::V4, PORT).status, 200);
    rig.wait_closed_in(Family::V6, PORT);
}

#[test]
fn a_port_in_use_is_the_problem_of_its_service_alone_and_is_had_when_it_is_free() {
    let cluster = Cluster::build(Plan::default());
    let node = cluster.nodes[0].place.clone();
    let in_use = node.run(|| TcpListener::bind(("0.0.0.0", PORT)).expect("the port is free"));
    let manifests = Manifests::of(&cluster);
    manifests.apply(&balanced("web", 1, PORT).endpoints(mixed(&cluster)));
    manifests.apply(&balanced("other", 2, PORT + 1).endpoints(mixed(&cluster)));
    let agent = Agent::start_on(&cluster, &cluster.nodes[0], &manifests);
    let rig = Rig { agent, manifests, cluster };
    rig.wait_weight(PORT + 1, 2);
    assert_eq!(rig.ask(Family::V6, PORT).status, 200, "the other family is free");
    let told = rig.agent.wait_log("cannot listen on a healthCheckNodePort");
    assert!(told.contains("manifests/default/web") && told.contains("port=30100"), "{told}");
    // On the node's address and on loopback.
    wait::until("two problems", || rig.problems().len() == 2);
    for problem in rig.problems() {
        let start = "manifests/default/web: healthCheckNodePort 30100: cannot listen on ";
        assert!(problem.starts_with(start) && problem.contains("in use"), "{problem}");
    }
    assert_eq!(Samples::scrape(&rig.cluster.nodes[0]).value(r#"shunt_problems{kind="health_check_not_served"}"#), 2.0);
    drop(in_use);
    rig.wait_weight(PORT, 2);
    wait::until("no problem", || rig.problems().is_empty());
}

#[test]
fn a_port_that_two_services_ask_for_speaks_of_the_older_until_it_goes() {
    let created = |year: u16| json!(format!("{year}-05-01T00:00:00Z"));
    let both = |cluster: &Cluster| {
        let [one, two, _] = mixed(cluster);
        let a = balanced("a", 1, PORT).metadata("creationTimestamp", created(2024)).endpoints([one.clone(), two]);
        vec![a, balanced("b", 2, PORT).metadata("creationTimestamp", created(2023)).endpoints([one])]
    };
    let rig = Rig::start(both);
    rig.wait_weight(PORT, 1);
    assert!(rig.ask(Family::V4, PORT).body.contains("\"name\": \"b\""));
    let taken = "manifests/default/a: healthCheckNodePort 30100 belongs to manifests/default/b; no health is served for \
                 this service";
    assert_eq!(rig.problems(), [taken]);
    rig.manifests.delete("b");
    rig.wait_weight(PORT, 2);
    assert!(rig.ask(Family::V4, PORT).body.contains("\"name\": \"a\""));
    wait::until("no problem", || rig.problems().is_empty());
}

#[test]
fn listeners_are_where_node_ports_answer_and_follow_the_addresses() {
    let only = |agent: Agent| agent.with("--nodeport-addresses", "203.0.113.0/24,fd00:203::/32");
    let rig = Rig::start_with(|cluster| vec![balanced("web", 1, PORT).endpoints(mixed(cluster))], only);
    let node = &rig.cluster.nodes[0];
    // The node asks itself.
    let here = |to: &str| try_get(&node.place, to.parse().expect("an address"), "/").map(|reply| reply.status).ok();
    for loopback in ["127.0.0.1:30100", "[::1]:30100"] {
        wait::until(&format!("health at {loopback}"), || here(loopback) == Some(200));
    }
    rig.wait_closed(PORT);
    for (addr, socket) in [("203.0.113.77/32", "203.0.113.77:30100"), ("fd00:203::77/128", "[fd00:203::77]:30100")] {
        assert_eq!(here(socket), None);
        change_address(&rig, "add", addr);
        wait::until(&format!("health at {socket}"), || here(socket) == Some(200));
        change_address(&rig, "del", addr);
        wait::until(&format!("no health at {socket}"), || here(socket).is_none());
    }
}

#[track_caller]
fn change_address(rig: &Rig, action: &str, addr: &str) {
    let node = &rig.cluster.nodes[0];
    node.place.ns().output(["ip", "address", action, addr, "dev", "lo"]);
}

/// They are not given to local sockets.
#[test]
fn ports_of_health_checks_are_reserved() {
    let rig = Rig::start(|cluster| vec![balanced("web", 1, PORT).endpoints(mixed(cluster))]);
    let node = &rig.cluster.nodes[0];
    let reserved = || node.place.ns().output(["cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"]);
    wait::until("the port to be reserved", || reserved().trim().split(',').any(|range| range == "30100"));
    rig.manifests.delete("web");
    wait::until("the port to be released", || !reserved().contains("30100"));
}
