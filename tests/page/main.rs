//! The page for people, in a real browser on the node: what it shows is what is programmed, it follows changes, and no
//! name that a service may have is anything but text. Screenshots go to `target/page`, for people to look at.
//!
//! ```text
//!   node-1: agent, browser ──┬── pod-1-1: server
//!                            └── pod-1-2: client of services
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde_json::{Value, json};
use shunt_tests::agent::Agent;
use shunt_tests::browser::{Browser, Screen};
use shunt_tests::manifests::{Endpoint, Manifests, service};
use shunt_tests::probe::TcpLoop;
use shunt_tests::topology::{Cluster, Family, Plan, SERVICES};
use shunt_tests::traffic::Ports;

const URL: &str = "http://127.0.0.1:10247/";
const DESKTOP: Screen = Screen { width: 1360, height: 1080, is_dark: false };
const NARROW: Screen = Screen { width: 420, height: 1400, is_dark: false };
const TARGET: u16 = 8080;

/// Where a screenshot goes: beside what is built.
fn shot(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of the running program is known");
    let target = test.ancestors().find(|dir| dir.ends_with("target")).expect("tests are built in target");
    let dir = target.join("page");
    std::fs::create_dir_all(&dir).expect("a directory can be made");
    dir.join(format!("{name}.png"))
}

/// How many services are shown.
const COUNT: &str = "document.querySelectorAll('#rows tr.service').length";

fn text_of(selector: &str) -> String {
    format!("(document.querySelector({})?.innerText ?? '')", json!(selector))
}

#[track_caller]
fn expect_no_complaints(browser: &Browser) {
    assert_eq!(browser.complaints(), [""; 0]);
}

#[test]
fn what_is_programmed_is_shown_live_with_rates_errors_and_changes() {
    let cluster = Cluster::build(Plan::default());
    let node = &cluster.nodes[0];
    let manifests = Manifests::of(&cluster);
    let server = node.pods[0].place.serve(Ports { tcp: &[TARGET], udp: &[] });
    let web = service("web").cluster_ips(SERVICES.host(10)).tcp(80, TARGET).node_port(30080);
    let api = service("api").cluster_ips(SERVICES.host(11)).tcp(443, TARGET);
    manifests.apply(&web.clone().endpoints([Endpoint::from(&node.pods[0])]));
    manifests.apply(&api.endpoints(node.pods.iter().map(Endpoint::from)));
    manifests.apply(&service("lonely").cluster_ips(SERVICES.host(12)).tcp(80, TARGET));
    let _agent = Agent::start_on(&cluster, node, &manifests);
    let mut browser = Browser::start(&cluster.bed, &node.place);
    browser.open(URL, DESKTOP);
    // Each port in both families.
    browser.wait(&format!("{COUNT} === 6"));
    browser.wait(&format!("{}.includes('serving')", text_of("#state")));
    assert_eq!(browser.value("document.title"), json!("node-1 · Shunt"));
    let rows = browser.value(&text_of("#rows"));
    let rows = rows.as_str().expect("text");
    for part in ["default/web", "10.96.0.10:80/TCP", "every node address:30080/TCP", "default/lonely", "refused"] {
        assert!(rows.contains(part), "{part}: {rows}");
    }

    // Traffic, and a client that is refused.
    let to = [10, 11].map(|number| SERVICES.host(number).port(Family::V4, if number == 10 { 80 } else { 443 }));
    let mut load = node.pods[1].place.tcp_loop(TcpLoop { to: to.to_vec(), rate: 40, workers: 4, count: None });
    load.wait_answers(10);
    node.place.tcp(SocketAddr::from((Ipv4Addr::new(10, 96, 0, 12), 80))).expect_err("nobody serves it");
    browser.wait("[...document.querySelectorAll('.card .value')].some((value) => /^[1-9][0-9.]* ?\\/s$/.test(value.innerText.trim()))");
    browser.wait(&format!("{}.includes('no endpoint')", text_of("#drop-rows")));

    // A service comes, an endpoint goes: told as they happen.
    manifests.apply(&service("late").cluster_ips(SERVICES.host(13)).tcp(80, TARGET));
    manifests.apply(&web.endpoints([Endpoint::from(&node.pods[0]), Endpoint::from(&node.pods[1])]));
    browser.wait(&format!("{COUNT} === 8"));
    browser.wait(&format!("{}.includes('default/late')", text_of("#changes")));
    browser.wait(&format!("/up\\s+manifests.default.web/.test({})", text_of("#changes")));

    // Found, sorted, opened: by what a person does.
    browser.value("document.querySelector('[data-key=\"sort rate\"]').click()");
    browser.wait("document.querySelector('th[aria-sort=descending]')?.innerText.includes('Connections/s') === true");
    browser.wait("/api|web/.test(document.querySelector('#rows .open').innerText)");
    browser.value("document.querySelector('#rows .open').click()");
    browser.wait(&format!("{}.includes(':8080/TCP')", text_of("#rows .detail")));
    // A minute's worth of lines would be too long to wait for; some points of it are enough to be seen.
    browser.wait("Number(document.body.dataset.rounds) > 12");
    browser.screenshot(&shot("desktop-light"), true);
    browser.set_screen(Screen { is_dark: true, ..DESKTOP });
    browser.screenshot(&shot("desktop-dark"), true);
    browser.set_screen(NARROW);
    browser.screenshot(&shot("narrow-light"), true);
    assert_eq!(browser.value("document.documentElement.scrollWidth <= innerWidth"), json!(true), "nothing is cut off");
    browser.set_screen(Screen { is_dark: true, ..NARROW });
    browser.screenshot(&shot("narrow-dark"), true);
    browser.set_screen(DESKTOP);
    browser.value("{ const find = document.getElementById('find'); find.value = '10.96.0.12'; find.dispatchEvent(new Event('input')); }");
    browser.wait(&format!("{COUNT} === 1 && {}.includes('lonely')", text_of("#rows")));
    expect_no_complaints(&browser);
    load.finish();
    drop(server);
}

