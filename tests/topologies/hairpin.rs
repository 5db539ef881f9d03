//! A pod dials the service that it is itself the only backend of.

use shunt_tests::probe::{Bulk, Direction};
use shunt_tests::topology::{Family, Plan, PodLink};

use crate::rig::{Frontend, Offer, Proto, Rig};

const WEB: Offer = Offer::new(1, "web");

#[track_caller]
fn a_pod_reaches_itself(plan: Plan) {
    let rig = Rig::build(plan);
    let pod = &rig.node(0).pods[0];
    rig.apply(&[&WEB.to(pod)]);
    for place in [&pod.place, &pod.place.unhooked()] {
        for frontend in Frontend::ALL {
            for family in Family::ALL {
                let to = WEB.at(frontend, rig.node(0), family);
                for proto in Proto::ALL {
                    let answer =
                        proto.ask(place, to).unwrap_or_else(|failure| panic!("{frontend:?} {proto:?}: {failure}"));
                    assert_eq!((answer.server.as_str(), answer.peer), (place.name(), to));
                }
                let bulk = Bulk { to, bytes: 200_000, direction: Direction::Up };
                place.bulk(bulk).unwrap_or_else(|failure| panic!("{frontend:?}: {failure}"));
            }
        }
    }
    assert_eq!(rig.invalid_packets(0), 0);
}

#[test]
fn a_routed_pod_reaches_itself() {
    a_pod_reaches_itself(Plan::default().strict());
}

#[test]
fn a_bridged_pod_reaches_itself_with_netfilter() {
    a_pod_reaches_itself(Plan::bridge().strict());
}

#[test]
fn a_bridged_pod_reaches_itself_without_netfilter_and_hairpin_ports() {
    let pod_link = PodLink::Bridge { calls_netfilter: false, is_hairpin: false };
    a_pod_reaches_itself(Plan { pod_link, ..Plan::default().strict() });
}

#[test]
fn a_pod_of_flannel_reaches_itself() {
    a_pod_reaches_itself(Plan::flannel(1));
}
