//! A healthy node, and each thing that can be wrong with it.

use std::collections::BTreeSet;

use proxy_common::abi::config::Config;
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::addr::{Addr, Port, Proto};
use proxy_common::verdict::DropReason;

use super::*;
use crate::datapath::attach::socket_hook_names;
use crate::datapath::device::{Controller, Device, Layer};
use crate::datapath::netfilter::{Dropping, Firewall};
use crate::datapath::network::Binding;
use crate::datapath::other_proxies::Proxy;
use crate::datapath::reserve::PortSet;
use crate::datapath::survey::dial::Dialled;
use crate::datapath::survey::hook::{DeviceHooks, Group, Hook, Program, Sockets};
use crate::datapath::survey::kernel::Kernel;
use crate::datapath::survey::network::{DeviceSettings, Settings};
use crate::datapath::survey::pinned::{Agent, AgentProcess, MapSize, Place, Programmed, Room};
use crate::datapath::survey::process::Process;
use crate::planner::{FrontendAddr, Tables};
use crate::telemetry::admin::Trouble;
use crate::telemetry::source::{OutageReport, SourceReport};

const COOKIE: u64 = 4711;
const GROUP: u64 = 1;

fn device(index: u32, name: &str, kind: &str) -> DeviceHooks {
    let hook = |id| Hook { ours: Some(id), programs: vec![Program { id, name: "ours".into() }] };
    DeviceHooks {
        device: Device {
            index,
            name: name.into(),
            kind: kind.into(),
            layer: Layer::Ethernet,
            is_loopback: false,
            controller: None,
            mac: [0; 6],
            is_hardware: false,
        },
        ingress: hook(10),
        egress: hook(11),
        foreign_xdp: None,
        has_xdp: false,
        filters: Vec::new(),
        mtu: 1500,
        lower: None,
        settings: DeviceSettings {
            forwards_v4: Some(true),
            forwards_v6: Some(true),
            rp_filter: Some(0),
            accept_ra: Some(1),
        },
    }
}

fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<std::net::IpAddr>().expect("an address"))
}

fn frontend(at: &str, port: u16) -> FrontendAddr {
    FrontendAddr { addr: addr(at), port: Port(port), proto: Proto::TCP }
}

/// Services at 10.96.0.1:80, NodePort 30080 and 203.0.113.1:80; one uplink, one tunnel.
fn healthy() -> Facts {
    let group = Group { id: GROUP, directory: Some("/sys/fs/cgroup".into()), path: Some("/".into()) };
    let mut tables = Tables::default();
    for (at, flags) in [
        (frontend("10.96.0.1", 80), FrontendValue::CLUSTER_IP),
        (frontend("0.0.0.0", 30080), 0),
        (frontend("203.0.113.1", 80), 0),
    ] {
        tables.frontends.insert(at, FrontendValue { service: 1, flags });
    }
    let config = Config {
        node_netns: COOKIE,
        snat_first: 10000,
        snat_last: 29999,
        local_first: 32768,
        local_last: 60999,
        ..Config::ZERO
    };
    let survey = Survey {
        kernel: Ok(Kernel {
            release: "6.18".into(),
            has_tcx: Ok(true),
            has_source_lookup: Some(true),
            missing_functions: Vec::new(),
            jit: Some(1),
        }),
        place: Place {
            base: "/sys/fs/bpf/shunt".into(),
            is_bpffs: true,
            layouts: vec!["v7".into()],
            is_readable: true,
            missing: Vec::new(),
        },
        tables: Ok(Programmed {
            config,
            tables,
            maps: vec![MapSize { name: "flows".into(), bytes: 64 << 20, most: 128 << 20 }],
            rooms: vec![Room { name: "services", used: 1, capacity: 100 }],
            drops: vec![0; DropReason::ALL.len()],
            interpreted: Vec::new(),
        }),
        agent: Ok(Some(Agent {
            process: Some(AgentProcess { id: 42, memory_limit: Some(256 << 20), open_files: Some(1 << 20) }),
        })),
        sockets: Ok(Sockets {
            wanted: group.clone(),
            hooked: Some(group),
            hooks: socket_hook_names().map(|name| (name, GROUP)).collect(),
            others: Vec::new(),
        }),
        devices: Ok(vec![
            device(2, "eth0", ""),
            DeviceHooks { mtu: 1450, lower: Some(2), ..device(3, "flannel.1", "vxlan") },
        ]),
        dialled: Ok(vec![Dialled { at: "10.96.0.1:65535".parse().expect("an address"), is_refused: true }]),
        outside: Ok(Vec::new()),
        settings: Settings {
            netns: Ok(COOKIE),
            forwarding_off: Vec::new(),
            rp_filter: Some(0),
            reverse_path_drops: 0,
            bridges_call_netfilter: None,
            local_ports: Ok((Port(32768), Port(60999))),
            reserved_ports: Ok([10000..=29999, 30080..=30080].into_iter().collect()),
            announced_routes: Vec::new(),
            bindings: Ok(vec![binding(2, "192.0.2.1"), binding(2, "2001:db8::1")]),
        },
        firewall: Ok(Firewall::default()),
        proxies: Vec::new(),
    };
    let source = SourceReport { name: "manifests".into(), listed: true, ..SourceReport::default() };
    Facts { survey, report: Ok(Report { ready: true, sources: vec![source], ..Report::default() }) }
}

