//! `shunt doctor`: content with a healthy node; whatever one breaks is found, by name, and over when it is mended.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya_obj::generated::bpf_attach_type::{BPF_TCX_EGRESS, BPF_TCX_INGRESS};
use proxy_userspace::datapath::kernel::{self, Sizes};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::Pins;
use proxy_userspace::datapath::sys::{self, Place as Position};
use serde_json::Value;
use shunt_tests::agent;
use shunt_tests::netns::Netns;
use shunt_tests::place::Place;
use shunt_tests::process::{Process, Stdio};
use shunt_tests::wait;

use crate::node::{Lone, service, text};

const VIP: &str = "10.96.0.10";

/// A node that lacks nothing, with an agent and a service.
#[track_caller]
fn healthy() -> Lone {
    let mut node = Lone::new();
    node.place.ns().sysctl("net/ipv4/ip_forward", "1");
    node.place.ns().sysctl("net/ipv6/conf/all/forwarding", "1");
    node.manifests.write_text("web", &service("web", VIP, &["10.244.1.1"], 8080));
    node.start([]);
    node
}

/// What a check says: its verdict, what it saw, its advice.
#[derive(Debug)]
struct Said {
    verdict: String,
    seen: String,
    advice: String,
}

/// An examination, run in `place`.
struct Examination {
    said: BTreeMap<String, Said>,
    errors: String,
    code: Option<i32>,
}

impl Examination {
    #[track_caller]
    fn new(node: &Lone, place: &Place) -> Self {
        let cgroup = node.place.cgroup().expect("a lone node has one").dir();
        let mut command = place.command(agent::program());
        command.args(["doctor", "-o", "json", "--bpffs"]).arg(&node.bpffs).arg("--cgroup").arg(cgroup);
        command.arg("--admin-socket").arg(node.admin_socket()).stdin(Stdio::null());
        let output = command.output().expect("shunt can be run");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let findings: Vec<Value> =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"));
        let said = findings.iter().map(|finding| {
            let field = |name: &str| finding[name].as_str().unwrap_or_default().to_owned();
            (field("check"), Said { verdict: field("verdict"), seen: field("seen"), advice: field("advice") })
        });
        Self { said: said.collect(), errors, code: output.status.code() }
    }

    /// What a check says; `word` is in it.
    #[track_caller]
    fn expect(&self, check: &str, verdict: &str, word: &str) -> &Said {
        let said = self.said.get(check).unwrap_or_else(|| panic!("there is no check {check}"));
        assert!(said.verdict == verdict && said.seen.contains(word), "{check}: {verdict}, {word:?}: {said:?}");
        let fails = said.verdict == "failure";
        assert!(!fails || self.code == Some(1) && self.errors.contains(check), "{:?} {}", self.code, self.errors);
        assert!(!["failure", "warning"].contains(&verdict) || !said.advice.is_empty(), "{said:?}");
        said
    }
}

#[track_caller]
fn examine(node: &Lone) -> Examination {
    Examination::new(node, &node.place)
}

/// The check says that nothing is wrong (any more).
#[track_caller]
fn expect_well(node: &Lone, check: &str) {
    examine(node).expect(check, "ok", "");
}

#[test]
fn a_healthy_node_gives_no_cause_for_complaint() {
    let node = healthy();
    let examination = examine(&node);
    for (check, said) in &examination.said {
        // Processes of this machine that are not the test's; programs that other tests load.
        let is_of_others = check == "hooked-processes" || check == "other-proxies";
        assert!(said.verdict == "ok" || is_of_others, "{check}: {said:?}");
    }
    assert_eq!((examination.code, examination.errors.as_str()), (Some(0), ""));
    examination.expect("agent", "ok", &format!("process {}", node.agent().id()));
    examination.expect("device-hooks", "ok", "eth0");
    examination.expect("socket-hooks-fire", "ok", VIP);
    examination.expect("sources", "ok", "manifests");
    examination.expect("table-memory", "ok", "MiB");
}

