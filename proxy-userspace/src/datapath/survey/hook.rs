//! Programs and where they are attached: ours as the pinned links say it, and all others at the same hooks.
//!
//! May touch: pins, lists of programs and links, control groups, for reading.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya_obj::generated::bpf_attach_type::{BPF_TCX_EGRESS, BPF_TCX_INGRESS};

use super::super::attach::SOCKET_HOOKS;
use super::super::clsact;
use super::super::device::Device;
use super::super::filter;
use super::super::pins::{self, Pins};
use super::super::sys::{self, HookTarget, LinkTarget};
use super::network::{DeviceSettings, Link, Links};
use super::{Seen, Unseen, read};

/// A program by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Kernel-wide id.
    pub id: u32,
    /// Name, as far as the kernel keeps it.
    pub name: String,
}

/// Names of all programs that are loaded.
fn names() -> BTreeMap<u32, String> {
    let programs = aya::programs::loaded_programs().filter_map(Result::ok);
    programs.map(|program| (program.id(), program.name_as_str().unwrap_or("without a name").to_owned())).collect()
}

/// Names of our attached programs that are not compiled to machine code.
pub(super) fn interpreted(pins: &Pins) -> Vec<String> {
    let list = |directory: PathBuf| pins::list(&directory).unwrap_or_default().into_iter();
    let links = list(pins.cgroup_links()).chain(list(pins.tcx_links()));
    let links = links.filter_map(|pin| link(&pin)).map(|link| link.program);
    let ours: Vec<u32> = links.chain(list(pins.filters()).filter_map(|pin| program(&pin))).collect();
    let programs = aya::programs::loaded_programs().filter_map(Result::ok);
    let slow = programs.filter(|program| ours.contains(&program.id()) && program.size_jitted() == 0);
    slow.map(|program| program.name_as_str().unwrap_or_default().to_owned()).collect()
}

/// The id of a pinned program.
fn program(pin: &Path) -> Option<u32> {
    sys::program_id(sys::open_pin(pin).ok()?.as_fd()).ok()
}

fn link(pin: &Path) -> Option<sys::LinkInfo> {
    sys::link_info(sys::open_pin(pin).ok()?.as_fd()).ok()
}

/// The socket hooks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// The control group that they should be on.
    pub wanted: Group,
    /// The control group that they are on; `None` if they are on none.
    pub hooked: Option<Group>,
    /// Names of the hooks, with the id of the control group that each is on: 0 if it was detached, or its group is gone.
    pub hooks: Vec<(&'static str, u64)>,
    /// Programs of others that are asked about the same calls of processes in the hooked group.
    pub others: Vec<Program>,
}

/// A control group of version 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its id, which is the number of its inode.
    pub id: u64,
    /// Its directory; `None` if it is not below the wanted one, nor above.
    pub directory: Option<PathBuf>,
    /// As /proc/PID/cgroup names it.
    pub path: Option<String>,
}

impl Group {
    /// The id of the root of all (kernfs gives it to its first node).
    const ROOT: u64 = 1;

    /// All processes are in it.
    pub fn is_root(&self) -> bool {
        self.id == Self::ROOT
    }
}

impl Sockets {
    pub(super) fn look(pins: &Pins, wanted: &Path) -> Seen<Self> {
        let id_of = |directory: &Path| fs::metadata(directory).map(|metadata| metadata.ino()).ok();
        let id = id_of(wanted).ok_or_else(|| Unseen(format!("there is no control group {}", wanted.display())))?;
        let mounts = read("/proc/self/mountinfo").unwrap_or_default();
        let group = |id, directory: Option<PathBuf>| Group {
            id,
            path: directory.as_deref().and_then(|directory| path_of(directory, &mounts)),
            directory,
        };
        let hooks: Vec<_> = SOCKET_HOOKS.iter().map(|hook| (hook.0, target(pins, hook.0))).collect();
        let hooked = hooks.iter().map(|(_, id)| *id).find(|id| *id != 0).map(|hooked| {
            let top = wanted.ancestors().take_while(|above| id_of(above).is_some() && is_group(above)).last();
            let directory = if hooked == id { Some(wanted.to_owned()) } else { top.and_then(|top| find(top, hooked)) };
            group(hooked, directory)
        });
        let others =
            hooked.as_ref().and_then(|group| group.directory.as_deref()).map(|directory| others(pins, directory));
        Ok(Self { wanted: group(id, Some(wanted.to_owned())), hooked, hooks, others: others.unwrap_or_default() })
    }
}

fn target(pins: &Pins, hook: &str) -> u64 {
    match link(&pins.cgroup_links().join(hook)).map(|link| link.target) {
        Some(LinkTarget::Cgroup(id)) => id,
        _ => 0,
    }
}

fn is_group(directory: &Path) -> bool {
    directory.join("cgroup.procs").exists()
}

/// The directory below `top` that has this inode.
fn find(top: &Path, inode: u64) -> Option<PathBuf> {
    let mut open = vec![top.to_owned()];
    while let Some(directory) = open.pop() {
        if fs::metadata(&directory).is_ok_and(|metadata| metadata.ino() == inode) {
            return Some(directory);
        }
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        open.extend(
            entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()),
        );
    }
    None
}

