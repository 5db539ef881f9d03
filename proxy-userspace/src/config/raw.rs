//! The agent's configuration as it is written: flags, as text. What they mean, and whether they fit, is [`super::Config`]'s affair.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::datapath::device::{Attach, Xdp};
use crate::source::kubernetes::access::SERVICE_ACCOUNT;

/// Where `--bpffs` is by default.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf/shunt";

/// Where `--admin-socket` is by default.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/shunt/agent.sock";

/// Port of `--healthz-bind-address` if it names none; what cloud load balancers probe on a Kubernetes node.
pub const HEALTHZ_PORT: u16 = 10256;

/// Port of `--page-bind-address` if it names none.
pub const PAGE_PORT: u16 = 10247;

/// Port of `--metrics-bind-address` if it names none.
pub const METRICS_PORT: u16 = 10249;

/// Flags of `shunt agent`.
#[derive(Clone, Debug, Args)]
pub struct AgentFlags {
    /// Read options from this file: kube-proxy's configuration as it is, or one of Shunt
    ///
    /// An option that is typed wins over the file, the file over the default: `--config FILE --log-level debug` takes all but
    /// the level from FILE. --kubernetes and --kubeconfig are one choice in this. A list that is typed replaces the file's. What
    /// is in effect is shown by /configz on the metrics address. The file is read once, at start.
    ///
    /// YAML or JSON. An AgentConfiguration of shunt/v1alpha1 has a field for each option here, by its name in camel case
    /// (`nodeName`, `socketLb`); lists are lists; an unknown field is an error. `shunt example config` prints one.
    ///
    /// A KubeProxyConfiguration of kubeproxy.config.k8s.io/v1alpha1, as in kubeadm's ConfigMap `kube-proxy`, makes the
    /// Kubernetes API a source: by clientConnection.kubeconfig or, if that is empty, as --kubernetes. Read are also bindAddress
    /// (as --node-ip; in IPv6 it moves the defaults of the next two to IPv6), healthzBindAddress, metricsBindAddress, clusterCIDR,
    /// hostnameOverride, nodePortAddresses, conntrack and logging.format. Null, zero and empty are the default, which for
    /// nodePortAddresses is all addresses as in kube-proxy, or the primary ones in mode nftables. Apart from that, services
    /// behave as in mode nftables, whatever `mode` says; of detectLocalMode there is ClusterCIDR only. Null in conntrack leaves
    /// the kernel as it is. What else is set there is logged once, as ignored or unknown.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Read services from a folder of Kubernetes YAML or JSON, and follow its changes
    ///
    /// Kinds: Service with EndpointSlice or Endpoints, Node, ServiceCIDR. Multi-document files, Lists and atomic symlink
    /// swaps are fine. `shunt example` prints a file to start from.
    #[arg(long, value_name = "DIR", help_heading = "Sources")]
    pub manifests: Option<PathBuf>,

    /// Read services from the Kubernetes API with this pod's service account; needs --api-server
    ///
    /// What the stock role system:node-proxier allows is enough.
    #[arg(long, help_heading = "Sources")]
    pub kubernetes: bool,

    /// Read services from the Kubernetes API with the current context of this kubeconfig
    #[arg(long, value_name = "FILE", help_heading = "Sources")]
    pub kubeconfig: Option<PathBuf>,

    /// Where nodes reach the Kubernetes API; with --kubeconfig, in place of the server it names
    ///
    /// Never the ClusterIP of the service `kubernetes` (KUBERNETES_SERVICE_HOST): this agent has yet to program it.
    #[arg(long, value_name = "URL", help_heading = "Sources")]
    pub api_server: Option<String>,

    /// Directory of the service account's token and ca.crt
    #[arg(long, value_name = "DIR", hide = true, default_value = SERVICE_ACCOUNT)]
    pub service_account: PathBuf,

    /// Name of this node in the sources [default: the host name in lower case]
    ///
    /// Endpoints with this node name are local: what traffic policy Local and topology hints speak of.
    #[arg(long, value_name = "NAME", visible_alias = "hostname-override", help_heading = "Node")]
    pub node_name: Option<String>,

