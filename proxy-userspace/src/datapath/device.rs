//! Which devices get programs, and which programs: a pure decision over what netlink says about them.
//!
//! By kind and place, never by a pattern of names: CNI plugins name devices as they like. Names matter only where the
//! operator gives patterns. May touch: nothing.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What netlink says about a network device, as far as the decision needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// IFLA_INFO_KIND ("veth", "bridge", ...), empty for hardware.
    pub kind: String,
    /// What frames look like.
    pub layer: Layer,
    /// IFF_LOOPBACK.
    pub is_loopback: bool,
    /// The device that this one is enslaved to, with its kind as IFLA_INFO_SLAVE_KIND says it.
    pub controller: Option<Controller>,
    /// Hardware address, zero if it has none of six bytes.
    pub mac: [u8; 6],
    /// IFLA_PARENT_DEV_NAME is there: it stands for a piece of hardware, or of virtual hardware.
    pub is_hardware: bool,
}

/// The master of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    /// Interface index.
    pub index: u32,
    /// Its kind, empty if netlink does not say.
    pub kind: String,
}

/// The link layer, by ARPHRD number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Frames start with an Ethernet header.
    Ethernet,
    /// Packets start with the IP header.
    Ip,
    /// Something else, which the programs cannot read.
    Other(u16),
}

impl Layer {
    /// From `ifi_type` (linux/if_arp.h).
    pub fn from_arphrd(number: u16) -> Self {
        const ETHER: u16 = 1;
        const LOOPBACK: u16 = 772;
        // PPP, RAWIP, TUNNEL, TUNNEL6, SIT, IPGRE, IP6GRE, NONE
        const IP: [u16; 8] = [512, 519, 768, 769, 776, 778, 823, 0xfffe];
        match number {
            ETHER | LOOPBACK => Self::Ethernet,
            number if IP.contains(&number) => Self::Ip,
            number => Self::Other(number),
        }
    }
}

/// Which programs a device gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// The Ethernet pair.
    Ethernet,
    /// The pair for packets without a link header.
    Ip,
    /// A port of the bridge with this interface index: only frames to the bridge itself are looked at.
    BridgePort(u32),
}

/// Why a device gets no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// The loopback device: local traffic is the socket hooks' affair.
    Loopback,
    /// Its packets appear on its master, where they are served.
    Enslaved,
    /// An ifb device repeats packets of another.
    Repeater,
    /// Another routing domain.
    Vrf,
    /// A link layer that the programs cannot read.
    LinkLayer(u16),
    /// `--devices` names others.
    NotChosen,
    /// `--exclude-devices` names it.
    Excluded,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("loopback"),
            Self::Enslaved => f.write_str("served on its master"),
            Self::Repeater => f.write_str("ifb repeats packets"),
            Self::Vrf => f.write_str("VRF"),
            Self::LinkLayer(number) => write!(f, "link layer {number} is not supported"),
            Self::NotChosen => f.write_str("not among --devices"),
            Self::Excluded => f.write_str("among --exclude-devices"),
        }
    }
}

/// What the operator says about devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Choice {
    /// `--devices`: only these; empty: all.
    pub only: Vec<String>,
    /// `--exclude-devices`.
    pub except: Vec<String>,
    /// `--xdp`.
    pub xdp: Xdp,
}

/// `--xdp`: which devices run the XDP program before the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Xdp {
    /// Ethernet hardware, where the driver has native XDP; other devices are passed over
    Auto,
    /// The same, and the device that carries the node's main address whatever it is; a refusal is a warning
    Native,
    /// None
    #[default]
    Off,
}

/// `--attach`: how programs get onto devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Attach {
    /// tcx where the kernel has it, else clsact
    #[default]
    Auto,
    /// Links, from Linux 6.6 on
    Tcx,
    /// Filters of the devices' clsact qdiscs, on every kernel
    Clsact,
}

/// What of the kernel runs programs on devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// Links to the devices' tcx hooks.
    Tcx,
    /// Filters of the devices' clsact qdiscs.
    Clsact,
}

impl Means {
    /// Both, the better one first.
    pub const ALL: [Self; 2] = [Self::Tcx, Self::Clsact];

