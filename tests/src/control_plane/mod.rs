//! A real Kubernetes control plane inside one network namespace, and kubelets that are not real.
//!
//! | module | holds |
//! |---|---|
//! | [`ControlPlane`] (here) | etcd, kube-apiserver and kube-controller-manager as processes |
//! | `credentials` | identities, certificates, kubeconfigs |
//! | `client`, `watch`, `kind` | the API on raw JSON |
//! | [`kubelet`] | nodes whose pods are whatever the test makes of them |
//!
//! The binaries come from `cargo xtask test` (directory in `SHUNT_CONTROL_PLANE_BIN`) or from an earlier build in
//! `target/control-plane/bin`. May touch: processes and files of the test, sockets inside its namespace.

mod client;
mod credentials;
mod kind;
pub mod kubelet;
mod watch;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::signal::Signal;

pub use client::{Api, Error, List, Patch, Resource};
pub use credentials::Identity;
pub use kind::Kind;
pub use watch::{Event, Stopper, Watch};

use crate::bed::Bed;
use crate::netns::Netns;
use crate::place::Place;
use crate::process::{Command, Process};
use crate::topology::Cluster;
use crate::wait;

use credentials::Credentials;

/// Where kube-apiserver serves.
const API_PORT: u16 = 6443;

/// Where a control plane that stands apart from the clusters is: in the range that none of their own addresses is from.
const APART: Ipv4Addr = Ipv4Addr::new(100, 64, 8, 1);

/// Where etcd serves its clients and its (absent) peers, on the namespace's loopback.
const ETCD: (&str, &str) = ("http://127.0.0.1:2379", "http://127.0.0.1:2380");

/// The controllers that turn Deployments and Services into pods and EndpointSlices, and clean up behind them.
const CONTROLLERS: &str = "deployment-controller,replicaset-controller,endpointslice-controller,\
    endpointslice-mirroring-controller,garbage-collector-controller,namespace-controller,service-cidr-controller";

/// Of each part, when a test has failed.
const SHOWN_LINES: usize = 30;

/// What a test may wish for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where kube-apiserver serves. Unless it is a loopback address, the service `kubernetes` gets it as its endpoint.
    pub address: IpAddr,
    /// The service network: one CIDR, or one of each family with the primary one first.
    pub service_cidrs: String,
    /// First and last NodePort.
    pub node_ports: (u16, u16),
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: Ipv4Addr::LOCALHOST.into(),
            service_cidrs: "10.96.0.0/16,fd00:10:96::/112".to_owned(),
            node_ports: (30000, 32767),
        }
    }
}

/// One of the processes of a control plane, in the order of their starting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The store.
    Etcd,
    /// kube-apiserver.
    ApiServer,
    /// kube-controller-manager.
    ControllerManager,
}

impl Part {
    const ALL: [Self; 3] = [Self::Etcd, Self::ApiServer, Self::ControllerManager];

    fn program(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "kube-apiserver",
            Self::ControllerManager => "kube-controller-manager",
        }
    }
}

/// How kube-proxy does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KubeProxyMode {
    /// nftables rules.
    Nftables,
    /// iptables rules.
    Iptables,
}

impl KubeProxyMode {
    fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// A running control plane, one to a namespace; dropped, its processes are killed.
#[derive(Debug)]
pub struct ControlPlane {
    options: Options,
    dir: PathBuf,
    bin_dir: PathBuf,
    credentials: Credentials,
    admin: Api,
    ns: Arc<Netns>,
    /// As in [`Part::ALL`]; `None` while halted.
    processes: Mutex<[Option<Process>; 3]>,
    _bed: Arc<Bed>,
}

impl ControlPlane {
    /// One on the loopback of `ns`, ready to be used.
    #[track_caller]
    pub fn start(bed: &Arc<Bed>, ns: &Arc<Netns>) -> Self {
        Self::start_with(bed, ns, Options::default())
    }

    /// One at an address of `ns`, ready to be used. Panics if the binaries are missing or do not get ready.
    #[track_caller]
    pub fn start_with(bed: &Arc<Bed>, ns: &Arc<Netns>, options: Options) -> Self {
        let bin_dir = find_bin_dir().unwrap_or_else(|why| panic!("{why}"));
        let dir = bed.subdir(&format!("control-plane-{}", ns.name()));
        let url = format!("https://{}", SocketAddr::new(options.address, API_PORT));
        let credentials = Credentials::create(&dir, options.address, &url);
        let admin = Api::from_kubeconfig(&credentials.kubeconfig(Identity::Admin), ns);
        let processes = Mutex::new([None, None, None]);
        let this = Self { options, dir, bin_dir, credentials, admin, ns: ns.clone(), processes, _bed: bed.clone() };
        this.resume_all();
        this
    }

