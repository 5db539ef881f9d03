//! What a hook may do with a packet, and why one was dropped.

/// Why a packet, or a connect, was refused. Each is a counter.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum DropReason {
    /// A service without a usable endpoint; rejected.
    NoEndpoint = 0,
    /// A local traffic policy without a local endpoint, while others exist.
    NoLocalEndpoint,
    /// A port of a ClusterIP that no service has; rejected.
    UnknownPort,
    /// An address of a ServiceCIDR that no service has, on the way out of the node.
    UnallocatedServiceAddress,
    /// A TCP segment to a frontend that belongs to no known connection; reset.
    NoConnection,
    /// A packet to a ClusterIP made on this node by a process outside the hooked cgroup; rejected.
    HostUnhooked,
    /// No free source port towards this backend.
    SnatPortsExhausted,
    /// No route to the backend, or no source address for it.
    NoRouteToBackend,
    /// A fragment whose first fragment was not seen.
    FragmentUnknown,
    /// The table of pending flows could not take the flow.
    FlowTable,
    /// The packet could not be rewritten.
    RewriteFailed,
    /// An ICMP redirect about a translated flow.
    Redirect,
    /// A transport that services do not support yet, to a frontend's address.
    UnsupportedProtocol,
    /// A packet that would open or remove a flow while the tables are handed over to another layout; clients send it again.
    Settling,
    /// A client outside the source ranges of a load-balancer address.
    SourceRange,
}

impl DropReason {
    /// All of them, in counter order.
    pub const ALL: [Self; 15] = [
        Self::NoEndpoint,
        Self::NoLocalEndpoint,
        Self::UnknownPort,
        Self::UnallocatedServiceAddress,
        Self::NoConnection,
        Self::HostUnhooked,
        Self::SnatPortsExhausted,
        Self::NoRouteToBackend,
        Self::FragmentUnknown,
        Self::FlowTable,
        Self::RewriteFailed,
        Self::Redirect,
        Self::UnsupportedProtocol,
        Self::Settling,
        Self::SourceRange,
    ];

    /// The name used in metrics and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::NoLocalEndpoint => "no_local_endpoint",
            Self::UnknownPort => "unknown_port",
            Self::UnallocatedServiceAddress => "unallocated_service_address",
            Self::NoConnection => "no_connection",
            Self::HostUnhooked => "host_unhooked",
            Self::SnatPortsExhausted => "snat_ports_exhausted",
            Self::NoRouteToBackend => "no_route_to_backend",
            Self::FragmentUnknown => "fragment_unknown",
            Self::FlowTable => "flow_table",
            Self::RewriteFailed => "rewrite_failed",
            Self::Redirect => "redirect",
            Self::UnsupportedProtocol => "unsupported_protocol",
            Self::Settling => "settling",
            Self::SourceRange => "source_range",
        }
    }
}

/// How a connection is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Silently.
    Drop,
    /// With a TCP reset, or an ICMP port unreachable for anything else: clients see "connection refused".
    Reject,
}
