//! Services as they come, change and go.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use shunt_tests::control_plane::{Kind, Patch};
use shunt_tests::place::Place;
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
