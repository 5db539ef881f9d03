//! What the backend sees as its client, and the traffic policies that exist to keep it.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde_json::json;
use shunt_tests::manifests::Service;
use shunt_tests::topology::{Addrs, CLUSTER, Family, Plan};

use crate::refusal::assert_dropped;
use crate::rig::{Frontend, Offer, Proto, Rig};
use crate::talk::Tcp;

const NEAR: Offer = Offer::new(1, "near");
const FAR: Offer = Offer::new(2, "far");

fn local(service: Service) -> Service {
    service.spec("externalTrafficPolicy", json!("Local"))
}

/// Two nodes; the services' endpoints are on the first, or on the second; outside clients come to the first.
#[track_caller]
fn rig(plan: Plan) -> Rig {
    let rig = Rig::build(plan);
    rig.cluster.route_vips(rig.node(0));
    rig
}

fn external() -> [Frontend; 3] {
    [Frontend::NodePort, Frontend::External, Frontend::LoadBalancer]
}

#[track_caller]
fn external_local_policy(plan: Plan) {
    let rig = rig(plan);
    rig.apply(&[&local(NEAR.to(&rig.node(0).pods[0])), &local(FAR.to(&rig.node(1).pods[0]))]);
    let outside = &rig.cluster.client;
    for family in Family::ALL {
        for frontend in external() {
            for proto in Proto::ALL {
                let to = NEAR.at(frontend, rig.node(0), family);
                let answer = proto.ask(&outside.place, to).expect("it is served");
                assert_eq!(answer.seen_client.ip(), outside.addrs.get(family), "{to} {proto:?}");
            }
            assert_dropped(&rig, &outside.place, FAR.at(frontend, rig.node(0), family), "no_local_endpoint");
        }
        // Inside, the policy binds nobody.
        let pod = &rig.node(0).pods[1];
        for place in [&pod.place, &pod.place.unhooked(), &rig.node(0).place] {
            for frontend in external() {
                let to = FAR.at(frontend, rig.node(0), family);
                let answer = place.tcp(to).unwrap_or_else(|failure| panic!("{}: {failure}", place.name()));
                assert_eq!(answer.server, rig.node(1).pods[0].place.name());
            }
        }
    }
}

#[test]
fn external_local_policy_keeps_the_source_and_drops_without_local_endpoint() {
    external_local_policy(Plan { nodes: 2, ..Plan::default().strict() });
}

#[test]
fn external_local_policy_keeps_the_source_and_drops_over_flannel() {
    external_local_policy(Plan::flannel(2));
}

/// The addresses that node-1 has towards pods of others.
fn node_sources(rig: &Rig, family: Family) -> Vec<std::net::IpAddr> {
    [rig.node(0).addrs, rig.node(0).gateway(), rig.node(0).pod_cidr.host(0)]
        .map(|addrs: Addrs| addrs.get(family))
        .to_vec()
}

/// The rewritten source is an address of the node with a port of the reserved range, and stays the flow's own.
#[test]
fn rewritten_sources_are_the_nodes_with_reserved_ports() {
    for plan in [Plan { nodes: 2, ..Plan::default().strict() }, Plan { masquerades: false, ..Plan::flannel(2) }] {
        let rig = rig(plan);
        rig.apply(&[&FAR.to(&rig.node(1).pods[0])]);
        for family in Family::ALL {
            for proto in Proto::ALL {
                let to = FAR.at(Frontend::NodePort, rig.node(0), family);
                let answer = proto.ask(&rig.cluster.client.place, to).expect("it is served");
                let seen = answer.seen_client;
                assert!(node_sources(&rig, family).contains(&seen.ip()), "{seen}");
                assert!((10_000..30_000).contains(&seen.port()), "{seen}");
            }
        }
    }
}

