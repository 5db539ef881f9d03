//! Service records and slots: memory-mapped by userspace, changed without a system call.

use super::abi;

abi! {
    /// One service port. Its sets are published by one store each, after their slots are written.
    pub struct ServiceRecord [24] {
        /// The cluster set, a packed [`Range`].
        pub cluster: u64,
        /// The local set, a packed [`Range`].
        pub local: u64,
        /// Session affinity timeout in seconds; 0: none.
        pub affinity: u32,
        /// Tells one membership of the two sets from another: written after them, so that who meets a new one meets new sets.
        pub fingerprint: u32,
    }
}

/// A stretch of the slot array, or why it is empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First slot; for an empty range one of the `EMPTY_` constants.
    pub base: u32,
    /// Number of slots.
    pub count: u32,
}

impl Range {
    /// Nobody can serve: new connections are rejected.
    pub const REJECT: Self = Self { base: 0, count: 0 };
    /// Others can serve, but policy keeps them from this set: new connections are dropped.
    pub const DROP: Self = Self { base: 1, count: 0 };

    /// One word, so that it changes at once.
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        (self.count as u64) << 32 | self.base as u64
    }

    /// The reverse of [`Self::pack`].
    #[inline(always)]
    pub const fn unpack(word: u64) -> Self {
        Self { base: word as u32, count: (word >> 32) as u32 }
    }
}

abi! {
    /// One slot: a backend and the service that the slot belongs to. A reader that meets another owner looks at its range again.
    pub struct Slot [8] {
        /// Backend id.
        pub backend: u32,
        /// Service id.
        pub owner: u32,
    }
}

/// Bytes of a [`ServiceName`].
pub const SERVICE_NAME_BYTES: usize = 256;

abi! {
    /// The name of a service port as text, zero-filled: what makes ids the same after a restart.
    pub struct ServiceName [256] {
        /// UTF-8.
        pub bytes: [u8; SERVICE_NAME_BYTES],
    }
}

impl ServiceName {
    /// The record of a name, or `None` if it is longer than [`SERVICE_NAME_BYTES`].
    pub fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; SERVICE_NAME_BYTES];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(Self { bytes })
    }

    /// The name, or `None` if the bytes are not UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        let end = self.bytes.iter().position(|&byte| byte == 0).unwrap_or(SERVICE_NAME_BYTES);
        core::str::from_utf8(&self.bytes[..end]).ok()
    }
}
