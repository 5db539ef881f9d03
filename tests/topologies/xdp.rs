//! XDP on the uplinks of nodes: all of it is served as without, and XDP really has its share.
//!
//! ```text
//!   client ── net ── port | eth0 (XDP) node-1 ── pod-1-1 (near)
//!                \─ port | eth0 (XDP) node-2 ── pod-2-1 (far)
//! ```
//! The uplinks are veth pairs: their ports at the switch complete checksums before a frame comes to XDP.

use std::net::SocketAddr;

use proxy_common::abi::device::DeviceRecord;
use proxy_userspace::datapath::kernel::{self, MapFds, Sizes};
use proxy_userspace::datapath::object::OBJECT;
use proxy_userspace::datapath::pins::{self, Pins};
use proxy_userspace::datapath::{attach, sys};
use shunt_tests::agent::Agent;
use shunt_tests::manifests::Endpoint;
use shunt_tests::place::Place;
use shunt_tests::probe::{Bulk, Direction, LongLived, TcpLoop};
use shunt_tests::topology::{Family, Plan};
use shunt_tests::wait;

use crate::rig::{Frontend, Offer, PORT, Proto, Rig};
use crate::talk::Tcp;

const NEAR: Offer = Offer::new(1, "near");
const FAR: Offer = Offer::new(2, "far");
const EMPTY: Offer = Offer::new(3, "empty");

/// Two nodes that run XDP as `mode` says; outside clients come through the first.
#[track_caller]
fn rig(mode: &str) -> Rig {
    let rig = Rig::build_with(Plan { nodes: 2, ..Plan::default().strict() }, |agent: Agent| agent.with("--xdp", mode));
    for node in &rig.cluster.nodes {
        rig.cluster.net.ns().output(["ethtool", "-K", node.name(), "tx", "off"]);
    }
    rig.cluster.route_vips(rig.node(0));
    rig.apply(&[
        &NEAR.to(&rig.node(0).pods[0]),
        &FAR.to(&rig.node(1).pods[0]),
        &EMPTY.service().endpoints(Vec::<Endpoint>::new()),
    ]);
    let wanted = if mode == "off" { None } else { Some("xdp".to_owned()) };
    for node in 0..2 {
        assert_eq!(xdp_mode(&rig, node), wanted, "of node {node}");
    }
    rig
}

/// How XDP is attached to a node's uplink, in the words of `ip`: `xdp` is in the driver.
#[track_caller]
fn xdp_mode(rig: &Rig, node: usize) -> Option<String> {
    let text = rig.node(node).place.ns().output(["ip", "-o", "link", "show", "eth0"]);
    text.split_whitespace().find(|word| word.starts_with("xdp")).map(str::to_owned)
}

/// Where the backends are reached.
fn frontends(rig: &Rig) -> Vec<(SocketAddr, String)> {
    let mut all = Vec::new();
    for (node, offer) in [NEAR, FAR].iter().enumerate() {
        for family in Family::ALL {
            for frontend in Frontend::ALL {
                all.push((offer.at(frontend, rig.node(0), family), rig.node(node).pods[0].place.name().to_owned()));
            }
        }
    }
    all
}

#[test]
fn outside_clients_reach_every_frontend() {
    let rig = rig("native");
    let client = &rig.cluster.client.place;
    for (to, server) in frontends(&rig) {
        for proto in Proto::ALL {
            let answer = proto.ask(client, to).unwrap_or_else(|failure| panic!("{to} {proto:?}: {failure}"));
            assert_eq!((answer.server, answer.peer), (server.clone(), to), "{proto:?}");
        }
    }
    let (_, counted) = rig.counted(0, || frontends(&rig).iter().for_each(|(to, _)| drop(client.tcp(*to))));
    assert_eq!((counted.flows, counted.sockets), (16, 0), "{counted:?}");
    assert!(counted.drops.keys().all(|reason| reason == "redirect"), "{counted:?}");
    for node in 0..2 {
        assert_eq!(rig.invalid_packets(node), 0, "of node {node}");
    }
}

#[test]
fn every_byte_of_large_transfers_arrives() {
    let rig = rig("native");
    for (to, server) in frontends(&rig) {
        for direction in [Direction::Up, Direction::Down] {
            let transfer = rig.cluster.client.place.bulk(Bulk { to, bytes: 4_000_000, direction });
            let transfer = transfer.unwrap_or_else(|failure| panic!("{direction:?} {to}: {failure}"));
            assert_eq!((transfer.bytes, transfer.server), (4_000_000, server.clone()), "{direction:?} {to}");
        }
    }
    for node in 0..2 {
        assert_eq!(rig.invalid_packets(node), 0, "of node {node}");
    }
}

/// Takes the ingress program off the uplink of the first node; whatever is still translated on the way in, XDP does.
#[track_caller]
fn detach_ingress(rig: &Rig) {
    let pins = Pins::new(rig.agents[0].bpffs());
    let index = rig.node(0).place.run(|| nix::net::if_::if_nametoindex("eth0")).expect("a node has an uplink");
    let links = pins::list(&pins.tcx_links()).expect("pins can be listed");
    let is_uplinks = |pin: &&std::path::PathBuf| {
        pins::file_name(pin).is_some_and(|name| name.ends_with(&format!("-{index}-ingress")))
    };
    attach::detach(links.iter().find(is_uplinks).expect("it is pinned")).expect("it can be detached");
}

