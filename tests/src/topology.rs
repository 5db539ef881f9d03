//! Clusters as CNIs build them, in namespaces: nodes and an outside client on an underlay, pods on the nodes.
//!
//! ```text
//!   far ────── edge ────── net (bridge br0) ──┬── client
//!       wide       narrow                     ├── node-1: eth0 ──┬── pod-1-1: eth0
//!       198.51.100.0/24      192.0.2.0/24     │                  └── pod-1-2: eth0
//!                                             └── node-2: eth0 ───── pod-2-1: eth0   10.244.N.0/24
//! ```
//! Pods hang on routed veth pairs (as kindnet and Calico do) or on a bridge cni0 (as flannel does); nodes reach each
//! other's pods by routes over the underlay or by VXLAN. Everything has an IPv4 and an IPv6 address. No namespace has a
//! route out of the drawing.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use crate::bed::Bed;
use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::place::Place;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];
}

/// An IPv4 address and an IPv6 address of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addrs {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl Addrs {
    /// The address of a family.
    pub fn get(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// The address of a family with a port.
    pub fn port(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.get(family), port)
    }
}

/// An IPv4 prefix and an IPv6 prefix of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidrs {
    /// First addresses.
    pub first: Addrs,
    /// Prefix length of IPv4.
    pub v4_length: u8,
    /// Prefix length of IPv6.
    pub v6_length: u8,
}

impl Cidrs {
    const fn new(v4: [u8; 4], v4_length: u8, v6: [u16; 8], v6_length: u8) -> Self {
        let [a, b, c, d] = v4;
        let [e, f, g, h, i, j, k, l] = v6;
        let first = Addrs { v4: Ipv4Addr::new(a, b, c, d), v6: Ipv6Addr::new(e, f, g, h, i, j, k, l) };
        Self { first, v4_length, v6_length }
    }

    /// As text, `10.96.0.0/16`.
    pub fn get(&self, family: Family) -> String {
        match family {
            Family::V4 => self.v4(),
            Family::V6 => self.v6(),
        }
    }

    /// The IPv4 prefix as text.
    pub fn v4(&self) -> String {
        format!("{}/{}", self.first.v4, self.v4_length)
    }

    /// The IPv6 prefix as text.
    pub fn v6(&self) -> String {
        format!("{}/{}", self.first.v6, self.v6_length)
    }

    /// The addresses `number` places after the first.
    pub fn host(&self, number: u16) -> Addrs {
        let v4 = Ipv4Addr::from_bits(self.first.v4.to_bits() + u32::from(number));
        let v6 = Ipv6Addr::from_bits(self.first.v6.to_bits() + u128::from(number));
        Addrs { v4, v6 }
    }
}

impl fmt::Display for Cidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.v4(), self.v6())
    }
}

/// The underlay: nodes and the client.
pub const UNDERLAY: Cidrs = Cidrs::new([192, 0, 2, 0], 24, [0x2001, 0xdb8, 1, 0, 0, 0, 0, 0], 64);
/// Between the routers.
const EDGE: Cidrs = Cidrs::new([100, 64, 0, 0], 30, [0x2001, 0xdb8, 3, 0, 0, 0, 0, 0], 126);
/// Beyond the edge router.
pub const FAR: Cidrs = Cidrs::new([198, 51, 100, 0], 24, [0x2001, 0xdb8, 2, 0, 0, 0, 0, 0], 64);
/// All pods.
pub const CLUSTER: Cidrs = Cidrs::new([10, 244, 0, 0], 16, [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0], 48);
/// ClusterIPs.
pub const SERVICES: Cidrs = Cidrs::new([10, 96, 0, 0], 16, [0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0], 112);
/// External and load-balancer addresses; [`Cluster::route_vips`] leads clients to a node.
pub const VIPS: Cidrs = Cidrs::new([203, 0, 113, 0], 24, [0x2001, 0xdb8, 0xbeef, 0, 0, 0, 0, 0], 64);

/// How pods are connected to their node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodLink {
    /// A veth pair each, with a host route and the gateway's address on the node's end.
    Routed,
    /// A bridge `cni0` that holds the gateway's address.
    Bridge {
        /// Bridged packets pass netfilter (`net.bridge.bridge-nf-call-iptables`).
        calls_netfilter: bool,
        /// Ports send frames back to where they came from.
        is_hairpin: bool,
    },
}