/// How /proc/PID/cgroup names a directory, by the mounts of cgroup2 (proc_pid_mountinfo(5)).
fn path_of(directory: &Path, mounts: &str) -> Option<String> {
    let candidates = mounts.lines().filter_map(|line| {
        let (fixed, kind) = line.split_once(" - ")?;
        let (root, point) = (fixed.split(' ').nth(3)?, fixed.split(' ').nth(4)?);
        let below = directory.strip_prefix(point).ok().filter(|_| kind.starts_with("cgroup2 "))?;
        let path = Path::new(root).join(below).to_str()?.to_owned();
        Some((point.len(), path))
    });
    candidates.max().map(|(_, path)| path)
}

/// Programs at our hooks of a control group that are not ours.
fn others(pins: &Pins, directory: &Path) -> Vec<Program> {
    let Ok(group) = sys::open_directory(directory) else { return Vec::new() };
    let mut ids = Vec::new();
    for hook in &SOCKET_HOOKS {
        let own = link(&pins.cgroup_links().join(hook.0)).map(|link| link.program);
        let programs = sys::attached_programs(HookTarget::Cgroup(group.as_fd()), hook.1).unwrap_or_default();
        ids.extend(programs.into_iter().filter(|id| Some(*id) != own));
    }
    ids.sort_unstable();
    ids.dedup();
    let names = names();
    ids.into_iter().map(|id| named(&names, id)).collect()
}

fn named(names: &BTreeMap<u32, String>, id: u32) -> Program {
    Program { id, name: names.get(&id).cloned().unwrap_or_else(|| format!("#{id}")) }
}

/// The programs of one hook of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hook {
    /// Id of ours; `None` if it is not attached.
    pub ours: Option<u32>,
    /// All, in the order in which they run.
    pub programs: Vec<Program>,
}

/// A device, its programs and its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceHooks {
    /// What netlink says about it.
    pub device: Device,
    /// The tcx hook of what comes in; if our filter of the older kind is there instead, that one before the others.
    pub ingress: Hook,
    /// The tcx hook of what goes out.
    pub egress: Hook,
    /// An XDP program of somebody else.
    pub foreign_xdp: Option<Program>,
    /// Ours runs at XDP.
    pub has_xdp: bool,
    /// Names of BPF filters of the older kind (`tc filter`).
    pub filters: Vec<String>,
    /// Largest packet in bytes, link header not counted.
    pub mtu: u32,
    /// The device below a tunnel or a VLAN, by interface index.
    pub lower: Option<u32>,
    /// Settings of the kernel.
    pub settings: DeviceSettings,
}

/// Devices with their programs.
pub(super) fn devices(pins: &Pins, links: Links) -> Seen<Vec<DeviceHooks>> {
    let names = names();
    let netns = sys::netns_cookie().map_err(|error| Unseen(format!("this namespace has no cookie: {error}")))?;
    links.0.into_iter().map(|link| device(pins, netns, &names, link)).collect()
}

fn device(pins: &Pins, netns: u64, names: &BTreeMap<u32, String>, found: Link) -> Seen<DeviceHooks> {
    let index = found.device.index;
    let pin = |hook: &str| pins.tcx_links().join(format!("{netns:x}-{index}-{hook}"));
    let hook = |name: &str, kind, of_filter| {
        let programs = match sys::attached_programs(HookTarget::Device(index), kind) {
            // The kernel has no tcx.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Vec::new(),
            result => result.map_err(|error| Unseen(format!("programs of a device cannot be listed: {error}")))?,
        };
        let filter = filter::pin(pins, netns, index, of_filter);
        let filter = program(&filter).filter(|_| filter::is_there(&filter));
        let linked = link(&pin(name)).filter(|link| link.target == LinkTarget::Tcx(index)).map(|link| link.program);
        let ours = linked.or(filter);
        let programs: Vec<_> = filter.into_iter().chain(programs).map(|id| named(names, id)).collect();
        Seen::Ok(Hook { ours: ours.filter(|id| programs.iter().any(|program| program.id == *id)), programs })
    };
    let xdp = link(&pins.xdp_links().join(format!("{netns:x}-{index}"))).map(|link| link.program);
    Ok(DeviceHooks {
        ingress: hook("ingress", BPF_TCX_INGRESS, clsact::Hook::Ingress)?,
        egress: hook("egress", BPF_TCX_EGRESS, clsact::Hook::Egress)?,
        foreign_xdp: found.xdp.filter(|id| Some(*id) != xdp).map(|id| named(names, id)),
        has_xdp: found.xdp.is_some() && found.xdp == xdp,
        filters: found.filters.into_iter().filter(|name| !name.starts_with(clsact::NAME)).collect(),
        mtu: found.mtu,
        lower: found.lower,
        settings: DeviceSettings::read(&found.device.name),
        device: found.device,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_named_by_the_innermost_mount_that_shows_it() {
        let mounts = "31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                      32 30 0:27 /pods /sys/fs/cgroup/pods rw - cgroup2 cgroup2 rw\n\
                      33 30 0:28 / / rw - ext4 /dev/root rw\n";
        let path = |directory: &str| path_of(Path::new(directory), mounts);
        assert_eq!(path("/sys/fs/cgroup/a/b").as_deref(), Some("/a/b"));
        assert_eq!(path("/sys/fs/cgroup/pods/x").as_deref(), Some("/pods/x"));
        assert_eq!(path("/elsewhere"), None);
    }
}
