//! Kubernetes objects to model types.
//!
//! | module | holds |
//! |---|---|
//! | [`raw`] | the fields that are read, as the API spells them |
//! | [`service`], [`endpoints`], [`cluster`] | one kind each, or a few |
//! | [`field`] | values of single fields: addresses, prefixes, ports, names |
//! | [`document`] | any object, or a list of them, by its kind |
//!
//! An object is used, or ignored because it asks for that, or refused with an error that names kind, object, field and limit.
//! What the API server would have filled in is filled in (clusterIPs from clusterIP, names of ports, protocols). Single values
//! that are unusable are left out where kube-proxy leaves them out, and reported. Pure: no I/O, no clock.

pub mod cluster;
pub mod document;
pub mod endpoints;
pub mod field;
pub mod raw;
pub mod service;

#[cfg(test)]
mod tests;

use crate::model::{Interner, Kind, Name, Object, ObjectKey, ObjectProblem};

/// What an object means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Meaning {
    /// It counts.
    Object(Object),
    /// It does not count, as if it were not there.
    Ignored(Ignored),
}

/// Why an object does not count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Ignored {
    /// A service without addresses of its own.
    #[error("it is headless")]
    Headless,
    /// A service that is a name.
    #[error("it is an ExternalName")]
    ExternalName,
    /// Another proxy serves it.
    #[error("its label service.kubernetes.io/service-proxy-name asks for another proxy")]
    OtherProxy,
    /// A slice of no service.
    #[error("it has no label kubernetes.io/service-name")]
    NoService,
}

/// A decoded object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decoded {
    /// Which object.
    pub key: ObjectKey,
    /// What it means.
    pub meaning: Meaning,
    /// Values in it that were left out.
    pub problems: Vec<FieldError>,
}

/// A value that cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// Path of the field in the object.
    pub field: String,
    /// What is wrong with it: names the value and the limit.
    pub message: String,
}

impl FieldError {
    /// An error at a field.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

/// An object that cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {error}", self.place())]
pub struct Error {
    /// Which object, if it says so.
    pub key: Option<ObjectKey>,
    /// What is wrong.
    pub error: FieldError,
}

impl Error {
    fn place(&self) -> String {
        self.key.as_ref().map_or("an object without a name".to_owned(), ToString::to_string)
    }
}

impl From<&Error> for ObjectProblem {
    fn from(error: &Error) -> Self {
        Self { place: error.place(), object: error.key.clone(), message: error.error.to_string() }
    }
}

/// Decoding of one object: who it is, what has been left out, and the names that are shared.
struct Context<'a> {
    key: ObjectKey,
    problems: Vec<FieldError>,
    interner: &'a mut Interner,
}

impl<'a> Context<'a> {
    /// Begins with an object's name; `default` namespace if it has none and its kind has namespaces.
    fn new(kind: Kind, metadata: &raw::Metadata, interner: &'a mut Interner) -> Result<Self, Error> {
        let has_namespace = !matches!(kind, Kind::Node | Kind::ServiceCidr);
        let given = metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty());
        let namespace = if has_namespace { given.unwrap_or("default") } else { "" };
        let name = metadata.name.as_deref().unwrap_or_default();
        let named = field::check_name("metadata.name", name).and_then(|()| match has_namespace {
            true => field::check_name("metadata.namespace", namespace),
            false => Ok(()),
        });
        match named {
            Ok(()) => Ok(Self {
                key: ObjectKey { kind, namespace: interner.name(namespace), name: interner.name(name) },
                problems: Vec::new(),
                interner,
            }),
            Err(error) => {
                let short = |text: &str| Name::from(text.chars().take(NAME_SHOWN).collect::<String>().as_str());
                let key = ObjectKey { kind, namespace: short(namespace), name: short(name) };
                Err(Error { key: (!name.is_empty()).then_some(key), error })
            }
        }
    }

    fn left_out(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.problems.push(FieldError::new(field, message));
    }

    fn refuse(&self, error: FieldError) -> Error {
        Error { key: Some(self.key.clone()), error }
    }

    fn is(self, meaning: Meaning) -> Decoded {
        Decoded { key: self.key, meaning, problems: self.problems }
    }
}

/// How much of an unusable name is repeated in messages.
const NAME_SHOWN: usize = 80;
