//! `shunt cleanup`: everything that the agent left in the kernel is taken out. Running it twice is the same as once.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::datapath::pins::{self, Pins};
use crate::datapath::{attach, reserve};

/// Detaches, unpins and undoes what lies below `bpffs`.
pub(super) fn run(bpffs: &Path) -> Result<()> {
    let pins = Pins::new(bpffs);
    if !bpffs.exists() {
        return super::print(&format!("nothing is pinned below {}\n", bpffs.display()));
    }
    // An agent that runs would attach everything again.
    let lock = pins.lock().context("nothing was removed")?;
    let detached = attach::detach_all(&pins)?;
    reserve::release(&pins)?;
    let layouts = pins.layouts()?;
    for directory in layouts.iter().chain([&pins.continuations()]) {
        pins::remove_layout(directory)?;
    }
    // The lock is an open directory: it would keep the mount busy.
    drop(lock);
    pins.remove_directories()?;
    super::print(&format!(
        "{detached} links and {} layouts of tables removed from {}\n",
        layouts.len(),
        bpffs.display()
    ))
}
