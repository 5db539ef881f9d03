//! The control plane of the tests, kept built: etcd, kube-apiserver, kube-controller-manager, kube-proxy, kubectl and helm.
//!
//! The versions are those of `tests/control-plane-go`, whose checksums are committed, so the same files come out everywhere. Each binary
//! leaves a stamp of all that went into it beside itself; nothing is run when every stamp still holds. May touch: `target/control-plane`,
//! Go and its caches.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result};

use crate::{
    run::{Cmd, say},
    workspace,
};

/// The oldest Go that compiles these versions; `go.mod` asks for it.
const OLDEST_GO: (u32, u32) = (1, 26);

/// Whether the tests that want a real control plane can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Every binary is in this directory.
    Ready {
        /// Given to the tests as `SHUNT_CONTROL_PLANE_BIN`.
        bin_dir: PathBuf,
    },
    /// They cannot be built here.
    Missing {
        /// One line for a person: what is missing and what to do about it.
        why: String,
    },
}

/// One binary and the module it comes from.
struct Binary {
    name: &'static str,
    /// Directory under `tests/control-plane-go`.
    module: &'static str,
    package: &'static str,
}

/// In the order of building: what the tests cannot do without comes first.
const BINARIES: [Binary; 6] = [
    Binary { name: "etcd", module: "etcd", package: "go.etcd.io/etcd/server/v3" },
    Binary { name: "kube-apiserver", module: "kubernetes", package: "k8s.io/kubernetes/cmd/kube-apiserver" },
    Binary {
        name: "kube-controller-manager",
        module: "kubernetes",
        package: "k8s.io/kubernetes/cmd/kube-controller-manager",
    },
    Binary { name: "kube-proxy", module: "kubernetes", package: "k8s.io/kubernetes/cmd/kube-proxy" },
    Binary { name: "kubectl", module: "kubernetes", package: "k8s.io/kubernetes/cmd/kubectl" },
    Binary { name: "helm", module: "helm", package: "helm.sh/helm/v3/cmd/helm" },
];

/// Builds what is missing or out of date and says where it lies, or why this machine cannot.
///
/// Missing means that Go, or the way to the Go module proxy, is not there. The first build takes some ten minutes on two cores, later ones
/// come from Go's cache. Errors: a compile that fails although its sources are here, or a directory that cannot be written.
pub fn ensure() -> Result<Availability> {
    let bin_dir = workspace::target().join("control-plane/bin");
    fs::create_dir_all(&bin_dir).with_context(|| format!("cannot create {}", bin_dir.display()))?;
    let mut outdated = Vec::new();
    for binary in &BINARIES {
        let stamp = stamp_of(binary)?;
        if !is_built(&bin_dir, binary, &stamp) {
            outdated.push((binary, stamp));
        }
    }
    if outdated.is_empty() {
        return Ok(Availability::Ready { bin_dir });
    }
    let go = match find_go() {
        Ok(go) => go,
        Err(why) => return Ok(Availability::Missing { why }),
    };
    say("building the control plane of the tests; the first time takes some minutes");
    for (binary, stamp) in &outdated {
        if let Err(why) = download(&go, binary) {
            return Ok(Availability::Missing { why });
        }
        build(&go, binary, &bin_dir)?;
        fs::write(stamp_path(&bin_dir, binary), stamp)?;
    }
    Ok(Availability::Ready { bin_dir })
}

