//! A plan: the exact changes of the tables, in an order that never takes a working frontend away.

use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::abi::address::{AddressClass, PortWord};
use proxy_common::abi::backend::BackendRecord;
use proxy_common::abi::config::Cidr;
use proxy_common::abi::frontend::FrontendValue;
use proxy_common::abi::service::{ServiceRecord, Slot};
use proxy_common::addr::Addr;

use super::ids::{BackendId, Epoch, ServiceId};
use super::key::{FrontendAddr, PortName};
use super::problem::Problem;
use super::stale::Lost;
use crate::model::ServiceKey;

/// What has to be done to the tables, and nothing else.
///
/// Order: within the plan, each group's `now` from first to last, or all operations of one [`Stage`] before those of the
/// next (which allows batches); both keep the promises of [`super`]. `after_grace` follows when no program that ran
/// before the end of `now` runs any more; then [`super::State::grace_passed`] is told the epoch. Plans are applied one
/// after the other; `after_grace` of one may come after `now` of later ones (nothing it names is reused before). An
/// operation that failed is superseded by a later one on the same key.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// What ends the quarantine of everything that this plan frees.
    pub epoch: Epoch,
    /// Changes by what they are for.
    pub groups: Vec<Group>,
    /// Services whose problems are others than before, with all problems they have now.
    pub problems: Vec<(ServiceKey, Vec<Problem>)>,
    /// What may have left connections behind.
    pub lost: Vec<Lost>,
}

/// Changes that belong together: a failure is the status of the subject.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Group {
    /// For whom.
    pub subject: Subject,
    /// To be done at once, in this order.
    pub now: Vec<Op>,
    /// To be done when no program can read any more what `now` has unpublished.
    pub after_grace: Vec<Op>,
}

/// For whom a change is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Subject {
    /// This node: its addresses and prefixes.
    Node,
    /// A service: all its ports, both families.
    Service(ServiceKey),
    /// Nobody any more: what has lost its last user.
    Leftovers,
}

/// Prefixes of the node's configuration record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Cidrs {
    /// ServiceCIDRs.
    pub service: Vec<Cidr>,
    /// Where pods have their addresses.
    pub cluster: Vec<Cidr>,
    /// Where pods of this node have their addresses.
    pub pod: Vec<Cidr>,
}

/// One change of one table. Doing it twice is the same as doing it once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Replaces the three lists of prefixes in the configuration; the rest of the record stays.
    PutCidrs(Box<Cidrs>),
    /// Names a service id.
    PutName {
        /// The id.
        id: ServiceId,
        /// Its name.
        name: Arc<PortName>,
    },
    /// Writes a backend that is live.
    PutBackend {
        /// Its id.
        id: BackendId,
        /// All of it.
        record: BackendRecord,
    },
    /// Lets clients in a prefix dial the restricted frontends of a service.
    AllowSource {
        /// Its id.
        id: ServiceId,
        /// Of the service's family.
        net: IpNet,
    },
    /// The reverse.
    ForbidSource {
        /// The service's id.
        id: ServiceId,
        /// As it was allowed.
        net: IpNet,
    },
    /// Writes slots that no published range contains.
    WriteSlots {
        /// Position of the first.
        base: u32,
        /// Their contents.
        slots: Vec<Slot>,
    },
    /// Publishes the two sets and the affinity of a service.
    PublishService {
        /// Its id.
        id: ServiceId,
        /// All of it.
        record: ServiceRecord,
    },
    /// Inserts or replaces a frontend.
    PutFrontend {
        /// What clients dial.
        at: FrontendAddr,
        /// Whose it is.
        value: FrontendValue,
    },
    /// Removes a frontend.
    DeleteFrontend {
        /// What clients dialled.
        at: FrontendAddr,
    },
    /// Inserts or replaces the class of an address.
    PutAddress {
        /// The address.
        addr: Addr,
        /// Its class.
        class: AddressClass,
        /// Flags that stay set if the table has them: the programs set [`AddressClass::FLOWS`] by themselves. Zero if
        /// the table cannot have any.
        keep: u32,
    },
    /// Removes an address.
    DeleteAddress {
        /// The address.
        addr: Addr,
    },
    /// Replaces the uses of 32 ports.
    PutPorts {
        /// Position in the table.
        index: u32,
        /// The uses.
        word: PortWord,
        /// Bits that stay set if the table has them: the programs mark ports outside `--snat-ports` by themselves.
        keep: u64,
    },
    /// Marks a backend as gone. Its id is not used again before the plan's epoch has passed.
    RetireBackend {
        /// Its id.
        id: BackendId,
    },
    /// Clears a service's record and removes its name. The id is not used again before the plan's epoch has passed.
    RetireService {
        /// Its id.
        id: ServiceId,
    },
}

/// When an operation may be done: all of one stage before any of the next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Stage {
    /// Writes what no packet reaches yet, then publishes it for frontends that exist.
    Prepare,
    /// Lets frontends point to it.
    Point,
    /// Lets packets reach new frontends.
    Reveal,
    /// Takes frontends away, and empties sets.
    Withdraw,
    /// Takes away what only they needed.
    Conceal,
    /// After the grace period.
    Retire,
}

impl Plan {
    /// True if there is nothing to do and nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.problems.is_empty() && self.lost.is_empty()
    }

    /// All operations with their stages; `after_grace` ones are [`Stage::Retire`].
    pub fn staged(&self) -> impl Iterator<Item = (Stage, &Op)> {
        self.groups.iter().flat_map(|group| group.now.iter().chain(&group.after_grace).map(|op| (group.stage(op), op)))
    }
}

impl Group {
    /// The stage of one of its operations.
    pub fn stage(&self, op: &Op) -> Stage {
        let leftovers = self.subject == Subject::Leftovers;
        match op {
            Op::PutName { .. } | Op::PutBackend { .. } | Op::AllowSource { .. } => Stage::Prepare,
            Op::ForbidSource { .. } if leftovers => Stage::Conceal,
            Op::PublishService { .. } if leftovers => Stage::Withdraw,
            Op::WriteSlots { .. } | Op::PublishService { .. } => Stage::Prepare,
            Op::PutFrontend { .. } => Stage::Point,
            // An address of a new ServiceCIDR is dropped unless it is known by then.
            Op::PutCidrs(_) => Stage::Reveal,
            Op::PutAddress { .. } | Op::PutPorts { .. } if !leftovers => Stage::Reveal,
            Op::DeleteFrontend { .. } => Stage::Withdraw,
            Op::PutAddress { .. } | Op::PutPorts { .. } | Op::DeleteAddress { .. } => Stage::Conceal,
            Op::ForbidSource { .. } | Op::RetireBackend { .. } | Op::RetireService { .. } => Stage::Retire,
        }
    }
}
