//! Answers of the API server taken apart, as far as the protocol of lists and watches goes; objects stay text. Pure.

use serde::Deserialize;
use serde_json::value::RawValue;

/// One page of a list.
#[derive(Debug, PartialEq, Eq)]
pub struct Page<'a> {
    /// Which state of the store the list shows.
    pub version: String,
    /// Stands for the next page; `None` if this is the last.
    pub next: Option<String>,
    /// The objects.
    pub objects: Vec<&'a str>,
}

/// One line of a watch.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// An object is new or has changed.
    Put(&'a str, Version),
    /// An object is gone; as it was last.
    Gone(&'a str, Version),
    /// Nothing has changed up to here.
    Bookmark(Version),
    /// The watch cannot go on.
    Failed(Status),
    /// Something that a later server may tell.
    Unknown,
}

/// A state of the store: opaque but for [`is_older`]. `None` if it was not told.
pub type Version = Option<String>;

/// What the server says of a failure.
#[derive(Deserialize, Debug, PartialEq, Eq, Default)]
#[serde(default)]
pub struct Status {
    /// An HTTP status, or 0.
    pub code: u16,
    /// For people.
    pub message: String,
}

#[derive(Deserialize)]
struct RawPage<'a> {
    #[serde(default)]
    metadata: RawListMeta,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawListMeta {
    resource_version: Option<String>,
    r#continue: Option<String>,
}

#[derive(Deserialize)]
struct RawEvent<'a> {
    r#type: String,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawObject {
    metadata: RawMeta,
}

/// What the protocol needs of an object.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawMeta {
    resource_version: Version,
    uid: Option<String>,
}

/// Takes a page apart. Errors: it is no JSON, or no list.
pub fn parse_page(text: &[u8]) -> Result<Page<'_>, serde_json::Error> {
    let page: RawPage<'_> = serde_json::from_slice(text)?;
    Ok(Page {
        version: page.metadata.resource_version.unwrap_or_default(),
        next: page.metadata.r#continue.filter(|token| !token.is_empty()),
        objects: page.items.into_iter().flatten().map(RawValue::get).collect(),
    })
}

/// Takes a line of a watch apart. Errors: it is no JSON, or no event.
pub fn parse_event(line: &[u8]) -> Result<Event<'_>, serde_json::Error> {
    let RawEvent { r#type, object } = serde_json::from_slice(line)?;
    let object = object.get();
    Ok(match r#type.as_str() {
        "ADDED" | "MODIFIED" => Event::Put(object, version(object)),
        "DELETED" => Event::Gone(object, version(object)),
        "BOOKMARK" => Event::Bookmark(version(object)),
        "ERROR" => Event::Failed(serde_json::from_str(object).unwrap_or_default()),
        _ => Event::Unknown,
    })
}

/// An object whose version cannot be read is still an object: its decoding tells what is wrong with it.
fn version(object: &str) -> Version {
    meta(object).resource_version.filter(|version| !version.is_empty())
}

fn meta(object: &str) -> RawMeta {
    serde_json::from_str::<RawObject>(object).unwrap_or_default().metadata
}

/// The uid of the only object of a page.
pub fn parse_uid(page: &Page<'_>) -> Option<String> {
    page.objects.first().and_then(|object| meta(object).uid)
}

/// True if `a` was before `b`. False if that cannot be told: only decimal numbers are compared (KEP-5504).
pub fn is_older(a: &str, b: &str) -> bool {
    matches!((a.parse::<u128>(), b.parse::<u128>()), (Ok(a), Ok(b)) if a < b)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pages() {
        let text =
            br#"{"kind":"ServiceList","metadata":{"resourceVersion":"7","continue":"t"},"items":[{"a":"}]"}, null]}"#;
        let page = parse_page(text).unwrap();
        let expected = Page { version: "7".into(), next: Some("t".into()), objects: vec![r#"{"a":"}]"}"#, "null"] };
        assert_eq!(page, expected);
        let empty = Page { version: "8".into(), next: None, objects: vec![] };
        assert_eq!(parse_page(br#"{"metadata":{"resourceVersion":"8","continue":""},"items":null}"#).unwrap(), empty);
        for text in [&b"<html>"[..], b"", b"[]", br#"{"items":{}}"#, br#"{"items":[{]}"#] {
            assert!(parse_page(text).is_err(), "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn events() {
        let object = r#"{"metadata":{"name":"a","resourceVersion":"7"}}"#;
        let event = |kind: &str, object: &str| format!(r#"{{"type":"{kind}","object":{object}}}"#);
        let version = Some("7".to_owned());
        assert_eq!(parse_event(event("ADDED", object).as_bytes()).unwrap(), Event::Put(object, version.clone()));
        assert_eq!(parse_event(event("MODIFIED", object).as_bytes()).unwrap(), Event::Put(object, version.clone()));
        assert_eq!(parse_event(event("DELETED", object).as_bytes()).unwrap(), Event::Gone(object, version.clone()));
        assert_eq!(parse_event(event("BOOKMARK", object).as_bytes()).unwrap(), Event::Bookmark(version));
        assert_eq!(parse_event(event("ADDED", "[1]").as_bytes()).unwrap(), Event::Put("[1]", None));
        assert_eq!(parse_event(event("NEWER", "{}").as_bytes()).unwrap(), Event::Unknown);
        let gone = Status { code: 410, message: "too old".into() };
        let told = event("ERROR", r#"{"kind":"Status","code":410,"message":"too old"}"#);
        assert_eq!(parse_event(told.as_bytes()).unwrap(), Event::Failed(gone));
        assert_eq!(parse_event(event("ERROR", "null").as_bytes()).unwrap(), Event::Failed(Status::default()));
    }

    #[test]
    fn versions_are_compared_as_numbers_and_else_not_at_all() {
        assert!(is_older("9", "10") && !is_older("10", "9") && !is_older("9", "9"));
        assert!(!is_older("a", "b") && !is_older("1", "b") && !is_older("", "1"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = (parse_page(&bytes), parse_event(&bytes));
        }
    }
}
