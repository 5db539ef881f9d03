//! Where the kernel would send a packet: routes, neighbours and the ports of bridges, asked when somebody wants to know.
//!
//! May touch: a netlink socket of the calling thread's network namespace, for reading.

use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

/// Why the kernel's answer is not known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket.
    #[error("cannot open a netlink socket")]
    Socket(#[source] std::io::Error),
    /// A list was not given.
    #[error("cannot list the {0} of the node")]
    List(&'static str, #[source] rtnetlink::Error),
}

/// Where a packet goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// To this node itself.
    Local,
    /// Out by the device with this interface index.
    Out(u32),
    /// Nowhere, as the kernel says it.
    None(String),
}

/// A packet whose route is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Destination.
    pub dst: IpAddr,
    /// Source, if the question is about a packet from there.
    pub src: Option<IpAddr>,
    /// Interface index of the device it comes by; none for one that this node makes.
    pub by: Option<u32>,
}

/// Asks the kernel.
pub struct Routes {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Routes {
    /// Opens a socket. Must be called in a runtime.
    pub fn open() -> Result<Self, Error> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// Where a packet goes.
    pub async fn route(&self, query: &Query) -> Route {
        let answer = self.handle.route().get(message(query)).execute().try_next().await;
        match answer {
            Ok(Some(route)) => parse(&route),
            Ok(None) => Route::None("the kernel gives no answer".to_owned()),
            Err(rtnetlink::Error::NetlinkError(error)) => Route::None(error.to_io().to_string()),
            Err(error) => Route::None(error.to_string()),
        }
    }

    /// The hardware address that the kernel knows a neighbour on a device by.
    pub async fn neighbour(&self, device: u32, addr: IpAddr) -> Result<Option<[u8; 6]>, Error> {
        let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let known = self.neighbours(family, "neighbours").await?;
        let is_it = |message: &&NeighbourMessage| {
            message.header.ifindex == device && destination(message).is_some_and(|found| found == addr)
        };
        Ok(known.iter().find(is_it).and_then(hardware_address))
    }

    /// The port of a bridge behind which the bridge has learnt a hardware address.
    pub async fn bridge_port(&self, bridge: u32, mac: [u8; 6]) -> Result<Option<u32>, Error> {
        let known = self.neighbours(AddressFamily::Bridge, "forwarding entries").await?;
        let is_it = |message: &&NeighbourMessage| {
            let controller = message.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Controller(index) => Some(*index),
                _ => None,
            });
            controller == Some(bridge) && hardware_address(message) == Some(mac)
        };
        // An address of the bridge's own is listed with the bridge itself as its port.
        Ok(known.iter().find(is_it).map(|message| message.header.ifindex).filter(|&port| port != bridge))
    }

    async fn neighbours(&self, family: AddressFamily, what: &'static str) -> Result<Vec<NeighbourMessage>, Error> {
        let request = self.handle.neighbours().get().set_address_family(family);
        request.execute().try_collect().await.map_err(|error| Error::List(what, error))
    }
}

impl Drop for Routes {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn message(query: &Query) -> RouteMessage {
    let mut message = match query.dst {
        IpAddr::V4(dst) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(dst, 32).build(),
        IpAddr::V6(dst) => RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(dst, 128).build(),
    };
    // A question names neither a table nor a kind of route.
    message.header.table = 0;
    message.header.kind = RouteType::Unspec;
    if let Some(src) = query.src {
        message.header.source_prefix_length = if src.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Source(src.into()));
    }
    if let Some(device) = query.by {
        message.attributes.push(RouteAttribute::Iif(device));
    }
    message
}

fn parse(route: &RouteMessage) -> Route {
    let out = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    match (route.header.kind, out) {
        (RouteType::Local, _) => Route::Local,
        (RouteType::Unicast, Some(index)) => Route::Out(index),
        (kind, _) => Route::None(format!("a route of kind {kind:?}").to_lowercase()),
    }
}

fn destination(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)) => Some(IpAddr::V4(*addr)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(addr)) => Some(IpAddr::V6(*addr)),
        _ => None,
    })
}

fn hardware_address(message: &NeighbourMessage) -> Option<[u8; 6]> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    })
}