/// How a node reaches the pods of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// By routes over the underlay, whose router knows them too: outside machines reach pods directly.
    HostRoutes,
    /// By VXLAN devices with fixed neighbours, as flannel makes them: `flannel.1` and `flannel-v6.1`.
    Vxlan,
}

/// What the devices compute for the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offloads {
    /// As the kernel makes them: partial checksums, GSO packets.
    On,
    /// No checksum and no segmentation offload on any end of any veth pair.
    Off,
}

/// A cluster to be built. The default is the plainest one; tests name what they change.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Nodes, 1 to 200.
    pub nodes: u16,
    /// Pods per node.
    pub pods: u16,
    /// How pods are connected.
    pub pod_link: PodLink,
    /// How nodes reach each other's pods.
    pub overlay: Overlay,
    /// The nodes forward only what is established, or from or to pods.
    pub has_forward_drop: bool,
    /// The nodes drop what connection tracking calls invalid.
    pub drops_invalid: bool,
    /// The nodes masquerade as flannel does: from pods to outside, and from outside to pods of other nodes.
    pub masquerades: bool,
    /// `net.ipv4.conf.*.rp_filter` of the nodes.
    pub rp_filter: u8,
    /// Offloads of all veth ends.
    pub offloads: Offloads,
    /// MTU of the underlay; pods get what the overlay leaves.
    pub mtu: u32,
    /// With a client beyond an edge router whose link to the underlay has this MTU.
    pub far_mtu: Option<u32>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            nodes: 1,
            pods: 2,
            pod_link: PodLink::Routed,
            overlay: Overlay::HostRoutes,
            has_forward_drop: false,
            drops_invalid: false,
            masquerades: false,
            rp_filter: 1,
            offloads: Offloads::On,
            mtu: 1500,
            far_mtu: None,
        }
    }
}

impl Plan {
    /// As flannel with VXLAN on nodes with a strict firewall: `nodes` nodes.
    pub fn flannel(nodes: u16) -> Self {
        Self { nodes, overlay: Overlay::Vxlan, masquerades: true, ..Self::bridge() }.strict()
    }

    /// Pods on a bridge with br_netfilter, as kube-proxy wants it.
    pub fn bridge() -> Self {
        Self { pod_link: PodLink::Bridge { calls_netfilter: true, is_hairpin: true }, ..Self::default() }
    }

    /// With forward policy drop and the INVALID rule.
    pub fn strict(self) -> Self {
        Self { has_forward_drop: true, drops_invalid: true, ..self }
    }

    /// MTU of the pods' devices.
    pub fn pod_mtu(&self) -> u32 {
        match self.overlay {
            Overlay::HostRoutes => self.mtu,
            Overlay::Vxlan => self.mtu - VXLAN_V6_OVERHEAD,
        }
    }
}

/// Outer IPv4, UDP and VXLAN headers, inner Ethernet header (RFC 7348).
const VXLAN_V4_OVERHEAD: u32 = 50;
/// The same over IPv6.
const VXLAN_V6_OVERHEAD: u32 = 70;

/// A machine of the drawing that is neither node nor pod.
#[derive(Debug)]
pub struct Host {
    /// Where its processes run; in no control group that anything is attached to.
    pub place: Place,
    /// Its addresses.
    pub addrs: Addrs,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its own namespace; its control group holds those of its pods.
    pub place: Place,
    /// Its addresses on `eth0`.
    pub addrs: Addrs,
    /// The addresses of its pods.
    pub pod_cidr: Cidrs,
    /// Pods made by [`Cluster::build`].
    pub pods: Vec<Pod>,
    plan: Plan,
    number: u16,
    next_pod: u16,
    bed: Arc<Bed>,
}

/// A pod. Dropped, it goes with its devices.
#[derive(Debug)]
pub struct Pod {
    /// Where its processes run.
    pub place: Place,
    /// Its addresses on `eth0`.
    pub addrs: Addrs,
    /// The name of its node.
    pub node: String,
    /// The name of its link's end in the node.
    pub device: String,
}

