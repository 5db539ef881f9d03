//! Leaves new connections to a successor and keeps those that are there: the tables lose their frontends, and nothing else.
//!
//! | goes | so that |
//! |---|---|
//! | ServiceCIDRs | an address without frontend is nobody's affair here |
//! | classes of frontends | nothing is looked up but the flows that an address has |
//! | frontends | |
//! | socket hooks that translate | sockets dial as they would without Shunt |
//!
//! Backends, flows, node addresses and ports stay: packets of known flows go on as before, and those of connections that were
//! begun a moment ago too. Each step may be repeated, and an agent that starts puts everything back.
//! May touch: the configuration, address classes, frontends, links to the control group.

use proxy_common::abi::address::AddressClass;
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::addr::Addr;

use super::attach;
use super::inspect::FlowState;
use super::kernel::MapFds;
use super::maps::{self, KernelMaps, Table};
use super::pins::{self, LOADED_NOTE, Pins};
use super::sweep::{self, Outcome};

/// Why frontends could not be withdrawn.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An entry cannot be read or written.
    #[error(transparent)]
    Maps(#[from] maps::Error),
    /// A pin cannot be removed.
    #[error(transparent)]
    Pins(#[from] pins::Error),
}

/// Takes every frontend out of the tables, and the hooks that translate off the sockets. Returns how many frontends there
/// were. Nobody else may write the tables meanwhile.
///
/// The order matters: at each moment a new connection is either served as before or not touched at all.
pub fn withdraw(pins: &Pins, maps: &MapFds) -> Result<usize, Error> {
    // An agent that takes over has nothing to send clients to before it has planned.
    pins.unmark(LOADED_NOTE)?;
    let count = withdraw_frontends(maps)?;
    // Last: a socket that the hooks leave alone is served by its packets while there are frontends.
    attach::detach_dialling(pins)?;
    Ok(count)
}

fn withdraw_frontends(maps: &MapFds) -> Result<usize, maps::Error> {
    // First: an address that lost its class would be refused as one that no service has.
    KernelMaps::open(maps)?.clear_service_cidrs()?;
    withdraw_addresses(maps)?;
    let frontends = Table::<FrontendKey, FrontendValue>::open(maps, "frontends")?;
    let mut keys = Vec::new();
    frontends.for_each(|key, _| keys.push(*key))?;
    frontends.remove_all(&keys)?;
    Ok(keys.len())
}

fn withdraw_addresses(maps: &MapFds) -> Result<(), maps::Error> {
    let addresses = Table::<Addr, AddressClass>::open(maps, "addresses")?;
    let (mut changed, mut classes) = (Vec::new(), Vec::new());
    addresses.for_each(|addr, class| {
        let withdrawn = withdrawn(*class);
        if withdrawn != *class {
            changed.push(*addr);
            classes.push(withdrawn);
        }
    })?;
    Ok(addresses.put_all(&changed, &classes)?)
}

/// What remains of an address without frontends: what else it is, and the flows that it may have. (A node's address needs no
/// mark for those: the ports that were NodePorts keep theirs.)
fn withdrawn(class: AddressClass) -> AddressClass {
    let kept = class.flags & (AddressClass::NODE | AddressClass::BACKEND | AddressClass::FLOWS);
    let flows = if class.has(AddressClass::FRONTEND) { AddressClass::FLOWS } else { 0 };
    AddressClass { flags: kept | flows }
}

/// Removes what is over from the tables of flows, and counts those that go on.
pub async fn live_flows(sweep: &mut sweep::Task) -> Result<usize, maps::Error> {
    Ok(live(&sweep.round(false).await?))
}

fn live(outcome: &Outcome) -> usize {
    let is_live = |state: &&FlowState| **state != FlowState::Finished;
    FlowState::ALL.iter().filter(is_live).map(|state| outcome.flows[*state as usize]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_keeps_what_it_is_besides_a_frontend() {
        let class = |flags| AddressClass { flags };
        let vip = AddressClass::FRONTEND | AddressClass::CLUSTER_IP;
        assert_eq!(withdrawn(class(vip)), class(AddressClass::FLOWS));
        assert_eq!(withdrawn(class(AddressClass::FRONTEND | AddressClass::ANY_PORT)), class(AddressClass::FLOWS));
        let node = AddressClass::NODE | AddressClass::NODE_PORT;
        assert_eq!(withdrawn(class(node)), class(AddressClass::NODE));
        let both = AddressClass::NODE | AddressClass::FRONTEND | AddressClass::BACKEND;
        let left = AddressClass::NODE | AddressClass::FLOWS | AddressClass::BACKEND;
        assert_eq!(withdrawn(class(both)), class(left));
        for flags in [vip, node, both] {
            let once = withdrawn(class(flags));
            assert_eq!(withdrawn(once), once, "it may be repeated");
        }
    }

    #[test]
    fn only_what_is_finished_is_not_waited_for() {
        let mut outcome = Outcome::default();
        FlowState::ALL.iter().zip([1, 20, 300, 4000]).for_each(|(state, count)| outcome.flows[*state as usize] = count);
        assert_eq!(live(&outcome), 321);
    }
}
