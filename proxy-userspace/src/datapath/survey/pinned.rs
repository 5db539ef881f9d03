//! What is pinned: tables and their memory, and the agent that owns them with its limits.
//!
//! May touch: pins and map entries, /proc of the agent, for reading.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use proxy_common::abi::config::Config;
use proxy_common::verdict::DropReason;

use super::super::inspect;
use super::super::kernel::{MapFds, SHARED};
use super::super::pins::{self, Pins};
use super::super::reserve::PortSet;
use super::super::{restore, sys};
use super::{Seen, Unseen, read};
use crate::planner::Tables;

/// The directory of pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// `--bpffs`.
    pub base: PathBuf,
    /// It lies on a BPF file system.
    pub is_bpffs: bool,
    /// Layouts of tables, the one that counts last.
    pub layouts: Vec<String>,
    /// Whether this program reads the last of them.
    pub is_readable: bool,
    /// Maps that should be pinned in it and are not.
    pub missing: Vec<&'static str>,
}

impl Place {
    /// What is there.
    pub fn look(pins: &Pins) -> Self {
        let layouts = pins.layouts().unwrap_or_default();
        let current = pins.current().ok().flatten();
        let present = current.map(|layout| pins::list(&pins.maps(layout)).unwrap_or_default()).unwrap_or_default();
        let present: BTreeSet<_> = present.iter().filter_map(|path| pins::file_name(path)).collect();
        let missing = SHARED.into_iter().filter(|name| current.is_some() && !present.contains(name)).collect();
        Self {
            missing,
            base: pins.base().to_owned(),
            is_bpffs: sys::is_bpffs(pins.base()).unwrap_or(false),
            is_readable: current.is_some() && current == layouts.last().copied(),
            layouts: layouts.iter().map(ToString::to_string).collect(),
        }
    }
}

/// What a map holds and costs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSize {
    /// Name.
    pub name: String,
    /// Bytes that the kernel holds for it now.
    pub bytes: u64,
    /// Bytes that it may come to hold, if it takes them on demand.
    pub most: u64,
}

/// A table and how full it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Name.
    pub name: &'static str,
    /// Entries.
    pub used: u64,
    /// Entries that it has room for.
    pub capacity: u64,
}

/// The tables.
#[derive(Debug)]
pub struct Programmed {
    /// What the programs know of the node.
    pub config: Config,
    /// Entries of the planner.
    pub tables: Tables,
    /// Memory.
    pub maps: Vec<MapSize>,
    /// How full they are.
    pub rooms: Vec<Room>,
    /// What was dropped, by [`DropReason`] number.
    pub drops: Vec<u64>,
    /// Names of programs that the kernel interprets.
    pub interpreted: Vec<String>,
}

impl Programmed {
    pub(super) fn read(pins: &Pins, maps: &MapFds) -> Seen<Self> {
        if maps.iter().next().is_none() {
            return Err(Unseen(format!("no tables are pinned below {}", pins.base().display())));
        }
        let because = |error: &dyn std::error::Error| Unseen::because(error);
        let tables = restore::read_tables(maps).map_err(|error| because(&error))?;
        Ok(Self {
            config: restore::read_config(maps).map_err(|error| because(&error))?,
            maps: maps.iter().filter_map(|(name, fd)| map_size(name, fd)).collect(),
            rooms: rooms(maps, &tables).map_err(|error| because(&error))?,
            drops: inspect::read_drops(maps).map_err(|error| because(&error))?,
            interpreted: super::hook::interpreted(pins),
            tables,
        })
    }

    /// How often something was dropped for a reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.get(reason as usize).copied().unwrap_or(0)
    }

    /// NodePorts that are programmed.
    pub fn node_ports(&self) -> PortSet {
        let ports = self.tables.frontends.keys().filter(|at| at.is_node_port());
        ports.map(|at| at.port.0..=at.port.0).collect()
    }

    /// Ports of rewritten sources.
    pub fn source_ports(&self) -> PortSet {
        [self.config.snat_first..=self.config.snat_last].into_iter().filter(|range| *range.end() > 0).collect()
    }
}

fn map_size(name: &str, fd: std::os::fd::BorrowedFd<'_>) -> Option<MapSize> {
    /// linux/bpf.h
    const BPF_F_NO_PREALLOC: u32 = 1;
    /// What the kernel keeps beside key and value of an entry (struct htab_elem), and what its allocator rounds up.
    const ENTRY: u64 = 64;
    let bytes = inspect::bytes(fd)?;
    let info = sys::map_info(fd).ok()?;
    let entries = u64::from(info.max_entries) * (u64::from(info.key_size) + u64::from(info.value_size) + ENTRY);
    let most = if info.flags & BPF_F_NO_PREALLOC != 0 { bytes.max(entries) } else { bytes };
    Some(MapSize { name: name.to_owned(), bytes, most })
}

