//! What an agent holds in the kernel, found by looking for it among everything that is loaded.
//!
//! Other tests load the same programs at the same time. Ours are those that use a map that is pinned below our directory,
//! whichever agent loaded them; our maps are those that our programs use; our links run our programs.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};

use aya::programs::{loaded_links, loaded_programs};
use proxy_userspace::datapath::pins::{self, Pins};
use proxy_userspace::datapath::sys;

/// Numbers of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Programs in the kernel.
    pub programs: usize,
    /// Maps in the kernel.
    pub maps: usize,
    /// Links in the kernel.
    pub links: usize,
    /// Files below the directory.
    pub pins: usize,
}

impl Held {
    /// What is held through `bpffs` now. Objects that go at the same time may count or not.
    #[track_caller]
    pub fn look(bpffs: &Path) -> Self {
        let pins = Pins::new(bpffs);
        let pinned = pinned_maps(&pins);
        let programs: Vec<_> = loaded_programs().filter_map(Result::ok).collect();
        let uses = |program: &aya::programs::ProgramInfo| -> BTreeSet<u32> {
            program.map_ids().ok().flatten().unwrap_or_default().into_iter().collect()
        };
        let ours: Vec<_> = programs.iter().filter(|program| !uses(program).is_disjoint(&pinned)).collect();
        let ids: BTreeSet<u32> = ours.iter().map(|program| program.id()).collect();
        let links = loaded_links().filter_map(Result::ok).filter(|link| ids.contains(&link.program_id()));
        let maps: BTreeSet<u32> = ours.iter().flat_map(|program| uses(program)).chain(pinned.iter().copied()).collect();
        Self { programs: ids.len(), maps: maps.len(), links: links.count(), pins: count_files(bpffs) }
    }
}

/// Ids of the pinned maps.
#[track_caller]
fn pinned_maps(pins: &Pins) -> BTreeSet<u32> {
    let list = |dir: &Path| pins::list(dir).expect("pins can be listed");
    let paths = list(&tables(pins)).into_iter().chain(list(&pins.continuations()));
    // An agent that starts at the same time may have removed it.
    let id = |path: PathBuf| Some(sys::map_info(sys::open_pin(&path).ok()?.as_fd()).ok()?.id);
    paths.filter_map(id).collect()
}

fn count_files(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { count_files(&entry.path()) } else { 1 }).sum()
}

/// Bytes that the kernel has for the maps pinned below `bpffs`, as it counts them itself.
#[track_caller]
pub fn map_bytes(bpffs: &Path) -> u64 {
    let pinned = pins::list(&tables(&Pins::new(bpffs))).expect("pins can be listed");
    let bytes = |path: &PathBuf| {
        let map = sys::open_pin(path).unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_raw_fd())).expect("it is open");
        let line = info.lines().find_map(|line| line.strip_prefix("memlock:")).expect("the kernel tells");
        line.trim().parse::<u64>().expect("a number")
    };
    pinned.iter().map(bytes).sum()
}

/// Bytes of anonymous memory that a process holds.
#[track_caller]
pub fn process_bytes(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("the kernel tells");
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kilobytes << 10
}

/// The directory of the tables that are in use.
fn tables(pins: &Pins) -> PathBuf {
    let layout = pins.current().expect("layouts can be listed").expect("there is one");
    pins.maps(layout)
}
