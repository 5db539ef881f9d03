//! Sockets of this node that wait for clients, as the kernel lists them (sock_diag(7)): TCP listeners, and UDP sockets without a
//! peer. Connections are not listed: a node may have a hundred thousand. May touch: the kernel's sockets, for reading.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_common::addr::Proto;

use super::netlink::{self, Message, NLM_F_DUMP};
use super::sys::NetlinkSocket;

/// A socket that waits for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where.
    pub at: SocketAddr,
    /// TCP or UDP.
    pub proto: Proto,
}

// linux/sock_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// linux/inet_diag.h, struct inet_diag_req_v2: what comes after the states is an address, of which nothing is asked.
const ADDRESS_BYTES: usize = 48;
/// net/tcp_states.h: as a bit of the states that are asked for. UDP sockets without a peer are closed.
const TCP_LISTEN: u32 = 1 << 10;
const TCP_CLOSE: u32 = 1 << 7;

/// All of them, in the network namespace of the calling thread.
pub fn listeners() -> io::Result<Vec<Listener>> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for (proto, states) in [(Proto::TCP, TCP_LISTEN), (Proto::UDP, TCP_CLOSE)] {
            list(family as u8, proto, states, &mut found)?;
        }
    }
    Ok(found)
}

fn list(family: u8, proto: Proto, states: u32, found: &mut Vec<Listener>) -> io::Result<()> {
    let socket = NetlinkSocket::open(libc::NETLINK_SOCK_DIAG)?;
    netlink::dump(&socket, &request(family, proto, states), |_, body| {
        found.extend(parse(body).map(|at| Listener { at, proto }));
    })
}

fn request(family: u8, proto: Proto, states: u32) -> Vec<u8> {
    let mut header = vec![family, proto.0, 0, 0];
    header.extend(states.to_ne_bytes());
    header.extend([0; ADDRESS_BYTES]);
    Message::new(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, 0, &header).finish()
}

/// Where a socket is bound, by its `struct inet_diag_msg`; none if it has a peer.
fn parse(body: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(*body.first()?);
    let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    let addr: IpAddr = match family {
        libc::AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(body.get(8..12)?).ok()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(<[u8; 16]>::try_from(body.get(8..24)?).ok()?).into(),
        _ => return None,
    };
    (port(6)? == 0).then_some(SocketAddr::new(addr, port(4)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(family: i32, addr: &[u8], port: u16, peer: u16) -> Vec<u8> {
        let mut body = vec![family as u8, 10, 0, 0];
        body.extend(port.to_be_bytes());
        body.extend(peer.to_be_bytes());
        body.extend(addr);
        body.resize(72, 0);
        body
    }

    #[test]
    fn sockets_tell_where_they_are_bound() {
        let v4 = socket(libc::AF_INET, &[192, 0, 2, 1], 30080, 0);
        assert_eq!(parse(&v4), Some("192.0.2.1:30080".parse().unwrap()));
        assert_eq!(parse(&socket(libc::AF_INET6, &[0; 16], 53, 0)), Some("[::]:53".parse().unwrap()));
        assert_eq!(parse(&socket(libc::AF_INET, &[192, 0, 2, 1], 30080, 7)), None, "it has a peer");
        for length in 0..12 {
            assert_eq!(parse(&v4[..length]), None);
        }
    }

    #[test]
    fn listeners_of_this_process_are_found() {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = std::net::UdpSocket::bind("[::1]:0").unwrap();
        let found = listeners().unwrap();
        for (at, proto) in [(tcp.local_addr(), Proto::TCP), (udp.local_addr(), Proto::UDP)] {
            let listener = Listener { at: at.unwrap(), proto };
            assert!(found.contains(&listener), "{listener:?}: {found:?}");
        }
    }
}
