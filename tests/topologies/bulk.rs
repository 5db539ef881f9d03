//! Large transfers: every byte arrives, through super-packets and without, and where a link on the way is narrower than
//! both ends believe.

use std::collections::BTreeSet;

use shunt_tests::place::Place;
use shunt_tests::probe::{Bulk, Direction};
use shunt_tests::topology::{Family, Offloads, Overlay, Plan, PodLink};

use crate::rig::{Frontend, Offer, Rig};
use crate::talk::Udp;

const NEAR: Offer = Offer::new(1, "near");
const FAR: Offer = Offer::new(2, "far");

const BYTES: u64 = 4_000_000;

/// A backend on the first node, another on the second if there is one; outside clients come through the first.
#[track_caller]
fn rig(plan: Plan) -> Rig {
    let rig = Rig::build(plan);
    rig.cluster.route_vips(rig.node(0));
    rig.apply(&[&NEAR.to(&rig.node(0).pods[0])]);
    if rig.cluster.nodes.len() > 1 {
        rig.apply(&[&FAR.to(&rig.node(1).pods[0])]);
    }
    rig
}

#[track_caller]
fn transfer(rig: &Rig, from: &Place, frontend: Frontend, bytes: u64) {
    let offers = [(&NEAR, 0), (&FAR, 1)];
    for (offer, node) in offers.into_iter().take(rig.cluster.nodes.len()) {
        for family in Family::ALL {
            for direction in [Direction::Up, Direction::Down] {
                let to = offer.at(frontend, rig.node(0), family);
                let what = format!("{} {direction:?} {to}", from.name());
                let transfer = from.bulk(Bulk { to, bytes, direction });
                let transfer = transfer.unwrap_or_else(|failure| panic!("{what}: {failure}"));
                let server = rig.node(node).pods[0].place.name();
                assert_eq!((transfer.bytes, transfer.server.as_str()), (bytes, server), "{what}");
            }
        }
    }
}

/// From everywhere: by socket hook, by packets from a pod, from outside.
#[track_caller]
fn every_byte_arrives(plan: Plan) {
    let rig = rig(plan);
    let pod = &rig.node(0).pods[1].place;
    transfer(&rig, pod, Frontend::ClusterIp, BYTES);
    transfer(&rig, &pod.unhooked(), Frontend::ClusterIp, BYTES);
    transfer(&rig, &rig.cluster.client.place, Frontend::NodePort, BYTES);
    for number in 0..rig.cluster.nodes.len() {
        assert_eq!(rig.invalid_packets(number), 0, "of node {number}");
    }
}

#[test]
fn large_transfers_between_routed_pods_with_offloads() {
    every_byte_arrives(Plan { nodes: 2, ..Plan::default().strict() });
}

#[test]
fn large_transfers_between_routed_pods_without_offloads() {
    every_byte_arrives(Plan { nodes: 2, offloads: Offloads::Off, ..Plan::default() });
}

#[test]
fn large_transfers_over_flannel_with_offloads() {
    every_byte_arrives(Plan::flannel(2));
}

#[test]
fn large_transfers_over_flannel_without_offloads() {
    every_byte_arrives(Plan { offloads: Offloads::Off, ..Plan::flannel(2) });
}

#[test]
fn large_transfers_across_a_bridge_without_netfilter() {
    let pod_link = PodLink::Bridge { calls_netfilter: false, is_hairpin: false };
    every_byte_arrives(Plan { pod_link, ..Plan::default().strict() });
}

#[test]
fn large_transfers_across_a_bridge_with_netfilter_and_without_offloads() {
    every_byte_arrives(Plan { offloads: Offloads::Off, ..Plan::bridge().strict() });
}

