//! A small blocking client of the Kubernetes API on raw JSON, for tests: it speaks from inside a network namespace, as the
//! identity of a kubeconfig.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;
use ureq::Agent;
use ureq::http::{Method, Request, Response};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{ConnectionDetails, Connector, RustlsConnector, TcpConnector};

use super::kind::Kind;
use super::watch::Watch;
use crate::netns::Netns;

/// The name under which tests own fields they apply.
const FIELD_MANAGER: &str = "shunt-tests";

/// For one request, not for a watch. The server's own limit is a minute.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes of one answer: the list of 10,000 services with 10 endpoints each stays below.
const ANSWER_LIMIT: u64 = 1 << 30;

/// Kept for the next request. A kubelet's pods all report at once, and a new connection costs a thread and a handshake.
const IDLE_CONNECTIONS: usize = 32;

/// Why a request brought nothing.
#[derive(Debug, Error)]
pub enum Error {
    /// The server said no.
    #[error("{code} {reason}: {message}")]
    Refused {
        /// HTTP status, or the `code` of a watch's Status.
        code: u16,
        /// One of Kubernetes' StatusReasons, such as `NotFound`.
        reason: String,
        /// For a person.
        message: String,
    },
    /// No answer, or only a part of one.
    #[error("API server not reached")]
    Unreachable(#[source] Box<ureq::Error>),
    /// An answer that is no JSON, or a stream that broke off.
    #[error("unreadable answer")]
    Unreadable(#[source] serde_json::Error),
}

impl Error {
    /// True if the server refused with this HTTP status.
    pub fn is_code(&self, wanted: u16) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == wanted)
    }

    /// What a Status object says.
    pub(super) fn from_status(status: &Value, http_code: u16) -> Self {
        let text = |key: &str| status[key].as_str().unwrap_or_default().to_owned();
        let code = status["code"].as_u64().and_then(|code| u16::try_from(code).ok()).unwrap_or(http_code);
        Self::Refused { code, reason: text("reason"), message: text("message") }
    }
}

impl From<ureq::Error> for Error {
    fn from(error: ureq::Error) -> Self {
        Self::Unreachable(Box::new(error))
    }
}

/// A change to a part of an object.
#[derive(Clone, Debug)]
pub enum Patch {
    /// RFC 7396: lists are replaced, null removes.
    Merge(Value),
    /// Kubernetes' own: lists with a merge key are merged by it.
    Strategic(Value),
    /// RFC 6902: a list of operations.
    Json(Value),
}

impl Patch {
    fn parts(&self) -> (&'static str, &Value) {
        match self {
            Self::Merge(body) => ("application/merge-patch+json", body),
            Self::Strategic(body) => ("application/strategic-merge-patch+json", body),
            Self::Json(body) => ("application/json-patch+json", body),
        }
    }
}

/// The objects of one kind as they were at one time.
#[derive(Clone, Debug)]
pub struct List {
    /// Each with its `apiVersion` and `kind`, which the server leaves out in lists.
    pub items: Vec<Value>,
    /// Where a watch goes on from.
    pub resource_version: String,
}

/// The API as one identity sees it. Clones share connections.
#[derive(Clone, Debug)]
pub struct Api {
    access: Arc<Access>,
    agent: Agent,
}

#[derive(Debug)]
struct Access {
    server: String,
    authorization: String,
    roots: RootCerts,
    ns: Arc<Netns>,
}

impl Api {
    /// A client whose connections are made inside `ns`. Panics if the file is not one that a control plane wrote: JSON, one
    /// context, a token and a CA file.
    #[track_caller]
    pub fn from_kubeconfig(path: &Path, ns: &Arc<Netns>) -> Self {
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        let config: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let cluster = &config["clusters"][0]["cluster"];
        let text_of =
            |value: &Value| value.as_str().unwrap_or_else(|| panic!("{} is not complete", path.display())).to_owned();
        let access = Access {
            server: text_of(&cluster["server"]),
            authorization: format!("Bearer {}", text_of(&config["users"][0]["user"]["token"])),
            roots: read_roots(Path::new(&text_of(&cluster["certificate-authority"]))),
            ns: ns.clone(),
        };
        let agent = access.agent();
        Self { access: Arc::new(access), agent }
    }

    /// The same identity with connections of its own.
    pub fn reconnected(&self) -> Self {
        Self { access: self.access.clone(), agent: self.access.agent() }
    }

    /// Breaks every connection; requests and watches of this client and its clones end with an error, now and later.
    pub(super) fn shut_down(&self) {
        self.agent.clone().shutdown();
    }

