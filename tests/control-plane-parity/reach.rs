//! Every kind of service, frontend and policy, from every kind of client.

use serde_json::{Value, json};
use shunt_tests::manifests::Endpoint;
use shunt_tests::topology::{Cluster, SERVICES, VIPS};

use crate::difference::assert_listed;
use crate::offer::{Destination, Offer, place};
use crate::pair::{OTHER_TARGET, PORT, Pair, TARGET, ZONES};
use crate::survey::survey;

/// Endpoints by where they are, seen from the first node, whose last pod is a client.
struct Sites {
    near: Endpoint,
    far: Endpoint,
    /// The client itself.
    client: Endpoint,
    /// The nodes' own network.
    hosts: [Endpoint; 2],
    client_address: String,
    node_address: String,
}

impl Sites {
    fn of(cluster: &Cluster) -> Self {
        let [one, two] = [&cluster.nodes[0], &cluster.nodes[1]];
        Self {
            near: (&one.pods[0]).into(),
            far: (&two.pods[0]).into(),
            client: one.pods.last().expect("nodes have pods").into(),
            hosts: [one.into(), two.into()],
            client_address: cluster.client.addrs.v4.to_string(),
            node_address: one.addrs.v4.to_string(),
        }
    }

    fn both(&self) -> [Endpoint; 2] {
        [self.near.clone(), self.far.clone()]
    }

    /// `near` is about to end, `far` is what it is given.
    fn ending(&self, far: Endpoint) -> [Endpoint; 2] {
        [self.near.clone().terminating(true), far]
    }
}

fn hinted(endpoint: Endpoint, zone: &str) -> Endpoint {
    Endpoint { zone: Some(zone.to_owned()), for_zones: vec![zone.to_owned()], ..endpoint }
}

/// Policy Local for clients outside.
fn outer(offer: Offer) -> Offer {
    offer.spec("externalTrafficPolicy", json!("Local"))
}

/// Policy Local for clients inside.
fn inner(offer: Offer) -> Offer {
    offer.spec("internalTrafficPolicy", json!("Local"))
}

fn ranges(offer: Offer, ranges: &[&str]) -> Offer {
    offer.spec("loadBalancerSourceRanges", json!(ranges))
}

/// The services whose objects are as the harness makes them.
fn plain(sites: &Sites) -> Vec<Offer> {
    let Sites { near, far, client, hosts, client_address, node_address } = sites;
    let unready = |endpoint: &Endpoint| Endpoint { is_ready: false, is_serving: false, ..endpoint.clone() };
    let client_range = format!("{client_address}/32");
    let node_range = format!("{node_address}/32");
    let mut sticky = Offer::new(30, "sticky").spec("sessionAffinity", json!("ClientIP")).to(sites.both());
    sticky.is_sticky = true;
    vec![
        Offer::new(1, "both").to(sites.both()),
        Offer::new(2, "empty").to([]),
        Offer::new(3, "unready").to([unready(near), unready(far)]),
        Offer::new(4, "ending").to(sites.ending(far.clone().terminating(true))),
        Offer::new(5, "ended").to([near.clone().terminating(false)]),
        Offer::new(6, "one-ends").to(sites.ending(far.clone())),
        Offer::new(7, "hairpin").to([client.clone()]),
        Offer::new(8, "hosts").to(hosts.clone()),
        Offer::new(9, "published-unready").to([Endpoint { is_serving: false, ..near.clone() }]),
        outer(Offer::new(10, "outer-both")).to(sites.both()),
        outer(Offer::new(11, "outer-far")).to([far.clone()]),
        outer(Offer::new(12, "outer-empty")).to([]),
        outer(Offer::new(13, "outer-one-ends")).to(sites.ending(far.clone())),
        outer(Offer::new(14, "outer-hairpin")).to([client.clone()]),
        outer(Offer::new(15, "outer-hosts")).to(hosts.clone()),
        outer(Offer::new(16, "outer-nameless")).to([Endpoint { node: None, ..near.clone() }]),
        inner(Offer::new(17, "inner-both")).to(sites.both()),
        inner(Offer::new(18, "inner-far")).to([far.clone()]),
        inner(Offer::new(19, "inner-empty")).to([]),
        inner(Offer::new(20, "inner-one-ends")).to(sites.ending(far.clone())),
        inner(outer(Offer::new(21, "local-both"))).to(sites.both()),
        inner(outer(Offer::new(22, "local-far"))).to([far.clone()]),
        Offer::new(23, "zones").to([hinted(near.clone(), ZONES[0]), hinted(far.clone(), ZONES[1])]),
        Offer::new(24, "zone-of-others").to([hinted(near.clone(), ZONES[1]), hinted(far.clone(), ZONES[1])]),
        Offer::new(25, "half-hinted").to([hinted(near.clone(), ZONES[0]), far.clone()]),
        Offer::new(26, "crossed-zones").to([hinted(near.clone(), ZONES[1]), hinted(far.clone(), ZONES[0])]),
        sticky,
        ranges(Offer::new(31, "open-to-outside"), &[&client_range]).to(sites.both()),
        ranges(Offer::new(32, "open-to-pods"), &["10.244.0.0/16", "fd00:10:244::/48"]).to(sites.both()),
        ranges(Offer::new(33, "open-to-node"), &[&node_range]).to(sites.both()),
        ranges(Offer::new(34, "open-to-nobody"), &["198.18.0.0/15", "2001:db8:ffff::/48"]).to(sites.both()),
        ranges(Offer::new(35, "open-to-nobody-empty"), &["198.18.0.0/15", "2001:db8:ffff::/48"]).to([]),
        ranges(Offer::new(36, "open-to-all"), &["0.0.0.0/0", "2001:db8:ffff::/48"]).to(sites.both()),
        outer(ranges(Offer::new(37, "outer-open-to-outside"), &[&client_range])).to(sites.both()),
    ]
}

