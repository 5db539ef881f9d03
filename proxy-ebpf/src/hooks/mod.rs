//! The programs, one file a hook.

mod socket;
mod tc;
mod xdp;

pub use tc::Link;