#[test]
fn a_name_is_text_whatever_it_says_and_an_agent_that_ends_is_told() {
    let cluster = Cluster::build(Plan::default());
    let node = &cluster.nodes[0];
    let manifests = Manifests::of(&cluster);
    let evil = "<img src=x onerror=document.title=1>";
    // What a source rejects is shown too, with the words of the file.
    let object = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: '{evil}', namespace: default}}\n\
         spec: {{clusterIP: 10.96.0.10, ports: [{{port: 80000, protocol: TCP}}]}}\n"
    );
    manifests.write_text("evil", &object);
    let mut agent = Agent::start_on(&cluster, node, &manifests);
    let mut browser = Browser::start(&cluster.bed, &node.place);
    browser.open(URL, DESKTOP);
    browser.wait("!document.getElementById('trouble').hidden");
    browser.wait(&format!("{}.includes('<img src=x')", text_of("#trouble-list")));
    assert_eq!(browser.value("document.querySelectorAll('#trouble img').length"), json!(0));
    assert_eq!(browser.value("document.title"), json!("node-1 · Shunt"));
    browser.wait(&format!("{}.includes('attention')", text_of("#state")));
    browser.screenshot(&shot("trouble"), true);
    expect_no_complaints(&browser);
    agent.stop();
    browser.wait(&format!("{}.includes('does not answer')", text_of("#state")));
    browser.screenshot(&shot("gone"), true);
}

#[test]
fn ten_thousand_services_are_shown_page_by_page() {
    const SERVICES_COUNT: u16 = 10_000;
    let cluster = Cluster::build(Plan::default());
    let node = &cluster.nodes[0];
    let manifests = Manifests::of(&cluster);
    let endpoint = node.pods[0].addrs.v4;
    let object = |number: u16| {
        let (name, addr) = (format!("service-{number:05}"), SERVICES.host(number + 100).v4);
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: team-{}}}\n\
             spec: {{clusterIP: {addr}, clusterIPs: [{addr}], ipFamilies: [IPv4], ports: [{{port: 80, protocol: TCP}}]}}\n\
             ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-1, namespace: team-{}, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: IPv4\nports: [{{name: '', port: {}, protocol: TCP}}]\nendpoints: [{{addresses: [{endpoint}]}}]\n",
            number % 40,
            number % 40,
            8000 + number % 1000,
        )
    };
    manifests.write_text("many", &(0..SERVICES_COUNT).map(object).collect::<String>());
    let _agent = Agent::start_on(&cluster, node, &manifests);
    let mut browser = Browser::start(&cluster.bed, &node.place);
    browser.open(URL, DESKTOP);
    browser.wait(&format!("{COUNT} === 50 && {}.includes('10,000')", text_of("#found")));
    browser.value("document.getElementById('next').click()");
    browser.wait(&format!("{}.includes('51–100 of 10,000')", text_of("#place")));
    browser.wait("Number(document.body.dataset.rounds) > 5");
    browser.screenshot(&shot("many"), false);
    browser.value("{ const find = document.getElementById('find'); find.value = 'team-7/'; find.dispatchEvent(new Event('input')); }");
    browser.wait(&format!("{}.includes('250 of 10,000')", text_of("#found")));
    expect_no_complaints(&browser);
    let told = browser.value(&text_of("#changes"));
    let is_one = |text: &Value| text.as_str().is_some_and(|text| text.contains("10000 services added"));
    assert!(is_one(&told), "a first list is one change: {told}");
}
