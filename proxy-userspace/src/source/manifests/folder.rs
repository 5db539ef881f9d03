//! What all files say together, and what changes when one of them does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tracing::debug;

use super::parse::{Format, parse_file};
use crate::model::{Event, Interner, Kind, Name, Object, ObjectKey, ObjectProblem};
use crate::source::decode::document::Item;
use crate::source::decode::{self, Decoded, Meaning};

/// The files of a folder, as last read.
#[derive(Default)]
pub struct Folder {
    interner: Interner,
    files: BTreeMap<String, File>,
    /// Files that have an object, in order; the first counts.
    owners: BTreeMap<ObjectKey, Vec<Name>>,
    /// Objects that several files have.
    contested: BTreeSet<ObjectKey>,
    /// Files that could not be read when everything was listed, nor since.
    unread: BTreeSet<String>,
    /// Everything was listed.
    is_listed: bool,
}

/// A file, as last read.
#[derive(Default)]
struct File {
    objects: BTreeMap<ObjectKey, Object>,
    /// Objects that cannot be used and of which nothing else is known.
    unusable: BTreeSet<ObjectKey>,
    problems: Vec<ObjectProblem>,
}

impl Folder {
    /// The files that are known.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Everything, as a complete list of every kind, and whether there was more that could not be read.
    pub fn list(&mut self) -> Vec<Event> {
        self.is_listed = true;
        let objects = self.owners.keys().filter_map(|key| self.winner(key)).cloned().map(Event::InitApply);
        let unusable = self.files.values().flat_map(|file| &file.unusable);
        let kept = unusable.filter(|key| self.winner(key).is_none()).cloned().map(Event::InitKeep);
        let begin = Kind::ALL.into_iter().map(Event::Init).chain([Event::Unread(self.is_unread())]);
        begin.chain(objects).chain(kept).chain(Kind::ALL.into_iter().map(Event::InitDone)).collect()
    }

    /// True if what was listed lacks a file, because it could not be read then and cannot now.
    pub fn is_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// All that cannot be used.
    pub fn problems(&self) -> Arc<[ObjectProblem]> {
        let of_files = self.files.values().flat_map(|file| file.problems.iter().cloned());
        let contested = self.contested.iter().flat_map(|key| self.doubles(key));
        of_files.chain(contested).collect()
    }

    fn doubles<'a>(&'a self, key: &'a ObjectKey) -> impl Iterator<Item = ObjectProblem> + 'a {
        let owners = self.owners.get(key).and_then(|owners| owners.split_first());
        owners.into_iter().flat_map(move |(winner, others)| {
            others.iter().map(move |file| ObjectProblem {
                place: format!("{file}: {key}"),
                object: Some(key.clone()),
                message: format!("is also in {winner}, which counts"),
            })
        })
    }

    /// Takes a file that cannot be read: what it had stays.
    pub fn fail(&mut self, name: &str, message: String) {
        if !self.is_listed {
            self.unread.insert(name.to_owned());
        }
        let file = self.files.entry(name.to_owned()).or_default();
        file.problems = vec![ObjectProblem { place: name.to_owned(), object: None, message }];
    }

    /// Takes the text of a file. What changes; if it does not parse, nothing.
    pub fn read(&mut self, name: &str, format: Format, text: &[u8]) -> Vec<Event> {
        match parse_file(format, text, &mut self.interner) {
            Ok(items) => {
                let known = self.files.get(name).map(|file| &file.objects);
                let file = read_items(name, items, known, self.is_listed);
                self.replace(name, Some(file))
            }
            Err(error) => {
                self.fail(name, format!("{error}; what it had before stays"));
                Vec::new()
            }
        }
    }

    /// Forgets a file. What changes.
    pub fn remove(&mut self, name: &str) -> Vec<Event> {
        self.replace(name, None)
    }

    fn replace(&mut self, name: &str, file: Option<File>) -> Vec<Event> {
        self.unread.remove(name);
        let keys = |file: &File| file.objects.keys().cloned().collect::<BTreeSet<_>>();
        let unusable = |file: Option<&File>| file.map(|file| file.unusable.clone()).unwrap_or_default();
        let void: BTreeSet<_> = &unusable(self.files.get(name)) - &unusable(file.as_ref());
        let old = self.files.get(name).map(keys).unwrap_or_default();
        let new = file.as_ref().map(keys).unwrap_or_default();
        let touched: Vec<_> = old.union(&new).cloned().collect();
        let before: Vec<_> = touched.iter().map(|key| self.winner(key).cloned()).collect();
        let owner = self.interner.name(name);
        for key in &touched {
            self.own(key, &owner, new.contains(key));
        }
        match file {
            Some(file) => _ = self.files.insert(name.to_owned(), file),
            None => _ = self.files.remove(name),
        }
        let changes = touched.into_iter().zip(before).filter_map(|(key, before)| match self.winner(&key) {
            after if after == before.as_ref() => None,
            Some(object) => Some(Event::Apply(object.clone())),
            None => Some(Event::Delete(key)),
        });
        let mut changes: Vec<_> = changes.collect();
        let void = void.into_iter().filter(|key| self.winner(key).is_none());
        changes.extend(void.map(Event::Delete));
        changes
    }

