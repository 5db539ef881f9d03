//! A Deployment's life as its Service's EndpointSlices tell it.

use std::collections::BTreeSet;
use std::thread;

use serde_json::json;
use shunt_tests::control_plane::{Kind, Patch};
use shunt_tests::wait::{until, until_some};

use crate::rig::{Endpoint, Rig, deployment, endpoints, endpoints_of_slice, service};

/// The endpoints once there are `pods` ready ones in each family and no others.
#[track_caller]
fn wait_ready(rig: &Rig, pods: usize) -> Vec<Endpoint> {
    until_some(&format!("{pods} ready pods"), || {
        let found = endpoints(rig.api());
        (found.len() == 2 * pods && found.iter().all(|endpoint| endpoint.ready)).then_some(found)
    })
}

/// Ready, serving, terminating: what the IPv4 endpoint of a pod says, if there is one.
fn conditions(rig: &Rig, pod: &str) -> Option<(bool, bool, bool)> {
    let found = endpoints(rig.api());
    let endpoint = found.iter().find(|endpoint| endpoint.pod == pod && endpoint.address.is_ipv4())?;
    Some((endpoint.ready, endpoint.serving, endpoint.terminating))
}

#[test]
fn deployment_is_scaled_rolled_and_deleted() {
    let rig = Rig::new();
    let api = rig.api();
    api.create(&service()).expect("the service is accepted");
    api.create(&deployment(3, "1")).expect("the deployment is accepted");

    let first = wait_ready(&rig, 3);
    let distinct = |what: fn(&Endpoint) -> &str| first.iter().map(what).collect::<BTreeSet<_>>();
    assert_eq!(distinct(|endpoint| &endpoint.node), BTreeSet::from(["node-a", "node-b", "node-c"]));
    assert_eq!(distinct(|endpoint| &endpoint.zone), BTreeSet::from(["east", "west"]));
    assert_eq!(distinct(|endpoint| &endpoint.pod).len(), 3);

    let deployments = api.namespaced(Kind::DEPLOYMENT, "default");
    deployments.scale("web", 5).expect("it can be scaled");
    wait_ready(&rig, 5);
    deployments.scale("web", 2).expect("it can be scaled");
    let before = wait_ready(&rig, 2);
    until("the removal of scaled-down pods", || rig.pods.count() == 2);

    // A rolling update under maxUnavailable 0: in no version of any slice are there fewer than two ready endpoints.
    let slices = api.namespaced(Kind::ENDPOINT_SLICE, "default");
    let list = slices.list().expect("slices can be listed");
    let watch = slices.watch(&list.resource_version).expect("slices can be watched");
    let stopper = watch.stopper();
    let watcher = thread::spawn(move || {
        let events = watch.filter_map(Result::ok);
        events
            .map(|event| endpoints_of_slice(event.object()).iter().filter(|endpoint| endpoint.ready).count())
            .collect::<Vec<_>>()
    });
    api.apply(&deployment(2, "2")).expect("the deployment can be changed");
    until("new pods only", || {
        let old: Vec<_> = before.iter().map(|endpoint| &endpoint.pod).collect();
        let now = endpoints(api);
        now.len() == 4 && now.iter().all(|endpoint| endpoint.ready && !old.contains(&&endpoint.pod))
    });
    stopper.stop();
    let ready_counts = watcher.join().expect("the watcher does not panic");
    assert!(ready_counts.len() >= 4, "two pods were replaced in two slices: {ready_counts:?}");
    assert!(
        ready_counts.iter().all(|count| *count >= 2),
        "ready endpoints of a slice after each change: {ready_counts:?}"
    );

    deployments.delete("web").expect("it can be deleted");
    until("the removal of all pods", || rig.pods.count() == 0 && endpoints(api).is_empty());
    let pods = api.namespaced(Kind::POD, "default");
    until("no pod in the API", || pods.list().is_ok_and(|list| list.items.is_empty()));
}

