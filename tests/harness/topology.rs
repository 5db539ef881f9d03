//! Topologies: everyone reaches everyone, in both families, by the addresses they should see.

use std::time::Instant;

use shunt_tests::place::Place;
use shunt_tests::probe::{Bulk, Direction};
use shunt_tests::topology::{Addrs, Cluster, Family, Offloads, Overlay, Plan, PodLink};
use shunt_tests::traffic::Ports;

const PORTS: Ports<'_> = Ports { tcp: &[8080], udp: &[8080] };

/// Every pod, node and outside machine talks to all it should reach. Without masquerade, only a routed underlay knows the way
/// back to a pod.
fn everyone_reaches_everyone(plan: Plan) {
    let begin = Instant::now();
    let cluster = Cluster::build(plan);
    println!("{plan:?}: built in {:?}", begin.elapsed());
    let machines: Vec<(&Place, Addrs)> = cluster.nodes.iter().map(|node| (&node.place, node.addrs)).collect();
    let pods: Vec<(&Place, Addrs)> = cluster.pods().map(|pod| (&pod.place, pod.addrs)).collect();
    let outside: Vec<(&Place, Addrs)> =
        std::iter::once(&cluster.client).chain(&cluster.far).map(|host| (&host.place, host.addrs)).collect();
    let servers: Vec<_> = machines.iter().chain(&pods).chain(&outside).map(|(place, _)| place.serve(PORTS)).collect();
    for (from, from_addrs) in pods.iter().chain(&machines) {
        for (to, to_addrs) in pods.iter().chain(&machines).chain(&outside) {
            talk(from, *from_addrs, to, *to_addrs, &plan);
        }
    }
    for (from, from_addrs) in &outside {
        for (to, to_addrs) in &machines {
            talk(from, *from_addrs, to, *to_addrs, &plan);
        }
    }
    drop(servers);
}

fn talk(from: &Place, from_addrs: Addrs, to: &Place, to_addrs: Addrs, plan: &Plan) {
    for family in Family::ALL {
        let target = to_addrs.port(family, 8080);
        for (proto, outcome) in [("tcp", from.tcp(target)), ("udp", from.udp(target))] {
            let what = format!("{} to {} {proto} {family:?}", from.name(), to.name());
            let answer = outcome.unwrap_or_else(|failure| panic!("{what}: {failure}"));
            assert_eq!(
                (answer.server.as_str(), answer.peer, answer.seen_server),
                (to.name(), target, target),
                "{what}"
            );
            let is_pod_to_pod = from.name().starts_with("pod") && to.name().starts_with("pod");
            if is_pod_to_pod || !plan.masquerades {
                assert_eq!(answer.seen_client.port(), answer.local.port(), "{what}");
            }
            if is_pod_to_pod {
                assert_eq!(answer.seen_client.ip(), from_addrs.get(family), "{what}");
            }
        }
    }
}

#[test]
fn routed_pods_of_two_nodes() {
    everyone_reaches_everyone(Plan { nodes: 2, far_mtu: Some(1300), ..Plan::default().strict() });
}

#[test]
fn bridged_pods_with_netfilter() {
    everyone_reaches_everyone(Plan::bridge().strict());
}

#[test]
fn bridged_pods_without_netfilter() {
    let pod_link = PodLink::Bridge { calls_netfilter: false, is_hairpin: false };
    everyone_reaches_everyone(Plan { pod_link, ..Plan::default().strict() });
}

#[test]
fn flannel_on_three_nodes() {
    everyone_reaches_everyone(Plan { pods: 1, ..Plan::flannel(3) });
}

#[test]
fn vxlan_carries_large_transfers_with_offloads_and_without() {
    for offloads in [Offloads::On, Offloads::Off] {
        let cluster = Cluster::build(Plan { nodes: 2, pods: 1, overlay: Overlay::Vxlan, offloads, ..Plan::default() });
        let [from, to] = [&cluster.nodes[0].pods[0], &cluster.nodes[1].pods[0]];
        let _server = to.place.serve(PORTS);
        for family in Family::ALL {
            for direction in [Direction::Up, Direction::Down] {
                let bulk = Bulk { to: to.addrs.port(family, 8080), bytes: 3_000_000, direction };
                let transfer =
                    from.place.bulk(bulk).unwrap_or_else(|failure| panic!("{family:?} {direction:?}: {failure}"));
                assert_eq!(transfer.bytes, 3_000_000);
            }
        }
    }
}

#[test]
fn offloads_and_path_mtu_are_as_planned() {
    let cluster = Cluster::build(Plan { offloads: Offloads::Off, far_mtu: Some(1280), ..Plan::default() });
    let node = cluster.nodes[0].place.ns();
    for device in ["eth0", "veth-1-1"] {
        let features = node.output(["ethtool", "-k", device]);
        for feature in ["tx-checksumming: off", "tcp-segmentation-offload: off", "generic-receive-offload: off"] {
            assert!(features.contains(feature), "{device}: {features}");
        }
    }
    let far = cluster.far.as_ref().expect("the plan has it");
    let _server = far.place.serve(PORTS);
    for family in Family::ALL {
        let bulk = Bulk { to: far.addrs.port(family, 8080), bytes: 500_000, direction: Direction::Up };
        cluster.nodes[0].place.bulk(bulk).unwrap_or_else(|failure| panic!("{family:?}: {failure}"));
    }
    // Learnt from ICMP errors: the narrow link lies beyond the next hop.
    for family in Family::ALL {
        let route = node.output(["ip", "route", "get", &far.addrs.get(family).to_string()]);
        assert!(route.contains("mtu 1280"), "{route}");
    }
}

#[test]
fn strict_nodes_do_not_forward_for_strangers() {
    let cluster = Cluster::build(Plan { nodes: 2, pods: 1, far_mtu: Some(1500), ..Plan::default().strict() });
    let (client, node) = (&cluster.client, &cluster.nodes[0]);
    let target = cluster.nodes[1].addrs;
    client.place.ns().ip([format!("route add {} via {}", target.v4, node.addrs.v4)]);
    let _server = cluster.nodes[1].place.serve(PORTS);
    let counted = client.place.run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
        socket.send_to(b"x", target.port(Family::V4, 8080)).expect("it is sent");
        socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).expect("a limit");
        socket.recv(&mut [0; 100]).is_ok()
    });
    assert!(!counted, "the node forwarded what its policy drops");
}
