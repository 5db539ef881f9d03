//! The frame of all load generators: workers, pace, statistics, when to end.

use std::io::{self, BufRead as _, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::{Failure, Report, Stats};

/// The longest sleep between two looks whether the load is over.
const PAUSE: Duration = Duration::from_millis(20);

/// One thing that a load does again and again.
pub trait Attempts: Send + Sync + 'static {
    /// What a worker keeps between attempts.
    type Worker: Default;

    /// Workers, all attempting at a time.
    fn workers(&self) -> u32;

    /// From the beginning of one attempt to the next, of one worker.
    fn interval(&self) -> Duration;

    /// Ends after so many attempts.
    fn count(&self) -> Option<u64>;

    /// Makes attempt number `number`.
    fn attempt(&self, worker: &mut Self::Worker, number: u64) -> Result<Success, Failure>;

    /// True if a worker that failed has nothing left to do.
    fn ends_by_failure(&self) -> bool {
        false
    }
}

/// An attempt that got the right answer.
pub struct Success {
    pub server: String,
    /// This end had to send something again.
    pub has_retransmitted: bool,
}

/// The interval that gives `rate` attempts a second with so many workers.
pub fn interval(rate: u32, workers: u32) -> Duration {
    if rate == 0 { Duration::ZERO } else { Duration::from_secs_f64(f64::from(workers.max(1)) / f64::from(rate)) }
}

/// Prints a report as one line.
pub fn print(report: &Report) {
    let line = serde_json::to_string(report).expect("reports are plain data");
    // Nobody reads any more: the job ends soon.
    let _ = writeln!(io::stdout(), "{line}");
}

/// Makes attempts until their count is reached or standard input ends, then prints the statistics.
pub fn run<A: Attempts>(attempts: A) {
    let state = Arc::new(State::default());
    let attempts = Arc::new(attempts);
    let workers: Vec<_> = (0..attempts.workers().max(1))
        .map(|index| {
            let (attempts, state) = (attempts.clone(), state.clone());
            thread::Builder::new().name(format!("worker-{index}")).spawn(move || work(&*attempts, &state, index))
        })
        .collect();
    // Ends with the process; it may be reading when the count is reached.
    let listener = state.clone();
    thread::spawn(move || listen(&listener));
    for worker in workers {
        worker.expect("a thread can be started").join().expect("workers do not panic");
    }
    // A load without a count may have nothing left to do, but it is asked for its statistics until it is ended.
    while attempts.count().is_none() && !state.is_over.load(Ordering::Relaxed) {
        thread::sleep(PAUSE);
    }
    print(&Report::Stats(state.stats()));
}

#[derive(Default)]
struct State {
    stats: Mutex<Stats>,
    is_over: AtomicBool,
    begun: AtomicU64,
}

impl State {
    fn stats(&self) -> Stats {
        self.stats.lock().expect("workers do not panic").clone()
    }

    fn change(&self, change: impl FnOnce(&mut Stats)) {
        change(&mut self.stats.lock().expect("workers do not panic"));
    }
}

/// Answers `stats`; ends the load when standard input ends.
fn listen(state: &State) {
    for line in io::stdin().lock().lines() {
        match line.as_deref() {
            Ok("stats") => print(&Report::Stats(state.stats())),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    state.is_over.store(true, Ordering::Relaxed);
}

fn work<A: Attempts>(attempts: &A, state: &State, index: u32) {
    let interval = attempts.interval();
    // Workers begin spread over one interval, not all at once.
    let mut next = Instant::now() + interval.mul_f64(f64::from(index) / f64::from(attempts.workers().max(1)));
    let mut worker = A::Worker::default();
    let mut is_open = false;
    while pause_until(next, state) {
        next = (next + interval).max(Instant::now());
        let number = state.begun.fetch_add(1, Ordering::Relaxed);
        if attempts.count().is_some_and(|count| number >= count) {
            return;
        }
        state.change(|stats| stats.sent += 1);
        match attempts.attempt(&mut worker, number) {
            Ok(success) => {
                state.change(|stats| count_success(stats, success, attempts.ends_by_failure() && !is_open));
                is_open = true;
            }
            Err(failure) => {
                state.change(|stats| {
                    *stats.failed.entry(failure.kind()).or_default() += 1;
                    stats.open -= u64::from(attempts.ends_by_failure() && is_open);
                });
                print(&Report::Failed(failure));
                if attempts.ends_by_failure() {
                    return;
                }
            }
        }
    }
}

fn count_success(stats: &mut Stats, success: Success, is_opened: bool) {
    stats.answered += 1;
    stats.retransmitted += u64::from(success.has_retransmitted);
    stats.open += u64::from(is_opened);
    *stats.by_server.entry(success.server).or_default() += 1;
}

/// True at `time`, false as soon as the load is over.
fn pause_until(time: Instant, state: &State) -> bool {
    loop {
        if state.is_over.load(Ordering::Relaxed) {
            return false;
        }
        let left = time.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        thread::sleep(left.min(PAUSE));
    }
}
