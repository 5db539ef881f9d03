//! The folder on disk: which files to read, and when.
//!
//! May touch: the folder, for reading; the clock, to see whether a file is still being written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind, RenameMode};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tracing::{info, warn};

use super::folder::Folder;
use super::parse::Format;
use crate::model::{Event, ObjectProblem, SourceId, Update};

/// A file that was written so recently may be written on.
const QUIET: Duration = Duration::from_secs(1);
/// A file that is gone may be about to be replaced (editors do so).
const REPLACEMENT: Duration = Duration::from_millis(100);
/// How often everything is looked at without being told: for what links point to, network file systems, lost messages.
const BACKSTOP: Duration = Duration::from_secs(5);

/// Why the folder cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be listed.
    #[error("cannot list the folder of manifests {}", .dir.display())]
    List {
        /// The folder.
        dir: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It cannot be watched.
    #[error("cannot watch the folder of manifests {}", .dir.display())]
    Watch {
        /// The folder.
        dir: PathBuf,
        /// The cause.
        source: notify::Error,
    },
}

/// The source.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    updates: mpsc::Sender<Update>,
}

impl Manifests {
    /// A source that tells `updates` what the manifests in `dir` say.
    pub fn new(dir: PathBuf, updates: mpsc::Sender<Update>) -> Self {
        Self { dir, updates }
    }

    /// Lists the folder and follows it until nobody listens any more.
    ///
    /// Fails if the folder cannot be read at the beginning. If it disappears later, what was read stays.
    pub async fn run(self) -> Result<(), Error> {
        let told = Arc::new(Told::default());
        let mut watch = Watch::open(&self.dir, told.clone())?;
        let disk = Disk::new(self.dir.clone());
        let names = disk.names().map_err(|source| Error::List { dir: self.dir.clone(), source })?;
        let (mut disk, events) = on_disk(disk, |disk| disk.list(names)).await;
        info!(folder = %self.dir.display(), files = disk.stamps.len(), "manifests listed");
        let mut is_heard = self.send(events).await;
        let mut schedule = Schedule::default();
        let mut backstop = interval(BACKSTOP);
        backstop.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while is_heard {
            let due = schedule.next();
            tokio::select! {
                () = told.news_came.notified() => schedule.take(told.take(), Instant::now()),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                _ = backstop.tick() => schedule.look_at_all(Look::WhenQuiet),
                () = self.updates.closed() => break,
            }
            if watch.follow() {
                schedule.look_at_all(Look::AtOnce);
            }
            let work = schedule.due(Instant::now());
            let (read, (events, unsettled)) = on_disk(disk, |disk| disk.look(work)).await;
            disk = read;
            schedule.look_again(unsettled, Instant::now());
            is_heard = self.send(events).await;
        }
        Ok(())
    }

    /// False if nobody listens any more.
    async fn send(&self, events: Vec<Event>) -> bool {
        for event in events {
            if self.updates.send(Update { source: SourceId::Manifests, event }).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// Runs file work where it may block.
async fn on_disk<T: Send + 'static>(mut disk: Disk, work: impl FnOnce(&mut Disk) -> T + Send + 'static) -> (Disk, T) {
    let done = tokio::task::spawn_blocking(move || {
        let result = work(&mut disk);
        (disk, result)
    });
    done.await.expect("reading manifests does not panic, and nobody aborts it")
}

/// When a file counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Look {
    /// It may still be written: when it has been left alone.
    WhenQuiet,
    /// It is whole.
    AtOnce,
}

/// What happened to a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum News {
    /// It was closed by a writer, or put there as a whole.
    Whole,
    /// It is being written.
    Written,
    /// It is not there any more.
    Gone,
}

/// What the operating system told, until somebody takes it.
#[derive(Default, Debug)]
struct Told {
    news: Mutex<AllNews>,
    news_came: Notify,
}

/// The newest of each file, and whether anything may be different.
#[derive(Default, Debug, PartialEq, Eq)]
struct AllNews {
    files: BTreeMap<String, News>,
    of_everything: bool,
}

impl Told {
    fn take(&self) -> AllNews {
        std::mem::take(&mut *self.news.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, dir: &Path, event: notify::Result<notify::Event>) {
        self.news.lock().unwrap_or_else(PoisonError::into_inner).add(dir, event);
        self.news_came.notify_one();
    }
}

impl AllNews {
    fn add(&mut self, dir: &Path, event: notify::Result<notify::Event>) {
        let event = match event {
            Ok(event) if !event.need_rescan() => event,
            _ => {
                self.of_everything = true;
                return;
            }
        };
        for (position, path) in event.paths.iter().enumerate() {
            if let Some(news) = news_of(&event.kind, position) {
                self.add_path(dir, path, news);
            }
        }
    }

