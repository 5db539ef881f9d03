//! The BPF object in the kernel: its maps, pinned and checked, and its programs, loaded and ready to be attached.
//!
//! Maps that are already pinned are adopted if they are what the object declares, in every property; aya would take any. If
//! they are not, a layout is prepared beside them, with the entries they have, and taken up when links run the new programs
//! (`handover`).
//! May touch: the pin directory, the kernel's BPF objects. Attaches nothing (`attach`), writes no entry (`maps`, `carry`).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::Map;
use aya::programs::{Program, ProgramError};
use aya::{EbpfError, EbpfLoader};
use proxy_common::continuation::Continuation;
use tracing::warn;

use super::btf::{self, Field};
use super::carry;
use super::clsact;
use super::device::Means;
use super::handover::Handover;
use super::kfunc::{self, KFUNCS, Kfunc};
use super::layout::{self, Excess, Mismatch, Step};
use super::maps;
use super::pins::{self, Layout, Pins};
use super::sys::{self, MapInfo};

/// Why the datapath could not be brought into the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pin directory.
    #[error(transparent)]
    Pins(#[from] pins::Error),
    /// The object's markers.
    #[error(transparent)]
    Kfunc(#[from] kfunc::Error),
    /// The kernel's types.
    #[error(transparent)]
    Btf(#[from] btf::Error),
    /// What is pinned was made by another build, which calls itself the same version.
    #[error("what is pinned has other records: {}; run `shunt cleanup` first", join(.0))]
    Layout(Vec<Mismatch>),
    /// What is in use does not fit the wanted sizes.
    #[error("{}; nothing was changed", join(.0))]
    TooSmall(Vec<Excess>),
    /// Entries of another layout could not be taken over.
    #[error("cannot take over the tables of another layout")]
    Carry(#[source] Box<maps::Error>),
    /// The object cannot be parsed.
    #[error("the BPF object is not readable")]
    Object(#[source] aya_obj::ParseError),
    /// The maps cannot be made, or the object does not fit together.
    #[error("cannot load the BPF object")]
    Load(#[source] Box<EbpfError>),
    /// The verifier or the kernel refuses a program.
    #[error("the kernel refuses the program {name}")]
    Program {
        /// Its name in the object.
        name: String,
        /// Kernel's answer with the verifier's log.
        source: Box<ProgramError>,
    },
    /// The object lacks something that this agent was built for.
    #[error("the BPF object has no {kind} named {name}")]
    Missing {
        /// "map" or "program".
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A system call on a map.
    #[error("cannot {action} the map {name}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// The map's name.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Something that the kernel cannot do and that the agent cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this kernel has no {feature}; Linux {since} has it")]
pub struct Unsupported {
    /// What is missing.
    pub feature: &'static str,
    /// The first kernel that has it.
    pub since: &'static str,
}

/// Tries whether the kernel has a means of running programs on devices. `classifier` is any loaded TC program.
pub fn probe(means: Means, classifier: BorrowedFd<'_>) -> Result<(), Unsupported> {
    match means {
        Means::Tcx => probe_tcx(classifier),
        Means::Clsact => probe_clsact(classifier),
    }
}

fn probe_tcx(classifier: BorrowedFd<'_>) -> Result<(), Unsupported> {
    /// No device has it: a kernel that knows the hook answers ENODEV, one that does not EINVAL.
    const NO_DEVICE: u32 = i32::MAX as u32;
    let hook = aya_obj::generated::bpf_attach_type::BPF_TCX_INGRESS;
    match sys::link_tcx(classifier, NO_DEVICE, hook, sys::Place::Last) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Err(Unsupported { feature: "tcx (links of programs to devices)", since: "6.6" })
        }
        _ => Ok(()),
    }
}

/// Makes a filter, in a network namespace that nobody else sees.
fn probe_clsact(classifier: BorrowedFd<'_>) -> Result<(), Unsupported> {
    const LOOPBACK: u32 = 1;
    let attempt = || {
        sys::leave_netns()?;
        clsact::ensure_qdisc(LOOPBACK)?;
        clsact::add(LOOPBACK, clsact::Hook::Egress, classifier, "probe")
    };
    let attempted = std::thread::scope(|scope| scope.spawn(attempt).join().expect("nothing in it panics"));
    match attempted {
        // A qdisc or a filter of a kind that the kernel does not know.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => {
            let feature = "clsact (CONFIG_NET_SCH_INGRESS) or filters that run programs (CONFIG_NET_CLS_BPF)";
            Err(Unsupported { feature, since: "4.5" })
        }
        // What else there is shows at the devices.
        _ => Ok(()),
    }
}

fn join(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Capacities that an operator may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Service ports.
    pub services: u32,
    /// Backends: endpoints of service ports.
    pub backends: u32,
    /// Connections by packets; each takes two or three entries.
    pub flows: u32,
}

impl Sizes {
    /// A service port may have a ClusterIP, a NodePort for each family and a few external addresses.
    const FRONTENDS_PER_SERVICE: u32 = 4;
    /// A backend can be in the cluster set and in the local set of its service, and ranges are rounded up when they grow.
    const SLOTS_PER_BACKEND: u32 = 4;
    /// Flow entries of a connection whose source is rewritten.
    const ENTRIES_PER_FLOW: u32 = 3;

    /// Capacities by map name; the other maps keep what the object says.
    pub fn by_map(&self) -> Vec<(&'static str, u32)> {
        vec![
            ("services", self.services),
            ("service_names", self.services),
            ("service_counters", self.services),
            ("frontends", self.services.saturating_mul(Self::FRONTENDS_PER_SERVICE)),
            ("backends", self.backends),
            ("slots", self.backends.saturating_mul(Self::SLOTS_PER_BACKEND)),
            ("addresses", self.backends.saturating_add(self.services.saturating_mul(2))),
            ("flows", self.flows.saturating_mul(Self::ENTRIES_PER_FLOW)),
        ]
    }
}

/// Open maps by name.
#[derive(Debug)]
pub struct MapFds(BTreeMap<String, OwnedFd>);

impl MapFds {
    /// The map of that name.
    pub fn get(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        let missing = || Error::Missing { kind: "map", name: name.to_owned() };
        self.0.get(name).map(AsFd::as_fd).ok_or_else(missing)
    }

    /// A copy of the map's descriptor.
    pub fn duplicate(&self, name: &str) -> Result<OwnedFd, Error> {
        sys::duplicate(self.get(name)?).map_err(on_map("duplicate", name))
    }

    /// Opens the layout that counts, for a reader without the object. Nothing, if there is none.
    pub fn open_pinned(pins: &Pins) -> Result<Self, Error> {
        loop {
            let Some(layout) = pins.current()? else { return Ok(Self(BTreeMap::new())) };
            match Self::open_in(&pins.maps(layout)) {
                // It was left just now, for another.
                Err(Error::Map { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && pins.current()? != Some(layout) => {}
                result => return result,
            }
        }
    }

    /// Opens all maps of a directory.
    fn open_in(directory: &Path) -> Result<Self, Error> {
        let mut maps = BTreeMap::new();
        for path in pins::list(directory)? {
            let Some(name) = pins::file_name(&path) else { continue };
            maps.insert(name.to_owned(), sys::open_pin(&path).map_err(on_map("open", name))?);
        }
        Ok(Self(maps))
    }

    /// What they are.
    fn describe(&self) -> Result<layout::Maps, Error> {
        let describe = |(name, fd): (&str, BorrowedFd<'_>)| {
            Ok((name.to_owned(), sys::map_info(fd).map_err(on_map("examine", name))?))
        };
        self.iter().map(describe).collect()
    }

    /// Names and descriptors of all.
    pub fn iter(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.0.iter().map(|(name, fd)| (name.as_str(), fd.as_fd()))
    }
}

/// Loaded programs by name.
#[derive(Debug)]
pub struct Programs(BTreeMap<String, OwnedFd>);

impl Programs {
    /// The program of that name.
    pub fn get(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        let missing = || Error::Missing { kind: "program", name: name.to_owned() };
        self.0.get(name).map(AsFd::as_fd).ok_or_else(missing)
    }
}

/// What [`load`] leaves behind; the parsed object itself is dropped.
#[derive(Debug)]
pub struct Loaded {
    /// All pinned maps.
    pub maps: MapFds,
    /// All programs.
    pub programs: Programs,
    /// Where the programs find those that they go on in. To be kept when all links run these programs.
    pub continuations: Continuations,
    /// Kernel functions that the kernel lacks; the programs do without.
    pub missing_kfuncs: Vec<Kfunc>,
    /// True if the entries of an earlier agent are there.
    pub adopted: bool,
    /// What is left to do when these programs take the place of those of another layout.
    pub handover: Option<Handover>,
}

pub(super) fn on_map(action: &'static str, name: &str) -> impl FnOnce(io::Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Map { action, name, source }
}

/// Maps that outlive the programs: what `proxy_common::abi` lays out, and the marks of kept source ports. All other maps
/// belong to one load of the programs, which keep them alive: scratch space of one version is never read by another.
pub(super) const SHARED: [&str; 21] = [
    "addresses",
    "affinity",
    "backends",
    "config",
    "devices",
    "drop_counters",
    "events",
    "flows",
    "flows_pending",
    "fragments",
    "frontends",
    "kept_ports",
    "ports",
    "service_counters",
    "service_names",
    "services",
    "slots",
    "sockets",
    "sockets_udp",
    "source_ranges",
    "watch",
];

/// Map of the programs in which others go on.
const CONTINUATIONS: &str = "programs";

/// The map of the programs in which others go on. The kernel empties it when userspace lets go of it, so it is pinned, but
/// each load has its own: programs of two versions must not go on in each other.
#[derive(Debug)]
pub struct Continuations(Option<(OwnedFd, u32)>);

impl Continuations {
    /// Fills the map of `ebpf`, if the object has one.
    fn fill(ebpf: &aya::Ebpf, programs: &Programs) -> Result<Self, Error> {
        let Some(Map::ProgramArray(map)) = ebpf.map(CONTINUATIONS) else { return Ok(Self(None)) };
        let fd = sys::duplicate(map.fd().as_fd()).map_err(on_map("duplicate", CONTINUATIONS))?;
        for continuation in Continuation::ALL {
            let program = programs.get(continuation.name())?.as_raw_fd() as u32;
            sys::map_update(fd.as_fd(), &(continuation as u32), &program).map_err(on_map("fill", CONTINUATIONS))?;
        }
        let id = sys::map_info(fd.as_fd()).map_err(on_map("examine", CONTINUATIONS))?.id;
        Ok(Self(Some((fd, id))))
    }

    /// Pins the map beside those of other loads. To be called before a link runs the programs.
    pub fn pin(&self, pins: &Pins) -> Result<(), Error> {
        let Some((fd, id)) = &self.0 else { return Ok(()) };
        sys::pin(fd.as_fd(), &Self::path(pins, *id)).map_err(on_map("pin", CONTINUATIONS))
    }

    /// Pins it again if the pin is gone. True if it was.
    pub fn repair(&self, pins: &Pins) -> Result<bool, Error> {
        let is_gone = self.0.as_ref().is_some_and(|(_, id)| !Self::path(pins, *id).exists());
        if is_gone {
            self.pin(pins)?;
        }
        Ok(is_gone)
    }

    /// Removes the pins of other loads. To be called when every link runs the programs of this one.
    pub fn prune_others(&self, pins: &Pins) -> Result<(), pins::Error> {
        let own = self.0.as_ref().map(|(_, id)| Self::path(pins, *id));
        let others = pins::list(&pins.continuations())?.into_iter().filter(|path| Some(path) != own.as_ref());
        others.into_iter().try_for_each(|path| pins::unpin(&path))
    }

    fn path(pins: &Pins, id: u32) -> PathBuf {
        pins.continuations().join(id.to_string())
    }
}

/// Loads `object`: adopts or makes its maps below `pins`, loads its programs.
///
/// Errors: see [`Error`]; all of them leave everything as it was.
pub fn load(object: &[u8], pins: &Pins, sizes: &Sizes) -> Result<Loaded, Error> {
    let loader = Loader::new(object, sizes)?;
    pins.clear_remains()?;
    let mut layouts = pins.readable_layouts()?;
    let Some(current) = layouts.pop() else { return loader.begin(pins) };
    let maps = MapFds::open_in(&pins.maps(current))?;
    for older in layouts {
        finish_interrupted(pins, older, &maps)?;
    }
    let pinned = maps.describe()?;
    if current.version == pins.version() && layout::fits(&pinned, &loader.declared) {
        return loader.load(&pins.maps(current), true);
    }
    loader.take_over(pins, current, &maps, &pinned, sizes)
}

/// An agent died before all links ran the programs of the layout that counts: what the others did is added to it. (Which
/// links run which programs is known when they are replaced; until then the older layout stays.)
fn finish_interrupted(pins: &Pins, older: Layout, current: &MapFds) -> Result<(), Error> {
    let older_maps = MapFds::open_in(&pins.maps(older))?;
    let (old, new) = (older_maps.describe()?, current.describe()?);
    // What has the same id is one map. What only the agent writes is newer where it counts, what was counted is not known.
    let differs = |name: &&str| match (old.get(*name), new.get(*name)) {
        (Some(old), Some(new)) => old.id != new.id,
        _ => false,
    };
    let names: Vec<_> = carry::ORDER.into_iter().filter(|name| !name.ends_with("_counters")).filter(differs).collect();
    let carried = carry::Carry::open(&older_maps, older.version, current, &names).and_then(|mut carry| carry.merge());
    carried.map_err(|error| Error::Carry(Box::new(error)))
}

/// The object, read and fitted to this kernel.
struct Loader {
    object: Vec<u8>,
    sizes: Sizes,
    declared: layout::Maps,
    kernel: btf::Answers,
    missing_kfuncs: Vec<Kfunc>,
}

impl Loader {
    fn new(object: &[u8], sizes: &Sizes) -> Result<Self, Error> {
        let declared = declared_maps(object, sizes)?;
        let kernel = btf::Answers::of_kernel(&KFUNCS.map(|kfunc| kfunc.name), &[CONNTRACK_STATUS])?;
        let mut object = object.to_vec();
        let missing_kfuncs = kfunc::resolve(&mut object, |name| kernel.function(name))?;
        Ok(Self { object, sizes: *sizes, declared, kernel, missing_kfuncs })
    }

    /// Maps in `directory`, where some or all may be pinned already, and programs.
    fn load(self, directory: &Path, adopted: bool) -> Result<Loaded, Error> {
        let status = self.conntrack_status();
        let mut loader = loader(&status);
        for (name, capacity) in self.sizes.by_map() {
            loader.map_max_entries(name, capacity);
        }
        for name in self.declared.keys() {
            loader.map_pin_path(name, directory.join(name));
        }
        let mut ebpf = loader.load(&self.object).map_err(|error| Error::Load(Box::new(error)))?;
        let programs = load_programs(&mut ebpf, |_| true)?;
        let continuations = Continuations::fill(&ebpf, &programs)?;
        let maps = open_maps(directory, &self.declared)?;
        Ok(Loaded { maps, programs, continuations, missing_kfuncs: self.missing_kfuncs, adopted, handover: None })
    }

    /// Where a connection of the kernel's conntrack says how it is translated. Zero: not known, the programs then take every
    /// connection for untranslated.
    fn conntrack_status(&self) -> u32 {
        self.kernel.offset(CONNTRACK_STATUS).unwrap_or(0)
    }

    /// There is nothing to take over. What there may be is of a version that cannot be read; it counts for those who read it
    /// until links run these programs.
    fn begin(self, pins: &Pins) -> Result<Loaded, Error> {
        let foreign = pins.layouts()?;
        let directory = pins.begin_preparation()?;
        let mut handover = Handover::prepare(pins);
        let loaded = self.load(&directory, false)?;
        if foreign.is_empty() {
            handover.commit()?;
            return Ok(loaded);
        }
        let names: Vec<_> = foreign.iter().map(ToString::to_string).collect();
        warn!(layouts = names.join(", "), "tables of a version that cannot be read: flows are not taken over");
        Ok(Loaded { handover: Some(handover), ..loaded })
    }

    /// Another layout takes over from the current one.
    fn take_over(
        self,
        pins: &Pins,
        current: Layout,
        maps: &MapFds,
        pinned: &layout::Maps,
        sizes: &Sizes,
    ) -> Result<Loaded, Error> {
        let steps = match current.version == pins.version() {
            true => layout::steps(pinned, &self.declared).map_err(Error::Layout)?,
            false => layout::steps_from_other_version(pinned, &self.declared),
        };
        let of_kind = |kind| steps.iter().filter(move |(_, step)| **step == kind).map(|(name, _)| name.as_str());
        let copied: Vec<_> = of_kind(Step::Copy).collect();
        let carried = |error| Error::Carry(Box::new(error));
        let usage = carry::usage(maps, current.version, copied.contains(&"flows")).map_err(carried)?;
        let excesses = layout::check(&usage, sizes);
        if !excesses.is_empty() {
            return Err(Error::TooSmall(excesses));
        }
        let directory = pins.begin_preparation()?;
        let handover = Handover::prepare(pins);
        for name in of_kind(Step::Share) {
            sys::pin(maps.get(name)?, &directory.join(name)).map_err(on_map("pin", name))?;
        }
        let mut loaded = self.load(&directory, true)?;
        loaded.handover = Some(handover.begin(maps, current, &loaded.maps, &copied).map_err(carried)?);
        Ok(loaded)
    }
}

/// The shared maps as the object declares them, with their capacities, by name.
fn declared_maps(object: &[u8], sizes: &Sizes) -> Result<layout::Maps, Error> {
    let parsed = aya_obj::Object::parse(object).map_err(Error::Object)?;
    let sizes: BTreeMap<_, _> = sizes.by_map().into_iter().collect();
    let declare = |(name, map): (String, aya_obj::Map)| {
        let info = MapInfo {
            id: 0,
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: sizes.get(name.as_str()).copied().unwrap_or(map.max_entries()),
            flags: map.map_flags(),
        };
        (name, info)
    };
    let is_shared = |(name, _): &(String, aya_obj::Map)| SHARED.contains(&name.as_str());
    Ok(parsed.maps.into_iter().filter(is_shared).map(declare).collect())
}

/// The field of a connection of the kernel's conntrack that says how it is translated.
const CONNTRACK_STATUS: Field = Field { structure: "nf_conn", field: "status" };

/// A loader that knows where [`Loader::conntrack_status`] is.
fn loader(conntrack_status: &u32) -> EbpfLoader<'_> {
    let mut loader = EbpfLoader::new();
    // No program reads kernel structures by BTF: nothing to relocate.
    loader.btf(None);
    loader.override_global("NF_CONN_STATUS", conntrack_status, false);
    loader
}

/// Shared maps that a dry run looks things up in; all others are its own, counters among them.
const LOOKED_UP: [&str; 14] = [
    "addresses",
    "affinity",
    "backends",
    "config",
    "devices",
    "flows",
    "flows_pending",
    "frontends",
    "kept_ports",
    "ports",
    "service_names",
    "services",
    "slots",
    "source_ranges",
];

/// What [`load_dry_run`] leaves behind.
pub(super) struct DryRun {
    /// The programs, to be run.
    pub ebpf: aya::Ebpf,
    /// The tables that count, and the dry run's own.
    pub maps: MapFds,
    /// To be kept while the programs are run.
    pub _continuations: Continuations,
}

/// Loads those programs of `object` that have one of `names`, and those they go on in, for a dry run over the tables that
/// count: see `dry_run` in the eBPF crate.
pub(super) fn load_dry_run(object: &[u8], pins: &Pins, names: &[&str]) -> Result<DryRun, Error> {
    let unreadable = |_| Error::Missing { kind: "layout below", name: pins.base().display().to_string() };
    let current = pins.current()?.ok_or(()).map_err(unreadable)?;
    let pinned = MapFds::open_in(&pins.maps(current))?;
    let described = pinned.describe()?;
    // What is not there would be made, and pinned.
    LOOKED_UP.into_iter().try_for_each(|name| pinned.get(name).map(drop))?;
    let capacity = |name: &str| described.get(name).map_or(1, |info| info.max_entries);
    let sizes = Sizes { services: capacity("services"), backends: capacity("backends"), flows: 1 };
    let object = Loader::new(object, &sizes)?;
    layout::steps(&described, &object.declared).map_err(Error::Layout)?;

    let status = object.conntrack_status();
    let mut loader = loader(&status);
    loader.override_global("DRY_RUN", &1_u32, true);
    // Nothing is counted there.
    loader.map_max_entries("service_counters", 1);
    for name in LOOKED_UP {
        loader.map_pin_path(name, pins.maps(current).join(name));
    }
    let mut ebpf = loader.load(&object.object).map_err(|error| Error::Load(Box::new(error)))?;
    let continues = |name: &str| Continuation::ALL.iter().any(|continuation| continuation.name() == name);
    let programs = load_programs(&mut ebpf, |name| names.contains(&name) || continues(name))?;
    let continuations = Continuations::fill(&ebpf, &programs)?;
    let mut maps = pinned;
    for name in ["dry_flows", "dry_flows_pending", "drop_counters"] {
        let missing = || Error::Missing { kind: "map", name: name.to_owned() };
        let map = ebpf.map(name).and_then(map_fd).ok_or_else(missing)?;
        maps.0.insert(name.to_owned(), sys::duplicate(map).map_err(on_map("duplicate", name))?);
    }
    Ok(DryRun { ebpf, maps, _continuations: continuations })
}

/// The descriptor of a map of one of the kinds that a dry run has for itself.
fn map_fd(map: &Map) -> Option<BorrowedFd<'_>> {
    match map {
        Map::HashMap(map) | Map::PerCpuArray(map) => Some(map.fd().as_fd()),
        _ => None,
    }
}

fn load_programs(ebpf: &mut aya::Ebpf, wants: impl Fn(&str) -> bool) -> Result<Programs, Error> {
    let mut programs = BTreeMap::new();
    for (name, program) in ebpf.programs_mut().filter(|(name, _)| wants(name)) {
        let refused = |source| Error::Program { name: name.to_owned(), source: Box::new(source) };
        programs.insert(name.to_owned(), load_program(program).map_err(refused)?);
    }
    Ok(Programs(programs))
}

fn load_program(program: &mut Program) -> Result<OwnedFd, ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load()?,
        Program::SchedClassifier(program) => program.load()?,
        Program::Xdp(program) => program.load()?,
        _ => return Err(ProgramError::UnexpectedProgramType),
    }
    sys::duplicate(program.fd()?).map_err(ProgramError::IOError)
}

/// Opens the declared maps by their pins, so that no aya wrapper has to be unpacked.
fn open_maps(directory: &Path, declared: &layout::Maps) -> Result<MapFds, Error> {
    let open = |name: &String| {
        let fd = sys::open_pin(&directory.join(name)).map_err(on_map("open", name))?;
        Ok((name.clone(), fd))
    };
    declared.keys().map(open).collect::<Result<_, _>>().map(MapFds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_saturate_rather_than_wrap() {
        let sizes = Sizes { services: u32::MAX, backends: u32::MAX, flows: u32::MAX };
        assert!(sizes.by_map().iter().all(|&(_, capacity)| capacity == u32::MAX));
    }
}
