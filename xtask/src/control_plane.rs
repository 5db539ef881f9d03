//! The control plane of the tests, kept built: etcd, kube-apiserver, kube-controller-manager, kube-proxy and kubectl.
//!
//! The versions are those of `tests/control-plane-go`, whose checksums are committed, so the same files come out everywhere. Each binary
//! leaves a stamp of all that went into it beside itself; nothing is run when every stamp still holds. May touch: `target/control-plane`,
//! Go and its caches.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

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
const BINARIES: [Binary; 5] = [
    Binary { name: "etcd", module: "etcd", package: "go.etcd.io/etcd/server/v3" },
    Binary { name: "kube-apiserver", module: "kubernetes", package: "k8s.io/kubernetes/cmd/kube-apiserver" },
    Binary {
        name: "kube-controller-manager",
        module: "kubernetes",
        package: "k8s.io/kubernetes/cmd/kube-controller-manager",
    },
    Binary { name: "kube-proxy", module: "kubernetes", package: "k8s.io/kubernetes/cmd/kube-proxy" },
    Binary { name: "kubectl", module: "kubernetes", package: "k8s.io/kubernetes/cmd/kubectl" },
];

/// Builds what is missing or out of date and says where it lies, or why this machine cannot.
///
/// Missing means that Go, or the way to the Go module proxy, is not there. The first build takes some ten minutes on two cores, later ones
/// come from Go's cache. Errors: a compile that fails although its sources are here, or a directory that cannot be written.
pub fn ensure() -> Result<Availability> {
    let bin_dir = target_dir().join("control-plane/bin");
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
    let mut command = go_command(go, binary);
    command.args(["list", "-deps", "-f", "{{.ImportPath}}", binary.package]);
    println!("+ {command:?}");
    let output = command.output().map_err(|error| format!("cannot run {}: {error}", go.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    let last = reason.lines().last().unwrap_or("go said nothing").to_owned();
    Err(format!("the sources of {} cannot be had from the Go module proxy (GOPROXY): {last}", binary.name))
}

fn build(go: &Path, binary: &Binary, bin_dir: &Path) -> Result<()> {
    let go_mod = fs::read_to_string(module_dir(binary).join("go.mod"))?;
    let mut command = go_command(go, binary);
    // -trimpath and no VCS stamp: the same bytes wherever the checkout lies.
    command.args(["build", "-trimpath", "-buildvcs=false", "-ldflags", &ldflags(binary, &go_mod)?, "-o"]);
    command.arg(bin_dir.join(binary.name)).arg(binary.package);
    println!("+ {command:?}");
    let status = command.status().with_context(|| format!("cannot run {}", go.display()))?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Linker flags: no symbols, and for Kubernetes the version that its own release build stamps in (it decides what the server says it is).
fn ldflags(binary: &Binary, go_mod: &str) -> Result<String> {
    if binary.module != "kubernetes" {
        return Ok("-s -w".to_owned());
    }
    let version = required_version(go_mod, "k8s.io/kubernetes")
        .context("tests/control-plane-go/kubernetes/go.mod does not require k8s.io/kubernetes")?;
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let base = "k8s.io/component-base/version";
    Ok(format!("-s -w -X {base}.gitVersion={version} -X {base}.gitMajor={major} -X {base}.gitMinor={minor}"))
}

/// The version that a `go.mod` requires of `module`, in a block or on a line of its own.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        let version = (words.next() == Some(module)).then(|| words.next()).flatten()?;
        version.starts_with('v').then_some(version)
    })
}

fn go_command(go: &Path, binary: &Binary) -> Command {
    let mut command = Command::new(go);
    command.current_dir(module_dir(binary));
    // GOTOOLCHAIN: never fetch another compiler. Read only: the committed checksums are the truth, not a file to be mended.
    command.env("GOTOOLCHAIN", "local").env("GOFLAGS", "-mod=readonly").env("GOWORK", "off").env("CGO_ENABLED", "0");
    command
}

/// Go on the path or where its own installer puts it (sudo often drops that from the path), or what to do to get it.
fn find_go() -> Result<PathBuf, String> {
    let (major, minor) = OLDEST_GO;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates =
        std::env::split_paths(&path).map(|dir| dir.join("go")).chain([PathBuf::from("/usr/local/go/bin/go")]);
    let mut found = None;
    for go in candidates.filter(|go| go.is_file()) {
        let Some(version) = go_version(&go) else { continue };
        if version >= OLDEST_GO {
            return Ok(go);
        }
        found = Some((go, version));
    }
    Err(match found {
        Some((go, (a, b))) => {
            format!("{} is Go {a}.{b}; Go {major}.{minor} or newer is needed: https://go.dev/dl", go.display())
        }
        None => format!("Go {major}.{minor} or newer is needed: https://go.dev/dl"),
    })
}

fn go_version(go: &Path) -> Option<(u32, u32)> {
    let output = Command::new(go).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").output().ok()?;
    parse_go_version(&String::from_utf8(output.stdout).ok()?)
}

/// Major and minor number of a line such as `go1.26.8` or `go1.27rc1`.
fn parse_go_version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.trim().strip_prefix("go")?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn module_dir(binary: &Binary) -> PathBuf {
    root_dir().join("tests/control-plane-go").join(binary.module)
}

fn stamp_path(bin_dir: &Path, binary: &Binary) -> PathBuf {
    bin_dir.join(format!("{}.stamp", binary.name))
}

fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root_dir().join("target"), PathBuf::from)
}

fn root_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies inside the repository").to_owned()
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