    fn add_path(&mut self, dir: &Path, path: &Path, news: News) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // The folder itself, or a link beside the files through which a whole set is swapped (`..data` of a ConfigMap).
        if path == dir || name.starts_with("..") {
            self.of_everything = true;
        } else if path.parent() == Some(dir) && Format::of_file(name).is_some() {
            self.files.insert(name.to_owned(), news);
        }
    }
}

/// What an event says of its path at a position.
fn news_of(kind: &EventKind, position: usize) -> Option<News> {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(News::Whole),
        EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_)) => Some(News::Written),
        EventKind::Modify(ModifyKind::Name(RenameMode::To)) => Some(News::Whole),
        EventKind::Modify(ModifyKind::Name(RenameMode::From)) | EventKind::Remove(_) => Some(News::Gone),
        EventKind::Modify(ModifyKind::Name(RenameMode::Both)) => Some([News::Gone, News::Whole][position.min(1)]),
        _ => None,
    }
}

/// The watch on the folder; on the folder that holds it too if it is a link, which may be turned.
struct Watch {
    dir: PathBuf,
    told: Arc<Told>,
    watcher: RecommendedWatcher,
    /// Which folder is watched: device and inode.
    folder: Option<(u64, u64)>,
}

impl Watch {
    fn open(dir: &Path, told: Arc<Told>) -> Result<Self, Error> {
        let failed = |source| Error::Watch { dir: dir.to_owned(), source };
        let watcher = watch(dir, told.clone()).map_err(failed)?;
        Ok(Self { dir: dir.to_owned(), told, watcher, folder: identity(dir) })
    }

    /// Watches anew if another folder has taken the place of the watched one; then everything may be different.
    fn follow(&mut self) -> bool {
        let now = identity(&self.dir);
        if now == self.folder || now.is_none() {
            return false;
        }
        match watch(&self.dir, self.told.clone()) {
            Ok(watcher) => {
                self.watcher = watcher;
                self.folder = now;
                true
            }
            Err(error) => {
                warn!(folder = %self.dir.display(), %error, "cannot watch the new folder of manifests, retrying");
                false
            }
        }
    }
}

