//! Links: which program runs where. Every link is pinned, so that it outlives the agent; a new agent puts its programs
//! behind the links it finds. On devices of kernels without links, filters do what links do elsewhere ([`Means`], `filter`).
//!
//! Order of replacement: programs that undo (egress, recvmsg, getpeername) before programs that translate, so that no
//! translated packet or socket meets an older program on its way back. XDP translates, ahead of the tcx programs of its
//! device and relying on them: replaced last, detached first.
//!
//! From one means to the other, a hook gets the new attachment before it loses the old one; that a packet which meets both is
//! translated once is seen to by [`Gates`].
//!
//! What somebody else detaches, or unpins, is attached again: every [`INSPECTION`] all links are looked at.
//!
//! XDP is attached in the driver or not at all. A device that refuses it is served by tcx alone, as most devices are: that is
//! no failure, and it is not tried again before the device or the agent is new.
//! May touch: links, their pins, filters by way of `filter`, the `devices` map. Which device gets what is decided in `device`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aya_obj::generated::bpf_attach_type as Hook;
use prometheus_client::metrics::counter::Counter;
use proxy_common::abi::device::DeviceRecord;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::clsact;
use super::device::{Attachment, Choice, Device, Means, Xdp, decide_attachment, wants_xdp};
use super::filter;
use super::gate::Gates;
use super::guard::Guard;
use super::handover::{self, Handover};
use super::kernel::{self, Continuations, MapFds, Programs};
use super::maps::{self, Table};
use super::network::Network;
use super::pins::{self, Pins};
use super::reconcile::Status;
use super::sys::{self, LinkTarget, Place};
use crate::drain::Drain;
use crate::error::chain;
use crate::model::NodeFacts;
use crate::telemetry::event::notice::{Notice, Notices};

/// Why a program could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pin directory.
    #[error(transparent)]
    Pins(#[from] pins::Error),
    /// The tables that an earlier agent left in another layout.
    #[error(transparent)]
    Handover(#[from] handover::Error),
    /// A program or a map is missing.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The map of devices.
    #[error(transparent)]
    Maps(#[from] maps::Error),
    /// The kernel refuses a link.
    #[error("cannot {action} {program} to {target}")]
    Link {
        /// "attach", "replace" or "examine".
        action: &'static str,
        /// Program name.
        program: &'static str,
        /// Control group or device.
        target: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The control group has been removed, and there is none in its place.
    #[error(
        "the control group {path} is gone: processes are served by their packets alone, and those of this node not at all"
    )]
    CgroupGone {
        /// Where it was.
        path: PathBuf,
        /// Why none is opened in its place.
        source: Box<Error>,
    },
    /// No control group of version 2.
    #[error("cgroup2 is not mounted here: mount it, or say --socket-lb off")]
    NoCgroup,
    /// `--cgroup` is unusable.
    #[error("cannot use {path} as control group")]
    Cgroup {
        /// `--cgroup`.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What [`Error::Link`] says was tried when the kernel took no new link.
const ATTACH: &str = "attach";

/// Whether a program translates or undoes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Undoes translations; replaced first.
    Reverse,
    /// Translates; replaced last.
    Forward,
}

impl Direction {
    /// In the order of replacement.
    pub const ORDER: [Self; 2] = [Self::Reverse, Self::Forward];
}

/// A socket hook: program name in the object, where it is attached, what it does.
pub(super) struct SocketHook(pub(super) &'static str, pub(super) Hook, Direction);

pub(super) const SOCKET_HOOKS: [SocketHook; 8] = [
    SocketHook("recvmsg4", Hook::BPF_CGROUP_UDP4_RECVMSG, Direction::Reverse),
    SocketHook("recvmsg6", Hook::BPF_CGROUP_UDP6_RECVMSG, Direction::Reverse),
    SocketHook("getpeername4", Hook::BPF_CGROUP_INET4_GETPEERNAME, Direction::Reverse),
    SocketHook("getpeername6", Hook::BPF_CGROUP_INET6_GETPEERNAME, Direction::Reverse),
    SocketHook("sendmsg4", Hook::BPF_CGROUP_UDP4_SENDMSG, Direction::Forward),
    SocketHook("sendmsg6", Hook::BPF_CGROUP_UDP6_SENDMSG, Direction::Forward),
    SocketHook("connect4", Hook::BPF_CGROUP_INET4_CONNECT, Direction::Forward),
    SocketHook("connect6", Hook::BPF_CGROUP_INET6_CONNECT, Direction::Forward),
];

/// Names of the socket hooks.
pub fn socket_hook_names() -> impl Iterator<Item = &'static str> {
    SOCKET_HOOKS.iter().map(|hook| hook.0)
}

/// The root of cgroup2 as mounted here.
pub fn find_cgroup_root() -> Result<PathBuf, Error> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|source| Error::Cgroup { path: "/proc/self/mountinfo".into(), source })?;
    parse_cgroup_root(&mounts).ok_or(Error::NoCgroup)
}

/// The mount point of cgroup2 in the text of a mount table (proc_pid_mountinfo(5)); the one that shows the whole tree first.
fn parse_cgroup_root(mounts: &str) -> Option<PathBuf> {
    let candidates = mounts.lines().filter_map(|line| {
        let (fixed, options) = line.split_once(" - ")?;
        let (root, point) = (fixed.split(' ').nth(3)?, fixed.split(' ').nth(4)?);
        options.starts_with("cgroup2 ").then(|| (root != "/", unescape(point)))
    });
    candidates.min_by_key(|(is_part, _)| *is_part).map(|(_, point)| point.into())
}

