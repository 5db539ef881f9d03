//! `shunt explain` foretells what then happens, to every kind of client, and changes nothing; `shunt monitor` tells it when it
//! happens.

use serde_json::{Value, json};
use shunt_tests::manifests::Endpoint;
use shunt_tests::place::Place;
use shunt_tests::topology::{Family, Plan};
use shunt_tests::wait;

use crate::rig::{Counters, Frontend, Offer, PORT, Proto, Rig, TARGET};
use crate::talk::Tcp;

const NEAR: Offer = Offer::new(1, "near");
const FAR: Offer = Offer::new(2, "far");
const NOBODY: Offer = Offer::new(3, "nobody");
const LOCAL: Offer = Offer::new(4, "local");

/// An explanation on the first node; it must change nothing there.
#[track_caller]
fn explain(rig: &Rig, words: &[&str]) -> Value {
    let flows = || rig.agents[0].shunt(["flows", "-o", "json"]);
    let before = flows();
    let (text, counted) = rig.counted(0, || {
        let [src, dst, proto, by] = words else { panic!("four words: {words:?}") };
        rig.agents[0].shunt(["explain", src, dst, proto, "--by", by, "-o", "json"])
    });
    assert_eq!(counted, Counters::default(), "{words:?} counted");
    // Ages go on.
    let ends = |text: &str| {
        let flows: Vec<Value> = serde_json::from_str(text).expect("a list");
        let mut ends: Vec<_> = flows.iter().map(|flow| format!("{} {}", flow["client"], flow["frontend"])).collect();
        ends.sort();
        ends
    };
    // Others may end meanwhile.
    let before = ends(&before);
    let new: Vec<_> = ends(&flows()).into_iter().filter(|flow| !before.contains(flow)).collect();
    assert_eq!(new, Vec::<String>::new(), "{words:?} made flows");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The ends of the packet that a result speaks of.
#[track_caller]
fn ends_of(explanation: &Value) -> (String, String) {
    let result = explanation["result"].as_str().expect("a text");
    let (_, packet) = result.split_once(" as ").unwrap_or_else(|| panic!("nothing arrives: {explanation:#}"));
    let (src, dst) = packet.split_once(" > ").expect("two ends");
    (src.to_owned(), dst.to_owned())
}

#[track_caller]
fn foretells(rig: &Rig, client: &Place, from: std::net::IpAddr, to: std::net::SocketAddr, proto: Proto) {
    let proto_name = if proto == Proto::Tcp { "tcp" } else { "udp" };
    let explanation = explain(rig, &[&from.to_string(), &to.to_string(), proto_name, "packet"]);
    let answer = proto.ask(client, to).unwrap_or_else(|failure| panic!("{from} to {to}: {failure}"));
    let (src, dst) = ends_of(&explanation);
    assert_eq!(dst, answer.seen_server.to_string(), "{explanation:#}");
    let src: std::net::SocketAddr = src.parse().expect("an address and a port");
    let is_kept = answer.seen_client.ip() == from;
    assert_eq!(src.ip() == from, is_kept, "{from} to {to}: {answer:?}\n{explanation:#}");
    // What comes back looks as if it came from what was dialled.
    let reply = explanation["reply"].as_array().expect("steps");
    let last = reply.iter().rev().find_map(|step| step["packet"].as_str());
    let last = last.unwrap_or_else(|| panic!("no answer: {explanation:#}"));
    assert!(
        last.starts_with(&format!("{to} > {from}")) || last.starts_with(&format!("{to} > [{from}]")),
        "{explanation:#}"
    );
}

#[track_caller]
fn explanations_come_true(plan: Plan, frontends: &[Frontend]) {
    let rig = Rig::build(plan);
    rig.cluster.route_vips(rig.node(0));
    rig.apply(&[&NEAR.to(&rig.node(0).pods[0]), &FAR.to(&rig.node(1).pods[0])]);
    let (pod, outside) = (&rig.node(0).pods[1], &rig.cluster.client);
    for family in Family::ALL {
        // Where a pod is, and which port of a bridge it is behind, the kernel learns from packets.
        pod.place.unhooked().tcp(FAR.at(Frontend::NodePort, rig.node(0), family)).expect("it is served");
        for offer in [&NEAR, &FAR] {
            for &frontend in frontends {
                let to = offer.at(frontend, rig.node(0), family);
                foretells(&rig, &pod.place.unhooked(), pod.addrs.get(family), to, Proto::Tcp);
                foretells(&rig, &outside.place, outside.addrs.get(family), to, Proto::Tcp);
            }
            foretells(
                &rig,
                &outside.place,
                outside.addrs.get(family),
                offer.at(frontends[0], rig.node(0), family),
                Proto::Udp,
            );
        }
    }
}

#[test]
fn explanations_come_true_among_routed_pods() {
    explanations_come_true(Plan { nodes: 2, ..Plan::default().strict() }, &Frontend::ALL);
}

#[test]
fn explanations_come_true_among_bridged_pods() {
    explanations_come_true(Plan { nodes: 2, ..Plan::bridge().strict() }, &[Frontend::NodePort, Frontend::ClusterIp]);
}

#[test]
fn explanations_come_true_over_an_overlay() {
    explanations_come_true(Plan { masquerades: false, ..Plan::flannel(2) }, &[Frontend::NodePort]);
}

/// Words that an explanation must have somewhere.
#[track_caller]
fn says(rig: &Rig, words: &[&str], wanted: &[&str]) {
    let explanation = explain(rig, words);
    let text = explanation.to_string();
    for want in wanted {
        assert!(text.contains(want), "{words:?} lacks {want:?}: {explanation:#}");
    }
}

#[test]
fn what_is_refused_is_explained_with_its_reason() {
    let rig = Rig::build(Plan { nodes: 2, ..Plan::default() });
    rig.cluster.route_vips(rig.node(0));
    let local = LOCAL.to(&rig.node(1).pods[0]).spec("externalTrafficPolicy", json!("Local"));
    let restricted = NEAR.to(&rig.node(0).pods[0]).spec("loadBalancerSourceRanges", json!(["198.51.100.0/24"]));
    rig.apply(&[&NOBODY.service().endpoints(Vec::<Endpoint>::new()), &local, &restricted]);
    let (node, family) = (rig.node(0), Family::V4);
    let pod = node.pods[1].addrs.get(family).to_string();
    let outside = rig.cluster.client.addrs.get(family).to_string();
    let at = |offer: &Offer, frontend| offer.at(frontend, node, family).to_string();
    let nobody = at(&NOBODY, Frontend::ClusterIp);
    says(&rig, &[&pod, &nobody, "tcp", "packet"], &["a TCP reset (no_endpoint)", "nobody:tcp-80"]);
    says(&rig, &[&pod, &nobody, "udp", "packet"], &["ICMP port unreachable (no_endpoint)"]);
    says(&rig, &[&pod, &nobody, "tcp", "process"], &["connection refused", "no_endpoint", "refused at the socket"]);
    let unknown = NOBODY.cluster_ip().port(family, PORT + 1).to_string();
    says(&rig, &[&pod, &unknown, "tcp", "packet"], &["unknown_port"]);
    says(
        &rig,
        &[&outside, &at(&LOCAL, Frontend::NodePort), "tcp", "packet"],
        &["dropped (no_local_endpoint)", "local set"],
    );
    says(&rig, &[&pod, &at(&LOCAL, Frontend::NodePort), "tcp", "packet"], &["cluster set", "leaves by"]);
    says(&rig, &[&outside, &at(&NEAR, Frontend::LoadBalancer), "tcp", "packet"], &["dropped (source_range)"]);
    let unallocated = shunt_tests::topology::SERVICES.host(999).port(family, PORT).to_string();
    says(&rig, &[&pod, &unallocated, "tcp", "packet"], &["unallocated_service_address"]);
    says(&rig, &[&pod, &NOBODY.cluster_ip().get(family).to_string(), "tcp", "packet"], &["unknown_port", "pings"]);
    // Nobody's: it goes where it was going.
    let direct = node.pods[0].addrs.port(family, TARGET).to_string();
    says(&rig, &[&pod, &direct, "tcp", "packet"], &["passes as it is"]);
    let of_node = node.addrs.get(family).to_string();
    says(&rig, &[&of_node, &nobody, "tcp", "packet"], &["host_unhooked"]);
}

/// The XDP program of the uplink is run first where it is attached.
#[test]
fn what_xdp_would_do_is_explained_too() {
    let rig = Rig::build_with(Plan::default(), |agent| agent.with("--xdp", "native"));
    rig.apply(&[&NEAR.to(&rig.node(0).pods[0])]);
    let outside = rig.cluster.client.addrs.get(Family::V4).to_string();
    let to = NEAR.at(Frontend::NodePort, rig.node(0), Family::V4).to_string();
    says(&rig, &[&outside, &to, "tcp", "packet"], &["XDP eth0", "ingress eth0", "near:tcp-80"]);
}

#[test]
fn a_process_is_told_its_backend_and_a_connection_that_is_there_keeps_its_own() {
    let rig = Rig::build(Plan { nodes: 2, ..Plan::default() });
    rig.apply(&[&FAR.to(&rig.node(1).pods[0])]);
    let (node, family) = (rig.node(0), Family::V4);
    let pod = &node.pods[1];
    let to = FAR.at(Frontend::ClusterIp, node, family);
    let backend = rig.node(1).pods[0].addrs.port(family, TARGET).to_string();
    for src in [pod.addrs.get(family), node.addrs.get(family)] {
        let goes = format!("goes to {backend} before a packet is made");
        says(&rig, &[&src.to_string(), &to.to_string(), "tcp", "process"], &[&goes, "far:tcp-80", "leaves by eth0"]);
    }
    let mut held = pod.place.unhooked().run(|| Tcp::dial(0, to)).expect("it is served");
    held.ask().expect("it is answered");
    let flows: Vec<Value> = serde_json::from_str(&rig.agents[0].shunt(["flows", "-o", "json"])).expect("a list");
    let flow = flows.iter().find(|flow| flow["frontend"] == format!("{to}/TCP")).expect("the connection");
    let client = flow["client"].as_str().expect("text").trim_end_matches("/TCP").to_owned();
    says(&rig, &[&client, &to.to_string(), "tcp", "packet"], &["a connection that is there"]);
    held.ask().expect("it is answered");
}

#[test]
fn what_happens_is_told_while_somebody_watches() {
    let rig = Rig::build(Plan::default());
    rig.apply(&[&NEAR.to(&rig.node(0).pods[0]), &NOBODY.service().endpoints(Vec::<Endpoint>::new())]);
    let (node, family) = (rig.node(0), Family::V4);
    let pod = &node.pods[1];
    let watch = |kinds: &str, work: &dyn Fn()| -> Value {
        let monitor = rig.agents[0].spawn_shunt(&["monitor", "--kinds", kinds, "--count", "1", "-o", "json"]);
        // It watches when it has set the switch: events of before are not told, so the work is repeated.
        let line = std::cell::RefCell::new(None);
        wait::until("an event", || {
            work();
            *line.borrow_mut() = monitor.lines().first().cloned();
            line.borrow().is_some()
        });
        let line = line.into_inner().expect("it was waited for");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    };
    let to = NEAR.at(Frontend::ClusterIp, node, family);
    let backend = node.pods[0].addrs.port(family, TARGET).to_string();
    let nobody = NOBODY.at(Frontend::ClusterIp, node, family);

    let socket = watch("socket", &|| drop(pod.place.tcp(to)));
    assert_eq!((&socket["frontend"], &socket["backend"]), (&json!(to.to_string()), &json!(backend)), "{socket}");
    assert!(socket["service"].as_str().is_some_and(|name| name.contains("near:tcp-80")), "{socket}");
    assert!(socket["client"].as_str().is_some_and(|client| client.ends_with(']')), "{socket}");
    let flow = watch("flow", &|| drop(pod.place.unhooked().tcp(to)));
    assert_eq!((&flow["frontend"], &flow["backend"]), (&json!(to.to_string()), &json!(backend)), "{flow}");
    assert!(
        flow["client"].as_str().is_some_and(|client| client.starts_with(&pod.addrs.get(family).to_string())),
        "{flow}"
    );
    assert_eq!(flow["device"], "veth-1-2", "{flow}");
    let refused = watch("refused", &|| drop(pod.place.tcp(nobody)));
    assert_eq!(
        (&refused["reason"], &refused["frontend"]),
        (&json!("no_endpoint"), &json!(nobody.to_string())),
        "{refused}"
    );
    let dropped = watch("drop", &|| drop(pod.place.unhooked().tcp(nobody)));
    assert_eq!(
        (&dropped["reason"], &dropped["frontend"]),
        (&json!("no_endpoint"), &json!(nobody.to_string())),
        "{dropped}"
    );
    assert!(dropped["service"].as_str().is_some_and(|name| name.contains("nobody:tcp-80")), "{dropped}");
}