/// Both ends have an MTU of 1500, the last link to the pod has less: the node before it says so, about a packet that the
/// sender never sent; translated, the error is understood.
#[test]
fn a_narrow_link_to_the_backend_is_learnt_from_translated_errors() {
    for is_strict in [false, true] {
        let plan = Plan { nodes: 2, ..Plan::default() };
        let rig = rig(if is_strict { plan.strict() } else { plan });
        for node in &rig.cluster.nodes {
            node.place.ns().ip([format!("link set {} mtu 1300", node.pods[0].device)]);
        }
        transfer(&rig, &rig.node(0).pods[1].place.unhooked(), Frontend::ClusterIp, 500_000);
        transfer(&rig, &rig.cluster.client.place, Frontend::NodePort, 500_000);
        let route = rig.cluster.client.place.ns().output(["ip", "route", "get", &rig.node(0).addrs.v4.to_string()]);
        assert!(route.contains("mtu 1300"), "the client has not learnt it: {route}");
    }
}

/// The link to the client is narrow: the router before it tells the frontend, whose error must reach the backend.
#[test]
fn a_narrow_link_to_the_client_is_learnt_from_translated_errors() {
    for plan in [Plan { nodes: 2, ..Plan::default().strict() }, Plan::flannel(2)] {
        let rig = rig(Plan { far_mtu: Some(1280), ..plan });
        let far = rig.cluster.far.as_ref().expect("the plan has it");
        transfer(&rig, &far.place, Frontend::NodePort, 500_000);
        transfer(&rig, &far.place, Frontend::External, 500_000);
    }
}

/// The overlay is narrower than pods and client believe: the node before it tells.
#[test]
fn a_narrow_overlay_is_learnt_from_translated_errors() {
    let rig = rig(Plan::flannel(2));
    for node in &rig.cluster.nodes {
        node.place.ns().ip(["link set flannel.1 mtu 1300", "link set flannel-v6.1 mtu 1300"]);
    }
    transfer(&rig, &rig.node(0).pods[1].place.unhooked(), Frontend::ClusterIp, 500_000);
    transfer(&rig, &rig.cluster.client.place, Frontend::NodePort, 500_000);
}

/// One system call sends many datagrams, which the kernel carries as one packet as far as it can.
#[test]
fn segments_of_one_large_datagram_packet_arrive_one_by_one() {
    for plan in [Plan { nodes: 2, ..Plan::default().strict() }, Plan { offloads: Offloads::Off, ..Plan::flannel(2) }] {
        let rig = rig(plan);
        let clients = [
            (rig.node(0).pods[1].place.unhooked(), Frontend::ClusterIp),
            (rig.cluster.client.place.clone(), Frontend::NodePort),
        ];
        for (place, frontend) in &clients {
            for offer in [NEAR, FAR] {
                for family in Family::ALL {
                    let to = offer.at(*frontend, rig.node(0), family);
                    place.run(|| {
                        let udp = Udp::open(0, to).expect("a free port");
                        udp.ask(to, b"payload").expect("it is answered");
                        let answers = udp.ask_in_segments(to, 30, 1_000).expect("all are answered");
                        assert_eq!(answers, (0..30).collect::<BTreeSet<u8>>(), "{} to {to}", place.name());
                    });
                }
            }
        }
    }
}

/// Packets out of a tunnel are translated for a server of the node itself; without offloads they bear a sum that the tunnel
/// made of all their bytes (CHECKSUM_COMPLETE).
#[test]
fn large_transfers_out_of_a_tunnel_reach_a_backend_with_the_nodes_network() {
    for offloads in [Offloads::On, Offloads::Off] {
        let plan = Plan { nodes: 2, overlay: Overlay::Vxlan, offloads, ..Plan::default() };
        let rig = Rig::build_with(plan, |agent| agent.with("--nodeport-addresses", "all"));
        rig.apply(&[&FAR.to(rig.node(1))]);
        let client = rig.node(0).pods[1].place.unhooked();
        for family in Family::ALL {
            let to = rig.node(1).gateway().port(family, FAR.node_port());
            assert_eq!(client.udp(to).expect("it is answered").server, rig.node(1).name(), "{to}");
            for direction in [Direction::Up, Direction::Down] {
                let transfer = client.bulk(Bulk { to, bytes: BYTES, direction });
                let transfer = transfer.unwrap_or_else(|failure| panic!("{direction:?} {to}: {failure}"));
                assert_eq!(transfer.server, rig.node(1).name());
            }
        }
    }
}