/// Undoes the octal escapes of the mount table.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (escape, character)| text.replace(escape, character))
}

/// The socket hooks on one control group.
pub struct SocketLinks {
    pins: Pins,
    cgroup: OwnedFd,
    cgroup_id: u64,
    path: PathBuf,
}

impl SocketLinks {
    /// Opens the control group; attaches nothing yet.
    pub fn open(pins: &Pins, path: &Path) -> Result<Self, Error> {
        let unusable = |source| Error::Cgroup { path: path.to_owned(), source };
        let cgroup = sys::open_directory(path).map_err(unusable)?;
        let cgroup_id = fs::metadata(path).map_err(unusable)?.ino();
        Ok(Self { pins: pins.clone(), cgroup, cgroup_id, path: path.to_owned() })
    }

    /// Makes the hooks of one direction run the given programs.
    pub fn attach(&self, programs: &Programs, direction: Direction) -> Result<(), Error> {
        let mut hooks = SOCKET_HOOKS.iter().filter(|hook| hook.2 == direction);
        hooks.try_for_each(|hook| self.attach_one(programs, hook).map(drop))
    }

    fn attach_one(&self, programs: &Programs, SocketHook(name, hook, _): &SocketHook) -> Result<Link, Error> {
        let wanted = Wanted {
            program: programs.get(name)?,
            name,
            target: LinkTarget::Cgroup(self.cgroup_id),
            pin: self.pins.cgroup_links().join(name),
        };
        let create = || sys::link_cgroup(wanted.program, self.cgroup.as_fd(), *hook);
        wanted.ensure(create, || self.path.display().to_string())
    }

    /// True if the control group has not been removed. One that was made anew at its path is another one.
    fn is_there(&self) -> bool {
        // Nothing can be opened below a removed one.
        let below = format!("/proc/self/fd/{}/cgroup.procs", self.cgroup.as_raw_fd());
        fs::metadata(below).is_ok()
    }

    /// Attaches again what is gone.
    fn repair(&self, programs: &Programs, repair: &mut Repair) {
        for direction in Direction::ORDER {
            for hook in SOCKET_HOOKS.iter().filter(|hook| hook.2 == direction) {
                repair.note(hook.0, &self.path.display(), self.attach_one(programs, hook));
            }
        }
    }
}

/// Detaches the socket hooks: `--socket-lb off`.
pub fn detach_sockets(pins: &Pins) -> Result<(), Error> {
    for pin in pins::list(&pins.cgroup_links())? {
        detach(&pin)?;
    }
    Ok(())
}

/// Detaches the socket hooks that translate what sockets dial; those that undo it stay.
pub fn detach_dialling(pins: &Pins) -> Result<(), pins::Error> {
    let links = pins::list(&pins.cgroup_links())?;
    links.iter().filter(|pin| direction_of(pin) == Direction::Forward).try_for_each(|pin| detach(pin))
}

/// True if programs of an earlier agent run.
pub fn has_links(pins: &Pins) -> Result<bool, pins::Error> {
    let directories = [pins.cgroup_links(), pins.tcx_links(), pins.filters(), pins.xdp_links()];
    directories.iter().try_fold(false, |found, directory| Ok(found || !pins::list(directory)?.is_empty()))
}

/// Detaches everything that is pinned: what translates before what undoes. Returns how many links there were.
pub fn detach_all(pins: &Pins) -> Result<usize, pins::Error> {
    let mut links = pins::list(&pins.xdp_links())?;
    links.extend(pins::list(&pins.cgroup_links())?);
    links.extend(pins::list(&pins.tcx_links())?);
    links.extend(pins::list(&pins.filters())?);
    links.sort_by_key(|pin| direction_of(pin) == Direction::Reverse);
    links.iter().try_for_each(|pin| take_off(pins, pin))?;
    Ok(links.len())
}

/// Detaches what a pin stands for, a link or a filter, and removes the pin.
fn take_off(pins: &Pins, pin: &Path) -> Result<(), pins::Error> {
    if pin.parent() == Some(&pins.filters()) { filter::remove(pins, pin) } else { detach(pin) }
}

/// What a pinned link does, by the name of its pin.
fn direction_of(pin: &Path) -> Direction {
    let name = pins::file_name(pin).unwrap_or_default();
    let is_reverse = name.ends_with("egress") || name.starts_with("recvmsg") || name.starts_with("getpeername");
    if is_reverse { Direction::Reverse } else { Direction::Forward }
}

/// Detaches a pinned link and removes the pin. The link goes even if somebody else still holds it.
pub fn detach(pin: &Path) -> Result<(), pins::Error> {
    if let Ok(link) = sys::open_pin(pin)
        && let Err(error) = sys::link_detach(link.as_fd())
    {
        // Its target may be gone already; what counts is that the pin goes.
        debug!(pin = %pin.display(), %error, "link was not detached");
    }
    pins::unpin(pin)
}

/// What became of a link that shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// It was there, and runs the wanted program (now).
    Kept,
    /// There was none.
    New,
}

/// A link that shall be.
struct Wanted<'a> {
    program: BorrowedFd<'a>,
    name: &'static str,
    target: LinkTarget,
    pin: PathBuf,
}

