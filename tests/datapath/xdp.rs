//! Where the XDP program runs, and where it does not; who is told.

use std::os::fd::AsFd as _;

use proxy_userspace::datapath::kernel::{self, Sizes};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::{self, Pins};
use proxy_userspace::datapath::sys;
use shunt_tests::wait;

use crate::devices::records;
use crate::node::{Lone, pair, text};

const SIZES: Sizes = Sizes { services: 64, backends: 64, flows: 64 };
/// As netlink numbers it: in the driver.
const DRIVER: u64 = 1;

#[track_caller]
fn xdp_pins(node: &Lone) -> Vec<String> {
    let pins = pins::list(&node.pins().xdp_links()).expect("pins can be listed");
    pins.iter().filter_map(|pin| pins::file_name(pin)).map(str::to_owned).collect()
}

/// The kernel's id of the pinned link of a device.
#[track_caller]
fn link_id(node: &Lone) -> u32 {
    let pins = pins::list(&node.pins().xdp_links()).expect("pins can be listed");
    let [pin] = &pins[..] else { panic!("{pins:?}") };
    sys::link_info(sys::open_pin(pin).expect("it is a link").as_fd()).expect("it has information").id
}

#[track_caller]
fn has_driver_xdp(node: &Lone, device: &str) -> bool {
    node.xdp(device).is_some_and(|(mode, _)| mode == DRIVER)
}

#[test]
fn native_takes_the_device_with_the_main_address_and_no_other() {
    let mut node = Lone::new();
    node.place.ns().ip(["link add pod1 type veth peer name pod2", "link set pod1 up"]);
    node.start(["--xdp", "native"]);
    assert!(has_driver_xdp(&node, "eth0"));
    for device in ["peer", "pod1", "pod2", "lo"] {
        assert_eq!(node.xdp(device), None, "{device}");
    }
    let status = node.status();
    assert_eq!(status["xdp_devices"], serde_json::json!(["eth0"]));
    assert_eq!(status["report"]["xdp_refused"], serde_json::json!([]));
    assert_eq!(node.pair("eth0"), pair("ingress", "egress"));
}

#[test]
fn auto_and_off_leave_devices_without_hardware_alone() {
    for mode in ["auto", "off"] {
        let mut node = Lone::new();
        node.start(["--xdp", mode]);
        assert_eq!(node.xdp("eth0"), None, "{mode}");
        assert_eq!(node.json("status")["xdp_devices"], serde_json::json!([]));
    }
}

#[test]
fn the_link_outlives_agents_and_gets_their_programs() {
    let mut node = Lone::new();
    node.start(["--xdp", "native"]);
    let (link, first) = (link_id(&node), node.xdp("eth0"));
    node.crash();
    assert_eq!(node.xdp("eth0"), first, "it works on");
    node.start(["--xdp", "native"]);
    assert_eq!(link_id(&node), link);
    assert_ne!(node.xdp("eth0"), first, "another program");
    assert!(has_driver_xdp(&node, "eth0"));
    node.stop();
    node.start(["--xdp", "off"]);
    assert_eq!((node.xdp("eth0"), xdp_pins(&node)), (None, vec![]));
    assert_eq!(node.pair("eth0"), pair("ingress", "egress"));
}

#[test]
fn cleanup_takes_it_off() {
    let mut node = Lone::new();
    node.start(["--xdp", "native"]);
    node.stop();
    assert!(has_driver_xdp(&node, "eth0"));
    let cleanup = node.shunt(["cleanup"]);
    assert!(cleanup.status.success(), "{cleanup:?}");
    assert_eq!(node.xdp("eth0"), None);
    assert!(!node.bpffs.exists(), "nothing is pinned");
}