/// What scripts build on, and what people read.
#[test]
fn findings_have_the_same_fields_always_and_the_table_ends_with_a_count() {
    let mut node = Lone::new();
    for is_running in [false, true] {
        if is_running {
            node.start([]);
        }
        let output = node.shunt(["doctor", "-o", "json", "--admin-socket", &text(node.admin_socket())]);
        let findings: Vec<Value> = serde_json::from_slice(&output.stdout).expect("it prints JSON");
        for finding in &findings {
            let fields: Vec<_> = finding.as_object().expect("an object").keys().map(String::as_str).collect();
            assert_eq!(fields, ["advice", "check", "seen", "verdict"]);
        }
        let output = node.shunt(["doctor"]);
        let table = String::from_utf8(output.stdout).expect("text");
        let last = table.lines().last().expect("lines");
        assert!(last.starts_with(&format!("{} checks: ", findings.len())), "{table}");
        // A namespace of its own forwards nothing.
        assert!(table.contains("failure  forwarding"), "{table}");
        assert!(table.contains("-> sysctl -w net.ipv4.ip_forward=1"), "{table}");
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(String::from_utf8(output.stderr).expect("text").trim(), "error: failed: forwarding");
    }
}

#[test]
fn before_the_first_agent_the_node_is_examined_and_what_is_not_there_is_unknown() {
    let node = Lone::new();
    node.place.ns().sysctl("net/ipv4/ip_forward", "1");
    node.place.ns().sysctl("net/ipv6/conf/all/forwarding", "1");
    let examination = examine(&node);
    assert_eq!(examination.code, Some(0), "{}", examination.errors);
    examination.expect("agent", "warning", "no agent runs, and nothing is programmed");
    for check in ["tables", "table-room", "socket-hooks-fire", "device-hooks", "reserved-ports"] {
        examination.expect(check, "unknown", "no tables are pinned");
    }
    for check in ["kernel-links", "kernel-source-address", "kernel-functions", "forwarding", "forward-policy"] {
        examination.expect(check, "ok", "");
    }
}

#[test]
fn a_setting_that_stops_services_or_may_is_found() {
    let node = healthy();
    let ns = node.place.ns();
    for (setting, harm, check, verdict, word) in [
        ("net/ipv4/ip_forward", "0", "forwarding", "failure", "net.ipv4.ip_forward is 0"),
        ("net/ipv6/conf/all/forwarding", "0", "forwarding", "failure", "net.ipv6.conf.all.forwarding is 0"),
        ("net/ipv4/conf/eth0/forwarding", "0", "device-forwarding", "warning", "net.ipv4.conf.eth0.forwarding"),
        ("net/ipv4/ip_local_port_range", "1024 60999", "local-ports", "warning", "1024 to 60999 now"),
        ("net/ipv4/ip_local_reserved_ports", "", "reserved-ports", "warning", "source ports 10000-29999"),
    ] {
        let before = ns.read_sysctl(setting);
        ns.sysctl(setting, &(harm.to_owned() + "\n"));
        examine(&node).expect(check, verdict, word);
        ns.sysctl(setting, &before);
        expect_well(&node, check);
    }
    ns.sysctl("net/ipv4/conf/eth0/rp_filter", "1");
    // The kernel counts forged sources of the whole machine: other tests may have some.
    let examination = examine(&node);
    let said = &examination.said["reverse-path-filter"];
    let is_told = ["ok", "note"].contains(&said.verdict.as_str()) && said.seen.starts_with("strict on eth0");
    assert!(is_told, "{said:?}");
}

#[test]
fn programs_in_filters_are_seen_as_well_as_linked_ones() {
    let mut node = Lone::new();
    node.start(["--attach", "clsact"]);
    let examination = examine(&node);
    examination.expect("device-hooks", "ok", "");
    let others = &examination.said["other-device-programs"];
    assert!(!others.seen.contains("shunt:"), "{others:?}");
}