impl Wanted<'_> {
    /// Adopts the pinned link if it is on our target, else makes and pins one.
    fn ensure(&self, create: impl FnOnce() -> io::Result<OwnedFd>, target: impl Fn() -> String) -> Result<Link, Error> {
        let failed = |action| {
            let (program, target) = (self.name, target());
            move |source| Error::Link { action, program, target, source }
        };
        let old = match sys::open_pin(&self.pin) {
            Ok(link) => Some(link),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(failed("examine")(source)),
        };
        if let Some(old) = &old {
            let info = sys::link_info(old.as_fd()).map_err(failed("examine"))?;
            if info.target == self.target {
                self.replace(old, info.program).map_err(failed("replace"))?;
                return Ok(Link::Kept);
            }
        }
        // The new one first: at another target, what is translated once is left alone by the other. (On one hook of a device it
        // may be taken for a direct connection: see `gate`.)
        let link = create().map_err(failed(ATTACH))?;
        if old.is_some() {
            detach(&self.pin)?;
        }
        sys::pin(link.as_fd(), &self.pin).map_err(failed("pin the link of"))?;
        Ok(Link::New)
    }

    fn replace(&self, link: &OwnedFd, current: u32) -> io::Result<()> {
        if sys::program_id(self.program)? == current {
            return Ok(());
        }
        sys::link_update(link.as_fd(), self.program)
    }
}

/// Programs of one kind of device.
struct Pair {
    ingress: &'static str,
    egress: &'static str,
}

impl Pair {
    const fn of(attachment: Attachment) -> Self {
        match attachment {
            Attachment::Ethernet => Self { ingress: "ingress", egress: "egress" },
            Attachment::Ip => Self { ingress: "ingress_l3", egress: "egress_l3" },
            Attachment::BridgePort(_) => Self { ingress: "ingress_port", egress: "egress" },
        }
    }

    const fn program(&self, direction: Direction) -> &'static str {
        match direction {
            Direction::Reverse => self.egress,
            Direction::Forward => self.ingress,
        }
    }
}

/// The XDP program.
const XDP_PROGRAM: &str = "uplink";

/// What a device has now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Attached {
    attachment: Attachment,
    record: Option<DeviceRecord>,
    /// It has the XDP program, or has refused it.
    is_asked_for_xdp: bool,
}

/// A device that does not run the XDP program although it was to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XdpRefusal {
    /// Name of the device.
    pub device: String,
    /// Why, in words.
    pub reason: String,
}

/// The links of the node's devices, kept as the network changes.
pub struct DeviceLinks {
    pins: Pins,
    /// Network namespace cookie: interface indices mean something only within it.
    netns: u64,
    choice: Choice,
    means: Means,
    programs: Programs,
    ports: Table<u32, DeviceRecord>,
    attached: BTreeMap<u32, Attached>,
    listing: u64,
    skipped: BTreeSet<u32>,
    refused: watch::Sender<BTreeMap<u32, XdpRefusal>>,
}

impl DeviceLinks {
    /// Attaches nothing yet. `netns` is the cookie of the namespace whose devices will be given.
    pub fn new(
        pins: &Pins,
        netns: u64,
        choice: Choice,
        means: Means,
        programs: Programs,
        maps: &MapFds,
    ) -> Result<Self, Error> {
        Ok(Self {
            pins: pins.clone(),
            netns,
            choice,
            means,
            programs,
            ports: Table::open(maps, "devices")?,
            attached: BTreeMap::new(),
            listing: 0,
            skipped: BTreeSet::new(),
            refused: watch::Sender::default(),
        })
    }

    /// Devices that refuse the XDP program, by interface index.
    pub fn watch_refused(&self) -> watch::Receiver<BTreeMap<u32, XdpRefusal>> {
        self.refused.subscribe()
    }

    /// The programs that are attached.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Puts this agent's programs of one direction behind the links that an earlier agent left, in all devices. Those that
    /// undo go to the others too: a packet that is translated at the first device may leave by the last one.
    pub fn replace(&mut self, network: &Network, facts: &NodeFacts, direction: Direction) -> Vec<Error> {
        let mut errors = self.change_means(network, direction);
        for device in network.devices.values() {
            let Ok(attachment) = decide_attachment(device, &self.choice) else { continue };
            if direction == Direction::Reverse || self.is_pinned(device.index, direction) {
                errors.extend(self.attach_one(device, attachment, direction).err());
            }
            if direction == Direction::Forward && self.xdp_pin(device.index).exists() {
                errors.extend(self.replace_xdp(device, network, facts).err());
            }
        }
        errors
    }

    fn replace_xdp(&mut self, device: &Device, network: &Network, facts: &NodeFacts) -> Result<(), Error> {
        if !self.wants_xdp(device, network, facts) {
            return self.release_xdp(device.index);
        }
        match self.ensure_xdp(device) {
            // The link was another device's; `follow` tells that this one refuses.
            Err(Error::Link { action: ATTACH, .. }) => Ok(()),
            result => result.map(drop),
        }
    }

    fn wants_xdp(&self, device: &Device, network: &Network, facts: &NodeFacts) -> bool {
        wants_xdp(device, &self.choice, network.is_bound(&facts.routed, device.index))
    }

