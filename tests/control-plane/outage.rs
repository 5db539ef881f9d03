//! An API server that goes away, returns, and returns with other data.

use shunt_tests::control_plane::Part;
use shunt_tests::probe::TcpLoop;
use shunt_tests::wait::until;

use crate::rig::{Rig, deployment, service};

#[test]
fn traffic_outlives_the_api_server_and_news_come_when_it_returns() {
    let rig = Rig::new();
    let api = rig.api();
    let stored = api.create(&service("web")).expect("the service is accepted");
    api.create(&deployment("web", 2, "1")).expect("the deployment is accepted");
    rig.wait_backends("web", 2);
    let clients = rig.clients();
    let to = rig.cluster_addresses(&stored);
    let load = |place: &shunt_tests::place::Place| {
        place.tcp_loop(TcpLoop { to: to.clone(), rate: 50, workers: 2, count: None })
    };
    let mut loads = [load(&clients.by_socket), load(&clients.by_packets)];

    rig.plane.halt(Part::ApiServer);
    rig.agents.iter().for_each(|agent| drop(agent.wait_log("no news from the API server")));
    loads.iter_mut().for_each(|load| drop(load.wait_answers(50)));
    // It is told, and is no reason to take the node out of service: what was known stays programmed.
    for (node, agent) in rig.agents.iter().enumerate() {
        let source = agent.report()["sources"][0].clone();
        assert_eq!((&source["name"], &source["listed"]), (&"kubernetes".into(), &true.into()), "{source}");
        assert_eq!(source["stale"], true, "{source}");
        assert!(source["outages"][0]["why"].as_str().is_some_and(|why| why.contains("cannot be reached")), "{source}");
        assert!(source["objects"]["Service"].as_u64() >= Some(2), "{source}");
        assert_eq!(rig.scrape(node, "shunt_source_stale"), [r#"shunt_source_stale{source="kubernetes"} 1"#]);
        assert!(rig.get(node, 10256, "/readyz").ends_with("ready\n"));
    }
    rig.plane.resume(Part::ApiServer);
    rig.agents.iter().for_each(|agent| drop(agent.wait_log("the API server answers again")));
    api.create(&deployment("steady", 1, "1")).expect("the deployment is accepted");
    api.create(&service("steady")).expect("the service is accepted");
    rig.wait_backends("steady", 1);
    rig.wait_backends("web", 2);
    for agent in &rig.agents {
        until("that nothing is stale", || agent.report()["sources"][0]["stale"] == false);
    }
    for load in loads {
        load.finish_clean();
    }
}

#[test]
fn store_that_was_wiped_is_listed_anew() {
    let rig = Rig::new();
    let api = rig.api();
    api.create(&service("old")).expect("the service is accepted");
    api.create(&deployment("old", 1, "1")).expect("the deployment is accepted");
    rig.wait_backends("old", 1);

    rig.plane.wipe();
    api.create(&service("new")).expect("the service is accepted");
    api.create(&deployment("new", 1, "1")).expect("the deployment is accepted");
    rig.wait_backends("new", 1);
    for agent in &rig.agents {
        until("that the old service is gone", || !agent.shunt(["services"]).contains("default/old"));
    }
    let clients = rig.clients();
    let stored = api.namespaced(shunt_tests::control_plane::Kind::SERVICE, "default").get("new");
    for to in rig.cluster_addresses(&stored.expect("it is there")) {
        clients.by_socket.tcp(to).expect("it is answered");
        clients.by_packets.tcp(to).expect("it is answered");
    }
}
