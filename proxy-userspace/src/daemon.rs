//! The agent: builds its parts, starts them, ends them. Wiring and supervision only; what parts do is theirs.
//!
//! ```text
//! network ─▶ facts ─┐
//! sources ─updates─▶ store ─snapshots─▶ reconciler ─status─▶ attachments, readiness
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context as _, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use proxy_common::addr::Port;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::config::Config;
use crate::config::raw::SocketLb;
use crate::datapath::attach::{self, DeviceLinks, SocketLinks};
use crate::datapath::audit::Teller;
use crate::datapath::device::{Attach, Means, decide_means};
use crate::datapath::guard::Guard;
use crate::datapath::kernel::{self, Loaded};
use crate::datapath::maps::{KernelMaps, NodeConfig};
use crate::datapath::metrics::Tables;
use crate::datapath::network::{Network, Watcher};
use crate::datapath::object::OBJECT;
use crate::datapath::pins::{LOADED_NOTE, Pins};
use crate::datapath::progress::Reporter;
use crate::datapath::reconcile::{self, Reconciler, Status};
use crate::datapath::{
    conntrack, fullness, node, other_proxies, overlap, predecessor, reserve, restore, stale, sweep, sys,
};
use crate::drain::{self, Drain};
use crate::health::{Health, Watched, node_port};
use crate::model::{NodeFacts, SourceId, SourceSpec, Update, Writer};
use crate::planner::{HealthChecks, SnatPorts, State};
use crate::source::contact::Contact;
use crate::source::kubernetes::tell::Herald;
use crate::source::kubernetes::{self, Kubernetes};
use crate::source::manifests::{self, Manifests};
use crate::telemetry::admin::{self, Reports};
use crate::telemetry::event;
use crate::telemetry::event::notice::{Alarm, Notice, Notices, Regarding, Scope};
use crate::telemetry::http::{Handler, Server};
use crate::telemetry::kube_proxy::Pages;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::page::Page;
use crate::telemetry::page::changes::Changes;
use crate::telemetry::source::Sources;
use crate::telemetry::{process, status};
use proxy_common::abi::config::Config as ProgramConfig;

/// Updates of sources that may wait for the store.
const UPDATE_QUEUE: usize = 4096;

/// Runs the agent until SIGTERM or SIGINT, or until a part fails. The datapath stays in either case.
pub fn run(config: Config) -> Result<()> {
    sys::share_heap();
    raise_open_files();
    let pins = Pins::new(&config.bpffs).with_version(config.layout_version);
    pins.prepare()?;
    let lock = pins.lock()?;
    let result = runtime()?.block_on(supervise(&config, &pins));
    drop(lock);
    result
}

/// Whoever connects to a listener takes a descriptor: those must not be what links and watches lack.
fn raise_open_files() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "the limit of open files stays as it is");
    }
}

/// Two threads: one is enough for the work, the other keeps answering while a large plan is applied.
fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().context("cannot start the runtime")
}

async fn supervise(config: &Config, pins: &Pins) -> Result<()> {
    // Before any part runs: who sees the agent serve may ask it to end.
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let (trigger, drain) = drain::channel();
    let mut parts = Parts::default();
    let (closing, closed) = drain::channel();
    let mut listeners = Listeners { closed, parts: Parts::default() };
    build(config, pins, &drain, &mut parts, &mut listeners).await?;
    let failure = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        failure = parts.first_end() => Some(failure),
    };
    info!("draining; the datapath stays");
    trigger.begin();
    parts.join().await;
    closing.begin();
    listeners.parts.join().await;
    failure.map_or(Ok(()), Err)
}