    /// Makes links and port records follow the network. A device that fails is reported and tried again next time.
    pub fn follow(&mut self, network: &Network, facts: &NodeFacts) -> Vec<Error> {
        if network.listing != self.listing {
            // An index may stand for another device now: look at every link again.
            self.attached.clear();
            self.skipped.clear();
            self.listing = network.listing;
        }
        let mut errors: Vec<Error> = self.prune(network).err().into_iter().collect();
        for device in network.devices.values() {
            errors.extend(self.follow_device(device, network, facts).err());
        }
        errors
    }

    fn follow_device(&mut self, device: &Device, network: &Network, facts: &NodeFacts) -> Result<(), Error> {
        let attachment = match decide_attachment(device, &self.choice) {
            Ok(attachment) => attachment,
            Err(reason) => {
                if self.skipped.insert(device.index) {
                    debug!(device = device.name, %reason, "device gets no program");
                }
                return self.release(device.index);
            }
        };
        self.skipped.remove(&device.index);
        let is_asked_for_xdp = self.wants_xdp(device, network, facts);
        let own = is_asked_for_xdp.then(|| own_record(device));
        let record = port_record(attachment, network).or(own);
        let wanted = Attached { attachment, record, is_asked_for_xdp };
        if self.attached.get(&device.index) == Some(&wanted) {
            return Ok(());
        }
        self.attach(device, wanted)
    }

    fn attach(&mut self, device: &Device, wanted: Attached) -> Result<(), Error> {
        let before = self.attached.remove(&device.index);
        match &wanted.record {
            Some(record) => self.ports.put(&device.index, record)?,
            None => drop(self.ports.remove(&device.index)?),
        }
        for direction in Direction::ORDER {
            match self.attach_one(device, wanted.attachment, direction) {
                Err(Error::Link { source, .. }) if is_gone(&source) => return Ok(()),
                result => _ = result?,
            }
        }
        if before.is_none_or(|before| before.attachment != wanted.attachment) {
            info!(device = device.name, attachment = ?wanted.attachment, "programs attached");
        }
        if !wanted.is_asked_for_xdp {
            self.release_xdp(device.index)?;
        } else if before.is_none_or(|before| !before.is_asked_for_xdp) {
            self.attach_xdp(device)?;
        }
        self.attached.insert(device.index, wanted);
        Ok(())
    }

