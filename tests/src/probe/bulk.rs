//! Many bytes over one connection, each compared with what it should be.

use std::io::{Read, Write as _};
use std::time::Instant;

use super::client::Connection;
use super::protocol::{Checker, Stage, pattern};
use super::tcp_info::retransmits;
use super::{Bulk, Direction, Failure, TcpOnce, Transfer};

/// Transfers and checks; a failure if a byte differs or the connection breaks.
pub fn run(bulk: &Bulk) -> Result<Transfer, Failure> {
    let mut connection = Connection::dial(&TcpOnce { to: bulk.to, bind: None, mapped: false })?;
    let begin = Instant::now();
    let server = match bulk.direction {
        Direction::Up => up(bulk, &mut connection)?,
        Direction::Down => down(bulk, &mut connection)?,
    };
    let retransmits = retransmits(connection.stream());
    Ok(Transfer { server, bytes: bulk.bytes, seconds: begin.elapsed().as_secs_f64(), retransmits })
}

fn up(bulk: &Bulk, connection: &mut Connection) -> Result<String, Failure> {
    connection.send(&format!("sink {}", bulk.bytes))?;
    let mut stream = connection.stream();
    send_pattern(bulk.bytes, |chunk| stream.write_all(chunk)).map_err(Failure::at(Stage::Send, bulk.to))?;
    let answer = connection.receive()?;
    if answer.contains(' ') { Err(Failure::wrong(bulk.to, answer)) } else { Ok(answer) }
}

fn down(bulk: &Bulk, connection: &mut Connection) -> Result<String, Failure> {
    connection.send(&format!("source {}", bulk.bytes))?;
    let server = connection.receive()?;
    match receive_pattern(bulk.bytes, connection.reader()) {
        Ok(Ok(())) => Ok(server),
        Ok(Err(position)) => Err(Failure::wrong(bulk.to, format!("byte {position}"))),
        Err(error) => Err(Failure::at(Stage::Receive, bulk.to)(error)),
    }
}

/// Gives `send` the first `bytes` bytes of the repeated pattern.
pub(super) fn send_pattern(bytes: u64, mut send: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
    let pattern = pattern();
    let mut left = bytes;
    while left > 0 {
        let length = left.min(pattern.len() as u64);
        send(&pattern[..length as usize])?;
        left -= length;
    }
    Ok(())
}

/// Reads `bytes` bytes; the position of the first that is not the pattern's as the inner error.
pub(super) fn receive_pattern(bytes: u64, reader: &mut impl Read) -> std::io::Result<Result<(), u64>> {
    let mut checker = Checker::new();
    let mut buffer = vec![0; 1 << 16];
    while checker.position() < bytes {
        let want = (bytes - checker.position()).min(buffer.len() as u64) as usize;
        let length = reader.read(&mut buffer[..want])?;
        if length == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if let Err(position) = checker.take(&buffer[..length]) {
            return Ok(Err(position));
        }
    }
    Ok(Ok(()))
}
