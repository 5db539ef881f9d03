//! What somebody else does to tables, pins and the control group behind the agent's back, as root can: found and repaired.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use aya::maps::{HashMap as BpfHashMap, Map, MapData};
use proxy_common::abi::address::PortWord;
use proxy_common::abi::device::DeviceRecord;
use proxy_common::abi::service::Slot;
use proxy_common::addr::Port;
use proxy_userspace::datapath::kernel::MapFds;
use proxy_userspace::datapath::maps::{KernelMaps, Maps as _, NodeConfig};
use proxy_userspace::datapath::{pins, restore};
use proxy_userspace::planner::{Op, Tables};
use shunt_tests::place::Place;
use shunt_tests::traffic::{Ports, Server};
use shunt_tests::wait;

use crate::devices::records;
use crate::node::{Lone, pair, service};

const VIP: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 1), 80);

/// A node that serves `web` and a service with a NodePort and source ranges.
fn serving(flags: [&str; 2]) -> (Lone, Server) {
    let mut node = Lone::new();
    let server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("web", &service("web", "10.96.0.1", &["10.244.1.1"], 8080));
    let balanced = service("balanced", "10.96.0.2", &["10.244.1.1"], 8080)
        .replace("type: ClusterIP", "type: LoadBalancer, loadBalancerSourceRanges: [192.0.2.0/24]")
        .replace(
            "protocol: TCP}]}\n---",
            "protocol: TCP, nodePort: 30080}]}\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.9}]}}\n---",
        );
    node.manifests.write_text("balanced", &balanced);
    node.manifests.write_text(
        "cidr",
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: a}\nspec: {cidrs: [10.96.0.0/16]}\n",
    );
    node.start(flags);
    assert_eq!(node.place.tcp(VIP.into()).expect("an answer").server, "node");
    (node, server)
}

fn open(node: &Lone) -> MapFds {
    MapFds::open_pinned(&node.pins()).expect("the tables are pinned")
}

fn tables(node: &Lone) -> Tables {
    restore::read_tables(&open(node)).expect("the tables can be read")
}

/// Changes that leave nothing of the tables.
fn erasure(tables: &Tables) -> Vec<Op> {
    let mut ops = vec![Op::PutCidrs(Box::default())];
    ops.extend(tables.frontends.keys().map(|at| Op::DeleteFrontend { at: *at }));
    ops.extend(tables.addresses.keys().map(|addr| Op::DeleteAddress { addr: *addr }));
    ops.extend(tables.slots.keys().map(|base| Op::WriteSlots { base: *base, slots: vec![Slot::ZERO] }));
    ops.extend(tables.backends.keys().map(|id| Op::RetireBackend { id: *id }));
    let ranges = tables.sources.iter().flat_map(|(id, nets)| nets.iter().map(move |net| (*id, *net)));
    ops.extend(ranges.map(|(id, net)| Op::ForbidSource { id, net }));
    ops.extend(tables.names.keys().map(|id| Op::RetireService { id: *id }));
    let word = PortWord { bits: 0 };
    ops.extend(tables.ports.keys().map(|index| Op::PutPorts { index: *index, word, keep: 0 }));
    ops
}

/// How often the agent has told that it found something.
fn repairs(node: &Lone) -> usize {
    node.agent().lines().iter().filter(|line| line.contains("somebody else has changed the tables")).count()
}

#[test]
fn tables_that_somebody_else_empties_are_written_again() {
    let (node, _server) = serving(["--nodeport-addresses", "all"]);
    let before = tables(&node);
    assert!(!before.sources.is_empty() && !before.cidrs.service.is_empty() && !before.ports.is_empty(), "{before:?}");
    let mut maps = KernelMaps::open(&open(&node)).expect("the tables can be opened");
    let ops = erasure(&before);
    maps.apply(&ops.iter().collect::<Vec<_>>()).expect("the tables can be changed");
    node.place.tcp(VIP.into()).expect_err("nothing is left of the service");
    wait::until("all tables as they were", || tables(&node) == before);
    assert_eq!(node.place.tcp(VIP.into()).expect("an answer").server, "node");
    let told = node.log("somebody else has changed the tables");
    for table in
        ["addresses", "backends", "config", "frontends", "ports", "service_names", "services", "slots", "source_ranges"]
    {
        assert!(told.contains(table), "{table}: {told}");
    }
    assert_eq!(repairs(&node), 1, "what is repaired is told once");
}

#[test]
fn a_single_entry_that_somebody_else_changes_is_written_again() {
    let (node, _server) = serving(["--nodeport-addresses", "all"]);
    let before = tables(&node);
    let fds = open(&node);
    let mut maps = KernelMaps::open(&fds).expect("the tables can be opened");
    // Every connection to the service goes astray.
    let (id, mut record) = before.backends.iter().map(|(id, record)| (*id, *record)).next().expect("there is one");
    record.port = Port(9).be();
    maps.apply(&[&Op::PutBackend { id, record }]).expect("the table can be changed");
    node.place.tcp(VIP.into()).expect_err("nobody listens there");
    wait::until("the backend as it was", || tables(&node) == before);
    assert_eq!(node.place.tcp(VIP.into()).expect("an answer").server, "node");

    // As of another node: no process of this one is served.
    let config = restore::read_config(&fds).expect("it can be read");
    let (first, last) = (Port(config.snat_first), Port(config.snat_last));
    let other =
        NodeConfig { new_hash_key: [1, 2], netns: 1, flags: config.flags, snat: (first, last), local: (first, last) };
    maps.write_node_config(&other).expect("the table can be changed");
    wait::until("the configuration as it was", || restore::read_config(&fds).expect("it can be read") == config);
    assert_eq!(node.place.tcp(VIP.into()).expect("an answer").server, "node");
}

