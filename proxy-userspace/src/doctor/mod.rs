//! Everything that shunt needs of a node, looked at one by one: what was seen, whether that is well, what to do if not.
//!
//! | module | holds |
//! |---|---|
//! | [`node`] | checks of the kernel, of what is pinned, and of the agent |
//! | [`hook`] | checks of what is attached, and of who is asked |
//! | [`network`] | checks of settings, devices, ports, firewall and other proxies |
//!
//! A check is a pure function of [`Facts`]; facts are gathered in `datapath::survey` and by the agent's admin socket.
//! May touch: nothing.
//!
//! What breaks other service proxies and is not looked at here, because it does not concern shunt:
//!
//! | trap | why not |
//! |---|---|
//! | `net_cls` and `net_prio` of control groups version 1 hide a socket's group | kernels before 5.15 only, shunt wants 6.1; the dialled address (`socket-hooks-fire`) would show it |
//! | `RLIMIT_MEMLOCK` too small for maps | kernels before 5.11 only; later ones charge the control group (`table-memory`) |
//! | checksums of packets that a VXLAN device sends after two translations | repaired in 5.7 |
//! | accept_local, route_localnet | sources are translated on the way out, after routing, and back before it: no packet comes in with an address of this node |
//! | packet marks of network plugins | shunt sets none and reads none |
//! | LRO under XDP | forwarding switches LRO off, and so does attaching XDP |
//! | bridge-nf-call-iptables=0 with pods on a bridge | packets to a pod of the same bridge are bridged in both directions, so netfilter sees both or none |
//! | the clock | lifetimes are taken from the monotonic clock, which nobody sets |

pub mod hook;
pub mod network;
pub mod node;

use serde::Serialize;

use crate::datapath::device::Choice;
use crate::datapath::survey::{Seen, Survey, Unseen};
use crate::telemetry::admin::Report;

/// What the checks judge.
#[derive(Debug)]
pub struct Facts {
    /// The node.
    pub survey: Survey,
    /// What a running agent says.
    pub report: Seen<Report>,
}

impl Facts {
    /// Which devices the agent serves, as far as it could be asked.
    fn choice(&self) -> Choice {
        self.report.as_ref().map(|report| report.devices.clone()).unwrap_or_default()
    }
}

/// How a check ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing is wrong.
    Note,
    /// It could not be looked at.
    Unknown,
    /// Something works less well than it could, or may break.
    Warning,
    /// Services do not work for somebody.
    Failure,
}

impl Verdict {
    /// All of them, the worst first.
    pub const ALL: [Self; 5] = [Self::Failure, Self::Warning, Self::Unknown, Self::Note, Self::Ok];

    /// The word in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Unknown => "unknown",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// What a check comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    verdict: Verdict,
    seen: String,
    advice: Option<String>,
}

impl Outcome {
    fn ok(seen: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, seen: seen.into(), advice: None }
    }

    /// Nothing is to be done about it.
    fn known(seen: impl Into<String>) -> Self {
        Self { verdict: Verdict::Note, seen: seen.into(), advice: None }
    }

    fn note(seen: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Note, seen: seen.into(), advice: Some(advice.into()) }
    }

    fn warning(seen: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warning, seen: seen.into(), advice: Some(advice.into()) }
    }

    fn failure(seen: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failure, seen: seen.into(), advice: Some(advice.into()) }
    }
}

/// A check by name.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Name, as people and programs are shown it.
    pub name: &'static str,
    /// The judgement.
    pub judge: fn(&Facts) -> Seen<Outcome>,
}

/// All checks, in the order in which they are shown.
pub const CHECKS: [Check; 33] = [
    Check { name: "kernel-links", judge: node::kernel_links },
    Check { name: "kernel-source-address", judge: node::kernel_source_address },
    Check { name: "kernel-functions", judge: node::kernel_functions },
    Check { name: "kernel-compiler", judge: node::kernel_compiler },
    Check { name: "bpf-file-system", judge: node::bpf_file_system },
    Check { name: "agent", judge: node::agent },
    Check { name: "namespace", judge: node::namespace },
    Check { name: "sources", judge: node::sources },
    Check { name: "services", judge: node::services },
    Check { name: "tables", judge: node::tables },
    Check { name: "table-room", judge: node::table_room },
    Check { name: "table-memory", judge: node::table_memory },
    Check { name: "open-files", judge: node::open_files },
    Check { name: "drops", judge: node::drops },
    Check { name: "socket-hooks", judge: hook::socket_hooks },
    Check { name: "socket-hooks-fire", judge: hook::socket_hooks_fire },
    Check { name: "hooked-processes", judge: hook::hooked_processes },
    Check { name: "other-socket-programs", judge: hook::other_socket_programs },
    Check { name: "device-hooks", judge: hook::device_hooks },
    Check { name: "device-order", judge: hook::device_order },
    Check { name: "other-device-programs", judge: hook::other_device_programs },
    Check { name: "forwarding", judge: network::forwarding },
    Check { name: "device-forwarding", judge: network::device_forwarding },
    Check { name: "router-advertisements", judge: network::router_advertisements },
    Check { name: "reverse-path-filter", judge: network::reverse_path_filter },
    Check { name: "overlay-mtu", judge: network::overlay_mtu },
    Check { name: "reserved-ports", judge: network::reserved_ports },
    Check { name: "local-ports", judge: network::local_ports },
    Check { name: "source-ports", judge: network::source_ports },
    Check { name: "bound-addresses", judge: network::bound_addresses },
    Check { name: "forward-policy", judge: network::forward_policy },
    Check { name: "invalid-packets", judge: network::invalid_packets },
    Check { name: "other-proxies", judge: network::other_proxies },
];

/// The end of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name.
    pub check: &'static str,
    /// Its end.
    pub verdict: Verdict,
    /// What was seen, as a sentence.
    pub seen: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// Makes all checks.
pub fn examine(facts: &Facts) -> Vec<Finding> {
    CHECKS.iter().map(|check| finding(check, (check.judge)(facts))).collect()
}

fn finding(check: &Check, outcome: Seen<Outcome>) -> Finding {
    let unknown = |Unseen(why)| Outcome { verdict: Verdict::Unknown, seen: why, advice: None };
    let Outcome { verdict, seen, advice } = outcome.unwrap_or_else(unknown);
    Finding { check: check.name, verdict, seen, advice }
}

/// Names in a sentence, at most so many.
fn list<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    const MOST: usize = 5;
    let names: Vec<_> = names.into_iter().collect();
    let shown: Vec<_> = names.iter().take(MOST).map(AsRef::as_ref).collect();
    match names.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
pub(crate) mod tests;
