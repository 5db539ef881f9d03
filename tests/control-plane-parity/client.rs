//! Who dials, and under which names its addresses and those of others are told.

use std::collections::BTreeMap;
use std::net::IpAddr;

use shunt_tests::place::Place;
use shunt_tests::topology::{Cluster, Family};

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// The last pod of the first node.
    Pod,
    /// The same where no socket hook is asked, as in a virtual machine.
    UnhookedPod,
    /// The first node itself.
    Host,
    /// A machine outside of the cluster, whose way to all virtual addresses is the first node.
    Outside,
}

impl Client {
    pub const ALL: [Self; 4] = [Self::Pod, Self::UnhookedPod, Self::Host, Self::Outside];

    /// As it stands in the lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::UnhookedPod => "unhooked-pod",
            Self::Host => "node-1",
            Self::Outside => "outside",
        }
    }

    pub fn place(self, cluster: &Cluster) -> Place {
        let node = &cluster.nodes[0];
        let pod = node.pods.last().expect("nodes have pods");
        match self {
            Self::Pod => pod.place.clone(),
            Self::UnhookedPod => pod.place.unhooked(),
            Self::Host => node.place.clone(),
            Self::Outside => cluster.client.place.clone(),
        }
    }
}

/// Names of addresses: the same for both families and both clusters.
#[derive(Debug)]
pub struct Names(BTreeMap<IpAddr, String>);

impl Names {
    pub fn of(cluster: &Cluster) -> Self {
        let mut names = BTreeMap::new();
        for family in Family::ALL {
            let mut put =
                |addrs: shunt_tests::topology::Addrs, name: &str| names.insert(addrs.get(family), name.to_owned());
            put(cluster.client.addrs, "outside");
            for node in &cluster.nodes {
                put(node.addrs, node.name());
                put(node.gateway(), &format!("the gateway of {}", node.name()));
                for pod in &node.pods {
                    put(pod.addrs, pod.place.name());
                }
            }
        }
        Self(names)
    }

    /// How a server sees a client: as `itself`, or the name of another's address.
    pub fn seen_from(&self, client: Client, addr: IpAddr) -> String {
        let name = self.0.get(&addr).cloned().unwrap_or_else(|| addr.to_string());
        let own: &[&str] = match client {
            Client::Pod | Client::UnhookedPod => &["pod-1-3"],
            Client::Host => &["node-1", "the gateway of node-1"],
            Client::Outside => &["outside"],
        };
        if own.contains(&name.as_str()) || (addr.is_loopback() && client == Client::Host) {
            "itself".to_owned()
        } else {
            name
        }
    }
}
