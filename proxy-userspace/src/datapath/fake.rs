//! Tables without a kernel: one that does as told, one that refuses what it is told to refuse. For tests of any crate.
//!
//! May touch: nothing.

use std::io;

use super::maps::{Error, Maps, Refused};
use crate::planner::{Op, Tables};

impl Maps for Tables {
    fn apply(&mut self, ops: &[&Op]) -> Result<(), Refused> {
        ops.iter().for_each(|op| Tables::apply(self, op));
        Ok(())
    }
}

/// Tables that refuse some operations, as a full map would.
#[derive(Debug, Default)]
pub struct Faulty<F> {
    /// What they hold.
    pub tables: Tables,
    /// True for an operation that is to be refused; asked each time one is tried.
    pub refuses: F,
}

impl<F: FnMut(&Op) -> bool> Maps for Faulty<F> {
    fn apply(&mut self, ops: &[&Op]) -> Result<(), Refused> {
        for (done, op) in ops.iter().enumerate() {
            if (self.refuses)(op) {
                let source = Error::Write { table: "fake", source: io::Error::from_raw_os_error(libc::E2BIG) };
                return Err(Refused { done, source });
            }
            self.tables.apply(op);
        }
        Ok(())
    }
}