#[test]
fn records_of_devices_that_somebody_else_removes_are_written_again() {
    let mut node = Lone::new();
    node.place.ns().ip([
        "link add br0 type bridge",
        "link add port type veth peer name pod",
        "link set port master br0",
    ]);
    node.start([]);
    let before = records(&node);
    assert_eq!(before.len(), 1);
    let layout = node.pins().current().expect("layouts can be listed").expect("there is one");
    let data = MapData::from_pin(node.pins().maps(layout).join("devices")).expect("the map is pinned");
    let mut map = BpfHashMap::<_, u32, DeviceRecord>::try_from(Map::HashMap(data)).expect("its layout is known");
    map.remove(&node.index("port")).expect("it is there");
    wait::until("the record again", || records(&node) == before);
}

/// Names of all pins and notes.
fn pinned(node: &Lone) -> Vec<PathBuf> {
    fn below(path: &Path, found: &mut Vec<PathBuf>) {
        for path in pins::list(path).expect("it can be listed") {
            found.push(path.clone());
            if path.is_dir() {
                below(&path, found);
            }
        }
    }
    let mut found = Vec::new();
    below(&node.bpffs, &mut found);
    found.sort();
    found
}

#[test]
fn pins_that_somebody_else_removes_are_made_again_and_the_next_agent_finds_all() {
    let (mut node, _server) = serving(["--nodeport-addresses", "all"]);
    wait::until("the last note of a start", || pinned(&node).iter().any(|path| path.ends_with("notes/loaded")));
    let before = pinned(&node);
    let tables_before = tables(&node);
    let one = before.iter().find(|path| path.ends_with("frontends")).expect("it is pinned");
    fs::remove_file(one).expect("it can be removed");
    wait::until("one pin again", || one.exists());
    node.log("somebody else has removed pins");
    fs::remove_dir_all(&node.bpffs).expect("it can be removed");
    wait::until("all pins again", || node.bpffs.is_dir() && pinned(&node) == before);
    assert_eq!(node.status()["agent"], true, "the right to change them is taken anew");
    assert_eq!(node.place.tcp(VIP.into()).expect("an answer").server, "node");
    node.crash();
    assert_eq!(node.place.tcp(VIP.into()).expect("an answer without an agent").server, "node");
    node.start([]);
    assert!(node.log("programs loaded").contains("adopted=true"));
    assert_eq!(tables(&node).names, tables_before.names);
    assert_eq!(node.place.tcp(VIP.into()).expect("an answer").server, "node");
}

#[test]
fn a_control_group_that_is_removed_is_told_and_its_successor_is_served() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("web", &service("web", "10.96.0.1", &["10.244.1.1"], 8080));
    let parent = node.place.cgroup().expect("a lone node has one").clone();
    let ns = node.place.ns().clone();
    let client = |group| Place::new("client", ns.clone(), Some(group));
    let first = parent.child("clients");
    let dir = first.dir().to_str().expect("text").to_owned();
    node.start(["--cgroup", &dir]);
    let ask = |place: &Place| place.tcp(SocketAddr::from(VIP));
    assert_eq!(ask(&client(first.clone())).expect("an answer").server, "node");
    drop(first);
    assert!(!Path::new(&dir).exists(), "nothing holds the control group");
    let told = node.log("cannot be brought back");
    assert!(told.contains("the control group") && told.contains("is gone"), "{told}");
    let second = parent.child("clients");
    let place = client(second);
    wait::until("the new control group to be served", || ask(&place).is_ok());
    node.log("the socket hooks move to it");
}

#[test]
fn a_device_that_is_renamed_is_chosen_by_its_new_name() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["link add pod1 type veth peer name other1"]);
    node.start(["--devices", "eth*,pod*"]);
    assert_eq!((node.pair("pod1"), node.pair("other1")), (pair("ingress", "egress"), pair("", "")));
    ns.ip(["link set pod1 name gone1", "link set other1 name pod2"]);
    wait::until("programs by the new names", || {
        node.pair("gone1") == pair("", "") && node.pair("pod2") == pair("ingress", "egress")
    });
}

#[test]
fn a_table_that_is_nearly_full_is_told_until_it_has_room() {
    let mut node = Lone::new();
    let name = |number: u8| format!("s{number}");
    // Of sixteen, number 0 is never used.
    (0..15).for_each(|number| {
        let vip = format!("10.96.0.{}", number + 1);
        node.manifests.write_text(&name(number), &service(&name(number), &vip, &["10.244.1.1"], 8080));
    });
    node.start(["--max-services", "16"]);
    let full = |node: &Lone| {
        let tables = node.status()["report"]["nearly_full"].as_array().expect("a list").clone();
        tables.into_iter().map(|table| table["subject"].as_str().expect("text").to_owned()).collect::<Vec<_>>()
    };
    wait::until("a table that is nearly full", || full(&node) == ["services"]);
    let socket = node.admin_socket();
    let told = node.shunt(["status", "--admin-socket", socket.to_str().expect("text")]);
    let told = String::from_utf8(told.stdout).expect("text");
    assert!(told.contains("table         services: nearly full: 15 of 16; what finds no room"), "{told}");
    assert!(told.contains("--max-services gives it more"), "{told}");
    node.log("a table is nearly full");
    (0..3).for_each(|number| node.manifests.delete(&name(number)));
    wait::until("room", || full(&node).is_empty());
    node.log("a table has room again");
}
