//! Services as they come, change and go.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use shunt_tests::control_plane::{Kind, Patch};
use shunt_tests::place::Place;
use shunt_tests::topology::Family;
use shunt_tests::wait::until;

use crate::rig::{Rig, deployment, service};

/// Asks at each address from each place; panics unless all answer.
#[track_caller]
fn ask_all(rig: &Rig, service: &Value) {
    let clients = rig.clients();
    let (inside, outside) = (rig.cluster_addresses(service), rig.node_addresses(service));
    let ask = |place: &Place, to| {
        place.tcp(to).unwrap_or_else(|error| panic!("{to} from {}: {error}", place.name()));
    };
    for place in [&clients.by_socket, &clients.by_packets] {
        inside.iter().chain(&outside).for_each(|to| ask(place, *to));
    }
    outside.iter().for_each(|to| ask(&clients.outside, *to));
}

#[test]
fn service_is_reached_from_its_creation_to_its_end() {
    let rig = Rig::new();
    let api = rig.api();
    let stored = api.create(&service("web")).expect("the service is accepted");
    api.create(&deployment("web", 2, "1")).expect("the deployment is accepted");
    rig.wait_backends("web", 2);
    ask_all(&rig, &stored);

    let deployments = api.namespaced(Kind::DEPLOYMENT, "default");
    for replicas in [4, 1] {
        deployments.scale("web", replicas).expect("it can be scaled");
        rig.wait_backends("web", replicas as usize);
        ask_all(&rig, &stored);
    }

    let to = rig.cluster_addresses(&stored);
    let clients = rig.clients();
    api.namespaced(Kind::SERVICE, "default").delete("web").expect("it can be deleted");
    for node in 0..rig.agents.len() {
        until("a service that is gone", || !rig.agents[node].shunt(["services"]).contains("default/web"));
    }
    // Nothing is translated any more, so nothing of it answers; how that looks is said by whom it is routed to.
    for address in to {
        clients.by_socket.tcp(address).expect_err("the service is gone");
    }
}

#[test]
fn endpoint_that_is_not_ready_gets_no_connection() {
    let rig = Rig::new();
    let api = rig.api();
    let stored = api.create(&service("web")).expect("the service is accepted");
    api.create(&deployment("web", 2, "1")).expect("the deployment is accepted");
    let both = rig.wait_backends("web", 2);

    let pods = api.namespaced(Kind::POD, "default").list().expect("they can be listed").items;
    let name = |pod: &Value| pod["metadata"]["name"].as_str().expect("it has one").to_owned();
    let (failing, healthy) = (name(&pods[0]), name(&pods[1]));
    rig.kubelet.fail(&format!("default/{failing}"));
    for node in 0..rig.agents.len() {
        until("one backend of each family", || rig.backends(node, "web").len() == 2);
    }
    let clients = rig.clients();
    let to = rig.cluster_addresses(&stored);
    let servers = |count: usize| -> BTreeSet<String> {
        let answers = (0..count).map(|number| clients.by_packets.tcp(to[number % to.len()]).expect("it is answered"));
        answers.map(|answer| answer.server).collect()
    };
    assert_eq!(servers(20), BTreeSet::from([healthy.clone()]));

    rig.kubelet.fail(&format!("default/{healthy}"));
    for node in 0..rig.agents.len() {
        until("no backend", || rig.backends(node, "web").is_empty());
    }
    for place in [&clients.by_socket, &clients.by_packets] {
        let error = place.tcp(to[0]).expect_err("nobody is ready");
        assert_eq!(error.kind(), "connect ECONNREFUSED", "from {}", place.name());
    }
    [failing, healthy].iter().for_each(|pod| rig.kubelet.recover(&format!("default/{pod}")));
    for node in 0..rig.agents.len() {
        until("both backends", || rig.backends(node, "web") == both);
    }
}