    /// One in a namespace of its own, which several clusters can follow: [`Self::connect`].
    #[track_caller]
    pub fn start_apart() -> Self {
        let bed = Bed::new();
        let ns = Netns::new(&bed, "control");
        ns.ip([format!("addr add {APART}/32 dev lo")]);
        Self::start_with(&bed, &ns, Options { address: APART.into(), ..Options::default() })
    }

    /// Lets the machines of `cluster` reach a control plane that stands apart. Each cluster has a `link` of its own, 0 to 63;
    /// their machines may have the same addresses: its router hides them.
    #[track_caller]
    pub fn connect(&self, link: u8, cluster: &Cluster) {
        let router = cluster.net.ns();
        let [near, far] = [1, 2].map(|host| Ipv4Addr::new(100, 64, 9, 4 * link + host));
        self.ns.ip([
            format!("link add link{link} type veth peer name control netns {}", router.name()),
            format!("addr add {near}/30 dev link{link}"),
            format!("link set link{link} up"),
        ]);
        router.ip([
            format!("addr add {far}/30 dev control"),
            "link set control up".to_owned(),
            format!("route add {APART} via {near}"),
        ]);
        router.nft(
            "table ip control { chain postrouting { type nat hook postrouting priority srcnat; oifname control masquerade; }; }",
        );
    }

    /// The API as the administrator.
    pub fn api(&self) -> &Api {
        &self.admin
    }

    /// The API as somebody.
    #[track_caller]
    pub fn api_as(&self, who: Identity) -> Api {
        Api::from_kubeconfig(&self.kubeconfig(who), &self.ns)
    }

    /// The kubeconfig file of an identity. Its server address is that of [`Options::address`].
    pub fn kubeconfig(&self, who: Identity) -> PathBuf {
        self.credentials.kubeconfig(who)
    }

    /// The namespace that it runs in.
    pub fn ns(&self) -> &Arc<Netns> {
        &self.ns
    }

    /// Another binary built with the control plane: `kubectl` or `kube-proxy`. Panics if it is not there.
    #[track_caller]
    pub fn binary(&self, name: &str) -> PathBuf {
        let path = self.bin_dir.join(name);
        assert!(path.is_file(), "{} is not there: cargo xtask test builds it", path.display());
        path
    }

    /// A command that runs the real kube-proxy at `place`, for the node of that name; callers may add flags (the pods' range
    /// as `--cluster-cidr`, other ports than 10249 and 10256).
    #[track_caller]
    pub fn kube_proxy(&self, place: &Place, node: &str, mode: KubeProxyMode) -> Command {
        let mut command = place.command(self.binary("kube-proxy"));
        command.args([
            flag("kubeconfig", self.kubeconfig(Identity::KubeProxy).display()),
            flag("hostname-override", node),
            flag("proxy-mode", mode.name()),
            // These belong to the machine, not to the namespace.
            flag("conntrack-max-per-core", 0),
            flag("conntrack-tcp-timeout-established", "0s"),
            flag("conntrack-tcp-timeout-close-wait", "0s"),
        ]);
        command
    }

    /// Kills a part; its connections break. Does nothing if it is halted.
    pub fn halt(&self, part: Part) {
        self.processes()[part as usize] = None;
    }

    /// Starts a halted part again and, if it is the API server, waits until it is ready.
    #[track_caller]
    pub fn resume(&self, part: Part) {
        let running = &mut self.processes()[part as usize];
        assert!(running.is_none(), "{} runs already", part.program());
        let process = Process::start(part.program(), self.command(part));
        let process = running.insert(process);
        if part == Part::ApiServer {
            wait::until("a ready kube-apiserver", || {
                let end = process.try_wait();
                assert!(end.is_none(), "kube-apiserver ended, {}:\n{process}", end.unwrap_or_default());
                self.admin.is_ready()
            });
        }
    }

    /// Sends a signal to a part: STOP makes it silent without breaking connections, CONT undoes that.
    pub fn signal(&self, part: Part, signal: Signal) {
        if let Some(process) = &self.processes()[part as usize] {
            process.signal(signal);
        }
    }

    /// Kills everything, forgets every object and starts anew: same address, same credentials, other data and lower
    /// resource versions.
    #[track_caller]
    pub fn wipe(&self) {
        *self.processes() = [None, None, None];
        let data = self.etcd_dir();
        fs::remove_dir_all(&data).unwrap_or_else(|error| panic!("cannot remove {}: {error}", data.display()));
        self.resume_all();
    }

    #[track_caller]
    fn resume_all(&self) {
        Part::ALL.into_iter().for_each(|part| self.resume(part));
    }

