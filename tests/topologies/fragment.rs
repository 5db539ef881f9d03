//! Datagrams larger than a link: their fragments follow the first, both ways.

use shunt_tests::place::Place;
use shunt_tests::topology::{Family, Plan, PodLink};
use shunt_tests::wait;

use crate::rig::{Frontend, Offer, Rig};
use crate::talk::Udp;

const NEAR: Offer = Offer::new(1, "near");
const FAR: Offer = Offer::new(2, "far");

/// A datagram of three packets and one of the largest size, to a backend on the node and to one on another, from a pod and
/// from outside.
#[track_caller]
fn large_datagrams_come_back(plan: Plan) {
    let rig = Rig::build(plan);
    rig.cluster.route_vips(rig.node(0));
    let mut offers = vec![NEAR];
    rig.apply(&[&NEAR.to(&rig.node(0).pods[0])]);
    if rig.cluster.nodes.len() > 1 {
        rig.apply(&[&FAR.to(&rig.node(1).pods[0])]);
        offers.push(FAR);
    }
    let clients: [(Place, Frontend); 2] = [
        (rig.node(0).pods[1].place.unhooked(), Frontend::ClusterIp),
        (rig.cluster.client.place.clone(), Frontend::NodePort),
    ];
    for (place, frontend) in &clients {
        for offer in &offers {
            for family in Family::ALL {
                let to = offer.at(*frontend, rig.node(0), family);
                place.run(|| {
                    let udp = Udp::open(0, to).expect("a port is free");
                    for payload in [vec![1; 3_000], vec![2; 60_000]] {
                        // The first may be lost to a narrower link, which the sender learns of.
                        wait::until(&format!("the path from {} to {to}", place.name()), || {
                            udp.is_answered(to, &payload)
                        });
                        for _ in 0..3 {
                            let outcome = udp.ask(to, &payload);
                            outcome.unwrap_or_else(|error| panic!("{} to {to}: {error}", place.name()));
                        }
                    }
                });
            }
        }
    }
    let mut drops = rig.counters(0).drops;
    drops.remove("redirect");
    assert!(drops.is_empty(), "{drops:?}");
}

/// Nobody puts them together on the way.
#[test]
fn large_datagrams_come_back_without_connection_tracking() {
    large_datagrams_come_back(Plan { nodes: 2, ..Plan::default() });
}

/// The node's connection tracking puts them together and takes them apart again.
#[test]
fn large_datagrams_come_back_with_connection_tracking() {
    large_datagrams_come_back(Plan { nodes: 2, ..Plan::default().strict() });
}

#[test]
fn large_datagrams_come_back_over_flannel() {
    large_datagrams_come_back(Plan::flannel(2));
}

#[test]
fn large_datagrams_come_back_across_a_bridge() {
    for calls_netfilter in [false, true] {
        let pod_link = PodLink::Bridge { calls_netfilter, is_hairpin: false };
        large_datagrams_come_back(Plan { pod_link, ..Plan::default().strict() });
    }
}
