//! One pod's life, in a thread: started, probed, asked to end, removed; each step told to the API.

use std::net::IpAddr;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use super::status::{self, Observed, Stage};
use super::{NodeSpec, Pod, Shared};
use crate::control_plane::{Error, Kind, Patch};

/// Between two looks at a pod.
const PROBE_PERIOD: Duration = Duration::from_millis(50);

/// What a process has at the least between SIGTERM and SIGKILL after a preStop (kubelet: minimumGracePeriodInSeconds).
const MINIMUM_GRACE: Duration = Duration::from_secs(2);

/// What a worker is told.
pub(super) enum Message {
    /// The pod as it is now.
    Changed(Pod),
    /// It is no longer in the API.
    Gone,
    /// The test is over.
    Over,
}

/// Why a pod has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It was deleted, and has this long.
    Deleted(Duration),
    /// It was deleted without waiting for us.
    Gone,
    /// The test is over: no more grace, nothing to be told.
    Over,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    pod: Pod,
    inbox: mpsc::Receiver<Message>,
    observed: Observed,
    /// What the API was told last.
    told: Option<Stage>,
}

impl Worker {
    /// A running worker: where it is told news, and its thread.
    pub(super) fn spawn(shared: Arc<Shared>, node: NodeSpec, pod: Pod) -> (mpsc::Sender<Message>, JoinHandle<()>) {
        let (sender, inbox) = mpsc::channel();
        let name = pod.key();
        let work = move || match pod.deletion_grace() {
            None if pod.is_terminal() => await_deletion(&shared, &inbox),
            None => Self::start(shared, node, pod, inbox).run(),
            // Deleted before we ever saw it run: nothing to be stopped.
            Some(_) => delete_from_api(&shared, &pod, &inbox),
        };
        (sender, thread::Builder::new().name(name).spawn(work).expect("a thread can be started"))
    }

    fn start(shared: Arc<Shared>, node: NodeSpec, pod: Pod, inbox: mpsc::Receiver<Message>) -> Self {
        let addresses: Vec<IpAddr> = shared.runtime.start(&pod);
        assert!(!addresses.is_empty(), "pod {} was started without an address", pod.key());
        let now = SystemTime::now();
        let observed = Observed {
            addresses,
            host_addresses: node.addresses,
            stage: Stage::Unready,
            started_at: now,
            changed_at: now,
        };
        Self { shared, pod, inbox, observed, told: None }
    }

    fn run(mut self) {
        let end = self.live();
        let end = self.terminate(end);
        self.shared.runtime.remove(&self.pod);
        if matches!(end, End::Deleted(_)) {
            self.observe(Stage::Ended);
            while self.tell().is_err() && !self.shared.is_over() {
                thread::sleep(PROBE_PERIOD);
            }
            delete_from_api(&self.shared, &self.pod, &self.inbox);
        }
    }

    /// Probes and tells, until the pod has to end.
    fn live(&mut self) -> End {
        loop {
            self.probe();
            if let Some(end) = self.listen(PROBE_PERIOD) {
                return end;
            }
        }
    }

    /// Runs preStop, asks the processes to end and waits for that as long as the pod has. Until then the probe goes on and
    /// decides alone whether the pod is ready.
    fn terminate(&mut self, mut end: End) -> End {
        let begin = Instant::now();
        let grace = match end {
            End::Deleted(grace) => grace,
            End::Gone => self.pod.deletion_grace().unwrap_or_else(|| self.pod.own_grace()),
            End::Over => return end,
        };
        let mut deadline = begin + grace;
        let pre_stop = self.pod.pre_stop_sleep();
        if !pre_stop.is_zero() && !grace.is_zero() {
            self.watch_until((begin + pre_stop).min(deadline), &mut end);
            deadline = deadline.max(Instant::now() + MINIMUM_GRACE);
        }
        if end != End::Over {
            self.shared.runtime.terminate(&self.pod);
            self.watch_until(deadline, &mut end);
        }
        end
    }

    /// Probes until the processes have ended, or `deadline`, or the test is over. `end` becomes what it has become.
    fn watch_until(&mut self, deadline: Instant, end: &mut End) {
        while *end != End::Over && self.shared.runtime.is_running(&self.pod) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            if *end != End::Gone {
                self.probe();
            }
            // Deleted again, with less grace: the API has then removed the pod, and that is what comes.
            match self.listen(left.min(PROBE_PERIOD)) {
                Some(news @ (End::Gone | End::Over)) => *end = news,
                Some(End::Deleted(_)) | None => {}
            }
        }
    }

    /// Looks at the pod and tells the API if something changed. What cannot be told now is told after the next look.
    fn probe(&mut self) {
        let runtime = &self.shared.runtime;
        let is_failing = self.shared.failing().contains(&self.pod.key());
        let is_ready = !is_failing && runtime.is_running(&self.pod) && runtime.is_ready(&self.pod);
        self.observe(if is_ready { Stage::Ready } else { Stage::Unready });
        // The next look comes soon; a pod that the API no longer has is told so by the inbox.
        let _ = self.tell();
    }

    fn observe(&mut self, stage: Stage) {
        if self.observed.stage != stage {
            self.observed.stage = stage;
            self.observed.changed_at = SystemTime::now();
        }
    }

    fn tell(&mut self) -> Result<(), Error> {
        if self.told == Some(self.observed.stage) {
            return Ok(());
        }
        let patch = Patch::Strategic(status::pod_status(&self.pod, &self.observed));
        match self.shared.api.namespaced(Kind::POD, self.pod.namespace()).patch_status(self.pod.name(), &patch) {
            // 404: no longer there; 409: there is another of that name (the patch holds the uid).
            Err(error) if !error.is_code(404) && !error.is_code(409) => Err(error),
            _ => {
                self.told = Some(self.observed.stage);
                Ok(())
            }
        }
    }

    /// Whether news within `time` say that the pod has to end.
    fn listen(&mut self, time: Duration) -> Option<End> {
        match self.inbox.recv_timeout(time) {
            Ok(Message::Changed(pod)) => {
                self.pod = pod;
                self.pod.deletion_grace().map(End::Deleted)
            }
            Ok(Message::Gone) => Some(End::Gone),
            Ok(Message::Over) | Err(mpsc::RecvTimeoutError::Disconnected) => Some(End::Over),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
        }
    }
}

/// Does for a pod that had ended before we came all that is left to do.
fn await_deletion(shared: &Shared, inbox: &mpsc::Receiver<Message>) {
    while let Ok(Message::Changed(pod)) = inbox.recv() {
        if pod.deletion_grace().is_some() {
            return delete_from_api(shared, &pod, inbox);
        }
    }
}

/// Takes a pod that has ended out of the API; tried until the API has done it or somebody else has.
fn delete_from_api(shared: &Shared, pod: &Pod, inbox: &mpsc::Receiver<Message>) {
    let options = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": pod.uid()}});
    let pods = shared.api.namespaced(Kind::POD, pod.namespace());
    while !shared.is_over() {
        match pods.delete_with(pod.name(), &options) {
            Err(error) if !error.is_code(404) && !error.is_code(409) => {}
            _ => return,
        }
        if matches!(inbox.recv_timeout(PROBE_PERIOD), Ok(Message::Gone | Message::Over)) {
            return;
        }
    }
}
