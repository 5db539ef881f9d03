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
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tracing::{info, warn};

use super::folder::Folder;
use super::parse::Format;
use crate::datapath::sys;
use crate::model::{Event, ObjectProblem, SourceId, Update};
use crate::source::contact::Contact;

/// A file that was written so recently may be written on.
const QUIET: Duration = Duration::from_secs(1);
/// A file that is gone may be about to be replaced (editors do so).
const REPLACEMENT: Duration = Duration::from_millis(100);
/// How long the first list waits for files that are being written; then it says that it lacks them.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often they are looked at meanwhile.
const PAUSE: Duration = Duration::from_millis(50);
/// How often everything is looked at without being told: for what links point to, network file systems, lost messages.
const BACKSTOP: Duration = Duration::from_secs(5);

/// What a source's contact is about.
const FOLDER: &str = "the folder";

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
    contact: Contact,
}

impl Manifests {
    /// A source that tells `updates` what the manifests in `dir` say, and `contact` whether they can be read.
    pub fn new(dir: PathBuf, updates: mpsc::Sender<Update>, contact: Contact) -> Self {
        Self { dir, updates, contact }
    }

    /// Lists the folder and follows it until nobody listens any more.
    ///
    /// Fails if the folder cannot be read at the beginning. If it disappears later, what was read stays.
    pub async fn run(self) -> Result<(), Error> {
        let told = Arc::new(Told::default());
        let mut watch = Watch::open(&self.dir, told.clone())?;
        let disk = Disk::new(self.dir.clone(), self.contact.clone());
        let names = disk.names().map_err(|source| Error::List { dir: self.dir.clone(), source })?;
        let (disk, unsettled) = first_look(disk, names).await;
        let mut schedule = Schedule::default();
        schedule.look_again(unsettled.clone(), Instant::now());
        let (mut disk, events) = on_disk(disk, |disk| disk.list(unsettled)).await;
        info!(folder = %self.dir.display(), files = disk.stamps.len(), "manifests listed");
        let mut is_heard = self.send(events).await;
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

    /// Tells what one look at the folder has shown, as one update: what is swapped together counts together. False if
    /// nobody listens any more.
    async fn send(&self, events: Vec<Event>) -> bool {
        events.is_empty() || self.updates.send(Update { source: SourceId::Manifests, events }).await.is_ok()
    }
}

/// Reads files for the first time. Those that are being written are waited for, up to a limit; the rest of them comes back.
async fn first_look(mut disk: Disk, names: BTreeSet<String>) -> (Disk, Vec<String>) {
    let deadline = Instant::now() + PATIENCE;
    let mut waiting: Vec<String> = names.into_iter().collect();
    loop {
        (disk, waiting) = on_disk(disk, |disk| disk.first_look(waiting)).await;
        if waiting.is_empty() || Instant::now() >= deadline {
            return (disk, waiting);
        }
        sleep(PAUSE).await;
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
    /// The same, or when nobody has it open for writing.
    WhenClosed,
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
    /// The source was said to lack a file that could not be read.
    told_unread: bool,
    contact: Contact,
}

impl Disk {
    fn new(dir: PathBuf, contact: Contact) -> Self {
        let (folder, stamps, told) = (Folder::default(), BTreeMap::new(), Arc::default());
        Self { dir, folder, stamps, told, told_unread: false, contact }
    }

    /// Names of the manifests in the folder.
    fn names(&self) -> io::Result<BTreeSet<String>> {
        let names = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        let names: io::Result<Vec<Option<String>>> = names.collect();
        Ok(names?.into_iter().flatten().filter(|name| Format::of_file(name).is_some()).collect())
    }

    /// Reads files for the first time. Those that are being written come back.
    fn first_look(&mut self, names: Vec<String>) -> Vec<String> {
        self.contact.found(FOLDER);
        let mut unsettled = Vec::new();
        for name in names {
            self.look_at(&name, Look::WhenClosed, &mut unsettled);
        }
        unsettled
    }

    /// Complete lists of what was read, and what is wrong. `unsettled` could not be read.
    fn list(&mut self, unsettled: Vec<String>) -> Vec<Event> {
        for name in unsettled {
            self.folder.fail(&name, "is being written all the time; what it had before stays".to_owned());
        }
        let mut events = self.folder.list();
        self.told_unread = self.folder.is_unread();
        events.extend(self.problems());
        events
    }

    /// Reads what has changed. The changes, and the files that have to be looked at again.
    fn look(&mut self, work: Work) -> (Vec<Event>, Vec<String>) {
        let mut unsettled = Vec::new();
        let mut events = Vec::new();
        let before = self.generation();
        for (name, look) in work.files {
            events.extend(self.look_at(&name, look, &mut unsettled));
        }
        if let Some(look) = work.everything {
            for name in self.all_names() {
                events.extend(self.look_at(&name, look, &mut unsettled));
            }
        }
        // What is swapped together counts together, even if it was swapped in the middle of this.
        if self.generation() != before {
            for name in self.all_names() {
                events.extend(self.look_at(&name, Look::AtOnce, &mut unsettled));
            }
        }
        if std::mem::replace(&mut self.told_unread, self.folder.is_unread()) != self.told_unread {
            events.push(Event::Unread(self.told_unread));
        }
        events.extend(self.problems());
        (events, unsettled)
    }

    /// What is another one after all files have been swapped: the folder, or the link in it through which that is done.
    fn generation(&self) -> (Option<(u64, u64)>, Option<PathBuf>) {
        (identity(&self.dir), fs::read_link(self.dir.join("..data")).ok())
    }

    /// Every file that is there or was; none if the folder cannot be listed.
    fn all_names(&mut self) -> BTreeSet<String> {
        match self.names() {
            Ok(mut names) => {
                names.extend(self.folder.files().map(str::to_owned));
                self.contact.found(FOLDER);
                names
            }
            Err(error) => {
                let why = format!("{} cannot be listed: {error}", self.dir.display());
                if self.contact.lost(FOLDER, why) {
                    warn!(folder = %self.dir.display(), %error, "cannot list the folder of manifests; what it held stays");
                }
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
        let may_be_written = match look {
            // It was whole when that was told; the next writer may have begun since.
            Look::AtOnce => !is_quiet(&metadata) && has_writer(&path) == Some(true),
            Look::WhenClosed => !is_quiet(&metadata) && has_writer(&path) != Some(false),
            Look::WhenQuiet => !is_quiet(&metadata),
        };
        if may_be_written {
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

/// True if somebody has a file open for writing; `None` if that cannot be found out.
fn has_writer(path: &Path) -> Option<bool> {
    fs::File::open(path).and_then(|file| sys::has_writer(&file)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::content::Content;
    use crate::model::{Kind, Name, NodeFacts, Object};
    use crate::source::contact::State;
    use crate::source::manifests::SPEC;
    use notify::event::{CreateKind, DataChange};
    use std::collections::VecDeque;
    use std::os::unix::fs::symlink;
    use tokio::sync::watch;

    /// A source on a folder of its own.
    struct Running {
        _dir: tempfile::TempDir,
        path: PathBuf,
        updates: mpsc::Receiver<Update>,
        /// What was told first.
        listed: Vec<Event>,
        /// Events of updates that were received.
        events: VecDeque<Event>,
        contact: watch::Receiver<State>,
    }

    fn service(port: u16) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\n\
             spec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
        )
    }

    /// Puts a file in place as a whole.
    fn put(path: &Path, text: &str) {
        let draft = path.with_extension("draft");
        fs::write(&draft, text).unwrap();
        fs::rename(draft, path).unwrap();
    }

    impl Running {
        /// Starts with what `prepare` puts into the folder, which is at the returned path below a fresh one.
        async fn start(prepare: impl FnOnce(&Path) -> PathBuf) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = prepare(dir.path());
            let (sender, updates) = mpsc::channel(64);
            let contact = Contact::default();
            let state = contact.watch();
            tokio::spawn(Manifests::new(path.clone(), sender, contact).run());
            let (listed, events) = (Vec::new(), VecDeque::new());
            let mut running = Self { _dir: dir, path, updates, listed, events, contact: state };
            running.listed = running.updates.recv().await.expect("the source lists").events;
            assert!(Kind::ALL.into_iter().all(|kind| running.listed.contains(&Event::InitDone(kind))));
            running
        }

        /// The next event that is looked for; the test runner's patience is the limit.
        async fn until(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
            loop {
                while let Some(event) = self.events.pop_front() {
                    if wanted(&event) {
                        return event;
                    }
                }
                let update = self.updates.recv().await.expect("the source runs until nobody listens");
                self.events.extend(update.events);
            }
        }

        async fn port(&mut self) -> u16 {
            match self.until(|event| matches!(event, Event::Apply(_) | Event::Delete(_))).await {
                Event::Apply(Object::Service { service, .. }) => service.ports[0].port.0,
                other => panic!("{other:?}"),
            }
        }

        async fn deleted(&mut self) -> String {
            match self.until(|event| matches!(event, Event::Apply(_) | Event::Delete(_))).await {
                Event::Delete(key) => key.to_string(),
                other => panic!("{other:?}"),
            }
        }

        async fn problem(&mut self) -> String {
            let problems = self.until(|event| matches!(event, Event::Problems(list) if !list.is_empty())).await;
            let Event::Problems(problems) = problems else { unreachable!("only such events are let through") };
            problems[0].to_string()
        }
    }

    fn plain(dir: &Path) -> PathBuf {
        fs::write(dir.join("web.yaml"), service(1)).unwrap();
        dir.to_owned()
    }

    #[tokio::test]
    async fn files_are_followed() {
        let mut running = Running::start(plain).await;
        put(&running.path.join("web.yaml"), &service(2));
        assert_eq!(running.port().await, 2);
        fs::write(running.path.join("web.yaml"), service(3)).unwrap();
        assert_eq!(running.port().await, 3);
        fs::remove_file(running.path.join("web.yaml")).unwrap();
        assert_eq!(running.deleted().await, "Service default/web");
        fs::write(running.path.join(".hidden.yaml"), service(4)).unwrap();
        fs::write(running.path.join("other.json"), "{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{\"name\":\"web\"},\"spec\":{\"ports\":[{\"port\":5}]}}").unwrap();
        assert_eq!(running.port().await, 5);
    }

    #[tokio::test]
    async fn a_file_that_is_removed_and_made_again_is_never_gone() {
        let mut running = Running::start(plain).await;
        fs::remove_file(running.path.join("web.yaml")).unwrap();
        put(&running.path.join("web.yaml"), &service(2));
        assert_eq!(running.port().await, 2);
    }

    #[tokio::test]
    async fn a_file_that_does_not_parse_is_reported_and_keeps_what_it_had() {
        let mut running = Running::start(plain).await;
        put(&running.path.join("web.yaml"), "kind: [");
        assert!(running.problem().await.contains("web.yaml: does not parse as YAML"));
        put(&running.path.join("web.yaml"), &service(2));
        assert_eq!(running.port().await, 2);
    }

    /// As the kubelet does with a ConfigMap: files are links through `..data`, which is turned.
    #[tokio::test]
    async fn a_turned_data_link_counts_for_all_files_at_once() {
        let prepare = |dir: &Path| {
            for (version, port) in [("..1", 1), ("..2", 2)] {
                fs::create_dir(dir.join(version)).unwrap();
                fs::write(dir.join(version).join("web.yaml"), service(port)).unwrap();
            }
            symlink("..1", dir.join("..data")).unwrap();
            symlink("..data/web.yaml", dir.join("web.yaml")).unwrap();
            dir.to_owned()
        };
        let mut running = Running::start(prepare).await;
        symlink("..2", running.path.join("..new")).unwrap();
        fs::rename(running.path.join("..new"), running.path.join("..data")).unwrap();
        assert_eq!(running.port().await, 2);
    }

    /// More objects than a channel's sender passes on without a pause, and two files.
    #[tokio::test]
    async fn what_is_swapped_together_is_seen_together() {
        const PAIRS: u16 = 300;
        let pair = |number: u16, port: &str| {
            let service = format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\n\
                 spec: {{clusterIP: 10.96.{}.{}, ports: [{{name: {port}, port: 80}}]}}\n---\n",
                number / 250,
                number % 250
            );
            let slice = format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
                 metadata: {{name: s{number}, labels: {{kubernetes.io/service-name: s{number}}}}}\n\
                 ports: [{{name: {port}, port: 80}}]\nendpoints: [{{addresses: [10.244.0.1]}}]\n---\n"
            );
            (service, slice)
        };
        let prepare = |dir: &Path| {
            for (version, port) in [("1", "old"), ("2", "new")] {
                let pairs: (Vec<_>, Vec<_>) = (0..PAIRS).map(|number| pair(number, port)).unzip();
                let (first, second) = if version == "1" { ("a.yaml", "b.yaml") } else { ("b.yaml", "a.yaml") };
                fs::create_dir(dir.join(version)).unwrap();
                fs::write(dir.join(version).join(first), pairs.0.concat()).unwrap();
                fs::write(dir.join(version).join(second), pairs.1.concat()).unwrap();
            }
            symlink("1", dir.join("current")).unwrap();
            dir.join("current")
        };
        let mut running = Running::start(prepare).await;
        let mut content = Content::new(Arc::new(NodeFacts::named(Name::from("node-a"))), &[SPEC]);
        let listed = std::mem::take(&mut running.listed);
        content.apply(Update { source: SourceId::Manifests, events: listed });
        let ports_of = |content: &Content| {
            let snapshot = content.snapshot();
            let services = snapshot.services.values().map(|service| service.ports[0].name.clone());
            let slices = snapshot.endpoints.values().map(|slices| slices.groups()[0].subsets[0].ports[0].name.clone());
            let names: Vec<_> = services.chain(slices).collect();
            assert_eq!(names.len(), 2 * usize::from(PAIRS), "all are there all the time");
            names.into_iter().map(|name| name.to_string()).collect::<BTreeSet<_>>()
        };
        assert_eq!(ports_of(&content), BTreeSet::from(["old".to_owned()]));
        let dir = running.path.parent().unwrap().to_owned();
        symlink("2", dir.join("next")).unwrap();
        fs::rename(dir.join("next"), dir.join("current")).unwrap();
        let mut ports = BTreeSet::new();
        while ports != BTreeSet::from(["new".to_owned()]) {
            content.apply(running.updates.recv().await.expect("the source runs until nobody listens"));
            ports = ports_of(&content);
            assert_eq!(ports.len(), 1, "old and new are mixed");
        }
    }

    #[tokio::test]
    async fn a_folder_that_is_a_link_may_be_turned() {
        let prepare = |dir: &Path| {
            for (version, port) in [("1", 1), ("2", 2)] {
                fs::create_dir(dir.join(version)).unwrap();
                fs::write(dir.join(version).join("web.yaml"), service(port)).unwrap();
            }
            symlink("1", dir.join("current")).unwrap();
            dir.join("current")
        };
        let mut running = Running::start(prepare).await;
        let dir = running.path.parent().unwrap().to_owned();
        symlink("2", dir.join("new")).unwrap();
        fs::rename(dir.join("new"), dir.join("current")).unwrap();
        assert_eq!(running.port().await, 2);
        put(&dir.join("2").join("web.yaml"), &service(3));
        assert_eq!(running.port().await, 3);
    }

    #[tokio::test]
    async fn what_a_link_points_to_is_looked_at_now_and_then() {
        let prepare = |dir: &Path| {
            fs::create_dir(dir.join("elsewhere")).unwrap();
            fs::create_dir(dir.join("manifests")).unwrap();
            fs::write(dir.join("elsewhere/web.yaml"), service(1)).unwrap();
            symlink("../elsewhere/web.yaml", dir.join("manifests/web.yaml")).unwrap();
            dir.join("manifests")
        };
        let mut running = Running::start(prepare).await;
        put(&running.path.parent().unwrap().join("elsewhere/web.yaml"), &service(2));
        assert_eq!(running.port().await, 2);
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_at_the_start_is_listed_whole() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let mut file = fs::File::create(dir.path().join("web.yaml")).unwrap();
        // What is there so far is a manifest too.
        file.write_all(service(1).as_bytes()).unwrap();
        let (disk, unsettled) = on_disk(Disk::new(dir.path().to_owned(), Contact::default()), |disk| {
            let names = disk.names().unwrap();
            disk.first_look(names.into_iter().collect())
        })
        .await;
        assert_eq!(unsettled, ["web.yaml"]);
        let looking = tokio::spawn(first_look(disk, unsettled.into_iter().collect()));
        write!(file, "---\n{}", service(2).replace("web", "other")).unwrap();
        drop(file);
        let (mut disk, unsettled) = looking.await.unwrap();
        assert!(unsettled.is_empty(), "its writer has closed it");
        let applied = disk.list(unsettled).into_iter().filter(|event| matches!(event, Event::InitApply(_)));
        assert_eq!(applied.count(), 2);
    }

    #[test]
    fn a_file_that_is_written_for_ever_is_lacking_and_taken_when_it_is_whole() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("other.yaml"), service(1)).unwrap();
        let mut file = fs::File::create(dir.path().join("web.yaml")).unwrap();
        file.write_all(b"kind: [").unwrap();
        let mut disk = Disk::new(dir.path().to_owned(), Contact::default());
        let unsettled = disk.first_look(disk.names().unwrap().into_iter().collect());
        let events = disk.list(unsettled);
        assert!(events.contains(&Event::Unread(true)));
        assert_eq!(events.iter().filter(|event| matches!(event, Event::InitApply(_))).count(), 1, "the other file");
        drop(file);
        put(&dir.path().join("web.yaml"), &service(2));
        let work = Work { files: vec![("web.yaml".to_owned(), Look::AtOnce)], everything: None };
        let (events, _) = disk.look(work);
        assert_eq!(events.last().map(|event| matches!(event, Event::Problems(_))), Some(true));
        assert!(events.contains(&Event::Unread(false)), "{events:?}");
    }

    #[tokio::test]
    async fn a_folder_that_goes_away_is_told_and_takes_nothing_along() {
        let prepare = |dir: &Path| {
            fs::create_dir(dir.join("manifests")).unwrap();
            plain(&dir.join("manifests"))
        };
        let mut running = Running::start(prepare).await;
        let away = running.path.with_extension("away");
        fs::rename(&running.path, &away).unwrap();
        let state = running.contact.wait_for(|state| !state.outages.is_empty()).await.unwrap().clone();
        assert!(state.outages[0].why.contains("manifests cannot be listed"), "{state:?}");
        put(&away.join("web.yaml"), &service(2));
        fs::rename(&away, &running.path).unwrap();
        running.contact.wait_for(|state| state.outages.is_empty()).await.unwrap();
        // The first news since the list: nothing was deleted meanwhile.
        assert_eq!(running.port().await, 2);
    }

    #[tokio::test]
    async fn a_folder_that_is_not_there_is_an_error() {
        let (sender, _updates) = mpsc::channel(1);
        let result = Manifests::new(PathBuf::from("/nowhere/to/be/found"), sender, Contact::default()).run().await;
        assert!(result.unwrap_err().to_string().ends_with("/nowhere/to/be/found"));
    }

    fn event(kind: EventKind, path: &str) -> notify::Result<notify::Event> {
        Ok(notify::Event::new(kind).add_path(Path::new("/m").join(path)))
    }

    #[test]
    fn a_file_under_way_waits_for_its_writer() {
        let written = EventKind::Modify(ModifyKind::Data(DataChange::Any));
        let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
        let mut news = AllNews::default();
        news.add(Path::new("/m"), event(EventKind::Create(CreateKind::File), "web.yaml"));
        news.add(Path::new("/m"), event(written, "web.yaml"));
        assert_eq!(news.files["web.yaml"], News::Written);
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        schedule.take(news, now);
        assert!(schedule.due(now).files.is_empty());
        let mut news = AllNews::default();
        news.add(Path::new("/m"), event(closed, "web.yaml"));
        schedule.take(news, now);
        assert_eq!(schedule.due(now).files, [("web.yaml".to_owned(), Look::AtOnce)]);
        assert_eq!(schedule.next(), None);
    }

    #[test]
    fn files_that_are_no_manifests_are_no_news() {
        let mut news = AllNews::default();
        for name in [".web.yaml.swp", "README", "web.yaml.draft", "sub/web.yaml"] {
            news.add(Path::new("/m"), event(EventKind::Access(AccessKind::Close(AccessMode::Write)), name));
        }
        assert_eq!(news, AllNews::default());
        news.add(Path::new("/m"), event(EventKind::Modify(ModifyKind::Name(RenameMode::To)), "..data"));
        assert!(news.of_everything);
    }

    #[test]
    fn lost_messages_mean_that_everything_may_be_different() {
        let mut news = AllNews::default();
        news.add(Path::new("/m"), Err(notify::Error::generic("queue overflow")));
        assert!(news.of_everything);
    }

    #[test]
    fn a_file_that_was_just_written_is_left_alone_unless_it_is_known_to_be_whole() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("web.yaml"), service(1)).unwrap();
        let mut disk = Disk::new(dir.path().to_owned(), Contact::default());
        let mut unsettled = Vec::new();
        assert!(disk.look_at("web.yaml", Look::WhenQuiet, &mut unsettled).is_empty());
        assert_eq!(unsettled, ["web.yaml"]);
        assert_eq!(disk.look_at("web.yaml", Look::AtOnce, &mut unsettled).len(), 1);
        unsettled.clear();
        let writer = fs::File::create(dir.path().join("web.yaml")).unwrap();
        assert!(disk.look_at("web.yaml", Look::AtOnce, &mut unsettled).is_empty(), "the next one has begun");
        assert_eq!(unsettled, ["web.yaml"]);
        drop(writer);
        assert_eq!(disk.look_at("web.yaml", Look::AtOnce, &mut unsettled).len(), 1, "it is empty on purpose");
        fs::remove_dir_all(dir.path()).unwrap();
        assert!(
            disk.look_at("web.yaml", Look::AtOnce, &mut unsettled).is_empty(),
            "a folder that is gone takes nothing along"
        );
    }
}
