//! Where the datapath is pinned: the directory, its lock, the names in it.
//!
//! ```text
//! DIR/                    --bpffs; locked by the one agent that owns it
//!   v2/MAP                every map of a layout, by name; `v2`: the version of the records
//!   v2-2/MAP              the same of its second generation: other sizes, or another version before it
//!   next/MAP              a layout that is being prepared; no link runs a program that uses it
//!   gone/MAP              a layout that is being removed; likewise
//!   links/cgroup/PROGRAM
//!   links/tcx/COOKIE-IFINDEX-HOOK    COOKIE: network namespace
//!   links/clsact/COOKIE-IFINDEX-HOOK the program of a filter, which has no link
//!   links/xdp/COOKIE-IFINDEX
//!   continuations/ID      programs in which others go on, by map id: one map for each load of the programs
//!   notes/NOTE            what cleanup has to undo besides
//! ```
//! Links lie outside the layout's directory: they stay when a new layout takes over, only the programs behind them change.
//! Of several generations the highest counts, whoever looks: it gets its name by one rename, when it is complete and right
//! before the first link runs its programs. Lower ones are there as long as programs that use them may run.
//! Programs that have a link are not pinned themselves: it holds its program, and what the command line wants of one it reaches through the link.
//! May touch: the BPF file system below DIR, nothing else.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proxy_common::abi::ABI_VERSION;

use super::{convert, sys};

/// Why the pin directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A second agent on one directory.
    #[error("another agent owns {0}; stop it, or give this one another --bpffs")]
    Locked(PathBuf),
    /// An operation of the file system failed.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Attaches what was tried to an I/O error.
pub(super) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// A set of tables: which version of the records, and its place among those that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Layout {
    /// From 1; the highest counts.
    pub generation: u32,
    /// `ABI_VERSION` of who made it.
    pub version: u32,
}

impl Layout {
    /// From the name of its directory. (A BPF file system takes no dots in names.)
    fn parse(name: &str) -> Option<Self> {
        let numbers = name.strip_prefix('v')?;
        let (version, generation) = numbers.split_once('-').unwrap_or((numbers, "1"));
        Some(Self { generation: generation.parse().ok()?, version: version.parse().ok()? })
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.generation {
            1 => write!(f, "v{}", self.version),
            generation => write!(f, "v{}-{generation}", self.version),
        }
    }
}

/// The pin directory. Cheap to copy; says nothing about what exists.
#[derive(Clone, Debug)]
pub struct Pins {
    base: PathBuf,
    version: u32,
    /// All versions have the records of this one.
    is_artificial: bool,
}

/// The only right to change what is pinned. Released when dropped, also by a crash.
#[derive(Debug)]
pub struct Lock {
    _directory: File,
}

/// Directory of the layout in the making.
const PREPARATION: &str = "next";

/// Directory of the layout that is being removed.
const REMOVED: &str = "gone";

/// Directory of the notes.
const NOTES: &str = "notes";

/// Noted when everything that the sources listed was programmed: the tables are worth sending clients to, whatever becomes
/// of the sources.
pub const LOADED_NOTE: &str = "loaded";

/// Noted when we mounted the file system ourselves, so that `shunt cleanup` unmounts that one and no other.
const MOUNT_NOTE: &str = "mounted-by-shunt";

