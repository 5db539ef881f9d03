//! A file's text to objects.

use serde_json::Value;

use crate::model::Interner;
use crate::source::decode::document::{Item, decode_document};

/// Text that is neither YAML nor JSON, or is cut off.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not YAML.
    #[error("does not parse as YAML: {0}")]
    Yaml(String),
    /// Not JSON.
    #[error("does not parse as JSON: {0}")]
    Json(serde_json::Error),
}

/// How a file's text is to be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Documents separated by `---`.
    Yaml,
    /// Values one after the other.
    Json,
}

impl Format {
    /// The format of a file by its name, or `None` if it is not a manifest.
    pub fn of_file(name: &str) -> Option<Self> {
        if name.starts_with('.') {
            return None;
        }
        match name.rsplit_once('.')?.1 {
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// All objects of a file; if any part of it does not parse, none.
pub fn parse_file(format: Format, text: &[u8], interner: &mut Interner) -> Result<Vec<Item>, Error> {
    match format {
        Format::Yaml => parse_yaml(text, interner),
        Format::Json => {
            let values = serde_json::Deserializer::from_slice(text).into_iter();
            collect(values.map(|value| value.map_err(Error::Json)), interner)
        }
    }
}

/// Limits what a small file can blow up to, not how long an honest list may be.
const MOST_YAML_NODES: usize = 1 << 26;

fn parse_yaml(mut text: &[u8], interner: &mut Interner) -> Result<Vec<Item>, Error> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: MOST_YAML_NODES,
            max_events: 2 * MOST_YAML_NODES,
        },
        strict_booleans: true,
        with_snippet: false,
    };
    let documents = serde_saphyr::read_with_options::<_, Value>(&mut text, options);
    collect(documents.map(|document| document.map_err(|error| Error::Yaml(error.to_string()))), interner)
}

/// Documents are decoded one by one, so that a big file is never held as values.
fn collect(documents: impl Iterator<Item = Result<Value, Error>>, interner: &mut Interner) -> Result<Vec<Item>, Error> {
    let mut items = Vec::new();
    for document in documents {
        items.extend(decode_document(document?, interner));
    }
    Ok(items)
}
