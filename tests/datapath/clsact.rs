//! Programs on devices by filters instead of links (`--attach clsact`), as kernels without tcx have them: the same claims as
//! for links, and those that only filters need.

use std::collections::BTreeMap;

use aya::programs::TcAttachType;
use shunt_tests::agent;
use shunt_tests::held::Held;
use shunt_tests::netns::Netns;
use shunt_tests::wait;

use crate::node::{Filter, Lone, pair};

const CLSACT: [&str; 2] = ["--attach", "clsact"];
/// A program of somebody else, as classic bytecode: it returns -1, the next filter's affair.
const PASSES_ON: &str = "bpf da bytecode '1,6 0 0 4294967295'";

/// A node whose agent uses filters.
#[track_caller]
fn started() -> Lone {
    let mut node = Lone::new();
    node.start(CLSACT);
    node
}

/// The pair of an ordinary device.
fn ordinary() -> (String, String) {
    pair("shunt:ingress", "shunt:egress")
}

fn nothing() -> (String, String) {
    pair("", "")
}

#[track_caller]
fn tc(node: &Lone, command: &str) {
    node.place.ns().tc([command]);
}

/// Kind of the qdisc at the ingress of a device.
#[track_caller]
fn qdisc(node: &Lone, device: &str) -> Option<String> {
    let text = node.place.ns().output(["tc", "-j", "qdisc", "show", "dev", device]);
    let qdiscs: Vec<serde_json::Value> = serde_json::from_str(&text).expect("tc prints JSON");
    let found = qdiscs.iter().find(|qdisc| qdisc["handle"] == "ffff:")?;
    Some(found["kind"].as_str().expect("a kind").to_owned())
}

/// Priorities and programs of our filters, by device and hook.
fn ours(node: &Lone, devices: &[&str]) -> BTreeMap<(String, &'static str), (u64, u64)> {
    let mut found = BTreeMap::new();
    for device in devices {
        for hook in ["ingress", "egress"] {
            let filters = node.filters(device, hook);
            let mut ours = filters.into_iter().filter(|filter| filter.name.starts_with("shunt:"));
            if let Some(Filter { priority, program, .. }) = ours.next() {
                found.insert(((*device).to_owned(), hook), (priority, program));
            }
            assert_eq!(ours.next(), None, "one filter a hook");
        }
    }
    found
}

#[test]
fn devices_are_served_by_filters_as_they_come_and_left_as_they_go() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["tuntap add dev tun0 mode tun", "link add br0 type bridge", "link add port type veth peer name pod"]);
    ns.ip(["link set port master br0"]);
    node.start(CLSACT);
    assert_eq!(node.filter_pair("eth0"), ordinary());
    assert_eq!(node.filter_pair("tun0"), pair("shunt:ingress_l3", "shunt:egress_l3"));
    assert_eq!(node.filter_pair("port"), pair("shunt:ingress_port", "shunt:egress"));
    assert_eq!((node.filter_pair("lo"), qdisc(&node, "lo")), (nothing(), None));
    assert_eq!(node.pair("eth0"), nothing(), "no links beside them");
    let status = node.json("status");
    assert_eq!(status["attach"], serde_json::json!(["clsact"]));
    assert_eq!(status["devices"].as_array().map(Vec::len), Some(6), "{status}");

    ns.ip(["link set port nomaster"]);
    wait::until("an ordinary pair after the release", || node.filter_pair("port") == ordinary());
    ns.ip(["link add late type veth peer name other"]);
    wait::until("programs on a new device", || node.filter_pair("late") == ordinary());
    let index = node.index("late");
    ns.ip(["link set late name renamed", "link del renamed"]);
    let is_known = |node: &Lone| {
        let notes = node.pins().marks().expect("notes can be read");
        notes.iter().any(|note| note.ends_with(&format!("-{index}")))
            || node.filter_pins().iter().any(|pin| pin.contains(&format!("-{index}-")))
    };
    wait::until("what is pinned and noted of a deleted device to go", || !is_known(&node));
}

/// What the kernel holds through the directory stays the same, whoever dies.
#[test]
fn filters_outlive_agents_and_get_the_programs_of_the_next_one() {
    let mut node = started();
    let devices = ["eth0", "peer"];
    let first = ours(&node, &devices);
    assert_eq!(first.len(), 4);
    let mut held = Held::look(&node.bpffs);
    let before = held;
    for turn in 0..4 {
        if turn % 2 == 0 {
            node.crash()
        } else {
            node.stop()
        }
        let alone = ours(&node, &devices);
        node.start(CLSACT);
        node.log("adopted=true");
        let next = ours(&node, &devices);
        for (place, (priority, program)) in &next {
            assert_eq!(*priority, first[place].0, "it stays where it is");
            assert_ne!(*program, alone[place].1, "and runs another program");
        }
        assert_eq!(node.filter_pins().len(), 4, "{:?}", node.filter_pins());
        let is_as_before = || {
            held = Held::look(&node.bpffs);
            held == before
        };
        assert!(wait::came_true(is_as_before), "{before:?} has become {held:?}");
    }
}

