//! A page for people: services, backends, rates, errors and the newest changes of this node, live, in a browser.
//!
//! | module | holds |
//! |---|---|
//! | [`look`] | what is programmed and what goes through it |
//! | [`changes`] | the newest changes |
//!
//! Plain files that the binary carries; a browser loads nothing from anywhere else, and the page asks `/api/v1` once a
//! second while it is visible. Nothing can be changed through it. Questions under a name that is not an address are refused:
//! so no page of somebody else, whose name leads here (DNS rebinding), reads it in a user's browser.
//! May touch: the pinned tables, for reading.

pub mod changes;
pub mod look;

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderValue};
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;
use tracing::warn;

use super::admin::{Report, Reports};
use super::http::{Answer, Handler, Question};
use crate::datapath::inspect::Traffic;
use crate::datapath::pins::Pins;
use crate::datapath::sweep;
use crate::error::chain;
use changes::{Change, Changes};
use look::{Counts, Drops, Look, Rates, Wanted};

/// What the page may do: load its own files, ask this server, nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// After that long without a question, what was read is dropped.
const IDLE: Duration = Duration::from_secs(30);

const PATHS: [&str; 4] =
    ["/", "/api/v1/overview", "/api/v1/services?find=TEXT&sort=NAME&offset=N&limit=N", "/api/v1/backends?service=ID"];

/// Answers with the page and what it shows.
#[derive(Debug)]
pub struct Page {
    node: String,
    started: SystemTime,
    pins: Pins,
    reports: Reports,
    sweep: watch::Receiver<sweep::Report>,
    changes: Changes,
    look: Arc<Mutex<Look>>,
}

/// Everything but the services.
#[derive(Serialize)]
struct Overview {
    node: String,
    version: &'static str,
    started: String,
    plans: u64,
    counts: Counts,
    /// Connections that packets made, as they were counted last.
    flows: Option<usize>,
    traffic: Traffic,
    rates: Option<Rates>,
    drops: Vec<Drops>,
    report: Report,
    changes: Vec<Change>,
}

impl Page {
    /// Of the agent that `reports` tell of.
    pub fn new(
        node: String,
        pins: Pins,
        reports: Reports,
        sweep: watch::Receiver<sweep::Report>,
        changes: Changes,
    ) -> Self {
        Self { node, started: SystemTime::now(), pins, reports, sweep, changes, look: Arc::default() }
    }

    /// Lets go of what was read when nobody asks any more. Runs for ever.
    pub async fn forget_idle(look: Arc<Mutex<Look>>) -> Infallible {
        loop {
            tokio::time::sleep(IDLE).await;
            let mut look = look.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if look.read_at().is_some_and(|at| at.elapsed() > IDLE) {
                *look = Look::default();
            }
        }
    }

    /// What was read, for [`Self::forget_idle`].
    pub fn look(&self) -> Arc<Mutex<Look>> {
        self.look.clone()
    }

    /// What `tell` makes of the newest reading.
    async fn read<T: Serialize + Send + 'static>(
        &self,
        tell: impl FnOnce(&Look) -> Option<T> + Send + 'static,
    ) -> Answer {
        let (look, pins, plans) = (self.look.clone(), self.pins.clone(), self.reports.plans());
        let read = move || {
            // Whoever panicked with it left at worst an older reading.
            let mut look = look.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            look.refresh(&pins, plans).map(|()| tell(&look))
        };
        match tokio::task::spawn_blocking(read).await {
            Ok(Ok(Some(value))) => {
                let body = serde_json::to_string(&value).expect("numbers and strings have a JSON form");
                Answer::json(StatusCode::OK, body)
            }
            Ok(Ok(None)) => Answer::text(StatusCode::NOT_FOUND, "there is no such service\n"),
            Ok(Err(error)) => {
                warn!(error = chain(&error), "the tables cannot be read for the page");
                Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "the tables cannot be read\n")
            }
            Err(_) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "the tables cannot be read\n"),
        }
    }

    async fn overview(&self) -> Answer {
        let (node, report, plans) = (self.node.clone(), self.reports.now(), self.reports.plans());
        let (changes, sweep) = (self.changes.newest(), *self.sweep.borrow());
        let started = Timestamp::try_from(self.started).map_or_else(|_| String::new(), |at| format!("{at:.0}"));
        self.read(move |look| {
            let (traffic, rates) = look.total();
            Some(Overview {
                node,
                version: env!("CARGO_PKG_VERSION"),
                started,
                plans,
                counts: look.view().counts,
                flows: (sweep.rounds > 0).then_some(sweep.last.established),
                traffic,
                rates,
                drops: look.drops(),
                report,
                changes,
            })
        })
        .await
    }
}

/// A file of the page.
fn file(content_type: &'static str, text: &'static str) -> Answer {
    let header = Some((CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)));
    Answer { content_type, header, ..Answer::text(StatusCode::OK, text) }
}

impl Handler for Page {
    async fn answer(&self, question: Question<'_>) -> Answer {
        if !is_address(question.host) {
            return Answer::text(StatusCode::FORBIDDEN, "ask by an address or localhost, not by another name\n");
        }
        match question.path {
            "/" => file("text/html; charset=utf-8", include_str!("page.html")),
            "/page.css" => file("text/css; charset=utf-8", include_str!("page.css")),
            "/page.js" => file("text/javascript; charset=utf-8", include_str!("page.js")),
            "/icon.svg" => file("image/svg+xml", include_str!("icon.svg")),
            "/api/v1/overview" => self.overview().await,
            "/api/v1/services" => {
                let wanted = Wanted::parse(question.query);
                self.read(move |look| Some(look.rows(&wanted))).await
            }
            "/api/v1/backends" => {
                let id = question.query.strip_prefix("service=").and_then(|id| id.parse().ok());
                self.read(move |look| look.backends(id?)).await
            }
            _ => Answer::not_found(&PATHS),
        }
    }
}

/// True for a header Host that names an address, or this host by the one name that leads nowhere else.
fn is_address(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split_once(']').is_some_and(|(addr, _)| addr.parse::<IpAddr>().is_ok());
    }
    let name = host.split_once(':').map_or(host, |(name, _)| name);
    name == "localhost" || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
#[test]
fn only_addresses_are_answered() {
    for host in ["127.0.0.1:10247", "[::1]:10247", "[::1]", "localhost", "localhost:1", "192.0.2.1"] {
        assert!(is_address(host), "{host}");
    }
    for host in ["", "example.com", "evil.test:10247", "127.0.0.1.evil.test", "[evil]:1", "localhost.evil.test"] {
        assert!(!is_address(host), "{host}");
    }
}
