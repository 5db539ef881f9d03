//! The kinds of object that tests handle, and where the API serves them.

use serde_json::Value;

/// A kind of object. Those below are all that [`Kind::of`] knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    api_version: &'static str,
    name: &'static str,
    plural: &'static str,
    is_namespaced: bool,
}

impl Kind {
    /// apps/v1 Deployment.
    pub const DEPLOYMENT: Self = Self::namespaced("apps/v1", "Deployment", "deployments");
    /// discovery.k8s.io/v1 EndpointSlice.
    pub const ENDPOINT_SLICE: Self = Self::namespaced("discovery.k8s.io/v1", "EndpointSlice", "endpointslices");
    /// The legacy v1 Endpoints.
    pub const ENDPOINTS: Self = Self::namespaced("v1", "Endpoints", "endpoints");
    /// v1 Event.
    pub const EVENT: Self = Self::namespaced("v1", "Event", "events");
    /// networking.k8s.io/v1 IPAddress.
    pub const IP_ADDRESS: Self = Self::cluster("networking.k8s.io/v1", "IPAddress", "ipaddresses");
    /// v1 Namespace.
    pub const NAMESPACE: Self = Self::cluster("v1", "Namespace", "namespaces");
    /// v1 Node.
    pub const NODE: Self = Self::cluster("v1", "Node", "nodes");
    /// v1 Pod.
    pub const POD: Self = Self::namespaced("v1", "Pod", "pods");
    /// apps/v1 ReplicaSet.
    pub const REPLICA_SET: Self = Self::namespaced("apps/v1", "ReplicaSet", "replicasets");
    /// v1 Secret.
    pub const SECRET: Self = Self::namespaced("v1", "Secret", "secrets");
    /// v1 Service.
    pub const SERVICE: Self = Self::namespaced("v1", "Service", "services");
    /// networking.k8s.io/v1 ServiceCIDR.
    pub const SERVICE_CIDR: Self = Self::cluster("networking.k8s.io/v1", "ServiceCIDR", "servicecidrs");

    const ALL: [Self; 12] = [
        Self::DEPLOYMENT,
        Self::ENDPOINT_SLICE,
        Self::ENDPOINTS,
        Self::EVENT,
        Self::IP_ADDRESS,
        Self::NAMESPACE,
        Self::NODE,
        Self::POD,
        Self::REPLICA_SET,
        Self::SECRET,
        Self::SERVICE,
        Self::SERVICE_CIDR,
    ];

    const fn namespaced(api_version: &'static str, name: &'static str, plural: &'static str) -> Self {
        Self { api_version, name, plural, is_namespaced: true }
    }

    const fn cluster(api_version: &'static str, name: &'static str, plural: &'static str) -> Self {
        Self { api_version, name, plural, is_namespaced: false }
    }

    /// The kind that an object says it is of. Panics if it is none of ours.
    #[track_caller]
    pub fn of(object: &Value) -> Self {
        let (version, name) = (object["apiVersion"].as_str(), object["kind"].as_str());
        let found = Self::ALL.into_iter().find(|kind| version == Some(kind.api_version) && name == Some(kind.name));
        found.unwrap_or_else(|| panic!("apiVersion {version:?}, kind {name:?}: not in control_plane::Kind"))
    }

    /// As in `apiVersion`.
    pub fn api_version(&self) -> &'static str {
        self.api_version
    }

    /// As in `kind`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// True if its objects live in namespaces.
    pub fn is_namespaced(&self) -> bool {
        self.is_namespaced
    }

    /// Path of its collection: of one namespace, or of all when none is given.
    pub(super) fn path(&self, namespace: Option<&str>) -> String {
        // The core group alone has no slash in its version and lies under /api.
        let root = if self.api_version.contains('/') { "/apis" } else { "/api" };
        let namespace = namespace.map(|name| format!("/namespaces/{name}")).unwrap_or_default();
        format!("{root}/{}{namespace}/{}", self.api_version, self.plural)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn paths_follow_group_and_namespace() {
        assert_eq!(Kind::POD.path(Some("a")), "/api/v1/namespaces/a/pods");
        assert_eq!(Kind::POD.path(None), "/api/v1/pods");
        assert_eq!(Kind::SERVICE_CIDR.path(None), "/apis/networking.k8s.io/v1/servicecidrs");
    }

    #[test]
    fn every_kind_is_found_by_what_its_objects_say() {
        for kind in Kind::ALL {
            assert_eq!(Kind::of(&json!({"apiVersion": kind.api_version, "kind": kind.name})), kind);
        }
    }
}