/// A rest that a kill between two steps can leave: a filter without its pin, a pin without its filter, an old program's pin.
#[test]
fn what_an_agent_that_died_half_way_left_is_made_whole() {
    let mut node = started();
    node.crash();
    let pins = node.pins();
    let pin = |node: &Lone, device: &str, hook: &str| {
        let end = format!("-{}-{hook}", node.index(device));
        let name = node.filter_pins().into_iter().find(|pin| pin.ends_with(&end));
        pins.filters().join(name.expect("it is pinned"))
    };
    std::fs::remove_file(pin(&node, "eth0", "ingress")).unwrap();
    tc(&node, "filter del dev peer egress");
    let next = pin(&node, "peer", "ingress");
    std::fs::rename(&next, next.with_file_name(format!("{}-next", next.file_name().unwrap().to_str().unwrap())))
        .unwrap();
    node.start(CLSACT);
    assert_eq!((node.filter_pair("eth0"), node.filter_pair("peer")), (ordinary(), ordinary()));
    assert_eq!(node.filter_pins().len(), 4, "{:?}", node.filter_pins());
    node.crash();
    assert!(node.shunt(["cleanup"]).status.success());
    assert!(!node.bpffs.exists());
    assert_eq!((qdisc(&node, "eth0"), qdisc(&node, "peer")), (None, None));
}

/// While no agent runs, a device goes and another gets its index.
#[test]
fn a_reused_interface_index_is_no_old_device() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["link add old index 4711 type veth peer name old2"]);
    node.start(CLSACT);
    assert_eq!(node.filter_pair("old"), ordinary());
    node.crash();
    ns.ip(["link del old", "link add new index 4711 type veth peer name new2"]);
    assert!(!node.json("status")["devices"].as_array().unwrap().contains(&"new".into()), "it has none yet");
    node.start(CLSACT);
    assert_eq!(node.filter_pair("new"), ordinary());
    assert_eq!(node.filter_pins().len(), 2 * ["eth0", "peer", "new", "new2"].len(), "{:?}", node.filter_pins());
}

#[test]
fn filters_of_others_stay_and_ours_come_first_in_and_last_out() {
    let mut node = Lone::new();
    node.place.ns().ip(["link add pod1 type veth peer name pod2"]);
    // On one device somebody was before us, on another somebody comes after us.
    node.place.ns().tc([
        "qdisc add dev eth0 clsact",
        &format!("filter add dev eth0 ingress prio 1 handle 1 {PASSES_ON}"),
        &format!("filter add dev eth0 egress prio 1 handle 1 {PASSES_ON}"),
        "qdisc add dev pod1 clsact",
        "filter add dev pod1 ingress prio 1 protocol ip u32 match u32 0 0",
        "filter add dev pod1 egress prio 65535 protocol ip u32 match u32 0 0",
    ]);
    node.start(CLSACT);
    assert_eq!(node.filter_pair("eth0"), pair("shunt:ingress+bpf", "bpf+shunt:egress"));
    assert_eq!(node.filter_pair("pod1"), pair("u32+shunt:ingress", "shunt:egress+u32"), "where others leave no room");
    tc(&node, &format!("filter add dev peer ingress prio 5 {PASSES_ON}"));
    tc(&node, &format!("filter add dev peer egress prio 5 {PASSES_ON}"));
    assert_eq!(node.filter_pair("peer"), pair("shunt:ingress+bpf", "bpf+shunt:egress"));
    node.crash();
    node.start(CLSACT);
    assert_eq!(node.filter_pair("eth0"), pair("shunt:ingress+bpf", "bpf+shunt:egress"));
    node.stop();

    assert!(node.shunt(["cleanup"]).status.success());
    assert!(!node.bpffs.exists(), "nothing is pinned");
    assert_eq!(node.filter_pair("eth0"), pair("bpf", "bpf"));
    assert_eq!(node.filter_pair("pod1"), pair("u32", "u32"));
    assert_eq!(node.filter_pair("peer"), pair("bpf", "bpf"), "somebody has come to use a qdisc that we made");
    assert_eq!(qdisc(&node, "pod2"), None, "nobody uses this one");
}

