//! Events written to the API server: the one thing that the agent says there. The stock role allows it (create and patch).
//!
//! As `events.k8s.io/v1`, which kube-proxy 1.36 writes too. The name of an event follows from what it says, so that nodes
//! which see the same meet at one object: the first makes it, the others are told that it is there. May touch: the API server.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use http::Method;
use http::header::{CONTENT_TYPE, HeaderValue};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::access::{self, Access};
use super::query::{Ask, ask_object};
use super::session::{Connection, Error, Limits};
use super::wire::{parse_page, parse_uid};
use crate::error::chain;
use crate::model::{Kind, Name, ObjectKey};
use crate::telemetry::event::book::{Due, Outcome};
use crate::telemetry::event::notice::{Regarding, Scope};

/// For an answer: an event is not worth more.
const ANSWER: Duration = Duration::from_secs(10);
/// Bytes of a note, at most (validation of events.k8s.io/v1).
const NOTE_BYTES: usize = 1024;
/// Bytes of an object's name in the name of an event, which has 253 in all.
const NAME_BYTES: usize = 253 - 1 - 16;
/// Bytes of `reportingInstance`, at most (validation of events.k8s.io/v1).
const INSTANCE_BYTES: usize = 128;
/// Where events about objects without a namespace are.
const NO_NAMESPACE: &str = "default";
/// Who reports.
const CONTROLLER: &str = "shunt";

/// Who writes events.
#[derive(Debug)]
pub struct Herald {
    connection: Connection,
    node: Name,
    started: SystemTime,
}

impl Herald {
    /// One for the agent of `node`, which started at `started`. Connects to nobody yet.
    pub async fn open(access: Access, node: Name, started: SystemTime) -> Result<Self, access::Error> {
        let limits = Limits { answer: ANSWER, watch: ANSWER };
        Ok(Self { connection: Connection::open(access, limits).await?, node, started })
    }

    /// Writes an event, or how often it has been told by now.
    pub async fn write(&self, due: &Due) -> Outcome {
        match self.try_write(due).await {
            Ok(outcome) => outcome,
            Err(error) if is_final(&error) => Outcome::Refused(chain(&error)),
            Err(error) => Outcome::Failed(chain(&error)),
        }
    }

    async fn try_write(&self, due: &Due) -> Result<Outcome, Error> {
        let Some(about) = self.look_up(&due.notice.regarding).await? else { return Ok(Outcome::Gone) };
        let name = self.event_name(due, &about);
        if due.is_begun {
            match self.connection.fetch(patch(&about, &name, due)).await {
                Err(error) if error.code() == Some(404) => {}
                answer => return answer.map(|_| Outcome::Written),
            }
        }
        match self.connection.fetch(create(&about, &name, &self.node, due)).await {
            Err(error) if error.code() == Some(409) => Ok(Outcome::Known),
            answer => answer.map(|_| Outcome::Written),
        }
    }

    /// What the server knows of an object; none if it is not there.
    async fn look_up(&self, regarding: &Regarding) -> Result<Option<About>, Error> {
        let key = match regarding {
            Regarding::Node => return Ok(Some(About::node(&self.node))),
            Regarding::Object(key) if key.kind == Kind::Node => return Ok(Some(About::node(&key.name))),
            Regarding::Object(key) => key,
        };
        let answer = self.connection.fetch(ask_object(key)).await?;
        let page = parse_page(&answer).map_err(Error::Unreadable)?;
        Ok(parse_uid(&page).map(|uid| About { key: key.clone(), uid }))
    }

    fn event_name(&self, due: &Due, about: &About) -> String {
        let notice = &due.notice;
        let mut text = format!("{}\n{}\n{}\n{}", about.uid, notice.reason, notice.action, notice.note);
        if notice.scope == Scope::Node {
            // An agent that was started anew counts anew.
            let started = self.started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
            write!(text, "\n{}\n{started}", self.node).expect("a string takes all text");
        }
        let name = cut(about.key.name.as_str(), NAME_BYTES);
        format!("{name}.{:016x}", hash(text.as_bytes()))
    }
}

/// True if the same request will be answered the same way.
fn is_final(error: &Error) -> bool {
    matches!(error.code(), Some(code @ 400..500) if ![401, 408, 429].contains(&code))
}

/// Whom an event is about.
struct About {
    key: ObjectKey,
    uid: String,
}

impl About {
    /// Kubelets and kube-proxy give the node's name for its uid, and `kubectl describe node` asks for both.
    fn node(name: &Name) -> Self {
        let key = ObjectKey { kind: Kind::Node, namespace: Name::from(""), name: name.clone() };
        Self { key, uid: name.to_string() }
    }

    fn event_namespace(&self) -> &str {
        let namespace = self.key.namespace.as_str();
        if namespace.is_empty() { NO_NAMESPACE } else { namespace }
    }