    /// Attaches the XDP program, or notes that the device refuses it.
    fn attach_xdp(&mut self, device: &Device) -> Result<(), Error> {
        match self.ensure_xdp(device) {
            Ok(_) => {
                self.forget_refusal(device.index);
                info!(device = device.name, "XDP program attached");
            }
            Err(Error::Link { source, .. }) if is_gone(&source) => {}
            Err(Error::Link { action: ATTACH, source, .. }) => {
                self.note_refusal(device, &source);
                // What is pinned in its name is another device's.
                self.unpin_xdp(device.index)?;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn ensure_xdp(&self, device: &Device) -> Result<Link, Error> {
        let wanted = Wanted {
            program: self.programs.get(XDP_PROGRAM)?,
            name: XDP_PROGRAM,
            target: LinkTarget::Xdp(device.index),
            pin: self.xdp_pin(device.index),
        };
        wanted.ensure(|| sys::link_xdp(wanted.program, device.index), || device.name.clone())
    }

    /// Notes and tells that a device refuses XDP, unless that is known.
    fn note_refusal(&self, device: &Device, error: &io::Error) {
        let refusal = XdpRefusal { device: device.name.clone(), reason: xdp_refusal(error) };
        if self.refused.borrow().get(&device.index) == Some(&refusal) {
            return;
        }
        match self.choice.xdp {
            Xdp::Native => warn!(device = device.name, reason = refusal.reason, "device does not run XDP"),
            Xdp::Auto | Xdp::Off => info!(device = device.name, reason = refusal.reason, "device does not run XDP"),
        }
        self.refused.send_modify(|refused| drop(refused.insert(device.index, refusal)));
    }

    fn forget_refusal(&self, index: u32) {
        self.refused.send_if_modified(|refused| refused.remove(&index).is_some());
    }

    fn release_xdp(&self, index: u32) -> Result<(), Error> {
        self.forget_refusal(index);
        self.unpin_xdp(index)
    }

    fn unpin_xdp(&self, index: u32) -> Result<(), Error> {
        let pin = self.xdp_pin(index);
        if pin.exists() {
            detach(&pin)?;
        }
        Ok(())
    }

    /// Moves one hook of all devices that have a program by the other means to the wanted one; they get programs that do what
    /// ours do, to be replaced by these. What fails is told and left to who attaches the programs themselves.
    fn change_means(&self, network: &Network, direction: Direction) -> Vec<Error> {
        let other = self.other_means();
        let is_other = |device: &&Device| self.pin(other, device.index, direction).exists();
        let mut moves: Vec<_> = network
            .devices
            .values()
            .filter(is_other)
            .filter_map(|device| {
                Some((device, Pair::of(decide_attachment(device, &self.choice).ok()?).program(direction)))
            })
            .collect();
        let mut errors = Vec::new();
        if moves.is_empty() {
            return errors;
        }
        let mut gates = BTreeMap::new();
        for name in moves.iter().map(|(_, name)| *name).collect::<BTreeSet<_>>() {
            match self.gates(name) {
                Ok(made) => drop(gates.insert(name, made)),
                Err(error) => errors.push(error),
            }
        }
        let mut each = |step: &dyn Fn(&Device, &'static str, &Gates) -> Result<(), Error>| {
            moves.retain(|(device, name)| {
                let Some(gates) = gates.get(name) else { return false };
                step(device, name, gates).map_err(|error| errors.push(error)).is_ok()
            });
        };
        match self.means {
            Means::Clsact => {
                each(&|device, name, gates| self.ensure_link(device, name, gates.first.as_fd(), direction).map(drop));
                maps::wait_for_programs();
                each(&|device, name, gates| {
                    self.ensure_filter(device, name, gates.second.as_fd(), direction)?;
                    self.take_off(&self.pin(other, device.index, direction))
                });
                maps::wait_for_programs();
            }
            Means::Tcx => {
                each(&|device, name, gates| {
                    self.ensure_filter(device, name, gates.second.as_fd(), direction)?;
                    self.ensure_link(device, name, gates.first.as_fd(), direction).map(drop)
                });
                maps::wait_for_programs();
                each(&|device, _, _| self.take_off(&self.pin(other, device.index, direction)));
            }
        }
        errors
    }

    fn gates(&self, name: &'static str) -> Result<Gates, Error> {
        let made = Gates::new(self.programs.get(name)?, &self.pins);
        made.map_err(|source| Error::Link {
            action: "change the attachment of",
            program: name,
            target: "devices".to_owned(),
            source,
        })
    }

    const fn other_means(&self) -> Means {
        match self.means {
            Means::Tcx => Means::Clsact,
            Means::Clsact => Means::Tcx,
        }
    }

    /// Attaches a program by the wanted means, then takes off what the device has by the other one.
    fn attach_one(&self, device: &Device, attachment: Attachment, direction: Direction) -> Result<Link, Error> {
        let name = Pair::of(attachment).program(direction);
        let program = self.programs.get(name)?;
        let link = match self.means {
            Means::Tcx => self.ensure_link(device, name, program, direction),
            Means::Clsact => self.ensure_filter(device, name, program, direction),
        }?;
        self.take_off(&self.pin(self.other_means(), device.index, direction))?;
        Ok(link)
    }

    fn ensure_link(
        &self,
        device: &Device,
        name: &'static str,
        program: BorrowedFd<'_>,
        direction: Direction,
    ) -> Result<Link, Error> {
        let (hook, place) = match direction {
            Direction::Reverse => (Hook::BPF_TCX_EGRESS, Place::Last),
            Direction::Forward => (Hook::BPF_TCX_INGRESS, Place::First),
        };
        let wanted = Wanted {
            program,
            name,
            target: LinkTarget::Tcx(device.index),
            pin: self.pin(Means::Tcx, device.index, direction),
        };
        let create = || sys::link_tcx(wanted.program, device.index, hook, place);
        wanted.ensure(create, || device.name.clone())
    }

    fn ensure_filter(
        &self,
        device: &Device,
        name: &'static str,
        program: BorrowedFd<'_>,
        direction: Direction,
    ) -> Result<Link, Error> {
        let wanted = filter::Wanted {
            pins: &self.pins,
            netns: self.netns,
            device: device.index,
            hook: filter_hook(direction),
            program,
            name,
        };
        match wanted.ensure() {
            Ok(is_new) => Ok(if is_new { Link::New } else { Link::Kept }),
            Err(filter::Error::Pins(error)) => Err(error.into()),
            Err(filter::Error::Kernel { action, source }) => {
                Err(Error::Link { action, program: name, target: device.name.clone(), source })
            }
        }
    }

    /// Attaches again what served devices have lost.
    fn repair(&self, network: &Network, repair: &mut Repair) {
        for (index, attached) in &self.attached {
            let Some(device) = network.devices.get(index) else { continue };
            for direction in Direction::ORDER {
                let program = Pair::of(attached.attachment).program(direction);
                repair.note(program, &device.name, self.attach_one(device, attached.attachment, direction));
            }
            if let Some(record) = &attached.record {
                repair.note_record(&device.name, self.ensure_record(*index, record));
            }
            if attached.is_asked_for_xdp && !self.refused.borrow().contains_key(index) {
                match self.ensure_xdp(device) {
                    Err(Error::Link { action: ATTACH, source, .. }) if !is_gone(&source) => {
                        self.note_refusal(device, &source);
                    }
                    result => repair.note(XDP_PROGRAM, &device.name, result),
                }
            }
        }
    }

    /// Writes what the programs must know about a device, if the table says something else.
    fn ensure_record(&self, index: u32, record: &DeviceRecord) -> Result<Link, Error> {
        if self.ports.get(&index)?.as_ref() == Some(record) {
            return Ok(Link::Kept);
        }
        self.ports.put(&index, record)?;
        Ok(Link::New)
    }

    /// Takes the programs off a device that shall have none.
    fn release(&mut self, index: u32) -> Result<(), Error> {
        self.attached.remove(&index);
        self.release_xdp(index)?;
        for direction in Direction::ORDER.into_iter().rev() {
            for means in Means::ALL {
                self.take_off(&self.pin(means, index, direction))?;
            }
        }
        self.ports.remove(&index)?;
        Ok(())
    }

    /// Detaches what a pin stands for, if it is there.
    fn take_off(&self, pin: &Path) -> Result<(), Error> {
        if pin.exists() {
            take_off(&self.pins, pin)?;
        }
        Ok(())
    }

    /// Removes pins and records of devices that are gone, and of other namespaces.
    fn prune(&mut self, network: &Network) -> Result<(), Error> {
        self.attached.retain(|index, _| network.devices.contains_key(index));
        self.skipped.retain(|index| network.devices.contains_key(index));
        self.refused.send_if_modified(|refused| {
            let before = refused.len();
            refused.retain(|index, _| network.devices.contains_key(index));
            refused.len() != before
        });
        let directories = [self.pins.xdp_links(), self.pins.tcx_links(), self.pins.filters()];
        let lists = directories.iter().map(|directory| pins::list(directory)).collect::<Result<Vec<_>, _>>()?;
        for pin in lists.concat() {
            match pins::device_of(&pin) {
                Some((netns, index)) if netns == self.netns && network.devices.contains_key(&index) => {}
                Some((netns, index)) => {
                    if netns != self.netns {
                        warn!(pin = %pin.display(), "link of another network namespace removed");
                    }
                    take_off(&self.pins, &pin)?;
                    self.ports.remove(&index)?;
                }
                None => warn!(pin = %pin.display(), "foreign pin left alone"),
            }
        }
        Ok(())
    }

    fn xdp_pin(&self, index: u32) -> PathBuf {
        self.pins.xdp_links().join(format!("{:x}-{index}", self.netns))
    }

    fn is_pinned(&self, index: u32, direction: Direction) -> bool {
        Means::ALL.into_iter().any(|means| self.pin(means, index, direction).exists())
    }

    fn pin(&self, means: Means, index: u32, direction: Direction) -> PathBuf {
        let hook = match direction {
            Direction::Reverse => "egress",
            Direction::Forward => "ingress",
        };
        match means {
            Means::Tcx => self.pins.tcx_links().join(format!("{:x}-{index}-{hook}", self.netns)),
            Means::Clsact => filter::pin(&self.pins, self.netns, index, filter_hook(direction)),
        }
    }
}

/// Where a device's filter of a direction is.
const fn filter_hook(direction: Direction) -> clsact::Hook {
    match direction {
        Direction::Reverse => clsact::Hook::Egress,
        Direction::Forward => clsact::Hook::Ingress,
    }
}

/// Why a device refuses the XDP program, in words. (The kernel's own go to whoever reads its trace events.)
fn xdp_refusal(error: &io::Error) -> String {
    let reason = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "its driver has no native XDP",
        Some(libc::EINVAL) => "its driver takes no XDP program as the device is set up (MTU, queues, offloads)",
        Some(libc::EBUSY | libc::EEXIST) => "another XDP program is attached, and left alone",
        Some(libc::ERANGE) => "its MTU is too large for XDP",
        _ => return error.to_string(),
    };
    reason.to_owned()
}

/// The device vanished between its announcement and the call.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOLINK))
}

/// The attachments as a part of the agent.
pub struct Task {
    /// The socket hooks, unless they are switched off.
    pub sockets: Option<SocketLinks>,
    /// The hooks of devices.
    pub devices: DeviceLinks,
    /// What the programs go on in.
    pub continuations: Continuations,
    /// What is to be done besides, if earlier programs have tables of another layout.
    pub handover: Option<Handover>,
    /// All that earlier programs used has been removed.
    pub has_left_earlier: bool,
    /// Devices of the node.
    pub network: watch::Receiver<Network>,
    /// Which of them is an uplink.
    pub facts: watch::Receiver<Arc<NodeFacts>>,
    /// Programs of an earlier agent were running and have been replaced ([`Self::take_over`]).
    pub is_adopted: bool,
    /// Tells when the tables are worth attaching to.
    pub status: watch::Receiver<Arc<Status>>,
    /// Told when everything is attached for the first time.
    pub attached: watch::Sender<bool>,
    /// Programs that had been detached by somebody else, and were attached again.
    pub repairs: Counter,
    /// Why some could not be, as it was told.
    pub unrepaired: BTreeSet<String>,
    /// Who hears of both.
    pub notices: Notices,
    /// What keeps the pins.
    pub guard: Guard,
}

/// What a look at all links comes to.
#[derive(Default)]
struct Repair {
    /// Programs that were attached again.
    done: u64,
    /// Failures that were told at the last look.
    known: BTreeSet<String>,
    /// Those of this one.
    failed: BTreeSet<String>,
    /// Who hears of both.
    notices: Notices,
}

impl Repair {
    fn note(&mut self, program: &'static str, target: &dyn std::fmt::Display, result: Result<Link, Error>) {
        match result {
            Ok(Link::Kept) => {}
            Ok(Link::New) => {
                self.done += 1;
                warn!(program, %target, "a program had been detached by somebody else; it is attached again");
                let note = format!("{program} had been detached from {target} by somebody else; it is attached again");
                self.notices.tell(Notice::of_node("ProgramDetached", REPAIR, note));
            }
            Err(Error::Link { source, .. }) if is_gone(&source) => {}
            Err(error) => self.note_failure(&error),
        }
    }

