//! kubectl and Helm on a control plane, and what they read from `deploy/`.

use serde_json::Value;
use shunt_tests::bed::Bed;
use shunt_tests::control_plane::{ControlPlane, Identity};
use shunt_tests::process::{Command, Stdio};
use std::fs;
use std::path::{Path, PathBuf};

/// The namespace of the agent.
pub const NAMESPACE: &str = "kube-system";

/// kubectl and Helm as the administrator.
pub struct Tools<'a> {
    plane: &'a ControlPlane,
    deploy: PathBuf,
    /// Where both look for caches and preferences.
    home: PathBuf,
}

impl<'a> Tools<'a> {
    #[track_caller]
    pub fn new(plane: &'a ControlPlane, bed: &Bed) -> Self {
        Self { plane, deploy: Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy"), home: bed.subdir("home") }
    }

    /// The folder of a kustomization.
    pub fn overlay(&self, name: &str) -> String {
        self.deploy.join("kustomize").join(name).display().to_string()
    }

    /// What kubectl prints; panics if it fails.
    #[track_caller]
    pub fn kubectl<const N: usize>(&self, args: [&str; N], input: &str) -> String {
        self.plane.ns().feed(self.kubectl_command(&args), input)
    }

    /// Whether kubectl succeeds.
    #[track_caller]
    pub fn try_kubectl(&self, args: &[&str]) -> bool {
        let mut command = self.kubectl_command(args);
        let status = command.stdin(Stdio::null()).status();
        status.unwrap_or_else(|error| panic!("cannot run {command:?}: {error}")).success()
    }

    fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut command = self.plane.ns().command(self.plane.binary("kubectl"));
        command.arg("--kubeconfig").arg(self.plane.kubeconfig(Identity::Admin)).args(args);
        command.env("HOME", &self.home);
        // The guide speaks of files as they lie in the repository.
        command.current_dir(self.deploy.join(".."));
        command
    }

    /// The objects of a kustomization.
    #[track_caller]
    pub fn kustomize(&self, overlay: &str) -> Vec<Value> {
        objects(&self.kubectl(["kustomize", &self.overlay(overlay)], ""))
    }

    /// The objects of the chart with these values.
    #[track_caller]
    pub fn helm(&self, values: &[&str]) -> Vec<Value> {
        objects(&self.helm_text(values))
    }

    /// The same as text.
    #[track_caller]
    pub fn helm_text(&self, values: &[&str]) -> String {
        self.helm_output(values).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same, or what Helm complains of.
    pub fn helm_output(&self, values: &[&str]) -> Result<String, String> {
        self.helm_command(["template", "shunt"], values)
    }

    /// What a command of Helm prints about the chart with these values, or what it complains of.
    pub fn helm_command<const N: usize>(&self, words: [&str; N], values: &[&str]) -> Result<String, String> {
        let mut command = Command::new(self.plane.binary("helm"));
        command.args(words).arg(self.deploy.join("helm/shunt")).args(["--namespace", NAMESPACE]);
        for value in values {
            command.args(["--set", value]);
        }
        command.env("HOME", &self.home);
        let output = command.output().unwrap_or_else(|error| panic!("cannot run helm: {error}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }
}

/// The objects in YAML documents.
#[track_caller]
fn objects(yaml: &str) -> Vec<Value> {
    let objects = serde_saphyr::from_multiple::<Value>(yaml).unwrap_or_else(|error| panic!("{error}:\n{yaml}"));
    objects.into_iter().filter(|object| !object.is_null()).collect()
}

/// Kind and name of an object.
pub fn key(object: &Value) -> String {
    format!(
        "{}/{}",
        object["kind"].as_str().unwrap_or_default(),
        object["metadata"]["name"].as_str().unwrap_or_default()
    )
}

/// The arguments of every kubectl in the migration guide, for a node of this name. A word there has no blank in it.
#[track_caller]
pub fn guide(node: &str) -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/MIGRATION.md");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    let commands = text.lines().filter_map(|line| line.trim().strip_prefix("kubectl "));
    let word = |word: &str| word.trim_matches('\'').replace("NODE", node);
    commands.map(|command| command.split_whitespace().map(word).collect()).collect()
}