fn identity(dir: &Path) -> Option<(u64, u64)> {
    fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn watch(dir: &Path, told: Arc<Told>) -> notify::Result<RecommendedWatcher> {
    let path = dir.to_owned();
    let mut watcher = notify::recommended_watcher(move |event| told.put(&path, event))?;
    watcher.watch(dir, RecursiveMode::NonRecursive)?;
    if fs::symlink_metadata(dir)?.is_symlink() {
        let parent = dir.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        watcher.watch(parent, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}

/// What is to be looked at, and when.
#[derive(Default, Debug)]
struct Schedule {
    files: BTreeMap<String, (Instant, Look)>,
    everything: Option<Look>,
}

/// What is to be looked at now.
#[derive(Default, Debug)]
struct Work {
    files: Vec<(String, Look)>,
    everything: Option<Look>,
}

impl Schedule {
    fn take(&mut self, news: AllNews, now: Instant) {
        for (name, news) in news.files {
            let look = match news {
                News::Whole => (now, Look::AtOnce),
                News::Written => (now + QUIET, Look::WhenQuiet),
                News::Gone => (now + REPLACEMENT, Look::AtOnce),
            };
            self.files.insert(name, look);
        }
        if news.of_everything {
            self.look_at_all(Look::AtOnce);
        }
    }

    fn look_at_all(&mut self, look: Look) {
        self.everything = self.everything.max(Some(look));
    }

    fn look_again(&mut self, names: Vec<String>, now: Instant) {
        for name in names {
            self.files.entry(name).or_insert((now + QUIET, Look::WhenQuiet));
        }
    }

    fn next(&self) -> Option<Instant> {
        self.files.values().map(|(due, _)| *due).min()
    }

    fn due(&mut self, now: Instant) -> Work {
        let due: Vec<_> = self.files.iter().filter(|(_, (due, _))| *due <= now).map(|(name, _)| name.clone()).collect();
        let files = due.into_iter().filter_map(|name| self.files.remove(&name).map(|(_, look)| (name, look)));
        Work { files: files.collect(), everything: self.everything.take() }
    }
}

/// Tells one state of a file's contents from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(metadata: &Metadata) -> Self {
        Self {
            file: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The folder, as far as it has been read.
struct Disk {
    dir: PathBuf,
    folder: Folder,
    stamps: BTreeMap<String, Stamp>,
    told: Arc<[ObjectProblem]>,
}

impl Disk {
    fn new(dir: PathBuf) -> Self {
        Self { dir, folder: Folder::default(), stamps: BTreeMap::new(), told: Arc::default() }
    }

    /// Names of the manifests in the folder.
    fn names(&self) -> io::Result<BTreeSet<String>> {
        let names = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        let names: io::Result<Vec<Option<String>>> = names.collect();
        Ok(names?.into_iter().flatten().filter(|name| Format::of_file(name).is_some()).collect())
    }

    /// Reads files for the first time: complete lists, and what is wrong.
    fn list(&mut self, names: BTreeSet<String>) -> Vec<Event> {
        for name in names {
            self.look_at(&name, Look::AtOnce, &mut Vec::new());
        }
        let mut events = self.folder.list();
        events.extend(self.problems());
        events
    }

    /// Reads what has changed. The changes, and the files that have to be looked at again.
    fn look(&mut self, work: Work) -> (Vec<Event>, Vec<String>) {
        let mut unsettled = Vec::new();
        let mut events = Vec::new();
        for (name, look) in work.files {
            events.extend(self.look_at(&name, look, &mut unsettled));
        }
        if let Some(look) = work.everything {
            for name in self.all_names() {
                events.extend(self.look_at(&name, look, &mut unsettled));
            }
        }
        events.extend(self.problems());
        (events, unsettled)
    }

    /// Every file that is there or was; none if the folder cannot be listed.
    fn all_names(&mut self) -> BTreeSet<String> {
        match self.names() {
            Ok(mut names) => {
                names.extend(self.folder.files().map(str::to_owned));
                self.folder.set_own_problem(None);
                names
            }
            Err(error) => {
                let message = format!("cannot be listed: {error}; what it held stays");
                self.folder.set_own_problem(Some(ObjectProblem { place: self.dir.display().to_string(), message }));
                BTreeSet::new()
            }
        }
    }

    /// Reads a file if it has changed.
    fn look_at(&mut self, name: &str, look: Look, unsettled: &mut Vec<String>) -> Vec<Event> {
        let Some(format) = Format::of_file(name) else { return Vec::new() };
        let path = self.dir.join(name);
        let metadata = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Err(error) if error.kind() != io::ErrorKind::NotFound => return self.fail(name, &error),
            _ if self.dir.is_dir() => {
                self.stamps.remove(name);
                return self.folder.remove(name);
            }
            _ => return Vec::new(),
        };
        let stamp = Stamp::from(&metadata);
        if self.stamps.get(name) == Some(&stamp) {
            return Vec::new();
        }
        if look == Look::WhenQuiet && !is_quiet(&metadata) {
            unsettled.push(name.to_owned());
            return Vec::new();
        }
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) => return self.fail(name, &error),
        };
        if fs::metadata(&path).ok().is_none_or(|metadata| Stamp::from(&metadata) != stamp) {
            unsettled.push(name.to_owned());
            return Vec::new();
        }
        self.stamps.insert(name.to_owned(), stamp);
        self.folder.read(name, format, &text)
    }

    fn fail(&mut self, name: &str, error: &io::Error) -> Vec<Event> {
        self.stamps.remove(name);
        self.folder.fail(name, format!("cannot be read: {error}; what it had before stays"));
        Vec::new()
    }

    /// All that is wrong, if that is not what was told last. New things are logged.
    fn problems(&mut self) -> Option<Event> {
        let problems = self.folder.problems();
        if problems == self.told {
            return None;
        }
        for problem in problems.iter().filter(|problem| !self.told.contains(problem)) {
            warn!(place = problem.place, problem = problem.message, "a manifest cannot be used as it is");
        }
        self.told = problems.clone();
        Some(Event::Problems(problems))
    }
}

/// True if a file has been left alone for a while. A time in the future tells nothing.
fn is_quiet(metadata: &Metadata) -> bool {
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    !SystemTime::now().duration_since(modified).is_ok_and(|age| age < QUIET)
}
