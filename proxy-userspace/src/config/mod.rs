//! The agent's configuration as it is used: every value valid, all errors found at once.
//!
//! May touch: the host's name. Looks at nothing else of the system; what must exist is found out by who uses it.

pub mod raw;

use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use ipnet::IpNet;
use proxy_common::abi::config::MAX_CIDRS;

use crate::datapath::device::Choice;
use crate::datapath::kernel::Sizes;
use crate::model::{Name, NodeFacts, NodePortAddresses};
use crate::source::kubernetes::access::{Access, Server};
use raw::{AgentFlags, HEALTHZ_PORT, LogFormat, METRICS_PORT, SocketLb, Switch};

/// What `shunt agent` is to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder of manifests.
    pub manifests: Option<PathBuf>,
    /// How the Kubernetes API is reached.
    pub kubernetes: Option<Access>,
    /// What configuration says of this node; addresses come from netlink.
    pub facts: NodeFacts,
    /// `--cgroup`; none: the root of cgroup2.
    pub cgroup: Option<PathBuf>,
    /// Whose sockets are translated.
    pub socket_lb: SocketLb,
    /// Which devices get programs.
    pub devices: Choice,
    /// Ports for rewritten sources.
    pub snat_ports: RangeInclusive<u16>,
    /// Capacities.
    pub sizes: Sizes,
    /// Pin directory.
    pub bpffs: PathBuf,
    /// Version of the tables' layout, if not this program's own.
    pub layout_version: Option<u32>,
    /// Admin socket.
    pub admin_socket: PathBuf,
    /// Where health is served.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// What is logged.
    pub log: Log,
    /// Touched when the first plan is applied.
    pub ready_file: Option<PathBuf>,
}

/// What is logged, and how.
#[derive(Clone, Debug)]
pub struct Log {
    /// `--log-level`, as tracing-subscriber's filter takes it.
    pub level: String,
    /// Form.
    pub format: LogFormat,
}

/// A flag that cannot be used, in words for the person who wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}: {message}")]
pub struct Error {
    /// Name of the flag.
    pub flag: &'static str,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// All flags that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Errors(pub Vec<Error>);

impl std::error::Error for Errors {}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

/// Collects errors, so that one run tells them all.
#[derive(Default)]
struct Check(Vec<Error>);

impl Check {
    /// The value, or a stand-in that is thrown away together with the error.
    fn take<T>(&mut self, flag: &'static str, value: Result<T, String>, stand_in: T) -> T {
        value.unwrap_or_else(|message| {
            self.0.push(Error { flag, message });
            stand_in
        })
    }

    fn refuse_if(&mut self, condition: bool, flag: &'static str, message: &str) {
        if condition {
            self.0.push(Error { flag, message: message.to_owned() });
        }
    }
}

impl Config {
    /// What the flags mean, or everything that is wrong with them.
    pub fn new(flags: AgentFlags) -> Result<Self, Errors> {
        let mut check = Check::default();
        let snat_ports = check.take("snat-ports", parse_ports(&flags.snat_ports), 1..=1);
        let facts = facts(&flags, &mut check);
        let sizes = Sizes { services: flags.max_services, backends: flags.max_backends, flows: flags.max_flows };
        check_sizes(&sizes, &mut check);
        let has_source = flags.manifests.is_some() || flags.kubernetes || flags.kubeconfig.is_some();
        let message = "no source of services is given; --kubeconfig and --kubernetes are others";
        check.refuse_if(!has_source, "manifests", message);
        let kubernetes = kubernetes(&flags, &mut check);
        check.refuse_if(
            flags.socket_lb == SocketLb::Off && flags.host_clients == Switch::On,
            "socket-lb",
            "off leaves this node's own processes without services; confirm with --host-clients off",
        );
        check.refuse_if(
            flags.socket_lb != SocketLb::Off && flags.host_clients == Switch::Off,
            "host-clients",
            "off needs --socket-lb off",
        );
        let healthz = parse_listener(&flags.healthz_bind_address, HEALTHZ_PORT);
        let healthz = check.take("healthz-bind-address", healthz, None);
        let metrics = parse_listener(&flags.metrics_bind_address, METRICS_PORT);
        let metrics = check.take("metrics-bind-address", metrics, None);
        let level = check_level(&flags.log_level);
        check.take("log-level", level, ());
        if !check.0.is_empty() {
            return Err(Errors(check.0));
        }
        Ok(Self {
            manifests: flags.manifests,
            kubernetes,
            facts,
            cgroup: flags.cgroup,
            socket_lb: flags.socket_lb,
            devices: Choice { only: flags.devices, except: flags.exclude_devices, xdp: flags.xdp },
            snat_ports,
            sizes,
            bpffs: flags.bpffs,
            layout_version: flags.layout_version,
            admin_socket: flags.admin_socket,
            healthz,
            metrics,
            log: Log { level: flags.log_level, format: flags.log_format },
            ready_file: flags.ready_file,
        })
    }
}

/// How the Kubernetes API is reached, if it is to be.
fn kubernetes(flags: &AgentFlags, check: &mut Check) -> Option<Access> {
    const NO_SERVER: &str = "is needed with --kubernetes: the address that every pod is given (KUBERNETES_SERVICE_HOST) is a \
        service that this agent has yet to program; give the one at which nodes reach the API server, such as \
        https://192.0.2.10:6443";
    let both = flags.kubernetes && flags.kubeconfig.is_some();
    check.refuse_if(both, "kubernetes", "uses the pod's service account, --kubeconfig another; give one of them");
    let neither = !flags.kubernetes && flags.kubeconfig.is_none();
    check.refuse_if(neither && flags.api_server.is_some(), "api-server", "needs --kubernetes or --kubeconfig");
    let server = flags.api_server.as_deref().map(Server::parse).transpose();
    let server = check.take("api-server", server, None);
    match (&flags.kubeconfig, server) {
        (Some(file), server) => Some(Access::Kubeconfig { file: file.clone(), server }),
        (None, Some(server)) => Some(Access::ServiceAccount { dir: flags.service_account.clone(), server }),
        (None, None) => {
            check.refuse_if(flags.kubernetes && flags.api_server.is_none(), "api-server", NO_SERVER);
            None
        }
    }
}

fn facts(flags: &AgentFlags, check: &mut Check) -> NodeFacts {
    let name = flags.node_name.clone().map_or_else(host_name, check_name);
    let name = check.take("node-name", name, String::new());
    let cluster_cidrs = check.take("cluster-cidr", parse_cidrs(&flags.cluster_cidr), Box::default());
    check.refuse_if(cluster_cidrs.len() > MAX_CIDRS, "cluster-cidr", "more than 8 prefixes do not fit");
    let node_ports = parse_node_ports(&flags.nodeport_addresses);
    let node_ports = check.take("nodeport-addresses", node_ports, NodePortAddresses::Primary);
    NodeFacts { cluster_cidrs, node_ports, ..NodeFacts::named(Name::from(name.as_str())) }
}

/// The host's name in lower case, as Kubernetes names nodes.
fn host_name() -> Result<String, String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname")
        .map_err(|error| format!("the host has no readable name ({error}); give one"))?;
    check_name(name.trim().to_lowercase())
}

