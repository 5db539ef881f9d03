//! Every kind of client reaches every kind of frontend of backends at every place, in both families, by TCP and UDP: by
//! the path it should, with the source it should, and without a packet that the node's firewall calls invalid.

use std::net::IpAddr;

use shunt_tests::place::Place;
use shunt_tests::topology::{Addrs, Family, Offloads, Overlay, Plan, PodLink};

use crate::rig::{self, Counters, Frontend, Offer, Proto, Rig, TARGET};

/// Who dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A pod on the first node.
    Pod,
    /// A pod on the first node that runs outside the hooked control group: a virtual machine, say.
    UnhookedPod,
    /// A process of the first node.
    Host,
    /// A pod with the first node's network.
    HostPod,
    /// A machine outside of the cluster.
    Outside,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Pod, Self::UnhookedPod, Self::Host, Self::HostPod, Self::Outside];

    const fn uses_socket_hook(self) -> bool {
        matches!(self, Self::Pod | Self::Host | Self::HostPod)
    }

    const fn is_pod(self) -> bool {
        matches!(self, Self::Pod | Self::UnhookedPod)
    }
}

struct Client {
    kind: Kind,
    place: Place,
    addrs: Option<Addrs>,
}

impl Client {
    fn of(kind: Kind, rig: &Rig) -> Self {
        let (node, host) = (rig.node(0), &rig.cluster.client);
        // Not the pod that is a backend: that is another test.
        let pod = &node.pods[1];
        let (place, addrs) = match kind {
            Kind::Pod => (pod.place.clone(), Some(pod.addrs)),
            Kind::UnhookedPod => (pod.place.unhooked(), Some(pod.addrs)),
            Kind::Host => (node.place.clone(), None),
            Kind::HostPod => {
                let cgroup = node.place.cgroup().expect("a node has a control group").child("host-pod");
                (Place::new("host-pod", node.place.ns().clone(), Some(cgroup)), None)
            }
            Kind::Outside => (host.place.clone(), Some(host.addrs)),
        };
        Self { kind, place, addrs }
    }
}

/// Where a backend is, and the service in front of it.
struct Backend {
    offer: Offer,
    server: String,
    addrs: Addrs,
    is_near: bool,
    is_host: bool,
}

/// A pod and the host's network on the first node, and the same on the second if there is one.
fn backends(rig: &Rig) -> Vec<Backend> {
    let mut backends = Vec::new();
    for (index, node) in rig.cluster.nodes.iter().take(2).enumerate() {
        let pod = &node.pods[0];
        let is_near = index == 0;
        let names = if is_near { ["near", "near-host"] } else { ["far", "far-host"] };
        let number = 1 + 2 * index as u16;
        let of =
            |offer, server: &str, addrs, is_host| Backend { offer, server: server.to_owned(), addrs, is_near, is_host };
        backends.push(of(Offer::new(number, names[0]), pod.place.name(), pod.addrs, false));
        backends.push(of(Offer::new(number + 1, names[1]), node.name(), node.addrs, true));
        rig.manifests.apply(&backends[backends.len() - 2].offer.to(pod));
        rig.manifests.apply(&backends[backends.len() - 1].offer.to(node));
    }
    rig.settle();
    backends
}

/// True if the network lets the client's packets to this very backend through, service or not.
fn is_reachable(kind: Kind, backend: &Backend, plan: &Plan) -> bool {
    if !backend.is_host || backend.is_near {
        return true;
    }
    match kind {
        // Strict nodes forward from and to pods only.
        Kind::Outside => !plan.has_forward_drop,
        // The other node answers through its overlay, which the pod's own node takes for forged unless it masqueraded.
        Kind::Pod | Kind::UnhookedPod => plan.overlay == Overlay::HostRoutes || plan.masquerades,
        Kind::Host | Kind::HostPod => true,
    }
}

/// What the backend may see as the client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The client's own.
    Kept,
    /// Another, of the node that the packet came through.
    Rewritten,
    /// Whatever the kernel chooses for a process of the node.
    Any,
}

fn source(rig: &Rig, client: &Client, backend: &Backend) -> Source {
    let masquerades = rig.cluster.plan().masquerades;
    match client.kind {
        Kind::Host | Kind::HostPod => Source::Any,
        // What goes from pods to another machine's own address, a CNI with an overlay masquerades.
        kind if kind.is_pod() => {
            if backend.is_host && !backend.is_near && masquerades {
                Source::Rewritten
            } else {
                Source::Kept
            }
        }
        _ => {
            if backend.is_near {
                Source::Kept
            } else {
                Source::Rewritten
            }
        }
    }
}