    fn own(&mut self, key: &ObjectKey, file: &Name, has_it: bool) {
        // Nearly always one: no room for more is kept.
        let owners = self.owners.entry(key.clone()).or_insert_with(|| Vec::with_capacity(1));
        match (owners.binary_search(file), has_it) {
            (Err(place), true) => owners.insert(place, file.clone()),
            (Ok(place), false) => _ = owners.remove(place),
            _ => {}
        }
        match owners.len() {
            0 => _ = self.owners.remove(key),
            1 => _ = self.contested.remove(key),
            _ => _ = self.contested.insert(key.clone()),
        }
    }

    fn winner(&self, key: &ObjectKey) -> Option<&Object> {
        let file = self.owners.get(key)?.first()?;
        self.files.get(file.as_str())?.objects.get(key)
    }
}

/// What the objects of a file mean. One that cannot be used stays as it was before (`known`; before everything was listed, as
/// an earlier run of the agent knew it).
fn read_items(name: &str, items: Vec<Item>, known: Option<&BTreeMap<ObjectKey, Object>>, is_listed: bool) -> File {
    let mut file = File::default();
    for item in items {
        match item {
            Item::OtherKind { kind } => debug!(file = name, kind, "not a kind that is read"),
            Item::Object(Ok(decoded)) => file.take(name, decoded),
            Item::Object(Err(error)) => file.keep(name, &error, known, is_listed),
        }
    }
    file
}

impl File {
    fn report(&mut self, name: &str, place: impl std::fmt::Display, message: impl ToString) {
        self.problems.push(ObjectProblem {
            place: format!("{name}: {place}"),
            object: None,
            message: message.to_string(),
        });
    }

    fn take(&mut self, name: &str, decoded: Decoded) {
        let Decoded { key, meaning, problems } = decoded;
        for problem in problems {
            self.report(name, &key, problem);
        }
        match meaning {
            Meaning::Ignored(reason) => debug!(file = name, object = %key, %reason, "ignored"),
            Meaning::Object(_) if self.objects.contains_key(&key) => {
                self.report(name, &key, "is in this file twice; the first counts");
            }
            Meaning::Object(object) => _ = self.objects.insert(key, object),
        }
    }