fn rooms(maps: &MapFds, tables: &Tables) -> Result<Vec<Room>, super::super::maps::Error> {
    let limits = restore::read_limits(maps)?;
    let room = |name, used: usize, capacity: u32| Room { name, used: used as u64, capacity: u64::from(capacity) };
    let (flows, flow_capacity) = inspect::count(maps, "flows")?;
    Ok(vec![
        room("services", tables.services.len(), limits.services),
        room("backends", tables.backends.len(), limits.backends),
        room("slots", tables.slots.len(), limits.slots),
        room("frontends", tables.frontends.len(), inspect::capacity(maps, "frontends")?),
        room("addresses", tables.addresses.len(), inspect::capacity(maps, "addresses")?),
        room("flows", flows, flow_capacity),
    ])
}

/// The agent that owns the pins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agent {
    /// Its process, if it can be seen from here.
    pub process: Option<AgentProcess>,
}

/// Its process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentProcess {
    /// Process id.
    pub id: u32,
    /// Bytes that it and its maps may take: the least limit of its control group and those above; `None`: no limit.
    pub memory_limit: Option<u64>,
    /// Descriptors that it may open.
    pub open_files: Option<u64>,
}

impl Agent {
    pub(super) fn find(pins: &Pins) -> Seen<Option<Self>> {
        if !pins.base().exists() {
            return Ok(None);
        }
        let is_locked = pins.is_locked().map_err(|error| Unseen::because(&error))?;
        let process = || {
            let directory = fs::metadata(pins.base()).ok()?;
            let id = lock_holder(&read("/proc/locks")?, directory.dev(), directory.ino())?;
            Some(AgentProcess { id, memory_limit: memory_limit(id), open_files: open_files(id) })
        };
        Ok(is_locked.then(|| Self { process: process() }))
    }
}

/// The process that holds a flock on a file, in the text of /proc/locks (proc_locks(5)).
fn lock_holder(locks: &str, device: u64, inode: u64) -> Option<u32> {
    let file = format!("{:02x}:{:02x}:{inode}", libc::major(device), libc::minor(device));
    locks.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, "WRITE", process, at, ..] if at == file => process.parse().ok(),
            _ => None,
        }
    })
}

fn open_files(process: u32) -> Option<u64> {
    let limits = read(format!("/proc/{process}/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The least limit of the control groups that a process is in, of either version, as far as they are mounted here.
fn memory_limit(process: u32) -> Option<u64> {
    let groups = read(format!("/proc/{process}/cgroup"))?;
    let mounts = read("/proc/self/mountinfo")?;
    limit_files(&groups, &mounts).iter().filter_map(|file| parse_limit(&read(file)?)).min()
}

/// Files that hold memory limits of a process: those of its control groups, and of all above them.
fn limit_files(groups: &str, mounts: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for group in groups.lines() {
        let mut fields = group.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let is_unified = number == "0" && controllers.is_empty();
        let name = match (is_unified, controllers.split(',').any(|name| name == "memory")) {
            (true, _) => "memory.max",
            (false, true) => "memory.limit_in_bytes",
            (false, false) => continue,
        };
        let is_mount = |kind: &str, options: &str| match is_unified {
            true => kind == "cgroup2",
            false => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
        };
        let point = mounts.lines().find_map(|line| {
            let (fixed, rest) = line.split_once(" - ")?;
            let mut rest = rest.split(' ');
            let (kind, options) = (rest.next()?, rest.nth(1)?);
            is_mount(kind, options).then(|| fixed.split(' ').nth(4)).flatten()
        });
        let Some(point) = point else { continue };
        let relative = Path::new(path.trim_start_matches('/'));
        files.extend(relative.ancestors().map(|group| Path::new(point).join(group).join(name)));
    }
    files
}

fn parse_limit(text: &str) -> Option<u64> {
    /// Version 1 writes "no limit" as the largest number of whole pages.
    const NONE: u64 = 1 << 62;
    text.trim().parse().ok().filter(|limit| *limit < NONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_found_by_the_file() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 00:2a:77 0 EOF\n2: FLOCK  ADVISORY  READ 12 00:2a:77 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 00:2a:77 0 EOF\n3: -> FLOCK  ADVISORY  WRITE 14 00:2a:77 0 EOF\n";
        let device = libc::makedev(0, 0x2a);
        assert_eq!(lock_holder(locks, device, 77), Some(13));
        assert_eq!(lock_holder(locks, device, 78), None);
    }

    #[test]
    fn limits_are_looked_for_in_all_groups_above_in_both_versions() {
        let mounts = "31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let files = limit_files("4:memory:/a/b\n1:cpu:/c\n0::/d\n", mounts);
        let wanted = [
            "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/unified/d/memory.max",
            "/sys/fs/cgroup/unified/memory.max",
        ];
        assert_eq!(files, wanted.map(PathBuf::from));
        assert_eq!(parse_limit("max\n"), None);
        assert_eq!(parse_limit("9223372036854771712\n"), None);
        assert_eq!(parse_limit("1048576\n"), Some(1 << 20));
    }
}