/// Conversations that are held while the ingress program goes. True if they all go on, false if none does.
#[track_caller]
fn goes_on_without_ingress(rig: &Rig) -> bool {
    let own = Family::ALL.map(|family| rig.node(0).addrs.get(family));
    rig.cluster.client.place.run(|| {
        let mut held: Vec<_> = frontends(rig)
            .into_iter()
            // Without translation, the node itself resets a connection to its own address: nobody waits.
            .filter(|(to, _)| own.contains(&to.ip()))
            .map(|(to, server)| (Tcp::dial(0, to).expect("it is served"), server))
            .collect();
        assert_eq!(held.len(), 4);
        held.iter_mut().for_each(|(tcp, _)| drop(tcp.ask().expect("it is answered")));
        detach_ingress(rig);
        let alive = held.iter_mut().map(|(tcp, server)| {
            (0..5).all(|_| tcp.ask().is_ok_and(|seen| seen.server == *server))
                && tcp.send_many().is_ok_and(|answer| answer == *server)
        });
        let alive: Vec<bool> = alive.collect();
        assert!(alive.iter().all(|is_alive| *is_alive == alive[0]), "{alive:?}");
        alive[0]
    })
}

#[test]
fn established_connections_are_translated_by_xdp_itself() {
    assert!(goes_on_without_ingress(&rig("native")));
}

/// The control: without XDP, they end when the ingress program goes.
#[test]
fn established_connections_are_translated_by_nobody_else() {
    assert!(!goes_on_without_ingress(&rig("off")));
}

/// Refused by a ClusterIP's unknown port, and by services without endpoints.
#[track_caller]
fn refuses(rig: &Rig) {
    let client = &rig.cluster.client.place;
    for family in Family::ALL {
        let refused = [
            (EMPTY.external_ip().port(family, PORT), "no_endpoint"),
            (EMPTY.at(Frontend::NodePort, rig.node(0), family), "no_endpoint"),
            (NEAR.cluster_ip().port(family, PORT + 1), "unknown_port"),
        ];
        for (to, reason) in refused {
            let (outcome, counted) = rig.counted(0, || client.tcp(to));
            let failure = outcome.expect_err("nobody serves it");
            assert_eq!((failure.reason.as_str(), counted.drops(reason)), ("ECONNREFUSED", 1), "{to}: {failure}");
        }
    }
}

/// A veth pair does not carry what XDP answers: the program behind it does.
#[test]
fn refusals_arrive() {
    refuses(&rig("native"));
}

/// As on hardware: the far end of the uplink takes what XDP sends, since it runs XDP itself, and XDP is told so.
#[test]
fn refusals_of_xdp_itself_arrive() {
    let rig = rig("native");
    let (node, net) = (rig.node(0), rig.cluster.net.ns());
    let index_of = |device: &str| nix::net::if_::if_nametoindex(device).expect("the device is there");
    let index = node.place.run(|| index_of("eth0"));
    let far_end = rig.cluster.bed.bpffs("far-end").join("x");
    let far_end = Pins::new(far_end);
    far_end.prepare().expect("the test's BPF file system takes pins");
    let sizes = Sizes { services: 64, backends: 64, flows: 64 };
    // With tables that know nothing, it passes everything.
    let idle = kernel::load(OBJECT, &far_end, &sizes).expect("the kernel takes the programs");
    let program = idle.programs.get("uplink").expect("the object has it");
    let _link = net.run(|| sys::link_xdp(program, index_of(node.name()))).expect("it can be attached");
    let maps = MapFds::open_pinned(&Pins::new(rig.agents[0].bpffs())).expect("the agent has pinned its tables");
    let devices = maps.get("devices").expect("it is one of them");
    let mut record = [DeviceRecord::ZERO];
    assert!(sys::map_lookup(devices, &index, &mut record).expect("it is a hash map"), "the uplink has a record");
    let record = DeviceRecord { flags: DeviceRecord::SENDS, ..record[0] };
    sys::map_update(devices, &index, &record).expect("it can be written");
    detach_ingress(&rig);
    refuses(&rig);
}

/// Each agent loads its programs anew and puts them behind the links that are there.
#[test]
fn nothing_fails_while_agents_are_killed_and_replaced() {
    let mut rig = rig("native");
    let to: Vec<_> = frontends(&rig).into_iter().map(|(to, _)| to).collect();
    let client: Place = rig.cluster.client.place.clone();
    let mut new = client.tcp_loop(TcpLoop { to: to.clone(), rate: 100, workers: 4, count: None });
    let mut kept: Vec<_> =
        to.iter().map(|to| client.long_lived(LongLived { to: *to, connections: 1, interval_ms: 20 })).collect();
    kept.iter_mut().for_each(|load| drop(load.wait_for("an open connection", |stats| stats.open == 1)));
    for _ in 0..3 {
        new.wait_answers(50);
        rig.agents[0].crash();
        new.wait_answers(50);
        rig.agents[0].start();
        assert_eq!(xdp_mode(&rig, 0).as_deref(), Some("xdp"));
    }
    new.wait_answers(50);
    new.finish_clean();
    kept.into_iter().for_each(|load| drop(load.finish_clean()));
}

/// `--xdp off` after `native`: the next agent takes it off, under traffic.
#[test]
fn xdp_goes_under_traffic_when_it_is_switched_off() {
    let mut rig = rig("native");
    let to: Vec<_> = frontends(&rig).into_iter().map(|(to, _)| to).collect();
    let mut load = rig.cluster.client.place.tcp_loop(TcpLoop { to, rate: 100, workers: 4, count: None });
    load.wait_answers(50);
    rig.agents[0].stop();
    rig.agents[0].set("--xdp", "off");
    rig.agents[0].start();
    wait::until("XDP to go", || xdp_mode(&rig, 0).is_none());
    load.wait_answers(50);
    load.finish_clean();
}