    fn path(&self) -> String {
        format!("/apis/events.k8s.io/v1/namespaces/{}/events", self.event_namespace())
    }

    fn reference(&self) -> Value {
        let ObjectKey { kind, namespace, name } = &self.key;
        let mut reference = json!({
            "apiVersion": api_version(*kind), "kind": kind.to_string(), "name": name.as_str(), "uid": self.uid,
        });
        if !namespace.as_str().is_empty() {
            reference["namespace"] = namespace.as_str().into();
        }
        reference
    }
}

fn api_version(kind: Kind) -> &'static str {
    match kind {
        Kind::Service | Kind::Endpoints | Kind::Node => "v1",
        Kind::EndpointSlice => "discovery.k8s.io/v1",
        Kind::ServiceCidr => "networking.k8s.io/v1",
    }
}

fn create(about: &About, name: &str, node: &Name, due: &Due) -> Ask {
    let notice = &due.notice;
    let instance = format!("{CONTROLLER}-{node}");
    let mut event = json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": about.event_namespace()},
        "eventTime": micro_time(due.first),
        "type": if notice.is_warning { "Warning" } else { "Normal" },
        "reason": notice.reason,
        "action": notice.action,
        "note": cut(&notice.note, NOTE_BYTES),
        "regarding": about.reference(),
        "reportingController": CONTROLLER,
        "reportingInstance": cut(&instance, INSTANCE_BYTES),
    });
    if due.count > 1 {
        event["series"] = series(due);
    }
    ask(Method::POST, &about.path(), "application/json", &event)
}

fn patch(about: &About, name: &str, due: &Due) -> Ask {
    let path = format!("{}/{name}", about.path());
    ask(Method::PATCH, &path, "application/merge-patch+json", &json!({"series": series(due)}))
}

fn series(due: &Due) -> Value {
    json!({"count": due.count, "lastObservedTime": micro_time(due.last)})
}

fn ask(method: Method, path: &str, content_type: &'static str, body: &Value) -> Ask {
    let body = serde_json::to_vec(body).expect("a value has a JSON form");
    let request = http::Request::builder().method(method).uri(path);
    let request = request.header(CONTENT_TYPE, HeaderValue::from_static(content_type));
    request.body(body).expect("names of objects are parts of a path: the API server has checked them")
}

/// RFC 3339 with the six digits of Kubernetes' MicroTime.
fn micro_time(time: SystemTime) -> String {
    let time = Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{time:.6}")
}

/// The beginning of a text, in whole characters.
fn cut(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

/// FNV-1a with 64 bits: the same in every version of the agent, which the hashes of libraries do not promise.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::event::notice::Notice;

    fn due(notice: Notice, count: u32) -> Due {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        Due { notice, first: at(1), last: at(2), count, is_begun: count > 1 }
    }

    fn body(ask: &Ask) -> Value {
        serde_json::from_slice(ask.body()).unwrap()
    }

    #[test]
    fn an_event_as_the_server_takes_it() {
        let node = Name::from("node-a");
        let about = About::node(&node);
        let first = due(Notice::of_node("Broken", "Repair", "x".repeat(2000)), 1);
        let ask = create(&about, "n.1", &node, &first);
        assert_eq!(
            (ask.method(), ask.uri().path()),
            (&Method::POST, "/apis/events.k8s.io/v1/namespaces/default/events")
        );
        let event = body(&ask);
        assert_eq!(event["eventTime"], "1970-01-01T00:00:01.000000Z");
        assert_eq!(event["regarding"], json!({"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "node-a"}));
        assert_eq!(event["note"].as_str().map(str::len), Some(NOTE_BYTES));
        assert_eq!((&event["type"], &event["reportingInstance"]), (&json!("Warning"), &json!("shunt-node-a")));
        assert!(event.get("series").is_none(), "a series begins with the second time");
    }

    #[test]
    fn what_is_told_again_changes_the_series_alone() {
        let key = ObjectKey { kind: Kind::Service, namespace: Name::from("shop"), name: Name::from("web") };
        let about = About { key, uid: "u".into() };
        let ask = patch(&about, "web.1", &due(Notice::of_node("A", "B", "c"), 3));
        assert_eq!(
            (ask.method(), ask.uri().path()),
            (&Method::PATCH, "/apis/events.k8s.io/v1/namespaces/shop/events/web.1")
        );
        assert_eq!(body(&ask), json!({"series": {"count": 3, "lastObservedTime": "1970-01-01T00:00:02.000000Z"}}));
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!((cut("aé", 2), cut("aé", 3), cut("a", 9)), ("a", "aé", "a"));
    }

    #[test]
    fn hashes_are_those_of_the_definition() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