#[test]
fn deleted_pod_serves_until_its_processes_end() {
    let rig = Rig::new();
    let api = rig.api();
    rig.pods.be_stubborn();
    api.create(&service()).expect("the service is accepted");
    api.create(&deployment(2, "1")).expect("the deployment is accepted");
    wait_ready(&rig, 2);
    api.namespaced(Kind::DEPLOYMENT, "default").scale("web", 1).expect("it can be scaled");

    until("SIGTERM", || rig.pods.count_terminating() == 1);
    let (leaving, staying) = until_some("a terminating endpoint", || {
        // One slice is written after the other: only one of them tells of one moment.
        let found: Vec<_> = endpoints(api).into_iter().filter(|endpoint| endpoint.address.is_ipv4()).collect();
        let name = |terminating| {
            found.iter().find(|endpoint| endpoint.terminating == terminating).map(|endpoint| endpoint.pod.clone())
        };
        Some((name(true)?, name(false)?))
    });
    // While news of the other pod pass twice through kubelet and controller, nothing changes for this one.
    rig.kubelet.fail(&format!("default/{staying}"));
    until("an unready endpoint", || conditions(&rig, &staying) == Some((false, false, false)));
    rig.kubelet.recover(&format!("default/{staying}"));
    until("a ready endpoint", || conditions(&rig, &staying) == Some((true, true, false)));
    assert_eq!(conditions(&rig, &leaving), Some((false, true, true)));

    rig.kubelet.fail(&format!("default/{leaving}"));
    until("an endpoint that no longer serves", || conditions(&rig, &leaving) == Some((false, false, true)));
    assert_eq!(rig.pods.count(), 2, "the pod has ten minutes of grace");

    rig.pods.let_end();
    until("the end of the endpoint", || conditions(&rig, &leaving).is_none());
    let pods = api.namespaced(Kind::POD, "default");
    until("the end of the pod", || pods.get(&leaving).is_err_and(|error| error.is_code(404)));
    assert_eq!(rig.pods.count(), 1, "the API forgets a pod after the machine");
}

#[test]
fn failing_probe_takes_the_endpoint_out_and_back() {
    let rig = Rig::new();
    let api = rig.api();
    api.create(&service()).expect("the service is accepted");
    api.create(&deployment(1, "1")).expect("the deployment is accepted");
    let pod = wait_ready(&rig, 1)[0].pod.clone();
    rig.kubelet.fail(&format!("default/{pod}"));
    until("an unready endpoint", || conditions(&rig, &pod) == Some((false, false, false)));
    rig.kubelet.recover(&format!("default/{pod}"));
    until("a ready endpoint", || conditions(&rig, &pod) == Some((true, true, false)));
}

#[test]
fn pod_deleted_by_force_is_stopped_and_replaced() {
    let rig = Rig::new();
    let api = rig.api();
    api.create(&service()).expect("the service is accepted");
    api.create(&deployment(1, "1")).expect("the deployment is accepted");
    let old = wait_ready(&rig, 1)[0].pod.clone();
    let options = json!({"gracePeriodSeconds": 0});
    api.namespaced(Kind::POD, "default").delete_with(&old, &options).expect("it can be deleted");
    until("another pod alone", || {
        let now = endpoints(api);
        now.len() == 2 && now.iter().all(|endpoint| endpoint.ready && endpoint.pod != old) && rig.pods.count() == 1
    });
}

#[test]
fn node_selector_and_pre_stop_are_honoured() {
    let rig = Rig::new();
    let api = rig.api();
    rig.pods.be_stubborn();
    let mut picky = deployment(2, "1");
    let spec = &mut picky["spec"]["template"]["spec"];
    spec["nodeSelector"] = json!({"topology.kubernetes.io/zone": "west"});
    // An hour: only the test's end cuts it short.
    spec["containers"][0]["lifecycle"] = json!({"preStop": {"sleep": {"seconds": 3600}}});
    spec["terminationGracePeriodSeconds"] = json!(7200);
    api.create(&service()).expect("the service is accepted");
    api.create(&picky).expect("the deployment is accepted");
    assert!(wait_ready(&rig, 2).iter().all(|endpoint| endpoint.node == "node-c"));

    let patch = Patch::Merge(json!({"spec": {"replicas": 1}}));
    api.namespaced(Kind::DEPLOYMENT, "default").patch("web", &patch).expect("it can be changed");
    until("a terminating endpoint", || endpoints(api).iter().any(|endpoint| endpoint.terminating && endpoint.serving));
    assert_eq!(rig.pods.count_terminating(), 0, "preStop comes before SIGTERM");
}
