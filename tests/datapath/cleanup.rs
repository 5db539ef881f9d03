//! `shunt cleanup` leaves a node as it was.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use shunt_tests::traffic::Ports;

use crate::node::{Lone, pair, service};

const VIP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);
const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";

#[test]
fn cleanup_leaves_nothing_and_may_be_repeated() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    // Some of the range is the operator's own, and stays so.
    ns.sysctl(RESERVED, "9000,15000-15009");
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    node.start([]);
    assert_eq!(ns.read_sysctl(RESERVED), "9000,10000-29999");
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node");

    let refused = node.shunt(["cleanup"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("another agent owns"), "{refused:?}");
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node", "an agent runs: nothing was removed");
    node.stop();

    for _ in 0..2 {
        let cleanup = node.shunt(["cleanup"]);
        assert!(cleanup.status.success(), "{cleanup:?}");
        assert!(!node.bpffs.exists(), "nothing is pinned");
        assert_eq!(node.pair("eth0"), pair("", ""));
        assert!(node.place.tcp(VIP).is_err(), "no hook is left");
        assert_eq!(ns.read_sysctl(RESERVED), "9000,15000-15009");
    }
    node.start([]);
    assert_eq!(node.place.tcp(VIP).unwrap().server, "node", "and it can begin anew");
}

#[test]
fn a_file_system_that_the_agent_mounted_goes_too() {
    let mut node = Lone::new();
    node.bpffs = node.bed.subdir("plain").join("shunt");
    let is_mounted = |path: &Path| {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().any(|line| line.split(' ').nth(1) == path.to_str())
    };
    node.start([]);
    assert!(is_mounted(&node.bpffs));
    node.stop();
    assert!(node.shunt(["cleanup"]).status.success());
    assert!(!is_mounted(&node.bpffs));
}

#[test]
fn commands_on_an_empty_node_say_so() {
    let node = Lone::new();
    assert!(node.shunt(["cleanup"]).status.success());
    for subcommand in ["status", "services", "backends", "flows"] {
        let output = node.shunt([subcommand]);
        assert_eq!(output.status.code(), Some(1), "{subcommand}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("nothing is pinned below"), "{output:?}");
    }
}
