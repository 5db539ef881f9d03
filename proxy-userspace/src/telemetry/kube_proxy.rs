//! What tools ask kube-proxy for on its metrics address: `/metrics`, `/proxyMode`, `/configz`, `/healthz`.
//!
//! `/proxyMode` says `nftables`. Tools know kube-proxy's three modes and nothing else, and ask in order to know how services
//! behave, which differs by mode; where it does, this proxy does as the mode `nftables`: an unknown port of a ClusterIP is
//! rejected, an unallocated service address dropped, NodePorts are served on the primary addresses unless other ones are
//! asked for. A fourth word would make tools skip what works, or fail. Who wants to know who is there finds `shunt_` metrics
//! beside.
//!
//! `/configz` is the effective configuration as a KubeProxyConfiguration, with the fields that mean something here; which
//! others there are, and their defaults, is no business of this proxy. Pure, but for the metrics.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use hyper::StatusCode;
use ipnet::IpNet;
use serde::Serialize;

use super::http::{Answer, Handler, Question};
use super::metrics::Metrics;
use crate::config::Config;
use crate::config::raw::LogFormat;
use crate::datapath::conntrack;
use crate::model::{NodePortAddresses, PrimaryAddresses};
use crate::source::kubernetes::access::Access;

/// The mode of kube-proxy that services behave as in.
const MODE: &str = "nftables";
/// All addresses of both families, for which kube-proxy has no word.
const EVERYWHERE: [&str; 2] = ["0.0.0.0/0", "::/0"];

const PATHS: [&str; 4] = ["/metrics", "/proxyMode", "/configz", "/healthz"];

/// All components of Kubernetes have one such object, and this is kube-proxy's key in it.
#[derive(Serialize)]
struct Configz {
    #[serde(rename = "kubeproxy.config.k8s.io")]
    kube_proxy: Configuration,
}

/// `KubeProxyConfiguration` of kubeproxy.config.k8s.io/v1alpha1.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Configuration {
    kind: &'static str,
    api_version: &'static str,
    mode: &'static str,
    hostname_override: String,
    bind_address: String,
    client_connection: ClientConnection,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: String,
    detect_local_mode: &'static str,
    node_port_addresses: Vec<String>,
    healthz_bind_address: String,
    metrics_bind_address: String,
    bind_address_hard_fail: bool,
    conntrack: Conntrack,
    logging: Logging,
}

#[derive(Serialize)]
struct ClientConnection {
    kubeconfig: String,
}

/// Where it is zero, the kernel's own limits are left alone. Without it, readers would take kube-proxy's defaults for set.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Conntrack {
    max_per_core: u32,
    min: u32,
    tcp_established_timeout: String,
    tcp_close_wait_timeout: String,
    tcp_be_liberal: bool,
    udp_timeout: String,
    udp_stream_timeout: String,
}

impl Conntrack {
    fn new(wanted: &conntrack::Wanted) -> Self {
        let time = |time: Option<Duration>| format!("{}s", time.map_or(0, |time| time.as_secs()));
        Self {
            max_per_core: wanted.max_per_core.unwrap_or(0),
            min: wanted.min,
            tcp_established_timeout: time(wanted.tcp_established),
            tcp_close_wait_timeout: time(wanted.tcp_close_wait),
            tcp_be_liberal: wanted.tcp_be_liberal,
            udp_timeout: time(wanted.udp),
            udp_stream_timeout: time(wanted.udp_stream),
        }
    }
}

#[derive(Serialize)]
struct Logging {
    format: &'static str,
}

impl Configuration {
    fn new(config: &Config) -> Self {
        let kubeconfig = match &config.kubernetes {
            Some(Access::Kubeconfig { file, .. }) => file.display().to_string(),
            Some(Access::ServiceAccount { .. }) | None => String::new(),
        };
        let cluster_cidrs: Vec<_> = texts(&config.facts.cluster_cidrs).collect();
        let address = |address: Option<SocketAddr>| address.map(|address| address.to_string()).unwrap_or_default();
        Self {
            kind: "KubeProxyConfiguration",
            api_version: "kubeproxy.config.k8s.io/v1alpha1",
            mode: MODE,
            hostname_override: config.facts.name.to_string(),
            bind_address: bind_address(&config.facts.prescribed),
            client_connection: ClientConnection { kubeconfig },
            cluster_cidr: cluster_cidrs.join(","),
            detect_local_mode: "ClusterCIDR",
            node_port_addresses: node_port_addresses(&config.facts.node_ports),
            healthz_bind_address: address(config.healthz),
            metrics_bind_address: address(config.metrics),
            bind_address_hard_fail: false,
            conntrack: Conntrack::new(&config.conntrack),
            logging: Logging {
                format: match config.log.format {
                    LogFormat::Text => "text",
                    LogFormat::Json => "json",
                },
            },
        }
    }
}

