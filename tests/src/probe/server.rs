//! Servers that say who they are and whom they saw.

use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;

use libc::in6_pktinfo;
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::protocol::{Identity, canonical};
use super::{Report, Serve, bulk, load};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// The largest datagram there is (RFC 768).
const DATAGRAM: usize = 65535;
/// Bytes of datagrams that may wait, more than unprivileged servers get: tests ask much at a time, and nothing sends a datagram again.
const WAITING: usize = 16 << 20;

/// Serves until standard input ends. Panics if an address cannot be had.
pub fn run(serve: &Serve) {
    for &addr in &serve.tcp {
        let socket = open(addr, Type::STREAM, Protocol::TCP);
        socket.listen(BACKLOG).unwrap_or_else(|error| panic!("cannot listen on {addr}: {error}"));
        let name = serve.name.clone();
        thread::spawn(move || accept(&socket.into(), &name));
    }
    for &addr in &serve.udp {
        let socket = open(addr, Type::DGRAM, Protocol::UDP);
        let name = serve.name.clone();
        thread::spawn(move || answer_datagrams(&socket.into(), &name));
    }
    load::print(&Report::Ready);
    // The end of standard input is the end of the servers: its errors too.
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
}

fn open(addr: SocketAddr, kind: Type, protocol: Protocol) -> Socket {
    let open = || {
        let socket = Socket::new(Domain::for_address(addr), kind, Some(protocol))?;
        socket.set_reuse_address(kind == Type::STREAM)?;
        if kind == Type::DGRAM {
            setsockopt(&socket, sockopt::RcvBufForce, &WAITING)?;
        }
        if addr.is_ipv6() {
            // `::` serves IPv4 too; any other address is one of IPv6.
            socket.set_only_v6(!addr.ip().is_unspecified())?;
        }
        socket.bind(&SockAddr::from(addr))?;
        io::Result::Ok(socket)
    };
    open().unwrap_or_else(|error| panic!("cannot bind to {addr}: {error}"))
}

fn accept(listener: &TcpListener, name: &str) {
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                let name = name.to_owned();
                // A client that breaks off is its own affair: it reports what it saw.
                thread::spawn(move || drop(converse(&stream, &name)));
            }
            Err(error) => eprintln!("cannot accept: {error}"),
        }
    }
}

fn converse(stream: &TcpStream, name: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let identity = Identity {
        server: name.to_owned(),
        peer: canonical(stream.peer_addr()?),
        local: canonical(stream.local_addr()?),
    };
    let mut reader = BufReader::with_capacity(1 << 16, stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        match line.trim_end().split_once(' ') {
            None if line.trim_end() == "who" => reply(stream, &serde_json::to_string(&identity)?)?,
            Some(("seq", number)) => reply(stream, &format!("{number} {name}"))?,
            Some(("sink", count)) => sink(stream, &mut reader, parse(count)?, name)?,
            Some(("source", count)) => source(stream, parse(count)?, name)?,
            _ => reply(stream, "unknown command")?,
        }
        line.clear();
    }
    Ok(())
}

fn parse(number: &str) -> io::Result<u64> {
    number.parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn reply(mut stream: &TcpStream, line: &str) -> io::Result<()> {
    stream.write_all(format!("{line}\n").as_bytes())
}

fn sink(stream: &TcpStream, reader: &mut impl BufRead, count: u64, name: &str) -> io::Result<()> {
    match bulk::receive_pattern(count, reader)? {
        Ok(()) => reply(stream, name),
        Err(position) => reply(stream, &format!("{name} differs at {position}")),
    }
}

fn source(mut stream: &TcpStream, count: u64, name: &str) -> io::Result<()> {
    reply(stream, name)?;
    bulk::send_pattern(count, |chunk| stream.write_all(chunk))
}

/// Answers each datagram from the address it was sent to, as a server with several addresses must.
fn answer_datagrams(socket: &UdpSocket, name: &str) {
    let local = socket.local_addr().expect("it is bound");
    if local.is_ipv6() {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true).expect("every IPv6 socket has it");
    }
    let mut buffer = vec![0; DATAGRAM];
    loop {
        // Errors are echoes of answers that found nobody: the next datagram is another's.
        let Ok(Datagram { length, peer, mut info }) = receive(socket, &mut buffer) else { continue };
        let own = info.map_or(local.ip(), |info| Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
        let local = canonical(SocketAddr::new(own, local.port()));
        let identity = Identity { server: name.to_owned(), peer: canonical(peer), local };
        let mut answer = serde_json::to_vec(&identity).expect("an identity is plain data");
        answer.push(b'\n');
        answer.extend_from_slice(&buffer[..length]);
        if let Some(info) = &mut info {
            // Any device: routing decides.
            info.ipi6_ifindex = 0;
        }
        if let Err(error) = send(socket, &answer, peer, info.as_ref()) {
            eprintln!("cannot answer {peer}: {error}");
        }
    }
}

struct Datagram {
    length: usize,
    peer: SocketAddr,
    /// The address it was sent to, of an IPv6 socket.
    info: Option<in6_pktinfo>,
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> nix::Result<Datagram> {
    let mut space = nix::cmsg_space!(in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let info = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(info),
        _ => None,
    });
    let peer = message.address.and_then(|address| {
        let v4 = || Some(SocketAddr::V4((*address.as_sockaddr_in()?).into()));
        address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())).or_else(v4)
    });
    Ok(Datagram { length: message.bytes, peer: peer.ok_or(Errno::EAFNOSUPPORT)?, info })
}

fn send(socket: &UdpSocket, answer: &[u8], peer: SocketAddr, info: Option<&in6_pktinfo>) -> nix::Result<usize> {
    let control: Vec<_> = info.map(ControlMessage::Ipv6PacketInfo).into_iter().collect();
    let parts = [IoSlice::new(answer)];
    sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&SockaddrStorage::from(peer)))
}