    /// What became of what the programs must know about a device.
    fn note_record(&mut self, device: &str, result: Result<Link, Error>) {
        match result {
            Ok(Link::Kept) => {}
            Ok(Link::New) => {
                self.done += 1;
                warn!(device, "somebody else has changed the record of a device; it is written again");
                let note = "somebody else has changed the table devices of this node; it is written again";
                self.notices.tell(Notice::of_node("TablesChanged", REPAIR, note));
            }
            Err(error) => self.note_failure(&error),
        }
    }

    /// What became of pins: how many were made again.
    fn note_pins(&mut self, result: Result<usize, Error>) {
        match result {
            Ok(0) => {}
            Ok(count) => {
                self.done += count as u64;
                warn!(count, "somebody else has removed pins; they are made again");
                let note = "somebody else has removed what is pinned on this node; it is pinned again";
                self.notices.tell(Notice::of_node("PinsRemoved", REPAIR, note));
            }
            Err(error) => self.note_failure(&error),
        }
    }

    /// Tells a failure that was not there at the last look.
    fn note_failure(&mut self, error: &Error) {
        let text = chain(error).to_string();
        if !self.known.contains(&text) {
            warn!(error = text, "what somebody else took away cannot be brought back; it will be tried on");
            let note = format!("what somebody else took away is not brought back: {text}; it is tried on");
            self.notices.tell(Notice::of_node("RepairFailed", REPAIR, note));
        }
        self.failed.insert(text);
    }
}

/// What events about repairs say that was being done.
pub const REPAIR: &str = "Repair";

/// Between two looks at all links.
pub const INSPECTION: Duration = Duration::from_secs(10);

impl Task {
    /// Attaches, then follows the devices until the drain; the attachments stay.
    pub async fn run(mut self, mut drain: Drain) -> Result<(), Error> {
        if !self.is_adopted {
            // Empty tables would refuse what a predecessor still serves.
            tokio::select! {
                result = self.status.wait_for(|status| status.is_serving) => if result.is_err() { return Ok(()) },
                () = drain.wait() => return Ok(()),
            }
            self.flip()?;
        }
        let mut backoff = Backoff::default();
        let mut inspection = tokio::time::interval_at(Instant::now() + INSPECTION, INSPECTION);
        inspection.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let network = self.network.borrow_and_update().clone();
            let facts = self.facts.borrow_and_update().clone();
            let errors = self.devices.follow(&network, &facts);
            let retry = if errors.is_empty() {
                backoff = Backoff::default();
                self.leave_earlier()?;
                self.attached.send_replace(true);
                Duration::MAX
            } else {
                errors
                    .iter()
                    .for_each(|error| warn!(error = chain(error), "a device is not served, it will be tried again"));
                backoff.next_wait()
            };
            let retry = tokio::time::sleep(retry);
            tokio::pin!(retry);
            loop {
                tokio::select! {
                    changed = self.network.changed() => if changed.is_err() { return Ok(()) },
                    changed = self.facts.changed() => if changed.is_err() { return Ok(()) },
                    () = &mut retry => {}
                    _ = inspection.tick() => {
                        self.repair();
                        continue;
                    }
                    () = drain.wait() => return Ok(()),
                }
                break;
            }
        }
    }