    /// The objects of a kind in all namespaces, or the kind's objects if it knows no namespaces.
    pub fn all(&self, kind: Kind) -> Resource<'_> {
        Resource { api: self, kind, namespace: None }
    }

    /// The objects of a kind in one namespace.
    #[track_caller]
    pub fn namespaced<'a>(&'a self, kind: Kind, namespace: &'a str) -> Resource<'a> {
        assert!(kind.is_namespaced(), "{} knows no namespaces", kind.name());
        Resource { api: self, kind, namespace: Some(namespace) }
    }

    /// Creates `object` where its metadata says (namespace `default` if it says nothing) and returns it as stored.
    #[track_caller]
    pub fn create(&self, object: &Value) -> Result<Value, Error> {
        self.home_of(object).post(object)
    }

    /// Server-side apply, taking fields from other owners: what `object` says holds, what it said before and no longer says goes.
    #[track_caller]
    pub fn apply(&self, object: &Value) -> Result<Value, Error> {
        let home = self.home_of(object);
        let path = format!("{}?fieldManager={FIELD_MANAGER}&force=true", home.path_to(name_of(object)));
        self.send(Method::PATCH, &path, "application/apply-patch+yaml", object)
    }

    /// True if the server says that it is ready, false if it says otherwise or nothing.
    pub fn is_ready(&self) -> bool {
        self.fetch("/readyz", &[]).is_ok_and(|response| response.status().is_success())
    }

    /// The collection in which `object` lives.
    #[track_caller]
    fn home_of<'a>(&'a self, object: &'a Value) -> Resource<'a> {
        let kind = Kind::of(object);
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
        Resource { api: self, kind, namespace: kind.is_namespaced().then_some(namespace) }
    }

    fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, Error> {
        read_answer(self.fetch(path, query)?)
    }

    fn fetch(&self, path: &str, query: &[(&str, &str)]) -> Result<Response<ureq::Body>, Error> {
        let request = self.agent.get(format!("{}{path}", self.access.server)).query_pairs(query.iter().copied());
        let request = request.header("authorization", &self.access.authorization);
        Ok(request.config().timeout_global(Some(REQUEST_TIMEOUT)).build().call()?)
    }

    /// An answer whose body goes on until either side ends it.
    pub(super) fn stream(&self, path: &str, query: &[(&str, &str)]) -> Result<Response<ureq::Body>, Error> {
        let request = self.agent.get(format!("{}{path}", self.access.server)).query_pairs(query.iter().copied());
        let response = request.header("authorization", &self.access.authorization).call()?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response)) }
    }

    fn send(&self, method: Method, path: &str, content_type: &str, body: &Value) -> Result<Value, Error> {
        let request = Request::builder().method(method).uri(format!("{}{path}", self.access.server));
        let request = request.header("authorization", &self.access.authorization).header("content-type", content_type);
        let request = request.body(body.to_string()).map_err(ureq::Error::from)?;
        let request = self.agent.configure_request(request).timeout_global(Some(REQUEST_TIMEOUT)).build();
        read_answer(self.agent.run(request)?)
    }
}

/// The objects of one kind, of one namespace or of all.
#[derive(Clone, Copy, Debug)]
pub struct Resource<'a> {
    api: &'a Api,
    kind: Kind,
    namespace: Option<&'a str>,
}

