//! Small HTTP listeners: an address, and somebody who answers. What is asked and answered is the [`Handler`]'s affair.
//!
//! A listener lives in the network namespace of the process. An address that cannot be had is tried again for as long as
//! the agent runs: health and metrics are no reason to stop serving. May touch: its sockets.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HOST, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::event::notice::Alarm;
use crate::drain::Drain;

/// Between two attempts to get the address, as kube-proxy does it.
pub const BIND_RETRY: Duration = Duration::from_secs(5);
/// After a connection could not be accepted: file descriptors do not come back at once.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);
/// For a request's head, and between two requests.
const IDLE: Duration = Duration::from_secs(30);
/// A connection ends after that, so that one whose client does not read cannot stay for ever.
const LIFETIME: Duration = Duration::from_secs(300);
/// What a request under way gets when its connection shall end.
const LAST_ANSWER: Duration = Duration::from_secs(3);
/// More connections wait in the kernel.
const MAX_CONNECTIONS: usize = 64;

/// Who answers.
pub trait Handler: Send + Sync + 'static {
    /// True if it answers requests of this method.
    fn takes(&self, method: &Method) -> bool {
        matches!(*method, Method::GET | Method::HEAD)
    }

    /// What such a request gets.
    fn answer(&self, question: Question<'_>) -> impl Future<Output = Answer> + Send;
}

/// What is asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Question<'a> {
    /// Path, without the query.
    pub path: &'a str,
    /// What follows the path after a question mark, as it was sent.
    pub query: &'a str,
    /// The name by which the client asks (RFC 9110, 7.2); empty: it does not say.
    pub host: &'a str,
    /// What the client would like to get (RFC 9110, 12.5.1); empty: it does not say.
    pub accept: &'a str,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: StatusCode,
    /// Content type.
    pub content_type: &'static str,
    /// Content.
    pub body: String,
    /// A header beside those that every answer has.
    pub header: Option<(HeaderName, HeaderValue)>,
}

impl Answer {
    /// An answer for people.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: body.into(), header: None }
    }

    /// An answer for programs.
    pub fn json(status: StatusCode, body: String) -> Self {
        Self { status, content_type: "application/json", body, header: None }
    }

    /// There is nothing at this path; `paths` is what there is.
    pub fn not_found(paths: &[&str]) -> Self {
        Self::text(StatusCode::NOT_FOUND, format!("nothing is here; there is {}\n", paths.join(" ")))
    }
}

/// A listener to be.
#[derive(Debug)]
pub struct Server<H> {
    /// What it is for, in logs.
    pub name: &'static str,
    /// Where it listens.
    pub address: SocketAddr,
    /// Who answers.
    pub handler: Arc<H>,
    /// Who is told that the address cannot be had.
    pub alarm: Alarm,
}

impl<H: Handler> Server<H> {
    /// Answers until the drain; requests under way are answered then, for a short time.
    pub async fn run(self, mut drain: Drain) {
        let listener = tokio::select! {
            listener = self.bind() => listener,
            () = drain.wait() => return,
        };
        info!(listener = self.name, address = %self.address, "listening");
        self.serve(listener, drain).await;
    }

    /// The same, with a listener that is there.
    pub async fn serve(self, listener: TcpListener, mut drain: Drain) {
        let mut connections = JoinSet::new();
        let of_connections = drain.clone();
        tokio::select! {
            never = self.accept(&listener, &mut connections, &of_connections) => match never {},
            () = drain.wait() => {}
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }

    async fn bind(&self) -> TcpListener {
        let mut is_told = false;
        loop {
            match self.listen().await {
                Ok(listener) => return listener,
                Err(error) => {
                    warn!(listener = self.name, address = %self.address, %error, "cannot listen, trying again in 5 s");
                    if !std::mem::replace(&mut is_told, true) {
                        self.alarm.ring(format!("cannot listen on {}: {error}; it is tried again", self.address));
                    }
                }
            }
            sleep(BIND_RETRY).await;
        }
    }

    /// A wildcard or loopback address of IPv6 is that of IPv4 where there is no IPv6.
    async fn listen(&self) -> io::Result<TcpListener> {
        let refused = match TcpListener::bind(self.address).await {
            Ok(listener) => return Ok(listener),
            Err(error) => error,
        };
        let Some(instead) = without_ipv6(self.address, &refused) else { return Err(refused) };
        let listener = TcpListener::bind(instead).await?;
        warn!(listener = self.name, address = %self.address, %instead, "there is no IPv6 here: listening in IPv4 alone");
        Ok(listener)
    }

    async fn accept(&self, listener: &TcpListener, connections: &mut JoinSet<()>, drain: &Drain) -> Infallible {
        loop {
            tokio::select! {
                Some(_) = connections.join_next() => {}
                accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                    Ok((stream, _)) => _ = connections.spawn(serve(stream, self.handler.clone(), drain.clone())),
                    Err(error) => {
                        warn!(listener = self.name, %error, "cannot accept a connection");
                        sleep(ACCEPT_RETRY).await;
                    }
                },
            }
        }
    }
}

