//! Whether the socket hooks are asked when a process of this control group dials: tried, not concluded.
//!
//! A datagram socket is connected to a ClusterIP, at a port that no service has. Nothing is sent by that; where the hook is
//! asked, it refuses, and the kernel alone never would. (It counts as a drop, `unknown_port`.)
//! May touch: a socket that is connected but never sends.

use std::io;
use std::net::{IpAddr, SocketAddr};

use proxy_common::abi::address::AddressClass;
use proxy_common::addr::{Port, Proto};
use socket2::{Domain, Socket, Type};

use super::pinned::Programmed;
use super::{Seen, Unseen};
use crate::planner::{FrontendAddr, Tables};

/// A connect and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dialled {
    /// Where to.
    pub at: SocketAddr,
    /// The hook was asked: it refused, as it does.
    pub is_refused: bool,
}

/// Dials one address of each family that has a ClusterIP.
pub(super) fn try_hooks(programmed: &Programmed) -> Seen<Vec<Dialled>> {
    let targets: Vec<_> = [true, false].into_iter().filter_map(|v4| target(&programmed.tables, v4)).collect();
    if targets.is_empty() {
        return Err(Unseen("no service has a ClusterIP that could be dialled".into()));
    }
    targets.into_iter().map(dial).collect()
}

/// A ClusterIP, with a port that none of its services has.
fn target(tables: &Tables, v4: bool) -> Option<SocketAddr> {
    let is_suited = |class: &AddressClass| {
        class.has(AddressClass::CLUSTER_IP) && !class.has(AddressClass::ANY_PORT | AddressClass::NODE)
    };
    let mut addresses = tables.addresses.iter().filter(|(addr, class)| addr.is_v4() == v4 && is_suited(class));
    let (addr, _) = addresses.next()?;
    let is_free = |port: &u16| {
        !tables.frontends.contains_key(&FrontendAddr { addr: *addr, port: Port(*port), proto: Proto::UDP })
    };
    Some(SocketAddr::new(IpAddr::from(*addr), (1..=u16::MAX).rev().find(is_free)?))
}

/// Not bound before: sockets that are may be left to the packets.
fn dial(at: SocketAddr) -> Seen<Dialled> {
    let socket = Socket::new(Domain::for_address(at), Type::DGRAM, None);
    let socket = socket.map_err(|error| Unseen(format!("there are no sockets to try it with: {error}")))?;
    let is_refused = match socket.connect(&at.into()) {
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
        Ok(()) => false,
    };
    Ok(Dialled { at, is_refused })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proxy_common::abi::frontend::FrontendValue;
    use proxy_common::addr::Addr;

    #[test]
    fn a_cluster_ip_is_dialled_at_a_port_that_no_service_has() {
        let mut tables = Tables::default();
        assert_eq!(target(&tables, true), None);
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        let cluster = AddressClass::FRONTEND | AddressClass::CLUSTER_IP;
        for (text, flags) in [
            ("10.96.0.1", cluster | AddressClass::ANY_PORT),
            ("10.96.0.2", AddressClass::FRONTEND),
            ("10.96.0.3", cluster),
            ("fd00::1", cluster),
        ] {
            tables.addresses.insert(addr(text), AddressClass { flags });
        }
        for (port, proto) in [(65535, Proto::UDP), (65534, Proto::TCP)] {
            let at = FrontendAddr { addr: addr("10.96.0.3"), port: Port(port), proto };
            tables.frontends.insert(at, FrontendValue { service: 1, flags: 0 });
        }
        assert_eq!(target(&tables, true), Some("10.96.0.3:65534".parse().unwrap()));
        assert_eq!(target(&tables, false), Some("[fd00::1]:65535".parse().unwrap()));
    }
}