/// Nodes, pods and clients.
#[derive(Debug)]
pub struct Cluster {
    /// In order: `node-1`, `node-2`.
    pub nodes: Vec<Node>,
    /// A machine on the underlay, outside of the cluster.
    pub client: Host,
    /// A machine beyond the edge router, if the plan has one.
    pub far: Option<Host>,
    /// The edge router, if the plan has one.
    pub edge: Option<Place>,
    /// The underlay's switch and router.
    pub net: Place,
    /// What the test owns.
    pub bed: Arc<Bed>,
    plan: Plan,
}

impl Cluster {
    /// Builds it; everything answers when this returns.
    #[track_caller]
    pub fn build(plan: Plan) -> Self {
        let bed = Bed::new();
        let net = build_net(&bed, &plan);
        let mut nodes: Vec<_> = (1..=plan.nodes).map(|number| Node::build(&bed, &net, plan, number)).collect();
        connect_nodes(&nodes, &plan);
        if plan.overlay == Overlay::HostRoutes {
            net.ns().ip(nodes.iter().flat_map(host_routes));
        }
        for node in &mut nodes {
            node.pods = (0..plan.pods).map(|_| node.add_pod()).collect();
        }
        let client = build_client(&bed, &net, &plan);
        let (far, edge) = plan.far_mtu.map(|mtu| build_far(&bed, &net, mtu, &plan)).unzip();
        Self { nodes, client, far, edge, net, bed, plan }
    }

    /// The plan it was built by.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// All pods made by [`Self::build`].
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.nodes.iter().flat_map(|node| &node.pods)
    }

    /// From now on, packets of the clients to [`VIPS`] and [`SERVICES`] go to `node`.
    #[track_caller]
    pub fn route_vips(&self, node: &Node) {
        let mut routes = Vec::new();
        for family in Family::ALL {
            for cidrs in [VIPS, SERVICES] {
                routes.push(format!("route replace {} via {}", cidrs.get(family), node.addrs.get(family)));
            }
        }
        self.client.place.ns().ip(&routes);
        self.net.ns().ip(&routes);
    }
}

/// The switch and router of the underlay.
fn build_net(bed: &Arc<Bed>, plan: &Plan) -> Place {
    let ns = Netns::new(bed, "net");
    make_router(&ns, 0);
    ns.sysctl("net/ipv4/conf/all/send_redirects", "0");
    ns.sysctl("net/ipv4/conf/default/send_redirects", "0");
    for tables in ["iptables", "ip6tables", "arptables"] {
        ns.sysctl(&format!("net/bridge/bridge-nf-call-{tables}"), "0");
    }
    let gateway = UNDERLAY.host(1);
    ns.ip([
        format!("link add br0 mtu {} type bridge forward_delay 0 mcast_snooping 0", plan.mtu),
        format!("addr add {}/24 dev br0", gateway.v4),
        format!("addr add {}/64 dev br0 nodad", gateway.v6),
        "link set br0 up".to_owned(),
    ]);
    Place::new("net", ns, None)
}

/// Connects a machine to the underlay's switch as `addrs`, by a device `eth0`.
fn plug_in(net: &Place, ns: &Netns, port: &str, addrs: Addrs, plan: &Plan) {
    let mtu = plan.mtu;
    net.ns().ip([
        format!("link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}", ns.name()),
        format!("link set {port} master br0 up"),
    ]);
    let gateway = UNDERLAY.host(1);
    ns.ip([
        format!("addr add {}/24 dev eth0", addrs.v4),
        format!("addr add {}/64 dev eth0 nodad", addrs.v6),
        "link set eth0 up".to_owned(),
        format!("route add default via {}", gateway.v4),
        format!("route add default via {}", gateway.v6),
    ]);
    set_offloads(plan.offloads, &[(net.ns(), port), (ns, "eth0")]);
}

fn build_client(bed: &Arc<Bed>, net: &Place, plan: &Plan) -> Host {
    let (ns, addrs) = (Netns::new(bed, "client"), UNDERLAY.host(250));
    plug_in(net, &ns, "client", addrs, plan);
    Host { place: Place::new("client", ns, None), addrs }
}

