//! Servers and loads from a test's side: started in a place as processes, read by what they report.

use std::env;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use crate::place::Place;
use crate::probe::{
    Answer, Ask, Bulk, Failure, Job, LongLived, Met, Report, Serve, Stats, Survey, TcpLoop, TcpOnce, Transfer, UdpLoop,
    UdpOnce,
};
use crate::process::Process;
use crate::wait;

/// A program of this build: beside the running test, or one directory up from it.
#[track_caller]
pub(crate) fn built_program(name: &str) -> PathBuf {
    let test = env::current_exe().expect("the path of the running program is known");
    let found = test.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not built beside {}: cargo build -p shunt-tests", test.display()))
}

/// Starts `job` in a process at `place`.
#[track_caller]
fn start(place: &Place, job: &Job) -> Process {
    let mut command = place.command(built_program("shunt-probe"));
    command.arg(serde_json::to_string(job).expect("jobs are plain data"));
    Process::start(place.name(), command)
}

fn report(line: &str) -> Option<Report> {
    serde_json::from_str(line).ok()
}

/// The report that `find` picks of what `job` prints, done to its end.
#[track_caller]
fn done<T>(place: &Place, job: &Job, find: impl Fn(Report) -> Option<T>) -> T {
    start(place, job).wait_line(0, "a report", |line| find(report(line)?))
}

/// The report that `find` picks of what a job printed until its end, however late that is.
#[track_caller]
fn ended<T>(mut process: Process, find: impl Fn(Report) -> Option<T>) -> T {
    // The probe itself gives up when nothing moves.
    while process.try_wait().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    process.wait();
    let found = process.lines().iter().find_map(|line| find(report(line)?));
    found.unwrap_or_else(|| panic!("the job ended without a report; it printed:\n{process}"))
}

impl Place {
    /// Servers here that answer with the place's name on all of its addresses, both families, ready when this returns.
    #[track_caller]
    pub fn serve(&self, ports: Ports<'_>) -> Server {
        let any = |port: &u16| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), *port);
        let (tcp, udp) = (ports.tcp.iter().map(any).collect(), ports.udp.iter().map(any).collect());
        self.serve_at(tcp, udp)
    }

    /// Servers here that answer with the place's name, ready when this returns.
    #[track_caller]
    pub fn serve_at(&self, tcp: Vec<SocketAddr>, udp: Vec<SocketAddr>) -> Server {
        let process = start(self, &Job::Serve(Serve { name: self.name().to_owned(), tcp, udp }));
        process.wait_line(0, "listening sockets", |line| matches!(report(line), Some(Report::Ready)).then_some(()));
        Server { process }
    }

    /// One TCP connection from here.
    #[track_caller]
    pub fn tcp(&self, to: SocketAddr) -> Result<Answer, Failure> {
        self.tcp_with(TcpOnce { to, bind: None, mapped: false })
    }

    /// One TCP connection from here.
    #[track_caller]
    pub fn tcp_with(&self, once: TcpOnce) -> Result<Answer, Failure> {
        done(self, &Job::TcpOnce(once), |report| if let Report::Tcp(outcome) = report { Some(outcome) } else { None })
    }

    /// One TCP connection from here, by a connect call that waits.
    #[track_caller]
    pub fn tcp_blocking(&self, once: TcpOnce) -> Result<Answer, Failure> {
        done(
            self,
            &Job::TcpBlocking(once),
            |report| if let Report::Tcp(outcome) = report { Some(outcome) } else { None },
        )
    }

    /// One TCP connection from here, by a socket of Multipath TCP.
    #[track_caller]
    pub fn tcp_multipath(&self, once: TcpOnce) -> Result<Answer, Failure> {
        let is_tcp = |report| if let Report::Tcp(outcome) = report { Some(outcome) } else { None };
        done(self, &Job::TcpMultipath(once), is_tcp)
    }

    /// One datagram from an unconnected socket here, and its answer.
    #[track_caller]
    pub fn udp(&self, to: SocketAddr) -> Result<Answer, Failure> {
        let once = UdpOnce { to: vec![to], bind: None, is_connected: false, mapped: false, payload: 8 };
        self.udp_with(once).pop().expect("one destination has one outcome")
    }

    /// Datagrams from one socket here, and their answers.
    #[track_caller]
    pub fn udp_with(&self, once: UdpOnce) -> Vec<Result<Answer, Failure>> {
        done(self, &Job::UdpOnce(once), |report| if let Report::Udp(outcomes) = report { Some(outcomes) } else { None })
    }

    /// Many bytes over one connection from here, each checked. May take its time: no limit but that something moves.
    #[track_caller]
    pub fn bulk(&self, bulk: Bulk) -> Result<Transfer, Failure> {
        ended(
            start(self, &Job::Bulk(bulk)),
            |report| if let Report::Bulk(outcome) = report { Some(outcome) } else { None },
        )
    }

    /// What is met from here by each of many asks. May take its time: asks have time limits of their own.
    #[track_caller]
    pub fn survey(&self, asks: Vec<Ask>) -> Vec<Met> {
        let count = asks.len();
        let is_survey = |report| if let Report::Survey(met) = report { Some(met) } else { None };
        let met = ended(start(self, &Job::Survey(Survey { asks })), is_survey);
        assert_eq!(met.len(), count, "each ask has its outcome");
        met
    }

    /// New TCP connections from here at a rate, until finished.
    #[track_caller]
    pub fn tcp_loop(&self, tcp: TcpLoop) -> Load {
        Load { process: start(self, &Job::TcpLoop(tcp)) }
    }

    /// Datagrams from here at a rate, until finished.
    #[track_caller]
    pub fn udp_loop(&self, udp: UdpLoop) -> Load {
        Load { process: start(self, &Job::UdpLoop(udp)) }
    }

    /// TCP connections from here that stay, until finished.
    #[track_caller]
    pub fn long_lived(&self, long: LongLived) -> Load {
        Load { process: start(self, &Job::LongLived(long)) }
    }
}

