//! Waits between attempts. May touch: the kernel's random source.

use std::time::Duration;

use super::sys;

/// Longer and longer waits between attempts, never twice the same.
#[derive(Debug, Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(30);

    /// The next wait.
    pub fn next_wait(&mut self) -> Duration {
        let wait = Self::FIRST.saturating_mul(1 << self.attempts.min(16)).min(Self::LONGEST);
        self.attempts += 1;
        let mut random = [0; 2];
        // Without randomness every wait is the longest of its step.
        let share = sys::random(&mut random).map_or(u16::MAX, |()| u16::from_ne_bytes(random));
        wait / 2 + wait.mul_f64(f64::from(share) / f64::from(u16::MAX)) / 2
    }
}
