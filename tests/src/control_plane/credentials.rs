//! Who may speak to a test's API server, and how each side knows the other: a CA made for the test, a serving certificate,
//! one token for each identity, a kubeconfig with each.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use serde_json::json;

/// On whose behalf a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// May do everything (group `system:masters`).
    Admin,
    /// The user `system:kube-proxy`: the role `system:node-proxier` is bound to it by the server itself, and nothing else.
    KubeProxy,
}

impl Identity {
    const ALL: [Self; 2] = [Self::Admin, Self::KubeProxy];

    fn user(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::KubeProxy => "system:kube-proxy",
        }
    }

    fn groups(self) -> &'static str {
        match self {
            Self::Admin => "system:masters",
            Self::KubeProxy => "",
        }
    }

    /// Nothing to be kept secret: the server is reached from the test's namespaces only.
    fn token(self) -> &'static str {
        match self {
            Self::Admin => "token-of-admin",
            Self::KubeProxy => "token-of-kube-proxy",
        }
    }

    fn file_name(self) -> &'static str {
        match self {
            Self::Admin => "admin.kubeconfig",
            Self::KubeProxy => "kube-proxy.kubeconfig",
        }
    }
}

/// The files of one control plane's credentials.
#[derive(Debug)]
pub(super) struct Credentials {
    dir: PathBuf,
}

impl Credentials {
    /// Makes all files in `dir` for a server at `address`, which clients call `url`.
    #[track_caller]
    pub(super) fn create(dir: &Path, address: IpAddr, url: &str) -> Self {
        let this = Self { dir: dir.to_owned() };
        this.write_certificates(address).unwrap_or_else(|error| panic!("cannot make certificates: {error}"));
        let service_account_key = KeyPair::generate().unwrap_or_else(|error| panic!("cannot make a key: {error}"));
        this.write("service-account.key", &service_account_key.serialize_pem());
        this.write("service-account.pub", &service_account_key.public_key_pem());
        let lines =
            Identity::ALL.map(|who| format!("{},{},{},\"{}\"\n", who.token(), who.user(), who.user(), who.groups()));
        this.write("tokens.csv", &lines.concat());
        for who in Identity::ALL {
            this.write(who.file_name(), &this.kubeconfig_text(who, url));
        }
        this
    }

    /// The serving certificate of the API server, PEM.
    pub(super) fn certificate(&self) -> PathBuf {
        self.dir.join("server.crt")
    }

    /// Its private key, PEM.
    pub(super) fn key(&self) -> PathBuf {
        self.dir.join("server.key")
    }

    /// The key that signs the tokens of service accounts, PEM.
    pub(super) fn service_account_key(&self) -> PathBuf {
        self.dir.join("service-account.key")
    }

    /// The public half of it, PEM.
    pub(super) fn service_account_public_key(&self) -> PathBuf {
        self.dir.join("service-account.pub")
    }

    /// The API server's static token file.
    pub(super) fn tokens(&self) -> PathBuf {
        self.dir.join("tokens.csv")
    }

    /// The kubeconfig of an identity.
    pub(super) fn kubeconfig(&self, who: Identity) -> PathBuf {
        self.dir.join(who.file_name())
    }

    fn write_certificates(&self, address: IpAddr) -> Result<(), rcgen::Error> {
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "shunt-tests");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca_key = KeyPair::generate()?;
        self.write("ca.crt", &ca.self_signed(&ca_key)?.pem());

        let mut server = CertificateParams::new(["localhost", "kubernetes.default.svc"].map(String::from))?;
        server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        for ip in [address, Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            server.subject_alt_names.push(SanType::IpAddress(ip));
        }
        let server_key = KeyPair::generate()?;
        self.write("server.crt", &server.signed_by(&server_key, &Issuer::new(ca, ca_key))?.pem());
        self.write("server.key", &server_key.serialize_pem());
        Ok(())
    }

    /// JSON, which every reader of kubeconfigs takes for the YAML that it also is.
    fn kubeconfig_text(&self, who: Identity, url: &str) -> String {
        let ca = self.dir.join("ca.crt");
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": ca}}],
            "users": [{"name": who.user(), "user": {"token": who.token()}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": who.user()}}],
            "current-context": "test",
        });
        format!("{config:#}\n")
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.join(name);
        fs::write(&path, text).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }
}
