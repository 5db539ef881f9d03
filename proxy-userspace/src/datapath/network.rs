//! Devices and addresses of the node's network namespace, and that its default routes change, followed live over netlink.
//!
//! Changes are applied as they are announced; when the kernel had to drop announcements (ENOBUFS), everything is listed
//! anew. Routes have a socket of their own: there may be very many of them, and lost announcements cost nothing there. Consumers see whole states, the newest replaces the older. May touch: a netlink socket, for reading.

use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt};
use imbl::{OrdMap, OrdSet};
use proxy_common::addr::Addr;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::{AddressFamily, address::AddressScope};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::device::{Controller, Device, Layer};
use crate::model::PrimaryAddresses;

/// Why the network cannot be followed (any more).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket.
    #[error("cannot open a netlink socket")]
    Socket(#[source] std::io::Error),
    /// A listing failed.
    #[error("cannot list the {0} of the node")]
    List(&'static str, #[source] rtnetlink::Error),
    /// The socket is dead.
    #[error("the netlink socket was closed")]
    Closed,
}

/// An address bound to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Binding {
    /// Interface index.
    pub device: u32,
    /// The address.
    pub addr: IpAddr,
    /// Reachable from other hosts: neither host nor link scope.
    pub is_global: bool,
}

/// One state of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// By interface index.
    pub devices: OrdMap<u32, Device>,
    /// Addresses of all devices.
    pub bindings: OrdSet<Binding>,
    /// Raised by each complete listing: what was known before may be about other devices with the same indices.
    pub listing: u64,
    /// Raised whenever a default route may have changed.
    pub routing: u64,
}

impl Network {
    /// True if one of `addrs` is bound to the device.
    pub fn is_bound(&self, addrs: &PrimaryAddresses, device: u32) -> bool {
        let of_device = self.bindings.iter().filter(|binding| binding.device == device);
        let mut addresses = of_device.map(|binding| Some(Addr::from(binding.addr)));
        addresses.any(|addr| addr == addrs.v4 || addr == addrs.v6)
    }

    /// Takes over one announcement; false if the kernel says that it had to drop some.
    fn apply(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) -> bool {
        let message = match message.payload {
            NetlinkPayload::InnerMessage(message) => message,
            NetlinkPayload::Overrun(_) => return false,
            _ => return true,
        };
        match message {
            RouteNetlinkMessage::NewLink(link) => self.put_device(&link),
            RouteNetlinkMessage::DelLink(link) => self.remove_device(&link),
            RouteNetlinkMessage::NewAddress(address) => self.bindings.extend(parse_binding(&address)),
            RouteNetlinkMessage::DelAddress(address) => {
                parse_binding(&address).map(|binding| self.bindings.remove(&binding));
            }
            _ => {}
        }
        true
    }

    fn put_device(&mut self, link: &LinkMessage) {
        if is_about_device(link) {
            self.devices.insert(link.header.index, parse_device(link));
        }
    }

    fn remove_device(&mut self, link: &LinkMessage) {
        if is_about_device(link) {
            let index = link.header.index;
            self.devices.remove(&index);
            self.bindings = self.bindings.iter().filter(|binding| binding.device != index).copied().collect();
        }
    }
}

/// True if a message may be about a default route, or one of the halves that VPNs put over it.
fn is_about_default_route(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    match &message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
            route.header.destination_prefix_length <= 1
        }
        NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}

/// False for messages about a device's role in a bridge: there "deleted" means released.
fn is_about_device(link: &LinkMessage) -> bool {
    link.header.interface_family == AddressFamily::Unspec
}

