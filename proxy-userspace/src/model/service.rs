//! Services as users declare them, reduced to what shapes the tables.
//!
//! A headless service, an ExternalName, or one that asks for another proxy has no spelling here: sources leave it out.

use std::fmt;
use std::num::{NonZeroU32, NonZeroU64};
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use proxy_common::addr::{Addr, Port, Proto};

use super::name::Name;

/// Where an object comes from; the order decides between equal claims (first wins).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SourceId {
    /// A Kubernetes API server.
    Kubernetes,
    /// A Consul cluster.
    Consul,
    /// The embedded registry.
    Registry,
    /// A folder of manifests.
    Manifests,
}

impl SourceId {
    /// All of them, in their order.
    pub const ALL: [Self; 4] = [Self::Kubernetes, Self::Consul, Self::Registry, Self::Manifests];

    /// The name used in tables, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kubernetes => "kubernetes",
            Self::Consul => "consul",
            Self::Registry => "registry",
            Self::Manifests => "manifests",
        }
    }

    /// The reverse of [`Self::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|source| source.name() == name)
    }
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Who listed it.
    pub source: SourceId,
    /// Its namespace.
    pub namespace: Name,
    /// Its name.
    pub name: Name,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.source, self.namespace, self.name)
    }
}

impl fmt::Debug for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An IP family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub const fn of(addr: &Addr) -> Self {
        if addr.is_v4() { Self::V4 } else { Self::V6 }
    }

    /// The address under which NodePorts of this family are stored.
    pub const fn wildcard(self) -> Addr {
        match self {
            Self::V4 => Addr::UNSPECIFIED_V4,
            Self::V6 => Addr::UNSPECIFIED_V6,
        }
    }

    /// `IPv4` or `IPv6`, as Kubernetes spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// The reverse of [`Self::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One value per family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct ByFamily<T> {
    /// For IPv4.
    pub v4: T,
    /// For IPv6.
    pub v6: T,
}

impl<T> ByFamily<T> {
    /// The value of one family.
    pub const fn get(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// The value of one family, to change it.
    pub const fn get_mut(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

/// A transport that users can name. What the datapath cannot carry is reported by the planner.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP: not carried yet.
    Sctp,
}

impl Protocol {
    /// Its number in the tables, or `None` if the datapath cannot carry it.
    pub const fn proto(self) -> Option<Proto> {
        match self {
            Self::Tcp => Some(Proto::TCP),
            Self::Udp => Some(Proto::UDP),
            Self::Sctp => None,
        }
    }
}

/// Which endpoints a class of clients gets (KEP-2086 for internal clients).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum TrafficPolicy {
    /// Those of the whole cluster.
    #[default]
    Cluster,
    /// Those of the client's own node.
    Local,
}

/// What becomes of TCP connections whose endpoint is gone: no source lists it any more, or what they dialled is no longer
/// their service's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StalePolicy {
    /// They stay until an end or the kernel gives up.
    Keep,
    /// They are reset when their endpoint has been gone for so long.
    ResetAfter(Duration),
}

impl StalePolicy {
    /// What a service without a word of its own gets: long enough for an endpoint that moves from one slice to another, and for
    /// a pod that has half a minute to end (the default of Kubernetes); short beside the quarter of an hour after which the
    /// kernel gives up.
    pub const DEFAULT: Self = Self::ResetAfter(Duration::from_secs(30));
    /// What can be said, for people.
    pub const USAGE: &str = "keep, reset, or reset-after= with a time such as 30s or 5m";
    /// Nobody waits for longer.
    const LONGEST: Duration = Duration::from_secs(86400);
}

/// A text that is no [`StalePolicy`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not {usage}, of at most a day", usage = StalePolicy::USAGE)]
pub struct NotAPolicy(pub String);

impl FromStr for StalePolicy {
    type Err = NotAPolicy;

    fn from_str(text: &str) -> Result<Self, NotAPolicy> {
        let wrong = || NotAPolicy(text.to_owned());
        match text {
            "keep" => return Ok(Self::Keep),
            "reset" => return Ok(Self::ResetAfter(Duration::ZERO)),
            _ => {}
        }
        let time = text.strip_prefix("reset-after=").ok_or_else(wrong)?;
        let time = time.parse::<jiff::SignedDuration>().map_err(|_| wrong())?;
        let time = Duration::try_from(time).map_err(|_| wrong())?;
        if time <= Self::LONGEST { Ok(Self::ResetAfter(time)) } else { Err(wrong()) }
    }
}

impl fmt::Display for StalePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => f.write_str("keep"),
            Self::ResetAfter(Duration::ZERO) => f.write_str("reset"),
            Self::ResetAfter(time) => write!(f, "reset-after={time:?}"),
        }
    }
}

/// One port of a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Joins it to the ports of the endpoints; empty if unnamed.
    pub name: Name,
    /// Transport.
    pub protocol: Protocol,
    /// Port of ClusterIP, external and load-balancer addresses; never 0.
    pub port: Port,
    /// Port of the node's own addresses.
    pub node_port: Option<Port>,
}

/// A service, as far as it shapes the tables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Seconds of Unix time when it was created, if its source says so. Older objects win conflicts, unknown age loses.
    pub created: Option<NonZeroU64>,
    /// ClusterIPs. A family without one is not served at all.
    pub cluster_ips: ByFamily<Option<Addr>>,
    /// Its ports, in the order of the object.
    pub ports: Box<[ServicePort]>,
    /// externalIPs.
    pub external_ips: Box<[Addr]>,
    /// Addresses of the load balancer that are served on this node (ipMode `VIP` or unset).
    pub load_balancer_ips: Box<[Addr]>,
    /// Policy for clients of the ClusterIP.
    pub internal_policy: TrafficPolicy,
    /// Policy for outside clients of NodePort, external and load-balancer addresses; `Cluster` where the object's own
    /// setting does not count.
    pub external_policy: TrafficPolicy,
    /// Seconds for which a client keeps its backend.
    pub affinity: Option<NonZeroU32>,
    /// Port of the node's own addresses that tells load balancers whether this node has endpoints of the service
    /// (healthCheckNodePort): for type LoadBalancer with external policy `Local` only.
    pub health_check: Option<Port>,
    /// Who may dial the load-balancer addresses (loadBalancerSourceRanges): prefixes of the family, each once, in order.
    /// `None`: everybody.
    pub source_ranges: ByFamily<Option<Box<[IpNet]>>>,
    /// What becomes of TCP connections whose endpoint is gone; `None`: what the agent does by default.
    pub stale: Option<StalePolicy>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_survive_the_round_trip() {
        for text in ["keep", "reset", "reset-after=30s", "reset-after=300s", "reset-after=1.5s"] {
            assert_eq!(text.parse::<StalePolicy>().unwrap().to_string(), text);
        }
        let minutes: StalePolicy = "reset-after=5m".parse().unwrap();
        assert_eq!(minutes, StalePolicy::ResetAfter(Duration::from_secs(300)));
        assert_eq!("reset-after=0s".parse(), Ok(StalePolicy::ResetAfter(Duration::ZERO)));
    }

    #[test]
    fn what_is_no_policy_is_refused_with_what_is() {
        for text in ["", "Keep", "reset-after", "reset-after=", "reset-after=30", "reset-after=-1s", "reset-after=25h"]
        {
            let error = text.parse::<StalePolicy>().expect_err(text).to_string();
            assert!(error.contains("reset-after= with a time such as 30s"), "{error}");
        }
    }
}
