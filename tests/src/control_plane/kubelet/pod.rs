//! A pod as the API has it.

use std::time::Duration;

use serde_json::Value;

/// A pod.
#[derive(Clone, Debug)]
pub struct Pod(Value);

impl Pod {
    pub(super) fn new(object: Value) -> Self {
        Self(object)
    }

    /// The whole object.
    pub fn object(&self) -> &Value {
        &self.0
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        self.metadata("namespace")
    }

    /// Its name, unique in its namespace while it is there.
    pub fn name(&self) -> &str {
        self.metadata("name")
    }

    /// Unique for all time: a pod that is created anew under its old name has another.
    pub fn uid(&self) -> &str {
        self.metadata("uid")
    }

    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace(), self.name())
    }

    /// The node it is bound to; empty if to none.
    pub fn node(&self) -> &str {
        self.0["spec"]["nodeName"].as_str().unwrap_or_default()
    }

    /// The value of one of its labels.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.0["metadata"]["labels"][key].as_str()
    }

    /// True if it has no network namespace of its own.
    pub fn uses_host_network(&self) -> bool {
        self.0["spec"]["hostNetwork"] == true
    }

    /// How long its processes have after SIGTERM, if it is deleted.
    pub(super) fn deletion_grace(&self) -> Option<Duration> {
        let metadata = &self.0["metadata"];
        metadata["deletionTimestamp"].as_str().map(|_| seconds(&metadata["deletionGracePeriodSeconds"]))
    }

    /// How long its processes have if nobody says otherwise.
    pub(super) fn own_grace(&self) -> Duration {
        seconds(&self.0["spec"]["terminationGracePeriodSeconds"])
    }

    /// How long preStop sleeps before SIGTERM: the longest of its containers.
    pub(super) fn pre_stop_sleep(&self) -> Duration {
        self.containers()
            .map(|container| seconds(&container["lifecycle"]["preStop"]["sleep"]["seconds"]))
            .max()
            .unwrap_or_default()
    }

    /// True if it has ended for good.
    pub(super) fn is_terminal(&self) -> bool {
        matches!(self.0["status"]["phase"].as_str(), Some("Succeeded" | "Failed"))
    }

    pub(super) fn containers(&self) -> impl Iterator<Item = &Value> {
        self.0["spec"]["containers"].as_array().into_iter().flatten()
    }

    pub(super) fn node_selector(&self) -> impl Iterator<Item = (&str, &str)> {
        let selector = self.0["spec"]["nodeSelector"].as_object();
        selector.into_iter().flatten().map(|(key, value)| (key.as_str(), value.as_str().unwrap_or_default()))
    }

    fn metadata(&self, key: &str) -> &str {
        self.0["metadata"][key].as_str().unwrap_or_default()
    }
}

fn seconds(value: &Value) -> Duration {
    Duration::from_secs(value.as_u64().unwrap_or(0))
}
