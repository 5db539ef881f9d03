//! Which programs are on which device, as devices come, change and go.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use aya::maps::{HashMap as BpfHashMap, Map, MapData};
use nix::sys::signal::Signal;
use proxy_common::abi::device::DeviceRecord;
use proxy_userspace::datapath::kernel::{self, Sizes};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::{self, Pins};
use proxy_userspace::datapath::sys::{self, Place};
use shunt_tests::wait;

use crate::node::{Lone, pair};

const SIZES: Sizes = Sizes { services: 64, backends: 64, flows: 64 };

/// The records of devices, by interface index: the bridge's index and the MAC address that is looked at.
pub fn records(node: &Lone) -> HashMap<u32, (u32, [u8; 6])> {
    let pins = node.pins();
    let layout = pins.current().expect("layouts can be listed").expect("there is one");
    let data = MapData::from_pin(pins.maps(layout).join("devices")).expect("the map is pinned");
    let map = BpfHashMap::<_, u32, DeviceRecord>::try_from(Map::HashMap(data)).expect("its layout is known");
    let record = |(index, record): (u32, DeviceRecord)| {
        let bytes: Vec<u8> = record.mac.iter().flat_map(|word| word.to_ne_bytes()).collect();
        (index, (record.bridge, bytes.try_into().expect("six bytes")))
    };
    map.iter().map(|entry| record(entry.expect("entries can be read"))).collect()
}

#[test]
fn devices_are_served_as_they_come_and_left_as_they_go() {
    let mut node = Lone::new();
    node.start([]);
    assert_eq!(node.pair("eth0"), pair("ingress", "egress"));
    assert_eq!(node.pair("lo"), pair("", ""));
    node.place.ns().ip(["link add late type veth peer name other"]);
    wait::until("programs on a new device", || node.pair("late") == pair("ingress", "egress"));
    let index = node.index("late");
    node.place.ns().ip(["link set late name renamed", "link del renamed"]);
    let is_pinned = |node: &Lone| node.device_pins().iter().any(|pin| pin.contains(&format!("-{index}-")));
    wait::until("the pins of a deleted device to go", || !is_pinned(&node));
}

#[test]
fn a_device_without_link_header_gets_its_own_pair() {
    let mut node = Lone::new();
    node.place.ns().ip(["tuntap add dev tun0 mode tun", "link add vx0 type vxlan id 7 local 10.244.1.1 dstport 4789"]);
    node.start([]);
    assert_eq!(node.pair("tun0"), pair("ingress_l3", "egress_l3"));
    assert_eq!(node.pair("vx0"), pair("ingress", "egress"));
}

#[test]
fn patterns_choose_and_exclude() {
    let mut node = Lone::new();
    node.place.ns().ip(["link add pod1 type veth peer name pod2"]);
    node.start(["--devices", "eth?,pod*", "--exclude-devices", "*2"]);
    assert_eq!(node.pair("eth0"), pair("ingress", "egress"));
    assert_eq!(node.pair("pod1"), pair("ingress", "egress"));
    assert_eq!(node.pair("pod2"), pair("", ""));
    assert_eq!(node.pair("peer"), pair("", ""));
}

/// A port looks only at frames to the bridge: its record follows the bridge's MAC, and goes when it is released.
#[test]
fn a_bridge_port_follows_its_bridge() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["link add br0 address 02:00:00:00:00:01 type bridge", "link add port type veth peer name pod"]);
    ns.ip(["link set port master br0", "link set br0 up"]);
    node.start([]);
    let (bridge, port) = (node.index("br0"), node.index("port"));
    assert_eq!(node.pair("port"), pair("ingress_port", "egress"));
    assert_eq!(node.pair("br0"), pair("ingress", "egress"));
    assert_eq!(records(&node), HashMap::from([(port, (bridge, [2, 0, 0, 0, 0, 1]))]));

    ns.ip(["link set br0 address 02:00:00:00:00:09"]);
    wait::until("the bridge's new MAC", || records(&node).get(&port) == Some(&(bridge, [2, 0, 0, 0, 0, 9])));

    ns.ip(["link set port nomaster"]);
    wait::until("an ordinary pair after the release", || node.pair("port") == pair("ingress", "egress"));
    wait::until("the record to go", || records(&node).is_empty());

    ns.ip(["link set port master br0"]);
    wait::until("the port's program after it was enslaved live", || {
        node.pair("port") == pair("ingress_port", "egress")
    });
    ns.ip(["link del br0"]);
    wait::until("an ordinary pair without the bridge", || node.pair("port") == pair("ingress", "egress"));
    wait::until("the record to go", || records(&node).is_empty());
}

