//! A fake kubelet for several nodes: it does toward the API what a scheduler and kubelets do, and leaves to the test what a
//! pod is ([`PodRuntime`]).
//!
//! The order of events is the real one, because that is what a service proxy lives on: an address and readiness are reported
//! once the pod has them; a deleted pod stays ready until its preStop sleep is over and its processes stop to answer; it is
//! gone from the API only after its processes and addresses are gone (kubelet v1.36: pod_workers.go, status_manager.go).
//!
//! | module | holds |
//! |---|---|
//! | [`FakeKubelet`] (here) | what the test sees; the thread that follows the API's pods |
//! | `pod` | a pod as the API has it |
//! | `schedule` | which node a pod goes to; pure |
//! | `status` | what is said of nodes and pods; pure |
//! | `worker` | one pod's life, in a thread |

mod pod;
mod schedule;
mod status;
mod worker;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{Api, Error, Event, Kind, Patch};
use worker::{Message, Worker};

pub use pod::Pod;

/// Between two attempts to reach an API server that is away.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// What a pod is, on the machine of the test. Called from one thread for each pod.
pub trait PodRuntime: Send + Sync + 'static {
    /// Starts the pod's processes on its node and returns its addresses: the primary one first, at most one of each family.
    fn start(&self, pod: &Pod) -> Vec<IpAddr>;

    /// The readiness probe, asked some twenty times a second until the pod's processes have ended.
    fn is_ready(&self, _pod: &Pod) -> bool {
        true
    }

    /// Asks the pod's processes to end (SIGTERM) and returns at once.
    fn terminate(&self, pod: &Pod);

    /// False once the pod's processes have ended.
    fn is_running(&self, pod: &Pod) -> bool;

    /// Kills what is left (SIGKILL) and takes the pod's addresses away; nothing more is asked about this pod.
    fn remove(&self, pod: &Pod);
}

/// A node as it registers itself.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    name: String,
    addresses: Vec<IpAddr>,
    pod_cidrs: Vec<String>,
    labels: BTreeMap<String, String>,
}

impl NodeSpec {
    /// A node with these internal addresses, the primary one first.
    pub fn new(name: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let labels = BTreeMap::from([("kubernetes.io/hostname".to_owned(), name.to_owned())]);
        Self { name: name.to_owned(), addresses: addresses.into_iter().collect(), pod_cidrs: Vec::new(), labels }
    }

    /// The same with a range of pod addresses, at most one of each family, the primary one first.
    pub fn pod_cidr(mut self, cidr: &str) -> Self {
        self.pod_cidrs.push(cidr.to_owned());
        self
    }

    /// The same in a zone.
    pub fn zone(self, zone: &str) -> Self {
        self.label("topology.kubernetes.io/zone", zone)
    }

    /// The same with a label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }
}

/// Kubelets and scheduler of some nodes; dropped, it removes every pod from the machine and leaves the API as it is.
pub struct FakeKubelet {
    shared: Arc<Shared>,
    follower: Option<JoinHandle<()>>,
}

/// What all threads see.
struct Shared {
    /// With connections of its own, which are broken at the end.
    api: Api,
    runtime: Arc<dyn PodRuntime>,
    nodes: Vec<NodeSpec>,
    /// `namespace/name` of pods whose probe shall fail.
    failing: Mutex<BTreeSet<String>>,
    is_over: AtomicBool,
}

impl FakeKubelet {
    /// Registers `nodes` and takes care of the pods bound to them, and of every pod bound to no node. An API server that is
    /// away is waited for.
    pub fn start(api: &Api, nodes: impl IntoIterator<Item = NodeSpec>, runtime: Arc<dyn PodRuntime>) -> Self {
        let shared = Arc::new(Shared {
            api: api.reconnected(),
            runtime,
            nodes: nodes.into_iter().collect(),
            failing: Mutex::default(),
            is_over: AtomicBool::new(false),
        });
        let mut follower = Follower { shared: shared.clone(), pods: HashMap::new(), ended: Vec::new() };
        let follow = move || follower.run();
        let follower =
            Some(thread::Builder::new().name("kubelet".into()).spawn(follow).expect("a thread can be started"));
        Self { shared, follower }
    }

    /// From now on the readiness probe of a pod (`namespace/name`) fails, whatever its runtime says.
    pub fn fail(&self, pod: &str) {
        self.shared.failing().insert(pod.to_owned());
    }

    /// Undoes [`Self::fail`].
    pub fn recover(&self, pod: &str) {
        self.shared.failing().remove(pod);
    }
}

impl Shared {
    fn failing(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.failing.lock().expect("nobody panics with this lock held")
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}

impl Drop for FakeKubelet {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        self.shared.api.shut_down();
        let result = self.follower.take().expect("it is taken here only").join();
        if let Err(panic) = result
            && !thread::panicking()
        {
            panic::resume_unwind(panic);
        }
    }
}

