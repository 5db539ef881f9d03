//! A rolling update under constant load. Loads never try again.

use std::net::SocketAddr;

use shunt_tests::control_plane::Kind;
use shunt_tests::place::Place;
use shunt_tests::probe::{LongLived, TcpLoop};
use shunt_tests::traffic::Load;
use shunt_tests::wait::until;

use crate::rig::{Rig, deployment, service};

/// Begun a second, by each of the loads.
const RATE: u32 = 100;

fn dial(place: &Place, to: &[SocketAddr]) -> Load {
    place.tcp_loop(TcpLoop { to: to.to_vec(), rate: RATE, workers: 4, count: None })
}

#[test]
fn rolling_update_and_scaling_fail_no_request() {
    let rig = Rig::new();
    let api = rig.api();
    let web = api.create(&service("web")).expect("the service is accepted");
    let steady = api.create(&service("steady")).expect("the service is accepted");
    api.create(&deployment("web", 3, "1")).expect("the deployment is accepted");
    api.create(&deployment("steady", 2, "1")).expect("the deployment is accepted");
    let before = rig.wait_backends("web", 3);
    rig.wait_backends("steady", 2);

    let clients = rig.clients();
    let (inside, outside) = (rig.cluster_addresses(&web), rig.node_addresses(&web));
    let mut loads =
        vec![dial(&clients.by_socket, &inside), dial(&clients.by_packets, &inside), dial(&clients.outside, &outside)];
    // To pods that stay, while everything round them changes.
    let kept = rig.cluster_addresses(&steady).into_iter().zip([&clients.by_socket, &clients.by_packets]);
    let kept = kept.chain([(rig.node_addresses(&steady)[0], &clients.outside)]);
    loads.extend(kept.map(|(to, place)| place.long_lived(LongLived { to, connections: 5, interval_ms: 10 })));
    loads.iter_mut().for_each(|load| drop(load.wait_answers(50)));

    api.apply(&deployment("web", 3, "2")).expect("the deployment can be changed");
    until("new pods only", || {
        let now = rig.pods.addresses("web");
        now.len() == before.len() && now.is_disjoint(&before)
    });
    rig.wait_backends("web", 3);
    let deployments = api.namespaced(Kind::DEPLOYMENT, "default");
    for replicas in [5, 2] {
        deployments.scale("web", replicas).expect("it can be scaled");
        rig.wait_backends("web", replicas as usize);
    }
    loads.iter_mut().for_each(|load| drop(load.wait_answers(50)));
    for load in loads {
        load.finish_clean();
    }
}
