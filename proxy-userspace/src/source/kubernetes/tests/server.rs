//! An API server that answers as it is told to, on a loopback port.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// An answer.
pub enum Reply {
    /// A whole one.
    Body(u16, String),
    /// One that comes in pieces.
    Pieces(mpsc::UnboundedReceiver<Piece>),
}

/// A piece of an answer.
pub enum Piece {
    Bytes(Vec<u8>),
    /// The proper end.
    End,
    /// The connection is cut.
    Cut,
}

/// A running server; dropped, it and its connections end.
pub struct Server {
    pub addr: SocketAddr,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    replies: BTreeMap<String, VecDeque<Reply>>,
    asked: Vec<String>,
    token: Option<String>,
    identity: String,
    /// Of the newest list of each resource.
    versions: BTreeMap<String, u32>,
    /// Senders of watches that nobody directs: they stay open.
    open: Vec<mpsc::UnboundedSender<Piece>>,
}

impl Server {
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn start_at(addr: SocketAddr) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State { identity: "store-1".into(), ..State::default() }));
        let shared = state.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, shared.clone()));
            }
        });
        Self { addr, state, task }
    }

    /// The next answer to requests of a name: `list services`, `probe services`, `watch services`, and the like.
    pub fn reply(&self, name: &str, reply: Reply) {
        self.state.lock().unwrap().replies.entry(name.to_owned()).or_default().push_back(reply);
    }

    /// The next answer is a whole list.
    pub fn list(&self, resource: &str, version: u32, items: &[String]) {
        self.state.lock().unwrap().versions.insert(resource.to_owned(), version);
        self.reply(&format!("list {resource}"), Reply::Body(200, page(version, None, items)));
    }

    /// The next watch is directed by what is sent here.
    pub fn watch(&self, resource: &str) -> Watch {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.reply(&format!("watch {resource}"), Reply::Pieces(receiver));
        Watch(sender)
    }

    /// Requests with another token are refused.
    pub fn set_token(&self, token: &str) {
        self.state.lock().unwrap().token = Some(token.to_owned());
    }

    /// From now on another store is behind it.
    pub fn set_identity(&self, uid: &str) {
        self.state.lock().unwrap().identity = uid.to_owned();
    }

    /// The requests for a resource so far, in the words of [`Self::reply`]; watches with their version.
    pub fn asked(&self, resource: &str) -> Vec<String> {
        let state = self.state.lock().unwrap();
        state.asked.iter().filter(|asked| asked.split(' ').nth(1) == Some(resource)).cloned().collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Directs a watch.
pub struct Watch(mpsc::UnboundedSender<Piece>);

impl Watch {
    pub fn bytes(&self, bytes: impl Into<Vec<u8>>) {
        self.0.send(Piece::Bytes(bytes.into())).unwrap();
    }

    pub fn event(&self, kind: &str, object: &str) {
        self.bytes(event(kind, object));
    }

    pub fn end(self) {
        self.0.send(Piece::End).unwrap();
    }

    pub fn cut(self) {
        self.0.send(Piece::Cut).unwrap();
    }
}

pub fn event(kind: &str, object: &str) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

pub fn page(version: u32, next: Option<&str>, items: &[String]) -> String {
    let next = next.map(|token| format!(",\"continue\":\"{token}\"")).unwrap_or_default();
    format!("{{\"metadata\":{{\"resourceVersion\":\"{version}\"{next}}},\"items\":[{}]}}", items.join(","))
}

pub fn status(code: u16) -> String {
    format!("{{\"kind\":\"Status\",\"code\":{code},\"status\":\"Failure\",\"message\":\"told to\",\"reason\":\"x\"}}")
}

async fn serve(stream: TcpStream, state: Arc<Mutex<State>>) {
    let mut stream = BufReader::new(stream);
    while let Some((target, token)) = read_request(&mut stream).await {
        let reply = answer(&mut state.lock().unwrap(), &target, token.as_deref());
        if !write_reply(stream.get_mut(), reply).await {
            return;
        }
    }
}

/// Path with query, and the bearer token.
async fn read_request(stream: &mut BufReader<TcpStream>) -> Option<(String, Option<String>)> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok().filter(|length| *length > 0)?;
    let target = line.split(' ').nth(1)?.to_owned();
    let mut token = None;
    loop {
        line.clear();
        stream.read_line(&mut line).await.ok().filter(|length| *length > 0)?;
        if line.trim().is_empty() {
            return Some((target, token));
        }
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("authorization")
        {
            token = Some(value.trim().trim_start_matches("Bearer ").to_owned());
        }
    }
}

fn answer(state: &mut State, target: &str, token: Option<&str>) -> Reply {
    if state.token.is_some() && state.token.as_deref() != token {
        return Reply::Body(401, status(401));
    }
    let (path, query) = target.split_once('?').unwrap();
    if path.contains("/namespaces/") {
        let item = format!("{{\"metadata\":{{\"uid\":\"{}\"}}}}", state.identity);
        return Reply::Body(200, page(1, None, &[item]));
    }
    let resource = path.rsplit('/').next().unwrap();
    let value = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let name = match (value("watch"), value("limit"), value("continue")) {
        (Some(_), ..) => "watch",
        (_, Some("1"), _) => "probe",
        (.., Some(_)) => "next",
        _ => "list",
    };
    let name = format!("{name} {resource}");
    let detail = value("resourceVersion").or(value("continue")).or(value("fieldSelector"));
    state.asked.push(detail.map_or(name.clone(), |detail| format!("{name} {detail}")));
    let told = state.replies.get_mut(&name).and_then(VecDeque::pop_front);
    told.unwrap_or_else(|| match value("watch") {
        Some(_) => {
            let (sender, receiver) = mpsc::unbounded_channel();
            state.open.push(sender);
            Reply::Pieces(receiver)
        }
        None => Reply::Body(200, page(state.versions.get(resource).copied().unwrap_or(1), None, &[])),
    })
}

/// False if the connection has to end.
async fn write_reply(stream: &mut TcpStream, reply: Reply) -> bool {
    match reply {
        Reply::Body(code, body) => {
            let head = format!("HTTP/1.1 {code} x\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).await.is_ok()
        }
        Reply::Pieces(mut pieces) => {
            let head = b"HTTP/1.1 200 x\r\ntransfer-encoding: chunked\r\n\r\n";
            if stream.write_all(head).await.is_err() {
                return false;
            }
            loop {
                let chunk = match pieces.recv().await {
                    Some(Piece::Bytes(bytes)) => {
                        [format!("{:x}\r\n", bytes.len()).as_bytes(), &bytes, b"\r\n"].concat()
                    }
                    Some(Piece::End) => return stream.write_all(b"0\r\n\r\n").await.is_ok(),
                    Some(Piece::Cut) | None => return false,
                };
                if stream.write_all(&chunk).await.is_err() {
                    return false;
                }
            }
        }
    }
}
