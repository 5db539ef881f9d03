//! The agent's configuration as it is used: every value valid, all errors found at once.
//!
//! | module | holds |
//! |---|---|
//! | [`raw`] | the options of `shunt agent`, as text |
//! | [`setting`] | which of them are set, and where: command line or file |
//! | [`file`] | the configuration file, of our own kind |
//! | [`kube_proxy`] | kube-proxy's configuration, read as ours |
//!
//! May touch: its file, the host's name. Looks at nothing else of the system; what must exist is found out by who uses it.

pub mod file;
pub mod kube_proxy;
pub mod raw;
pub mod setting;

use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use jiff::SignedDuration;
use proxy_common::abi::config::MAX_CIDRS;

use crate::datapath::conntrack;
use crate::datapath::device::{Attach, Choice};
use crate::datapath::kernel::Sizes;
use crate::model::{Family, Name, NodeFacts, NodePortAddresses, NotAPolicy, PrimaryAddresses, StalePolicy};
use crate::source::decode::field::parse_unicast;
use crate::source::kubernetes::access::{Access, Server};
use file::Notes;
use raw::{AgentFlags, HEALTHZ_PORT, LogFormat, METRICS_PORT, PAGE_PORT, SocketLb, Switch};
use setting::{AgentArgs, Place, Settings};

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
    /// Backends see clients of a ClusterIP as this node.
    pub masquerade_all: bool,
    /// What becomes of TCP connections whose endpoint is gone, where the service says nothing.
    pub stale: StalePolicy,
    /// Which devices get programs.
    pub devices: Choice,
    /// How they get them.
    pub attach: Attach,
    /// What the kernel's connection tracking is set to.
    pub conntrack: conntrack::Wanted,
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
    /// Where the page for people is served.
    pub page: Option<SocketAddr>,
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

/// What cannot be used, in words for the person who wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {message}")]
pub struct Error {
    /// Where it is written.
    pub place: Place,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl Error {
    fn of_flag(flag: &str, message: String) -> Self {
        Self { place: Place::Flag(flag.to_owned()), message }
    }
}

/// All that cannot be used.
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
            self.0.push(Error::of_flag(flag, message));
            stand_in
        })
    }

    fn refuse_if(&mut self, condition: bool, flag: &'static str, message: &str) {
        if condition {
            self.0.push(Error::of_flag(flag, message.to_owned()));
        }
    }
}

/// A configuration, and what is to be told of the file it is from.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// To be told once there is a log.
    pub notes: Notes,
}

impl Loaded {
    /// What a command line means, with the file that it names, or everything that is wrong with either.
    pub fn load(args: AgentArgs) -> Result<Self, Errors> {
        let Some(file) = &args.flags.config else {
            return Ok(Self { config: Config::new(args.flags)?, notes: Notes::default() });
        };
        match fs::read_to_string(file) {
            Ok(text) => Self::parse(file, &text, args.typed),
            Err(error) => {
                let message = format!("cannot be read: {error}");
                Err(Errors(vec![Error { place: Place::File(file.clone()), message }]))
            }
        }
    }

    /// What the text of a file means together with what was typed, which wins.
    fn parse(file: &Path, text: &str, typed: Settings) -> Result<Self, Errors> {
        let mut content = file::parse(file, text).map_err(|error| Errors(vec![error]))?;
        let mut errors = content.errors;
        errors.extend(content.settings.take_errors());
        let settings = content.settings.overridden_by(typed);
        let flags = settings.flags().map_err(|error| {
            // Each by itself could be typed.
            Errors(vec![Error { place: Place::File(file.to_owned()), message: error.to_string() }])
        })?;
        match Config::new(flags) {
            Ok(config) if errors.is_empty() => return Ok(Self { config, notes: content.notes }),
            Ok(_) => {}
            Err(Errors(more)) => {
                // Beside fields that were left out because they are wrong, nothing can be said to be missing.
                let is_sure = |error: &Error| errors.is_empty() || is_set(error, &settings);
                let more: Vec<_> = more.into_iter().filter(is_sure).collect();
                errors.extend(more.into_iter().map(|error| where_it_is_set(error, &settings)));
            }
        }
        Err(Errors(errors))
    }
}

