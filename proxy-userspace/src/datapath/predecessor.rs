//! Connections that somebody else opened before Shunt came, most likely a kube-proxy: the kernel's connection tracking
//! translates them, and has to go on until they have ended, also when their proxy is gone by then.
//!
//! The programs leave these connections alone (`lb::packet`, slow path). What is done here is that the kernel does not stop
//! to translate in between: from the start of the agent on, as long as there are such connections, and no longer. Nothing
//! is done on a node without connection tracking, or without translated connections.
//! May touch: what [`netfilter`] offers, a note in the pin directory, frontends and address classes for reading.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use proxy_common::abi::address::AddressClass;
use proxy_common::abi::frontend::{FrontendKey, FrontendValue};
use proxy_common::addr::Addr;
use tokio::sync::watch;
use tracing::{info, warn};

use super::kernel::{self, MapFds};
use super::maps::{self, Table};
use super::netfilter::{self, Dialled};
use super::pins::{self, Pins};
use super::reconcile::Status;
use crate::error::chain;

/// Between two looks whether any connection is left; a look lists all that are translated.
const INTERVAL: Duration = Duration::from_secs(60);

/// Noted while the kernel is made to go on, so that `shunt cleanup` ends it.
const NOTE: &str = "keeps-translating";

const TRACKED: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// The part of the agent.
pub struct Task {
    pins: Pins,
    addresses: Table<Addr, AddressClass>,
    frontends: Table<FrontendKey, FrontendValue>,
}

impl Task {
    /// Makes the kernel go on if it translates anything now. (Which of it are services is not known before the first plan.)
    pub fn open(pins: &Pins, maps: &MapFds) -> Result<Self, kernel::Error> {
        let (addresses, frontends) = (Table::open(maps, "addresses")?, Table::open(maps, "frontends")?);
        let this = Self { pins: pins.clone(), addresses, frontends };
        if has_tracked() {
            this.begin();
        }
        Ok(this)
    }

    fn begin(&self) {
        match netfilter::has_translated(|_| true) {
            Ok(false) => return,
            Ok(true) => {}
            Err(error) => return warn!(%error, "cannot list the connections of a predecessor"),
        }
        // The note first: what is noted and not there does no harm.
        let kept = self.pins.mark(NOTE).map_err(|error| chain(&error));
        match kept.and_then(|()| netfilter::keep_translating().map_err(|error| error.to_string())) {
            Ok(()) => info!("connections of a predecessor go on, with or without it"),
            Err(error) => warn!(error, "connections of a predecessor will end if it removes its rules"),
        }
    }

    /// Looks now and then until no connection is left, once the tables have all frontends: until then nobody knows whose the
    /// connections are.
    pub async fn run(self, mut status: watch::Receiver<Arc<Status>>) -> Result<(), pins::Error> {
        // Without a sender the agent ends.
        let _ = status.wait_for(|status| status.is_ready).await;
        while is_noted(&self.pins)? {
            tokio::time::sleep(INTERVAL).await;
            tokio::task::block_in_place(|| self.look())?;
        }
        std::future::pending().await
    }

    /// Ends it if no connection to a frontend is left.
    pub fn look(&self) -> Result<(), pins::Error> {
        match netfilter::has_translated(|dialled| self.is_ours(dialled)) {
            Ok(true) => Ok(()),
            Ok(false) => release(&self.pins),
            Err(error) => {
                warn!(%error, "cannot list the connections of a predecessor");
                Ok(())
            }
        }
    }

    /// True if it is a frontend's. One that has gone since is none: nobody else would know it either.
    fn is_ours(&self, dialled: Dialled) -> bool {
        self.has_frontend(dialled).unwrap_or_else(|error| {
            warn!(error = chain(&error), "frontends cannot be read");
            true
        })
    }

    fn has_frontend(&self, dialled: Dialled) -> Result<bool, maps::Error> {
        let class = self.addresses.get(&dialled.addr)?.unwrap_or(AddressClass::ZERO);
        let key = FrontendKey { addr: dialled.addr, port: dialled.port.be(), proto: dialled.proto.0, reserved: 0 };
        let wildcard = FrontendKey { addr: dialled.addr.wildcard(), ..key };
        Ok(class.has(AddressClass::FRONTEND) && self.frontends.get(&key)?.is_some()
            || class.has(AddressClass::NODE_PORT) && self.frontends.get(&wildcard)?.is_some())
    }
}

/// Connections are tracked here. Asked first: the question for single ones makes the kernel load what tracks them.
fn has_tracked() -> bool {
    fs::read_to_string(TRACKED).is_ok_and(|count| count.trim() != "0")
}

fn is_noted(pins: &Pins) -> Result<bool, pins::Error> {
    Ok(pins.marks()?.iter().any(|note| note == NOTE))
}

/// The kernel need not go on any more.
pub fn release(pins: &Pins) -> Result<(), pins::Error> {
    if is_noted(pins)? {
        match netfilter::stop_translating() {
            Ok(()) => {
                info!("the kernel is free to end the connections of a predecessor");
                pins.unmark(NOTE)?;
            }
            Err(error) => warn!(%error, table = netfilter::TABLE, "a table of nf_tables cannot be removed"),
        }
    }
    Ok(())
}