impl std::fmt::Debug for FakeKubelet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FakeKubelet").field("nodes", &self.shared.nodes).finish_non_exhaustive()
    }
}

/// Follows the API's pods and hands each to its worker.
struct Follower {
    shared: Arc<Shared>,
    /// By uid: pods that are, or are about to be, on our nodes.
    pods: HashMap<String, Entry>,
    /// Workers of pods that the API no longer has.
    ended: Vec<JoinHandle<()>>,
}

struct Entry {
    node: String,
    /// None until the API has bound the pod.
    worker: Option<(mpsc::Sender<Message>, JoinHandle<()>)>,
}

impl Follower {
    fn run(&mut self) {
        let mut told = String::new();
        while !self.shared.is_over() {
            // The server went away, or the watch fell behind: list again, as every client of the API does.
            let Err(error) = self.follow() else { continue };
            let text = format!("kubelet: {error:?}");
            if text != told && !self.shared.is_over() {
                eprintln!("{text}");
                told = text;
            }
            thread::sleep(RETRY_PAUSE);
        }
        self.end_workers();
    }

    /// Lists the pods and follows them until the watch ends.
    fn follow(&mut self) -> Result<(), Error> {
        // Again after each interruption: another store may be behind the API now.
        self.shared.nodes.iter().try_for_each(|node| register(&self.shared.api, node))?;
        let api = self.shared.api.clone();
        let pods = api.all(Kind::POD);
        let list = pods.list()?;
        let uids: BTreeSet<String> = list.items.iter().map(|pod| Pod::new(pod.clone()).uid().to_owned()).collect();
        let gone: Vec<String> = self.pods.keys().filter(|uid| !uids.contains(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.forget(uid));
        list.items.into_iter().try_for_each(|pod| self.see(Pod::new(pod)))?;
        for event in pods.watch_attached(&list.resource_version)? {
            match event? {
                Event::Added(pod) | Event::Modified(pod) => self.see(Pod::new(pod))?,
                Event::Deleted(pod) => self.forget(Pod::new(pod).uid()),
            }
        }
        Ok(())
    }

    /// A pod is there, as given.
    fn see(&mut self, pod: Pod) -> Result<(), Error> {
        if pod.node().is_empty() {
            return self.schedule(&pod);
        }
        if let Some(node) = self.shared.nodes.iter().find(|node| node.name == pod.node()) {
            let shared = &self.shared;
            let entry = self
                .pods
                .entry(pod.uid().to_owned())
                .or_insert_with(|| Entry { node: node.name.clone(), worker: None });
            match &entry.worker {
                // A worker that has done its part no longer listens.
                Some((inbox, _)) => drop(inbox.send(Message::Changed(pod))),
                None => entry.worker = Some(Worker::spawn(shared.clone(), node.clone(), pod)),
            }
        }
        Ok(())
    }

    /// Binds a pod to a node, unless that has been done or no node fits it.
    fn schedule(&mut self, pod: &Pod) -> Result<(), Error> {
        if pod.deletion_grace().is_some() || self.pods.contains_key(pod.uid()) {
            return Ok(());
        }
        let mut loads = BTreeMap::new();
        self.pods.values().for_each(|entry| *loads.entry(entry.node.as_str()).or_default() += 1);
        let Some(node) = schedule::choose_node(pod, &self.shared.nodes, &loads) else { return Ok(()) };
        match self.shared.api.namespaced(Kind::POD, pod.namespace()).bind(pod.name(), &node.name) {
            // Deleted meanwhile, or bound by an attempt whose answer was lost.
            Err(error) if error.is_code(404) || error.is_code(409) => return Ok(()),
            result => result?,
        }
        self.pods.insert(pod.uid().to_owned(), Entry { node: node.name.clone(), worker: None });
        Ok(())
    }

    /// A pod is no longer in the API.
    fn forget(&mut self, uid: &str) {
        if let Some((inbox, worker)) = self.pods.remove(uid).and_then(|entry| entry.worker) {
            // If it was the worker that deleted it, nobody listens.
            let _ = inbox.send(Message::Gone);
            self.ended.push(worker);
        }
    }

    fn end_workers(&mut self) {
        for (inbox, worker) in self.pods.drain().filter_map(|(_, entry)| entry.worker) {
            let _ = inbox.send(Message::Over);
            self.ended.push(worker);
        }
        let results: Vec<_> = self.ended.drain(..).map(JoinHandle::join).collect();
        if let Some(panic) = results.into_iter().find_map(Result::err) {
            panic::resume_unwind(panic);
        }
    }
}

/// Makes sure that a node is there and says that it is ready.
fn register(api: &Api, node: &NodeSpec) -> Result<(), Error> {
    match api.create(&status::node(node)) {
        Err(error) if !error.is_code(409) => return Err(error),
        _ => {}
    }
    // A strategic merge would merge addresses by type, of which there may be two alike.
    api.all(Kind::NODE).patch_status(&node.name, &Patch::Merge(status::node_status(node))).map(drop)
}