    fn command(&self, part: Part) -> Command {
        let mut command = self.ns.command(self.binary(part.program()));
        command.current_dir(&self.dir);
        command.args(match part {
            Part::Etcd => self.etcd_args(),
            Part::ApiServer => self.api_server_args(),
            Part::ControllerManager => self.controller_manager_args(),
        });
        command
    }

    fn etcd_args(&self) -> Vec<String> {
        let (client_url, peer_url) = ETCD;
        vec![
            flag("data-dir", self.etcd_dir().display()),
            flag("listen-client-urls", client_url),
            flag("advertise-client-urls", client_url),
            flag("listen-peer-urls", peer_url),
            flag("initial-advertise-peer-urls", peer_url),
            flag("initial-cluster", format!("default={peer_url}")),
            // It elects itself after one election timeout; nothing here has to survive a power cut.
            flag("heartbeat-interval", 10),
            flag("election-timeout", 100),
            flag("unsafe-no-fsync", true),
            flag("log-level", "error"),
        ]
    }

    /// Next to nothing is switched off: what is left out starts no faster (measured), and real clusters have it.
    fn api_server_args(&self) -> Vec<String> {
        let Options { address, service_cidrs, node_ports } = &self.options;
        // A loopback address is no valid endpoint of the service `kubernetes`.
        let reconciler = if address.is_loopback() { "none" } else { "lease" };
        vec![
            flag("etcd-servers", ETCD.0),
            flag("bind-address", address),
            flag("advertise-address", address),
            flag("secure-port", API_PORT),
            flag("endpoint-reconciler-type", reconciler),
            flag("service-cluster-ip-range", service_cidrs),
            flag("service-node-port-range", format!("{}-{}", node_ports.0, node_ports.1)),
            flag("authorization-mode", "RBAC"),
            // As in every cluster whose CNI and proxy are pods.
            flag("allow-privileged", true),
            flag("token-auth-file", self.credentials.tokens().display()),
            flag("tls-cert-file", self.credentials.certificate().display()),
            flag("tls-private-key-file", self.credentials.key().display()),
            flag("service-account-issuer", "https://kubernetes.default.svc"),
            flag("service-account-key-file", self.credentials.service_account_public_key().display()),
            flag("service-account-signing-key-file", self.credentials.service_account_key().display()),
            // Pods need no service account, hence no controllers for them.
            flag("disable-admission-plugins", "ServiceAccount"),
        ]
    }

    fn controller_manager_args(&self) -> Vec<String> {
        vec![
            flag("kubeconfig", self.kubeconfig(Identity::Admin).display()),
            flag("controllers", CONTROLLERS),
            flag("leader-elect", false),
            flag("use-service-account-credentials", false),
            flag("secure-port", 0),
            // As by default there is one request budget for all controllers: it must not be what a test waits for.
            flag("kube-api-qps", 1000),
            flag("kube-api-burst", 2000),
        ]
    }

    fn etcd_dir(&self) -> PathBuf {
        self.dir.join("etcd")
    }

    fn processes(&self) -> MutexGuard<'_, [Option<Process>; 3]> {
        // A panic in `resume` poisons it; the processes are sound all the same.
        self.processes.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let processes = self.processes();
            let running = Part::ALL.into_iter().zip(processes.iter());
            running
                .filter_map(|(part, process)| Some((part, process.as_ref()?)))
                .for_each(|(part, process)| show_end(part, process));
        }
        // The server before its store, so that nothing complains about a missing one.
        self.processes().iter_mut().rev().for_each(|process| *process = None);
    }
}

/// Prints the end of what a part said; the beginning is the same every time.
fn show_end(part: Part, process: &Process) {
    let lines = process.lines();
    let skipped = lines.len().saturating_sub(SHOWN_LINES);
    eprintln!("--- {} ({skipped} lines before)", part.program());
    lines[skipped..].iter().for_each(|line| eprintln!("{line}"));
}

fn flag(name: &str, value: impl std::fmt::Display) -> String {
    format!("--{name}={value}")
}

/// The directory of the binaries, or what to do if there is none.
pub fn find_bin_dir() -> Result<PathBuf, String> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/control-plane/bin");
    let dir = std::env::var_os("SHUNT_CONTROL_PLANE_BIN").map_or(built, PathBuf::from);
    match Part::ALL.into_iter().find(|part| !dir.join(part.program()).is_file()) {
        None => Ok(dir),
        Some(part) => Err(format!(
            "{} is not in {}: `cargo xtask test control-plane` builds it (Go and the way to its module proxy are needed), \
             or name another directory in SHUNT_CONTROL_PLANE_BIN",
            part.program(),
            dir.display()
        )),
    }
}
