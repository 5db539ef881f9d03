//! The admin socket: whoever connects gets the agent's status as one JSON object, and the connection ends.
//!
//! Only what the tables and links cannot tell: how sources stand, what was refused, what services do not get, which devices
//! refuse XDP.
//! May touch: its socket.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::source::{SourceReport, Sources};
use crate::datapath::attach::XdpRefusal;
use crate::datapath::device::Choice;
use crate::datapath::fullness::NearlyFull;
use crate::datapath::node;
use crate::datapath::overlap::Overlaps;
use crate::datapath::reconcile::Status;
use crate::health::node_port::Refusals;
use crate::planner::Subject;

/// Why the agent cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot ask the agent on {}", .path.display())]
pub struct Error {
    /// Where.
    path: PathBuf,
    /// The kernel's answer.
    source: io::Error,
}

/// Between two attempts to make the socket, as for the other listeners; tests do not wait for that.
const LISTEN_RETRY: Duration = if cfg!(test) { Duration::from_millis(5) } else { Duration::from_secs(5) };
/// Between two attempts to accept a connection: what is short then (descriptors, memory) comes back.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// Status as text, for people and programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Everything that the sources listed is programmed.
    pub ready: bool,
    /// Sources whose first list is not complete.
    pub pending_sources: Vec<String>,
    /// The configured sources.
    pub sources: Vec<SourceReport>,
    /// Changes that a table refused; they are tried again.
    pub refused: Vec<Trouble>,
    /// What services ask for and do not get.
    pub problems: Vec<Trouble>,
    /// Devices that refuse the XDP program.
    #[serde(default)]
    pub xdp_refused: Vec<Trouble>,
    /// Tables that are nearly full.
    pub nearly_full: Vec<Trouble>,
    /// Families of addresses in which nothing is served here.
    pub families_off: Vec<Trouble>,
    /// Which devices the agent was told to serve.
    pub devices: Choice,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// Whose.
    pub subject: String,
    /// What.
    pub message: String,
}

/// Devices that refuse the XDP program, by interface index.
pub type XdpRefusals = BTreeMap<u32, XdpRefusal>;

impl Report {
    fn new(
        status: &Status,
        sources: Vec<SourceReport>,
        health_checks: &Refusals,
        xdp_refused: &XdpRefusals,
        nearly_full: &NearlyFull,
        overlaps: &Overlaps,
    ) -> Self {
        let refused = status.failures.iter().map(|failure| Trouble {
            subject: subject_text(&failure.subject),
            message: format!("{} (tried {} times, {} changes wait)", failure.error, failure.attempts, failure.waiting),
        });
        let problems = status.problems.iter().flat_map(|(service, problems)| {
            problems.iter().map(|problem| Trouble { subject: service.to_string(), message: problem.to_string() })
        });
        let unserved = health_checks
            .values()
            .map(|refusal| Trouble { subject: refusal.service.to_string(), message: refusal.to_string() });
        let taken = overlaps
            .values()
            .map(|overlap| Trouble { subject: overlap.service.to_string(), message: overlap.to_string() });
        Self {
            ready: status.is_ready,
            pending_sources: status.pending.iter().map(ToString::to_string).collect(),
            sources,
            refused: refused.collect(),
            problems: problems.chain(unserved).chain(taken).collect(),
            xdp_refused: xdp_refused
                .values()
                .map(|refusal| Trouble { subject: refusal.device.clone(), message: refusal.reason.clone() })
                .collect(),
            families_off: Vec::new(),
            nearly_full: nearly_full
                .values()
                .map(|usage| Trouble { subject: usage.table.to_owned(), message: usage.to_string() })
                .collect(),
            devices: Choice::default(),
        }
    }
}

fn subject_text(subject: &Subject) -> String {
    match subject {
        Subject::Node => "this node".to_owned(),
        Subject::Service(service) => service.to_string(),
        Subject::Leftovers => "leftovers".to_owned(),
    }
}

/// What reports are made of. Clones watch the same.
#[derive(Clone, Debug)]
pub struct Reports {
    /// The reconciler's.
    pub status: watch::Receiver<Arc<Status>>,
    /// The sources'.
    pub sources: Sources,
    /// Of health-check NodePorts that cannot be served.
    pub health_checks: watch::Receiver<Refusals>,
    /// Of devices that refuse XDP.
    pub xdp_refused: watch::Receiver<XdpRefusals>,
    /// Of tables that are nearly full.
    pub nearly_full: watch::Receiver<NearlyFull>,
    /// Of NodePorts that something else on this node has too.
    pub overlaps: watch::Receiver<Overlaps>,
    /// Which devices the agent was told to serve.
    pub devices: Choice,
}

impl Reports {
    /// How everything stands.
    pub fn now(&self) -> Report {
        let (status, sources) = (self.status.borrow().clone(), self.sources.report(SystemTime::now()));
        let report = Report::new(
            &status,
            sources,
            &self.health_checks.borrow(),
            &self.xdp_refused.borrow(),
            &self.nearly_full.borrow(),
            &self.overlaps.borrow(),
        );
        Report { devices: self.devices.clone(), families_off: families_off(), ..report }
    }

    /// Plans that have changed something until now.
    pub fn plans(&self) -> u64 {
        self.status.borrow().plans
    }
}

/// Listens for ever; what fails is told and tried again, since the agent's work does not depend on being asked. A socket
/// that an earlier agent left is replaced: the lock on the pins says that it is dead.
pub async fn serve(path: PathBuf, reports: Reports) -> Infallible {
    let listener = listen_at_last(&path).await;
    loop {
        let mut connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                warn!(%error, "cannot accept a connection to the admin socket");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let text = serde_json::to_vec(&reports.now()).expect("strings and booleans have a JSON form");
        // One that does not read holds up the others for no longer than that.
        let sent = tokio::time::timeout(Duration::from_secs(1), connection.write_all(&text)).await;
        if !matches!(sent, Ok(Ok(()))) {
            debug!("a client of the admin socket did not read");
        }
    }
}

