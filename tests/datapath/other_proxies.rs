//! Traces of other service proxies are told at start, and harm nothing.

use crate::node::Lone;

#[track_caller]
fn warnings(node: &mut Lone) -> Vec<String> {
    node.start([]);
    node.agent().lines().into_iter().filter(|line| line.contains("would translate services beside shunt")).collect()
}

#[test]
fn rules_of_kube_proxy_are_told_at_start() {
    // Its own table in nftables mode; chains in the common tables in iptables mode.
    for rules in [
        "add table ip kube-proxy; add chain ip kube-proxy services",
        "add table ip6 nat; add chain ip6 nat KUBE-SERVICES",
    ] {
        let mut node = Lone::new();
        node.place.ns().nft(rules);
        let told = warnings(&mut node);
        assert!(matches!(&told[..], [line] if line.contains("kube-proxy --cleanup")), "{rules}: {told:?}");
    }
}

#[test]
fn rules_of_others_are_no_proxy() {
    let mut node = Lone::new();
    node.place
        .ns()
        .nft("add table inet firewall; add chain inet firewall input; add table ip nat; add chain ip nat services");
    assert_eq!(warnings(&mut node), [""; 0]);
}
