//! Tables without a kernel: one that does as told, one that refuses what it is told to refuse. For tests of any crate.
//!
//! May touch: nothing.

use std::io;

use super::maps::{Error, Maps, Refused};
use crate::planner::{FrontendAddr, Op, ServiceId, Tables};

impl Maps for Tables {
    fn apply(&mut self, ops: &[&Op]) -> Result<(), Refused> {
        ops.iter().for_each(|op| Tables::apply(self, op));
        Ok(())
    }

    fn service_at(&self, at: &FrontendAddr) -> Result<Option<ServiceId>, Error> {
        Ok(self.frontends.get(at).map(|value| ServiceId(value.service)))
    }

    fn holds(&self, op: &Op) -> Result<bool, Error> {
        Ok(Tables::holds(self, op))
    }

    fn repair_node(&mut self) -> Result<bool, Error> {
        Ok(false)
    }
}

/// Tables that refuse some operations, as a full map would. What is written to mapped arrays cannot be refused.
#[derive(Debug, Default)]
pub struct Faulty<F> {
    /// What they hold.
    pub tables: Tables,
    /// True for an operation that is to be refused; asked each time one is tried that can be.
    pub refuses: F,
}

/// True for an operation that takes a system call.
fn can_be_refused(op: &Op) -> bool {
    !matches!(op, Op::PutBackend { .. } | Op::RetireBackend { .. } | Op::WriteSlots { .. } | Op::PublishService { .. })
}

impl<F: FnMut(&Op) -> bool> Maps for Faulty<F> {
    fn apply(&mut self, ops: &[&Op]) -> Result<(), Refused> {
        for (done, op) in ops.iter().enumerate() {
            if can_be_refused(op) && (self.refuses)(op) {
                let source = Error::Write { table: "fake", source: io::Error::from_raw_os_error(libc::E2BIG) };
                return Err(Refused { done, source });
            }
            self.tables.apply(op);
        }
        Ok(())
    }

    fn service_at(&self, at: &FrontendAddr) -> Result<Option<ServiceId>, Error> {
        self.tables.service_at(at)
    }

    fn holds(&self, op: &Op) -> Result<bool, Error> {
        Ok(self.tables.holds(op))
    }

    fn repair_node(&mut self) -> Result<bool, Error> {
        Ok(false)
    }
}
