//! kube-proxy's configuration, as kubeadm keeps it in the ConfigMap `kube-proxy`, read as settings of this proxy.
//!
//! Null, zero and empty mean what they mean to kube-proxy: the default, which here is that of the agent's options. Pure.

use std::net::Ipv6Addr;
use std::path::Path;

use jiff::SignedDuration;
use serde_json::{Map, Value};

use super::Error;
use super::file::Content;
use super::raw::{HEALTHZ_PORT, METRICS_PORT};
use super::setting::Place;
use crate::source::decode::field::{parse_cidr, parse_ip};

/// apiVersion and kind.
pub const KIND: (&str, &str) = ("kubeproxy.config.k8s.io/v1alpha1", "KubeProxyConfiguration");

/// What a field can hold, beside null.
#[derive(Clone, Copy, Debug)]
enum Form {
    Text,
    Texts,
    Switch,
    Switches,
    Number,
    Duration,
    /// One of these, or the empty text.
    Word(&'static [&'static str]),
    Any,
}
use Form::{Any, Duration, Number, Switch, Switches, Text, Texts, Word};

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// It is read.
    Read,
    /// It speaks of something that this proxy has not, and nobody would miss: not a word about it.
    Moot,
    /// It means nothing here, which is told if it is set.
    Ignored,
}
use Use::{Ignored, Moot, Read};

const NFTABLES: &str = "nftables";
const MODES: &[&str] = &["iptables", "ipvs", NFTABLES];
const LOCAL_MODES: &[&str] = &["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"];

/// All fields of v1alpha1, those of other systems and of former versions included.
const FIELDS: [(&str, Form, Use); 62] = [
    ("apiVersion", Text, Read),
    ("kind", Text, Read),
    ("bindAddress", Text, Read),
    ("bindAddressHardFail", Switch, Ignored),
    ("clientConnection.acceptContentTypes", Text, Moot),
    ("clientConnection.burst", Number, Moot),
    ("clientConnection.contentType", Text, Moot),
    ("clientConnection.kubeconfig", Text, Read),
    ("clientConnection.qps", Any, Moot),
    ("clusterCIDR", Text, Read),
    ("configSyncPeriod", Duration, Ignored),
    ("conntrack.max", Number, Ignored),
    ("conntrack.maxPerCore", Number, Read),
    ("conntrack.min", Number, Read),
    ("conntrack.tcpBeLiberal", Switch, Read),
    ("conntrack.tcpCloseWaitTimeout", Duration, Read),
    ("conntrack.tcpEstablishedTimeout", Duration, Read),
    ("conntrack.udpStreamTimeout", Duration, Read),
    ("conntrack.udpTimeout", Duration, Read),
    ("detectLocal.bridgeInterface", Text, Ignored),
    ("detectLocal.interfaceNamePrefix", Text, Ignored),
    ("detectLocalMode", Word(LOCAL_MODES), Read),
    ("enableProfiling", Switch, Ignored),
    ("featureGates", Switches, Ignored),
    ("healthzBindAddress", Text, Read),
    ("hostnameOverride", Text, Read),
    ("iptables.localhostNodePorts", Switch, Read),
    ("iptables.masqueradeAll", Switch, Read),
    ("iptables.masqueradeBit", Number, Ignored),
    ("iptables.minSyncPeriod", Duration, Ignored),
    ("iptables.syncPeriod", Duration, Ignored),
    ("ipvs.excludeCIDRs", Texts, Ignored),
    ("ipvs.minSyncPeriod", Duration, Ignored),
    ("ipvs.scheduler", Text, Ignored),
    ("ipvs.strictARP", Switch, Ignored),
    ("ipvs.syncPeriod", Duration, Ignored),
    ("ipvs.tcpFinTimeout", Duration, Ignored),
    ("ipvs.tcpTimeout", Duration, Ignored),
    ("ipvs.udpTimeout", Duration, Ignored),
    ("logging.flushFrequency", Any, Moot),
    ("logging.format", Word(&["text", "json"]), Read),
    ("logging.options", Any, Moot),
    ("logging.verbosity", Number, Ignored),
    ("logging.vmodule", Any, Moot),
    ("metricsBindAddress", Text, Read),
    ("mode", Word(MODES), Read),
    ("nftables.masqueradeAll", Switch, Read),
    ("nftables.masqueradeBit", Number, Ignored),
    ("nftables.minSyncPeriod", Duration, Ignored),
    ("nftables.syncPeriod", Duration, Ignored),
    ("nodePortAddresses", Texts, Read),
    ("oomScoreAdj", Number, Ignored),
    ("portRange", Text, Ignored),
    ("resourceContainer", Text, Ignored),
    ("showHiddenMetricsForVersion", Text, Ignored),
    ("udpIdleTimeout", Duration, Ignored),
    ("windowsRunAsService", Switch, Ignored),
    ("winkernel.enableDSR", Switch, Ignored),
    ("winkernel.forwardHealthCheckVip", Switch, Ignored),
    ("winkernel.networkName", Text, Ignored),
    ("winkernel.rootHnsEndpointName", Text, Ignored),
    ("winkernel.sourceVip", Text, Ignored),
];

