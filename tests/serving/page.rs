//! The page for people, as programs ask for it: from this node only, read only, by nobody's name.

use std::net::SocketAddr;

use serde_json::Value;
use shunt_tests::agent::Agent;
use shunt_tests::manifests::{Endpoint, Manifests, service};
use shunt_tests::topology::{Cluster, Family, Node, Plan, SERVICES};

use crate::http;

const PORT: u16 = 10247;

fn page_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], PORT))
}

#[track_caller]
fn json(node: &Node, path: &str) -> Value {
    let reply = http::get(&node.place, page_address(), path);
    assert!(reply.status == 200 && reply.head.contains("content-type: application/json"), "{reply:?}");
    serde_json::from_str(&reply.body).expect("it is JSON")
}

#[test]
fn files_come_with_a_policy_and_nothing_is_served_elsewhere_or_under_other_names() {
    let cluster = Cluster::build(Plan::default());
    let node = &cluster.nodes[0];
    let manifests = Manifests::of(&cluster);
    let _agent = Agent::start_on(&cluster, node, &manifests);
    for (path, kind) in
        [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript"), ("/icon.svg", "image/svg+xml")]
    {
        let reply = http::get(&node.place, page_address(), path);
        assert_eq!(reply.status, 200, "{path}");
        assert!(reply.head.contains(&format!("content-type: {kind}")), "{}", reply.head);
        assert!(
            reply.head.contains("content-security-policy: default-src 'none'; script-src 'self'"),
            "{}",
            reply.head
        );
    }
    // The policy forbids what stands in the page itself: there is none.
    let page = http::get(&node.place, page_address(), "/").body;
    assert_eq!((page.matches("<script").count(), page.matches("<script src=").count()), (1, 1));
    assert!(!page.contains("<style") && !page.contains("style=") && !page.contains("://"));
    assert!(page.split_whitespace().all(|word| !(word.starts_with("on") && word.contains('='))));
    for path in ["/", "/api/v1/overview", "/api/v1/services"] {
        let reply = http::try_get_as(&node.place, page_address(), "evil.test:10247", path).expect("an answer");
        assert_eq!(reply.status, 403, "{path}");
        let reply = http::try_ask(&node.place, page_address(), "POST", path).expect("an answer");
        assert_eq!(reply.status, 405, "{path}");
    }
    assert_eq!(http::get(&node.place, page_address(), "/nothing").status, 404);
    let outside = node.addrs.port(Family::V4, PORT);
    http::try_get(&cluster.client.place, outside, "/").expect_err("only this node is answered");
}

#[test]
fn what_is_programmed_is_told_in_parts() {
    let cluster = Cluster::build(Plan::default());
    let node = &cluster.nodes[0];
    let manifests = Manifests::of(&cluster);
    for number in 1..=3 {
        let web = service(&format!("web-{number}")).cluster_ips(SERVICES.host(number)).tcp(80, 8080);
        manifests.apply(&web.endpoints([Endpoint::from(&node.pods[0])]));
    }
    let agent = Agent::start_on(&cluster, node, &manifests).with("--page-bind-address", "");
    let overview = json(node, "/api/v1/overview");
    assert_eq!((&overview["node"], &overview["report"]["ready"]), (&"node-1".into(), &true.into()), "{overview}");
    let counts = &overview["counts"];
    // In both families.
    assert_eq!(
        (&counts["services"], &counts["backends"], &counts["without_backends"]),
        (&6.into(), &2.into(), &0.into())
    );
    let changes = overview["changes"].as_array().expect("a list");
    assert!(changes.iter().any(|change| change["kind"] == "added" && change["service"] == "manifests/default/web-3"));

    let rows = json(node, "/api/v1/services?find=web-2&limit=1");
    assert_eq!((&rows["total"], &rows["matched"]), (&6.into(), &2.into()), "{rows}");
    let row = &rows["rows"][0];
    assert_eq!(
        (&row["name"], &row["frontends"][0]),
        (&"manifests/default/web-2:tcp-80/TCP/IPv4".into(), &"10.96.0.2:80/TCP".into())
    );
    assert_eq!((&row["backends"], &row["local"], &row["refusal"]), (&1.into(), &1.into(), &Value::Null));
    let backends = json(node, &format!("/api/v1/backends?service={}", row["id"]));
    assert_eq!(
        backends,
        serde_json::json!([{ "address": format!("{}:8080/TCP", node.pods[0].addrs.v4), "local": true }])
    );
    assert_eq!(http::get(&node.place, page_address(), "/api/v1/backends?service=999").status, 404);

    // Switched off.
    let mut agent = agent;
    agent.stop();
    agent.start();
    http::try_get(&node.place, page_address(), "/").expect_err("nobody listens");
}