/// Which primary address is prescribed; with one of each family, that of IPv4. The wildcard prescribes none.
fn bind_address(prescribed: &PrimaryAddresses) -> String {
    prescribed.v4.or(prescribed.v6).map_or_else(|| Ipv4Addr::UNSPECIFIED.to_string(), |addr| addr.to_string())
}

fn texts(prefixes: &[IpNet]) -> impl Iterator<Item = String> {
    prefixes.iter().map(ToString::to_string)
}

fn node_port_addresses(addresses: &NodePortAddresses) -> Vec<String> {
    match addresses {
        NodePortAddresses::Primary => vec!["primary".to_owned()],
        NodePortAddresses::All => EVERYWHERE.map(str::to_owned).into(),
        NodePortAddresses::Within(prefixes) => texts(prefixes).collect(),
    }
}

/// Answers on the metrics address.
#[derive(Debug)]
pub struct Pages {
    metrics: Metrics,
    configz: String,
}

impl Pages {
    /// Of an agent with this configuration.
    pub fn new(metrics: Metrics, config: &Config) -> Self {
        let configz = Configz { kube_proxy: Configuration::new(config) };
        let configz = serde_json::to_string(&configz).expect("strings, numbers and booleans have a JSON form");
        Self { metrics, configz }
    }
}

impl Handler for Pages {
    async fn answer(&self, question: Question<'_>) -> Answer {
        match question.path {
            "/metrics" => self.metrics.answer(question.accept).await,
            "/proxyMode" => Answer::text(StatusCode::OK, MODE),
            "/configz" => Answer::json(StatusCode::OK, self.configz.clone()),
            "/healthz" => Answer::text(StatusCode::OK, "ok"),
            _ => Answer::not_found(&PATHS),
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;
    use serde_json::{Value, json};

    use super::*;
    use crate::config::raw::AgentFlags;

    fn pages(flags: &str) -> Pages {
        Pages::new(Metrics::new(Registry::default()), &Config::new(AgentFlags::parse_words(flags)).unwrap())
    }

    async fn ask(pages: &Pages, path: &str) -> (u16, &'static str, String) {
        let answer = pages.answer(Question { path, ..Question::default() }).await;
        (answer.status.as_u16(), answer.content_type, answer.body)
    }

    #[tokio::test]
    async fn pages_are_those_of_kube_proxy() {
        let pages = pages("--manifests m");
        let text = "text/plain; charset=utf-8";
        assert_eq!(ask(&pages, "/proxyMode").await, (200, text, "nftables".into()));
        assert_eq!(ask(&pages, "/healthz").await, (200, text, "ok".into()));
        assert_eq!(ask(&pages, "/metrics").await.0, 200);
        assert_eq!(ask(&pages, "/configz").await.1, "application/json");
        let (status, _, body) = ask(&pages, "/").await;
        assert_eq!((status, body.as_str()), (404, "nothing is here; there is /metrics /proxyMode /configz /healthz\n"));
    }

    async fn configz(flags: &str) -> Value {
        let whole: Value = serde_json::from_str(&ask(&pages(flags), "/configz").await.2).unwrap();
        assert_eq!(whole.as_object().unwrap().len(), 1);
        whole["kubeproxy.config.k8s.io"].clone()
    }

    #[tokio::test]
    async fn the_effective_configuration_is_told_in_the_words_of_kube_proxy() {
        let flags = "--kubeconfig /etc/k --node-name node-a --cluster-cidr 10.244.0.0/16,fd00::/56 --log-format json \
                     --nodeport-addresses 192.0.2.0/24 --node-ip 192.0.2.7,fd00::7 --healthz-bind-address [::] --metrics-bind-address=";
        let expected = json!({
            "kind": "KubeProxyConfiguration",
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "mode": "nftables",
            "hostnameOverride": "node-a",
            "bindAddress": "192.0.2.7",
            "clientConnection": {"kubeconfig": "/etc/k"},
            "clusterCIDR": "10.244.0.0/16,fd00::/56",
            "detectLocalMode": "ClusterCIDR",
            "nodePortAddresses": ["192.0.2.0/24"],
            "healthzBindAddress": "[::]:10256",
            "metricsBindAddress": "",
            "bindAddressHardFail": false,
            "conntrack": {
                "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
                "tcpBeLiberal": false, "udpTimeout": "0s", "udpStreamTimeout": "0s",
            },
            "logging": {"format": "json"},
        });
        assert_eq!(configz(flags).await, expected);
        let addresses = async |choice: &str| {
            configz(&format!("--manifests m --nodeport-addresses {choice}")).await["nodePortAddresses"].clone()
        };
        assert_eq!(addresses("primary").await, json!(["primary"]));
        assert_eq!(addresses("all").await, json!(["0.0.0.0/0", "::/0"]));
    }
}
