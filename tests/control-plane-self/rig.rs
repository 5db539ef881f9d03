//! A control plane, three nodes, and pods that are nothing but entries in a table.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use shunt_tests::bed::Bed;
use shunt_tests::control_plane::kubelet::{FakeKubelet, NodeSpec, Pod, PodRuntime};
use shunt_tests::control_plane::{Api, ControlPlane, Kind};
use shunt_tests::netns::Netns;

/// Everything a test needs; fields are dropped in this order.
pub struct Rig {
    pub kubelet: FakeKubelet,
    pub plane: ControlPlane,
    pub pods: Arc<Pods>,
}

impl Rig {
    #[track_caller]
    pub fn new() -> Self {
        let bed = Bed::new();
        let plane = ControlPlane::start(&bed, &Netns::new(&bed, "control"));
        let pods = Arc::new(Pods::default());
        let nodes =
            [("node-a", "east", 1), ("node-b", "east", 2), ("node-c", "west", 3)].map(|(name, zone, number)| {
                let addresses = [
                    Ipv4Addr::new(192, 0, 2, number).into(),
                    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into(),
                ];
                NodeSpec::new(name, addresses).zone(zone).pod_cidr(&format!("10.244.{number}.0/24"))
            });
        Self { kubelet: FakeKubelet::start(plane.api(), nodes, pods.clone()), plane, pods }
    }

    pub fn api(&self) -> &Api {
        self.plane.api()
    }
}

/// Pods without processes.
#[derive(Default)]
pub struct Pods {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    last: u8,
    /// By uid.
    states: BTreeMap<String, State>,
    /// Pods that go on after SIGTERM until [`Pods::let_end`].
    are_stubborn: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Terminating,
    Ended,
}

impl Pods {
    pub fn be_stubborn(&self) {
        self.table().are_stubborn = true;
    }

    /// Pods that were asked to end no longer answer, and end.
    pub fn let_end(&self) {
        self.table()
            .states
            .values_mut()
            .filter(|state| **state == State::Terminating)
            .for_each(|state| *state = State::Ended);
    }

    /// How many were started and not removed.
    pub fn count(&self) -> usize {
        self.table().states.len()
    }

    /// How many were asked to end and have not.
    pub fn count_terminating(&self) -> usize {
        self.table().states.values().filter(|state| **state == State::Terminating).count()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nobody panics with this lock held")
    }
}

impl PodRuntime for Pods {
    fn start(&self, pod: &Pod) -> Vec<IpAddr> {
        let mut table = self.table();
        table.last += 1;
        table.states.insert(pod.uid().to_owned(), State::Running);
        let last = table.last;
        vec![Ipv4Addr::new(10, 244, 0, last).into(), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0x244, last.into()).into()]
    }

    fn terminate(&self, pod: &Pod) {
        let mut table = self.table();
        let state = if table.are_stubborn { State::Terminating } else { State::Ended };
        table.states.insert(pod.uid().to_owned(), state);
    }

    fn is_running(&self, pod: &Pod) -> bool {
        self.table().states.get(pod.uid()).is_some_and(|state| *state != State::Ended)
    }

    fn remove(&self, pod: &Pod) {
        assert!(self.table().states.remove(pod.uid()).is_some(), "{} is removed once", pod.key());
    }
}

/// A Deployment of pods that a Service `web` selects; `version` is in the pod template, so another one rolls it.
pub fn deployment(replicas: u32, version: &str) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": {"app": "web", "version": version}},
                "spec": {
                    "terminationGracePeriodSeconds": 600,
                    "containers": [{"name": "web", "image": "web", "ports": [{"name": "http", "containerPort": 8080}]}],
                },
            },
        },
    })
}

pub fn service() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "ipFamilyPolicy": "RequireDualStack",
            "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    })
}

/// An endpoint of the service `web`.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub address: IpAddr,
    pub node: String,
    pub zone: String,
    pub pod: String,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

/// The endpoints of the service `web`, all slices together, sorted by address.
#[track_caller]
pub fn endpoints(api: &Api) -> Vec<Endpoint> {
    let slices = api.namespaced(Kind::ENDPOINT_SLICE, "default").list_labelled("kubernetes.io/service-name=web");
    let slices = slices.unwrap_or_else(|error| panic!("cannot list EndpointSlices: {error}")).items;
    let mut found: Vec<_> = slices.iter().flat_map(endpoints_of_slice).collect();
    found.sort_by_key(|endpoint| endpoint.address);
    found
}

/// The endpoints of one EndpointSlice.
pub fn endpoints_of_slice(slice: &Value) -> Vec<Endpoint> {
    let text = |value: &Value| value.as_str().expect("the controller fills it").to_owned();
    let flag = |endpoint: &Value, name: &str| endpoint["conditions"][name].as_bool().expect("the controller fills it");
    let endpoints = slice["endpoints"].as_array().into_iter().flatten();
    let endpoints = endpoints.map(|endpoint| Endpoint {
        address: text(&endpoint["addresses"][0]).parse().expect("an address"),
        node: text(&endpoint["nodeName"]),
        zone: text(&endpoint["zone"]),
        pod: text(&endpoint["targetRef"]["name"]),
        ready: flag(endpoint, "ready"),
        serving: flag(endpoint, "serving"),
        terminating: flag(endpoint, "terminating"),
    });
    endpoints.collect()
}
