//! Everything that is programmed: restored from the tables, advanced from snapshot to snapshot.

use std::sync::Arc;

use proxy_common::addr::Addr;

use super::ids::{Epoch, Limits};
use super::plan::Plan;
use super::tables::Tables;
use super::usage::SnatPorts;
use crate::model::Snapshot;

/// What is programmed, and for whom. A value: planning takes it and gives the next one back.
#[derive(Debug)]
pub struct State {
    epoch: Epoch,
}

impl State {
    /// The state that the tables show. (Empty tables: nothing is programmed.)
    pub fn restore(_limits: Limits, _snat: SnatPorts, _tables: &Tables) -> Self {
        Self { epoch: Epoch(0) }
    }

    /// The state after everything in `next` is programmed, and what has to be done for that.
    pub fn advance(self, _next: &Arc<Snapshot>) -> (Self, Plan) {
        (self, Plan::default())
    }

    /// The state after no flow uses `addr` any more, and what has to be done for that.
    pub fn prune_address(self, _addr: Addr) -> (Self, Plan) {
        (self, Plan::default())
    }

    /// The state after a grace period has passed since all of `now` of the plan of `epoch` was done, and `after_grace`
    /// has been done. True if services that found no room should be tried again (advance to the same snapshot).
    pub fn grace_passed(self, _epoch: Epoch) -> (Self, bool) {
        (self, false)
    }
}
