//! Three nodes: the client on one, the NodePort that it dials on another, the backend on the third.
//!
//! ```text
//!   pod-1-1 ─ node-1 ──┐
//!             node-2 ──┼── client      NodePort of node-2
//!   pod-3-1 ─ node-3 ──┘               backend
//! ```

use shunt_tests::place::Place;
use shunt_tests::topology::{Addrs, Family, Plan};

use crate::rig::{Counters, Frontend, Offer, Proto, Rig};

const WEB: Offer = Offer::new(1, "web");

/// Dials node-2 from everywhere; node-2 must translate, with a source of its own, whatever the client's node does.
#[track_caller]
fn the_dialled_node_translates(plan: Plan) {
    let rig = Rig::build(Plan { pods: 1, ..plan });
    let (pod, backend) = (&rig.node(0).pods[0], &rig.node(2).pods[0]);
    rig.apply(&[&WEB.to(backend)]);
    let clients: [(&Place, Option<Addrs>); 4] = [
        (&pod.place, Some(pod.addrs)),
        (&pod.place.unhooked(), Some(pod.addrs)),
        (&rig.node(0).place, None),
        (&rig.cluster.client.place, Some(rig.cluster.client.addrs)),
    ];
    let ((), counted) = rig.counted(1, || {
        for (place, own) in &clients {
            for family in Family::ALL {
                for proto in Proto::ALL {
                    let to = WEB.at(Frontend::NodePort, rig.node(1), family);
                    let what = format!("{} to {to} {proto:?}", place.name());
                    let answer = proto.ask(place, to).unwrap_or_else(|failure| panic!("{what}: {failure}"));
                    assert_eq!((answer.server.as_str(), answer.peer), (backend.place.name(), to), "{what}");
                    assert_ne!(Some(answer.seen_client.ip()), own.map(|own| own.get(family)), "{what}");
                }
            }
        }
    });
    assert_eq!((counted.flows, counted.sockets), (8, 0), "{counted:?}");
    assert!(counted.drops.keys().all(|reason| reason == "redirect"), "{counted:?}");
    for number in 0..3 {
        assert_eq!(rig.invalid_packets(number), 0, "of node {number}");
    }
}

#[test]
fn a_node_port_of_another_node_leads_to_a_third_over_routes() {
    the_dialled_node_translates(Plan { nodes: 3, ..Plan::default().strict() });
}

#[test]
fn a_node_port_of_another_node_leads_to_a_third_over_flannel() {
    the_dialled_node_translates(Plan::flannel(3));
}

/// The sockets of a node know its own addresses only.
#[test]
fn a_local_node_port_is_served_by_sockets_and_a_foreign_one_by_packets() {
    let rig = Rig::build(Plan { nodes: 2, pods: 1, ..Plan::default() });
    rig.apply(&[&WEB.to(&rig.node(1).pods[0])]);
    let pod = &rig.node(0).pods[0];
    let ask = |node: usize| {
        let to = WEB.at(Frontend::NodePort, rig.node(node), Family::V4);
        rig.counted(node, || pod.place.tcp(to).expect("it is served")).1
    };
    assert_eq!(ask(0), Counters { sockets: 1, ..Counters::default() });
    let foreign = ask(1);
    assert_eq!((foreign.sockets, foreign.flows), (0, 1), "{foreign:?}");
}
