//! The Kubernetes API: Services, EndpointSlices, this node and ServiceCIDRs, with what the stock role of kube-proxy allows
//! (`system:node-proxier`: list and watch, and events to write) and nothing more.
//!
//! | module | holds |
//! |---|---|
//! | [`access`] | where the API server is and who we are there |
//! | `session` | requests and their answers, as bytes |
//! | `query` | what is asked for each kind; pure |
//! | `wire` | answers taken apart, as far as the protocol goes; pure |
//! | `intake` | objects to updates, and what cannot be used; pure |
//! | `follow` | one kind: listed, watched, listed again |
//! | [`tell`] | events written to the server, of which this source itself knows nothing |
//!
//! An object is decoded from its text into model types and forgotten: no store, no object of kube's. A server that does not
//! answer leaves everything as it was; [`Contact`] says so. A watch that ended before its time
//! goes on where it was only if the same data is still behind the server (`follow`).

pub mod access;
mod follow;
mod intake;
mod query;
mod session;
pub mod tell;
#[cfg(test)]
mod tests;
mod wire;

use futures_util::future::join_all;
use tokio::sync::{Mutex, mpsc};
use tracing::info;

use crate::model::{Kind, Name, SourceId, SourceSpec, Update};
use crate::source::contact::Contact;
use access::Access;
use follow::Follower;
use intake::Intake;
use session::{Connection, Limits};

/// What is watched. Legacy Endpoints are not: every cluster this is made for has EndpointSlices.
const KINDS: [Kind; 4] = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr];

/// This source.
pub const SPEC: SourceSpec = SourceSpec { id: SourceId::Kubernetes, kinds: &KINDS };

/// The source.
#[derive(Debug)]
pub struct Kubernetes {
    access: Access,
    node: Name,
    updates: mpsc::Sender<Update>,
    contact: Contact,
    limits: Limits,
}

impl Kubernetes {
    /// A source that tells `updates` what the API server says, of the nodes only of `node`, and `contact` whether it says
    /// anything.
    pub fn new(access: Access, node: Name, updates: mpsc::Sender<Update>, contact: Contact) -> Self {
        Self { access, node, updates, contact, limits: Limits::default() }
    }

    /// Lists and follows every kind until nobody listens any more. A server that cannot be reached is waited for.
    ///
    /// Fails if the credentials cannot be read at the beginning. Later ones that cannot be read leave the old ones in use.
    pub async fn run(self) -> Result<(), access::Error> {
        let connection = Connection::open(self.access, self.limits).await?;
        info!(server = %connection.server(), node = %self.node, "following the Kubernetes API");
        let intake = Mutex::new(Intake::default());
        let followers = KINDS.map(|kind| {
            let query = query::Query::new(kind, &self.node);
            Follower::new(query, &connection, &intake, &self.updates, &self.contact).run()
        });
        join_all(followers).await;
        Ok(())
    }
}
