//! The kernel goes on translating a predecessor's connections as long as there are any.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use proxy_userspace::datapath::kernel::MapFds;
use proxy_userspace::datapath::netfilter::{self, TABLE};
use proxy_userspace::datapath::predecessor::Task;
use shunt_tests::probe::LongLived;
use shunt_tests::traffic::Ports;

use crate::node::{Lone, service};

const VIP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 80);

const PREDECESSOR: &str = "table ip predecessor {
    chain output { type nat hook output priority -100; ip daddr 10.96.0.10 tcp dport 80 dnat to 10.244.1.1:8080; }
}";

fn rules(node: &Lone) -> String {
    node.place.ns().output(["nft", "list", "ruleset"])
}

/// A node with a server, a way to the VIP, and the rules that somebody else made.
#[track_caller]
fn node() -> (Lone, shunt_tests::traffic::Server) {
    let node = Lone::new();
    node.place.ns().ip(["route add 10.96.0.0/16 dev eth0"]);
    let server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.place.ns().nft(PREDECESSOR);
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    (node, server)
}

#[test]
fn the_kernel_translates_a_predecessors_connections_to_their_end_and_no_longer() {
    let (mut node, _server) = node();
    let ns = node.place.ns().clone();
    let mut load = node.place.unhooked().long_lived(LongLived { to: VIP, connections: 2, interval_ms: 20 });
    load.wait_answers(10);
    node.start([]);
    assert!(rules(&node).contains(TABLE));
    ns.nft("delete table ip predecessor");
    load.wait_answers(20);

    let maps = MapFds::open_pinned(&node.pins()).expect("they are pinned");
    let task = Task::open(&node.pins(), &maps).expect("the tables are known");
    let look = || node.place.run(|| task.look()).expect("the note can be removed");
    look();
    assert!(rules(&node).contains(TABLE), "there are connections");
    load.wait_answers(20);
    load.finish_clean();
    // As their time passes.
    ns.output(["conntrack", "-F"]);
    look();
    assert!(!rules(&node).contains(TABLE), "there are none");
    look();
}

#[test]
fn a_cleanup_undoes_it() {
    let (mut node, _server) = node();
    let mut load = node.place.unhooked().long_lived(LongLived { to: VIP, connections: 1, interval_ms: 20 });
    load.wait_answers(10);
    node.start([]);
    node.crash();
    node.start([]);
    node.stop();
    assert!(rules(&node).contains(TABLE));
    assert!(node.shunt(["cleanup"]).status.success());
    assert!(!rules(&node).contains(TABLE));
    load.finish_clean();
}

/// Translated connections that are no service's (a container engine's, say) are their owner's affair.
#[test]
fn connections_of_others_are_not_waited_for() {
    let (mut node, _server) = node();
    node.manifests.delete("web");
    let mut load = node.place.unhooked().long_lived(LongLived { to: VIP, connections: 1, interval_ms: 20 });
    load.wait_answers(10);
    node.start([]);
    let maps = MapFds::open_pinned(&node.pins()).expect("they are pinned");
    let task = Task::open(&node.pins(), &maps).expect("the tables are known");
    node.place.run(|| task.look()).expect("the note can be removed");
    assert!(!rules(&node).contains(TABLE));
    load.finish_clean();
}

#[test]
fn a_node_without_translated_connections_is_left_alone() {
    let (mut node, _server) = node();
    node.start([]);
    assert!(!rules(&node).contains(TABLE));
    node.place.run(|| {
        for _ in 0..2 {
            netfilter::keep_translating().expect("nf_tables is there");
        }
        assert!(!netfilter::has_translated(|_| true).expect("connections can be listed"));
        for _ in 0..2 {
            netfilter::stop_translating().expect("nf_tables is there");
        }
    });
    assert!(!rules(&node).contains(TABLE));
}
