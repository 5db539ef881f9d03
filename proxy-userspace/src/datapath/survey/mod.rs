//! What a person who looks for a fault wants to see of this node and of what is programmed: gathered once, judged nowhere.
//!
//! | module | holds |
//! |---|---|
//! | [`kernel`] | what the kernel can do |
//! | [`pinned`] | tables, their memory, the agent that owns them |
//! | [`hook`] | programs and where they are attached, ours and others' |
//! | [`dial`] | whether a socket of this process is asked by the hooks |
//! | [`process`] | processes outside the hooked control group |
//! | [`network`] | devices, addresses and settings of the network namespace |
//!
//! Every fact is a [`Seen`]: one that is out of reach says why, and hides no other. `doctor` judges them.
//! May touch: everything below for reading; a socket that is connected but never sends.

pub mod dial;
pub mod hook;
pub mod kernel;
pub mod network;
pub mod pinned;
pub mod process;

use std::path::{Path, PathBuf};

use super::attach;
use super::kernel::MapFds;
use super::netfilter::{self, Firewall};
use super::other_proxies::{self, Proxy};
use super::pins::Pins;
use crate::error::chain;

/// What was seen, or why nothing was.
pub type Seen<T> = Result<T, Unseen>;

/// Why something is out of reach.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unseen(pub String);

impl Unseen {
    /// Because of an error.
    pub fn because(error: &dyn std::error::Error) -> Self {
        Self(chain(error))
    }
}

impl From<&Unseen> for Unseen {
    fn from(unseen: &Unseen) -> Self {
        unseen.clone()
    }
}

/// All of it.
#[derive(Debug)]
pub struct Survey {
    /// What the kernel can do.
    pub kernel: Seen<kernel::Kernel>,
    /// Where things are pinned.
    pub place: pinned::Place,
    /// What is programmed.
    pub tables: Seen<pinned::Programmed>,
    /// The process that owns the pins; `None` if none runs.
    pub agent: Seen<Option<pinned::Agent>>,
    /// What the socket hooks are attached to.
    pub sockets: Seen<hook::Sockets>,
    /// Devices of this network namespace and their programs.
    pub devices: Seen<Vec<hook::DeviceHooks>>,
    /// What was answered to a connect that the hooks refuse.
    pub dialled: Seen<Vec<dial::Dialled>>,
    /// Processes that the socket hooks do not see.
    pub outside: Seen<Vec<process::Process>>,
    /// Settings of this network namespace.
    pub settings: network::Settings,
    /// Rules that drop what is forwarded.
    pub firewall: Seen<Firewall>,
    /// Other service proxies.
    pub proxies: Vec<Proxy>,
}

/// Looks at everything once. `cgroup`: the control group that the hooks should be on.
pub async fn take(pins: &Pins, cgroup: Option<PathBuf>) -> Survey {
    let maps = MapFds::open_pinned(pins).map_err(|error| Unseen::because(&error));
    let tables = maps.as_ref().map_err(Unseen::from).and_then(|maps| pinned::Programmed::read(pins, maps));
    let place = pinned::Place::look(pins);
    let agent = pinned::Agent::find(pins);
    let network = network::Links::list().await;
    let cgroup = cgroup.map_or_else(|| attach::find_cgroup_root().map_err(|error| Unseen::because(&error)), Ok);
    let sockets = cgroup.and_then(|cgroup| hook::Sockets::look(pins, &cgroup));
    Survey {
        kernel: kernel::Kernel::probe(),
        devices: network.and_then(|links| hook::devices(pins, links)),
        dialled: tables.as_ref().map_err(Unseen::from).and_then(dial::try_hooks),
        outside: sockets.as_ref().map_err(Unseen::from).and_then(process::outside),
        settings: network::Settings::read().await,
        firewall: netfilter::firewall()
            .map_err(|error| Unseen(format!("the rules of netfilter cannot be listed: {error}"))),
        proxies: other_proxies::find(),
        place,
        tables,
        agent,
        sockets,
    }
}

/// A file's text, as far as it can be read.
fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok()
}
