//! A watch: changes to objects as they happen.

use std::io::{BufReader, Read};

use serde_json::{Deserializer, StreamDeserializer, Value, de::IoRead};

use super::client::{Api, Error};

/// One line of a watch.
#[derive(Clone, Debug)]
pub enum Event {
    /// A new object, or one that was there when the watch began.
    Added(Value),
    /// An object as it is now.
    Modified(Value),
    /// An object as it was at its end.
    Deleted(Value),
}

impl Event {
    /// The object concerned.
    pub fn object(&self) -> &Value {
        match self {
            Self::Added(object) | Self::Modified(object) | Self::Deleted(object) => object,
        }
    }
}

/// A running watch: an iterator that blocks until the next change. It ends when the server ends it, and an error is its last item.
pub struct Watch {
    api: Api,
    lines: StreamDeserializer<'static, IoRead<BufReader<Box<dyn Read + Send>>>, Value>,
}

/// Ends a watch from another thread.
#[derive(Clone, Debug)]
pub struct Stopper(Api);

impl Stopper {
    /// The watch's iterator ends at once.
    pub fn stop(&self) {
        self.0.shut_down();
    }
}

impl Watch {
    pub(super) fn open(api: &Api, path: &str, resource_version: &str) -> Result<Self, Error> {
        let response = api.stream(path, &[("watch", "true"), ("resourceVersion", resource_version)])?;
        let body: Box<dyn Read + Send> = Box::new(response.into_body().into_reader());
        Ok(Self { api: api.clone(), lines: Deserializer::from_reader(BufReader::new(body)).into_iter() })
    }

    /// What ends this watch from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.api.clone())
    }
}

impl Iterator for Watch {
    type Item = Result<Event, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = match self.lines.next()? {
            Ok(line) => line,
            Err(error) => return Some(Err(Error::Unreadable(error))),
        };
        let object = line["object"].take();
        Some(match line["type"].as_str() {
            Some("ADDED") => Ok(Event::Added(object)),
            Some("MODIFIED") => Ok(Event::Modified(object)),
            Some("DELETED") => Ok(Event::Deleted(object)),
            // Bookmarks come only to who asks for them, so what is left is ERROR with a Status.
            _ => Err(Error::from_status(&object, 0)),
        })
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("api", &self.api).finish_non_exhaustive()
    }
}