    /// Attaches again what somebody else has detached.
    fn repair(&mut self) {
        let known = std::mem::take(&mut self.unrepaired);
        let mut repair = Repair { known, notices: self.notices.clone(), ..Repair::default() };
        // Links have their pins in the directories that are made here.
        let pinned = self.guard.repair(&self.devices.pins, &self.continuations);
        repair.note_pins(pinned);
        self.follow_cgroup(&mut repair);
        if let Some(sockets) = &self.sockets {
            sockets.repair(self.devices.programs(), &mut repair);
        }
        let network = self.network.borrow().clone();
        self.devices.repair(&network, &mut repair);
        self.repairs.inc_by(repair.done);
        self.unrepaired = repair.failed;
    }

    /// Moves to the control group that is now where the removed one was.
    fn follow_cgroup(&mut self, repair: &mut Repair) {
        let Some(sockets) = self.sockets.as_ref().filter(|sockets| !sockets.is_there()) else { return };
        let path = sockets.path.clone();
        match SocketLinks::open(&self.devices.pins, &path) {
            Ok(new) => {
                warn!(path = %path.display(), "the control group is another one now; the socket hooks move to it");
                let note = format!("{} is another control group now; the socket hooks move to it", path.display());
                self.notices.tell(Notice::of_node("ControlGroupReplaced", REPAIR, note));
                self.sockets = Some(new);
            }
            Err(error) => repair.note_failure(&Error::CgroupGone { path, source: Box::new(error) }),
        }
    }

    /// Puts our programs in the place of an earlier agent's, without waiting for `status`: before anything writes the
    /// tables, which may be others than theirs from now on.
    pub fn take_over(&mut self) -> Result<(), Error> {
        if self.is_adopted { self.flip() } else { Ok(()) }
    }

    /// Puts our programs behind all links that exist, and attaches the socket hooks.
    fn flip(&mut self) -> Result<(), Error> {
        let network = self.network.borrow().clone();
        let facts = self.facts.borrow().clone();
        self.continuations.pin(&self.devices.pins)?;
        if let Some(handover) = &mut self.handover {
            handover.close()?;
        }
        let mut is_complete = true;
        let mut refused = None;
        for direction in Direction::ORDER {
            if let Some(sockets) = &self.sockets
                && let Err(error) = sockets.attach(self.devices.programs(), direction)
            {
                refused = Some(error);
            }
            for error in self.devices.replace(&network, &facts, direction) {
                warn!(error = chain(&error), "a program was not replaced");
                is_complete = false;
            }
        }
        if self.sockets.is_none() {
            detach_sockets(&self.devices.pins)?;
        }
        if is_complete && refused.is_none() {
            return self.leave_earlier();
        }
        if let Some(handover) = &mut self.handover {
            handover.finish()?;
        }
        // Told last: packets are served by then, whatever becomes of the agent.
        refused.map_or(Ok(()), Err)
    }