/// The parts that run for as long as the agent does.
#[derive(Default)]
struct Parts(JoinSet<(&'static str, Result<()>)>);

impl Parts {
    fn spawn(&mut self, name: &'static str, part: impl Future<Output = Result<()>> + Send + 'static) {
        self.0.spawn(async move { (name, part.await) });
    }

    /// Why a part ended although nobody asked it to.
    async fn first_end(&mut self) -> anyhow::Error {
        match self.0.join_next().await {
            Some(Ok((name, Err(error)))) => error.context(format!("{name} failed")),
            Some(Ok((name, Ok(())))) => anyhow::anyhow!("{name} ended by itself"),
            Some(Err(error)) => anyhow::Error::new(error).context("a part of the agent crashed"),
            None => anyhow::anyhow!("there is nothing to run"),
        }
    }

    async fn join(mut self) {
        while let Some(ended) = self.0.join_next().await {
            if let Ok((name, Err(error))) = ended {
                warn!(part = name, error = format!("{error:#}"), "a part failed while draining");
            }
        }
    }
}

/// What is asked from outside. Ends after all others: an agent that ends says so until it is gone.
struct Listeners {
    closed: Drain,
    parts: Parts,
}

impl Listeners {
    fn serve<H: Handler>(&mut self, name: &'static str, address: Option<SocketAddr>, handler: Arc<H>, alarm: Alarm) {
        let Some(address) = address else { return };
        let server = Server { name, address, handler, alarm };
        self.spawn(name, |closed| server.run(closed));
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(&mut self, name: &'static str, part: impl FnOnce(Drain) -> F) {
        let part = part(self.closed.clone());
        self.parts.spawn(name, async {
            part.await;
            Ok(())
        });
    }
}

async fn build(
    config: &Config,
    pins: &Pins,
    drain: &Drain,
    parts: &mut Parts,
    listeners: &mut Listeners,
) -> Result<()> {
    let mut registry = Registry::default();
    process::register(&mut registry);
    let (watcher, network) = Watcher::open().await?;
    let loaded = kernel::load(OBJECT, pins, &config.sizes)?;
    let means = means(config.attach, &loaded)?;
    tell_loaded(&loaded);
    for proxy in other_proxies::find() {
        warn!("{proxy} are on this node and would translate services beside shunt: {}", proxy.advice());
    }
    conntrack::apply(&config.conntrack);
    if let Some(reason) = node::ipv6_off() {
        warn!(reason, "IPv6 is not served on this node");
    }
    for path in node::forwarding_off() {
        warn!(path, "forwarding is off: packets of pods and outside clients are not served in this family");
    }

    let (facts_sender, facts) = watch::channel(Arc::new(node::facts(&config.facts, &network.borrow())));
    let sources = sources(config);
    let initial = facts.borrow().clone();
    let (writer, snapshots) = Writer::new(initial, &sources);
    let reserved = reserve::Task::begin(pins, &config.snat_ports, snapshots.clone())?;
    let (updates_sender, updates) = mpsc::channel::<Update>(UPDATE_QUEUE);

    let netns = sys::netns_cookie().context("cannot read the network namespace's cookie")?;
    let maps = KernelMaps::open(&loaded.maps)?;
    maps.write_node_config(&node_config(config, netns)?)?;
    let state = restored_state(config, &loaded)?;
    let pending = sources.iter().map(|spec| spec.id).collect();
    let (status_sender, status) = watch::channel(Arc::new(Status { pending, ..Status::default() }));
    let (unused_sender, unused) = mpsc::channel(16);
    let sweep = sweep::Task::open(&loaded.maps, unused_sender)?;
    let (stale, stale_ends) = stale::Task::open(&loaded.maps, config.stale, config.socket_lb)?;
    let predecessor = predecessor::Task::open(pins, &loaded.maps)?;
    let of_page = snapshots.clone();
    let reporter = Reporter::new(writer.triggers());
    reporter.register(&mut registry, snapshots.clone());
    let (progress, queue) = (reporter.watch(), reporter.note_queued(snapshots.clone()));
    let contacts: BTreeMap<SourceId, Contact> = sources.iter().map(|spec| (spec.id, Contact::default())).collect();
    let watched = contacts.iter().map(|(id, contact)| (*id, contact.watch())).collect();
    let reports = Sources::new(snapshots.clone(), watched);
    let [told, told_events, told_ports] = [snapshots.clone(), snapshots.clone(), snapshots.clone()];
    let (checks_sender, checks) = watch::channel(HealthChecks::default());
    let table_repairs = Counter::default();
    let help = "Entries of tables that somebody else had changed or removed, and that were written again";
    registry.sub_registry_with_prefix("shunt").register("table_repairs", help, table_repairs.clone());
    let mut reconciler = reconcile::Task {
        reconciler: Reconciler::new(maps, state),
        snapshots,
        unused,
        status: status_sender,
        health_checks: checks_sender,
        sources: sources.len(),
        pending: Arc::default(),
        stale: stale_ends,
        reporter,
        teller: Teller { repairs: table_repairs, notices: Notices::default() },
    };

    // Tables that no program uses are worth nothing before they are filled.
    let adopted = loaded.adopted && (loaded.handover.is_some() || attach::has_links(pins)?);
    let (attached_sender, attached) = watch::channel(false);
    let kernel_maps = Arc::new(loaded.maps);
    let repairs = Counter::default();
    let help = "Programs that somebody else had detached, and that were attached again";
    registry.sub_registry_with_prefix("shunt").register("repairs", help, repairs.clone());
    let mut attachments = attach::Task {
        sockets: sockets(config, pins)?,
        devices: DeviceLinks::new(pins, netns, config.devices.clone(), means, loaded.programs, &kernel_maps)?,
        continuations: loaded.continuations,
        handover: loaded.handover,
        has_left_earlier: false,
        network: network.clone(),
        facts: facts.clone(),
        is_adopted: adopted,
        status: status.clone(),
        attached: attached_sender,
        repairs: repairs.clone(),
        unrepaired: Default::default(),
        notices: Notices::default(),
        guard: Guard::new(kernel_maps.clone()),
    };
    let refused = attachments.devices.watch_refused();
    attachments.take_over()?;
    let tables = Tables::register(&mut registry, kernel_maps, pins.clone(), sweep.watch());
    let mut fullness = fullness::Task::new(tables);
    let nearly_full = fullness.watch();
    if !adopted {
        pins.unmark(LOADED_NOTE)?;
    }
    let was_programmed = pins.marks()?.iter().any(|note| note == LOADED_NOTE);
    let watched =
        Watched { snapshots: told, status: status.clone(), progress, attached: attached.clone(), drain: drain.clone() };
    let health = Health::new(watched, was_programmed, config.kubernetes.is_some());
    health.register(&mut registry);
    let health = Arc::new(health);
    stale.register(&mut registry);
    let node_ports = node_port::Task::new(checks, health.clone());
    let unserved = node_ports.refusals();
    let overlap = overlap::Task::new(told_ports);
    let taken = overlap.watch();
    let ids = sources.iter().map(|spec| spec.id);
    status::register(&mut registry, ids, status.clone(), reports.clone(), unserved.clone(), taken.clone());
    let watched = event::Watched {
        status: status.clone(),
        snapshots: told_events,
        health_checks: unserved.clone(),
        overlaps: taken.clone(),
    };
    let (notices, events) = match &config.kubernetes {
        Some(access) => {
            let (notices, task) = event::Task::new(watched, &mut registry);
            (notices, Some((access.clone(), task)))
        }
        None => (Notices::default(), None),
    };
    attachments.notices = notices.clone();
    fullness.notices = notices.clone();
    reconciler.teller.notices = notices.clone();
    notices.tell(birth_cry());
    let alarm = |reason| Alarm { notices: notices.clone(), reason, action: START };
    listeners.serve("health", config.healthz, health, alarm("FailedToStartProxierHealthcheck"));
    let pages = Arc::new(Pages::new(Metrics::new(registry), config));
    listeners.serve("metrics", config.metrics, pages, alarm("FailedToStartMetricServer"));
    let reports = Reports {
        status: status.clone(),
        sources: reports,
        health_checks: unserved,
        xdp_refused: refused,
        nearly_full,
        overlaps: taken,
        devices: config.devices.clone(),
    };
    let changes = Changes::default();
    let (its_changes, seen, its_reports) = (changes.clone(), of_page, reports.clone());
    let page = Page::new(config.facts.name.to_string(), pins.clone(), reports, sweep.watch(), changes);
    let look = page.look();
    listeners.serve("page", config.page, Arc::new(page), alarm("FailedToStartPage"));
    listeners.spawn("health-check NodePorts", |closed| node_ports.run(closed));
    // The parsed object and what was read back are gone by now.
    sys::trim_heap();

    let fixed = config.facts.clone();
    parts.spawn("netlink", drained(drain.clone(), async { Ok(watcher.run().await?) }));
    parts.spawn("node facts", drained(drain.clone(), follow_facts(fixed, network, facts_sender)));
    parts.spawn("store", async {
        writer.run(updates, facts).await;
        Ok(())
    });
    let its_drain = drain.clone();
    parts.spawn("recent changes", async {
        its_changes.follow(seen, its_drain).await;
        Ok(())
    });
    parts.spawn("idle page", drained(drain.clone(), async { match Page::forget_idle(look).await {} }));
    let its_drain = drain.clone();
    parts.spawn(
        "queue",
        drained(its_drain, async {
            queue.await;
            Ok(())
        }),
    );
    let its_drain = drain.clone();
    parts.spawn("reconciler", async {
        reconciler.run(its_drain).await;
        Ok(())
    });
    let its_drain = drain.clone();
    parts.spawn("reserved ports", async {
        reserved.run(its_drain).await;
        Ok(())
    });
    let its_drain = drain.clone();
    parts.spawn("attachments", async { Ok(attachments.run(its_drain).await?) });
    let its_drain = drain.clone();
    parts.spawn("sweep", async {
        sweep.run(its_drain).await;
        Ok(())
    });
    let its_drain = drain.clone();
    parts.spawn("overlaps", async {
        overlap.run(its_drain).await;
        Ok(())
    });
    let its_drain = drain.clone();
    parts.spawn("fullness", async {
        fullness.run(its_drain).await;
        Ok(())
    });
    if config.socket_lb != SocketLb::Off {
        stale::probe();
    }
    let (its_status, its_drain) = (status.clone(), drain.clone());
    parts.spawn("stale connections", async {
        stale.run(its_status, its_drain).await;
        Ok(())
    });
    let its_status = status.clone();
    parts.spawn("predecessor", drained(drain.clone(), async { Ok(predecessor.run(its_status).await?) }));
    let admin = admin::serve(config.admin_socket.clone(), its_reports);
    parts.spawn("admin socket", drained(drain.clone(), async { match admin.await {} }));
    parts.spawn(
        "readiness",
        drained(drain.clone(), announce(status, attached, pins.clone(), config.ready_file.clone())),
    );
    if let Some(folder) = &config.manifests {
        let source = Manifests::new(folder.clone(), updates_sender.clone(), contacts[&manifests::SPEC.id].clone());
        parts.spawn("manifests", drained(drain.clone(), async { Ok(source.run().await?) }));
    }
    if let Some(access) = &config.kubernetes {
        let contact = contacts[&kubernetes::SPEC.id].clone();
        let source = Kubernetes::new(access.clone(), config.facts.name.clone(), updates_sender.clone(), contact);
        parts.spawn("kubernetes", drained(drain.clone(), async { Ok(source.run().await?) }));
    }
    if let Some((access, events)) = events {
        let (node, its_drain) = (config.facts.name.clone(), drain.clone());
        parts.spawn("events", async move {
            let herald = Herald::open(access, node, SystemTime::now()).await?;
            events.run(herald, its_drain).await;
            Ok(())
        });
    }
    // The store ends when the last source does.
    drop(updates_sender);
    Ok(())
}

/// What events about the start say that was being done, as kube-proxy's do.
const START: &str = "StartKubeProxy";

/// That this agent has started, as kube-proxy tells it.
fn birth_cry() -> Notice {
    let note = concat!("shunt ", env!("CARGO_PKG_VERSION"), " serves this node's services").to_owned();
    let (regarding, scope) = (Regarding::Node, Scope::Node);
    Notice { regarding, is_warning: false, scope, reason: "Starting", action: START, note }
}

/// What is configured to be listed.
fn sources(config: &Config) -> Vec<SourceSpec> {
    let manifests = config.manifests.iter().map(|_| manifests::SPEC);
    manifests.chain(config.kubernetes.iter().map(|_| kubernetes::SPEC)).collect()
}

/// A part without an end of its own: the drain ends it.
async fn drained(mut drain: Drain, part: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::select! {
        result = part => result,
        () = drain.wait() => Ok(()),
    }
}

/// How programs get onto devices.
fn means(attach: Attach, loaded: &Loaded) -> Result<Means> {
    let classifier = loaded.programs.get("ingress")?;
    let means = decide_means(attach, |means| kernel::probe(means, classifier))?;
    match (attach, means) {
        (Attach::Auto, Means::Clsact) => {
            info!(by = means.name(), "this kernel has no tcx: devices get filters instead")
        }
        _ => info!(by = means.name(), "devices get their programs"),
    }
    Ok(means)
}

fn tell_loaded(loaded: &Loaded) {
    info!(adopted = loaded.adopted, "programs loaded");
    for kfunc in &loaded.missing_kfuncs {
        warn!(
            function = kfunc.name,
            "the kernel lacks a function: connections that a predecessor translates are not recognised"
        );
    }
}

fn node_config(config: &Config, netns: u64) -> Result<NodeConfig> {
    let mut key = [0; 16];
    sys::random(&mut key).context("the kernel has no random numbers")?;
    let half = |at: usize| u64::from_ne_bytes(key[at..at + 8].try_into().expect("eight bytes were taken"));
    Ok(NodeConfig {
        new_hash_key: [half(0), half(8)],
        netns,
        flags: program_flags(config),
        snat: (Port(*config.snat_ports.start()), Port(*config.snat_ports.end())),
        local: node::local_port_range()?,
    })
}

fn program_flags(config: &Config) -> u32 {
    let sockets = match config.socket_lb {
        SocketLb::All => 0,
        SocketLb::Host => ProgramConfig::SOCKETS_HOST_ONLY,
        SocketLb::Off => ProgramConfig::SOCKETS_OFF,
    };
    sockets | if config.masquerade_all { ProgramConfig::MASQUERADE_ALL } else { 0 }
}

fn restored_state(config: &Config, loaded: &Loaded) -> Result<State> {
    let tables = restore::read_tables(&loaded.maps)?;
    let limits = restore::read_limits(&loaded.maps)?;
    Ok(State::restore(limits, SnatPorts(config.snat_ports.clone()), &tables))
}

fn sockets(config: &Config, pins: &Pins) -> Result<Option<SocketLinks>> {
    if config.socket_lb == SocketLb::Off {
        return Ok(None);
    }
    let path = match &config.cgroup {
        Some(path) => path.clone(),
        None => attach::find_cgroup_root()?,
    };
    Ok(Some(SocketLinks::open(pins, &path)?))
}

async fn follow_facts(
    fixed: NodeFacts,
    mut network: watch::Receiver<Network>,
    facts: watch::Sender<Arc<NodeFacts>>,
) -> Result<()> {
    while network.changed().await.is_ok() {
        let next = Arc::new(node::facts(&fixed, &network.borrow_and_update()));
        facts.send_if_modified(|known| {
            let is_new = *known != next;
            *known = next;
            is_new
        });
    }
    Ok(())
}

/// Says once that everything the sources listed is in effect.
async fn announce(
    mut status: watch::Receiver<Arc<Status>>,
    mut attached: watch::Receiver<bool>,
    pins: Pins,
    ready_file: Option<PathBuf>,
) -> Result<()> {
    status.wait_for(|status| status.is_ready).await?;
    attached.wait_for(|attached| *attached).await?;
    pins.mark(LOADED_NOTE)?;
    info!("first plan applied");
    if let Some(path) = ready_file {
        touch(&path)?;
    }
    std::future::pending().await
}

fn touch(path: &Path) -> Result<()> {
    std::fs::write(path, "").with_context(|| format!("cannot write {}", path.display()))
}
