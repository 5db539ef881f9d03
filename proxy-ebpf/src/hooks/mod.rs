//! The programs, one file a hook.

mod socket;
mod tc;

pub use tc::Link;