/// All that decides what comes out of a build, as text: compared, never parsed.
fn stamp_of(binary: &Binary) -> Result<String> {
    let module = module_dir(binary);
    let read = |name: &str| {
        let path = module.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let go_mod = read("go.mod")?;
    let version = ldflags(binary, &go_mod)?;
    Ok(format!("{}\n{version}\n{go_mod}\n{}", binary.package, read("go.sum")?))
}

fn is_built(bin_dir: &Path, binary: &Binary, stamp: &str) -> bool {
    bin_dir.join(binary.name).is_file() && fs::read_to_string(stamp_path(bin_dir, binary)).is_ok_and(|old| old == stamp)
}

/// Fetches the sources, or says why they cannot be had. Does nothing when they are in Go's cache.
fn download(go: &Path, binary: &Binary) -> Result<(), String> {
    let list = go_cmd(go, binary).args(["list", "-deps", binary.package]).stdout(Stdio::null());
    let why =
        |error| format!("the sources of {} cannot be had from the Go module proxy (GOPROXY): {error:#}", binary.name);
    list.run().map_err(why)
}

fn build(go: &Path, binary: &Binary, bin_dir: &Path) -> Result<()> {
    let go_mod = fs::read_to_string(module_dir(binary).join("go.mod"))?;
    // -trimpath and no VCS stamp: the same bytes wherever the checkout lies.
    let build =
        go_cmd(go, binary).args(["build", "-trimpath", "-buildvcs=false", "-ldflags", &ldflags(binary, &go_mod)?]);
    build.arg("-o").arg(bin_dir.join(binary.name)).arg(binary.package).run()
}

/// Linker flags: no symbols, and the version of Kubernetes that the projects' own release builds stamp in. It decides what the
/// server says it is, and what Helm believes to render for.
fn ldflags(binary: &Binary, go_mod: &str) -> Result<String> {
    let required = |module: &str| {
        required_version(go_mod, module)
            .with_context(|| format!("tests/control-plane-go/{}/go.mod does not require {module}", binary.module))
    };
    match binary.module {
        "kubernetes" => {
            let version = required("k8s.io/kubernetes")?;
            let (major, minor) = major_and_minor(version);
            let base = "k8s.io/component-base/version";
            Ok(format!("-s -w -X {base}.gitVersion={version} -X {base}.gitMajor={major} -X {base}.gitMinor={minor}"))
        }
        "helm" => {
            // Client libraries are published as v0 with the minor number of their release of Kubernetes.
            let (_, minor) = major_and_minor(required("k8s.io/client-go")?);
            let base = "helm.sh/helm/v3/pkg/chartutil";
            Ok(format!("-s -w -X {base}.k8sVersionMajor=1 -X {base}.k8sVersionMinor={minor}"))
        }
        _ => Ok("-s -w".to_owned()),
    }
}

/// The first two numbers of a version such as `v1.36.3`.
fn major_and_minor(version: &str) -> (&str, &str) {
    let mut numbers = version.trim_start_matches('v').split('.');
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

/// The version that a `go.mod` requires of `module`, in a block or on a line of its own.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        let version = (words.next() == Some(module)).then(|| words.next()).flatten()?;
        version.starts_with('v').then_some(version)
    })
}

fn go_cmd(go: &Path, binary: &Binary) -> Cmd {
    // GOTOOLCHAIN: never fetch another compiler. Read only: the committed checksums are the truth, not a file to be mended.
    let cmd = Cmd::new(go).dir(module_dir(binary)).env("GOTOOLCHAIN", "local").env("GOFLAGS", "-mod=readonly");
    cmd.env("CGO_ENABLED", "0").env_quietly("GOWORK", "off")
}

/// Go on the path or where its own installer puts it (sudo often drops that from the path), or what to do to get it.
fn find_go() -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain([PathBuf::from("/usr/local/go/bin")]);
    let found: Vec<_> = dirs.map(|dir| dir.join("go")).filter(|go| go.is_file()).collect();
    let is_new_enough = |go: &&PathBuf| go_version(go).is_some_and(|version| version >= OLDEST_GO);
    found.iter().find(is_new_enough).cloned().ok_or_else(|| {
        let (major, minor) = OLDEST_GO;
        let have = found.first().map(|go| format!("{} is older: ", go.display())).unwrap_or_default();
        format!("{have}Go {major}.{minor} or newer is needed, from https://go.dev/dl or the distribution")
    })
}

fn go_version(go: &Path) -> Option<(u32, u32)> {
    parse_go_version(&Cmd::new(go).args(["env", "GOVERSION"]).env_quietly("GOTOOLCHAIN", "local").read().ok()?)
}

/// Major and minor number of a line such as `go1.26.8` or `go1.27rc1`.
fn parse_go_version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.trim().strip_prefix("go")?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn module_dir(binary: &Binary) -> PathBuf {
    workspace::root().join("tests/control-plane-go").join(binary.module)
}

fn stamp_path(bin_dir: &Path, binary: &Binary) -> PathBuf {
    bin_dir.join(format!("{}.stamp", binary.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_versions_are_read_as_numbers() {
        assert_eq!(parse_go_version("go1.26.8\n"), Some((1, 26)));
        assert_eq!(parse_go_version("go1.27rc1"), Some((1, 27)));
        assert_eq!(parse_go_version("devel go1.27-abcdef"), None);
    }

    #[test]
    fn the_required_version_is_not_the_replaced_one() {
        let go_mod =
            "require (\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\nreplace (\n\tk8s.io/api => k8s.io/api v0.36.3\n)\n";
        assert_eq!(required_version(go_mod, "k8s.io/kubernetes"), Some("v1.36.3"));
        assert_eq!(
            required_version("require go.etcd.io/etcd/server/v3 v3.6.8\n", "go.etcd.io/etcd/server/v3"),
            Some("v3.6.8")
        );
        assert_eq!(required_version(go_mod, "k8s.io/api"), None);
    }

    #[test]
    fn every_stamp_can_be_made_and_differs() {
        let stamps: std::collections::BTreeSet<_> =
            BINARIES.iter().map(|b| stamp_of(b).expect("modules are committed")).collect();
        assert_eq!(stamps.len(), BINARIES.len());
    }
}