    /// No link runs earlier programs any more: what those used goes.
    fn leave_earlier(&mut self) -> Result<(), Error> {
        if self.has_left_earlier {
            return Ok(());
        }
        if let Some(mut handover) = self.handover.take() {
            handover.finish()?;
        }
        let pins = &self.devices.pins;
        self.continuations.prune_others(pins)?;
        if let Some(own) = pins.current()? {
            pins.remove_other_layouts(own)?;
        }
        self.guard.begin(pins)?;
        self.has_left_earlier = true;
        Ok(())
    }
}

/// What the programs must know about a bridge port.
fn port_record(attachment: Attachment, network: &Network) -> Option<DeviceRecord> {
    let Attachment::BridgePort(index) = attachment else { return None };
    // A bridge that is not known (yet) gets a record that matches no frame; its announcement brings the right one.
    Some(device_record(index, network.devices.get(&index).map_or([0; 6], |bridge| bridge.mac), 0))
}

/// What the XDP program must know about its device.
fn own_record(device: &Device) -> DeviceRecord {
    // The far end of a veth pair takes what XDP sends only if it runs XDP too, and nobody here can tell.
    device_record(0, device.mac, if device.is_hardware { DeviceRecord::SENDS } else { 0 })
}

fn device_record(bridge: u32, mac: [u8; 6], flags: u16) -> DeviceRecord {
    let word = |at: usize| u16::from_ne_bytes([mac[at], mac[at + 1]]);
    DeviceRecord { bridge, mac: [word(0), word(2), word(4)], flags }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 25 0:26 / /sys/fs/cgroup rw,nosuid - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu
";

    #[test]
    fn cgroup2_is_found_where_it_is_mounted() {
        assert_eq!(parse_cgroup_root(HYBRID), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(parse_cgroup_root("25 1 8:1 / / rw - ext4 /dev/root rw\n"), None);
        let spaced = "31 30 0:27 / /a\\040b rw - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_cgroup_root(spaced), Some("/a b".into()));
    }

    #[test]
    fn a_mount_of_the_whole_tree_is_preferred() {
        let part = "31 30 0:27 /kubepods /part rw - cgroup2 cgroup2 rw\n32 30 0:27 / /whole rw - cgroup2 cgroup2 rw\n";
        assert_eq!(parse_cgroup_root(part), Some("/whole".into()));
    }

    #[test]
    fn a_bridge_port_knows_the_mac_of_its_bridge_as_on_the_wire() {
        let mut network = Network::default();
        let bridge = Device {
            index: 9,
            name: "cni0".into(),
            kind: "bridge".into(),
            layer: super::super::device::Layer::Ethernet,
            is_loopback: false,
            controller: None,
            mac: [2, 1, 4, 3, 6, 5],
            is_hardware: false,
        };
        network.devices.insert(9, bridge);
        let record = port_record(Attachment::BridgePort(9), &network).unwrap();
        let bytes: Vec<u8> = record.mac.iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!((record.bridge, bytes.as_slice()), (9, &[2, 1, 4, 3, 6, 5][..]));
        assert_eq!(port_record(Attachment::Ethernet, &network), None);
    }

    #[test]
    fn only_hardware_is_said_to_send_what_xdp_answers() {
        let device = |is_hardware| Device {
            index: 2,
            name: "eth0".into(),
            kind: String::new(),
            layer: super::super::device::Layer::Ethernet,
            is_loopback: false,
            controller: None,
            mac: [2, 1, 4, 3, 6, 5],
            is_hardware,
        };
        let [veth, nic] = [false, true].map(|is_hardware| own_record(&device(is_hardware)));
        assert_eq!((veth.bridge, veth.mac), (0, nic.mac));
        assert!(nic.has(DeviceRecord::SENDS) && !veth.has(DeviceRecord::SENDS));
    }

    #[test]
    fn refusals_are_told_in_words() {
        let words = |number| xdp_refusal(&io::Error::from_raw_os_error(number));
        for (number, part) in [
            (libc::EOPNOTSUPP, "no native XDP"),
            (libc::EINVAL, "as the device is set up"),
            (libc::EBUSY, "another XDP program"),
            (libc::EEXIST, "another XDP program"),
            (libc::ERANGE, "MTU"),
            (libc::ENOMEM, "memory"),
        ] {
            assert!(words(number).contains(part), "{}", words(number));
        }
    }

    #[test]
    fn pins_tell_what_a_link_does() {
        for SocketHook(name, _, direction) in SOCKET_HOOKS {
            assert_eq!(direction_of(&Path::new("/x").join(name)), direction, "{name}");
        }
        assert_eq!(direction_of(Path::new("/x/1f-12-egress")), Direction::Reverse);
        assert_eq!(direction_of(Path::new("/x/1f-12-ingress")), Direction::Forward);
        assert_eq!(direction_of(Path::new("/x/1f-12")), Direction::Forward);
    }

    #[test]
    fn reverse_hooks_come_first() {
        let first_forward = SOCKET_HOOKS.iter().position(|hook| hook.2 == Direction::Forward).unwrap();
        assert!(SOCKET_HOOKS[first_forward..].iter().all(|hook| hook.2 == Direction::Forward));
        assert_eq!(Direction::ORDER, [Direction::Reverse, Direction::Forward]);
    }
}
