//! How each source stands: listed or not, when it was last heard, what is wrong, how much it has listed.
//!
//! May touch: nothing; it looks at the newest snapshot and at what the sources tell of their contact.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::admin::Trouble;
use crate::model::{GroupKind, Kind, Reader, Snapshot, SourceId};
use crate::source::contact::{Outage, State};

/// What is known of the configured sources.
#[derive(Clone, Debug)]
pub struct Sources {
    snapshots: Reader,
    contacts: BTreeMap<SourceId, watch::Receiver<State>>,
}

/// One source, for people and programs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Its name.
    pub name: String,
    /// It has listed everything once.
    pub listed: bool,
    /// Something of it cannot be read at the moment; what was known stays programmed.
    pub stale: bool,
    /// When it was last heard, as RFC 3339.
    pub last_contact: Option<String>,
    /// How long ago that is, in seconds.
    pub last_contact_age: Option<u64>,
    /// What cannot be read.
    pub outages: Vec<OutageReport>,
    /// Objects that count, by kind.
    pub objects: BTreeMap<String, usize>,
    /// Objects, or parts of them, that cannot be used.
    pub rejected: Vec<Trouble>,
}

/// Something that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutageReport {
    /// What.
    pub what: String,
    /// Since when, as RFC 3339.
    pub since: String,
    /// How long ago that is, in seconds.
    pub age: u64,
    /// Why.
    pub why: String,
}

impl Sources {
    /// Watches snapshots and, of each source, its contact.
    pub fn new(snapshots: Reader, contacts: BTreeMap<SourceId, watch::Receiver<State>>) -> Self {
        Self { snapshots, contacts }
    }

    /// How they stand at `now`, in the order of their names' precedence.
    pub fn report(&self, now: SystemTime) -> Vec<SourceReport> {
        let snapshot = self.snapshots.borrow().clone();
        self.contacts.iter().map(|(id, contact)| report(*id, &contact.borrow(), &snapshot, now)).collect()
    }

    /// Writes them as metrics.
    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let snapshot = self.snapshots.borrow().clone();
        let states: Vec<_> = self.contacts.iter().map(|(id, contact)| (*id, contact.borrow().clone())).collect();
        let errors = |id: SourceId| snapshot.problems.get(&id).map_or(0, |problems| problems.len() as u64);
        let help = "Objects, or parts of them, that a source cannot use";
        encode(encoder, "source_object_errors", help, states.iter().map(|(id, _)| (*id, errors(*id))))?;
        let help = "1 while a source cannot read something; what was known of it stays programmed";
        let stale = |state: &State| u64::from(!state.outages.is_empty());
        encode(encoder, "source_stale", help, states.iter().map(|(id, state)| (*id, stale(state))))?;
        let help = "When a source last heard from what it reads, in seconds since 1970";
        let heard = states.iter().filter_map(|(id, state)| Some((*id, since_epoch(state.heard?))));
        encode(encoder, "source_last_contact_timestamp_seconds", help, heard)?;
        let help = "Objects of a source that count";
        let mut metric = encoder.encode_descriptor("source_objects", help, None, MetricType::Gauge)?;
        for (id, _) in &states {
            for (kind, count) in objects(&snapshot, *id) {
                let labels = [("source", id.name()), ("kind", kind.name())];
                ConstGauge::new(count as u64).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

fn encode<N: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (SourceId, N)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (source, value) in values {
        ConstGauge::new(value).encode(metric.encode_family(&[("source", source.name())])?)?;
    }
    Ok(())
}

fn since_epoch(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn report(id: SourceId, state: &State, snapshot: &Snapshot, now: SystemTime) -> SourceReport {
    let age = |time: SystemTime| now.duration_since(time).unwrap_or_default().as_secs();
    let outage = |outage: &Outage| OutageReport {
        what: outage.what.clone(),
        since: time_text(outage.since),
        age: age(outage.since),
        why: outage.why.clone(),
    };
    let problems = snapshot.problems.get(&id).into_iter().flat_map(|problems| problems.iter());
    SourceReport {
        name: id.to_string(),
        listed: !snapshot.is_pending(id),
        stale: !state.outages.is_empty(),
        last_contact: state.heard.map(time_text),
        last_contact_age: state.heard.map(age),
        outages: state.outages.iter().map(outage).collect(),
        objects: objects(snapshot, id).into_iter().map(|(kind, count)| (kind.name().to_owned(), count)).collect(),
        rejected: problems
            .map(|problem| Trouble { subject: problem.place.clone(), message: problem.message.clone() })
            .collect(),
    }
}

/// RFC 3339, to the second.
fn time_text(time: SystemTime) -> String {
    let whole = Duration::from_secs(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs());
    // Fails only thousands of years from now.
    Timestamp::try_from(SystemTime::UNIX_EPOCH + whole).map_or_else(|_| String::new(), |time| time.to_string())
}

/// How many objects of each kind a source has in a snapshot.
fn objects(snapshot: &Snapshot, source: SourceId) -> BTreeMap<Kind, usize> {
    let endpoints = snapshot.endpoints.iter().filter(|(key, _)| key.source == source);
    let groups = |kind: GroupKind| {
        let of_kind = endpoints.clone().flat_map(|(_, endpoints)| endpoints.groups());
        of_kind.filter(|group| group.kind == kind).count()
    };
    BTreeMap::from([
        (Kind::Service, snapshot.services.keys().filter(|key| key.source == source).count()),
        (Kind::EndpointSlice, groups(GroupKind::Slice)),
        (Kind::Endpoints, groups(GroupKind::Legacy)),
        (Kind::Node, snapshot.nodes.keys().filter(|key| key.0 == source).count()),
        (Kind::ServiceCidr, snapshot.service_cidrs.keys().filter(|key| key.0 == source).count()),
    ])
}
