//! What a kubelet says of its node and of a pod. Pure.

use std::net::IpAddr;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::{NodeSpec, Pod};

/// What a worker knows of its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Observed {
    pub addresses: Vec<IpAddr>,
    pub host_addresses: Vec<IpAddr>,
    pub stage: Stage,
    pub started_at: SystemTime,
    /// When the stage began.
    pub changed_at: SystemTime,
}

/// How far a pod has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its processes run, its probe fails.
    Unready,
    /// Its processes run, its probe succeeds.
    Ready,
    /// Its processes and addresses are gone.
    Ended,
}

/// A node to be created.
pub(super) fn node(node: &NodeSpec) -> Value {
    let spec = match node.pod_cidrs.first() {
        Some(first) => json!({"podCIDR": first, "podCIDRs": node.pod_cidrs}),
        None => json!({}),
    };
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": node.labels},
        "spec": spec,
    })
}

/// The status of a node in good health.
pub(super) fn node_status(node: &NodeSpec) -> Value {
    let hostname = json!({"type": "Hostname", "address": node.name});
    let addresses = node.addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip}));
    let addresses: Vec<Value> = addresses.chain([hostname]).collect();
    json!({"status": {
        "addresses": addresses,
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "fake"}],
        "capacity": {"pods": "1000"},
        "allocatable": {"pods": "1000"},
    }})
}

/// The status of a pod, as a strategic merge patch.
pub(super) fn pod_status(pod: &Pod, observed: &Observed) -> Value {
    let is_ready = observed.stage == Stage::Ready;
    let has_ended = observed.stage == Stage::Ended;
    let (started_at, changed_at) = (timestamp(observed.started_at), timestamp(observed.changed_at));
    let condition = |name: &str, is_true: bool, since: &str, reason: Option<&str>| json!({"type": name, "status": if is_true { "True" } else { "False" }, "lastTransitionTime": since, "reason": reason});
    let why_unready = match observed.stage {
        Stage::Ready => None,
        Stage::Unready => Some("ContainersNotReady"),
        Stage::Ended => Some("PodCompleted"),
    };
    let containers: Vec<Value> = pod.containers().map(|container| container_status(pod, container, observed)).collect();
    let mut status = json!({
        "phase": if has_ended { "Succeeded" } else { "Running" },
        "startTime": started_at,
        "conditions": [
            condition("PodReadyToStartContainers", !has_ended, if has_ended { &changed_at } else { &started_at }, None),
            condition("Initialized", true, &started_at, None),
            condition("Ready", is_ready, &changed_at, why_unready),
            condition("ContainersReady", is_ready, &changed_at, why_unready),
        ],
        "containerStatuses": containers,
    });
    put_addresses(&mut status, "podIP", &observed.addresses);
    put_addresses(&mut status, "hostIP", &observed.host_addresses);
    json!({"metadata": {"uid": pod.uid()}, "status": status})
}

fn container_status(pod: &Pod, container: &Value, observed: &Observed) -> Value {
    let (started_at, changed_at) = (timestamp(observed.started_at), timestamp(observed.changed_at));
    let state = if observed.stage == Stage::Ended {
        json!({"running": null, "terminated": {"exitCode": 0, "reason": "Completed", "startedAt": started_at, "finishedAt": changed_at}})
    } else {
        json!({"running": {"startedAt": started_at}})
    };
    json!({
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "containerID": format!("fake://{}", pod.uid()),
        "ready": observed.stage == Stage::Ready,
        "started": observed.stage != Stage::Ended,
        "restartCount": 0,
        "state": state,
    })
}

/// The first of `addresses` under `key`, the first of each family under its plural.
fn put_addresses(status: &mut Value, key: &str, addresses: &[IpAddr]) {
    let Some(first) = addresses.first() else { return };
    let other = addresses.iter().find(|ip| ip.is_ipv4() != first.is_ipv4());
    status[key] = json!(first);
    status[format!("{key}s")] = [first].into_iter().chain(other).map(|ip| json!({"ip": ip})).collect();
}

/// RFC 3339 in whole seconds, as the API has it.
fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn status(stage: Stage) -> Value {
        let pod = Pod::new(json!({"metadata": {"uid": "u"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}));
        let observed = Observed {
            addresses: ["10.0.0.1", "10.0.0.2", "fd00::1"].map(|ip| ip.parse().expect("an address")).to_vec(),
            host_addresses: vec!["192.0.2.1".parse().expect("an address")],
            stage,
            started_at: SystemTime::UNIX_EPOCH,
            changed_at: SystemTime::UNIX_EPOCH + Duration::from_secs(61),
        };
        pod_status(&pod, &observed)["status"].take()
    }

    fn condition<'a>(status: &'a Value, name: &str) -> &'a Value {
        let conditions = status["conditions"].as_array().expect("a list");
        conditions.iter().find(|condition| condition["type"] == name).expect("the condition")
    }

    #[test]
    fn readiness_shows_in_the_conditions_and_the_container() {
        for (stage, ready) in [(Stage::Unready, false), (Stage::Ready, true), (Stage::Ended, false)] {
            let status = status(stage);
            assert_eq!(condition(&status, "Ready")["status"] == "True", ready, "{stage:?}");
            assert_eq!(condition(&status, "ContainersReady")["status"] == "True", ready, "{stage:?}");
            assert_eq!(status["containerStatuses"][0]["ready"], ready, "{stage:?}");
            assert_eq!(condition(&status, "Ready")["lastTransitionTime"], "1970-01-01T00:01:01Z");
        }
    }

    #[test]
    fn only_the_end_is_terminal() {
        assert_eq!(status(Stage::Unready)["phase"], "Running");
        assert_eq!(status(Stage::Ended)["phase"], "Succeeded");
        assert_eq!(status(Stage::Ended)["containerStatuses"][0]["state"]["terminated"]["exitCode"], 0);
    }

    #[test]
    fn one_address_of_each_family_is_shown() {
        let status = status(Stage::Ready);
        assert_eq!(status["podIP"], "10.0.0.1");
        assert_eq!(status["podIPs"], json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]));
        assert_eq!(status["hostIPs"], json!([{"ip": "192.0.2.1"}]));
    }
}