/// Others' programs stay, and ours run first on the way in and last on the way out.
#[test]
fn foreign_programs_stay_between_ours() {
    let mut node = Lone::new();
    let foreign_pins = Pins::new(node.bed.bpffs("foreign").join("x"));
    foreign_pins.prepare().unwrap();
    let foreign = kernel::load(OBJECT, &foreign_pins, &SIZES).unwrap();
    let index = node.index("eth0");
    let hook = aya_obj_hooks();
    let program = foreign.programs.get("egress_l3").unwrap();
    let links = node.place.run(|| hook.map(|hook| sys::link_tcx(program, index, hook, Place::Last).unwrap()));
    node.start([]);
    assert_eq!(node.pair("eth0"), pair("ingress+egress_l3", "egress_l3+egress"));
    node.stop();
    assert!(node.shunt(["cleanup"]).status.success());
    assert_eq!(node.pair("eth0"), pair("egress_l3", "egress_l3"));
    drop(links);
}

fn aya_obj_hooks() -> [aya_obj::generated::bpf_attach_type; 2] {
    use aya_obj::generated::bpf_attach_type::{BPF_TCX_EGRESS, BPF_TCX_INGRESS};
    [BPF_TCX_INGRESS, BPF_TCX_EGRESS]
}

/// While no agent runs, a device goes and another gets its index: the link of the old one must not pass for the new one's.
#[test]
fn a_reused_interface_index_is_no_old_device() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["link add old index 4711 type veth peer name old2"]);
    node.start([]);
    assert_eq!(node.pair("old"), pair("ingress", "egress"));
    node.crash();
    ns.ip(["link del old", "link add new index 4711 type veth peer name new2"]);
    node.start([]);
    assert_eq!(node.pair("new"), pair("ingress", "egress"));
    let devices = ["eth0", "peer", "new", "new2"];
    assert_eq!(node.device_pins().len(), 2 * devices.len(), "{:?}", node.device_pins());
}

/// The kernel drops announcements when nobody reads them: the agent must notice and look for itself.
#[test]
fn lost_announcements_are_made_up_for() {
    let mut node = Lone::new();
    node.place.ns().ip(["link add keep0 type veth peer name x0"]);
    node.start(["--devices", "keep*"]);
    node.agent().signal(Signal::SIGSTOP);
    let noise = (0..400).flat_map(|n| [format!("link add n{n} type veth peer name m{n}"), format!("link del n{n}")]);
    let change = ["link add keep1 type veth peer name x1".to_owned(), "link del keep0".to_owned()];
    let gone = node.index("keep0");
    node.place.ns().ip(noise.chain(change));
    node.agent().signal(Signal::SIGCONT);
    node.log("announcements were lost");
    wait::until("programs on the device that was never announced", || node.pair("keep1") == pair("ingress", "egress"));
    wait::until("the pins of the device that went unannounced to go", || {
        !node.device_pins().iter().any(|pin| pin.contains(&format!("-{gone}-")))
    });
}

/// Whatever runs on the node as root can do that.
#[test]
fn what_somebody_else_detaches_is_attached_again() {
    let mut node = Lone::new();
    node.place.ns().ip(["link add pod1 type veth peer name pod2"]);
    node.start(["--xdp", "native"]);
    let links = || {
        let pins = node.pins();
        let directories = [pins.cgroup_links(), pins.tcx_links(), pins.xdp_links()];
        directories.iter().flat_map(|directory| pins::list(directory).expect("links are pinned")).collect::<Vec<_>>()
    };
    let target = |pin: &PathBuf| sys::link_info(sys::open_pin(pin).ok()?.as_fd()).ok().map(|info| info.target);
    let before: BTreeMap<_, _> = links().into_iter().map(|pin| (pin.clone(), target(&pin))).collect();
    // Eight socket hooks and two programs for each of three devices, at least.
    assert!(before.len() >= 8 + 6, "{before:?}");
    for (position, pin) in before.keys().enumerate() {
        if position % 2 == 0 {
            let link = sys::open_pin(pin).expect("it is pinned");
            sys::link_detach(link.as_fd()).expect("it can be detached");
            assert_ne!(target(pin), before[pin], "{}", pin.display());
        } else {
            std::fs::remove_file(pin).expect("it can be unpinned");
        }
    }
    wait::until("every link again", || before.iter().all(|(pin, was)| target(pin) == *was));
    assert_eq!(node.pair("pod1"), pair("ingress", "egress"));
    node.log("detached by somebody else");
}
