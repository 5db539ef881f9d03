//! Ports that the kernel does not give away: those of rewritten sources and NodePorts, beside what others reserved.

use std::collections::BTreeSet;

use shunt_tests::wait;

use crate::node::Lone;

const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";

/// A service with these NodePorts.
fn service(name: &str, vip: &str, node_ports: impl IntoIterator<Item = u16>) -> String {
    let port = |port| format!("{{name: p{port}, port: {port}, nodePort: {port}, protocol: TCP}}");
    let ports: Vec<String> = node_ports.into_iter().map(port).collect();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {{type: NodePort, clusterIP: {vip}, ports: [{}]}}\n---\n",
        ports.join(", ")
    )
}

/// All reserved ports.
fn reserved(node: &Lone) -> BTreeSet<u16> {
    let text = node.place.ns().read_sysctl(RESERVED);
    let parts = text.split(',').filter(|part| !part.is_empty());
    let port = |text: &str| text.parse::<u16>().expect("a port");
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => port(first)..=port(last),
        None => port(part)..=port(part),
    };
    parts.flat_map(range).collect()
}

#[test]
fn node_ports_are_reserved_for_as_long_as_services_have_them() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    let reads = |text: &str| wait::until(text, || ns.read_sysctl(RESERVED) == text);
    // The operator's own stay, also where a service wants them.
    ns.sysctl(RESERVED, "9000,30005");
    node.manifests.write_text("one", &service("one", "10.96.0.1", [30001, 30005]));
    node.manifests.write_text("two", &service("two", "10.96.0.2", [30002, 30003]));
    node.start([]);
    reads("9000,10000-29999,30001-30003,30005");
    node.manifests.write_text("two", &service("two", "10.96.0.2", [30001, 30003]));
    reads("9000,10000-29999,30001,30003,30005");
    node.manifests.delete("one");
    node.manifests.write_text("three", &service("three", "10.96.0.3", [32000]));
    reads("9000,10000-29999,30001,30003,30005,32000");

    // What is deleted while no agent runs is released by the next one, once it has listed.
    node.crash();
    node.manifests.delete("three");
    assert_eq!(ns.read_sysctl(RESERVED), "9000,10000-29999,30001,30003,30005,32000");
    node.start(["--snat-ports", "20000-20999"]);
    reads("9000,20000-20999,30001,30003,30005");
    node.crash();
    assert!(node.shunt(["cleanup"]).status.success());
    assert_eq!(ns.read_sysctl(RESERVED), "9000,30005");
}

#[test]
fn thousands_of_scattered_ports_come_and_go_and_those_of_others_stay() {
    let mut node = Lone::new();
    let others: BTreeSet<u16> = (2001..4001).step_by(2).collect();
    let list: Vec<String> = others.iter().map(ToString::to_string).collect();
    // Longer than the page that the kernel takes at once.
    assert!(list.join(",").len() > 4096);
    node.place.ns().sysctl(RESERVED, &list.join(","));
    assert_eq!(reserved(&node), others);
    let ports: Vec<u16> = (30_000..34_000).step_by(2).collect();
    let services = |ports: &[u16]| -> String {
        let numbered = ports.chunks(100).enumerate();
        numbered.map(|(n, ports)| service(&format!("s{n}"), &format!("10.96.0.{n}"), ports.iter().copied())).collect()
    };
    node.manifests.write_text("all", &services(&ports));
    node.start([]);
    let expected = |ports: &[u16]| -> BTreeSet<u16> {
        others.iter().copied().chain(10_000..30_000).chain(ports.iter().copied()).collect()
    };
    wait::until("2,000 NodePorts to be reserved", || reserved(&node) == expected(&ports));
    // Half of them go at once.
    node.manifests.write_text("all", &services(&ports[..1000]));
    wait::until("1,000 NodePorts to be left", || reserved(&node) == expected(&ports[..1000]));
    node.crash();
    assert!(node.shunt(["cleanup"]).status.success());
    assert_eq!(reserved(&node), others);
}