#[test]
fn firewalls_that_drop_what_is_forwarded_are_found_in_both_kinds_of_rules() {
    let node = healthy();
    let ns = node.place.ns();
    let iptables = |words: &str| {
        let mut command = ns.command("iptables");
        command.args(words.split(' '));
        ns.feed(command, "");
    };
    let expect = |verdict, word| drop(examine(&node).expect("forward-policy", verdict, word).verdict.clone());
    iptables("-P FORWARD DROP");
    expect("failure", "ip filter FORWARD drops all that is forwarded");
    iptables("-N OTHERS");
    iptables("-A FORWARD -j OTHERS");
    expect("failure", "ip filter FORWARD drops all that is forwarded");
    iptables("-A OTHERS -s 10.244.0.0/16 -j ACCEPT");
    expect("note", "ip filter FORWARD drops what no rule accepts");
    iptables("-P FORWARD ACCEPT");
    expect("ok", "");
    ns.nft("add table inet wall; add chain inet wall through { type filter hook forward priority 0; policy drop; }");
    expect("failure", "inet wall through");
    ns.nft("add rule inet wall through ip saddr 10.244.0.0/16 accept");
    expect("note", "inet wall through");
    ns.nft("delete table inet wall");

    iptables("-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
    expect_well(&node, "invalid-packets");
    iptables("-A FORWARD -m conntrack --ctstate INVALID -j DROP");
    examine(&node).expect("invalid-packets", "note", "ip filter FORWARD");
    iptables("-F FORWARD");
    ns.nft("add table inet wall; add chain inet wall strict; add rule inet wall strict ct state invalid drop");
    examine(&node).expect("invalid-packets", "note", "inet wall strict");
}

#[test]
fn other_proxies_and_addresses_of_services_on_devices_are_found() {
    let node = healthy();
    let ns = node.place.ns();
    ns.nft("add table ip nat; add chain ip nat KUBE-SERVICES");
    let examination = examine(&node);
    let said = examination.expect("other-proxies", "warning", "rules of kube-proxy");
    assert!(said.advice.contains("kube-proxy --cleanup"), "{said:?}");
    ns.nft("delete table ip nat");

    ns.ip([format!("addr add {VIP}/32 dev eth0")]);
    examine(&node).expect("bound-addresses", "warning", &format!("{VIP} on eth0"));
    ns.ip([format!("addr del {VIP}/32 dev eth0")]);
    expect_well(&node, "bound-addresses");
    for (device, word) in [("nodelocaldns", "NodeLocal DNSCache"), ("kube-ipvs0", "mode ipvs")] {
        ns.ip([format!("link add {device} type bridge"), format!("addr add {VIP}/32 dev {device}")]);
        examine(&node).expect("bound-addresses", "warning", word);
        if device == "kube-ipvs0" {
            examine(&node).expect("other-proxies", "warning", device);
        }
        ns.ip([format!("link del {device}")]);
    }
    ns.ip(["link add vx0 type vxlan id 7 dstport 4789 dev eth0"]);
    expect_well(&node, "overlay-mtu");
    ns.ip(["link set eth0 mtu 1400"]);
    examine(&node).expect("overlay-mtu", "warning", "vx0 has 1450, at most 1350 fits");
}

#[test]
fn programs_that_are_gone_are_found_and_so_is_an_agent() {
    let mut node = healthy();
    node.crash();
    let examination = examine(&node);
    examination.expect("agent", "warning", "no agent runs: what is programmed works on");
    examination.expect("socket-hooks-fire", "ok", VIP);
    examination.expect("sources", "unknown", "no agent runs");
    let detach = |pin: &Path| sys::link_detach(sys::open_pin(pin).expect("it is pinned").as_fd()).expect("it detaches");
    let pins = node.pins();
    let index = node.index("eth0");
    let of_device = |hook: &str| {
        let name = node.device_pins().into_iter().find(|pin| pin.ends_with(&format!("-{index}-{hook}")));
        pins.tcx_links().join(name.expect("it is pinned"))
    };
    detach(&of_device("ingress"));
    examine(&node).expect("device-hooks", "failure", "eth0 (for what comes in)");
    detach(&of_device("egress"));
    examine(&node).expect("device-hooks", "failure", "eth0");
    detach(&pins.cgroup_links().join("connect4"));
    let examination = examine(&node);
    examination.expect("socket-hooks", "failure", "not attached: connect4");
    examination.expect("socket-hooks-fire", "failure", &format!("{VIP}:65535"));
    std::fs::remove_file(pins.maps(pins.current().unwrap().unwrap()).join("affinity")).expect("it can be unpinned");
    examine(&node).expect("tables", "failure", "affinity");
    // An agent makes all of it good.
    node.start([]);
    for check in ["agent", "device-hooks", "socket-hooks", "socket-hooks-fire", "tables"] {
        wait::until(check, || examine(&node).said[check].verdict == "ok");
    }
}

#[test]
fn who_is_outside_the_hooked_group_is_named_and_learns_it_when_it_asks() {
    let node = healthy();
    let mut sleep = node.place.unhooked().command("sleep");
    sleep.arg("1000");
    let stranger = Process::start("stranger", sleep);
    let named = format!("sleep ({})", stranger.id());
    // Until it is what it will be, it is this test's.
    wait::until("the process to be seen", || examine(&node).said["hooked-processes"].seen.contains(&named));
    examine(&node).expect("hooked-processes", "warning", &named);
    drop(stranger);
    let told = Examination::new(&node, &node.place.unhooked());
    told.expect("socket-hooks-fire", "note", "it is outside the hooked group");
    assert_ne!(told.said["hooked-processes"].verdict, "warning", "the asker itself is not counted");
    // The root of the tree is what an agent takes by default.
    let output = node.shunt(["doctor", "-o", "json", "--admin-socket", &text(node.admin_socket())]);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).expect("it prints JSON");
    let hooks = findings.iter().find(|finding| finding["check"] == "socket-hooks").expect("there is this check");
    assert_eq!(hooks["verdict"], "note", "{hooks}");
}

