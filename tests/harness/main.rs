//! The harness proves itself: what it builds is reachable, what it starts answers, what it makes goes.

mod guard;
mod topology;
mod traffic;
