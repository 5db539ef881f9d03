//! What a kubelet and a container runtime make of a container in a pod template: the configuration that runc is given (OCI
//! runtime specification). Pure. As kubelet 1.36 and containerd 2 do it, as far as the agent's manifest asks for it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// Where a service account is mounted.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Of all that a privileged container may, what it is privileged for here: runc refuses capabilities that the machine of the
/// tests has not itself.
const PRIVILEGED: [&str; 4] = ["CAP_BPF", "CAP_DAC_OVERRIDE", "CAP_NET_ADMIN", "CAP_SYS_ADMIN"];

/// The node as its kubelet knows it.
pub struct Host {
    /// Name of the node.
    pub name: String,
    /// The file that stands for its network namespace.
    pub netns: PathBuf,
    /// The unpacked image.
    pub rootfs: PathBuf,
    /// The node's control group, whose place on the node is `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// Where the pod's own volumes and its service account are.
    pub pod_dir: PathBuf,
    /// Name of the control group of its containers.
    pub containers: String,
}

impl Host {
    /// The service account's files, `token` and `ca.crt`.
    pub fn service_account(&self) -> PathBuf {
        self.pod_dir.join("service-account")
    }

    /// The resolver's file of fixed names.
    pub fn hosts(&self) -> PathBuf {
        self.pod_dir.join("hosts")
    }

    /// Where a volume is that the kubelet makes: an empty directory, the files of a ConfigMap.
    pub fn own_dir(&self, volume: &str) -> PathBuf {
        self.pod_dir.join("volumes").join(volume)
    }

    /// The node's whole file system, of which the test puts in its place what is needed.
    pub fn root(&self) -> PathBuf {
        self.pod_dir.join("root")
    }

    /// A path of the node on the machine of the tests. Whatever else is asked for must not be: it would be the machine's own.
    fn path(&self, path: &str) -> PathBuf {
        match path {
            "/sys/fs/cgroup" => self.cgroup.clone(),
            "/" => self.root(),
            // Of the mount namespace that runc is in; of the network namespace that the container is in.
            "/sys/fs/bpf" | "/proc/sys/net" => path.into(),
            _ => panic!("the pod mounts {path}, for which the test has no place"),
        }
    }
}

/// The configuration for one container of a pod.
pub fn config(pod: &Value, container: &Value, host: &Host) -> Value {
    let security = &container["securityContext"];
    let is_privileged = security["privileged"] == true;
    assert_eq!(pod["hostNetwork"], true, "the network namespace is the node's");
    let seccomp = &pod["securityContext"]["seccompProfile"]["type"];
    assert!(is_privileged || seccomp == "Unconfined", "no filter is made here");
    let capabilities = if is_privileged { PRIVILEGED.map(String::from).to_vec() } else { capabilities(security) };
    let env = variables(container, host);
    let command = list(&container["command"]).map(|word| text(word).to_owned()).collect::<Vec<_>>();
    let command = if command.is_empty() { vec!["/usr/bin/shunt".to_owned()] } else { command };
    let args = list(&container["args"]).map(|arg| expand(text(arg), &env));
    let mut mounts = standard_mounts(is_privileged);
    mounts.extend(list(&container["volumeMounts"]).map(|mount| volume(pod, mount, host)));
    mounts.push(bind(&host.service_account(), SERVICE_ACCOUNT, "rprivate", true));
    mounts.push(bind(&host.hosts(), "/etc/hosts", "rprivate", true));
    let kinds = ["mount", "pid", "ipc", "uts", "cgroup"].into_iter();
    let namespaces = kinds.filter(|kind| *kind != "pid" || pod["hostPID"] != true).map(|kind| json!({"type": kind}));
    let network = json!({"type": "network", "path": host.netns});
    let (masked, read_only): (&[&str], &[&str]) = if is_privileged { (&[], &[]) } else { (&MASKED, &READ_ONLY) };
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": security["runAsUser"].as_u64().unwrap_or(0), "gid": 0},
            "args": command.into_iter().chain(args).collect::<Vec<_>>(),
            "env": env.iter().map(|(name, value)| format!("{name}={value}"))
                .chain(["PATH=/usr/bin".to_owned()]).collect::<Vec<_>>(),
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
        },
        "root": {"path": host.rootfs, "readonly": security["readOnlyRootFilesystem"] == true},
        "mounts": mounts,
        "linux": {
            "cgroupsPath": format!("/{}", host.containers),
            "namespaces": namespaces.chain([network]).collect::<Vec<_>>(),
            "maskedPaths": masked,
            "readonlyPaths": read_only,
            "rootfsPropagation": if is_privileged { "rshared" } else { "rslave" },
        },
    })
}

/// What containerd hides and write-protects in a container that is not privileged.
const MASKED: [&str; 6] =
    ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("a text is needed: {value}"))
}

/// Those that are added to none.
fn capabilities(security: &Value) -> Vec<String> {
    assert_eq!(security["capabilities"]["drop"], json!(["ALL"]), "what a runtime gives unasked is not wanted");
    list(&security["capabilities"]["add"]).map(|name| format!("CAP_{}", text(name))).collect()
}

fn variables(container: &Value, host: &Host) -> Vec<(String, String)> {
    let value = |variable: &Value| match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
        Some("spec.nodeName") => host.name.clone(),
        Some(field) => panic!("the pod asks for {field}"),
        // The server leaves out an empty text.
        None => variable["value"].as_str().unwrap_or_default().to_owned(),
    };
    list(&container["env"]).map(|variable| (text(&variable["name"]).to_owned(), value(variable))).collect()
}

/// An argument with its `$(NAME)` replaced.
fn expand(arg: &str, env: &[(String, String)]) -> String {
    env.iter().fold(arg.to_owned(), |arg, (name, value)| arg.replace(&format!("$({name})"), value))
}

fn standard_mounts(is_privileged: bool) -> Vec<Value> {
    let mount = |kind: &str, at: &str, options: &[&str]| json!({"type": kind, "source": kind, "destination": at, "options": options});
    let access = if is_privileged { "rw" } else { "ro" };
    vec![
        mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", access]),
        mount("cgroup", "/sys/fs/cgroup", &["nosuid", "noexec", "nodev", "relatime", access]),
    ]
}

/// A volume where the container wants it.
fn volume(pod: &Value, mount: &Value, host: &Host) -> Value {
    let name = text(&mount["name"]);
    let volume =
        list(&pod["volumes"]).find(|volume| volume["name"] == name).unwrap_or_else(|| panic!("no volume {name}"));
    let source = match volume["hostPath"]["path"].as_str() {
        Some(path) => host.path(path),
        None if volume["emptyDir"].is_object() => host.own_dir(name),
        // What is in it the test has put there.
        None if volume["configMap"].is_object() => host.own_dir(name),
        None => panic!("of which kind is this volume: {volume}"),
    };
    let propagation = match mount["mountPropagation"].as_str() {
        None | Some("None") => "rprivate",
        Some("HostToContainer") => "rslave",
        Some("Bidirectional") => "rshared",
        Some(other) => panic!("unknown mountPropagation {other}"),
    };
    bind(&source, text(&mount["mountPath"]), propagation, mount["readOnly"] == true)
}

fn bind(source: &Path, at: &str, propagation: &str, is_read_only: bool) -> Value {
    let access = if is_read_only { "ro" } else { "rw" };
    json!({"type": "bind", "source": source, "destination": at, "options": ["rbind", propagation, access]})
}
