//! Decoding of whole documents. What single fields shape is shown by the scenarios.

use serde_json::json;

use super::document::{Item, decode_document};
use super::*;
use crate::model::{EndpointGroup, GroupKind, Interner, Object};

fn decode(document: serde_json::Value) -> Vec<Item> {
    decode_document(document, &mut Interner::default())
}

fn keys(items: &[Item]) -> Vec<String> {
    let key = |item: &Item| match item {
        Item::Object(Ok(decoded)) => decoded.key.to_string(),
        Item::Object(Err(error)) => format!("error: {error}"),
        Item::OtherKind { kind } => format!("other: {kind}"),
    };
    items.iter().map(key).collect()
}

#[test]
fn lists_are_taken_apart_even_when_their_entries_do_not_say_what_they_are() {
    let service = json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}});
    let mut whole = service.clone();
    whole["apiVersion"] = json!("v1");
    whole["kind"] = json!("Service");
    let lists = [
        json!({"apiVersion": "v1", "kind": "List", "items": [whole, {"apiVersion": "v1", "kind": "ConfigMap"}]}),
        json!({"apiVersion": "v1", "kind": "ServiceList", "items": [service]}),
        json!({"apiVersion": "v1", "kind": "ServiceList", "items": null}),
    ];
    let found: Vec<_> = lists.into_iter().map(|list| keys(&decode(list))).collect();
    assert_eq!(found, [vec!["Service default/web", "other: v1 ConfigMap"], vec!["Service default/web"], vec![]]);
}

#[test]
fn kinds_of_other_groups_are_not_mistaken() {
    for version in ["serving.knative.dev/v1", "v2", ""] {
        let items = decode(json!({"apiVersion": version, "kind": "Service", "metadata": {"name": "web"}}));
        assert!(matches!(items[..], [Item::OtherKind { .. }]), "{version}");
    }
    assert_eq!(keys(&decode(json!("text"))), ["other: "]);
}

#[test]
fn unknown_fields_and_nulls_are_no_errors() {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "unknown": [1, {"a": null}],
        "metadata": {"name": "web", "labels": null, "managedFields": [{}], "creationTimestamp": null},
        "spec": {"clusterIP": "10.96.0.1", "ports": null, "externalIPs": null, "sessionAffinityConfig": null, "future": {}},
        "status": {"loadBalancer": {"ingress": null}},
    });
    let items = decode(service);
    let [Item::Object(Ok(decoded))] = &items[..] else { panic!("{items:?}") };
    assert!(decoded.problems.is_empty(), "{:?}", decoded.problems);
    assert!(matches!(decoded.meaning, Meaning::Object(_)));
}

#[test]
fn errors_name_the_object_and_the_field() {
    let service = |spec: serde_json::Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": spec});
    let cases = [
        (service(json!({"ports": [{"port": "http"}]})), "spec.ports[0].port"),
        (service(json!({"ports": {}})), "spec.ports"),
        (service(json!({"clusterIP": 7})), "spec.clusterIP"),
        (service(json!("none")), "spec"),
    ];
    for (document, field) in cases {
        let items = decode(document);
        let [Item::Object(Err(error))] = &items[..] else { panic!("{items:?}") };
        assert_eq!(error.key.as_ref().map(ToString::to_string).as_deref(), Some("Service default/web"));
        assert_eq!(error.error.field, field);
    }
}

#[test]
fn an_object_without_a_name_is_refused() {
    let items = decode(json!({"apiVersion": "v1", "kind": "Service", "metadata": {}}));
    assert_eq!(keys(&items), ["error: an object without a name: metadata.name: is empty"]);
}

#[test]
fn a_node_has_one_primary_address_a_family() {
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node-a", "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "spec": {"podCIDR": "10.244.1.0/24"},
        "status": {"addresses": [
            {"type": "ExternalIP", "address": "203.0.113.1"},
            {"type": "ExternalIP", "address": "fd00:203::1"},
            {"type": "InternalIP", "address": "192.0.2.1"},
            {"type": "InternalIP", "address": "192.0.2.2"},
            {"type": "Hostname", "address": "node-a"},
        ]},
    });
    let items = decode(node);
    let [Item::Object(Ok(Decoded { meaning: Meaning::Object(Object::Node { name, node }), .. }))] = &items[..] else {
        panic!("{items:?}")
    };
    let text = |addr: Option<proxy_common::addr::Addr>| addr.map(|addr| addr.to_string());
    assert_eq!((name.as_str(), node.zone.as_ref().map(Name::as_str)), ("node-a", Some("zone-a")));
    assert_eq!(text(node.addresses.v4).as_deref(), Some("192.0.2.1"));
    assert_eq!(text(node.addresses.v6).as_deref(), Some("fd00:203::1"));
    assert_eq!(node.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.244.1.0/24"]);
}