/// What is set of connection tracking, and the option that does the same.
const CONNTRACK: [(&str, &str); 7] = [
    ("conntrack.maxPerCore", "conntrack-max-per-core"),
    ("conntrack.min", "conntrack-min"),
    ("conntrack.tcpBeLiberal", "conntrack-tcp-be-liberal"),
    ("conntrack.tcpCloseWaitTimeout", "conntrack-tcp-timeout-close-wait"),
    ("conntrack.tcpEstablishedTimeout", "conntrack-tcp-timeout-established"),
    ("conntrack.udpStreamTimeout", "conntrack-udp-timeout-stream"),
    ("conntrack.udpTimeout", "conntrack-udp-timeout"),
];
/// What kube-proxy takes for conntrack.maxPerCore where it is null; here, only beside a `min` that would mean nothing else.
const MAX_PER_CORE: &str = "32768";

const EVERYWHERE: &str =
    "NodePorts answer on all addresses of this node, as kube-proxy's do in every mode but nftables";
const LOCALHOST: &str = "processes of this node reach NodePorts on loopback in any case; nobody else does";

/// What the configuration sets, what is wrong with it, and what its reader is to be told.
pub fn content(file: &Path, object: &Map<String, Value>) -> Content {
    let mut content = Content::default();
    for (name, value) in object {
        check(file, name, value, &mut content);
    }
    read(file, object, &mut content);
    content
}

/// Finds what is wrong with a field, or with the fields in it, and who is to be told of it.
fn check(file: &Path, name: &str, value: &Value, content: &mut Content) {
    let error = |message| Error { place: place(file, name), message };
    let inside =
        |(field, _, _): &&(&str, Form, Use)| field.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    match FIELDS.iter().find(|(field, _, _)| *field == name) {
        Some((_, form, usage)) => match form.refuse(value) {
            Some(message) => content.errors.push(error(message)),
            None if *usage == Ignored && !is_zero(value) => content.notes.ignored.push(name.to_owned()),
            None => {}
        },
        None if FIELDS.iter().find(inside).is_none() => content.notes.unknown.push(name.to_owned()),
        None => match value {
            Value::Null => {}
            Value::Object(fields) => {
                fields.iter().for_each(|(field, value)| check(file, &format!("{name}.{field}"), value, content));
            }
            _ => content.errors.push(error("an object is needed".to_owned())),
        },
    }
}

impl Form {
    /// What is wrong with a value, if something is.
    fn refuse(self, value: &Value) -> Option<String> {
        let is_right = match self {
            _ if value.is_null() => true,
            Any => true,
            Text => value.is_string(),
            Switch => value.is_boolean(),
            Number => value.is_i64(),
            Texts => value.as_array().is_some_and(|entries| entries.iter().all(Value::is_string)),
            Switches => value.as_object().is_some_and(|entries| entries.values().all(Value::is_boolean)),
            Duration => value.as_str().is_some_and(|text| parse_duration(text).is_some()),
            Word(words) => value.as_str().is_some_and(|text| text.is_empty() || words.contains(&text)),
        };
        let needed = match self {
            Word(words) => return (!is_right).then(|| format!("{value} is none of {}", words.join(", "))),
            Text => "a text",
            Switch => "true or false",
            Number => "a whole number",
            Texts => "a list of texts",
            Switches => "an object with values true or false",
            Duration => "a duration, such as 30s or 1h30m,",
            Any => "anything",
        };
        (!is_right).then(|| format!("{needed} is needed"))
    }
}