    /// Primary address of this node, one of each family [default: as the Node object says, else as routes say]
    ///
    /// It answers NodePorts where --nodeport-addresses is `primary`.
    #[arg(long, value_name = "ADDR", value_delimiter = ',', help_heading = "Node")]
    pub node_ip: Vec<String>,

    /// Where pods have their addresses; at most 8 prefixes
    ///
    /// Clients in it count as inside the cluster: they keep their source address towards a ClusterIP, and external
    /// traffic policy Local does not bind them. Without it only this node's own addresses are inside.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', help_heading = "Node")]
    pub cluster_cidr: Vec<String>,

    /// Backends see every client of a ClusterIP as this node, clients inside the cluster too
    ///
    /// For networks in which a backend's answer to a client would not come back by the way the question took. Sockets of pods
    /// are then left to the packet path, which alone rewrites sources.
    #[arg(long, help_heading = "Node")]
    pub masquerade_all: bool,

    /// Which addresses of this node answer NodePorts: primary, all, or prefixes
    ///
    /// `primary` is the node's main address of each family, `all` every one. On loopback they answer this node's own
    /// processes in any case. The health of single services (healthCheckNodePort) is served there too.
    ///
    /// The kernel gives NodePorts to no socket that leaves the choice to it (net.ipv4.ip_local_reserved_ports). A process that
    /// asks for one by number gets it, as under kube-proxy, and so does a pod's hostPort: clients from outside reach the
    /// service, and `shunt status` names both.
    #[arg(
        long,
        value_name = "primary|all|CIDR",
        value_delimiter = ',',
        default_value = "primary",
        help_heading = "Node"
    )]
    pub nodeport_addresses: Vec<String>,

    /// Control group whose processes get their connections translated at connect [default: the root of cgroup2]
    #[arg(long, value_name = "DIR", help_heading = "Datapath")]
    pub cgroup: Option<PathBuf>,

    /// Whose sockets are translated: all, those of the node's own network namespace, or none
    ///
    /// Packets are translated in any case; a socket that is translated saves its packets from it. `off` leaves the node's
    /// own processes without services, so it must be confirmed by `--host-clients off`.
    #[arg(long, value_enum, default_value_t, help_heading = "Datapath")]
    pub socket_lb: SocketLb,

    /// Whether the node's own processes reach services
    #[arg(long, value_enum, default_value_t, help_heading = "Datapath")]
    pub host_clients: Switch,

    /// Only these devices get programs; * and ? are wildcards
    #[arg(long, value_name = "GLOB", value_delimiter = ',', help_heading = "Datapath")]
    pub devices: Vec<String>,

    /// These devices get no programs; * and ? are wildcards
    #[arg(long, value_name = "GLOB", value_delimiter = ',', help_heading = "Datapath")]
    pub exclude_devices: Vec<String>,

    /// How programs are attached to devices
    ///
    /// tcx: by links, which leave what others attach alone and which nobody can remove by accident. It needs Linux 6.6.
    ///
    /// clsact: by filters named shunt:* (`tc filter show dev DEV ingress`), before all others on the way in and after them on
    /// the way out. A filter before them that passes a packet for good (TC_ACT_OK) hides it from the others, on the way out
    /// from Shunt. A device with a qdisc `ingress`, in whose place clsact would have to be, is not served. Not for two agents
    /// in one network namespace: the later one takes the filters of the first.
    ///
    /// A change takes effect at the next start; connections go on. `shunt cleanup` removes filters, and the qdiscs that the
    /// agent made unless somebody else has come to use them.
    #[arg(long, value_enum, default_value_t, help_heading = "Datapath")]
    pub attach: Attach,

    /// Which devices also run a program before the kernel makes a packet of a frame
    ///
    /// It translates the segments of established TCP connections and, on hardware, resets connections to services without
    /// endpoints; everything else, and all of it where the program does not run, is done by the programs behind it. It is
    /// attached in the driver, never by the kernel's generic mode. A device that refuses it, or that runs another XDP
    /// program, is left as it is; `shunt status` names it.
    ///
    /// Off by default: many drivers reset their queues when an XDP program comes or goes, and switch off offloads that merge
    /// segments (LRO, hardware GRO), which costs bulk traffic more than the program saves.
    ///
    /// A veth or tap as uplink (`native`): the far end must complete checksums itself (`ethtool -K DEV tx off`). XDP cannot know
    /// that a checksum is left to the device; a translated packet would leave this node with a wrong one.
    #[arg(long, value_enum, default_value_t, help_heading = "Datapath")]
    pub xdp: Xdp,

    /// Ports for rewritten sources; kept free of local sockets by net.ipv4.ip_local_reserved_ports
    ///
    /// In a container that cannot write /proc/sys, the node's is used through /host/proc/sys/net.
    #[arg(long, value_name = "A-B", default_value = "10000-29999", help_heading = "Datapath")]
    pub snat_ports: String,

    /// What becomes of TCP connections whose endpoint is gone: keep, reset, or reset-after=TIME
    ///
    /// An endpoint is gone when no source lists it any more, or when the address and port that the client dialled are no longer
    /// the service's (it was deleted, or has another ClusterIP or port). One that is listed as terminating or as not ready is
    /// not gone: its connections drain. With `reset-after=30s` a connection is reset when its endpoint has been gone for 30
    /// seconds, with `reset` at once, with `keep` never: then it lives for as long as both ends do, or hangs until the kernel
    /// gives up. The client's next call on the socket fails with ECONNABORTED. A service says for itself what it wants by the
    /// annotation `shunt/stale-connections`, with the same words.
    ///
    /// UDP does not wait: datagrams go to another endpoint at once. A UDP socket that was connected to the service is closed
    /// within two seconds: receiving and polling fail once with ECONNABORTED, sending fails with EDESTADDRREQ until the socket is
    /// connected anew.
    ///
    /// Only sockets that dialled the service itself are touched, in all network namespaces that a process of /proc is in.
    #[arg(long, value_name = "POLICY", default_value = "reset-after=30s", help_heading = "Datapath")]
    pub stale_connections: String,

    /// Service ports that fit: one for each port, protocol and family of a service
    #[arg(long, value_name = "N", default_value_t = 16_384, help_heading = "Datapath")]
    pub max_services: u32,

    /// Backends that fit: an address, port and protocol counts once, however many services use it
    #[arg(long, value_name = "N", default_value_t = 131_072, help_heading = "Datapath")]
    pub max_backends: u32,

    /// Connections by packets that fit; those of translated sockets take no room
    #[arg(long, value_name = "N", default_value_t = 262_144, help_heading = "Datapath")]
    pub max_flows: u32,

    /// Connections that the kernel tracks at most, for each CPU; 0: as it is
    ///
    /// Sets nf_conntrack_max, and the size of its hash table if that is too small for it. This and the options that follow are
    /// kube-proxy's. They are for what else uses connection tracking on this node: Shunt does not, nor does it switch it on.
    /// What cannot be set is logged.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Connection tracking")]
    pub conntrack_max_per_core: u32,

    /// Connections at least, however few CPUs; counts with --conntrack-max-per-core
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Connection tracking")]
    pub conntrack_min: u32,

    /// How long the kernel keeps a silent TCP connection, such as 24h; 0s: as it is
    ///
    /// Times below those for which Shunt keeps its own flows (23 h, 1 h half closed, 110 s for datagrams that are answered,
    /// 28 s for others) are set, with a warning.
    #[arg(long, value_name = "TIME", default_value = "0s", help_heading = "Connection tracking")]
    pub conntrack_tcp_timeout_established: String,

    /// How long the kernel keeps a TCP connection that one side has closed; 0s: as it is
    #[arg(long, value_name = "TIME", default_value = "0s", help_heading = "Connection tracking")]
    pub conntrack_tcp_timeout_close_wait: String,

    /// Let the kernel take segments outside of the window for valid
    #[arg(long, help_heading = "Connection tracking")]
    pub conntrack_tcp_be_liberal: bool,

    /// How long the kernel keeps datagrams without answer; 0s: as it is
    #[arg(long, value_name = "TIME", default_value = "0s", help_heading = "Connection tracking")]
    pub conntrack_udp_timeout: String,

    /// How long the kernel keeps datagrams with answers; 0s: as it is
    #[arg(long, value_name = "TIME", default_value = "0s", help_heading = "Connection tracking")]
    pub conntrack_udp_timeout_stream: String,

    /// Where programs, tables and attachments are pinned; a BPF file system is mounted if there is none
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS, help_heading = "Datapath")]
    pub bpffs: PathBuf,

    /// Call the layout of the tables by this version, for tests of what happens when the version changes
    #[arg(long, value_name = "N", hide = true)]
    pub layout_version: Option<u32>,

    /// Where `shunt status` asks the agent; for root only
    #[arg(long, value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET, help_heading = "Serving")]
    pub admin_socket: PathBuf,

    /// Where /healthz, /livez and /readyz are served; empty: nowhere
    ///
    /// /healthz is for load balancers: 503 also before the first full load, and when this node is about to be deleted or
    /// its cluster does not know it. /livez is for who restarts the agent, /readyz for who rolls it out.
    ///
    /// An address without a port gets 10256. An address that is in use is tried again every 5 seconds.
    #[arg(long, value_name = "ADDR[:PORT]", default_value = "0.0.0.0:10256", help_heading = "Serving")]
    pub healthz_bind_address: String,

    /// Where /metrics is served, as Prometheus reads it; empty: nowhere
    ///
    /// With what tools ask kube-proxy for there: /proxyMode (`nftables`, whose behaviour services have here), /configz (the
    /// effective configuration as a KubeProxyConfiguration) and /healthz.
    ///
    /// An address without a port gets 10249. An address that is in use is tried again every 5 seconds.
    #[arg(long, value_name = "ADDR[:PORT]", default_value = "127.0.0.1:10249", help_heading = "Serving")]
    pub metrics_bind_address: String,

    /// Where a page for people is served, with services, backends, rates, errors and recent changes; empty: nowhere
    ///
    /// Open http://127.0.0.1:10247/ in a browser on this node, or through `ssh -L 10247:127.0.0.1:10247 NODE`. It is read
    /// only and asks nobody who reads it; questions under a name that is neither an address nor localhost are refused.
    ///
    /// An address without a port gets 10247. An address that is in use is tried again every 5 seconds.
    #[arg(long, value_name = "ADDR[:PORT]", default_value = "127.0.0.1:10247", help_heading = "Serving")]
    pub page_bind_address: String,

    /// What is logged: error, warn, info, debug, trace, or directives as MODULE=LEVEL, separated by commas
    #[arg(long, value_name = "LEVEL", default_value = "info", help_heading = "Logging")]
    pub log_level: String,

    /// Form of the log on standard error
    #[arg(long, value_enum, default_value_t, help_heading = "Logging")]
    pub log_format: LogFormat,

    /// Touch this file when the first plan is applied
    #[arg(long, value_name = "PATH", hide = true)]
    pub ready_file: Option<PathBuf>,
}

/// `--socket-lb`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// Sockets of the node and of its pods
    #[default]
    All,
    /// Sockets of the node's own network namespace
    Host,
    /// No socket
    Off,
}

/// On or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes
    #[default]
    On,
    /// No
    Off,
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    #[default]
    Text,
    /// One object a line
    Json,
}

#[cfg(test)]
impl AgentFlags {
    /// What words of a command line say.
    pub fn parse_words(words: &str) -> Self {
        use clap::{Args as _, FromArgMatches as _};

        let command = Self::augment_args(clap::Command::new("agent").no_binary_name(true));
        let matches = command.try_get_matches_from(words.split_whitespace()).expect("these are options");
        Self::from_arg_matches(&matches).expect("they were parsed")
    }
}