/// The services whose objects are changed in a way that the harness has no word for.
fn special(sites: &Sites) -> Vec<(Offer, Vec<Value>)> {
    let with = |offer: Offer, change: &dyn Fn(&mut [Value])| {
        let mut objects = offer.service.objects();
        change(&mut objects);
        (offer, objects)
    };
    let both = |number, name| Offer::new(number, name).to(sites.both());
    let for_node = |objects: &mut [Value], nodes: [&str; 2]| {
        for slice in &mut objects[1..] {
            for (endpoint, node) in slice["endpoints"].as_array_mut().expect("a list").iter_mut().zip(nodes) {
                endpoint["hints"] = json!({ "forNodes": [{ "name": node }], "forZones": [{ "name": ZONES[0] }] });
            }
        }
    };
    let own_node = Offer::new(59, "node-as-external-ip").to(sites.both());
    vec![
        with(both(50, "behind-a-proxy"), &|objects| {
            for ingress in objects[0]["status"]["loadBalancer"]["ingress"].as_array_mut().expect("a list") {
                ingress["ipMode"] = json!("Proxy");
            }
        }),
        with(both(51, "of-another-proxy"), &|objects| {
            objects[0]["metadata"]["labels"] = json!({ "service.kubernetes.io/service-proxy-name": "other" });
        }),
        with(both(52, "headless-slices"), &|objects| {
            for slice in &mut objects[1..] {
                slice["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
            }
        }),
        with(both(53, "node-hints"), &|objects| for_node(objects, ["node-1", "node-2"])),
        with(both(54, "crossed-node-hints"), &|objects| for_node(objects, ["node-2", "node-1"])),
        with(both(55, "one-family"), &|objects| {
            let spec = objects[0]["spec"].as_object_mut().expect("an object");
            for (field, value) in [("ipFamilies", json!(["IPv4"])), ("ipFamilyPolicy", json!("SingleStack"))] {
                spec.insert(field.to_owned(), value);
            }
            spec["clusterIPs"].as_array_mut().expect("a list").truncate(1);
            spec["externalIPs"].as_array_mut().expect("a list").truncate(1);
        }),
        with(both(56, "one-protocol"), &|objects| {
            objects[0]["spec"]["ports"].as_array_mut().expect("a list").truncate(1);
        }),
        with(both(57, "no-slices-port"), &|objects| {
            for slice in &mut objects[1..] {
                slice["ports"][0]["name"] = json!("other");
            }
        }),
        with(both(58, "two-targets"), &|objects| {
            // The second port of the slice's endpoints is another: only a slice of its own can say so.
            for slice in &mut objects[1..] {
                slice["ports"][1]["port"] = json!(OTHER_TARGET);
            }
        }),
        with(own_node, &|objects| {
            objects[0]["spec"]["externalIPs"] = json!(["192.0.2.10", "2001:db8:1::a"]);
            objects[0]["spec"]["ports"].as_array_mut().expect("a list").truncate(1);
        }),
    ]
}

/// What no service has, and what has a service under another word.
fn places(cluster: &Cluster) -> Vec<Destination> {
    let node = &cluster.nodes[0];
    [
        place("unallocated-cluster-ip", SERVICES.host(9999), PORT),
        place("unknown-port@cluster-ip", Offer::new(1, "").cluster_ip(), 9),
        place("unknown-port@external-ip", VIPS.host(1), 9),
        place("unknown-port@load-balancer", VIPS.host(101), 9),
        place("unknown-port@unready-cluster-ip", Offer::new(3, "").cluster_ip(), 9),
        place("unknown-node-port", node.addrs, 30_999),
        place("node-port@gateway", node.gateway(), 30_001),
        place("node-port@cluster-ip", Offer::new(1, "").cluster_ip(), 30_001),
        place("node-port@load-balancer", VIPS.host(101), 30_001),
        place("pod-itself", cluster.nodes[1].pods[0].addrs, TARGET),
        place("node-itself", node.addrs, TARGET),
        place("node-with-the-service's-port", node.addrs, PORT),
    ]
    .concat()
}

#[test]
fn services_are_reached_as_through_kube_proxy() {
    let pair = Pair::new();
    let sites = Sites::of(pair.cluster());
    let mut offers = plain(&sites);
    let mut objects: Vec<Value> = offers.iter().flat_map(|offer| offer.service.objects()).collect();
    for (offer, its_objects) in special(&sites) {
        offers.push(offer);
        objects.extend(its_objects);
    }
    pair.serve(&objects);
    let findings = survey(&pair, &offers, &places(pair.cluster()));
    assert_listed("reach.md", include_str!("reach.md"), &findings);
}
