//! Records of older versions, as this version has them: the one place where a change of [`ABI_VERSION`] is bridged.
//!
//! A raised version gets a row in [`OLDER`] for each map whose records changed; all other maps of that version are taken as
//! they are. A version of which nothing is said here cannot be read: its tables are left, and named. Pure.
//!
//! What a row cannot say: a map that was split or renamed. Such a one begins empty.

use std::mem::offset_of;

use proxy_common::abi::ABI_VERSION;
use proxy_common::abi::config::Config;

/// Appends the record of today that an old one becomes.
pub type Convert = fn(old: &[u8], new: &mut Vec<u8>);

/// How the entries of one map become those of today.
#[derive(Clone, Copy, Debug)]
pub struct Conversion {
    /// Of the key.
    pub key: Convert,
    /// Of the value; of a per-CPU map, of one CPU's.
    pub value: Convert,
}

impl Conversion {
    /// Entries that did not change.
    pub const NONE: Self = Self { key: as_it_is, value: as_it_is };
}

fn as_it_is(old: &[u8], new: &mut Vec<u8>) {
    new.extend_from_slice(old);
}

/// Versions before this one that can be read, with the maps whose entries were others. (None yet: version 1 was on no node.)
const OLDER: [(u32, &str, Conversion); 0] = [];

/// True if the tables of a version can be read.
pub fn is_known(version: u32) -> bool {
    version == ABI_VERSION || OLDER.iter().any(|(older, ..)| *older == version)
}

/// How the entries of a map of a known version are read.
pub fn of(version: u32, map: &str) -> Conversion {
    let row = OLDER.iter().find(|(older, name, _)| (*older, *name) == (version, map));
    row.map_or(Conversion::NONE, |(.., conversion)| *conversion)
}

/// Where `Config::settles_at` lies in the configuration of a known version: four bytes.
pub fn settles_at(_version: u32) -> usize {
    offset_of!(Config, settles_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_versions_that_are_described_are_known() {
        assert!(is_known(ABI_VERSION));
        assert!(!is_known(ABI_VERSION + 1), "a newer program's");
        assert!(!is_known(0));
    }
}
