//! TCP clients: one conversation, loops of new connections, connections that stay.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::load::{self, Attempts, Success};
use super::protocol::{Identity, Stage, canonical, mapped};
use super::tcp_info::retransmits;
use super::{Answer, Failure, LongLived, TIMEOUT, TcpLoop, TcpOnce};

/// One connection: who answers, and every address of it.
pub fn tcp_once(once: &TcpOnce) -> Result<Answer, Failure> {
    converse(Connection::dial(once)?, once)
}

/// The same by a connect call that waits.
pub fn tcp_blocking(once: &TcpOnce) -> Result<Answer, Failure> {
    converse(Connection::dial_blocking(once)?, once)
}

/// The same by a socket of Multipath TCP (RFC 8684); the server may know plain TCP alone.
pub fn tcp_multipath(once: &TcpOnce) -> Result<Answer, Failure> {
    let connect = |socket: &Socket, to: &SockAddr| socket.connect_timeout(to, TIMEOUT);
    converse(Connection::over(open(once, Protocol::MPTCP, connect)?, once.to)?, once)
}

fn converse(mut connection: Connection, once: &TcpOnce) -> Result<Answer, Failure> {
    let identity = connection.who()?;
    let failed = Failure::at(Stage::Socket, once.to);
    let stream = connection.stream();
    Ok(Answer {
        server: identity.server,
        local: canonical(stream.local_addr().map_err(&failed)?),
        peer: canonical(stream.peer_addr().map_err(&failed)?),
        seen_client: identity.peer,
        seen_server: identity.local,
    })
}

/// A connection to a server of this module's protocol.
#[derive(Debug)]
pub(super) struct Connection {
    reader: BufReader<TcpStream>,
    to: SocketAddr,
}

impl Connection {
    /// Connects without blocking and polls.
    pub fn dial(once: &TcpOnce) -> Result<Self, Failure> {
        let connect = |socket: &Socket, to: &SockAddr| socket.connect_timeout(to, TIMEOUT);
        Self::over(open(once, Protocol::TCP, connect)?, once.to)
    }

    fn dial_blocking(once: &TcpOnce) -> Result<Self, Failure> {
        let connect = |socket: &Socket, to: &SockAddr| {
            socket.set_write_timeout(Some(TIMEOUT))?;
            socket.connect(to)
        };
        Self::over(open(once, Protocol::TCP, connect)?, once.to)
    }

    fn over(stream: TcpStream, to: SocketAddr) -> Result<Self, Failure> {
        let failed = Failure::at(Stage::Socket, to);
        stream.set_nodelay(true).map_err(&failed)?;
        stream.set_read_timeout(Some(TIMEOUT)).map_err(&failed)?;
        stream.set_write_timeout(Some(TIMEOUT)).map_err(&failed)?;
        Ok(Self { reader: BufReader::with_capacity(1 << 16, stream), to })
    }

    pub fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    pub fn reader(&mut self) -> &mut BufReader<TcpStream> {
        &mut self.reader
    }

    pub fn send(&self, line: &str) -> Result<(), Failure> {
        let mut stream = self.stream();
        stream.write_all(format!("{line}\n").as_bytes()).map_err(Failure::at(Stage::Send, self.to))
    }

    pub fn receive(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        let failed = Failure::at(Stage::Receive, self.to);
        let length = self.reader.read_line(&mut line).map_err(&failed)?;
        if length == 0 {
            return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(line.trim_end().to_owned())
    }

    pub fn who(&mut self) -> Result<Identity, Failure> {
        self.send("who")?;
        let line = self.receive()?;
        serde_json::from_str(&line).map_err(|_| Failure::wrong(self.to, format!("answer {line:?}")))
    }
}

fn open(
    once: &TcpOnce,
    protocol: Protocol,
    connect: impl FnOnce(&Socket, &SockAddr) -> io::Result<()>,
) -> Result<TcpStream, Failure> {
    let to = if once.mapped { mapped(once.to) } else { once.to };
    let failed = Failure::at(Stage::Socket, once.to);
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol)).map_err(&failed)?;
    if let Some(bind) = once.bind {
        socket.set_reuse_address(true).map_err(&failed)?;
        socket.bind(&SockAddr::from(if once.mapped { mapped(bind) } else { bind })).map_err(&failed)?;
    }
    connect(&socket, &SockAddr::from(to)).map_err(Failure::at(Stage::Connect, once.to))?;
    Ok(socket.into())
}

/// The attempts of a [`TcpLoop`]: connect, ask who answers, close.
pub(super) struct TcpAttempts(TcpLoop);

impl TcpAttempts {
    pub fn new(tcp: &TcpLoop) -> Self {
        Self(tcp.clone())
    }
}

impl Attempts for TcpAttempts {
    type Worker = ();

    fn workers(&self) -> u32 {
        self.0.workers
    }

    fn interval(&self) -> Duration {
        load::interval(self.0.rate, self.0.workers)
    }

    fn count(&self) -> Option<u64> {
        self.0.count
    }

    fn attempt(&self, (): &mut (), number: u64) -> Result<Success, Failure> {
        let to = self.0.to[number as usize % self.0.to.len()];
        let mut connection = Connection::dial(&TcpOnce { to, bind: None, mapped: false })?;
        let server = connection.who()?.server;
        Ok(Success { server, has_retransmitted: retransmits(connection.stream()) > 0 })
    }
}

/// The lines of [`LongLived`] connections, one connection a worker.
pub(super) struct Conversations(LongLived);

impl Conversations {
    pub fn new(long: &LongLived) -> Self {
        Self(long.clone())
    }
}

/// A connection, the server at its other end, and how often this end had sent again at the last look.
#[derive(Default)]
pub(super) struct Conversation {
    open: Option<(Connection, String)>,
    retransmits: u32,
}

impl Attempts for Conversations {
    type Worker = Conversation;

    fn workers(&self) -> u32 {
        self.0.connections
    }

    fn interval(&self) -> Duration {
        Duration::from_millis(self.0.interval_ms)
    }

    fn count(&self) -> Option<u64> {
        None
    }

    fn ends_by_failure(&self) -> bool {
        true
    }

    fn attempt(&self, worker: &mut Conversation, number: u64) -> Result<Success, Failure> {
        let to = self.0.to;
        if worker.open.is_none() {
            let mut connection = Connection::dial(&TcpOnce { to, bind: None, mapped: false })?;
            let server = connection.who()?.server;
            worker.open = Some((connection, server));
        }
        let (connection, server) = worker.open.as_mut().expect("it was opened above");
        connection.send(&format!("seq {number}"))?;
        let (line, expected) = (connection.receive()?, format!("{number} {server}"));
        if line != expected {
            return Err(Failure::wrong(to, format!("answer {line:?} for {expected:?}")));
        }
        let before = std::mem::replace(&mut worker.retransmits, retransmits(connection.stream()));
        Ok(Success { server: server.clone(), has_retransmitted: before == 0 && worker.retransmits > 0 })
    }
}