impl Pins {
    /// Names below `base`.
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self { base: base.into(), version: ABI_VERSION, is_artificial: false }
    }

    /// The same for a version that differs in its number only: so a change of the version can be tested by one program. All
    /// versions are read then, and nothing is shared that would not be shared with a version whose records are others.
    #[must_use]
    pub fn with_version(self, version: Option<u32>) -> Self {
        Self { version: version.unwrap_or(self.version), is_artificial: version.is_some(), ..self }
    }

    /// Version of the layouts made here.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// `--bpffs`.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Directory of the maps of a layout.
    pub fn maps(&self, layout: Layout) -> PathBuf {
        self.base.join(layout.to_string())
    }

    /// Directory of the links to the control group.
    pub fn cgroup_links(&self) -> PathBuf {
        self.base.join("links/cgroup")
    }

    /// Directory of the maps of programs in which others go on, one for each load of the programs.
    pub fn continuations(&self) -> PathBuf {
        self.base.join("continuations")
    }

    /// Directory of the links to devices.
    pub fn tcx_links(&self) -> PathBuf {
        self.base.join("links/tcx")
    }

    /// Directory of the programs in filters of devices.
    pub fn filters(&self) -> PathBuf {
        self.base.join("links/clsact")
    }

    /// Directory of the links to devices that run the XDP program.
    pub fn xdp_links(&self) -> PathBuf {
        self.base.join("links/xdp")
    }

    /// Makes the directories, on a BPF file system, mounting one if there is none.
    pub fn prepare(&self) -> Result<(), Error> {
        self.mount()?;
        let links = [self.cgroup_links(), self.tcx_links(), self.filters(), self.xdp_links()];
        links.iter().chain([&self.continuations()]).try_for_each(|directory| create_directory(directory))
    }

    /// Makes a directory below, if it is not there.
    pub fn ensure(&self, directory: &Path) -> Result<(), Error> {
        create_directory(directory)
    }

    /// Takes the right to change what is pinned here, or says who has it. The directory must exist.
    ///
    /// Tries for a moment: somebody may just be asking [`Self::is_locked`].
    pub fn lock(&self) -> Result<Lock, Error> {
        const TRIES: u32 = 5;
        const PAUSE: Duration = Duration::from_millis(50);
        let directory = File::open(&self.base).map_err(at("open", &self.base))?;
        for attempt in 1..=TRIES {
            match directory.try_lock() {
                Ok(()) => return Ok(Lock { _directory: directory }),
                Err(TryLockError::WouldBlock) if attempt < TRIES => std::thread::sleep(PAUSE),
                Err(TryLockError::WouldBlock) => break,
                Err(TryLockError::Error(source)) => return Err(at("lock", &self.base)(source)),
            }
        }
        Err(Error::Locked(self.base.clone()))
    }

    /// True if an agent has that right.
    pub fn is_locked(&self) -> Result<bool, Error> {
        let directory = File::open(&self.base).map_err(at("open", &self.base))?;
        match directory.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(source)) => Err(at("examine the lock of", &self.base)(source)),
        }
    }

    /// The right to read the events of the programs; nothing if somebody else has it. Released when dropped.
    pub fn lock_events(&self) -> Result<Option<File>, Error> {
        let directory = self.base.join("links");
        let file = File::open(&directory).map_err(at("open", &directory))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(at("lock", &directory)(source)),
        }
    }

    /// Makes DIR, on a BPF file system, mounting one if there is none; says where it was mounted, if it was.
    pub fn mount(&self) -> Result<Option<PathBuf>, Error> {
        if is_bpffs(&self.base)? {
            create_directory(&self.base)?;
            return Ok(None);
        }
        let mount_point = self.mount_point()?;
        create_directory(&mount_point)?;
        sys::mount_bpffs(&mount_point).map_err(at("mount a bpf file system on", &mount_point))?;
        create_directory(&self.base)?;
        if mount_point == self.base {
            self.mark(MOUNT_NOTE)?;
        }
        Ok(Some(mount_point))
    }

    /// The usual place if DIR is below it (nothing else can be made inside sysfs), else DIR itself.
    fn mount_point(&self) -> Result<PathBuf, Error> {
        let usual = Path::new("/sys/fs/bpf");
        let use_usual = self.base.starts_with(usual) && usual.is_dir() && !is_bpffs(usual)?;
        Ok(if use_usual { usual.to_owned() } else { self.base.clone() })
    }

    /// Removes the directories that this type made, and the mount if it was ours. Fails while anything else is there.
    pub fn remove_directories(&self) -> Result<(), Error> {
        for directory in ["links/cgroup", "links/tcx", "links/clsact", "links/xdp", "links", "continuations"] {
            remove_directory(&self.base.join(directory))?;
        }
        // Files are the kernel's own (`maps.debug`, `progs.debug` in the root of the file system); all that we make here are
        // directories.
        let is_left = |path: &PathBuf| path.is_dir() && file_name(path) != Some(NOTES);
        if list(&self.base)?.iter().any(is_left) {
            return Err(at("clear", &self.base)(io::Error::from(io::ErrorKind::DirectoryNotEmpty)));
        }
        let is_our_mount = self.marks()?.iter().any(|note| note == MOUNT_NOTE) && is_mount_point(&self.base);
        self.unmark(MOUNT_NOTE)?;
        self.unmark(LOADED_NOTE)?;
        remove_directory(&self.base.join(NOTES))?;
        if is_our_mount {
            return sys::unmount(&self.base).map_err(at("unmount", &self.base));
        }
        if is_mount_point(&self.base) { Ok(()) } else { remove_directory(&self.base) }
    }

    /// All layouts, the one that counts last.
    pub fn layouts(&self) -> Result<Vec<Layout>, Error> {
        let mut layouts: Vec<_> =
            list(&self.base)?.iter().filter_map(|path| file_name(path)).filter_map(Layout::parse).collect();
        layouts.sort();
        Ok(layouts)
    }

    /// Layouts whose records this program reads, the one that counts last.
    pub fn readable_layouts(&self) -> Result<Vec<Layout>, Error> {
        let mut layouts = self.layouts()?;
        layouts.retain(|layout| self.reads(layout.version));
        Ok(layouts)
    }

    /// The layout that counts for this program.
    pub fn current(&self) -> Result<Option<Layout>, Error> {
        Ok(self.readable_layouts()?.pop())
    }

    fn reads(&self, version: u32) -> bool {
        self.is_artificial || version == self.version || convert::is_known(version)
    }

    /// Where a layout is prepared.
    pub fn preparation(&self) -> PathBuf {
        self.base.join(PREPARATION)
    }

    /// Makes an empty place for a layout in the making; what another agent had no time to finish goes.
    pub fn begin_preparation(&self) -> Result<PathBuf, Error> {
        self.clear_remains()?;
        let directory = self.preparation();
        create_directory(&directory)?;
        Ok(directory)
    }

    /// Makes what was prepared the layout that counts, and says which it is.
    pub fn commit(&self) -> Result<Layout, Error> {
        let generation = self.layouts()?.last().map_or(1, |last| last.generation.saturating_add(1));
        let layout = Layout { generation, version: self.version };
        let directory = self.preparation();
        fs::rename(&directory, self.maps(layout)).map_err(at("rename", &directory))?;
        Ok(layout)
    }

    /// Removes what never counted or does not count any more.
    pub fn clear_remains(&self) -> Result<(), Error> {
        [PREPARATION, REMOVED].iter().try_for_each(|name| remove_layout(&self.base.join(name)))
    }

    /// Removes a layout: at once for those who look for it, then map by map.
    pub fn remove(&self, layout: Layout) -> Result<(), Error> {
        let (directory, removed) = (self.maps(layout), self.base.join(REMOVED));
        remove_layout(&removed)?;
        fs::rename(&directory, &removed).map_err(at("rename", &directory))?;
        remove_layout(&removed)
    }

    /// Removes all layouts but one. To be called when no link runs a program that uses them.
    pub fn remove_other_layouts(&self, own: Layout) -> Result<(), Error> {
        self.layouts()?.into_iter().filter(|layout| *layout != own).try_for_each(|layout| self.remove(layout))
    }

    /// Leaves a note for a later agent or for `shunt cleanup`: an empty directory, the only thing besides pins that a BPF
    /// file system can hold.
    pub fn mark(&self, note: &str) -> Result<(), Error> {
        create_directory(&self.base.join(NOTES).join(note))
    }

    /// All notes.
    pub fn marks(&self) -> Result<Vec<String>, Error> {
        Ok(list(&self.base.join(NOTES))?.iter().filter_map(|path| file_name(path)).map(str::to_owned).collect())
    }

    /// Removes a note.
    pub fn unmark(&self, note: &str) -> Result<(), Error> {
        remove_directory(&self.base.join(NOTES).join(note))
    }
}

