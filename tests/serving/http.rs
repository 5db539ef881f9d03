//! An HTTP client that is as small as what it asks for.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use shunt_tests::place::Place;

/// Nobody is that slow; a request that hangs shall not hang the test.
const PATIENCE: Duration = Duration::from_secs(30);

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// A connection on which a request has begun.
#[derive(Debug)]
pub struct Request(TcpStream);

impl Request {
    /// Connects and sends a request but for its end.
    pub fn begin(place: &Place, to: SocketAddr, path: &str) -> io::Result<Self> {
        Self::begin_with(place, to, "GET", path)
    }

    fn begin_with(place: &Place, to: SocketAddr, method: &str, path: &str) -> io::Result<Self> {
        Self::begin_as(place, to, &to.to_string(), method, path)
    }

    fn begin_as(place: &Place, to: SocketAddr, host: &str, method: &str, path: &str) -> io::Result<Self> {
        let mut stream = place.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n")?;
        Ok(Self(stream))
    }

    /// Sends the rest and reads the answer.
    pub fn finish(mut self) -> io::Result<Reply> {
        self.0.write_all(b"\r\n")?;
        let mut text = String::new();
        self.0.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Reply { status, head: head.to_ascii_lowercase(), body: body.to_owned() })
    }
}

/// What a GET from `place` gets.
pub fn try_get(place: &Place, to: SocketAddr, path: &str) -> io::Result<Reply> {
    Request::begin(place, to, path)?.finish()
}

/// What a GET gets that names the server so.
pub fn try_get_as(place: &Place, to: SocketAddr, host: &str, path: &str) -> io::Result<Reply> {
    Request::begin_as(place, to, host, "GET", path)?.finish()
}

/// What another method than GET gets.
pub fn try_ask(place: &Place, to: SocketAddr, method: &str, path: &str) -> io::Result<Reply> {
    Request::begin_with(place, to, method, path)?.finish()
}

/// What a GET gets of a server that is there.
#[track_caller]
pub fn get(place: &Place, to: SocketAddr, path: &str) -> Reply {
    try_get(place, to, path).unwrap_or_else(|error| panic!("GET {path} of {to} from {}: {error}", place.name()))
}