fn check_name(name: String) -> Result<String, String> {
    if name.is_empty() { Err("a name cannot be empty".to_owned()) } else { Ok(name) }
}

fn parse_cidrs(texts: &[String]) -> Result<Box<[IpNet]>, String> {
    texts.iter().map(|text| parse_cidr(text)).collect()
}

fn parse_cidr(text: &str) -> Result<IpNet, String> {
    let net: IpNet = text.parse().map_err(|_| format!("{text:?} is no prefix, such as 10.244.0.0/16 or fd00::/48"))?;
    if net.trunc() != net {
        return Err(format!("{text} has bits beyond its length; {} is meant?", net.trunc()));
    }
    Ok(net)
}

fn parse_node_ports(texts: &[String]) -> Result<NodePortAddresses, String> {
    match texts {
        [text] if text == "primary" => Ok(NodePortAddresses::Primary),
        [text] if text == "all" => Ok(NodePortAddresses::All),
        texts if texts.iter().any(|text| text == "primary" || text == "all") => {
            Err("primary and all stand alone, without prefixes beside them".to_owned())
        }
        texts => parse_cidrs(texts).map(NodePortAddresses::Within),
    }
}

/// `A-B`, both included.
fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let usage = || format!("{text:?} is no range of ports, such as 10000-29999");
    let (first, last) = text.split_once('-').ok_or_else(usage)?;
    let number = |text: &str| text.trim().parse::<u16>().map_err(|_| usage());
    let (first, last) = (number(first)?, number(last)?);
    if first == 0 || first > last {
        return Err(usage());
    }
    if last - first < 63 {
        return Err(format!("{text}: fewer than 64 ports are too few"));
    }
    Ok(first..=last)
}

/// `ADDR:PORT`, or `ADDR` with the default port; nothing for an empty text.
fn parse_listener(text: &str, default_port: u16) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let without_port = bare.parse::<IpAddr>().ok().map(|addr| SocketAddr::new(addr, default_port));
    let address = text.parse().ok().or(without_port);
    let usage = format!("{text:?} is no address to listen on, such as 0.0.0.0:{default_port} or [::]:{default_port}");
    address.filter(|address| address.port() != 0).map(Some).ok_or(usage)
}

fn check_sizes(sizes: &Sizes, check: &mut Check) {
    /// What 32-bit positions and the kernel's maps bear, with room to spare.
    const LARGEST: u32 = 1 << 24;
    let flags = [("max-services", sizes.services), ("max-backends", sizes.backends), ("max-flows", sizes.flows)];
    for (flag, size) in flags {
        check.refuse_if(!(16..=LARGEST).contains(&size), flag, "a number from 16 to 16777216 is needed");
    }
}

