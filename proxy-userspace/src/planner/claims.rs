//! Who owns a frontend that several service ports claim.
//!
//! The strongest kind (ClusterIP, load balancer, externalIP, NodePort) wins, then the oldest service, then the order of
//! sources, then namespace and name. What is in the tables for a source that has not listed yet keeps its place until it
//! has.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::num::NonZeroU64;
use std::sync::Arc;

use proxy_common::abi::frontend::FrontendValue;

use super::key::{FrontendAddr, PortName};
use super::service::FrontendKind;
use crate::model::ServiceKey;

/// A service port's wish for a frontend.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    /// Read from the tables; what its source says is not known yet.
    pub is_held: bool,
    /// What kind of frontend it would be.
    pub kind: FrontendKind,
    /// Age of the service.
    pub created: Option<NonZeroU64>,
    /// Who wishes.
    pub owner: Arc<PortName>,
    /// What the table would say.
    pub value: FrontendValue,
}

impl Claim {
    /// The smallest wins.
    fn rank(&self) -> impl Ord + '_ {
        let age = self.created.map_or(u64::MAX, NonZeroU64::get);
        (!self.is_held, self.kind, age, &self.owner)
    }
}

/// Why a frontend is worth a remark to a service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Remark {
    /// Another service has it.
    Conflict,
    /// It is a backend too.
    IsBackend,
}

/// All claims on one frontend, and what the table says.
#[derive(Default, Debug)]
pub(super) struct Entry {
    /// The winner first.
    claims: Vec<Claim>,
    /// The value in the table.
    pub programmed: Option<FrontendValue>,
    /// What services were told about it.
    pub remarks: Vec<(ServiceKey, Remark)>,
}

impl Entry {
    /// Who has it.
    pub(super) fn winner(&self) -> Option<&Claim> {
        self.claims.first()
    }

    fn is_unused(&self) -> bool {
        self.claims.is_empty() && self.programmed.is_none() && self.remarks.is_empty()
    }

    /// Who would like to have it.
    pub(super) fn losers(&self) -> &[Claim] {
        self.claims.get(1..).unwrap_or_default()
    }
}

/// The index of claims.
#[derive(Default, Debug)]
pub(super) struct Claims(BTreeMap<FrontendAddr, Entry>);

impl Claims {
    /// Adds or replaces the claim of a service port.
    pub(super) fn put(&mut self, at: FrontendAddr, claim: Claim) {
        let claims = &mut self.0.entry(at).or_default().claims;
        claims.retain(|other| other.owner != claim.owner);
        let place = claims.partition_point(|other| other.rank() < claim.rank());
        claims.insert(place, claim);
    }

    /// Takes a claim back.
    pub(super) fn withdraw(&mut self, at: FrontendAddr, owner: &PortName) {
        if let Some(entry) = self.0.get_mut(&at) {
            entry.claims.retain(|claim| *claim.owner != *owner);
        }
    }

    /// What is claimed and programmed for a frontend.
    pub(super) fn get(&self, at: &FrontendAddr) -> Option<&Entry> {
        self.0.get(at)
    }

    /// The same, to change what is programmed.
    pub(super) fn entry(&mut self, at: FrontendAddr) -> &mut Entry {
        self.0.entry(at).or_default()
    }

    /// Forgets a frontend that nobody claims and no table has.
    pub(super) fn tidy(&mut self, at: FrontendAddr) {
        if let MapEntry::Occupied(entry) = self.0.entry(at)
            && entry.get().is_unused()
        {
            entry.remove();
        }
    }

    /// Every frontend that is claimed or programmed.
    pub(super) fn addresses(&self) -> impl Iterator<Item = FrontendAddr> + '_ {
        self.0.keys().copied()
    }
}
