//! Where the API server is, and who we are there: a kubeconfig, or a pod's service account.
//!
//! The environment is not asked: `KUBERNETES_SERVICE_HOST` is the ClusterIP that this agent has yet to program, and the
//! proxies in it are for the way out of the cluster. May touch: the files named here.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::Client;
use kube::client::{Body, ClientBuilder, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use tower::BoxError;
use tower::util::MapErrLayer;

/// Where the kubelet puts a pod's service account.
pub const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The address of an API server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Server(http::Uri);

impl Server {
    /// Reads `https://HOST[:PORT][/PATH]`; `https` if no scheme is given. What is wrong with it, as an error.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no address of an API server, such as https://192.0.2.10:6443");
        let text = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
        let uri: http::Uri = text.parse().map_err(|_| wrong())?;
        let has_scheme = matches!(uri.scheme_str(), Some("https" | "http"));
        let has_host = uri.host().is_some_and(|host| !host.is_empty());
        let is_plain =
            uri.query().is_none() && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
        if has_scheme && has_host && is_plain { Ok(Self(uri)) } else { Err(wrong()) }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How the API server is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Access {
    /// As the current context of a kubeconfig says.
    Kubeconfig {
        /// The file.
        file: PathBuf,
        /// Another server than the file's.
        server: Option<Server>,
    },
    /// As a pod.
    ServiceAccount {
        /// Where its `token` and `ca.crt` are.
        dir: PathBuf,
        /// The server.
        server: Server,
    },
}

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {}", .file.display())]
    Kubeconfig {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: KubeconfigError,
    },
    /// The kubeconfig wants something that we do not have.
    #[error("the kubeconfig {} has a proxy-url, which is not supported", .file.display())]
    Proxy {
        /// The file.
        file: PathBuf,
    },
    /// A file of the service account cannot be read.
    #[error("cannot read {}: only pods with a service account have it; elsewhere use --kubeconfig FILE", .file.display())]
    ServiceAccount {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The certificates or credentials named there cannot be used.
    #[error("cannot use the credentials for {server}")]
    Credentials {
        /// The server.
        server: Server,
        /// The cause.
        source: Box<kube::Error>,
    },
}

impl Access {
    /// A client with credentials that are read anew, and the server it is for. Connects to nobody yet.
    pub(super) async fn open(&self) -> Result<(Client, Server), Error> {
        let config = self.read().await?;
        let server = Server(config.cluster_url.clone());
        // A kubeconfig may name a program that has the credentials: it is run here.
        let built = tokio::task::spawn_blocking(move || build_client(&config)).await;
        match built.expect("kube's constructors do not panic, and nobody aborts this") {
            Ok(client) => Ok((client, server)),
            Err(error) => Err(Error::Credentials { server, source: Box::new(error) }),
        }
    }

    async fn read(&self) -> Result<kube::Config, Error> {
        match self {
            Self::Kubeconfig { file, server } => read_kubeconfig(file, server.as_ref()).await,
            Self::ServiceAccount { dir, server } => read_service_account(dir, server),
        }
    }
}

async fn read_kubeconfig(file: &Path, server: Option<&Server>) -> Result<kube::Config, Error> {
    let failed = |source| Error::Kubeconfig { file: file.to_owned(), source };
    let kubeconfig = Kubeconfig::read_from(file).map_err(failed)?;
    if wants_proxy(&kubeconfig) {
        return Err(Error::Proxy { file: file.to_owned() });
    }
    let options = KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(failed)?;
    // kube has put the environment's here.
    config.proxy_url = None;
    if let Some(server) = server {
        config.cluster_url = server.0.clone();
    }
    Ok(config)
}

/// Silence after which the kernel asks whether the other end is still there, and how it goes on asking. A watch may have
/// nothing to tell for minutes; a server whose machine is gone would look the same.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_AGAIN: Duration = Duration::from_secs(5);
const KEEPALIVE_TRIES: u32 = 3;
/// How long a connection may take to be made, and what was sent may stay without acknowledgement.
const PATIENCE: Duration = Duration::from_secs(30);

/// kube's own stack, less its tracing and retries, plus keepalive.
fn build_client(config: &kube::Config) -> Result<Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(PATIENCE));
    tcp.set_tcp_user_timeout(Some(PATIENCE));
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE_AGAIN));
    tcp.set_keepalive_retries(Some(KEEPALIVE_TRIES));
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(tls);
    // The first layer is the last to see a request.
    let stack = ClientBuilder::new(http, config.default_namespace.clone())
        .with_layer(&MapErrLayer::new(BoxError::from))
        .with_layer(&config.extra_headers_layer()?);
    let base = config.base_uri_layer();
    Ok(match config.auth_layer()? {
        Some(auth) => stack.with_layer(&auth).with_layer(&base).build(),
        None => stack.with_layer(&base).build(),
    })
}

/// True if the cluster of the current context is behind a proxy.
fn wants_proxy(kubeconfig: &Kubeconfig) -> bool {
    let current = kubeconfig.current_context.as_ref();
    let contexts = kubeconfig.contexts.iter().filter(|context| Some(&context.name) == current);
    let mut clusters = contexts.filter_map(|context| Some(&context.context.as_ref()?.cluster));
    clusters.any(|name| {
        let mut named = kubeconfig.clusters.iter().filter(|cluster| cluster.name == *name);
        named.any(|named| named.cluster.as_ref().is_some_and(|cluster| cluster.proxy_url.is_some()))
    })
}

fn read_service_account(dir: &Path, server: &Server) -> Result<kube::Config, Error> {
    let (token, ca) = (dir.join("token"), dir.join("ca.crt"));
    for file in [&token, &ca] {
        fs::File::open(file).map_err(|source| Error::ServiceAccount { file: file.clone(), source })?;
    }
    let mut config = kube::Config::new(server.0.clone());
    config.root_cert_file = Some(ca);
    // What the file says takes the place of these. Without any, kube would first load the machine's own, and an image may have none.
    config.root_cert = Some(Vec::new());
    // The client reads it again at least once a minute.
    config.auth_info.token_file = Some(token.display().to_string());
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_servers() {
        let cases = [
            ("https://192.0.2.10:6443", Some("https://192.0.2.10:6443/")),
            ("192.0.2.10:6443", Some("https://192.0.2.10:6443/")),
            ("[2001:db8::1]:6443", Some("https://[2001:db8::1]:6443/")),
            ("api.example", Some("https://api.example/")),
            ("http://127.0.0.1:8001", Some("http://127.0.0.1:8001/")),
            ("https://api.example/k8s/clusters/c-1", Some("https://api.example/k8s/clusters/c-1")),
            ("ftp://192.0.2.10", None),
            ("https://", None),
            ("https://me@192.0.2.10", None),
            ("https://192.0.2.10?x", None),
            ("a b", None),
            ("", None),
        ];
        for (text, expected) in cases {
            let server = Server::parse(text).map(|server| server.to_string());
            assert_eq!(server.as_deref().ok(), expected, "{text:?}: {server:?}");
        }
    }

    #[test]
    fn a_proxy_of_another_cluster_is_none_of_ours() {
        let text = |proxied: &str| {
            format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: us\n\
                 contexts:\n- {{name: us, context: {{cluster: ours}}}}\n\
                 clusters:\n- {{name: {proxied}, cluster: {{server: 'https://x', proxy-url: 'http://p'}}}}\n"
            )
        };
        let wants = |proxied| wants_proxy(&Kubeconfig::from_yaml(&text(proxied)).unwrap());
        assert!(wants("ours"));
        assert!(!wants("theirs"));
    }
}