#[track_caller]
fn converse(rig: &Rig, client: &Client, frontend: Frontend, backend: &Backend, family: Family, proto: Proto) {
    let to = backend.offer.at(frontend, rig.node(0), family);
    let what = format!("{:?} to {frontend:?} {to} {proto:?}, backend {}", client.kind, backend.server);
    let answer = proto.ask(&client.place, to).unwrap_or_else(|failure| panic!("{what}: {failure}"));
    let seen = (answer.server.as_str(), answer.peer, answer.seen_server);
    assert_eq!(seen, (backend.server.as_str(), to, backend.addrs.port(family, TARGET)), "{what}");
    let own: Option<IpAddr> = client.addrs.map(|addrs| addrs.get(family));
    match source(rig, client, backend) {
        Source::Any => {}
        Source::Kept => assert_eq!(Some(answer.seen_client.ip()), own, "{what}: {answer:?}"),
        Source::Rewritten => assert_ne!(Some(answer.seen_client.ip()), own, "{what}: {answer:?}"),
    }
}

/// All conversations of one client with one kind of frontend, and the counters that they must move.
#[track_caller]
fn all_backends(rig: &Rig, client: &Client, frontend: Frontend, backends: &[&Backend]) {
    let work = || {
        for backend in backends {
            for family in Family::ALL {
                for proto in Proto::ALL {
                    converse(rig, client, frontend, backend, family, proto);
                }
            }
        }
    };
    let ((), mut counted) = rig.counted(0, work);
    // Where a packet leaves by the device it came by, the node's stack tells the sender of a shorter way; it must not.
    counted.drops.remove("redirect");
    let each = 2 * backends.len() as u64;
    let what = format!("{:?} to {frontend:?}", client.kind);
    if client.kind.uses_socket_hook() {
        assert_eq!(counted, Counters { sockets: 2 * each, ..Counters::default() }, "{what}");
    } else {
        // A datagram and its answer prove nothing yet: those flows stay pending.
        let expected = Counters { flows: each, packets: counted.packets, ..Counters::default() };
        assert_eq!(counted, expected, "{what}");
        assert!(counted.packets >= each * 8, "{what}: {counted:?}");
    }
}

/// The claim of this module, on one topology.
#[track_caller]
fn everyone_is_served(plan: Plan) {
    everyone_is_served_by(Rig::build(plan));
}

/// The same where programs run in filters.
#[track_caller]
fn everyone_is_served_by_filters(plan: Plan) {
    everyone_is_served_by(Rig::build_with(plan, rig::by_filters));
}

#[track_caller]
fn everyone_is_served_by(rig: Rig) {
    let plan = *rig.cluster.plan();
    rig.cluster.route_vips(rig.node(0));
    let backends = backends(&rig);
    for kind in Kind::ALL {
        let client = Client::of(kind, &rig);
        let reachable: Vec<_> = backends.iter().filter(|backend| is_reachable(kind, backend, &plan)).collect();
        for frontend in Frontend::ALL {
            all_backends(&rig, &client, frontend, &reachable);
        }
    }
    for number in 0..rig.cluster.nodes.len() {
        assert_eq!(rig.invalid_packets(number), 0, "of node {number}");
    }
}

#[test]
fn routed_pods_on_one_node() {
    everyone_is_served(Plan::default());
}

#[test]
fn routed_pods_on_two_strict_nodes() {
    everyone_is_served(Plan { nodes: 2, ..Plan::default().strict() });
}

#[test]
fn routed_pods_without_offloads() {
    everyone_is_served(Plan { nodes: 2, offloads: Offloads::Off, ..Plan::default() });
}

#[test]
fn bridged_pods_on_two_strict_nodes_with_netfilter() {
    everyone_is_served(Plan { nodes: 2, ..Plan::bridge().strict() });
}

#[test]
fn bridged_pods_on_a_strict_node_without_netfilter() {
    let pod_link = PodLink::Bridge { calls_netfilter: false, is_hairpin: false };
    everyone_is_served(Plan { pod_link, ..Plan::default().strict() });
}

#[test]
fn flannel_on_two_strict_nodes() {
    everyone_is_served(Plan::flannel(2));
}

#[test]
fn vxlan_without_masquerade() {
    everyone_is_served(Plan { nodes: 2, overlay: Overlay::Vxlan, ..Plan::default().strict() });
}

#[test]
fn routed_pods_on_two_strict_nodes_by_filters() {
    everyone_is_served_by_filters(Plan { nodes: 2, ..Plan::default().strict() });
}

#[test]
fn flannel_on_two_strict_nodes_by_filters() {
    everyone_is_served_by_filters(Plan::flannel(2));
}
