//! Which node a pod goes to. Pure.

use std::collections::BTreeMap;

use super::{NodeSpec, Pod};

/// The node with the fewest pods among those with the labels that the pod asks for; of equals the first. Round robin for pods
/// that come one after the other; `loads` counts the pods of each node.
pub(super) fn choose_node<'a>(pod: &Pod, nodes: &'a [NodeSpec], loads: &BTreeMap<&str, usize>) -> Option<&'a NodeSpec> {
    let fits = |node: &&NodeSpec| {
        pod.node_selector().all(|(key, value)| node.labels.get(key).is_some_and(|have| have == value))
    };
    nodes.iter().filter(fits).min_by_key(|node| loads.get(node.name.as_str()).copied().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn nodes() -> [NodeSpec; 3] {
        ["a", "b", "c"].map(|name| NodeSpec::new(name, []).zone(if name == "a" { "east" } else { "west" }))
    }

    fn chosen(spec: serde_json::Value, loads: &[(&str, usize)]) -> Option<String> {
        let pod = Pod::new(json!({"spec": spec}));
        choose_node(&pod, &nodes(), &loads.iter().copied().collect()).map(|node| node.name.clone())
    }

    #[test]
    fn pods_go_where_there_are_fewest() {
        assert_eq!(chosen(json!({}), &[]), Some("a".into()));
        assert_eq!(chosen(json!({}), &[("a", 1), ("b", 1)]), Some("c".into()));
        assert_eq!(chosen(json!({}), &[("a", 2), ("b", 1), ("c", 1)]), Some("b".into()));
    }

    #[test]
    fn the_node_selector_is_obeyed_and_may_fit_no_node() {
        let west = json!({"nodeSelector": {"topology.kubernetes.io/zone": "west"}});
        assert_eq!(chosen(west, &[]), Some("b".into()));
        assert_eq!(chosen(json!({"nodeSelector": {"kubernetes.io/hostname": "c"}}), &[("c", 9)]), Some("c".into()));
        assert_eq!(chosen(json!({"nodeSelector": {"disk": "fast"}}), &[]), None);
    }
}
