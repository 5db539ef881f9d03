//! Kustomize and Helm: one set of objects, which the server takes.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use shunt_tests::bed::Bed;
use shunt_tests::control_plane::ControlPlane;
use shunt_tests::netns::Netns;

use crate::rig::{Tools, guide, key};

/// The values that say what the overlay `cluster` says.
const CLUSTER: [&str; 2] = ["apiServer=https://192.0.2.10:6443", "clusterCIDR={10.244.0.0/16}"];
/// Those of the overlay `kubeadm`.
const KUBEADM: [&str; 1] = ["kubeProxyConfigMap=kube-proxy"];

#[track_caller]
fn control_plane() -> (ControlPlane, Arc<Bed>) {
    let bed = Bed::new();
    (ControlPlane::start(&bed, &Netns::new(&bed, "control")), bed)
}

fn by_key(objects: Vec<Value>) -> BTreeMap<String, Value> {
    objects.into_iter().map(|object| (key(&object), object)).collect()
}

#[test]
fn the_server_takes_every_object_as_it_stands() {
    let (plane, bed) = control_plane();
    let tools = Tools::new(&plane, &bed);
    for overlay in ["base", "cluster", "kubeadm"] {
        let taken = tools.kubectl(["apply", "--server-side", "--dry-run=server", "-k", &tools.overlay(overlay)], "");
        assert_eq!(taken.lines().count(), 3, "{taken}");
        assert!(!taken.contains("Warning"), "{taken}");
    }
    for values in [&CLUSTER[..], &KUBEADM[..]] {
        let text = tools.helm_text(values);
        let taken = tools.kubectl(["apply", "--server-side", "--dry-run=server", "-f", "-"], &text);
        assert_eq!(taken.lines().count(), 3, "{taken}");
    }
}

#[test]
fn the_server_takes_the_pods_too() {
    let (plane, bed) = control_plane();
    let tools = Tools::new(&plane, &bed);
    for overlay in ["cluster", "kubeadm"] {
        let objects = by_key(tools.kustomize(overlay));
        let template = &objects["DaemonSet/shunt"]["spec"]["template"];
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "shunt", "namespace": "kube-system", "labels": template["metadata"]["labels"]},
            "spec": template["spec"],
        });
        let args = ["create", "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-"];
        let taken = tools.kubectl(args, &pod.to_string());
        let taken: Value = serde_json::from_str(&taken).expect("the pod as the server would keep it");
        assert_eq!(taken["spec"]["priority"], 2_000_001_000, "above all but the control plane");
    }
}

#[test]
fn chart_and_kustomize_make_the_same_objects() {
    let (plane, bed) = control_plane();
    let tools = Tools::new(&plane, &bed);
    for (overlay, values) in [("cluster", &CLUSTER[..]), ("kubeadm", &KUBEADM[..])] {
        assert_eq!(by_key(tools.helm(values)), by_key(tools.kustomize(overlay)), "{overlay}");
    }
}

#[test]
fn the_chart_refuses_what_could_not_work() {
    let (plane, bed) = control_plane();
    let tools = Tools::new(&plane, &bed);
    let refused = |values: &[&str]| tools.helm_output(values).expect_err("the chart must refuse this");
    assert!(refused(&[]).contains("say where nodes reach the Kubernetes API"));
    assert!(refused(&["apiServer=https://192.0.2.10:6443", "kubeProxyConfigMap=kube-proxy"]).contains("leave one out"));
    assert!(refused(&["apiServer=192.0.2.10:6443"]).contains("/apiServer"));
    assert!(refused(&[CLUSTER[0], "resources.limits.memory=1Gi"]).contains("/resources/limits"));
    assert!(refused(&[CLUSTER[0], "clusterCidr={10.244.0.0/16}"]).contains("clusterCidr"), "a misspelt value");
}

#[test]
fn the_chart_passes_lint() {
    let (plane, bed) = control_plane();
    let tools = Tools::new(&plane, &bed);
    let text = tools.helm_command(["lint", "--strict"], &CLUSTER).unwrap_or_else(|text| panic!("{text}"));
    assert!(text.contains("0 chart(s) failed"), "{text}");
}

#[test]
fn the_server_does_what_the_migration_guide_says() {
    let (plane, bed) = control_plane();
    let tools = Tools::new(&plane, &bed);
    tools.kubectl(
        ["create", "-f", "-"],
        &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}}).to_string(),
    );
    let labels = json!({"app": "kube-proxy"});
    let predecessor = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "spec": {"selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels},
            "spec": {"containers": [{"name": "kube-proxy", "image": "kube-proxy"}]},
        }},
    });
    tools.kubectl(["create", "-f", "-"], &predecessor.to_string());
    // Those wait for pods, of which there are none, or take a variable of the shell.
    let is_left_out = |words: &[String]| {
        ["rollout", "exec", "\"$image\""].iter().any(|left_out| words.iter().any(|word| word.ends_with(left_out)))
    };
    let commands: Vec<_> = guide("a").into_iter().filter(|words| !is_left_out(words)).collect();
    assert!(commands.len() >= 10, "{commands:?}");
    for words in commands {
        assert!(tools.try_kubectl(&words.iter().map(String::as_str).collect::<Vec<_>>()), "{words:?}");
    }
}