/// A client behind a router of its own: `far` (wide link) `edge` (link of `mtu`) `net`.
fn build_far(bed: &Arc<Bed>, net: &Place, mtu: u32, plan: &Plan) -> (Host, Place) {
    let (edge, ns) = (Netns::new(bed, "edge"), Netns::new(bed, "far"));
    make_router(&edge, 0);
    let (inner, outer) = (EDGE.host(1), EDGE.host(2));
    net.ns().ip([
        format!("link add edge mtu {mtu} type veth peer name uplink mtu {mtu} netns {}", edge.name()),
        format!("addr add {}/30 dev edge", inner.v4),
        format!("addr add {}/126 dev edge nodad", inner.v6),
        "link set edge up".to_owned(),
    ]);
    let (addrs, gateway, wide) = (FAR.host(250), FAR.host(1), plan.mtu);
    edge.ip([
        format!("link add far mtu {wide} type veth peer name eth0 mtu {wide} netns {}", ns.name()),
        format!("addr add {}/24 dev far", gateway.v4),
        format!("addr add {}/64 dev far nodad", gateway.v6),
        format!("addr add {}/30 dev uplink", outer.v4),
        format!("addr add {}/126 dev uplink nodad", outer.v6),
        "link set far up".to_owned(),
        "link set uplink up".to_owned(),
        format!("route add default via {}", inner.v4),
        format!("route add default via {}", inner.v6),
    ]);
    net.ns().ip(Family::ALL.map(|family| format!("route add {} via {}", FAR.get(family), outer.get(family))));
    ns.ip([
        format!("addr add {}/24 dev eth0", addrs.v4),
        format!("addr add {}/64 dev eth0 nodad", addrs.v6),
        "link set eth0 up".to_owned(),
        format!("route add default via {}", gateway.v4),
        format!("route add default via {}", gateway.v6),
    ]);
    set_offloads(plan.offloads, &[(net.ns(), "edge"), (&edge, "uplink"), (&edge, "far"), (&ns, "eth0")]);
    (Host { place: Place::new("far", ns, None), addrs }, Place::new("edge", edge, None))
}

fn make_router(ns: &Netns, rp_filter: u8) {
    ns.sysctl("net/ipv4/ip_forward", "1");
    ns.sysctl("net/ipv6/conf/all/forwarding", "1");
    ns.sysctl("net/ipv4/conf/all/rp_filter", &rp_filter.to_string());
    ns.sysctl("net/ipv4/conf/default/rp_filter", &rp_filter.to_string());
}

fn set_offloads(offloads: Offloads, devices: &[(&Netns, &str)]) {
    if offloads == Offloads::Off {
        for (ns, device) in devices {
            ns.output(["ethtool", "-K", device, "tx", "off", "tso", "off", "gso", "off", "gro", "off"]);
        }
    }
}