fn check_level(text: &str) -> Result<(), String> {
    text.parse::<tracing_subscriber::filter::Targets>().map(drop).map_err(|error| format!("{text:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        flags: AgentFlags,
    }

    fn config(flags: &str) -> Result<Config, Vec<&'static str>> {
        let words = std::iter::once("agent").chain(flags.split_whitespace());
        let flags = Command::try_parse_from(words).unwrap().flags;
        Config::new(flags).map_err(|errors| errors.0.iter().map(|error| error.flag).collect())
    }

    #[test]
    fn defaults_are_usable() {
        let config = config("--manifests m").unwrap();
        assert_eq!(config.snat_ports, 10000..=29999);
        assert_eq!(config.facts.node_ports, NodePortAddresses::Primary);
        assert_eq!(config.bpffs, PathBuf::from("/sys/fs/bpf/shunt"));
        assert!(!config.facts.name.as_str().is_empty());
    }

    #[test]
    fn all_errors_are_told_at_once() {
        let wrong = "--cluster-cidr 10.0.0.1/8 --snat-ports 9-1 --max-flows 0 --nodeport-addresses all,10.0.0.0/8 \
                     --healthz-bind-address localhost:1 --metrics-bind-address 127.0.0.1:0 --log-level =;";
        let flags = config(wrong).unwrap_err();
        let expected = [
            "snat-ports",
            "cluster-cidr",
            "nodeport-addresses",
            "max-flows",
            "manifests",
            "healthz-bind-address",
            "metrics-bind-address",
            "log-level",
        ];
        assert_eq!(flags, expected);
    }

    #[test]
    fn the_api_server_is_never_guessed() {
        assert_eq!(config("--kubernetes").unwrap_err(), ["api-server"]);
        assert_eq!(config("--kubernetes --api-server ftp://a").unwrap_err(), ["api-server"]);
        assert_eq!(config("--manifests m --api-server 192.0.2.1:6443").unwrap_err(), ["api-server"]);
        assert_eq!(config("--kubernetes --kubeconfig f --api-server 192.0.2.1:6443").unwrap_err(), ["kubernetes"]);
        let server = || Server::parse("https://192.0.2.1:6443").unwrap();
        let access = config("--kubernetes --api-server 192.0.2.1:6443").unwrap().kubernetes;
        assert!(matches!(access, Some(Access::ServiceAccount { server: found, .. }) if found == server()));
        let access = config("--kubeconfig f").unwrap().kubernetes;
        assert_eq!(access, Some(Access::Kubeconfig { file: "f".into(), server: None }));
        let access = config("--kubeconfig f --api-server 192.0.2.1:6443").unwrap().kubernetes;
        assert_eq!(access, Some(Access::Kubeconfig { file: "f".into(), server: Some(server()) }));
        assert!(config("--manifests m").unwrap().kubernetes.is_none());
    }

    #[test]
    fn socket_lb_off_needs_a_confirmation() {
        assert_eq!(config("--manifests m --socket-lb off").unwrap_err(), ["socket-lb"]);
        assert_eq!(config("--manifests m --host-clients off").unwrap_err(), ["host-clients"]);
        assert!(config("--manifests m --socket-lb off --host-clients off").is_ok());
    }

    #[test]
    fn node_port_addresses() {
        let node_ports =
            |text: &str| config(&format!("--manifests m --nodeport-addresses {text}")).unwrap().facts.node_ports;
        assert_eq!(node_ports("all"), NodePortAddresses::All);
        let within = NodePortAddresses::Within(["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()].into());
        assert_eq!(node_ports("10.0.0.0/8,fd00::/8"), within);
    }

    #[test]
    fn listeners_have_default_ports_and_can_be_switched_off() {
        let listener = |text: &str| parse_listener(text, 10256).unwrap().map(|address| address.to_string());
        assert_eq!(listener("0.0.0.0:80").as_deref(), Some("0.0.0.0:80"));
        assert_eq!(listener("192.0.2.1").as_deref(), Some("192.0.2.1:10256"));
        for text in ["::", "[::]", "[::]:10256"] {
            assert_eq!(listener(text).as_deref(), Some("[::]:10256"), "{text}");
        }
        assert_eq!(listener(""), None);
        let defaults = config("--manifests m").unwrap();
        assert_eq!(defaults.healthz, Some(SocketAddr::from(([0, 0, 0, 0], HEALTHZ_PORT))));
        assert_eq!(defaults.metrics, Some(SocketAddr::from(([127, 0, 0, 1], METRICS_PORT))));
    }

    #[test]
    fn a_prefix_with_host_bits_is_refused_with_the_right_one() {
        assert_eq!(
            parse_cidr("10.1.0.0/8").unwrap_err(),
            "10.1.0.0/8 has bits beyond its length; 10.0.0.0/8 is meant?"
        );
    }
}
