//! Polling for a condition: tests never sleep for a guessed time.

use std::thread;
use std::time::{Duration, Instant};

/// How long a condition may take before the test fails. Generous: machines are shared, and it is paid only by failures.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// The first `Some` that `look` gives; panics with `what` if none comes within [`PATIENCE`].
#[track_caller]
pub fn until_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain for {what}");
        thread::sleep(PAUSE);
    }
}

/// True as soon as `is_so` holds, false if it does not within [`PATIENCE`].
pub fn came_true(mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(PAUSE);
    }
    true
}

/// Returns when `is_so` holds; panics with `what` if it does not within [`PATIENCE`].
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    until_some(what, || is_so().then_some(()));
}
