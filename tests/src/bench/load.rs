//! A process that measures in its place (namespace and control group), job by job, and the server it talks to.

use std::env;
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::place::Place;
use crate::process::Process;

/// First argument of the measuring process.
pub const MEASURE: &str = "measure";
/// First argument of the server.
pub const SERVE: &str = "serve";
/// Where the server listens.
pub const PORT: u16 = 7000;
/// First byte of a connection that asks for one byte.
const ONE_BYTE: u8 = b'1';
/// First byte of a connection that sends many.
const MANY_BYTES: u8 = b'n';
const CHUNK: usize = 128 << 10;

/// What to measure.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Job {
    /// Connections one after the other, each to its first byte: the median nanoseconds.
    Connect {
        /// Where to.
        to: SocketAddr,
        /// How many.
        count: usize,
    },
    /// One connection that sends: nanoseconds until all has arrived.
    Send {
        /// Where to.
        to: SocketAddr,
        /// How many bytes.
        bytes: usize,
    },
}

/// A measuring process.
pub struct Meter(Process);

impl Meter {
    /// One at `place`.
    pub fn start(place: &Place) -> Self {
        Self(start(place, MEASURE))
    }

    /// The nanoseconds of a job.
    pub fn nanos(&mut self, job: Job) -> f64 {
        let from = self.0.line_count();
        self.0.send_line(&serde_json::to_string(&job).expect("jobs are plain data"));
        self.0.wait_line(from, "a measurement", |line| line.parse().ok())
    }
}

/// A server at `place`, for both families.
pub fn server(place: &Place) -> Process {
    let process = start(place, SERVE);
    process.wait_line(0, "a listening socket", |line| (line == "listening").then_some(()));
    process
}

fn start(place: &Place, word: &str) -> Process {
    let mut command = place.command(env::current_exe().expect("the path of the running program is known"));
    command.arg(word);
    Process::start(place.name(), command)
}

/// The measuring process: a job a line in, a number a line out.
pub fn measure() {
    for line in io::stdin().lock().lines() {
        let job = serde_json::from_str(&line.expect("standard input can be read")).expect("jobs are plain data");
        let nanos = match job {
            Job::Connect { to, count } => connect_many(to, count),
            Job::Send { to, bytes } => send(to, bytes),
        };
        println!("{}", nanos.unwrap_or_else(|error| panic!("{job:?}: {error}")));
    }
}

fn connect_many(to: SocketAddr, count: usize) -> io::Result<u64> {
    let mut nanos = (0..count).map(|_| connect(to)).collect::<io::Result<Vec<_>>>()?;
    nanos.sort_unstable();
    Ok(nanos[nanos.len() / 2])
}

fn connect(to: SocketAddr) -> io::Result<u64> {
    let start = Instant::now();
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[ONE_BYTE])?;
    stream.read_exact(&mut [0])?;
    let nanos = start.elapsed().as_nanos() as u64;
    stream.shutdown(Shutdown::Write)?;
    // The server resets it.
    let _ = stream.read(&mut [0]);
    Ok(nanos)
}

fn send(to: SocketAddr, bytes: usize) -> io::Result<u64> {
    let mut stream = TcpStream::connect(to)?;
    let chunk = vec![7; CHUNK];
    let start = Instant::now();
    stream.write_all(&[MANY_BYTES])?;
    for _ in 0..bytes / CHUNK {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(start.elapsed().as_nanos() as u64)
}

/// The server, until it is killed.
pub fn serve() {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)).expect("the port is free");
    println!("listening");
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut first = [0];
        if stream.read_exact(&mut first).is_err() {
            continue;
        }
        if first[0] == ONE_BYTE {
            let _ = stream.write_all(&first);
            // Ends in TIME_WAIT would make the kernel search for a free port longer with each round, and flows that are not
            // over would clash with direct connections.
            let _ = stream.read(&mut first);
            let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        } else {
            thread::spawn(move || swallow(stream));
        }
    }
}

fn swallow(mut stream: TcpStream) {
    let mut chunk = vec![0; CHUNK];
    while stream.read(&mut chunk).is_ok_and(|count| count > 0) {}
    let _ = stream.write_all(&[ONE_BYTE]);
}