impl Node {
    fn build(bed: &Arc<Bed>, net: &Place, plan: Plan, number: u16) -> Self {
        let name = format!("node-{number}");
        let ns = Netns::new(bed, &name);
        make_router(&ns, plan.rp_filter);
        let addrs = UNDERLAY.host(9 + number);
        plug_in(net, &ns, &name, addrs, &plan);
        let place = Place::new(&name, ns, Some(Cgroup::new(bed, &name)));
        let mut node = Self {
            place,
            addrs,
            pod_cidr: pod_cidr(number),
            pods: vec![],
            plan,
            number,
            next_pod: 1,
            bed: bed.clone(),
        };
        node.build_bridge();
        node.build_firewall();
        node
    }

    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        self.place.name()
    }

    /// The address of the node's end of its pods' links.
    pub fn gateway(&self) -> Addrs {
        self.pod_cidr.host(1)
    }

    /// One more pod on this node, ready to be used.
    #[track_caller]
    pub fn add_pod(&mut self) -> Pod {
        let number = self.next_pod;
        self.next_pod += 1;
        let name = format!("pod-{}-{number}", self.number);
        let device = format!("veth-{}-{number}", self.number);
        let (ns, addrs) = (Netns::new(&self.bed, &name), self.pod_cidr.host(9 + number));
        let mtu = self.plan.pod_mtu();
        let mut commands =
            vec![format!("link add {device} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}", ns.name())];
        commands.extend(self.pod_commands(&device, addrs));
        self.place.ns().ip(commands);
        ns.ip(self.inner_commands(addrs));
        set_offloads(self.plan.offloads, &[(self.place.ns(), &device), (&ns, "eth0")]);
        let cgroup = self.place.cgroup().expect("a node has a control group").child(&name);
        Pod { place: Place::new(&name, ns, Some(cgroup)), addrs, node: self.name().to_owned(), device }
    }

    /// What the node does for a pod's link.
    fn pod_commands(&self, device: &str, addrs: Addrs) -> Vec<String> {
        let gateway = self.gateway();
        match self.plan.pod_link {
            PodLink::Routed => vec![
                format!("addr add {}/32 dev {device}", gateway.v4),
                format!("addr add {}/128 dev {device} nodad", gateway.v6),
                format!("link set {device} up"),
                format!("route add {}/32 dev {device}", addrs.v4),
                format!("route add {}/128 dev {device}", addrs.v6),
            ],
            PodLink::Bridge { is_hairpin, .. } => vec![
                format!("link set {device} master cni0 up"),
                format!("link set {device} type bridge_slave hairpin {}", if is_hairpin { "on" } else { "off" }),
            ],
        }
    }

    /// What is done inside the pod.
    fn inner_commands(&self, addrs: Addrs) -> Vec<String> {
        let gateway = self.gateway();
        let (v4_length, v6_length, on_link) = match self.plan.pod_link {
            PodLink::Routed => (32, 128, " onlink"),
            PodLink::Bridge { .. } => (24, 64, ""),
        };
        vec![
            format!("addr add {}/{v4_length} dev eth0", addrs.v4),
            format!("addr add {}/{v6_length} dev eth0 nodad", addrs.v6),
            "link set eth0 up".to_owned(),
            format!("route add default via {} dev eth0{on_link}", gateway.v4),
            format!("route add default via {} dev eth0{on_link}", gateway.v6),
        ]
    }

    fn build_bridge(&mut self) {
        let PodLink::Bridge { calls_netfilter, .. } = self.plan.pod_link else { return };
        let (ns, gateway) = (self.place.ns(), self.gateway());
        let value = if calls_netfilter { "1" } else { "0" };
        ns.sysctl("net/bridge/bridge-nf-call-iptables", value);
        ns.sysctl("net/bridge/bridge-nf-call-ip6tables", value);
        // A fixed MAC address: else it changes with the ports.
        ns.ip([
            format!(
                "link add cni0 address 02:cc:00:00:00:{:02x} mtu {} type bridge forward_delay 0",
                self.number,
                self.plan.pod_mtu()
            ),
            format!("addr add {}/24 dev cni0", gateway.v4),
            format!("addr add {}/64 dev cni0 nodad", gateway.v6),
            "link set cni0 up".to_owned(),
        ]);
    }

    fn build_firewall(&self) {
        let mut rules = String::new();
        if self.plan.has_forward_drop || self.plan.drops_invalid {
            rules += &filter_rules(&self.plan);
        }
        if self.plan.masquerades {
            rules += &masquerade_rules(&self.pod_cidr);
        }
        if !rules.is_empty() {
            self.place.ns().nft(&rules);
        }
    }
}

/// Pod addresses of a node.
fn pod_cidr(number: u16) -> Cidrs {
    let number_byte = u8::try_from(number).expect("a plan has at most 200 nodes");
    Cidrs::new([10, 244, number_byte, 0], 24, [0xfd00, 0x10, 0x244, number, 0, 0, 0, 0], 64)
}

fn filter_rules(plan: &Plan) -> String {
    let policy = if plan.has_forward_drop { "drop" } else { "accept" };
    let invalid = if plan.drops_invalid { "ct state invalid counter drop" } else { "" };
    let (v4, v6) = (CLUSTER.v4(), CLUSTER.v6());
    format!(
        "table inet firewall {{
            chain input {{ type filter hook input priority filter; policy accept; {invalid}; }}
            chain forward {{ type filter hook forward priority filter; policy {policy};
                {invalid}
                ct state established,related accept
                icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
                ip saddr {v4} accept
                ip daddr {v4} accept
                ip6 saddr {v6} accept
                ip6 daddr {v6} accept
            }}
        }}\n"
    )
}

