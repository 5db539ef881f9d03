//! Requests to the API server and their answers, as bytes; the credentials are read anew when they no longer serve.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use futures_util::io::{AsyncBufRead, AsyncBufReadExt as _};
use http::header::{ACCEPT, HeaderValue, USER_AGENT};
use kube::Client;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tracing::warn;

use super::access::{self, Access};
use super::query::Ask;
use super::wire::Status;
use crate::error::chain;

/// Why there is no answer, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server does not want to.
    #[error("the API server answers {}: {}", .0.code, .0.message)]
    Refused(Status),
    /// The server was not reached.
    #[error("the API server cannot be reached")]
    Unreachable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer ends too early.
    #[error("the answer of the API server broke off")]
    BrokeOff(#[source] io::Error),
    /// The answer is not what was asked for.
    #[error("the answer of the API server cannot be understood")]
    Unreadable(#[source] serde_json::Error),
    /// It does not move.
    #[error("the API server has been silent for {0:?}")]
    Silent(Duration),
    /// It is too large to be held.
    #[error("the API server sends more than {0} bytes at once")]
    TooLong(usize),
}

impl Error {
    /// The HTTP status of a refusal.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Refused(status) => Some(status.code),
            _ => None,
        }
    }

    /// True if other credentials or another connection may help.
    fn may_be_ours(&self) -> bool {
        matches!(self, Self::Unreachable(_)) || self.code() == Some(401)
    }
}

impl From<kube::Error> for Error {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Refused(Status { code: status.code, message: status.message }),
            // Both say what their cause says.
            kube::Error::Service(cause) => Self::Unreachable(cause),
            kube::Error::HyperError(cause) => Self::Unreachable(cause.into()),
            other => Self::Unreachable(other.into()),
        }
    }
}

/// How long an answer may stay away.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Until it begins, and until the next piece of a list.
    pub answer: Duration,
    /// Until the next line of a watch. Servers send a bookmark about every minute; nothing is lost if one does not.
    pub watch: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { answer: Duration::from_secs(60), watch: Duration::from_secs(180) }
    }
}

/// The way to the API server.
pub struct Connection {
    access: Access,
    limits: Limits,
    server: access::Server,
    current: Mutex<Session>,
}

/// One state of the credentials.
#[derive(Clone)]
struct Session {
    client: Client,
    number: u64,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("access", &self.access).finish_non_exhaustive()
    }
}

impl Connection {
    /// A way with credentials that have been read. Connects to nobody yet.
    pub async fn open(access: Access, limits: Limits) -> Result<Self, access::Error> {
        let (client, server) = access.open().await?;
        Ok(Self { access, limits, server, current: Mutex::new(Session { client, number: 0 }) })
    }

    /// The address of the server.
    pub fn server(&self) -> &access::Server {
        &self.server
    }

    /// The whole answer to a request.
    pub async fn fetch(&self, ask: Ask) -> Result<Vec<u8>, Error> {
        let mut answer = self.begin(ask).await?;
        while answer.more(self.limits.answer).await? {}
        Ok(answer.buffer)
    }

    /// The answer to a request, line by line.
    pub async fn watch(&self, ask: Ask) -> Result<Lines, Error> {
        let answer = self.begin(ask).await?;
        Ok(Lines { answer, line: 0, limit: self.limits.watch })
    }

    async fn begin(&self, mut ask: Ask) -> Result<Answer, Error> {
        const AGENT: &str = concat!("shunt/", env!("CARGO_PKG_VERSION"));
        ask.headers_mut().insert(USER_AGENT, HeaderValue::from_static(AGENT));
        ask.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
        let session = self.current.lock().await.clone();
        let answer = timeout(self.limits.answer, session.client.request_stream(ask)).await;
        let answer = answer.map_err(|_| Error::Silent(self.limits.answer)).and_then(|answer| Ok(answer?));
        match answer {
            Ok(body) => Ok(Answer { body: Box::pin(body), buffer: Vec::new() }),
            Err(error) => {
                if error.may_be_ours() {
                    self.renew(session.number).await;
                }
                Err(error)
            }
        }
    }

    /// Reads the credentials again, unless that has been done since session `number`: a token or certificate may have been
    /// replaced. What cannot be read leaves the old ones in use.
    async fn renew(&self, number: u64) {
        let mut current = self.current.lock().await;
        if current.number != number {
            return;
        }
        match self.access.open().await {
            Ok((client, _)) => *current = Session { client, number: number + 1 },
            Err(error) => {
                let error = chain(&error);
                warn!(error, "the credentials for the API server cannot be read again; the old ones stay in use");
            }
        }
    }
}

/// The most of an answer that is held: far above the largest page or object there can be.
const MOST_BYTES: usize = 512 << 20;

/// A body on its way.
struct Answer {
    body: Pin<Box<dyn AsyncBufRead + Send>>,
    buffer: Vec<u8>,
}

impl Answer {
    /// Takes the next piece into the buffer. False if there is none.
    async fn more(&mut self, limit: Duration) -> Result<bool, Error> {
        let piece = timeout(limit, self.body.fill_buf()).await;
        let piece = piece.map_err(|_| Error::Silent(limit))?.map_err(Error::BrokeOff)?;
        let length = piece.len();
        if self.buffer.len() + length > MOST_BYTES {
            return Err(Error::TooLong(MOST_BYTES));
        }
        self.buffer.extend_from_slice(piece);
        self.body.consume_unpin(length);
        Ok(length > 0)
    }
}

/// An answer that comes line by line.
pub struct Lines {
    answer: Answer,
    /// Length of the line that was given last.
    line: usize,
    limit: Duration,
}

impl Lines {
    /// The next line, newline included; `None` at the end. A line without newline at the end is an answer that broke off.
    pub async fn next(&mut self) -> Result<Option<&[u8]>, Error> {
        self.answer.buffer.drain(..self.line);
        self.line = 0;
        let mut seen = 0;
        loop {
            if let Some(end) = self.answer.buffer[seen..].iter().position(|byte| *byte == b'\n') {
                self.line = seen + end + 1;
                return Ok(Some(&self.answer.buffer[..self.line]));
            }
            seen = self.answer.buffer.len();
            if !self.answer.more(self.limit).await? {
                return if seen == 0 { Ok(None) } else { Err(Error::BrokeOff(io::ErrorKind::UnexpectedEof.into())) };
            }
        }
    }
}