/// What is in a directory; nothing if it does not exist.
pub fn list(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(at("list", directory)(source)),
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(at("list", directory))).collect()
}

/// Namespace cookie and interface index in the name of a pin that stands for a device.
pub fn device_of(pin: &Path) -> Option<(u64, u32)> {
    let mut parts = file_name(pin)?.split('-');
    let netns = u64::from_str_radix(parts.next()?, 16).ok()?;
    Some((netns, parts.next()?.parse().ok()?))
}

/// Pins an object in the place of what may be pinned there, in one step. (A rest of an earlier attempt beside it is no pin
/// of anything.)
pub fn replace(object: BorrowedFd<'_>, path: &Path) -> Result<(), Error> {
    let mut next = path.as_os_str().to_owned();
    next.push("-next");
    let next = PathBuf::from(next);
    unpin(&next)?;
    sys::pin(object, &next).map_err(at("pin", &next))?;
    fs::rename(&next, path).map_err(at("rename", &next))
}

/// Removes a pin; it may be gone already.
pub fn unpin(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(source)),
        _ => Ok(()),
    }
}

/// Removes a directory of pins and what is in it.
pub fn remove_layout(directory: &Path) -> Result<(), Error> {
    for path in list(directory)? {
        unpin(&path)?;
    }
    remove_directory(directory)
}