#[test]
fn another_namespace_is_not_taken_for_the_nodes() {
    let node = healthy();
    let elsewhere = Place::new("elsewhere", Netns::new(&node.bed, "elsewhere"), node.place.cgroup().cloned());
    Examination::new(&node, &elsewhere).expect("namespace", "failure", "not the network namespace");
}

#[test]
fn programs_of_others_are_named_with_their_place() {
    let node = healthy();
    let other = Pins::new(node.bed.bpffs("other").join("shunt"));
    other.prepare().unwrap();
    let loaded = kernel::load(OBJECT, &other, &Sizes { services: 16, backends: 16, flows: 16 }).unwrap();
    let index = node.index("eth0");
    let attach = |name: &str, hook, place| {
        let program = loaded.programs.get(name).expect("it is loaded");
        node.place.run(|| sys::link_tcx(program, index, hook, place)).expect("it attaches")
    };
    let first = attach("ingress_l3", BPF_TCX_INGRESS, Position::First);
    examine(&node).expect("device-order", "warning", "ingress_l3 comes before ours on the way in at eth0");
    examine(&node).expect("other-device-programs", "note", "ingress_l3 on the way in at eth0");
    drop(first);
    let last = attach("egress_l3", BPF_TCX_EGRESS, Position::Last);
    examine(&node).expect("device-order", "warning", "egress_l3 comes after ours on the way out at eth0");
    drop(last);
    let after = attach("ingress_l3", BPF_TCX_INGRESS, Position::Last);
    expect_well(&node, "device-order");
    drop(after);
    expect_well(&node, "other-device-programs");

    let pinned = node.bed.bpffs("filter").join("policy");
    sys::pin(loaded.programs.get("ingress").expect("it is loaded"), &pinned).expect("it can be pinned");
    let tc = |words: &[&str]| {
        let mut command = node.place.ns().command("tc");
        command.args(words);
        node.place.ns().feed(command, "");
    };
    tc(&["qdisc", "add", "dev", "eth0", "clsact"]);
    tc(&["filter", "add", "dev", "eth0", "egress", "bpf", "da", "object-pinned", &text(pinned)]);
    examine(&node).expect("other-device-programs", "note", "as filter of eth0");
    tc(&["qdisc", "del", "dev", "eth0", "clsact"]);
    let group = sys::open_directory(node.place.cgroup().expect("a lone node has one").dir()).unwrap();
    let hook = aya_obj::generated::bpf_attach_type::BPF_CGROUP_INET4_CONNECT;
    let link = sys::link_cgroup(loaded.programs.get("connect4").expect("it is loaded"), group.as_fd(), hook);
    let link = link.expect("it attaches");
    examine(&node).expect("other-socket-programs", "note", "connect4");
    drop(link);
    expect_well(&node, "other-socket-programs");
}

#[test]
fn the_trial_of_the_socket_hooks_sends_nothing() {
    let mut node = healthy();
    let ns = node.place.ns().clone();
    ns.ip(["route add default via 10.244.1.2 dev eth0", "neigh add 10.244.1.2 lladdr 02:00:00:00:00:02 dev eth0"]);
    ns.nft(
        "add table ip watch; add chain ip watch out { type filter hook output priority -300; }; \
         add rule ip watch out ip daddr 10.96.0.0/16 counter",
    );
    let sent = || {
        let rules: Value =
            serde_json::from_str(&ns.output(["nft", "-j", "list", "table", "ip", "watch"])).expect("JSON");
        rules["nftables"].to_string().contains("\"packets\":0").then_some(0).ok_or(rules)
    };
    examine(&node).expect("socket-hooks-fire", "ok", VIP);
    node.crash();
    let pin = node.pins().cgroup_links().join("connect4");
    sys::link_detach(sys::open_pin(&pin).expect("it is pinned").as_fd()).expect("it detaches");
    examine(&node).expect("socket-hooks-fire", "failure", VIP);
    assert_eq!(sent(), Ok(0));
    // The counter does count.
    let to: SocketAddr = format!("{VIP}:9").parse().expect("an address");
    let send = || std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(b"x", to));
    node.place.run(send).expect("it is sent");
    assert!(sent().is_err());
}
