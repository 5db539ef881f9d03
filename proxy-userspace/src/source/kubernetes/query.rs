//! What is asked of the API server for each kind: paths and selectors. Pure.

use http::Request as HttpRequest;
use kube::api::{ListParams, WatchParams};
use kube::core::Request;

use crate::model::{Kind, Name, ObjectKey};

/// Objects in one answer to a list, at most. The most that kube-apiserver and etcd like to give at once, and what client-go asks.
const PAGE: u32 = 500;

/// Services of which another proxy takes care are not ours (KEP-2447).
const OWN_SERVICES: &str = "!service.kubernetes.io/service-proxy-name";
/// Headless services have nothing to be programmed. Servers before Kubernetes 1.34 or so refuse this selector.
const WITH_ADDRESS: &str = "spec.clusterIP!=None";
/// Their slices neither.
const OWN_SLICES: &str = "!service.kubernetes.io/headless";

/// A request, without the server's address.
pub type Ask = HttpRequest<Vec<u8>>;

/// What is asked about one kind.
#[derive(Clone, Debug)]
pub struct Query {
    kind: Kind,
    labels: Option<&'static str>,
    fields: Option<String>,
}

impl Query {
    /// The query for a kind, of nodes for `node` alone: kube-proxy's selectors.
    pub fn new(kind: Kind, node: &Name) -> Self {
        let (labels, fields) = match kind {
            Kind::Service => (Some(OWN_SERVICES), Some(WITH_ADDRESS.to_owned())),
            Kind::EndpointSlice => (Some(OWN_SLICES), None),
            Kind::Node => (None, Some(format!("metadata.name={node}"))),
            Kind::Endpoints | Kind::ServiceCidr => (None, None),
        };
        Self { kind, labels, fields }
    }

    /// What is asked for.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// True if a cluster may do without this kind: before Kubernetes 1.33 it has none, and the role does not name it.
    pub fn is_optional(&self) -> bool {
        self.kind == Kind::ServiceCidr
    }

    /// Leaves to us what an old server cannot select by. False if there is nothing of that kind.
    pub fn relax(&mut self) -> bool {
        let can_relax = self.kind == Kind::Service && self.fields.is_some();
        if can_relax {
            self.fields = None;
        }
        can_relax
    }

    /// One page of the list: the first, or the one that `token` stands for.
    pub fn list(&self, token: Option<&str>) -> Ask {
        let params = ListParams { limit: Some(PAGE), continue_token: token.map(str::to_owned), ..self.list_params() };
        ask_list(path(self.kind), &params)
    }

    /// As little of the list as can be had: it tells the newest version.
    pub fn probe(&self) -> Ask {
        ask_list(path(self.kind), &ListParams { limit: Some(1), ..self.list_params() })
    }

    /// The changes after `version`, for `seconds`.
    pub fn watch(&self, version: &str, seconds: u64) -> Ask {
        let params = WatchParams {
            label_selector: self.labels.map(str::to_owned),
            field_selector: self.fields.clone(),
            timeout: Some(u32::try_from(seconds).unwrap_or(u32::MAX)),
            bookmarks: true,
            send_initial_events: false,
        };
        Request::new(path(self.kind)).watch(&params, version).expect(VALID)
    }

    fn list_params(&self) -> ListParams {
        let params = ListParams { field_selector: self.fields.clone(), ..ListParams::default() };
        ListParams { label_selector: self.labels.map(str::to_owned), ..params }
    }
}

/// A list of one object, which the role allows where it does not allow to get it.
pub fn ask_object(key: &ObjectKey) -> Ask {
    let all = path(key.kind);
    let namespace = key.namespace.as_str();
    let fields = ListParams::default().fields(&format!("metadata.name={}", key.name));
    match all.rsplit_once('/') {
        Some((group, kind)) if !namespace.is_empty() => {
            ask_list(&format!("{group}/namespaces/{namespace}/{kind}"), &fields)
        }
        _ => ask_list(all, &fields),
    }
}

/// The one service that every API server makes itself: its uid tells one store from another.
pub fn ask_identity() -> Ask {
    ask_list("/api/v1/namespaces/default/services", &ListParams::default().fields("metadata.name=kubernetes"))
}

fn ask_list(path: &str, params: &ListParams) -> Ask {
    Request::new(path).list(params).expect(VALID)
}

/// Why building a request cannot fail.
const VALID: &str =
    "the path is constant, or has a namespace that the server knows, and everything else is percent-encoded";

fn path(kind: Kind) -> &'static str {
    match kind {
        Kind::Service => "/api/v1/services",
        Kind::Endpoints => "/api/v1/endpoints",
        Kind::Node => "/api/v1/nodes",
        Kind::EndpointSlice => "/apis/discovery.k8s.io/v1/endpointslices",
        Kind::ServiceCidr => "/apis/networking.k8s.io/v1/servicecidrs",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(ask: &Ask) -> String {
        ask.uri().to_string()
    }

    #[test]
    fn selectors_are_those_of_kube_proxy() {
        let list = |kind| uri(&Query::new(kind, &Name::from("node-a")).list(None));
        assert_eq!(
            list(Kind::Service),
            "/api/v1/services?&fieldSelector=spec.clusterIP%21%3DNone\
             &labelSelector=%21service.kubernetes.io%2Fservice-proxy-name&limit=500"
        );
        assert_eq!(
            list(Kind::EndpointSlice),
            "/apis/discovery.k8s.io/v1/endpointslices?&labelSelector=%21service.kubernetes.io%2Fheadless&limit=500"
        );
        assert_eq!(list(Kind::Node), "/api/v1/nodes?&fieldSelector=metadata.name%3Dnode-a&limit=500");
        assert_eq!(list(Kind::ServiceCidr), "/apis/networking.k8s.io/v1/servicecidrs?&limit=500");
    }

    #[test]
    fn pages_and_watches_keep_the_selectors() {
        let query = Query::new(Kind::Node, &Name::from("a"));
        assert_eq!(
            uri(&query.list(Some("t=&"))),
            "/api/v1/nodes?&fieldSelector=metadata.name%3Da&limit=500&continue=t%3D%26"
        );
        let watch = uri(&query.watch("12", 300));
        for part in
            ["watch=true", "timeoutSeconds=300", "metadata.name%3Da", "allowWatchBookmarks=true", "resourceVersion=12"]
        {
            assert!(watch.contains(part), "{part}: {watch}");
        }
    }

    #[test]
    fn one_object_is_listed_where_it_is() {
        let key = |kind, namespace| ObjectKey { kind, namespace: Name::from(namespace), name: Name::from("a") };
        let list = |kind, namespace| uri(&ask_object(&key(kind, namespace)));
        assert_eq!(list(Kind::Service, "shop"), "/api/v1/namespaces/shop/services?&fieldSelector=metadata.name%3Da");
        assert_eq!(
            list(Kind::EndpointSlice, "shop"),
            "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices?&fieldSelector=metadata.name%3Da"
        );
        assert_eq!(
            list(Kind::ServiceCidr, ""),
            "/apis/networking.k8s.io/v1/servicecidrs?&fieldSelector=metadata.name%3Da"
        );
    }

    #[test]
    fn only_the_selector_that_is_new_can_be_left_out() {
        let mut services = Query::new(Kind::Service, &Name::from("a"));
        assert!(services.relax() && !services.relax());
        assert!(
            !uri(&services.list(None)).contains("fieldSelector") && uri(&services.list(None)).contains("labelSelector")
        );
        assert!(!Query::new(Kind::Node, &Name::from("a")).relax());
    }
}
