//! Objects as text to updates, and what of them cannot be used. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;
use tracing::{debug, warn};

use crate::model::{Event, Interner, Kind, ObjectKey, ObjectProblem};
use crate::source::decode::document::decode_json;
use crate::source::decode::{Decoded, Error, Meaning};

/// Objects with problems that are told; the rest is a number.
const MOST_TOLD: usize = 200;

/// What is known of the objects: names, to store them once, and complaints.
#[derive(Default)]
pub struct Intake {
    interner: Interner,
    /// What is wrong, by object.
    complaints: BTreeMap<ObjectKey, Vec<String>>,
    /// The same of lists under way: it counts when the list is complete.
    listing: BTreeMap<Kind, BTreeMap<ObjectKey, Vec<String>>>,
    /// Something of the above has changed since it was told.
    is_changed: bool,
}

/// Who an object is.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Named {
    metadata: NamedMeta,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct NamedMeta {
    namespace: String,
    name: String,
}

impl Intake {
    /// A list begins.
    pub fn begin(&mut self, kind: Kind) -> Event {
        self.listing.insert(kind, BTreeMap::new());
        Event::Init(kind)
    }

    /// An object of a list: what is to be told of it.
    pub fn listed(&mut self, kind: Kind, object: &str) -> Option<Event> {
        match self.decode(kind, object) {
            Ok((_, Meaning::Object(object))) => Some(Event::InitApply(object)),
            Ok((_, Meaning::Ignored(_))) => None,
            Err(key) => key.map(Event::InitKeep),
        }
    }

    /// A list is complete: complaints about objects that are not in it are void.
    pub fn end(&mut self, kind: Kind) -> Event {
        let listed = self.listing.remove(&kind).unwrap_or_default();
        self.complaints.retain(|key, _| key.kind != kind);
        self.complaints.extend(listed);
        self.is_changed = true;
        Event::InitDone(kind)
    }

    /// An object is new or has changed.
    pub fn put(&mut self, kind: Kind, object: &str) -> Option<Event> {
        match self.decode(kind, object) {
            Ok((_, Meaning::Object(object))) => Some(Event::Apply(object)),
            Ok((key, Meaning::Ignored(_))) => Some(Event::Delete(key)),
            Err(_) => None,
        }
    }

    /// An object is gone; nothing of it but its name has to be readable.
    pub fn gone(&mut self, kind: Kind, object: &str) -> Option<Event> {
        let Named { metadata } = serde_json::from_str(object).ok()?;
        let (namespace, name) = (self.interner.name(&metadata.namespace), self.interner.name(&metadata.name));
        let key = ObjectKey { kind, namespace, name };
        self.is_changed |= self.complaints.remove(&key).is_some();
        Some(Event::Delete(key))
    }

    /// Everything that is wrong, if it may be other than what was told last.
    pub fn problems(&mut self) -> Option<Event> {
        std::mem::take(&mut self.is_changed).then(|| Event::Problems(self.all_problems().collect()))
    }

    fn all_problems(&self) -> impl Iterator<Item = ObjectProblem> {
        let told = self.complaints.iter().take(MOST_TOLD).flat_map(|(key, messages)| {
            messages.iter().map(|message| ObjectProblem {
                place: key.to_string(),
                object: Some(key.clone()),
                message: message.clone(),
            })
        });
        let more = self.complaints.len().saturating_sub(MOST_TOLD);
        let more = (more > 0).then(|| ObjectProblem {
            place: format!("{more} other objects"),
            object: None,
            message: "have values that cannot be used".to_owned(),
        });
        told.chain(more)
    }

    /// What an object means, and which one it is. As an error, the key of one that cannot be used, if it has one.
    fn decode(&mut self, kind: Kind, object: &str) -> Result<(ObjectKey, Meaning), Option<ObjectKey>> {
        match decode_json(kind, object, &mut self.interner) {
            Ok(Decoded { key, meaning, problems }) => {
                if let Meaning::Ignored(reason) = &meaning {
                    debug!(object = %key, %reason, "ignored");
                }
                self.complain(&key, problems.iter().map(ToString::to_string).collect());
                Ok((key, meaning))
            }
            Err(Error { key: Some(key), error }) => {
                self.complain(&key, vec![format!("{error}; what it was before stays")]);
                Err(Some(key))
            }
            Err(error) => {
                warn!(%kind, %error, "an object of the API server cannot be used");
                Err(None)
            }
        }
    }

    /// Takes what is wrong with an object now; logs what was not wrong before.
    fn complain(&mut self, key: &ObjectKey, messages: Vec<String>) {
        let known = self.complaints.get(key).map(Vec::as_slice).unwrap_or_default();
        for problem in messages.iter().filter(|message| !known.contains(message)) {
            warn!(object = %key, problem, "an object cannot be used as it is");
        }
        let (current, is_told) = match self.listing.get_mut(&key.kind) {
            Some(listing) => (listing, false),
            None => (&mut self.complaints, true),
        };
        let before = match messages.is_empty() {
            true => current.remove(key),
            false => current.insert(key.clone(), messages.clone()),
        };
        self.is_changed |= is_told && before.unwrap_or_default() != messages;
    }
}