fn binding(device: u32, text: &str) -> Binding {
    Binding { device, addr: text.parse().expect("an address"), is_global: true }
}

fn kernel(facts: &mut Facts) -> &mut Kernel {
    facts.survey.kernel.as_mut().expect("it was seen")
}

fn tables(facts: &mut Facts) -> &mut Programmed {
    facts.survey.tables.as_mut().expect("they were seen")
}

fn agent(facts: &mut Facts) -> &mut AgentProcess {
    let agent = facts.survey.agent.as_mut().expect("it was looked for").as_mut();
    agent.and_then(|agent| agent.process.as_mut()).expect("it was seen")
}

fn sockets(facts: &mut Facts) -> &mut Sockets {
    facts.survey.sockets.as_mut().expect("they were seen")
}

fn devices(facts: &mut Facts) -> &mut Vec<DeviceHooks> {
    facts.survey.devices.as_mut().expect("they were seen")
}

fn report(facts: &mut Facts) -> &mut Report {
    facts.report.as_mut().expect("the agent was asked")
}

fn process(id: u32, is_of_node: bool) -> Process {
    Process { id, name: "kubelet".into(), group: "/other".into(), is_of_node }
}

fn program(name: &str) -> Program {
    Program { id: 99, name: name.into() }
}

fn chain(accepts_some: bool) -> Firewall {
    let dropping = vec![Dropping { chain: "ip filter FORWARD".into(), accepts_some }];
    Firewall { dropping, ..Firewall::default() }
}

#[test]
fn on_a_healthy_node_every_check_is_well() {
    let findings = examine(&healthy());
    let not_well: Vec<_> = findings.iter().filter(|finding| finding.verdict != Verdict::Ok).collect();
    assert!(not_well.is_empty(), "{not_well:#?}");
    let names: BTreeSet<_> = findings.iter().map(|finding| finding.check).collect();
    assert_eq!(names.len(), CHECKS.len(), "names are unique");
}

/// One thing that is wrong: which check finds it, how grave it is, and a word of what is said.
struct Fault(&'static str, Verdict, &'static str, fn(&mut Facts));

use Verdict::{Failure, Note, Ok as Well, Unknown, Warning};