fn families_off() -> Vec<Trouble> {
    let reason = node::ipv6_off();
    reason.map(|reason| Trouble { subject: "IPv6".to_owned(), message: reason.to_owned() }).into_iter().collect()
}

async fn listen_at_last(path: &Path) -> UnixListener {
    loop {
        match listen(path) {
            Ok(listener) => return listener,
            Err(error) => warn!(path = %path.display(), %error, "cannot make the admin socket, trying again in 5 s"),
        }
        sleep(LISTEN_RETRY).await;
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Asks a running agent.
pub fn ask(path: &Path) -> Result<Report, Error> {
    let failed = |source| Error { path: path.to_owned(), source };
    let mut connection = UnixStream::connect(path).map_err(failed)?;
    connection.set_read_timeout(Some(Duration::from_secs(5))).map_err(failed)?;
    let mut text = Vec::new();
    connection.read_to_end(&mut text).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::reconcile::Failure;
    use crate::health::node_port::Refusal;
    use crate::model::{Name, NodeFacts, ServiceKey, Snapshot, SourceId};
    use crate::source::contact::Contact;

    /// Manifests that have not listed yet.
    fn sources(contact: &Contact) -> Sources {
        let facts = Arc::new(NodeFacts::named(Name::from("n")));
        let (_, snapshots) = watch::channel(Arc::new(Snapshot::empty(facts, [SourceId::Manifests])));
        Sources::new(snapshots, [(SourceId::Manifests, contact.watch())].into())
    }

    #[tokio::test]
    async fn a_socket_that_cannot_be_made_is_made_when_it_can() {
        let directory = tempfile::tempdir().unwrap();
        let in_the_way = directory.path().join("run");
        std::fs::write(&in_the_way, "").unwrap();
        let path = in_the_way.join("agent.sock");
        let (_sender, status) = watch::channel(Arc::new(Status::default()));
        let (_checks, health_checks) = watch::channel(Refusals::default());
        let (_refusals, refused) = watch::channel(XdpRefusals::default());
        let (_full, nearly_full) = watch::channel(NearlyFull::default());
        let (_taken, overlaps) = watch::channel(Overlaps::default());
        let (sources, devices) = (sources(&Contact::default()), Choice::default());
        let reports = Reports { status, sources, health_checks, xdp_refused: refused, nearly_full, overlaps, devices };
        let server = tokio::spawn(serve(path.clone(), reports));
        sleep(3 * LISTEN_RETRY).await;
        assert!(!server.is_finished());
        std::fs::remove_file(&in_the_way).unwrap();
        while !path.exists() {
            sleep(LISTEN_RETRY).await;
        }
        server.abort();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whoever_asks_gets_the_status_of_now() {
        let directory = std::env::temp_dir().join(format!("shunt-admin-{}", std::process::id()));
        let path = directory.join("agent.sock");
        let (sender, status) = watch::channel(Arc::new(Status::default()));
        let refusal = XdpRefusal { device: "eth0".into(), reason: "busy".into() };
        let (_refused, refused) = watch::channel(XdpRefusals::from([(2, refusal)]));
        let contact = Contact::default();
        contact.lost("the folder", "gone".into());
        let service = ServiceKey { source: SourceId::Manifests, namespace: Name::from("a"), name: Name::from("b") };
        let address = "192.0.2.1:30100".parse().unwrap();
        let refusal = Refusal { service, address, error: "in use".into() };
        let (_checks, health_checks) = watch::channel(Refusals::from([(address, refusal)]));
        let (_full, nearly_full) = watch::channel(NearlyFull::default());
        let (_taken, overlaps) = watch::channel(Overlaps::default());
        let devices = Choice { except: vec!["docker*".into()], ..Choice::default() };
        let sources = sources(&contact);
        let reports = Reports {
            status,
            sources,
            health_checks,
            xdp_refused: refused,
            nearly_full,
            overlaps,
            devices: devices.clone(),
        };
        let server = tokio::spawn(serve(path.clone(), reports));
        let failure = Failure { subject: Subject::Node, error: "full".into(), attempts: 2, waiting: 3 };
        sender.send_replace(Arc::new(Status {
            is_ready: true,
            pending: vec![SourceId::Manifests],
            failures: vec![failure],
            ..Status::default()
        }));
        while !path.exists() {
            tokio::task::yield_now().await;
        }
        let asked = path.clone();
        let report = tokio::task::spawn_blocking(move || ask(&asked)).await.unwrap().unwrap();
        assert!(report.ready);
        assert_eq!(report.pending_sources, ["manifests"]);
        let source = &report.sources[0];
        assert_eq!((source.name.as_str(), source.listed, source.stale), ("manifests", false, true));
        assert_eq!((source.last_contact_age, source.outages[0].why.as_str()), (None, "gone"));
        assert_eq!(report.refused[0].message, "full (tried 2 times, 3 changes wait)");
        let unserved =
            "healthCheckNodePort 30100: cannot listen on 192.0.2.1:30100 (in use); it is tried again".to_owned();
        assert_eq!(report.problems, [Trouble { subject: "manifests/a/b".into(), message: unserved }]);
        assert_eq!(report.devices, devices);
        assert_eq!(report.xdp_refused, [Trouble { subject: "eth0".into(), message: "busy".into() }]);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        server.abort();
        std::fs::remove_dir_all(directory).unwrap();
    }
}