#[test]
fn it_follows_the_main_address_and_the_mac_address() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["link add late type veth peer name other", "link set late up"]);
    node.start(["--xdp", "native"]);
    let eth0 = node.index("eth0");
    ns.ip(["link set eth0 address 02:00:00:00:00:07"]);
    wait::until("the new address", || records(&node).get(&eth0) == Some(&(0, [2, 0, 0, 0, 0, 7])));
    assert!(has_driver_xdp(&node, "eth0"));

    ns.ip(["addr del 10.244.1.1/24 dev eth0", "addr del fd00:1::1/64 dev eth0", "addr add 10.244.2.1/24 dev late"]);
    wait::until("XDP on the new uplink", || has_driver_xdp(&node, "late"));
    wait::until("the old one to lose it", || node.xdp("eth0").is_none());
    wait::until("its record to go", || !records(&node).contains_key(&eth0));
    assert_eq!(node.pair("eth0"), pair("ingress", "egress"));

    ns.ip(["link del late"]);
    wait::until("the pin to go", || xdp_pins(&node).is_empty());
}

#[test]
fn a_reused_interface_index_is_no_old_device() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["link del eth0", "link add eth0 index 4711 type veth peer name peer", "addr add 10.244.1.1/24 dev eth0"]);
    node.start(["--xdp", "native"]);
    let link = link_id(&node);
    node.crash();
    ns.ip(["link del eth0", "link add eth0 index 4711 type veth peer name peer", "addr add 10.244.1.1/24 dev eth0"]);
    assert_eq!(node.xdp("eth0"), None);
    node.start(["--xdp", "native"]);
    assert!(has_driver_xdp(&node, "eth0"));
    assert_ne!(link_id(&node), link);
}

/// A program without multi-buffer support ends at about 3500 bytes on a veth.
#[test]
fn a_large_mtu_is_no_obstacle() {
    let mut node = Lone::new();
    node.place.ns().ip(["link set peer mtu 9000", "link set eth0 mtu 9000"]);
    node.start(["--xdp", "native"]);
    assert!(has_driver_xdp(&node, "eth0"));
}

/// A bridge has no native XDP. It is told, once, and it is served as without.
#[test]
fn a_device_that_refuses_is_named_and_gets_no_generic_xdp() {
    let mut node = Lone::new();
    let ns = node.place.ns().clone();
    ns.ip(["addr flush dev eth0", "link add br0 type bridge", "link set eth0 master br0", "link set br0 up"]);
    ns.ip(["addr add 10.244.1.1/24 dev br0"]);
    node.start(["--xdp", "native"]);
    let line = node.log("device does not run XDP");
    assert!(line.contains("WARN") && line.contains("br0") && line.contains("no native XDP"), "{line}");
    assert_eq!((node.xdp("br0"), xdp_pins(&node)), (None, vec![]));
    let refused = serde_json::json!([{"subject": "br0", "message": "its driver has no native XDP"}]);
    assert_eq!(node.status()["report"]["xdp_refused"], refused);
    let text = node.shunt(["status", "--admin-socket", &text(node.admin_socket())]).stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("XDP           none") && text.contains("no XDP        br0: its driver"), "{text}");
    // A change of the network makes the agent look at all devices.
    ns.ip(["link add late type veth peer name other"]);
    wait::until("programs on a new device", || node.pair("late") == pair("ingress", "egress"));
    let told = node.agent().lines().iter().filter(|line| line.contains("does not run XDP")).count();
    assert_eq!(told, 1);
    assert_eq!(node.pair("br0"), pair("ingress", "egress"));
}

#[test]
fn a_foreign_program_is_left_alone() {
    let mut node = Lone::new();
    let foreign_pins = Pins::new(node.bed.bpffs("foreign").join("x"));
    foreign_pins.prepare().unwrap();
    let foreign = kernel::load(OBJECT, &foreign_pins, &SIZES).unwrap();
    let index = node.index("eth0");
    let program = foreign.programs.get("uplink").unwrap();
    let link = node.place.run(|| sys::link_xdp(program, index)).expect("it can be attached");
    let before = node.xdp("eth0");
    node.start(["--xdp", "native"]);
    let line = node.log("device does not run XDP");
    assert!(line.contains("another XDP program"), "{line}");
    assert_eq!(node.xdp("eth0"), before);
    node.stop();
    assert!(node.shunt(["cleanup"]).status.success());
    assert_eq!(node.xdp("eth0"), before);
    drop(link);
}
