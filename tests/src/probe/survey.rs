//! What a client meets at many destinations: short conversations, many at a time, each destination tried until all its
//! servers have answered.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::load;
use super::{Answer, Ask, Failure, Met, Proto, Report, Sighting, Survey, TcpOnce, UdpOnce, tcp_once, udp_once};

/// Asks under way at a time. Many more than processors: those that nobody answers wait for their whole time limit.
const WORKERS: usize = 120;
/// Of a worker's stack: a conversation nests a few calls.
const STACK: usize = 256 << 10;

/// Does all asks and prints what each met, in their order.
pub fn run(survey: &Survey) {
    let (next, found) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || {
        while let Some((number, ask)) = take(survey, &next) {
            let met = meet(ask);
            found.lock().expect("workers do not panic").insert(number, met);
        }
    };
    thread::scope(|scope| {
        for _ in 0..WORKERS.min(survey.asks.len()) {
            let worker = thread::Builder::new().stack_size(STACK);
            worker.spawn_scoped(scope, work).expect("a thread can be started");
        }
    });
    let found = found.into_inner().expect("workers do not panic");
    load::print(&Report::Survey(found.into_values().collect()));
}

fn take<'a>(survey: &'a Survey, next: &AtomicUsize) -> Option<(usize, &'a Ask)> {
    let number = next.fetch_add(1, Ordering::Relaxed);
    Some((number, survey.asks.get(number)?))
}

/// Asks until enough servers have answered, once failed, or often enough.
fn meet(ask: &Ask) -> Met {
    let mut met = Met::default();
    for number in 0..ask.tries {
        let to = ask.to[number % ask.to.len()];
        let outcome = match ask.proto {
            Proto::Tcp => tcp_once(&TcpOnce { to, bind: None, mapped: false }),
            Proto::Udp => udp_connected(to),
        };
        match outcome {
            Ok(answer) => met.answers.insert(sighting(answer, to)),
            Err(failure) => met.failures.insert(failure.kind()),
        };
        let servers: BTreeSet<_> = met.answers.iter().map(|sighting| &sighting.server).collect();
        if servers.len() >= ask.enough || !met.failures.is_empty() {
            break;
        }
    }
    met
}

/// Connected: the errors that come back are told to connected sockets alone.
fn udp_connected(to: std::net::SocketAddr) -> Result<Answer, Failure> {
    let once = UdpOnce { to: vec![to], bind: None, is_connected: true, mapped: false, payload: 8 };
    udp_once(&once).pop().expect("one destination has one outcome")
}

fn sighting(answer: Answer, to: std::net::SocketAddr) -> Sighting {
    let source: IpAddr = answer.seen_client.ip();
    Sighting { server: answer.server, source, peer: Some(answer.peer).filter(|peer| *peer != to) }
}