/// A duration as Go writes it.
fn parse_duration(text: &str) -> Option<SignedDuration> {
    if text == "0" { Some(SignedDuration::ZERO) } else { text.parse().ok() }
}

/// True of a value that kube-proxy takes for none.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || parse_duration(text).is_some_and(|duration| duration.is_zero()),
        Value::Array(entries) => entries.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

fn place(file: &Path, field: &str) -> Place {
    Place::Field { file: file.to_owned(), field: field.to_owned() }
}

/// A field, if it is there.
fn find<'a>(object: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    let mut parts = field.split('.');
    let first = parts.next().and_then(|part| object.get(part));
    parts.fold(first, |value, part| value?.get(part))
}

/// The text of a field; empty if it has none.
fn text<'a>(object: &'a Map<String, Value>, field: &str) -> &'a str {
    find(object, field).and_then(Value::as_str).unwrap_or_default()
}

/// Reads the fields that mean something here. Which are wrong, the others do not ask.
fn read(file: &Path, object: &Map<String, Value>, content: &mut Content) {
    let text = |field| text(object, field).trim();
    let mut set = |flag, field, values: Vec<String>| {
        if values.iter().any(|value| !value.is_empty()) {
            content.settings.set(flag, values, place(file, field));
        }
    };
    const KUBECONFIG: &str = "clientConnection.kubeconfig";
    match text(KUBECONFIG) {
        "" => set("kubernetes", KUBECONFIG, vec!["true".to_owned()]),
        kubeconfig => set("kubeconfig", KUBECONFIG, vec![kubeconfig.to_owned()]),
    }
    set("node-name", "hostnameOverride", vec![text("hostnameOverride").to_lowercase()]);
    let cidrs = text("clusterCIDR").split(',').map(tolerant_prefix).collect();
    set("cluster-cidr", "clusterCIDR", cidrs);
    let node_ports = object.get("nodePortAddresses").and_then(Value::as_array).into_iter().flatten();
    let node_ports: Vec<_> = node_ports.filter_map(Value::as_str).map(tolerant_prefix).collect();
    if node_ports.is_empty() && text("mode") != NFTABLES {
        set("nodeport-addresses", "nodePortAddresses", vec!["all".to_owned()]);
        content.notes.implied.push(("nodePortAddresses".to_owned(), EVERYWHERE));
    } else {
        set("nodeport-addresses", "nodePortAddresses", node_ports);
    }
    // The section of the mode that kube-proxy would run in (that of iptables is ipvs's too).
    let masquerade_all = if text("mode") == NFTABLES { "nftables.masqueradeAll" } else { "iptables.masqueradeAll" };
    if find(object, masquerade_all) == Some(&Value::Bool(true)) {
        set("masquerade-all", masquerade_all, vec!["true".to_owned()]);
    }
    set("log-format", "logging.format", vec![text("logging.format").to_owned()]);
    for (field, flag) in CONNTRACK {
        if let Some(value) = find(object, field).filter(|value| !is_zero(value)) {
            set(flag, field, vec![value.as_str().map_or_else(|| value.to_string(), str::to_owned)]);
        }
    }
    let is_set = |field| find(object, field).is_some_and(|value| !value.is_null());
    if is_set("conntrack.min") && !is_set("conntrack.maxPerCore") {
        set("conntrack-max-per-core", "conntrack.maxPerCore", vec![MAX_PER_CORE.to_owned()]);
    }

    let address = parse_ip(text("bindAddress"));
    if address.is_none_or(|address| !address.is_unspecified()) {
        set("node-ip", "bindAddress", vec![text("bindAddress").to_owned()]);
    }
    // Where the node has its address in IPv6, the defaults are there too.
    let is_v6 = address.is_some_and(|address| address.is_ipv6());
    let listeners = [
        ("healthz-bind-address", "healthzBindAddress", Ipv6Addr::UNSPECIFIED, HEALTHZ_PORT),
        ("metrics-bind-address", "metricsBindAddress", Ipv6Addr::LOCALHOST, METRICS_PORT),
    ];
    for (flag, field, default, port) in listeners {
        match text(field) {
            "" if is_v6 => set(flag, "bindAddress", vec![format!("[{default}]:{port}")]),
            listener => set(flag, field, vec![listener.to_owned()]),
        }
    }
    tell_differences(&text, &mut content.notes.different);
    if find(object, "iptables.localhostNodePorts") == Some(&Value::Bool(false)) {
        content.notes.different.push(("iptables.localhostNodePorts".to_owned(), LOCALHOST));
    }
}