fn is_set(error: &Error, settings: &Settings) -> bool {
    matches!(&error.place, Place::Flag(flag) if settings.get(flag).is_some())
}

/// The error of a flag as one of the field that sets it, if that is so.
fn where_it_is_set(error: Error, settings: &Settings) -> Error {
    let setting = match &error.place {
        Place::Flag(flag) => settings.get(flag),
        Place::File(_) | Place::Field { .. } => None,
    };
    Error { place: setting.map_or(error.place, |setting| setting.place.clone()), message: error.message }
}

impl Config {
    /// What the flags mean, or everything that is wrong with them.
    pub fn new(flags: AgentFlags) -> Result<Self, Errors> {
        let mut check = Check::default();
        let snat_ports = check.take("snat-ports", parse_ports(&flags.snat_ports), 1..=1);
        let stale = flags.stale_connections.parse().map_err(|error: NotAPolicy| error.to_string());
        let stale = check.take("stale-connections", stale, StalePolicy::DEFAULT);
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
        let conntrack = conntrack(&flags, &mut check);
        let page = parse_listener(&flags.page_bind_address, PAGE_PORT);
        let page = check.take("page-bind-address", page, None);
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
            masquerade_all: flags.masquerade_all,
            stale,
            devices: Choice { only: flags.devices, except: flags.exclude_devices, xdp: flags.xdp },
            attach: flags.attach,
            conntrack,
            snat_ports,
            sizes,
            bpffs: flags.bpffs,
            layout_version: flags.layout_version,
            admin_socket: flags.admin_socket,
            healthz,
            metrics,
            page,
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
    let prescribed = check.take("node-ip", parse_node_ips(&flags.node_ip), PrimaryAddresses::default());
    NodeFacts { cluster_cidrs, node_ports, prescribed, ..NodeFacts::named(Name::from(name.as_str())) }
}

fn conntrack(flags: &AgentFlags, check: &mut Check) -> conntrack::Wanted {
    let mut time = |flag, text: &str| check.take(flag, parse_time(text), None);
    conntrack::Wanted {
        max_per_core: (flags.conntrack_max_per_core > 0).then_some(flags.conntrack_max_per_core),
        min: flags.conntrack_min,
        tcp_established: time("conntrack-tcp-timeout-established", &flags.conntrack_tcp_timeout_established),
        tcp_close_wait: time("conntrack-tcp-timeout-close-wait", &flags.conntrack_tcp_timeout_close_wait),
        tcp_be_liberal: flags.conntrack_tcp_be_liberal,
        udp: time("conntrack-udp-timeout", &flags.conntrack_udp_timeout),
        udp_stream: time("conntrack-udp-timeout-stream", &flags.conntrack_udp_timeout_stream),
    }
}

/// A time in whole seconds; none if it is zero.
fn parse_time(text: &str) -> Result<Option<Duration>, String> {
    let wrong = || format!("{text:?} is no time in whole seconds, such as 30s or 1h30m");
    let time = if text == "0" { SignedDuration::ZERO } else { text.parse().map_err(|_| wrong())? };
    let whole = u64::try_from(time.as_secs()).ok().filter(|_| time.subsec_nanos() == 0);
    let seconds = whole.filter(|seconds| *seconds <= u64::from(u32::MAX >> 1)).ok_or_else(wrong)?;
    Ok((seconds > 0).then_some(Duration::from_secs(seconds)))
}

fn parse_node_ips(texts: &[String]) -> Result<PrimaryAddresses, String> {
    let mut found = PrimaryAddresses::default();
    for text in texts {
        let addr = parse_unicast(text)?;
        let of_family = match Family::of(&addr) {
            Family::V4 => &mut found.v4,
            Family::V6 => &mut found.v6,
        };
        if of_family.replace(addr).is_some() {
            return Err("a node has one primary address of each family".to_owned());
        }
    }
    Ok(found)
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
    use clap::{Args as _, FromArgMatches as _};

    fn config(flags: &str) -> Result<Config, Vec<String>> {
        Config::new(AgentFlags::parse_words(flags)).map_err(|errors| errors.0.into_iter().map(name).collect())
    }

    fn name(error: Error) -> String {
        error.place.to_string().trim_start_matches("--").to_owned()
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
                     --healthz-bind-address localhost:1 --metrics-bind-address 127.0.0.1:0 --log-level =; \
                     --stale-connections never";
        let flags = config(wrong).unwrap_err();
        let expected = [
            "snat-ports",
            "stale-connections",
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
    fn the_means_of_attachment_is_typed_or_written() {
        let file = format!("{OWN}manifests: m\nattach: clsact\n");
        assert_eq!(load(&file, "").unwrap().config.attach, Attach::Clsact);
        assert_eq!(load(&file, "--attach tcx").unwrap().config.attach, Attach::Tcx);
        assert_eq!(config("--manifests m").unwrap().attach, Attach::Auto);
        assert_eq!(load(&file.replace("clsact", "xdp"), "").unwrap_err().len(), 1);
    }

    #[test]
    fn socket_lb_off_needs_a_confirmation() {
        assert_eq!(config("--manifests m --socket-lb off").unwrap_err(), ["socket-lb"]);
        assert_eq!(config("--manifests m --host-clients off").unwrap_err(), ["host-clients"]);
        assert!(config("--manifests m --socket-lb off --host-clients off").is_ok());
    }

    #[test]
    fn stale_connections_are_reset_after_a_while_unless_it_is_said_otherwise() {
        assert_eq!(config("--manifests m").unwrap().stale, StalePolicy::DEFAULT);
        let policy = |text: &str| config(&format!("--manifests m --stale-connections {text}")).unwrap().stale;
        assert_eq!(policy("keep"), StalePolicy::Keep);
        assert_eq!(policy("reset-after=5m"), StalePolicy::ResetAfter(std::time::Duration::from_secs(300)));
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
        assert_eq!(defaults.page, Some(SocketAddr::from(([127, 0, 0, 1], PAGE_PORT))));
        assert_eq!(defaults.metrics, Some(SocketAddr::from(([127, 0, 0, 1], METRICS_PORT))));
    }

    #[test]
    fn a_prefix_with_host_bits_is_refused_with_the_right_one() {
        assert_eq!(
            parse_cidr("10.1.0.0/8").unwrap_err(),
            "10.1.0.0/8 has bits beyond its length; 10.0.0.0/8 is meant?"
        );
    }

    /// What a file and a command line mean together, or the lines of what is wrong.
    fn load(file: &str, typed: &str) -> Result<Loaded, Vec<String>> {
        let command = AgentArgs::augment_args(clap::Command::new("agent").no_binary_name(true));
        let matches = command.try_get_matches_from(typed.split_whitespace()).unwrap();
        let typed = AgentArgs::from_arg_matches(&matches).unwrap().typed;
        Loaded::parse(Path::new("f"), file, typed).map_err(|errors| errors.0.iter().map(ToString::to_string).collect())
    }

    const OWN: &str = "apiVersion: shunt/v1alpha1\nkind: AgentConfiguration\n";
    const KUBE_PROXY: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    #[test]
    fn a_file_is_enough_and_what_is_typed_wins() {
        let file = format!("{OWN}manifests: m\nnodeName: a\nclusterCidr: [10.0.0.0/8]\nlogLevel: debug\n");
        let config = load(&file, "").unwrap().config;
        assert_eq!((config.facts.name.as_str(), config.log.level.as_str()), ("a", "debug"));
        let config = load(&file, "--node-name b --cluster-cidr fd00::/8 --log-level info").unwrap().config;
        assert_eq!((config.facts.name.as_str(), config.log.level.as_str()), ("b", "info"));
        assert_eq!(config.facts.cluster_cidrs, ["fd00::/8".parse().unwrap()].into());
        assert_eq!(config.manifests, Some("m".into()));
    }

    #[test]
    fn the_configuration_of_kube_proxy_is_enough() {
        let file = format!("{KUBE_PROXY}clientConnection: {{kubeconfig: /k}}\nbindAddress: 'fd00::7'\nmode: ipvs\n");
        let Loaded { config, notes } = load(&file, "").unwrap();
        assert_eq!(config.kubernetes, Some(Access::Kubeconfig { file: "/k".into(), server: None }));
        assert_eq!(config.facts.prescribed.v6, Some(parse_unicast("fd00::7").unwrap()));
        assert_eq!(config.metrics, Some("[::1]:10249".parse().unwrap()));
        assert_eq!(notes.different.len(), 1);
        // In the cluster, with the server that kube-proxy's --master would name.
        let file = format!("{KUBE_PROXY}clientConnection: {{kubeconfig: ''}}\n");
        let [error] = &load(&file, "").unwrap_err()[..] else { panic!("one error is expected") };
        assert!(error.starts_with("--api-server: is needed"), "{error}");
        let config = load(&file, "--api-server 192.0.2.1:6443 --hostname-override a").unwrap().config;
        assert!(matches!(config.kubernetes, Some(Access::ServiceAccount { .. })));
        assert_eq!(config.facts.name.as_str(), "a");
    }

    #[test]
    fn errors_name_what_was_written_and_nothing_that_follows_from_them() {
        let file = format!(
            "{KUBE_PROXY}clientConnection: {{kubeconfig: 1}}\nclusterCIDR: 10.0.0.0\nbindAddress: 127.0.0.1\n\
             healthzBindAddress: localhost:1\nmetricsBindAddress: 127.0.0.1:70000\nnodePortAddresses: [primary, 10.0.0.0/8]\n"
        );
        let mut errors = load(&file, "--snat-ports 9-1").unwrap_err();
        errors.sort();
        let places: Vec<_> = errors.iter().map(|error| error.rsplit_once(": ").unwrap().0).collect();
        let expected = [
            "--snat-ports",
            "f: bindAddress",
            "f: clientConnection.kubeconfig",
            "f: clusterCIDR",
            "f: healthzBindAddress",
            "f: metricsBindAddress",
            "f: nodePortAddresses",
        ];
        assert_eq!(places, expected, "{errors:?}");
        // What is typed over is not asked any more.
        let file = format!("{OWN}manifests: m\nclusterCidr: x\n");
        assert_eq!(load(&file, "").unwrap_err().len(), 1);
        assert!(load(&file, "--cluster-cidr 10.0.0.0/8").is_ok());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let command = AgentArgs::augment_args(clap::Command::new("agent").no_binary_name(true));
        let matches = command.try_get_matches_from(["--config", "/no/such/file"]).unwrap();
        let errors = Loaded::load(AgentArgs::from_arg_matches(&matches).unwrap()).unwrap_err();
        assert!(errors.to_string().starts_with("/no/such/file: cannot be read: No such file"), "{errors}");
    }

    #[test]
    fn the_example_is_usable() {
        let example = include_str!("../../../examples/agent.yaml");
        assert!(load(example, "").is_ok());
        assert!(load(&example.replace("# kubeconfig:", "kubeconfig:"), "").is_ok());
    }

    #[test]
    fn times_are_whole_seconds() {
        for (text, seconds) in [("0", 0), ("0s", 0), ("24h0m0s", 86_400), ("1h30m", 5400), ("60s", 60)] {
            assert_eq!(parse_time(text), Ok((seconds > 0).then_some(Duration::from_secs(seconds))), "{text}");
        }
        for text in ["", "soon", "-1s", "100ms", "1.5s", "99999999h"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
        assert_eq!(config("--manifests m --conntrack-udp-timeout x").unwrap_err(), ["conntrack-udp-timeout"]);
        let wanted = config("--manifests m --conntrack-min 5 --conntrack-tcp-be-liberal").unwrap().conntrack;
        assert_eq!(wanted, conntrack::Wanted { min: 5, tcp_be_liberal: true, ..conntrack::Wanted::default() });
    }

    #[test]
    fn a_node_has_one_primary_address_of_each_family() {
        let prescribed = config("--manifests m --node-ip fd00::1,192.0.2.1").unwrap().facts.prescribed;
        assert_eq!(prescribed.v4, Some(parse_unicast("192.0.2.1").unwrap()));
        assert_eq!(prescribed.v6, Some(parse_unicast("fd00::1").unwrap()));
        assert_eq!(config("--manifests m --node-ip 192.0.2.1,192.0.2.2").unwrap_err(), ["node-ip"]);
        assert_eq!(config("--manifests m --node-ip 0.0.0.0").unwrap_err(), ["node-ip"]);
    }
}