/// The rules that flannel's iptables.go makes, without its mark for kube-proxy.
fn masquerade_rules(own: &Cidrs) -> String {
    let (own_v4, own_v6, v4, v6) = (own.v4(), own.v6(), CLUSTER.v4(), CLUSTER.v6());
    format!(
        "table inet flannel {{
            chain postrouting {{ type nat hook postrouting priority srcnat;
                ip saddr {v4} ip daddr {v4} return
                ip saddr {v4} ip daddr != 224.0.0.0/4 masquerade fully-random
                ip saddr != {v4} ip daddr {own_v4} return
                ip saddr != {v4} ip daddr {v4} masquerade fully-random
                ip6 saddr {v6} ip6 daddr {v6} return
                ip6 saddr {v6} ip6 daddr != ff00::/8 masquerade fully-random
                ip6 saddr != {v6} ip6 daddr {own_v6} return
                ip6 saddr != {v6} ip6 daddr {v6} masquerade fully-random
            }}
        }}\n"
    )
}

/// Lets every node reach the pods of every other.
fn connect_nodes(nodes: &[Node], plan: &Plan) {
    if nodes.len() < 2 {
        return;
    }
    for node in nodes {
        let others = nodes.iter().filter(|other| other.number != node.number);
        match plan.overlay {
            Overlay::HostRoutes => node.place.ns().ip(others.flat_map(host_routes)),
            Overlay::Vxlan => {
                let routes = others.clone().flat_map(vxlan_routes);
                node.place.ns().ip(vxlan_devices(node, plan).into_iter().chain(routes));
                node.place.ns().bridge(others.flat_map(vxlan_forwarding));
            }
        }
    }
}

fn host_routes(other: &Node) -> Vec<String> {
    let route = |family| format!("route add {} via {}", other.pod_cidr.get(family), other.addrs.get(family));
    Family::ALL.map(route).to_vec()
}

/// Device and inner MAC address of a node's VXLAN device of a family.
fn vxlan(node: &Node, family: Family) -> (&'static str, String) {
    match family {
        Family::V4 => ("flannel.1", format!("02:f1:04:00:00:{:02x}", node.number)),
        Family::V6 => ("flannel-v6.1", format!("02:f1:06:00:00:{:02x}", node.number)),
    }
}

fn vxlan_devices(node: &Node, plan: &Plan) -> Vec<String> {
    let mut commands = Vec::new();
    for (family, overhead, id) in [(Family::V4, VXLAN_V4_OVERHEAD, 1), (Family::V6, VXLAN_V6_OVERHEAD, 2)] {
        let ((device, mac), local, mtu) = (vxlan(node, family), node.addrs.get(family), plan.mtu - overhead);
        let (first, length) = (node.pod_cidr.first.get(family), if family == Family::V4 { 32 } else { 128 });
        commands.push(format!(
            "link add {device} address {mac} mtu {mtu} type vxlan id {id} local {local} dev eth0 dstport 8472 nolearning"
        ));
        commands.push(format!(
            "addr add {first}/{length} dev {device}{}",
            if family == Family::V6 { " nodad" } else { "" }
        ));
        commands.push(format!("link set {device} up"));
    }
    commands
}

fn vxlan_routes(other: &Node) -> Vec<String> {
    let mut commands = Vec::new();
    for family in Family::ALL {
        let ((device, mac), first) = (vxlan(other, family), other.pod_cidr.first.get(family));
        commands.push(format!("neigh add {first} lladdr {mac} dev {device} nud permanent"));
        commands.push(format!("route add {} via {first} dev {device} onlink", other.pod_cidr.get(family)));
    }
    commands
}

/// For `bridge`: behind which node an inner MAC address is.
fn vxlan_forwarding(other: &Node) -> Vec<String> {
    let entry = |family| {
        let (device, mac) = vxlan(other, family);
        format!("fdb append {mac} dev {device} dst {} self permanent", other.addrs.get(family))
    };
    Family::ALL.map(entry).to_vec()
}