pub(super) fn parse_device(link: &LinkMessage) -> Device {
    let mut device = Device {
        index: link.header.index,
        name: String::new(),
        kind: String::new(),
        layer: Layer::from_arphrd(link.header.link_layer_type.into()),
        is_loopback: link.header.flags.contains(LinkFlags::Loopback),
        controller: None,
        mac: [0; 6],
        is_hardware: false,
    };
    let (mut controller, mut port_kind) = (None, String::new());
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name.clone_from(name),
            LinkAttribute::Address(mac) => device.mac = mac.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::ParentDevName(_) => device.is_hardware = true,
            LinkAttribute::Controller(index) => controller = Some(*index).filter(|&index| index != 0),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => device.kind = kind.to_string(),
                        LinkInfo::PortKind(kind) => port_kind = kind.to_string(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    device.controller = controller.map(|index| Controller { index, kind: port_kind });
    device
}

pub(super) fn parse_binding(message: &AddressMessage) -> Option<Binding> {
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            // On point-to-point devices "address" is the peer's.
            AddressAttribute::Local(addr) => local = Some(*addr),
            AddressAttribute::Address(addr) => address = Some(*addr),
            _ => {}
        }
    }
    let is_global = !matches!(message.header.scope, AddressScope::Host | AddressScope::Link | AddressScope::Nowhere);
    Some(Binding { device: message.header.index, addr: local.or(address)?, is_global })
}

/// Follows the network of the namespace in which it was opened.
pub struct Watcher {
    handle: Handle,
    messages: Messages,
    routes: Messages,
    state: watch::Sender<Network>,
    connections: [tokio::task::JoinHandle<()>; 2],
}

type Messages =
    futures_channel::mpsc::UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)>;

impl Watcher {
    /// Opens the socket, lists everything once, and hands out the state.
    pub async fn open() -> Result<(Self, watch::Receiver<Network>), Error> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        // Subscribed before the listing: nothing falls in between.
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&groups).map_err(Error::Socket)?;
        let groups = [MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
        let (of_routes, _, routes) = rtnetlink::new_multicast_connection(&groups).map_err(Error::Socket)?;
        let connections = [tokio::spawn(connection), tokio::spawn(of_routes)];
        let (state, receiver) = watch::channel(Network::default());
        let mut watcher = Self { handle, messages, routes, state, connections };
        watcher.list().await?;
        Ok((watcher, receiver))
    }

    /// Applies announcements for ever.
    pub async fn run(mut self) -> Result<(), Error> {
        loop {
            tokio::select! {
                first = self.messages.next() => self.take_changes(first.ok_or(Error::Closed)?.0).await?,
                first = self.routes.next() => self.take_routes(&first.ok_or(Error::Closed)?.0),
            }
        }
    }

    /// Applies what waits in the queue together, so that consumers see one change.
    async fn take_changes(&mut self, first: NetlinkMessage<RouteNetlinkMessage>) -> Result<(), Error> {
        let mut next = self.state.borrow().clone();
        let mut is_complete = next.apply(first);
        while let Ok((message, _)) = self.messages.try_recv() {
            is_complete &= next.apply(message);
        }
        if is_complete {
            self.publish(next);
            return Ok(());
        }
        warn!("netlink announcements were lost, listing all devices and addresses");
        self.list().await
    }

    /// Tells once that a default route may have changed, if any message in the queue says so.
    fn take_routes(&mut self, first: &NetlinkMessage<RouteNetlinkMessage>) {
        let mut is_news = is_about_default_route(first);
        while let Ok((message, _)) = self.routes.try_recv() {
            is_news |= is_about_default_route(&message);
        }
        if is_news {
            self.state.send_modify(|network| network.routing += 1);
        }
    }

    fn publish(&self, next: Network) {
        self.state.send_if_modified(|state| {
            let is_changed = *state != next;
            *state = next;
            is_changed
        });
    }

    async fn list(&mut self) -> Result<(), Error> {
        let (listing, routing) = {
            let known = self.state.borrow();
            (known.listing + 1, known.routing)
        };
        let mut next = Network { listing, routing, ..Network::default() };
        let links: Vec<_> =
            self.handle.link().get().execute().try_collect().await.map_err(|error| Error::List("devices", error))?;
        links.iter().for_each(|link| next.put_device(link));
        let addresses: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| Error::List("addresses", error))?;
        next.bindings = addresses.iter().filter_map(parse_binding).collect();
        debug!(devices = next.devices.len(), addresses = next.bindings.len(), "network listed");
        self.publish(next);
        Ok(())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.connections.iter().for_each(tokio::task::JoinHandle::abort);
    }
}