/// A prefix as kube-proxy reads it: with host bits, which say nothing. What is none stays as it is, for others to refuse.
fn tolerant_prefix(text: &str) -> String {
    parse_cidr(text).map_or_else(|_| text.trim().to_owned(), |prefix| prefix.to_string())
}

fn tell_differences<'a>(text: &impl Fn(&'static str) -> &'a str, different: &mut Vec<(String, &'static str)>) {
    const LOCAL: &str = "clients count as inside the cluster by clusterCIDR (--cluster-cidr), and by nothing else";
    const MODE: &str = "services behave as in the mode nftables, but for the addresses on which NodePorts answer";
    if !["", "ClusterCIDR"].contains(&text("detectLocalMode")) {
        different.push(("detectLocalMode".to_owned(), LOCAL));
    }
    if !["", NFTABLES].contains(&text("mode")) {
        different.push(("mode".to_owned(), MODE));
    }
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::super::raw::{AgentFlags, LogFormat};
    use super::*;

    /// What kubeadm writes, with the defaults of a cluster whose pods are in 10.244.0.0/16.
    const KUBEADM: &str = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: \"\"
  burst: 0
  contentType: \"\"
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: \"\"
  interfaceNamePrefix: \"\"
detectLocalMode: \"\"
enableProfiling: false
healthzBindAddress: \"\"
hostnameOverride: \"\"
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: \"\"
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: \"0\"
    text:
      infoBufferSize: \"0\"
  verbosity: 0
metricsBindAddress: \"\"
mode: \"\"
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: \"\"
showHiddenMetricsForVersion: \"\"
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: \"\"
  rootHnsEndpointName: \"\"
  sourceVip: \"\"
";

    fn content(text: &str) -> Content {
        file::parse(Path::new("f"), text).unwrap()
    }

    /// Of a file that holds only these fields.
    fn of(fields: &str) -> Content {
        content(&format!("apiVersion: {}\nkind: {}\n{fields}", KIND.0, KIND.1))
    }

    #[track_caller]
    fn flags(fields: &str) -> AgentFlags {
        let mut content = of(fields);
        assert!(content.errors.is_empty(), "{:?}", content.errors);
        assert!(content.settings.take_errors().is_empty());
        content.settings.flags().unwrap()
    }

    #[test]
    fn what_kubeadm_writes_loads_without_a_word() {
        let content = content(KUBEADM);
        assert!(content.errors.is_empty(), "{:?}", content.errors);
        let implied = vec![("nodePortAddresses".to_owned(), EVERYWHERE)];
        assert_eq!(content.notes, file::Notes { implied, ..file::Notes::default() });
        let flags = content.settings.flags().unwrap();
        assert_eq!(flags.kubeconfig, Some("/var/lib/kube-proxy/kubeconfig.conf".into()));
        assert!(!flags.kubernetes);
        assert_eq!(flags.cluster_cidr, ["10.244.0.0/16"]);
        assert_eq!(flags.node_name, None);
        assert!(flags.node_ip.is_empty());
        assert_eq!(flags.nodeport_addresses, ["all"]);
        assert_eq!((flags.conntrack_max_per_core, flags.conntrack_min), (0, 0));
        assert_eq!(flags.healthz_bind_address, "0.0.0.0:10256");
        assert_eq!(flags.metrics_bind_address, "127.0.0.1:10249");
    }

    #[test]
    fn fields_that_mean_something_are_read() {
        let flags = flags(
            "bindAddress: 192.0.2.7\nclusterCIDR: '10.244.0.1/16, fd00::/56'\nhostnameOverride: ' Node-A '\n\
             nodePortAddresses: [192.0.2.9/24, 'fd00:1::/64']\nhealthzBindAddress: 192.0.2.7\n\
             metricsBindAddress: 0.0.0.0:9\nlogging: {format: json}\n",
        );
        // Without a kubeconfig, kube-proxy is a pod with a service account.
        assert!(flags.kubernetes && flags.kubeconfig.is_none());
        assert_eq!(flags.node_ip, ["192.0.2.7"]);
        assert_eq!(flags.cluster_cidr, ["10.244.0.0/16", "fd00::/56"]);
        assert_eq!(flags.node_name.as_deref(), Some("node-a"));
        assert_eq!(flags.nodeport_addresses, ["192.0.2.0/24", "fd00:1::/64"]);
        assert_eq!(flags.healthz_bind_address, "192.0.2.7");
        assert_eq!(flags.metrics_bind_address, "0.0.0.0:9");
        assert_eq!(flags.log_format, LogFormat::Json);
    }

    #[test]
    fn an_ipv6_bind_address_moves_the_default_listeners() {
        let listeners = |fields: &str| {
            let flags = flags(fields);
            (flags.healthz_bind_address, flags.metrics_bind_address, flags.node_ip.join(","))
        };
        let expected = |healthz: &str, metrics: &str, ip: &str| (healthz.to_owned(), metrics.to_owned(), ip.to_owned());
        assert_eq!(listeners("bindAddress: '::'\n"), expected("[::]:10256", "[::1]:10249", ""));
        assert_eq!(
            listeners("bindAddress: fd00::7\nmetricsBindAddress: 127.0.0.1\n"),
            expected("[::]:10256", "127.0.0.1", "fd00::7")
        );
    }

    #[test]
    fn node_ports_answer_where_those_of_the_mode_do() {
        let addresses = |fields: &str| flags(fields).nodeport_addresses;
        for fields in ["", "mode: iptables\n", "mode: ipvs\nnodePortAddresses: []\n"] {
            assert_eq!(addresses(fields), ["all"], "{fields}");
            assert_eq!(of(fields).notes.implied, [("nodePortAddresses".to_owned(), EVERYWHERE)]);
        }
        assert_eq!(addresses("mode: nftables\n"), ["primary"]);
        assert_eq!(addresses("nodePortAddresses: [primary]\n"), ["primary"]);
        assert_eq!(addresses("mode: iptables\nnodePortAddresses: [192.0.2.0/24]\n"), ["192.0.2.0/24"]);
        assert!(of("nodePortAddresses: [primary]\n").notes.implied.is_empty());
    }

    #[test]
    fn loopback_cannot_be_closed_and_that_is_told() {
        let told = |value: &str| of(&format!("iptables: {{localhostNodePorts: {value}}}\n")).notes;
        assert_eq!(told("false").different, [("iptables.localhostNodePorts".to_owned(), LOCALHOST)]);
        assert!(told("true").different.is_empty() && told("true").ignored.is_empty());
        assert!(told("null").different.is_empty());
    }

    #[test]
    fn connection_tracking_is_set_as_it_is_asked_for() {
        let flags = flags(
            "conntrack: {maxPerCore: 1000, min: 3000, tcpEstablishedTimeout: 24h0m0s, tcpCloseWaitTimeout: 1h0m0s,\n\
             tcpBeLiberal: true, udpTimeout: 30s, udpStreamTimeout: 0s}\n",
        );
        assert_eq!((flags.conntrack_max_per_core, flags.conntrack_min), (1000, 3000));
        assert_eq!(flags.conntrack_tcp_timeout_established, "24h0m0s");
        assert_eq!(flags.conntrack_tcp_timeout_close_wait, "1h0m0s");
        assert!(flags.conntrack_tcp_be_liberal);
        assert_eq!((flags.conntrack_udp_timeout.as_str(), flags.conntrack_udp_timeout_stream.as_str()), ("30s", "0s"));
    }

    #[test]
    fn a_least_number_of_connections_means_what_it_means_to_kube_proxy() {
        let per_core = |fields: &str| flags(&format!("conntrack: {{{fields}}}\n")).conntrack_max_per_core;
        assert_eq!(per_core("min: 5"), 32_768);
        assert_eq!(per_core("min: 5, maxPerCore: 0"), 0);
        assert_eq!(per_core("min: 5, maxPerCore: 7"), 7);
    }

    #[test]
    fn what_is_set_in_vain_and_what_nobody_knows_is_listed() {
        let notes =
            of("conntrack: {max: 5, maxPerCore: 0, tcpEstablishedTimeout: 24h0m0s, extra: 1}\noomScoreAdj: -999\n\
             iptables: {masqueradeAll: true, syncPeriod: 0s}\nipvs: {excludeCIDRs: [10.0.0.0/8]}\n\
             featureGates: {A: true}\nnewField: {a: 1}\nmode: ipvs\ndetectLocalMode: NodeCIDR\n")
            .notes;
        let sorted = |mut fields: Vec<String>| {
            fields.sort();
            fields.join(" ")
        };
        assert_eq!(sorted(notes.ignored), "conntrack.max featureGates ipvs.excludeCIDRs oomScoreAdj");
        assert_eq!(sorted(notes.unknown), "conntrack.extra newField");
        let different: Vec<_> = notes.different.into_iter().map(|(field, _)| field).collect();
        assert_eq!(different, ["detectLocalMode", "mode"]);
    }

    #[test]
    fn masquerading_all_is_asked_for_by_the_section_of_the_mode() {
        let asks = |text: &str| of(text).settings.get("masquerade-all").is_some();
        assert!(asks("iptables: {masqueradeAll: true}\n"));
        assert!(asks("mode: nftables\nnftables: {masqueradeAll: true}\n"));
        assert!(!asks("mode: nftables\niptables: {masqueradeAll: true}\n"));
        assert!(!asks("iptables: {masqueradeAll: false}\n"));
    }

    #[test]
    fn wrong_types_and_values_are_told_all_at_once() {
        let errors = of(
            "bindAddress: 7\nconntrack: {min: many, tcpCloseWaitTimeout: 60}\nipvs: {excludeCIDRs: a, syncPeriod: soon}\n\
             featureGates: {A: 1}\nnftables: true\nmode: userspace\ndetectLocalMode: x\niptables: {masqueradeAll: 'yes'}\n\
             nodePortAddresses: primary\nclientConnection: {kubeconfig: [a]}\n",
        )
        .errors;
        let mut texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
        texts.sort();
        let expected = [
            "f: bindAddress: a text is needed",
            "f: clientConnection.kubeconfig: a text is needed",
            "f: conntrack.min: a whole number is needed",
            "f: conntrack.tcpCloseWaitTimeout: a duration, such as 30s or 1h30m, is needed",
            "f: detectLocalMode: \"x\" is none of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix",
            "f: featureGates: an object with values true or false is needed",
            "f: iptables.masqueradeAll: true or false is needed",
            "f: ipvs.excludeCIDRs: a list of texts is needed",
            "f: ipvs.syncPeriod: a duration, such as 30s or 1h30m, is needed",
            "f: mode: \"userspace\" is none of iptables, ipvs, nftables",
            "f: nftables: an object is needed",
            "f: nodePortAddresses: a list of texts is needed",
        ];
        assert_eq!(texts, expected);
    }

    #[test]
    fn durations_are_those_of_go() {
        for text in ["0", "0s", "30s", "24h0m0s", "1h30m", "1.5h", "100ms", "-1s"] {
            assert!(parse_duration(text).is_some(), "{text}");
        }
        for text in ["", "soon", "30", "s"] {
            assert!(parse_duration(text).is_none(), "{text}");
        }
    }
}
