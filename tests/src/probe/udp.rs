//! UDP clients: connected and unconnected sockets, one datagram and its answer at a time.

use std::cell::Cell;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::load::{self, Attempts, Success};
use super::protocol::{Identity, Stage, canonical, mapped, pattern};
use super::{Answer, Failure, TIMEOUT, UdpLoop, UdpOnce, UdpSockets};

/// One socket, one datagram a destination; each outcome in the order of the destinations.
pub fn udp_once(once: &UdpOnce) -> Vec<Result<Answer, Failure>> {
    let Some(&first) = once.to.first() else { return Vec::new() };
    let open = Client::open(first, once.bind, once.mapped);
    let client = match open {
        Ok(client) => client,
        Err(failure) => return vec![Err(failure)],
    };
    let ask = |&to: &SocketAddr| {
        if once.is_connected {
            client.connect(to)?;
        }
        client.ask(to, &payload(once.payload))
    };
    once.to.iter().map(ask).collect()
}

/// A recognisable payload of so many bytes.
fn payload(length: usize) -> Vec<u8> {
    pattern().into_iter().cycle().take(length).collect()
}

struct Client {
    socket: UdpSocket,
    is_mapped: bool,
    /// It was; somebody else may have ended that.
    is_connected: Cell<bool>,
}

impl Client {
    /// A socket of the family of `to`, without a port until it is connected or sends.
    fn open(to: SocketAddr, bind: Option<SocketAddr>, is_mapped: bool) -> Result<Self, Failure> {
        let open = || {
            let socket = Socket::new(
                Domain::for_address(if is_mapped { mapped(to) } else { to }),
                Type::DGRAM,
                Some(Protocol::UDP),
            )?;
            if let Some(bind) = bind {
                let is_any = bind.ip().is_unspecified();
                socket.bind(&SockAddr::from(if is_mapped && !is_any { mapped(bind) } else { bind }))?;
            }
            let socket = UdpSocket::from(socket);
            socket.set_read_timeout(Some(TIMEOUT))?;
            Ok(Self { socket, is_mapped, is_connected: Cell::new(false) })
        };
        open().map_err(Failure::at(Stage::Socket, to))
    }

    fn dialled(&self, to: SocketAddr) -> SocketAddr {
        if self.is_mapped { mapped(to) } else { to }
    }

    fn connect(&self, to: SocketAddr) -> Result<(), Failure> {
        self.socket.connect(self.dialled(to)).map_err(Failure::at(Stage::Connect, to))?;
        self.is_connected.set(true);
        Ok(())
    }

    /// Sends to `to`, connected or not, and waits for the answer, which must come from `to` and hold what was sent.
    fn ask(&self, to: SocketAddr, payload: &[u8]) -> Result<Answer, Failure> {
        let connected_to = self.socket.peer_addr().ok();
        let sent = match self.is_connected.get() {
            true => self.socket.send(payload),
            false => self.socket.send_to(payload, self.dialled(to)),
        };
        sent.map_err(Failure::at(Stage::Send, to))?;
        let mut buffer = vec![0; 65535];
        let (length, source) = self.socket.recv_from(&mut buffer).map_err(Failure::at(Stage::Receive, to))?;
        let source = canonical(source);
        if source != to {
            return Err(Failure::wrong(to, format!("source {source}")));
        }
        let (identity, echo) = parse(&buffer[..length]).ok_or_else(|| Failure::wrong(to, "answer"))?;
        if echo != payload {
            return Err(Failure::wrong(to, format!("payload of {} bytes for {}", echo.len(), payload.len())));
        }
        let local = self.socket.local_addr().map_err(Failure::at(Stage::Socket, to))?;
        Ok(Answer {
            server: identity.server,
            local: canonical(local),
            peer: connected_to.map_or(source, canonical),
            seen_client: identity.peer,
            seen_server: identity.local,
        })
    }
}

fn parse(answer: &[u8]) -> Option<(Identity, &[u8])> {
    let end = answer.iter().position(|&byte| byte == b'\n')?;
    Some((serde_json::from_slice(&answer[..end]).ok()?, &answer[end + 1..]))
}

/// The attempts of a [`UdpLoop`]: one datagram and its answer.
pub(super) struct UdpAttempts(UdpLoop);

impl UdpAttempts {
    pub fn new(udp: &UdpLoop) -> Self {
        Self(udp.clone())
    }
}

/// The socket that a worker keeps.
#[derive(Default)]
pub(super) struct Kept(Option<Client>);

impl Attempts for UdpAttempts {
    type Worker = Kept;

    fn workers(&self) -> u32 {
        self.0.workers
    }

    fn interval(&self) -> Duration {
        load::interval(self.0.rate, self.0.workers)
    }

    fn count(&self) -> Option<u64> {
        self.0.count
    }

    fn attempt(&self, worker: &mut Kept, number: u64) -> Result<Success, Failure> {
        let to = self.0.to[number as usize % self.0.to.len()];
        let client = match worker.0.take() {
            Some(client) => client,
            None => Client::open(to, None, false)?,
        };
        let is_connected = matches!(self.0.sockets, UdpSockets::ConnectedEach | UdpSockets::ConnectedKept);
        if is_connected && !client.is_connected.get() {
            client.connect(to)?;
        }
        // Numbered, so that an answer that comes late is not taken for the next one's.
        let answer = client.ask(to, &number.to_be_bytes())?;
        if matches!(self.0.sockets, UdpSockets::UnconnectedKept | UdpSockets::ConnectedKept) {
            worker.0 = Some(client);
        }
        Ok(Success { server: answer.server, has_retransmitted: false })
    }
}