impl Resource<'_> {
    /// One object.
    pub fn get(&self, name: &str) -> Result<Value, Error> {
        self.api.get(&self.path_to(name), &[])
    }

    /// All of them.
    pub fn list(&self) -> Result<List, Error> {
        self.list_labelled("")
    }

    /// Those with these labels, such as `app=web`.
    pub fn list_labelled(&self, selector: &str) -> Result<List, Error> {
        let mut answer = self.api.get(&self.path(), &[("labelSelector", selector)])?;
        let resource_version = answer["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned();
        let mut items = match answer["items"].take() {
            Value::Array(items) => items,
            _ => Vec::new(),
        };
        for item in &mut items {
            item["apiVersion"] = self.kind.api_version().into();
            item["kind"] = self.kind.name().into();
        }
        Ok(List { items, resource_version })
    }

    /// All changes after a resource version, as they happen; from `""`, first every object there is.
    pub fn watch(&self, resource_version: &str) -> Result<Watch, Error> {
        Watch::open(&self.api.reconnected(), &self.path(), resource_version)
    }

    /// The same over the client's own connections, so that shutting it down ends the watch.
    pub(super) fn watch_attached(&self, resource_version: &str) -> Result<Watch, Error> {
        Watch::open(self.api, &self.path(), resource_version)
    }

    /// Changes an object and returns it as stored.
    pub fn patch(&self, name: &str, patch: &Patch) -> Result<Value, Error> {
        let (content_type, body) = patch.parts();
        self.api.send(Method::PATCH, &self.path_to(name), content_type, body)
    }

    /// Changes an object's status and returns the object as stored.
    pub fn patch_status(&self, name: &str, patch: &Patch) -> Result<Value, Error> {
        let (content_type, body) = patch.parts();
        self.api.send(Method::PATCH, &format!("{}/status", self.path_to(name)), content_type, body)
    }

    /// Sets how many replicas a Deployment or ReplicaSet has.
    pub fn scale(&self, name: &str, replicas: u32) -> Result<Value, Error> {
        self.patch(name, &Patch::Merge(json!({"spec": {"replicas": replicas}})))
    }

    /// Deletes an object as its kind does by default: pods with their grace period, dependents in the background.
    pub fn delete(&self, name: &str) -> Result<(), Error> {
        self.delete_with(name, &json!({"propagationPolicy": "Background"}))
    }

    /// Deletes an object with DeleteOptions, such as `{"gracePeriodSeconds": 0}`.
    pub fn delete_with(&self, name: &str, options: &Value) -> Result<(), Error> {
        self.api.send(Method::DELETE, &self.path_to(name), "application/json", options).map(drop)
    }

    /// Puts a pod on a node, as a scheduler does.
    pub(super) fn bind(&self, pod: &str, node: &str) -> Result<(), Error> {
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let path = format!("{}/binding", self.path_to(pod));
        self.api.send(Method::POST, &path, "application/json", &binding).map(drop)
    }

    fn post(&self, object: &Value) -> Result<Value, Error> {
        self.api.send(Method::POST, &self.path(), "application/json", object)
    }

    fn path(&self) -> String {
        self.kind.path(self.namespace)
    }

    #[track_caller]
    fn path_to(&self, name: &str) -> String {
        assert!(
            self.namespace.is_some() || !self.kind.is_namespaced(),
            "{} {name}: in which namespace?",
            self.kind.name()
        );
        format!("{}/{name}", self.path())
    }
}

impl Access {
    fn agent(&self) -> Agent {
        let tls = TlsConfig::builder().root_certs(self.roots.clone()).build();
        // No proxy: the environment's is for the host's uplink.
        let config = Agent::config_builder().tls_config(tls).http_status_as_error(false).proxy(None);
        let config = config
            .timeout_connect(Some(REQUEST_TIMEOUT))
            .max_idle_connections_per_host(IDLE_CONNECTIONS)
            .max_idle_connections(IDLE_CONNECTIONS)
            .build();
        let connector =
            ().chain(NetnsConnector { ns: self.ns.clone(), tcp: TcpConnector::default() })
                .chain(RustlsConnector::default());
        Agent::with_parts(config, connector, DefaultResolver::default())
    }
}

/// Makes TCP connections inside a network namespace: a socket stays in the one its maker was in.
#[derive(Debug)]
struct NetnsConnector {
    ns: Arc<Netns>,
    tcp: TcpConnector,
}

impl Connector<()> for NetnsConnector {
    type Out = <TcpConnector as Connector<()>>::Out;

    fn connect(&self, details: &ConnectionDetails<'_>, chained: Option<()>) -> Result<Option<Self::Out>, ureq::Error> {
        self.ns.run(|| self.tcp.connect(details, chained))
    }
}

#[track_caller]
fn read_roots(path: &Path) -> RootCerts {
    let pem = fs::read(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let items = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    RootCerts::Specific(Arc::new(items.collect()))
}

fn read_answer(mut response: Response<ureq::Body>) -> Result<Value, Error> {
    if !response.status().is_success() {
        return Err(refusal(response));
    }
    let body = response.body_mut().with_config().limit(ANSWER_LIMIT).read_to_vec()?;
    serde_json::from_slice(&body).map_err(Error::Unreadable)
}

fn refusal(mut response: Response<ureq::Body>) -> Error {
    let code = response.status().as_u16();
    let text = response.body_mut().read_to_string().unwrap_or_default();
    let status = serde_json::from_str(&text).unwrap_or_else(|_| json!({"message": text}));
    Error::from_status(&status, code)
}

#[track_caller]
fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_else(|| panic!("an object without a name: {object}"))
}