#[test]
fn odd_objects_harm_only_themselves() {
    let rig = Rig::new();
    let api = rig.api();
    let slice = |name: &str, fields: Value| {
        let mut slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "odd"}},
            "endpoints": [], "ports": null,
        });
        fields.as_object().expect("fields").iter().for_each(|(key, value)| slice[key] = value.clone());
        slice
    };
    let odd = [
        slice("names", json!({"addressType": "FQDN", "endpoints": [{"addresses": ["web.example"]}]})),
        slice("orphan", json!({"metadata": {"name": "orphan", "namespace": "default"}})),
        slice("portless", json!({"endpoints": [{"addresses": ["10.244.9.9"]}]})),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "elsewhere", "namespace": "default"},
            "spec": {"type": "ExternalName", "externalName": "web.example"},
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "odd", "namespace": "default"},
            "spec": {"ports": [{"port": 7, "protocol": "SCTP"}], "externalIPs": ["192.0.2.77"]},
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "other", "namespace": "default",
                "labels": {"service.kubernetes.io/service-proxy-name": "another"}},
            "spec": {"ports": [{"port": 7}]},
        }),
    ];
    for object in &odd {
        api.create(object).unwrap_or_else(|error| panic!("{object}: {error}"));
    }
    let stored = api.create(&service("web")).expect("the service is accepted");
    api.create(&deployment("web", 1, "1")).expect("the deployment is accepted");
    rig.wait_backends("web", 1);
    ask_all(&rig, &stored);
    for agent in &rig.agents {
        agent.wait_log("EndpointSlice default/names");
        agent.wait_log("EndpointSlice default/orphan");
        let services = agent.shunt(["services"]);
        assert!(!services.contains("default/other") && !services.contains("default/elsewhere"), "{services}");
    }
    // A label takes a service away from us and gives it back.
    let label = |value: Value| {
        Patch::Merge(json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": value}}}))
    };
    let services = api.namespaced(Kind::SERVICE, "default");
    services.patch("web", &label(json!("another"))).expect("it can be changed");
    for agent in &rig.agents {
        until("a service of another proxy", || !agent.shunt(["services"]).contains("default/web"));
    }
    services.patch("web", &label(Value::Null)).expect("it can be changed");
    rig.wait_backends("web", 1);
    ask_all(&rig, &stored);
}

/// The cluster autoscaler's way to announce that a node goes, then the end of the node's object.
#[test]
fn load_balancers_are_told_of_a_node_that_goes() {
    let rig = Rig::new();
    let nodes = rig.api().all(Kind::NODE);
    let names: Vec<_> = rig.pods.cluster().nodes.iter().map(|node| node.name().to_owned()).collect();
    let code = |node: usize, path: &str| {
        let answer = rig.get(node, 10256, path);
        answer.split(' ').nth(1).expect("a status line").to_owned()
    };
    let wait_codes = |healthz: &str| {
        until(&format!("{healthz} on /healthz"), || code(0, "/healthz") == healthz);
        assert_eq!(code(0, "/livez"), "200");
        assert_eq!(code(1, "/healthz"), "200", "the other node stays");
    };
    wait_codes("200");
    let taint = json!({"key": "ToBeDeletedByClusterAutoscaler", "value": "1764034000", "effect": "NoSchedule"});
    let taints = |taints: Value| Patch::Merge(json!({"spec": {"taints": taints}}));
    nodes.patch(&names[0], &taints(json!([taint]))).expect("it can be changed");
    wait_codes("503");
    nodes.patch(&names[0], &taints(Value::Null)).expect("it can be changed");
    wait_codes("200");
    // Something wants to do its work before the object goes.
    let finalizers = |finalizers: Value| Patch::Merge(json!({"metadata": {"finalizers": finalizers}}));
    nodes.patch(&names[0], &finalizers(json!(["example.com/hold"]))).expect("it can be changed");
    nodes.delete(&names[0]).expect("it can be deleted");
    wait_codes("503");
    nodes.patch(&names[0], &finalizers(Value::Null)).expect("it can be changed");
    until("the end of the object", || nodes.get(&names[0]).is_err());
    wait_codes("503");
}

/// The API server gives the port; the endpoints are where the pods are.
#[test]
fn health_of_a_load_balanced_service_is_told_by_each_node_for_itself() {
    let rig = Rig::new();
    let api = rig.api();
    let mut balanced = service("web");
    balanced["spec"]["type"] = json!("LoadBalancer");
    balanced["spec"]["externalTrafficPolicy"] = json!("Local");
    let stored = api.create(&balanced).expect("the service is accepted");
    let port = stored["spec"]["healthCheckNodePort"].as_u64().and_then(|port| u16::try_from(port).ok());
    let port = port.expect("the server gives one");
    api.create(&deployment("web", 3, "1")).expect("the deployment is accepted");
    rig.wait_ready("web", 3);
    let pods = api.namespaced(Kind::POD, "default").list().expect("they can be listed").items;
    for node in 0..rig.agents.len() {
        let (addrs, name) = {
            let cluster = rig.pods.cluster();
            (cluster.nodes[node].addrs, cluster.nodes[node].name().to_owned())
        };
        let count = pods.iter().filter(|pod| pod["spec"]["nodeName"] == name.as_str()).count();
        let status = if count > 0 { "HTTP/1.1 200 " } else { "HTTP/1.1 503 " };
        let weight = format!("\r\nX-Load-Balancing-Endpoint-Weight: {count}\r\n");
        for family in Family::ALL {
            until(&format!("{weight} of {name}"), || {
                let answer = rig.try_get_at(addrs.port(family, port), "/healthz").unwrap_or_default();
                answer.starts_with(status) && answer.contains(&weight)
            });
        }
    }
}
