//! NodePorts that something else on this node has too: hostPorts of pods, ports that containers publish, sockets. Packets from
//! outside meet Shunt first, so what else has the port is not reached there. It is told, and nobody is hindered.
//!
//! Found are sockets of the node's network namespace, and rules of nf_tables, those of iptables among them, which translate one
//! port of this node in a chain that CNI's `portmap` or Docker makes. Not found are rules of the older iptables (legacy), and
//! what a CNI does by programs of its own. Pods themselves are not asked for: the stock role does not show them.
//! May touch: sockets and rules, for reading.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::abi::address::AddressClass;
use proxy_common::addr::{Addr, Port, Proto};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::{listener, netfilter};
use crate::drain::Drain;
use crate::model::{Reader, ServiceKey, Snapshot};
use crate::planner::NodeView;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(20);

/// Something that has a port of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// At which address; none: at all of them.
    pub addr: Option<Addr>,
    /// The port.
    pub port: Port,
    /// TCP or UDP.
    pub proto: Proto,
    /// Who has it, in words.
    pub by: String,
}

/// A NodePort that something else has too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Whose NodePort it is.
    pub service: ServiceKey,
    /// What else there is.
    pub taken: Taken,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Taken { port, proto, by, .. } = &self.taken;
        write!(f, "nodePort {port}/{proto} is also that of {by}, which clients from outside do not reach there")
    }
}

/// All of them.
pub type Overlaps = BTreeMap<(Port, Proto), Overlap>;

/// Which NodePorts of `snapshot` are among those that are `taken`.
fn overlaps(snapshot: &Snapshot, taken: impl IntoIterator<Item = Taken>) -> Overlaps {
    let node_ports = node_ports(snapshot);
    let node = NodeView::of(snapshot);
    let answers = |addr: &Addr| node.addresses.get(addr).is_some_and(|class| class & AddressClass::NODE_PORT != 0);
    let mut found = Overlaps::new();
    for taken in taken {
        let at = (taken.port, taken.proto);
        if let Some(service) = node_ports.get(&at).filter(|_| taken.addr.as_ref().is_none_or(answers)) {
            found.entry(at).or_insert_with(|| Overlap { service: ServiceKey::clone(service), taken });
        }
    }
    found
}

fn node_ports(snapshot: &Snapshot) -> BTreeMap<(Port, Proto), &ServiceKey> {
    let mut found = BTreeMap::new();
    for (key, service) in &snapshot.services {
        for port in &service.ports {
            if let (Some(number), Some(proto)) = (port.node_port, port.protocol.proto()) {
                found.entry((number, proto)).or_insert(key);
            }
        }
    }
    found
}

/// What has a port of this node now. What cannot be read has none.
fn read() -> Vec<Taken> {
    let sockets = listener::listeners().unwrap_or_else(|error| {
        debug!(%error, "sockets cannot be listed");
        Vec::new()
    });
    let rules = netfilter::port_rules().unwrap_or_else(|error| {
        debug!(%error, "rules of nf_tables cannot be listed");
        Vec::new()
    });
    let of_socket = |socket: listener::Listener| {
        let addr = Addr::from(socket.at.ip());
        let is_all = socket.at.ip().is_unspecified();
        let by = format!("a process of this node that listens on {}", socket.at);
        Taken { addr: (!is_all).then_some(addr), port: Port(socket.at.port()), proto: socket.proto, by }
    };
    let of_rule = |rule: netfilter::PortRule| {
        let by = format!("a rule that translates it for a container (hostPort), in the chain {}", rule.chain);
        Taken { addr: rule.addr, port: rule.port, proto: rule.proto, by }
    };
    rules.into_iter().map(of_rule).chain(sockets.into_iter().map(of_socket)).collect()
}

/// The looks as a part of the agent.
#[derive(Debug)]
pub struct Task {
    snapshots: Reader,
    found: watch::Sender<Overlaps>,
}

impl Task {
    /// Compares what there is with the NodePorts of `snapshots`.
    pub fn new(snapshots: Reader) -> Self {
        Self { snapshots, found: watch::Sender::default() }
    }

    /// What was found.
    pub fn watch(&self) -> watch::Receiver<Overlaps> {
        self.found.subscribe()
    }

    /// Looks until the drain.
    pub async fn run(self, mut drain: Drain) {
        loop {
            tokio::select! {
                () = sleep(INTERVAL) => {}
                () = drain.wait() => return,
            }
            let snapshot: Arc<Snapshot> = self.snapshots.borrow().clone();
            self.tell(tokio::task::block_in_place(|| overlaps(&snapshot, read())));
        }
    }

    fn tell(&self, found: Overlaps) {
        let known = self.found.borrow().clone();
        for (at, overlap) in found.iter().filter(|(at, overlap)| known.get(*at) != Some(*overlap)) {
            warn!(service = %overlap.service, port = %at.0, proto = %at.1, "{overlap}");
        }
        for (at, overlap) in known.iter().filter(|(at, _)| !found.contains_key(at)) {
            info!(service = %overlap.service, port = %at.0, proto = %at.1, "a NodePort is the service's alone again");
        }
        self.found.send_if_modified(|told| {
            let is_new = *told != found;
            *told = found;
            is_new
        });
    }
}