/// The address of IPv4 that means the same as one of IPv6, if that one was refused because there is no IPv6 on this node.
fn without_ipv6(address: SocketAddr, refused: &io::Error) -> Option<SocketAddr> {
    let SocketAddr::V6(v6) = address else { return None };
    let is_switched_off = refused.raw_os_error() == Some(libc::EAFNOSUPPORT);
    let is_unbound = is_switched_off || refused.kind() == io::ErrorKind::AddrNotAvailable;
    let instead = match v6.ip() {
        ip if ip.is_unspecified() && is_switched_off => Ipv4Addr::UNSPECIFIED,
        ip if ip.is_loopback() && is_unbound => Ipv4Addr::LOCALHOST,
        _ => return None,
    };
    Some((instead, v6.port()).into())
}

async fn serve<H: Handler>(stream: TcpStream, handler: Arc<H>, mut drain: Drain) {
    let service = service_fn(move |request: Request<Incoming>| {
        let handler = handler.clone();
        async move { Ok::<_, Infallible>(respond(&*handler, &request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // Names of headers mean the same in any case (RFC 9110, 5.1); scripts look for them as Go writes them.
        .title_case_headers(true)
        .header_read_timeout(IDLE)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return tell(ended),
        () = sleep(LIFETIME) => {}
        () = drain.wait() => {}
    }
    connection.as_mut().graceful_shutdown();
    if let Ok(ended) = timeout(LAST_ANSWER, connection).await {
        tell(ended);
    }
}

fn tell(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        debug!(%error, "a connection of a listener ended early");
    }
}

async fn respond<H: Handler>(handler: &H, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let is_known = handler.takes(request.method());
    let answer = if is_known {
        let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let uri = request.uri();
        let question = Question {
            path: uri.path(),
            query: uri.query().unwrap_or_default(),
            host: header(HOST),
            accept: header(ACCEPT),
        };
        handler.answer(question).await
    } else {
        Answer::text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered\n")
    };
    let mut response = Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = answer.status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.extend(answer.header);
    if !is_known {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::drain;

    struct Echo;

    impl Handler for Echo {
        async fn answer(&self, question: Question<'_>) -> Answer {
            Answer::text(
                StatusCode::OK,
                format!("{} {} {}{}", question.path, question.accept, question.host, question.query),
            )
        }
    }

    /// An address that was free a moment ago.
    async fn free_address() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    fn server(address: SocketAddr) -> (drain::Trigger, tokio::task::JoinHandle<()>) {
        let (trigger, drain) = drain::channel();
        let server = Server { name: "test", address, handler: Arc::new(Echo), alarm: Alarm::default() };
        (trigger, tokio::spawn(server.run(drain)))
    }

    async fn connect(address: SocketAddr) -> TcpStream {
        loop {
            match TcpStream::connect(address).await {
                Ok(stream) => return stream,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = connect(address).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[test]
    fn ipv4_takes_the_place_of_ipv6_where_there_is_none_and_nowhere_else() {
        let instead = |address: &str, code| {
            let refused = io::Error::from_raw_os_error(code);
            without_ipv6(address.parse().unwrap(), &refused).map(|address| address.to_string())
        };
        assert_eq!(instead("[::]:80", libc::EAFNOSUPPORT).as_deref(), Some("0.0.0.0:80"));
        assert_eq!(instead("[::1]:80", libc::EAFNOSUPPORT).as_deref(), Some("127.0.0.1:80"));
        assert_eq!(instead("[::1]:80", libc::EADDRNOTAVAIL).as_deref(), Some("127.0.0.1:80"));
        for (address, code) in [
            ("[::]:80", libc::EADDRINUSE),
            ("[::]:80", libc::EADDRNOTAVAIL),
            ("[fd00::1]:80", libc::EAFNOSUPPORT),
            ("127.0.0.1:80", libc::EADDRNOTAVAIL),
        ] {
            assert_eq!(instead(address, code), None, "{address} {code}");
        }
    }

    #[tokio::test]
    async fn questions_reach_the_handler_and_other_methods_do_not() {
        let address = free_address().await;
        let (_trigger, _task) = server(address);
        let answer = ask(address, "GET /a?b HTTP/1.1\r\nHost: x\r\nAccept: c\r\nConnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n/a c xb"), "{answer}");
        assert!(answer.contains("X-Content-Type-Options: nosniff\r\n"), "{answer}");
        let answer = ask(address, "HEAD /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
        let answer = ask(address, "POST /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("Allow: GET, HEAD\r\n"), "{answer}");
    }

    #[tokio::test]
    async fn a_request_under_way_is_answered_after_the_drain_and_an_idle_connection_is_not_waited_for() {
        let address = free_address().await;
        let (trigger, task) = server(address);
        let mut busy = connect(address).await;
        busy.write_all(b"GET /la").await.unwrap();
        // Connections are accepted in their order: an answer on the second says that the first is accepted too.
        let mut idle = connect(address).await;
        idle.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert_ne!(idle.read(&mut [0; 512]).await.unwrap(), 0);
        trigger.begin();
        busy.write_all(b"ter HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        busy.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("/later  x"), "{answer}");
        task.await.unwrap();
        assert_eq!(idle.read(&mut [0; 512]).await.unwrap(), 0);
    }
}
