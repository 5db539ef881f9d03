//! Conversations that a test holds open in its own process, several at a time, from ports of its choice. They run in a
//! thread of a namespace, outside of every hooked control group: by the packet path.

use std::collections::BTreeSet;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use shunt_tests::probe::{TIMEOUT, pattern};
use shunt_tests::wait;

/// Who answered, and whom it saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub server: String,
    pub client: SocketAddr,
}

fn parse(line: &[u8]) -> Seen {
    let identity: Value = serde_json::from_slice(line).expect("the server's identity");
    let text = |field: &str| identity[field].as_str().expect("a text");
    Seen { server: text("server").to_owned(), client: text("peer").parse().expect("an address") }
}

/// A TCP connection.
#[derive(Debug)]
pub struct Tcp(BufReader<TcpStream>);

impl Tcp {
    /// From any address and this port, 0 for any. Waits for an earlier connection with these ends to close.
    pub fn dial(port: u16, to: SocketAddr) -> io::Result<Self> {
        wait::until_some("the end of an earlier connection", || match Self::try_dial(port, to) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => None,
            outcome => Some(outcome),
        })
    }

    fn try_dial(port: u16, to: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        if port != 0 {
            // Several connections share the port: their ends differ.
            socket.set_reuse_address(true)?;
            socket.set_reuse_port(true)?;
            socket.bind(&any(to, port))?;
        }
        socket.connect_timeout(&SockAddr::from(to), TIMEOUT)?;
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// As [`Self::dial`], given up after a moment: for what is dropped.
    pub fn dial_briefly(to: SocketAddr) -> io::Result<()> {
        TcpStream::connect_timeout(&to, Duration::from_millis(300)).map(drop)
    }

    pub fn ask(&mut self) -> io::Result<Seen> {
        self.0.get_ref().write_all(b"who\n")?;
        let mut line = Vec::new();
        if self.0.read_until(b'\n', &mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(parse(&line))
    }
}

impl Tcp {
    /// Sends many bytes, each of which the server compares with what it should be; the server's name, and what it found wrong.
    pub fn send_many(&mut self) -> io::Result<String> {
        const REPEATS: usize = 64;
        let pattern = pattern();
        let mut stream = self.0.get_ref();
        stream.write_all(format!("sink {}\n", pattern.len() * REPEATS).as_bytes())?;
        (0..REPEATS).try_for_each(|_| stream.write_all(&pattern))?;
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

/// An unconnected UDP socket.
#[derive(Debug)]
pub struct Udp(UdpSocket);

impl Udp {
    /// Of the family of `like`, on this port, 0 for any. Waits for the port: a process that was just begun may hold a copy
    /// of an earlier socket until its program starts.
    pub fn open(port: u16, like: SocketAddr) -> io::Result<Self> {
        wait::until_some("a free port", || match Self::try_open(port, like) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
            outcome => Some(outcome),
        })
    }

    fn try_open(port: u16, like: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(like), Type::DGRAM, Some(Protocol::UDP))?;
        socket.bind(&any(like, port))?;
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(TIMEOUT))?;
        Ok(Self(socket))
    }

    /// Sends `payload` and waits for the answer, which must come from where it was sent to and repeat the payload.
    pub fn ask(&self, to: SocketAddr, payload: &[u8]) -> io::Result<Seen> {
        self.0.send_to(payload, to)?;
        let mut buffer = vec![0; 65535];
        let (length, from) = self.0.recv_from(&mut buffer)?;
        assert_eq!(from, to, "the source of the answer");
        let end = buffer.iter().position(|&byte| byte == b'\n').expect("an identity and the payload");
        assert!(buffer[end + 1..length] == *payload, "{} bytes came back of {}", length - end - 1, payload.len());
        Ok(parse(&buffer[..end]))
    }

    /// True if `to` answers within a moment.
    pub fn is_answered(&self, to: SocketAddr, payload: &[u8]) -> bool {
        let limit = |time| self.0.set_read_timeout(Some(time)).expect("a limit above zero");
        limit(Duration::from_millis(500));
        let is_answered = self.ask(to, payload).is_ok();
        limit(TIMEOUT);
        is_answered
    }

    /// Sends `count` datagrams of `size` bytes in one call (UDP_SEGMENT) and waits for an answer to each; the numbers of those
    /// that were answered with their own bytes.
    pub fn ask_in_segments(&self, to: SocketAddr, count: u8, size: u16) -> io::Result<BTreeSet<u8>> {
        setsockopt(&self.0, sockopt::UdpGsoSegment, &i32::from(size))?;
        let payload: Vec<u8> = (0..count).flat_map(|number| vec![number; size.into()]).collect();
        self.0.send_to(&payload, to)?;
        let mut answered = BTreeSet::new();
        let mut buffer = vec![0; 65535];
        for _ in 0..count {
            let (length, from) = self.0.recv_from(&mut buffer)?;
            assert_eq!(from, to, "the source of the answer");
            let end = buffer.iter().position(|&byte| byte == b'\n').expect("an identity and the payload");
            let payload = &buffer[end + 1..length];
            assert!(payload.len() == usize::from(size) && payload.iter().all(|byte| *byte == payload[0]));
            answered.insert(payload[0]);
        }
        Ok(answered)
    }

    /// Sends and does not wait.
    pub fn send(&self, to: SocketAddr) -> io::Result<()> {
        self.0.send_to(b"x", to).map(drop)
    }

    /// True if something comes within a moment; for what has been dropped by then, as a counter says.
    pub fn has_answer(&self) -> bool {
        self.0.set_read_timeout(Some(Duration::from_millis(50))).expect("a limit above zero");
        self.0.recv(&mut [0; 2048]).is_ok()
    }
}

/// What an ICMP echo request to `to` comes to: the error that the kernel makes of an unreachable, if one comes.
pub fn ping(to: IpAddr) -> io::Result<()> {
    let (protocol, request) = match to {
        IpAddr::V4(_) => (Protocol::ICMPV4, 8),
        IpAddr::V6(_) => (Protocol::ICMPV6, 128),
    };
    let to = SocketAddr::new(to, 0);
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(protocol))?;
    socket.connect(&SockAddr::from(to))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    // The kernel fills in identifier and checksum.
    socket.send(&[request, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4])?;
    socket.recv(&mut [std::mem::MaybeUninit::uninit(); 100]).map(drop)
}

fn any(like: SocketAddr, port: u16) -> SockAddr {
    let ip = if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SockAddr::from(SocketAddr::new(ip, port))
}
