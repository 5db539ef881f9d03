//! Who may do what, and what becomes of clients whose server goes away.

use std::net::Ipv6Addr;

use shunt_tests::bed::Bed;
use shunt_tests::control_plane::{ControlPlane, Error, Identity, Kind, KubeProxyMode, Options, Part};
use shunt_tests::netns::Netns;
use shunt_tests::place::Place;
use shunt_tests::process::Process;
use shunt_tests::wait::{until, until_some};

use crate::rig::{Rig, deployment, endpoints, service};

#[test]
fn kube_proxy_has_its_stock_role_and_no_more() {
    let rig = Rig::new();
    let proxy = rig.plane.api_as(Identity::KubeProxy);
    for kind in [Kind::SERVICE, Kind::ENDPOINT_SLICE, Kind::NODE, Kind::SERVICE_CIDR] {
        let list = proxy.all(kind).list().unwrap_or_else(|error| panic!("{}: {error}", kind.name()));
        proxy.all(kind).watch(&list.resource_version).unwrap_or_else(|error| panic!("{}: {error}", kind.name()));
    }
    for kind in [Kind::SECRET, Kind::POD, Kind::DEPLOYMENT, Kind::NAMESPACE] {
        let error = proxy.all(kind).list().expect_err("the role does not name it");
        assert!(error.is_code(403), "{}: {error}", kind.name());
        let error = proxy.all(kind).watch("").expect_err("the role does not name it");
        assert!(error.is_code(403), "{}: {error}", kind.name());
    }
    let error = proxy.create(&service()).expect_err("the role is to read");
    assert!(error.is_code(403), "{error}");
}

#[test]
fn real_kube_proxy_programs_the_ready_endpoints() {
    let rig = Rig::new();
    rig.api().create(&service()).expect("the service is accepted");
    rig.api().create(&deployment(1, "1")).expect("the deployment is accepted");
    let address = until_some("a ready endpoint", || {
        let found = endpoints(rig.api());
        found.iter().find(|endpoint| endpoint.ready && endpoint.address.is_ipv4()).map(|endpoint| endpoint.address)
    });
    // The port stands behind the address in both; in nftables with a dot between.
    let cases: [(KubeProxyMode, &[&str], String); 2] = [
        (KubeProxyMode::Nftables, &["nft", "list", "ruleset"], format!("{address} . 8080")),
        (KubeProxyMode::Iptables, &["iptables-save"], format!("--to-destination {address}:8080")),
    ];
    let place = Place::new("node", rig.plane.ns().clone(), None);
    for (mode, list_rules, wanted) in cases {
        let kube_proxy = Process::start("kube-proxy", rig.plane.kube_proxy(&place, "node-a", mode));
        let rules = || {
            let mut list = place.command(list_rules[0]);
            list.args(&list_rules[1..]);
            place.ns().feed(list, "")
        };
        until(&format!("{wanted} in the rules of kube-proxy {}", kube_proxy.id()), || rules().contains(&wanted));
    }
}

#[test]
fn nodes_carry_addresses_zone_and_pod_cidr() {
    let rig = Rig::new();
    let nodes = rig.api().all(Kind::NODE);
    until("a ready node", || nodes.get("node-c").is_ok_and(|node| node["status"]["conditions"][0]["status"] == "True"));
    let node = nodes.get("node-c").expect("it is there");
    assert_eq!(node["metadata"]["labels"]["topology.kubernetes.io/zone"], "west");
    assert_eq!(node["spec"]["podCIDRs"][0], "10.244.3.0/24");
    assert_eq!(node["status"]["addresses"][0]["address"], "192.0.2.3");
    assert_eq!(node["status"]["addresses"][1]["address"], "2001:db8::3");
}

#[test]
fn server_on_an_ipv6_node_address_backs_the_kubernetes_service() {
    let bed = Bed::new();
    let ns = Netns::new(&bed, "control");
    ns.ip(["address add 2001:db8::53/128 dev lo"]);
    let options = Options {
        address: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x53).into(),
        service_cidrs: "fd00:10:96::/112,10.96.0.0/16".to_owned(),
        node_ports: (31000, 31009),
    };
    let plane = ControlPlane::start_with(&bed, &ns, options);
    let slices = plane.api().namespaced(Kind::ENDPOINT_SLICE, "default");
    let slice = until_some("the slice of the service kubernetes", || slices.get("kubernetes").ok());
    assert_eq!(slice["endpoints"][0]["addresses"][0], "2001:db8::53");
    assert_eq!(slice["ports"][0]["port"], 6443);

    let mut exposed = service();
    exposed["spec"]["type"] = "NodePort".into();
    let stored = plane.api().create(&exposed).expect("the service is accepted");
    let cluster_ips = stored["spec"]["clusterIPs"].as_array().expect("they were given");
    assert!(cluster_ips[0].as_str().is_some_and(|ip| ip.starts_with("fd00:10:96::")), "{cluster_ips:?}");
    assert!(cluster_ips[1].as_str().is_some_and(|ip| ip.starts_with("10.96.")), "{cluster_ips:?}");
    assert!(stored["spec"]["ports"][0]["nodePort"].as_u64().is_some_and(|port| (31000..=31009).contains(&port)));
}

#[test]
fn server_returns_with_its_data_and_after_a_wipe_without() {
    let rig = Rig::new();
    let api = rig.api();
    let stored = api.create(&service()).expect("the service is accepted");
    api.create(&deployment(2, "1")).expect("the deployment is accepted");
    let is_served = || endpoints(api).iter().filter(|endpoint| endpoint.ready).count() == 4;
    until("two ready pods", is_served);

    let services = api.namespaced(Kind::SERVICE, "default");
    rig.plane.halt(Part::ApiServer);
    let error = services.get("web").expect_err("nobody listens");
    assert!(matches!(error, Error::Unreachable(_)), "{error}");
    rig.plane.resume(Part::ApiServer);
    let same = services.get("web").expect("it is stored");
    assert_eq!(same["metadata"]["uid"], stored["metadata"]["uid"]);
    assert_eq!(rig.pods.count(), 2, "pods outlive their API server");
    // The kubelet goes on where it was.
    api.namespaced(Kind::DEPLOYMENT, "default").scale("web", 1).expect("it can be scaled");
    until("one pod", || rig.pods.count() == 1);

    rig.plane.wipe();
    let error = services.get("web").expect_err("everything is forgotten");
    assert!(error.is_code(404), "{error}");
    until("the end of pods that nobody knows", || rig.pods.count() == 0);
    until("nodes that register again", || api.all(Kind::NODE).list().is_ok_and(|list| list.items.len() == 3));
    api.create(&service()).expect("the service is accepted");
    api.create(&deployment(2, "2")).expect("the deployment is accepted");
    until("two ready pods in another world", is_served);
}
