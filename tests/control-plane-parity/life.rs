//! What becomes of clients when objects come, change and go: no connection is kept, each stage is asked anew.

use serde_json::{Value, json};
use shunt_tests::manifests::Endpoint;
use shunt_tests::topology::Cluster;

use crate::difference::{Findings, assert_listed};
use crate::offer::{Destination, Offer, place};
use crate::pair::Pair;
use crate::survey::survey;

const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// The services of this module at a stage of their lives.
struct Stage<'a> {
    cluster: &'a Cluster,
    objects: Vec<Value>,
}

impl<'a> Stage<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        Self { cluster, objects: vec![] }
    }

    fn near(&self) -> Endpoint {
        (&self.cluster.nodes[0].pods[0]).into()
    }

    fn far(&self) -> Endpoint {
        (&self.cluster.nodes[1].pods[0]).into()
    }

    fn put(&mut self, offer: &Offer) {
        self.objects.extend(offer.service.objects());
    }

    fn put_changed(&mut self, offer: &Offer, change: impl FnOnce(&mut [Value])) {
        let mut objects = offer.service.objects();
        change(&mut objects);
        self.objects.extend(objects);
    }
}

fn label(object: &mut Value, key: &str) {
    object["metadata"]["labels"][key] = json!("other");
}

/// All that is looked at at every stage: two servers may answer each.
fn offers(cluster: &Cluster) -> Vec<Offer> {
    const NAMES: [&str; 12] = [
        "goes",
        "comes-back",
        "grows",
        "shrinks",
        "labelled",
        "unlabelled",
        "headless",
        "ends",
        "moves-port",
        "turns-local",
        "is-narrowed",
        "turns-plain",
    ];
    let stage = Stage::new(cluster);
    let both = [stage.near(), stage.far()];
    (1..).zip(NAMES).map(|(number, name)| Offer::new(number, name).to(both.clone())).collect()
}

/// Where some of them have been, or will be.
fn places() -> Vec<Destination> {
    let moved = Offer::new(9, "");
    [
        place("new-port@moves-port", moved.cluster_ip(), 81),
        place("new-port@moves-port-load-balancer", moved.load_balancer(), 81),
        place("new-address@comes-back", Offer::new(60, "").cluster_ip(), 80),
    ]
    .concat()
}

/// As at the beginning: all with both endpoints, one with the label that keeps it from us.
fn begin(pair: &Pair, offers: &[Offer]) {
    let mut stage = Stage::new(pair.cluster());
    for offer in offers {
        match offer.name {
            "unlabelled" => stage.put_changed(offer, |objects| label(&mut objects[0], PROXY_NAME)),
            "grows" => stage.put(&offer.clone().to([stage.far()])),
            _ => stage.put(offer),
        }
    }
    pair.serve(&stage.objects);
}

/// Each changes in its way.
fn change(pair: &Pair, offers: &[Offer]) {
    let mut stage = Stage::new(pair.cluster());
    let (near, far) = (stage.near(), stage.far());
    for offer in offers.iter().cloned() {
        match offer.name {
            "goes" | "comes-back" => pair.delete(offer.name),
            "shrinks" => stage.put(&offer.to([])),
            "labelled" => stage.put_changed(&offer, |objects| label(&mut objects[0], PROXY_NAME)),
            "headless" => {
                stage.put_changed(&offer, |objects| objects[1..].iter_mut().for_each(|slice| label(slice, HEADLESS)))
            }
            "ends" => stage.put(&offer.to([near.clone().terminating(true), far.clone().terminating(false)])),
            "moves-port" => stage.put_changed(&offer, |objects| {
                for port in objects[0]["spec"]["ports"].as_array_mut().expect("a list") {
                    port["port"] = json!(81);
                }
            }),
            "turns-local" => {
                stage.put(
                    &offer
                        .spec("externalTrafficPolicy", json!("Local"))
                        .spec("internalTrafficPolicy", json!("Local"))
                        .to([far.clone()]),
                );
            }
            "is-narrowed" => {
                stage.put(&offer.spec("loadBalancerSourceRanges", json!(["198.18.0.0/15", "2001:db8:ffff::/48"])))
            }
            "turns-plain" => stage.put_changed(&offer, |objects| {
                objects[0]["spec"]["type"] = json!("ClusterIP");
                objects[0]["spec"]["externalIPs"] = json!([]);
                objects[0]["status"]["loadBalancer"]["ingress"] = json!(null);
                for port in objects[0]["spec"]["ports"].as_array_mut().expect("a list") {
                    port.as_object_mut().expect("an object").remove("nodePort");
                }
            }),
            _ => stage.put(&offer),
        }
    }
    pair.serve(&stage.objects);
}

/// Each is as at the beginning again, but what is gone has other addresses or endpoints.
fn change_back(pair: &Pair, offers: &[Offer]) {
    let mut stage = Stage::new(pair.cluster());
    let near = stage.near();
    for offer in offers.iter().cloned() {
        match offer.name {
            "goes" => stage.put(&offer.to([near.clone()])),
            "comes-back" => {
                let cluster_ip = Offer::new(60, "").cluster_ip();
                stage.put(&offer.with(|service| service.cluster_ips(cluster_ip)));
            }
            "ends" => stage.put(&offer.to([near.clone()])),
            _ => stage.put(&offer),
        }
    }
    pair.serve(&stage.objects);
}

/// Findings under the name of their stage.
fn at(stage: &str, mut findings: Findings) -> Findings {
    for ([_, service, ..], _) in &mut findings {
        *service = format!("{stage}/{service}");
    }
    findings
}

/// Nodes forget the connections of earlier stages: kube-proxy leaves to their end those of TCP that nobody answered, and a
/// client that happens to have the port of one again is not answered either.
fn forget_connections(pair: &Pair) {
    for node in pair.worlds.iter().flat_map(|world| &world.cluster.nodes) {
        node.place.ns().output(["conntrack", "-F"]);
    }
}

#[test]
fn objects_come_change_and_go_as_with_kube_proxy() {
    let pair = Pair::new();
    let offers = offers(pair.cluster());
    let mut findings = Findings::new();
    for (stage, act) in [("begun", begin as fn(&Pair, &[Offer])), ("changed", change), ("back", change_back)] {
        act(&pair, &offers);
        forget_connections(&pair);
        findings.extend(at(stage, survey(&pair, &offers, &places())));
    }
    assert_listed("life.md", include_str!("life.md"), &findings);
}
