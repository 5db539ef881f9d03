//! NodePorts that something else on the node has too: it is named, and the service works.

use shunt_tests::traffic::Ports;
use shunt_tests::wait;

use crate::node::{Lone, service};

fn node_port(name: &str, vip: &str, port: u16) -> String {
    let text = service(name, vip, &["10.244.1.1"], 8080).replace("type: ClusterIP", "type: NodePort");
    text.replace("protocol: TCP}]}\n---", &format!("protocol: TCP, nodePort: {port}}}]}}\n---"))
}

/// What the agent says of a service.
fn problem(node: &Lone, name: &str) -> Option<String> {
    let report = node.status()["report"].clone();
    let subject = format!("manifests/default/{name}");
    let problems = report["problems"].as_array().expect("a list").iter();
    let of_service = problems.filter(|problem| problem["subject"] == *subject);
    of_service.map(|problem| problem["message"].as_str().expect("text").to_owned()).next()
}

#[test]
fn a_node_port_that_a_process_or_a_container_has_is_told() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    let busy = node.place.serve(Ports { tcp: &[30080], udp: &[30082] });
    let ports = [("socket", 30080), ("rule", 30081), ("datagrams", 30082), ("elsewhere", 30083), ("free", 30084)];
    for (position, (name, port)) in ports.iter().enumerate() {
        node.manifests.write_text(name, &node_port(name, &format!("10.96.0.{}", position + 1), *port));
    }
    // As CNI's portmap writes them, for hostPorts.
    for rule in [
        "-N CNI-HOSTPORT-DNAT",
        "-N CNI-DN-0123",
        "-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
        "-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 30081,30083 -j CNI-DN-0123",
        "-A CNI-DN-0123 -p tcp -m tcp --dport 30081 -j DNAT --to-destination 10.244.1.9:80",
        "-A CNI-DN-0123 -d 192.0.2.9/32 -p tcp -m tcp --dport 30083 -j DNAT --to-destination 10.244.1.9:81",
    ] {
        node.place.ns().output(["sh", "-c", &format!("iptables-nft -t nat {rule}")]);
    }
    node.start(["--nodeport-addresses", "all"]);
    wait::until("both to be told", || problem(&node, "rule").is_some() && problem(&node, "socket").is_some());
    let told = problem(&node, "rule").expect("it was there");
    assert!(told.starts_with("nodePort 30081/TCP is also that of a rule") && told.contains("CNI-DN-0123"), "{told}");
    let told = problem(&node, "socket").expect("it was there");
    assert!(told.contains("a process of this node that listens on") && told.contains(":30080"), "{told}");
    assert_eq!(problem(&node, "datagrams"), None, "another protocol");
    assert_eq!(problem(&node, "elsewhere"), None, "at an address that is none of this node");
    assert_eq!(problem(&node, "free"), None);
    let told = node.log("is also that of a process");
    assert!(told.contains("manifests/default/socket"), "{told}");
    drop(busy);
    wait::until("the port to be the service's alone", || problem(&node, "socket").is_none());
    assert!(problem(&node, "rule").is_some());
}
