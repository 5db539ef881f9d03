//! Other service proxies that are at work on this node, or have left their rules: who translates what first is then a
//! matter of luck, so an operator is told at start.
//!
//! Known by what they leave in the kernel, since their processes are in containers that cannot be seen from here. Not
//! seen: rules of kube-proxy that were made by iptables of the old kind (`iptables-legacy`).
//! May touch: netfilter's list of chains and the list of loaded programs, for reading.

use std::fmt;
use std::fs;

use super::netfilter;

/// Another service proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proxy {
    /// kube-proxy, by its rules in netfilter.
    KubeProxy,
    /// kube-proxy in its oldest mode, by its virtual servers.
    Ipvs,
    /// Cilium, by its programs.
    Cilium,
    /// Calico's eBPF mode, by its programs.
    Calico,
}

impl Proxy {
    /// What an operator should do about it.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::KubeProxy => "stop kube-proxy and run `kube-proxy --cleanup`; connections that it serves live on",
            Self::Ipvs => "stop kube-proxy and run `kube-proxy --cleanup`",
            Self::Cilium => "make sure that it has kubeProxyReplacement=false, or do not run shunt on this node",
            Self::Calico => "set bpfEnabled=false in Calico's FelixConfiguration, or do not run shunt on this node",
        }
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KubeProxy => "rules of kube-proxy",
            Self::Ipvs => "IPVS virtual servers",
            Self::Cilium => "programs of Cilium",
            Self::Calico => "programs of Calico",
        })
    }
}

/// Those that have left a trace in this network namespace, or programs on this machine. What cannot be looked at counts as
/// not there.
pub fn find() -> Vec<Proxy> {
    let mut found = Vec::new();
    if netfilter::chains().unwrap_or_default().iter().any(|(table, chain)| is_of_kube_proxy(table, chain)) {
        found.push(Proxy::KubeProxy);
    }
    if fs::read_to_string("/proc/net/ip_vs").is_ok_and(|text| has_virtual_servers(&text)) {
        found.push(Proxy::Ipvs);
    }
    let mut programs: Vec<_> = aya::programs::loaded_programs()
        .filter_map(|program| program.ok()?.name_as_str().and_then(proxy_of_program))
        .collect();
    programs.sort_unstable();
    programs.dedup();
    found.extend(programs);
    found
}

/// In nftables mode kube-proxy has a table of its own; in iptables mode its chains hang in the common tables.
fn is_of_kube_proxy(table: &str, chain: &str) -> bool {
    table == "kube-proxy" || chain == "KUBE-SERVICES"
}

/// After the header, which names version and columns in three lines (kernel, ip_vs_info_seq_show).
fn has_virtual_servers(text: &str) -> bool {
    const HEADER_LINES: usize = 3;
    text.lines().nth(HEADER_LINES).is_some()
}

/// By the prefixes that both give to all their programs.
fn proxy_of_program(name: &str) -> Option<Proxy> {
    match name {
        name if name.starts_with("cil_") => Some(Proxy::Cilium),
        name if name.starts_with("calico_") || name.starts_with("cali_") => Some(Proxy::Calico),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_kube_proxy_are_known_in_both_modes() {
        assert!(is_of_kube_proxy("kube-proxy", "services") && is_of_kube_proxy("nat", "KUBE-SERVICES"));
        assert!(!is_of_kube_proxy("nat", "POSTROUTING"));
    }

    #[test]
    fn virtual_servers_follow_the_header() {
        let header = "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n";
        assert!(!has_virtual_servers(header));
        assert!(has_virtual_servers(&format!("{header}TCP  0A600001:01BB rr \n")));
    }

    #[test]
    fn programs_are_known_by_their_prefix() {
        assert_eq!(proxy_of_program("cil_from_netdev"), Some(Proxy::Cilium));
        assert_eq!(proxy_of_program("cali_tc_preambl"), Some(Proxy::Calico));
        assert_eq!(proxy_of_program("ingress"), None);
    }
}
