//! Kubernetes events: who asks the cluster about a service or a node finds what the agents have to tell, once.

use serde_json::{Value, json};
use shunt_tests::control_plane::{Kind, Patch};
use shunt_tests::traffic::Ports;
use shunt_tests::wait::{until, until_some};

use crate::rig::{Rig, service};

/// The agents' events about an object, as the core API shows them; `kubectl describe` asks for the uid too.
#[track_caller]
fn events_about(rig: &Rig, kind: &str, name: &str, uid: &str) -> Vec<Value> {
    let list = rig.api().namespaced(Kind::EVENT, "default").list().expect("events can be listed");
    let is_ours = |event: &Value| {
        let about = &event["involvedObject"];
        event["reportingComponent"] == "shunt" && about["kind"] == kind && about["name"] == name && about["uid"] == uid
    };
    list.items.into_iter().filter(is_ours).collect()
}

fn with_reason<'a>(events: &'a [Value], reason: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["reason"] == reason).collect()
}

/// An SCTP port: what no agent serves.
fn sctp() -> Value {
    json!({"name": "sctp", "port": 7, "protocol": "SCTP"})
}

#[test]
fn a_node_tells_its_start_and_what_it_lacks() {
    let mut rig = Rig::without_agents();
    let names: Vec<_> = rig.pods.cluster().nodes.iter().map(|node| node.name().to_owned()).collect();
    // Something has the ports of one node.
    let place = rig.pods.cluster().nodes[0].place.clone();
    let busy = place.serve(Ports { tcp: &[10256, 10249], udp: &[] });
    rig.start_agents();
    let events = |node: usize| events_about(&rig, "Node", &names[node], &names[node]);
    for (node, name) in names.iter().enumerate() {
        let started = until_some("the start of an agent", || {
            with_reason(&events(node), "Starting").first().map(|event| Value::clone(event))
        });
        assert_eq!((&started["type"], &started["action"]), (&json!("Normal"), &json!("StartKubeProxy")), "{started}");
        assert_eq!(started["reportingInstance"], format!("shunt-{name}"));
    }
    for reason in ["FailedToStartProxierHealthcheck", "FailedToStartMetricServer"] {
        until(reason, || with_reason(&events(0), reason).len() == 1);
        let told = events(0);
        let event = with_reason(&told, reason)[0];
        assert_eq!((&event["type"], &event["action"]), (&json!("Warning"), &json!("StartKubeProxy")));
        assert!(event["message"].as_str().is_some_and(|text| text.contains("cannot listen on")), "{event}");
        assert!(with_reason(&events(1), reason).is_empty(), "the other node has its ports");
    }
    drop(busy);
    // Another start is another event.
    rig.agents[1].stop();
    rig.agents[1].start();
    until("the second start", || with_reason(&events_about(&rig, "Node", &names[1], &names[1]), "Starting").len() == 2);
}

#[test]
fn a_problem_is_one_event_for_all_nodes_and_counted_when_it_comes_again() {
    let rig = Rig::new();
    let services = rig.api().namespaced(Kind::SERVICE, "default");
    let mut odd = service("odd");
    odd["spec"]["ports"] = json!([{"name": "http", "port": 80}, sctp()]);
    let stored = rig.api().create(&odd).expect("the service is accepted");
    let uid = stored["metadata"]["uid"].as_str().expect("it has one").to_owned();
    let told = || {
        with_reason(&events_about(&rig, "Service", "odd", &uid), "UnsupportedProtocol")
            .into_iter()
            .cloned()
            .collect::<Vec<_>>()
    };
    until("an event about the service", || told().len() == 1);
    let first = told().remove(0);
    assert_eq!(first["type"], "Warning");
    assert!(first["message"].as_str().is_some_and(|text| text.contains("SCTP is not supported")), "{first}");
    // Both agents know of it.
    let problems = |rig: &Rig| rig.agents.iter().all(|agent| agent.report()["problems"].to_string().contains("SCTP"));
    until("both agents", || problems(&rig));
    let ports = |ports: Value| Patch::Merge(json!({"spec": {"ports": ports}}));
    // What comes and goes between two looks of an agent is not seen: again and again, until it was often enough.
    until("a count", || {
        services.patch("odd", &ports(json!([{"name": "http", "port": 80}]))).expect("it can be changed");
        until("no problem", || rig.agents.iter().all(|agent| !agent.report()["problems"].to_string().contains("SCTP")));
        services.patch("odd", &ports(json!([{"name": "http", "port": 80}, sctp()]))).expect("it can be changed");
        until("the problem again", || problems(&rig));
        told().iter().any(|event| event["series"]["count"].as_u64() >= Some(3))
    });
    assert_eq!(told().len(), 1, "one event, whatever happens how often on how many nodes");
}