#[test]
fn an_empty_qdisc_of_somebody_else_outlives_the_cleanup() {
    let mut node = Lone::new();
    tc(&node, "qdisc add dev eth0 clsact");
    node.start(CLSACT);
    node.crash();
    node.start(CLSACT);
    node.stop();
    assert!(node.shunt(["cleanup"]).status.success());
    assert_eq!((node.filter_pair("eth0"), qdisc(&node, "eth0").as_deref()), (nothing(), Some("clsact")));
    assert_eq!(qdisc(&node, "peer"), None);
}

/// Whatever runs on the node as root can do that.
#[test]
fn filters_and_qdiscs_that_somebody_else_removes_come_back() {
    let mut node = Lone::new();
    node.place.ns().ip(["link add pod1 type veth peer name pod2"]);
    node.start(CLSACT);
    tc(&node, "filter del dev eth0 ingress prio 1");
    tc(&node, "qdisc del dev peer clsact");
    std::fs::remove_file(node.pins().filters().join(&node.filter_pins()[0])).expect("it can be unpinned");
    assert_eq!(node.filter_pair("peer"), nothing());
    let devices = ["eth0", "peer", "pod1", "pod2"];
    wait::until("every filter again", || devices.iter().all(|device| node.filter_pair(device) == ordinary()));
    wait::until("every pin again", || node.filter_pins().len() == 2 * devices.len());
    node.log("detached by somebody else");
    assert_eq!(node.json("status")["devices"].as_array().map(Vec::len), Some(devices.len()));
}

#[test]
fn a_device_that_is_excluded_loses_its_filters_and_its_qdisc() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["link add pod1 type veth peer name pod2"]);
    tc(&node, "qdisc add dev pod2 clsact");
    node.start(CLSACT);
    assert_eq!((node.filter_pair("pod1"), node.filter_pair("pod2")), (ordinary(), ordinary()));
    node.stop();
    node.start(["--attach", "clsact", "--exclude-devices", "pod*"]);
    assert_eq!((node.filter_pair("pod1"), qdisc(&node, "pod1")), (nothing(), None));
    assert_eq!((node.filter_pair("pod2"), qdisc(&node, "pod2").as_deref()), (nothing(), Some("clsact")));
    assert_eq!(node.filter_pins().len(), 4, "{:?}", node.filter_pins());
}

/// The qdisc `ingress` takes the only place that a clsact could have.
#[test]
fn a_device_with_another_qdisc_at_its_ingress_is_told_and_left_alone() {
    let mut node = Lone::new();
    tc(&node, "qdisc add dev peer ingress");
    node.spawn(CLSACT);
    node.log("it has a qdisc of kind ingress");
    wait::until("programs of the other device", || node.filter_pair("eth0") == ordinary());
    assert_eq!(node.filter_pair("peer"), nothing());
    tc(&node, "qdisc del dev peer ingress");
    wait::until("programs where there is room for them", || node.filter_pair("peer") == ordinary());
    node.log("first plan applied");
    node.stop();
    assert!(node.shunt(["cleanup"]).status.success());
    assert_eq!(qdisc(&node, "peer"), None);
}

#[test]
fn a_start_with_the_other_means_moves_every_hook() {
    let mut node = Lone::new();
    let devices = ["eth0", "peer"];
    let links = || pair("ingress", "egress");
    node.start([]);
    assert_eq!(node.json("status")["attach"], serde_json::json!(["tcx"]), "this kernel has it");
    for (flags, by_links) in
        [(["--attach", "clsact"], false), (["--attach", "tcx"], true), (["--attach", "clsact"], false)]
    {
        node.crash();
        node.start(flags);
        node.log("adopted=true");
        for device in devices {
            let (filters, qdisc) = (node.filter_pair(device), qdisc(&node, device));
            if by_links {
                assert_eq!((node.pair(device), filters, qdisc), (links(), nothing(), None));
            } else {
                assert_eq!((node.pair(device), filters, qdisc.as_deref()), (nothing(), ordinary(), Some("clsact")));
            }
        }
        let pins = (node.device_pins().len(), node.filter_pins().len());
        assert_eq!(pins, if by_links { (4, 0) } else { (0, 4) });
    }
    assert_eq!(node.programs("eth0", TcAttachType::Ingress), []);
}

/// A link can be detached from anywhere, a filter only within its namespace: the cleanup goes there.
#[test]
fn the_cleanup_finds_the_filters_from_another_namespace() {
    let mut node = started();
    node.stop();
    let elsewhere = Netns::new(&node.bed, "elsewhere");
    let mut cleanup = elsewhere.command(agent::program());
    cleanup.arg("cleanup").arg("--bpffs").arg(&node.bpffs);
    assert!(elsewhere.feed(cleanup, "").contains("links and 1 layouts of tables removed"));
    assert!(!node.bpffs.exists());
    for device in ["eth0", "peer"] {
        assert_eq!((node.filter_pair(device), qdisc(&node, device)), (nothing(), None));
    }
}
