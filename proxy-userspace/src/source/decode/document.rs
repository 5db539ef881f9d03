//! Any object, or a list of them, by its kind.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::cluster::{decode_node, decode_service_cidr};
use super::endpoints::{decode_endpoints, decode_slice};
use super::service::decode_service;
use super::{Decoded, Error, FieldError};
use crate::model::{Interner, Kind, ObjectKey};

/// What a document holds.
#[derive(Debug)]
pub enum Item {
    /// An object of a kind that is read.
    Object(Result<Decoded, Error>),
    /// An object of another kind.
    OtherKind {
        /// Its apiVersion and kind.
        kind: String,
    },
}

/// The objects of a document, those of lists one by one.
pub fn decode_document(document: Value, interner: &mut Interner) -> Vec<Item> {
    let mut items = Vec::new();
    decode_into(document, None, interner, &mut items);
    items
}

/// `of_list`: what the entries of a typed list are, which do not say it themselves.
fn decode_into(document: Value, of_list: Option<(&str, &str)>, interner: &mut Interner, items: &mut Vec<Item>) {
    let text = |field: &str| document.get(field).and_then(Value::as_str).map(str::to_owned);
    let version = text("apiVersion").or_else(|| Some(of_list?.0.to_owned())).unwrap_or_default();
    let name = text("kind").or_else(|| Some(of_list?.1.to_owned())).unwrap_or_default();
    match kind(&version, &name) {
        Some(kind) => items.push(Item::Object(decode_object(kind, document, interner))),
        None => match list_items(&name, document) {
            Ok(entries) => {
                let entry = name.strip_suffix("List").filter(|entry| !entry.is_empty());
                for value in entries {
                    decode_into(value, entry.map(|entry| (version.as_str(), entry)), interner, items);
                }
            }
            Err(_) => items.push(Item::OtherKind { kind: format!("{version} {name}").trim().to_owned() }),
        },
    }
}

/// The kind of an object, if it is one that is read. Other API groups have kinds of the same names.
fn kind(version: &str, name: &str) -> Option<Kind> {
    match (version, name) {
        ("v1", "Service") => Some(Kind::Service),
        ("v1", "Endpoints") => Some(Kind::Endpoints),
        ("v1", "Node") => Some(Kind::Node),
        ("discovery.k8s.io/v1", "EndpointSlice") => Some(Kind::EndpointSlice),
        ("networking.k8s.io/v1" | "networking.k8s.io/v1beta1", "ServiceCIDR") => Some(Kind::ServiceCidr),
        _ => None,
    }
}

/// The entries of a list, or the document back if it is none.
fn list_items(kind: &str, mut document: Value) -> Result<Vec<Value>, Value> {
    match document.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) if kind.ends_with("List") => Ok(items),
        Some(Value::Null) if kind.ends_with("List") => Ok(Vec::new()),
        _ => Err(document),
    }
}

/// One object of a known kind.
pub fn decode_object(kind: Kind, object: Value, interner: &mut Interner) -> Result<Decoded, Error> {
    decode(kind, object, interner)
}

/// One object of a known kind, from its text as JSON: nothing is built but what is read.
pub fn decode_json(kind: Kind, object: &str, interner: &mut Interner) -> Result<Decoded, Error> {
    decode(kind, object, interner)
}

fn decode(kind: Kind, object: impl Fields, interner: &mut Interner) -> Result<Decoded, Error> {
    match kind {
        Kind::Service => decode_service(object.read(kind, interner)?, interner),
        Kind::EndpointSlice => decode_slice(object.read(kind, interner)?, interner),
        Kind::Endpoints => decode_endpoints(object.read(kind, interner)?, interner),
        Kind::Node => decode_node(object.read(kind, interner)?, interner),
        Kind::ServiceCidr => decode_service_cidr(object.read(kind, interner)?, interner),
    }
}

/// What an object can be read from. An error names the field whose type is wrong.
trait Fields {
    fn read<T: DeserializeOwned>(self, kind: Kind, interner: &mut Interner) -> Result<T, Error>;
}

impl Fields for Value {
    fn read<T: DeserializeOwned>(self, kind: Kind, interner: &mut Interner) -> Result<T, Error> {
        typed(kind, self, interner)
    }
}

impl Fields for &str {
    fn read<T: DeserializeOwned>(self, kind: Kind, interner: &mut Interner) -> Result<T, Error> {
        // What does not fit is read a second time, for the name of the field.
        serde_json::from_str(self).or_else(|error| match serde_json::from_str(self) {
            Ok(object) => typed(kind, object, interner),
            Err(_) => Err(Error { key: None, error: FieldError::new("", error.to_string()) }),
        })
    }
}

/// The fields of an object; an error names the field whose type is wrong.
fn typed<T: DeserializeOwned>(kind: Kind, object: Value, interner: &mut Interner) -> Result<T, Error> {
    let key = key_of(kind, &object, interner);
    serde_path_to_error::deserialize(object).map_err(|error| {
        let field = error.path().to_string();
        Error { key, error: FieldError::new(field, error.into_inner().to_string()) }
    })
}

/// Who an object is, as far as that can be read.
fn key_of(kind: Kind, object: &Value, interner: &mut Interner) -> Option<ObjectKey> {
    let metadata = object.get("metadata")?;
    let name = metadata.get("name")?.as_str()?;
    let namespace = match kind {
        Kind::Node | Kind::ServiceCidr => "",
        _ => metadata.get("namespace").and_then(Value::as_str).unwrap_or("default"),
    };
    Some(ObjectKey { kind, namespace: interner.name(namespace), name: interner.name(name) })
}