    /// The name in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// Decides how programs get onto devices. `probe` tries whether the kernel has a means; only what may be taken is tried.
pub fn decide_means<E>(attach: Attach, probe: impl Fn(Means) -> Result<(), E>) -> Result<Means, E> {
    match attach {
        Attach::Auto => {
            probe(Means::Tcx).map(|()| Means::Tcx).or_else(|_| probe(Means::Clsact).map(|()| Means::Clsact))
        }
        Attach::Tcx => probe(Means::Tcx).map(|()| Means::Tcx),
        Attach::Clsact => probe(Means::Clsact).map(|()| Means::Clsact),
    }
}

/// Decides which programs `device` gets.
pub fn decide_attachment(device: &Device, choice: &Choice) -> Result<Attachment, Skip> {
    if device.is_loopback {
        return Err(Skip::Loopback);
    }
    match device.kind.as_str() {
        "ifb" => return Err(Skip::Repeater),
        "vrf" => return Err(Skip::Vrf),
        _ => {}
    }
    let place = match &device.controller {
        None => None,
        Some(controller) => match controller.kind.as_str() {
            "bridge" => Some(controller.index),
            "vrf" => return Err(Skip::Vrf),
            // bond, team, openvswitch, and whatever takes packets before the stack sees them
            _ => return Err(Skip::Enslaved),
        },
    };
    choose(&device.name, choice)?;
    match (device.layer, place) {
        (Layer::Ethernet, Some(bridge)) => Ok(Attachment::BridgePort(bridge)),
        (Layer::Ethernet, None) => Ok(Attachment::Ethernet),
        (Layer::Ip, _) => Ok(Attachment::Ip),
        (Layer::Other(number), _) => Err(Skip::LinkLayer(number)),
    }
}

/// True if `device` is to run the XDP program beside its pair. `is_uplink`: it carries the node's main address of a family.
///
/// Only uplinks: a frame that another device passes on was looked at where it came in. Slaves are left alone too, since the
/// tcx programs that open flows run on their master.
pub fn wants_xdp(device: &Device, choice: &Choice, is_uplink: bool) -> bool {
    let is_chosen = match choice.xdp {
        Xdp::Auto => device.is_hardware,
        Xdp::Native => device.is_hardware || is_uplink,
        Xdp::Off => false,
    };
    is_chosen && decide_attachment(device, choice) == Ok(Attachment::Ethernet)
}

fn choose(name: &str, choice: &Choice) -> Result<(), Skip> {
    let matches = |patterns: &[String]| patterns.iter().any(|pattern| matches_glob(pattern, name));
    if matches(&choice.except) {
        return Err(Skip::Excluded);
    }
    if !choice.only.is_empty() && !matches(&choice.only) {
        return Err(Skip::NotChosen);
    }
    Ok(())
}

/// True if all of `name` fits `pattern`, in which `*` stands for any text and `?` for any one character.
pub fn matches_glob(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where to go on if the text so far does not fit: after the last star, one character further in the name.
    let mut retry = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                retry = Some((p + 1, n));
                p += 1;
            }
            Some(&c) if c == '?' || c == name[n] => (p, n) = (p + 1, n + 1),
            _ => {
                let Some((after_star, from)) = retry else { return false };
                (p, n) = (after_star, from + 1);
                retry = Some((p, n));
            }
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn device(name: &str, kind: &str) -> Device {
        Device {
            index: 5,
            name: name.to_owned(),
            kind: kind.to_owned(),
            layer: Layer::Ethernet,
            is_loopback: false,
            controller: None,
            mac: [2, 0, 0, 0, 0, 1],
            is_hardware: false,
        }
    }

    fn enslaved(kind: &str, to: &str) -> Device {
        Device { controller: Some(Controller { index: 9, kind: to.to_owned() }), ..device("port", kind) }
    }

    fn decide(device: &Device) -> Result<Attachment, Skip> {
        decide_attachment(device, &Choice::default())
    }

    #[test]
    fn ordinary_devices_get_the_ethernet_pair_whatever_their_name() {
        for (name, kind) in [
            ("eth0", ""),
            ("veth1a2b", "veth"),
            ("cni0", "bridge"),
            ("flannel.1", "vxlan"),
            ("q", "vlan"),
            ("b", "bond"),
        ] {
            assert_eq!(decide(&device(name, kind)), Ok(Attachment::Ethernet), "{name}");
        }
    }

    #[test]
    fn devices_without_link_header_get_the_other_pair() {
        for arphrd in [0xfffe, 512, 768, 769, 776, 778] {
            let tunnel = Device { layer: Layer::from_arphrd(arphrd), ..device("wg0", "wireguard") };
            assert_eq!(decide(&tunnel), Ok(Attachment::Ip), "{arphrd}");
        }
        let infiniband = Device { layer: Layer::from_arphrd(32), ..device("ib0", "") };
        assert_eq!(decide(&infiniband), Err(Skip::LinkLayer(32)));
    }

    #[test]
    fn loopback_repeaters_and_vrf_are_left_alone() {
        assert_eq!(decide(&Device { is_loopback: true, ..device("lo", "") }), Err(Skip::Loopback));
        assert_eq!(decide(&device("ifb0", "ifb")), Err(Skip::Repeater));
        assert_eq!(decide(&device("blue", "vrf")), Err(Skip::Vrf));
        assert_eq!(decide(&enslaved("", "vrf")), Err(Skip::Vrf));
    }