/// The ports of a server.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ports<'a> {
    /// TCP ports.
    pub tcp: &'a [u16],
    /// UDP ports.
    pub udp: &'a [u16],
}

/// Running servers; dropped, they are killed and their connections reset.
#[derive(Debug)]
pub struct Server {
    process: Process,
}

impl Server {
    /// Kills it as a crash does.
    pub fn kill(mut self) {
        self.process.kill();
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }
}

/// A running load generator; dropped, it is killed without a word.
#[derive(Debug)]
pub struct Load {
    process: Process,
}

impl Load {
    /// What it has done so far.
    #[track_caller]
    pub fn stats(&mut self) -> Stats {
        let from = self.process.line_count();
        self.process.send_line("stats");
        // A load with a count may be ending just now; then its last statistics are the answer.
        let answer = wait::until_some("statistics", || {
            let from = if self.process.try_wait().is_some() { 0 } else { from };
            let lines = self.process.lines_from(from);
            lines
                .iter()
                .rev()
                .find_map(|line| as_stats(line))
                .map(Ok)
                .or_else(|| self.ended_silently().then_some(Err(())))
        });
        answer.unwrap_or_else(|()| panic!("the load ended without statistics; it printed:\n{}", self.process))
    }

    fn ended_silently(&self) -> bool {
        self.process.has_ended_output() && !self.process.lines().iter().any(|line| as_stats(line).is_some())
    }

    /// Waits until `is_enough` says so of what it has done; gives up when it makes no progress.
    #[track_caller]
    pub fn wait_for(&mut self, what: &str, is_enough: impl Fn(&Stats) -> bool) -> Stats {
        wait::until_some(what, || Some(self.stats()).filter(&is_enough))
    }

    /// Waits until it has got `count` more right answers than now.
    #[track_caller]
    pub fn wait_answers(&mut self, count: u64) -> Stats {
        let goal = self.stats().answered + count;
        self.wait_for(&format!("{count} more answers"), |stats| stats.answered >= goal)
    }

    /// What failed so far.
    pub fn failures(&self) -> Vec<Failure> {
        let failure = |line: &String| match report(line)? {
            Report::Failed(failure) => Some(failure),
            _ => None,
        };
        self.process.lines().iter().filter_map(failure).collect()
    }

    /// Ends it and returns all it has done.
    #[track_caller]
    pub fn finish(mut self) -> Stats {
        self.process.wait();
        let stats = self.process.lines().iter().rev().find_map(|line| as_stats(line));
        stats.unwrap_or_else(|| panic!("the load ended without statistics; it printed:\n{}", self.process))
    }

    /// Ends it; panics, with what failed, unless every attempt got its answer and there was at least one.
    #[track_caller]
    pub fn finish_clean(mut self) -> Stats {
        self.process.wait();
        let failures = self.failures();
        let stats = self.finish();
        let is_clean = stats.failed.is_empty() && stats.answered > 0;
        assert!(
            is_clean,
            "{} of {} attempts failed: {:?}; the first: {:?}",
            stats.failures(),
            stats.sent,
            stats.failed,
            failures.first()
        );
        stats
    }
}

fn as_stats(line: &str) -> Option<Stats> {
    match report(line)? {
        Report::Stats(stats) => Some(stats),
        _ => None,
    }
}
