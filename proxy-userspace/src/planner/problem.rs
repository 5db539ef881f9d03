//! What a service asks for that cannot be done, and what is done instead. Each harms only its own service.

use proxy_common::addr::Port;

use super::key::{FrontendAddr, NameTooLong, PortName};
use crate::model::{Name, ServiceKey};

/// Something that a service does not get.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A transport that the datapath does not carry.
    #[error("port {port} ({name:?}): SCTP is not supported yet; the port is left out")]
    Sctp {
        /// Name of the port.
        name: Name,
        /// Its number.
        port: Port,
    },
    /// Two ports of one name and protocol.
    #[error("port {port}: another port is named {name:?} with the same protocol; the port is left out")]
    DuplicatePort {
        /// Name of both.
        name: Name,
        /// Number of the one that is left out.
        port: Port,
    },
    /// A service without an address.
    #[error("it has no clusterIP; nothing is programmed for it")]
    NoClusterIp,
    /// The name does not fit.
    #[error(transparent)]
    NameTooLong(#[from] NameTooLong),
    /// Somebody else has the frontend.
    #[error("{frontend} belongs to {winner}")]
    Conflict {
        /// What both claim.
        frontend: FrontendAddr,
        /// Who has it.
        winner: PortName,
    },
    /// Another service tells its health at this port.
    #[error("healthCheckNodePort {port} belongs to {winner}; no health is served for this service")]
    HealthCheckTaken {
        /// The port.
        port: Port,
        /// Who has it.
        winner: ServiceKey,
    },
    /// Health checks do not arrive.
    #[error(
        "healthCheckNodePort {port} is a NodePort of {winner}, which gets what is sent there in place of health checks"
    )]
    HealthCheckHidden {
        /// The port.
        port: Port,
        /// Whose NodePort it is.
        winner: PortName,
    },
    /// A table is full.
    #[error("{name}: no room for {wanted} more {what} (the table has {capacity}); it stays as it was")]
    Exhausted {
        /// Which service port.
        name: PortName,
        /// How many it needs.
        wanted: usize,
        /// Of what.
        what: &'static str,
        /// The limit.
        capacity: u32,
    },
    /// An address is dialled as a service and serves as a backend too.
    #[error("{frontend} is also a backend: traffic to the backend is taken for traffic to the service")]
    FrontendIsBackend {
        /// The address.
        frontend: FrontendAddr,
    },
}

impl Problem {
    /// Every kind, as metrics name them.
    pub const KINDS: [&str; 9] = [
        "sctp",
        "duplicate_port",
        "no_cluster_ip",
        "name_too_long",
        "conflict",
        "health_check_taken",
        "health_check_hidden",
        "exhausted",
        "frontend_is_backend",
    ];

    /// Which of [`Self::KINDS`] it is.
    pub const fn kind(&self) -> &'static str {
        let position = match self {
            Self::Sctp { .. } => 0,
            Self::DuplicatePort { .. } => 1,
            Self::NoClusterIp => 2,
            Self::NameTooLong(_) => 3,
            Self::Conflict { .. } => 4,
            Self::HealthCheckTaken { .. } => 5,
            Self::HealthCheckHidden { .. } => 6,
            Self::Exhausted { .. } => 7,
            Self::FrontendIsBackend { .. } => 8,
        };
        Self::KINDS[position]
    }
}