    #[test]
    fn slaves_are_served_on_their_master_but_bridge_ports_themselves() {
        for master in ["bond", "team", "openvswitch", ""] {
            assert_eq!(decide(&enslaved("", master)), Err(Skip::Enslaved), "{master}");
        }
        assert_eq!(decide(&enslaved("veth", "bridge")), Ok(Attachment::BridgePort(9)));
    }

    #[test]
    fn exclusion_wins_over_choice_and_never_reaches_loopback() {
        let choice =
            Choice { only: vec!["eth*".into(), "lo".into()], except: vec!["eth1".into()], ..Choice::default() };
        assert_eq!(decide_attachment(&device("eth0", ""), &choice), Ok(Attachment::Ethernet));
        assert_eq!(decide_attachment(&device("eth1", ""), &choice), Err(Skip::Excluded));
        assert_eq!(decide_attachment(&device("cni0", "bridge"), &choice), Err(Skip::NotChosen));
        let lo = Device { is_loopback: true, ..device("lo", "") };
        assert_eq!(decide_attachment(&lo, &choice), Err(Skip::Loopback));
    }

    #[test]
    fn xdp_runs_on_uplinks_as_far_as_the_operator_says() {
        let nic = Device { is_hardware: true, ..device("eth0", "") };
        let wants =
            |device: &Device, xdp, is_uplink| wants_xdp(device, &Choice { xdp, ..Choice::default() }, is_uplink);
        for is_uplink in [false, true] {
            assert!(wants(&nic, Xdp::Auto, is_uplink) && wants(&nic, Xdp::Native, is_uplink));
            assert!(!wants(&nic, Xdp::Off, is_uplink));
            assert!(!wants(&device("eth0", "veth"), Xdp::Auto, is_uplink));
            assert_eq!(wants(&device("eth0", "veth"), Xdp::Native, is_uplink), is_uplink);
            assert!(!wants(&device("eth0", "veth"), Xdp::Off, is_uplink));
        }
    }

    #[test]
    fn xdp_runs_on_no_device_that_the_ethernet_pair_is_not_on() {
        let left_alone = [
            Device { is_loopback: true, ..device("lo", "") },
            Device { layer: Layer::Ip, ..device("tun0", "tun") },
            enslaved("", "bond"),
            enslaved("veth", "bridge"),
            enslaved("", "vrf"),
            device("excluded", ""),
        ];
        let choice = Choice { except: vec!["excluded".into()], xdp: Xdp::Native, ..Choice::default() };
        for device in left_alone {
            let device = Device { is_hardware: true, ..device };
            assert!(!wants_xdp(&device, &choice, true), "{device:?}");
        }
    }

    #[test]
    fn globs() {
        for (pattern, name) in
            [("*", ""), ("eth*", "eth"), ("e*0", "eth0"), ("*a*b*", "xaxxbx"), ("?th?", "eth0"), ("**", "x")]
        {
            assert!(matches_glob(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("", "x"), ("eth", "eth0"), ("eth?", "eth"), ("*ab", "abx"), ("a*b*c", "acb")] {
            assert!(!matches_glob(pattern, name), "{pattern} {name}");
        }
    }

    proptest! {
        /// Against the definition, spelled out as a recursion.
        #[test]
        fn globs_agree_with_the_definition(pattern in "[ab*?]{0,8}", name in "[ab]{0,8}") {
            fn defined(pattern: &[u8], name: &[u8]) -> bool {
                match (pattern.split_first(), name.split_first()) {
                    (None, None) => true,
                    (Some((b'*', rest)), _) => {
                        defined(rest, name) || name.split_first().is_some_and(|(_, more)| defined(pattern, more))
                    }
                    (Some((&c, rest)), Some((&n, more))) => (c == b'?' || c == n) && defined(rest, more),
                    _ => false,
                }
            }
            prop_assert_eq!(matches_glob(&pattern, &name), defined(pattern.as_bytes(), name.as_bytes()));
        }
    }

    #[test]
    fn the_means_is_what_is_wanted_and_there() {
        let decide =
            |attach, there: &[Means]| decide_means(attach, |means| there.contains(&means).then_some(()).ok_or(means));
        let old = [Means::Clsact];
        assert_eq!(decide(Attach::Auto, &Means::ALL), Ok(Means::Tcx));
        assert_eq!(decide(Attach::Auto, &old), Ok(Means::Clsact));
        assert_eq!(decide(Attach::Clsact, &Means::ALL), Ok(Means::Clsact));
        assert_eq!(decide(Attach::Tcx, &old), Err(Means::Tcx));
        assert_eq!(decide(Attach::Auto, &[]), Err(Means::Clsact));
    }
}