/// Last component of a path, if it is text.
pub fn file_name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn create_directory(path: &Path) -> Result<(), Error> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at("create", path))
}

fn remove_directory(path: &Path) -> Result<(), Error> {
    match fs::remove_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(source)),
        _ => Ok(()),
    }
}

/// True if `path`, or the nearest ancestor that exists, is on a BPF file system.
fn is_bpffs(path: &Path) -> Result<bool, Error> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    sys::is_bpffs(existing).map_err(at("examine", existing))
}

fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|data| data.dev()).ok();
    device(path) != path.parent().and_then(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_layouts_are_read_as_they_are_written() {
        for (name, version, generation) in [("v1", 1, 1), ("v1-2", 1, 2), ("v4000000000", 4_000_000_000, 1)] {
            let layout = Layout { version, generation };
            assert_eq!((Layout::parse(name), layout.to_string().as_str()), (Some(layout), name));
        }
        for foreign in ["next", "gone", "links", "v", "vx", "v1-", "v1-x", "v1-2-3"] {
            assert_eq!(Layout::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn pin_names_tell_namespace_and_device() {
        assert_eq!(device_of(Path::new("/x/links/tcx/1f-12-ingress")), Some((0x1f, 12)));
        assert_eq!(device_of(Path::new("/x/links/xdp/1f-12")), Some((0x1f, 12)));
        assert_eq!(device_of(Path::new("/x/links/tcx/eth0")), None);
    }

    #[test]
    fn the_highest_generation_that_can_be_read_counts() {
        let dir = std::env::temp_dir().join(format!("shunt-pins-{}", std::process::id()));
        let own = |generation: &str| format!("v{ABI_VERSION}{generation}");
        for name in [&*own(""), &*own("-2"), "v4000000000-3", "next", "gone", "links"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        let pins = Pins::new(&dir);
        assert_eq!(pins.current().unwrap(), Some(Layout { version: ABI_VERSION, generation: 2 }));
        let other = pins.clone().with_version(Some(9));
        assert_eq!(other.current().unwrap(), Some(Layout { version: 4_000_000_000, generation: 3 }));
        assert_eq!(other.commit().unwrap(), Layout { version: 9, generation: 4 });
        fs::remove_dir_all(&dir).unwrap();
    }
}
