//! What frontends, backends and service ports are known by.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use proxy_common::abi::frontend::FrontendKey;
use proxy_common::abi::service::{SERVICE_NAME_BYTES, ServiceName};
use proxy_common::addr::{Addr, Port, Proto};

use crate::model::{Family, Name, ServiceKey, SourceId};

/// Declares an (address, port, protocol) of one role; ordered by number, as people read them.
macro_rules! transport_address {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name {
            /// Address.
            pub addr: Addr,
            /// Port.
            pub port: Port,
            /// Protocol.
            pub proto: Proto,
        }

        impl Ord for $name {
            fn cmp(&self, other: &Self) -> Ordering {
                let number = |addr: &Addr| addr.0.map(u32::from_be);
                (number(&self.addr), self.port, self.proto).cmp(&(number(&other.addr), other.port, other.proto))
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

transport_address! {
    /// What clients dial. NodePorts have the wildcard address of their family.
    FrontendAddr
}

transport_address! {
    /// Where a backend listens.
    BackendAddr
}

impl FrontendAddr {
    /// No frontend comes before it.
    pub const FIRST: Self = Self { addr: Addr::UNSPECIFIED_V6, port: Port(0), proto: Proto(0) };

    /// True for a NodePort.
    pub fn is_node_port(&self) -> bool {
        self.addr == self.addr.wildcard()
    }

    /// The key of the `frontends` table.
    pub fn record(&self) -> FrontendKey {
        FrontendKey { addr: self.addr, port: self.port.be(), proto: self.proto.0, reserved: 0 }
    }
}

impl From<FrontendKey> for FrontendAddr {
    fn from(key: FrontendKey) -> Self {
        Self { addr: key.addr, port: key.port.host(), proto: Proto(key.proto) }
    }
}

impl fmt::Display for FrontendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_transport(f, &self.addr, self.port, self.proto)
    }
}

impl fmt::Display for BackendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_transport(f, &self.addr, self.port, self.proto)
    }
}

/// `10.96.0.10:80/TCP`, `[fd00::1]:80/TCP`.
fn write_transport(f: &mut fmt::Formatter<'_>, addr: &Addr, port: Port, proto: Proto) -> fmt::Result {
    match addr.is_v4() {
        true => write!(f, "{addr}:{port}/{proto}"),
        false => write!(f, "[{addr}]:{port}/{proto}"),
    }
}

/// Name of what has one id in the tables: one port of a service in one family.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortName {
    service: ServiceKey,
    port: Name,
    proto: Proto,
    family: Family,
}

/// A name that does not fit into the table of names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} is {length} bytes long, a name has at most {SERVICE_NAME_BYTES}")]
pub struct NameTooLong {
    /// The name.
    pub name: String,
    /// Its length in bytes.
    pub length: usize,
}

impl PortName {
    /// The name, if its text form fits into the table of names.
    pub fn new(service: ServiceKey, port: Name, proto: Proto, family: Family) -> Result<Self, NameTooLong> {
        let name = Self { service, port, proto, family };
        let text = name.to_string();
        match text.len() <= SERVICE_NAME_BYTES {
            true => Ok(name),
            false => Err(NameTooLong { length: text.len(), name: text }),
        }
    }

    /// Smaller than the name of every port of `service`.
    pub(super) fn first_of(service: ServiceKey) -> Self {
        Self { service, port: Name::from(""), proto: Proto(0), family: Family::V4 }
    }

    /// The service.
    pub fn service(&self) -> &ServiceKey {
        &self.service
    }

    /// Name of the port; empty if unnamed.
    pub fn port(&self) -> &Name {
        &self.port
    }

    /// Protocol of the port.
    pub fn proto(&self) -> Proto {
        self.proto
    }

    /// Family of its frontends and backends.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The value of the `service_names` table.
    pub fn record(&self) -> ServiceName {
        ServiceName::new(&self.to_string()).expect("a name is only made if its text fits")
    }
}

impl fmt::Display for PortName {
    /// `manifests/default/web:http/TCP/IPv4`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}/{}", self.service, self.port, self.proto, self.family)
    }
}

impl fmt::Debug for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no name of a service port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not SOURCE/NAMESPACE/NAME:PORT/PROTOCOL/FAMILY")]
pub struct NotAName(pub String);

impl FromStr for PortName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        parse_name(text).ok_or_else(|| NotAName(text.to_owned()))
    }
}

fn parse_name(text: &str) -> Option<PortName> {
    let (rest, family) = text.rsplit_once('/')?;
    let (rest, proto) = rest.rsplit_once('/')?;
    let (rest, port) = rest.rsplit_once(':')?;
    let (source, rest) = rest.split_once('/')?;
    let (namespace, name) = rest.split_once('/')?;
    let proto = [Proto::TCP, Proto::UDP].into_iter().find(|known| known.to_string() == proto)?;
    let service =
        ServiceKey { source: SourceId::from_name(source)?, namespace: Name::from(namespace), name: Name::from(name) };
    PortName::new(service, Name::from(port), proto, Family::from_name(family)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_round_trip() {
        for text in ["manifests/default/web:http/TCP/IPv4", "kubernetes/kube-system/dns:/UDP/IPv6"] {
            assert_eq!(text.parse::<PortName>().unwrap().to_string(), text);
        }
        for text in ["", "web", "nobody/default/web:http/TCP/IPv4", "manifests/default/web:http/SCTP/IPv4"] {
            assert!(text.parse::<PortName>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused_with_the_limit() {
        let service = ServiceKey {
            source: SourceId::Consul,
            namespace: Name::from("default"),
            name: Name::from("x".repeat(300).as_str()),
        };
        let error = PortName::new(service, Name::from(""), Proto::TCP, Family::V4).unwrap_err();
        assert!(error.to_string().ends_with("a name has at most 256"), "{error}");
    }

    #[test]
    fn addresses_are_ordered_by_number() {
        let at = |last: u8, port: u16| BackendAddr {
            addr: Addr::from(std::net::Ipv4Addr::new(10, 0, 0, last)),
            port: Port(port),
            proto: Proto::TCP,
        };
        assert!(at(2, 80) < at(10, 80));
        assert!(at(2, 80) < at(2, 443));
    }
}