/// Nobody who dials a ClusterIP is seen as himself: neither by a pod of the same node, nor by one of another, nor by himself.
#[test]
fn every_client_of_a_cluster_ip_is_masqueraded_where_that_is_wanted() {
    for plan in [Plan { nodes: 2, ..Plan::default().strict() }, Plan { nodes: 2, ..Plan::bridge() }] {
        let rig = Rig::build_with(plan, |agent| agent.with_flag("--masquerade-all"));
        rig.cluster.route_vips(rig.node(0));
        rig.apply(&[&NEAR.to(&rig.node(0).pods[0]), &FAR.to(&rig.node(1).pods[0])]);
        let pod = &rig.node(0).pods[1];
        for family in Family::ALL {
            for offer in [&NEAR, &FAR] {
                for proto in Proto::ALL {
                    let to = offer.at(Frontend::ClusterIp, rig.node(0), family);
                    for place in [&pod.place, &pod.place.unhooked()] {
                        let answer = proto.ask(place, to).unwrap_or_else(|failure| panic!("{to} {proto:?}: {failure}"));
                        assert!(
                            node_sources(&rig, family).contains(&answer.seen_client.ip()),
                            "{to} {proto:?}: {answer:?}"
                        );
                        assert_eq!(answer.peer, to);
                    }
                }
            }
            // What is no ClusterIP is as ever.
            let to = NEAR.at(Frontend::External, rig.node(0), family);
            let answer = pod.place.unhooked().tcp(to).expect("it is served");
            assert_eq!(answer.seen_client.ip(), pod.addrs.get(family));
        }
    }
}

/// A port that the kernel gives to nobody stays the client's own, for protocols that look at it.
#[test]
fn a_low_source_port_is_kept_behind_a_rewritten_source() {
    expect_low_port_kept(&rig(Plan { nodes: 2, ..Plan::default() }));
}

/// A masquerade may keep the port that Shunt would keep: the replies are the kernel's all the same, and never invalid to it.
#[test]
fn a_low_source_port_is_kept_behind_a_masquerade_that_keeps_it() {
    let rig = rig(Plan { masquerades: false, ..Plan::flannel(2) });
    let (v4, v6) = (CLUSTER.v4(), CLUSTER.v6());
    rig.node(0).place.ns().nft(&format!(
        "table inet cni {{
            chain postrouting {{ type nat hook postrouting priority srcnat;
                ip saddr != {v4} ip daddr {v4} masquerade
                ip6 saddr != {v6} ip6 daddr {v6} masquerade
            }}
        }}\n"
    ));
    expect_low_port_kept(&rig);
}

fn expect_low_port_kept(rig: &Rig) {
    rig.apply(&[&FAR.to(&rig.node(1).pods[0])]);
    let client = &rig.cluster.client;
    for family in Family::ALL {
        let to = FAR.at(Frontend::NodePort, rig.node(0), family);
        let bind: SocketAddr = client.addrs.port(family, 700);
        let once = shunt_tests::probe::TcpOnce { to, bind: Some(bind), mapped: false };
        let answer = client.place.tcp_with(once).expect("it is served");
        assert!(node_sources(rig, family).contains(&answer.seen_client.ip()), "{answer:?}");
        assert_eq!(answer.seen_client.port(), 700);
    }
}

/// A CNI that masquerades first is left alone: its port is not of our range.
#[test]
fn a_masquerade_of_the_cni_comes_first() {
    let rig = rig(Plan::flannel(2));
    rig.apply(&[&FAR.to(&rig.node(1).pods[0])]);
    for family in Family::ALL {
        for proto in Proto::ALL {
            let to = FAR.at(Frontend::NodePort, rig.node(0), family);
            let answer = proto.ask(&rig.cluster.client.place, to).expect("it is served");
            assert!(node_sources(&rig, family).contains(&answer.seen_client.ip()), "{answer:?}");
        }
    }
}

/// Clients stay with their backend, whichever way they come and by which packets they are known.
#[test]
fn session_affinity_holds_for_packets() {
    let rig = rig(Plan { nodes: 2, ..Plan::default().strict() });
    let endpoints = [&rig.node(0).pods[0], &rig.node(1).pods[0]];
    let sticky = FAR.service().endpoints(endpoints).spec("sessionAffinity", json!("ClientIP"));
    rig.apply(&[&NEAR.service().endpoints(endpoints), &sticky]);
    for place in [&rig.node(0).pods[1].place.unhooked(), &rig.cluster.client.place] {
        for family in Family::ALL {
            let servers = |offer: &Offer| -> BTreeSet<String> {
                let to = offer.at(Frontend::NodePort, rig.node(0), family);
                place.run(|| {
                    (0..20).map(|_| Tcp::dial(0, to)?.ask()).map(|seen| seen.expect("it is served").server).collect()
                })
            };
            assert_eq!(servers(&NEAR).len(), 2, "one in half a million runs sees one only");
            assert_eq!(servers(&FAR).len(), 1);
        }
    }
}