    fn keep(
        &mut self,
        name: &str,
        error: &decode::Error,
        known: Option<&BTreeMap<ObjectKey, Object>>,
        is_listed: bool,
    ) {
        let before = error.key.as_ref().and_then(|key| known?.get_key_value(key));
        let then = if before.is_some() || !is_listed { "what it was before stays" } else { "it is left out" };
        let problem = ObjectProblem::from(error);
        self.report(name, problem.place, format!("{}; {then}", problem.message));
        if let Some((key, object)) = before {
            self.objects.entry(key.clone()).or_insert_with(|| object.clone());
        } else {
            self.unusable.extend(error.key.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, port: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
             spec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
        )
    }

    fn read(folder: &mut Folder, file: &str, text: &str) -> Vec<String> {
        folder.read(file, Format::Yaml, text.as_bytes()).iter().map(describe).collect()
    }

    fn describe(event: &Event) -> String {
        match event {
            Event::Apply(Object::Service { name, service, .. }) => format!("{name} has port {}", service.ports[0].port),
            Event::Delete(key) => format!("{} is gone", key.name),
            other => panic!("{other:?}"),
        }
    }

    fn messages(folder: &Folder) -> Vec<String> {
        folder.problems().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_objects_that_differ_are_told() {
        let mut folder = Folder::default();
        let both = format!("{}---\n{}", service("a", "1"), service("b", "2"));
        assert_eq!(read(&mut folder, "x.yaml", &both), ["a has port 1", "b has port 2"]);
        let changed = format!("{}---\n{}", service("a", "1"), service("b", "3"));
        assert_eq!(read(&mut folder, "x.yaml", &changed), ["b has port 3"]);
        assert_eq!(read(&mut folder, "x.yaml", &service("b", "3")), ["a is gone"]);
    }

    #[test]
    fn a_file_that_does_not_parse_keeps_its_objects_and_is_reported() {
        let mut folder = Folder::default();
        read(&mut folder, "x.yaml", &service("a", "1"));
        assert!(read(&mut folder, "x.yaml", "kind: Service\nspec: {ports: [").is_empty());
        assert!(messages(&folder)[0].starts_with("x.yaml: does not parse as YAML"), "{:?}", messages(&folder));
        assert_eq!(read(&mut folder, "x.yaml", &service("a", "2")), ["a has port 2"]);
        assert!(messages(&folder).is_empty());
    }

    #[test]
    fn an_object_that_cannot_be_used_stays_as_it_was_and_harms_no_other() {
        let mut folder = Folder::default();
        read(&mut folder, "x.yaml", &service("a", "1"));
        folder.list();
        let text = format!("{}---\n{}---\n{}", service("a", "99999"), service("b", "0"), service("c", "3"));
        assert_eq!(read(&mut folder, "x.yaml", &text), ["c has port 3"]);
        let expected = [
            "x.yaml: Service default/a: spec.ports[0].port: 99999 is not a port: ports are 1 to 65535; what it was before stays",
            "x.yaml: Service default/b: spec.ports[0].port: 0 is not a port: ports are 1 to 65535; it is left out",
        ];
        assert_eq!(messages(&folder), expected);
        assert_eq!(read(&mut folder, "x.yaml", &service("c", "3")), ["a is gone", "b is gone"]);
    }

    /// An earlier run of the agent may have known better.
    #[test]
    fn what_cannot_be_used_when_everything_is_listed_is_not_listed_as_absent() {
        let mut folder = Folder::default();
        read(&mut folder, "good.yaml", &format!("{}---\n{}", service("a", "1"), service("b", "0")));
        read(&mut folder, "broken.yaml", "kind: [");
        assert_eq!(
            messages(&folder)[1],
            "good.yaml: Service default/b: spec.ports[0].port: 0 is not a port: ports are 1 to 65535; what it was before stays"
        );
        let listed = folder.list();
        let kept = listed.iter().filter_map(|event| match event {
            Event::InitKeep(key) => Some(key.to_string()),
            _ => None,
        });
        assert_eq!(kept.collect::<Vec<_>>(), ["Service default/b"]);
        assert!(listed.contains(&Event::Unread(true)) && folder.is_unread());
        read(&mut folder, "new.yaml", "kind: [");
        assert_eq!(read(&mut folder, "broken.yaml", &service("c", "3")), ["c has port 3"]);
        assert!(!folder.is_unread(), "a file that came later lacks nothing that was there before");
        assert_eq!(read(&mut folder, "good.yaml", &service("a", "1")), ["b is gone"]);
    }

    #[test]
    fn a_file_that_could_not_be_read_and_is_removed_leaves_nothing_open() {
        let mut folder = Folder::default();
        read(&mut folder, "broken.yaml", "kind: [");
        folder.list();
        assert!(folder.remove("broken.yaml").is_empty());
        assert!(!folder.is_unread());
    }

    #[test]
    fn of_an_object_in_two_files_the_first_file_counts() {
        let mut folder = Folder::default();
        assert_eq!(read(&mut folder, "b.yaml", &service("a", "2")), ["a has port 2"]);
        assert_eq!(read(&mut folder, "a.yaml", &service("a", "1")), ["a has port 1"]);
        assert_eq!(messages(&folder), ["b.yaml: Service default/a: is also in a.yaml, which counts"]);
        let removed: Vec<_> = folder.remove("a.yaml").iter().map(describe).collect();
        assert_eq!(removed, ["a has port 2"]);
        assert!(messages(&folder).is_empty());
    }

    #[test]
    fn a_list_holds_every_object_once() {
        let mut folder = Folder::default();
        read(&mut folder, "a.yaml", &service("a", "1"));
        read(&mut folder, "b.yaml", &service("a", "2"));
        let applied = folder.list().into_iter().filter(|event| matches!(event, Event::InitApply(_))).count();
        assert_eq!((applied, folder.list().len()), (1, 2 + 2 * Kind::ALL.len()));
    }

    #[test]
    fn other_kinds_and_empty_documents_are_passed_over() {
        let mut folder = Folder::default();
        let text = format!("---\n---\napiVersion: apps/v1\nkind: Deployment\n---\n{}---\n", service("a", "1"));
        assert_eq!(read(&mut folder, "x.yaml", &text), ["a has port 1"]);
        assert!(messages(&folder).is_empty());
    }
}