const FAULTS: &[Fault] = &[
    Fault("kernel-links", Note, "no tcx", |f| kernel(f).has_tcx = Ok(false)),
    Fault("kernel-links", Unknown, "denied", |f| kernel(f).has_tcx = Err(Unseen("denied".into()))),
    Fault("kernel-links", Unknown, "denied", |f| f.survey.kernel = Err(Unseen("denied".into()))),
    Fault("kernel-source-address", Warning, "another node", |f| kernel(f).has_source_lookup = Some(false)),
    Fault("kernel-source-address", Unknown, "vmlinux", |f| kernel(f).has_source_lookup = None),
    Fault("kernel-functions", Note, "bpf_ct_release", |f| kernel(f).missing_functions = vec!["bpf_ct_release"]),
    Fault("kernel-compiler", Warning, "ingress", |f| tables(f).interpreted = vec!["ingress".into()]),
    Fault("kernel-compiler", Warning, "slow", |f| kernel(f).jit = Some(0)),
    Fault("kernel-compiler", Warning, "log", |f| kernel(f).jit = Some(2)),
    Fault("kernel-compiler", Unknown, "namespace", |f| {
        kernel(f).jit = None;
        f.survey.tables = Err(Unseen("none".into()));
    }),
    Fault("bpf-file-system", Warning, "/sys/fs/bpf/shunt", |f| f.survey.place.is_bpffs = false),
    Fault("agent", Warning, "works on", |f| f.survey.agent = Ok(None)),
    Fault("agent", Warning, "nothing is programmed", |f| {
        f.survey.agent = Ok(None);
        f.survey.place.layouts.clear();
    }),
    Fault("agent", Well, "cannot be seen", |f| f.survey.agent = Ok(Some(Agent { process: None }))),
    Fault("namespace", Failure, "not the network namespace", |f| f.survey.settings.netns = Ok(1)),
    Fault("sources", Warning, "no news of Service", |f| {
        let outage = OutageReport { what: "Service".into(), since: "then".into(), age: 1, why: "gone".into() };
        report(f).sources[0].outages.push(outage);
    }),
    Fault("sources", Warning, "not listed yet", |f| report(f).pending_sources.push("kubernetes".into())),
    Fault("sources", Warning, "1 objects", |f| {
        report(f).sources[0].rejected.push(Trouble { subject: "a".into(), message: "b".into() });
    }),
    Fault("sources", Unknown, "no agent runs", |f| f.report = Err(Unseen("no agent runs".into()))),
    Fault("services", Failure, "this node: full", |f| {
        report(f).refused.push(Trouble { subject: "this node".into(), message: "full".into() });
    }),
    Fault("services", Warning, "web: taken", |f| {
        report(f).problems.push(Trouble { subject: "web".into(), message: "taken".into() });
    }),
    Fault("services", Warning, "not everything", |f| report(f).ready = false),
    Fault("tables", Failure, "v8", |f| {
        f.survey.place.layouts.push("v8".into());
        f.survey.place.is_readable = false;
    }),
    Fault("tables", Failure, "backends", |f| f.survey.place.missing = vec!["backends"]),
    Fault("tables", Warning, "v7, v7-2", |f| f.survey.place.layouts.push("v7-2".into())),
    Fault("tables", Unknown, "no tables", |f| f.survey.place.layouts.clear()),
    Fault("table-room", Warning, "services 90 of 100", |f| tables(f).rooms[0].used = 90),
    Fault("table-memory", Failure, "64 MiB, most of it for flows", |f| agent(f).memory_limit = Some(70 << 20)),
    Fault("table-memory", Warning, "may come to 128 MiB", |f| agent(f).memory_limit = Some(100 << 20)),
    Fault("table-memory", Well, "no limit", |f| agent(f).memory_limit = None),
    Fault("open-files", Warning, "1024", |f| agent(f).open_files = Some(1024)),
    Fault("open-files", Unknown, "process", |f| f.survey.agent = Ok(None)),
    Fault("drops", Warning, "7 host_unhooked", |f| tables(f).drops[DropReason::HostUnhooked as usize] = 7),
    Fault("drops", Well, "nothing", |f| tables(f).drops[DropReason::NoEndpoint as usize] = 7),
    Fault("socket-hooks", Failure, "connect4", |f| {
        sockets(f).hooks.iter_mut().filter(|hook| hook.0 == "connect4").for_each(|hook| hook.1 = 0);
    }),
    Fault("socket-hooks", Failure, "recvmsg6", |f| {
        sockets(f).hooks.iter_mut().filter(|hook| hook.0 == "recvmsg6").for_each(|hook| hook.1 = 9);
    }),
    Fault("socket-hooks", Failure, "reach no service", |f| sockets(f).hooked = None),
    Fault("socket-hooks", Note, "not on /sys/fs/cgroup", |f| {
        let other = Group { id: 7, directory: Some("/sys/fs/cgroup/pods".into()), path: Some("/pods".into()) };
        sockets(f).hooks.iter_mut().for_each(|hook| hook.1 = 7);
        sockets(f).hooked = Some(other);
    }),
    Fault("socket-hooks", Note, "--socket-lb off", |f| tables(f).config.flags = Config::SOCKETS_OFF),
    Fault("socket-hooks-fire", Failure, "10.96.0.1:65535", |f| {
        f.survey.dialled.as_mut().expect("it was tried")[0].is_refused = false;
    }),
    Fault("socket-hooks-fire", Note, "outside the hooked group", |f| {
        f.survey.dialled.as_mut().expect("it was tried")[0].is_refused = false;
        f.survey.outside = Ok(vec![process(std::process::id(), true)]);
    }),
    Fault("socket-hooks-fire", Unknown, "no ClusterIP", |f| f.survey.dialled = Err(Unseen("no ClusterIP".into()))),
    Fault("hooked-processes", Warning, "kubelet (7)", |f| f.survey.outside = Ok(vec![process(7, true)])),
    Fault("hooked-processes", Note, "2 processes of other", |f| {
        f.survey.outside = Ok(vec![process(7, false), process(8, false)]);
    }),
    Fault("other-socket-programs", Note, "cil_sock4", |f| sockets(f).others = vec![program("cil_sock4_connect")]),
    Fault("device-hooks", Failure, "programs are missing: eth0", |f| {
        devices(f)[0].ingress.ours = None;
        devices(f)[0].egress.ours = None;
    }),
    Fault("device-hooks", Failure, "eth0 (for what comes in)", |f| devices(f)[0].ingress.ours = None),
    Fault("device-hooks", Failure, "flannel.1 (for what goes out)", |f| devices(f)[1].egress.ours = None),
    Fault("device-hooks", Note, "left out by --devices or --exclude-devices: eth0", |f| {
        devices(f)[0].ingress.ours = None;
        report(f).devices.except = vec!["eth*".into()];
    }),
    Fault("device-hooks", Failure, "or were left out", |f| {
        devices(f)[0].ingress.ours = None;
        f.report = Err(Unseen("no agent".into()));
    }),
    Fault("device-hooks", Well, "attached to eth0, flannel.1", |f| {
        let controller = Some(Controller { index: 9, kind: "bond".into() });
        let slave = device(4, "eth1", "");
        let slave = DeviceHooks { device: Device { controller, ..slave.device }, ingress: Hook::default(), ..slave };
        devices(f).push(slave);
    }),
    Fault("device-order", Warning, "foreign comes before ours on the way in at eth0", |f| {
        devices(f)[0].ingress.programs.insert(0, program("foreign"));
    }),
    Fault("device-order", Well, "first", |f| devices(f)[0].ingress.programs.push(program("foreign"))),
    Fault("device-order", Warning, "foreign comes after ours on the way out at eth0", |f| {
        devices(f)[0].egress.programs.push(program("foreign"));
    }),
    Fault("other-device-programs", Note, "foreign on the way in at eth0", |f| {
        devices(f)[0].ingress.programs.push(program("foreign"));
    }),
    Fault("other-device-programs", Note, "lb at XDP of eth0", |f| devices(f)[0].foreign_xdp = Some(program("lb"))),
    Fault("other-device-programs", Note, "policy as filter of eth0", |f| devices(f)[0].filters = vec!["policy".into()]),
    Fault("forwarding", Failure, "net.ipv4.ip_forward is 0", |f| {
        f.survey.settings.forwarding_off = vec!["/proc/sys/net/ipv4/ip_forward"];
    }),
    Fault("forwarding", Failure, "IPv6 packets", |f| {
        f.survey.settings.forwarding_off = vec!["/proc/sys/net/ipv6/conf/all/forwarding"];
    }),
    Fault("forwarding", Well, "families in which", |f| {
        f.survey.settings.forwarding_off = vec!["/proc/sys/net/ipv6/conf/all/forwarding"];
        f.survey.settings.bindings = Ok(vec![binding(2, "192.0.2.1")]);
    }),
    Fault("device-forwarding", Warning, "net.ipv4.conf.eth0.forwarding", |f| {
        devices(f)[0].settings.forwards_v4 = Some(false);
    }),
    Fault("router-advertisements", Warning, "by eth0 ends", |f| {
        f.survey.settings.announced_routes = vec!["eth0".into()];
    }),
    Fault("reverse-path-filter", Well, "does no harm", |f| f.survey.settings.rp_filter = Some(1)),
    Fault("reverse-path-filter", Note, "3 packets", |f| {
        devices(f)[0].settings.rp_filter = Some(1);
        f.survey.settings.reverse_path_drops = 3;
    }),
    Fault("overlay-mtu", Warning, "flannel.1 has 1500, at most 1450 fits", |f| devices(f)[1].mtu = 1500),
    Fault("reserved-ports", Warning, "source ports 10000-29999, NodePorts 30080", |f| {
        f.survey.settings.reserved_ports = Ok(PortSet::default());
    }),
    Fault("local-ports", Warning, "1024 to 60999 now", |f| {
        f.survey.settings.local_ports = Ok((Port(1024), Port(60999)));
    }),
    Fault("source-ports", Warning, "10000-29999: 20000", |f| {
        tables(f).tables.frontends.insert(frontend("0.0.0.0", 20000), FrontendValue { service: 1, flags: 0 });
    }),
    Fault("bound-addresses", Warning, "10.96.0.1 on eth0", |f| {
        f.survey.settings.bindings = Ok(vec![binding(2, "10.96.0.1")]);
    }),
    Fault("bound-addresses", Note, "203.0.113.1 on eth0", |f| {
        f.survey.settings.bindings = Ok(vec![binding(2, "203.0.113.1")]);
    }),
    Fault("bound-addresses", Warning, "NodeLocal DNSCache", |f| {
        devices(f)[0].device.name = "nodelocaldns".into();
        f.survey.settings.bindings = Ok(vec![binding(2, "10.96.0.1")]);
    }),
    Fault("bound-addresses", Warning, "ipvs", |f| {
        devices(f)[0].device.name = "kube-ipvs0".into();
        f.survey.settings.bindings = Ok(vec![binding(2, "10.96.0.1")]);
    }),
    Fault("forward-policy", Failure, "ip filter FORWARD drops all", |f| f.survey.firewall = Ok(chain(false))),
    Fault("forward-policy", Note, "drops what no rule accepts, frames between pods", |f| {
        f.survey.firewall = Ok(chain(true));
        f.survey.settings.bridges_call_netfilter = Some(true);
    }),
    Fault("forward-policy", Unknown, "denied", |f| f.survey.firewall = Err(Unseen("denied".into()))),
    Fault("invalid-packets", Note, "KUBE-FORWARD", |f| {
        let invalid_dropping = vec!["ip filter KUBE-FORWARD".into()];
        f.survey.firewall = Ok(Firewall { invalid_dropping, ..Firewall::default() });
    }),
    Fault("other-proxies", Warning, "rules of kube-proxy", |f| f.survey.proxies = vec![Proxy::KubeProxy]),
    Fault("other-proxies", Warning, "kube-ipvs0", |f| devices(f)[0].device.name = "kube-ipvs0".into()),
];

#[test]
fn every_fault_is_found_by_its_check_and_advice_is_given_where_there_is_some() {
    for Fault(check, verdict, word, harm) in FAULTS {
        let mut facts = healthy();
        harm(&mut facts);
        let found = examine(&facts).into_iter().find(|finding| finding.check == *check).expect("it is a check");
        assert_eq!(found.verdict, *verdict, "{found:?}");
        assert!(found.seen.contains(word), "{word:?}: {found:?}");
        let is_grave = matches!(found.verdict, Failure | Warning);
        assert!(!is_grave || found.advice.as_ref().is_some_and(|advice| !advice.is_empty()), "{found:?}");
    }
}

#[test]
fn every_check_has_a_fault() {
    let faults: BTreeSet<_> = FAULTS.iter().map(|fault| fault.0).collect();
    let missing: Vec<_> = CHECKS.iter().map(|check| check.name).filter(|name| !faults.contains(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn long_lists_are_cut_and_say_so() {
    assert_eq!(list(["a", "b"]), "a, b");
    assert_eq!(list(["a", "b", "c", "d", "e", "f", "g"]), "a, b, c, d, e and 2 more");
}