#[test]
fn a_node_that_is_about_to_go_says_so_in_one_of_two_ways() {
    let is_leaving = |metadata: serde_json::Value, spec: serde_json::Value| {
        let mut node = json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": spec});
        node["metadata"]["name"] = json!("node-a");
        let items = decode(node);
        let [Item::Object(Ok(Decoded { meaning: Meaning::Object(Object::Node { node, .. }), problems, .. }))] =
            &items[..]
        else {
            panic!("{items:?}")
        };
        assert!(problems.is_empty(), "{problems:?}");
        node.is_leaving
    };
    let taint =
        |key: &str| json!({"taints": [{"key": "a", "effect": "NoSchedule"}, {"key": key, "value": "1764034000"}]});
    assert!(!is_leaving(json!({}), json!({})));
    assert!(!is_leaving(json!({"deletionTimestamp": null}), json!({"taints": null})));
    assert!(!is_leaving(json!({}), taint("DeletionCandidateOfClusterAutoscaler")));
    assert!(is_leaving(json!({}), taint("ToBeDeletedByClusterAutoscaler")));
    assert!(is_leaving(json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}), json!({})));
}

#[test]
fn names_and_hints_are_shared_between_objects() {
    let slice = |name: &str| {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
            "endpoints": [{"addresses": ["10.244.1.2"], "nodeName": "node-a", "hints": {"forZones": [{"name": "zone-a"}]}}],
        })
    };
    let mut interner = Interner::default();
    let mut endpoint = |name: &str| {
        let items = decode_document(slice(name), &mut interner);
        let [Item::Object(Ok(Decoded { meaning: Meaning::Object(Object::Endpoints { group, .. }), .. }))] = &items[..]
        else {
            panic!("{items:?}")
        };
        let group: &EndpointGroup = group;
        assert_eq!(group.kind, GroupKind::Slice);
        group.subsets[0].endpoints[0].clone()
    };
    let (a, b) = (endpoint("a"), endpoint("b"));
    assert!(std::sync::Arc::ptr_eq(a.hints.as_ref().unwrap(), b.hints.as_ref().unwrap()));
    assert_eq!(a, b);
}

proptest::proptest! {
    /// Any text is either refused or taken; nothing panics.
    #[test]
    fn any_text_is_survived(text in "[ \\[\\]{}:,&*#|>!'\"a-z0-9\\n-]{0,200}") {
        use crate::source::manifests::parse::{Format, parse_file};
        let mut interner = Interner::default();
        let _ = parse_file(Format::Yaml, text.as_bytes(), &mut interner);
        let _ = parse_file(Format::Json, text.as_bytes(), &mut interner);
    }

    /// A manifest that is cut off anywhere is either refused as a whole, or a prefix of its objects.
    #[test]
    fn a_cut_manifest_is_refused_or_shorter(cut in 0usize..600) {
        use crate::source::manifests::parse::{Format, parse_file};
        let whole = include_str!("../../../../examples/web.yaml");
        let mut interner = Interner::default();
        let all = keys(&parse_file(Format::Yaml, whole.as_bytes(), &mut interner).unwrap());
        let cut = &whole.as_bytes()[..cut.min(whole.len())];
        if let Ok(items) = parse_file(Format::Yaml, cut, &mut interner) {
            proptest::prop_assert!(items.len() <= all.len());
        }
    }

    #[test]
    fn addresses_are_read_as_std_reads_them(octets in proptest::prelude::any::<[u8; 4]>(), v6 in proptest::prelude::any::<[u8; 16]>()) {
        let (v4, v6) = (std::net::Ipv4Addr::from(octets), std::net::Ipv6Addr::from(v6));
        proptest::prop_assert_eq!(field::parse_ip(&v4.to_string()), Some(v4.into()));
        proptest::prop_assert_eq!(field::parse_ip(&v6.to_string()), Some(std::net::IpAddr::V6(v6).to_canonical()));
        let padded: Vec<String> = octets.iter().map(|octet| format!("{octet:05}")).collect();
        proptest::prop_assert_eq!(field::parse_ip(&padded.join(".")), Some(v4.into()));
    }
}
