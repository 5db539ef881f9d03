//! What the state of the agent gives to tell: bad objects, conflicts, limits, refusals. Pure.
//!
//! Objects of other sources than the Kubernetes API are not told of: nobody would find the event.

use std::collections::BTreeSet;

use super::notice::{Notice, Regarding, Scope};
use crate::datapath::overlap::{Overlap, Overlaps};
use crate::datapath::reconcile::{Failure, Status};
use crate::health::node_port::{Refusal, Refusals};
use crate::model::{ObjectKey, ObjectProblem, ServiceKey, Snapshot, SourceId};
use crate::planner::{Problem, Subject};

/// What was being done when it was found that a service does not get all it asks for.
const PLAN: &str = "Plan";

/// Everything that is wrong now.
pub fn standing(
    status: &Status,
    snapshot: &Snapshot,
    health_checks: &Refusals,
    overlaps: &Overlaps,
) -> BTreeSet<Notice> {
    let planned = status.problems.iter().flat_map(|(service, problems)| {
        problems.iter().filter_map(|problem| Some(of_problem(service_object(service)?, problem)))
    });
    let refused = status.failures.iter().filter_map(of_failure);
    let unserved = health_checks.values().filter_map(of_refusal);
    let unusable = snapshot.problems.get(&SourceId::Kubernetes).into_iter().flat_map(|problems| problems.iter());
    let taken = overlaps.values().filter_map(of_overlap);
    planned.chain(refused).chain(unserved).chain(taken).chain(unusable.filter_map(of_object)).collect()
}

fn service_object(service: &ServiceKey) -> Option<Regarding> {
    (service.source == SourceId::Kubernetes).then(|| Regarding::Object(ObjectKey::of_service(service)))
}

fn of_problem(regarding: Regarding, problem: &Problem) -> Notice {
    let (reason, scope) = match problem {
        Problem::Sctp { .. } => ("UnsupportedProtocol", Scope::Cluster),
        Problem::DuplicatePort { .. } => ("DuplicatePort", Scope::Cluster),
        Problem::NoClusterIp => ("NoClusterIP", Scope::Cluster),
        Problem::NameTooLong(_) => ("NameTooLong", Scope::Cluster),
        Problem::Conflict { .. } => ("AddressConflict", Scope::Cluster),
        Problem::HealthCheckTaken { .. } => ("HealthCheckNodePortConflict", Scope::Cluster),
        Problem::HealthCheckHidden { .. } => ("HealthCheckNodePortHidden", Scope::Cluster),
        Problem::FrontendIsBackend { .. } => ("AddressIsBackend", Scope::Cluster),
        // Nodes may have tables of other sizes.
        Problem::Exhausted { .. } => ("TableFull", Scope::Node),
    };
    Notice { regarding, is_warning: true, scope, reason, action: PLAN, note: problem.to_string() }
}

fn of_failure(failure: &Failure) -> Option<Notice> {
    // The number of attempts is not in it: it would be another event each time.
    let note = format!("a table of this node refuses a change, which is tried again: {}", failure.error);
    let regarding = match &failure.subject {
        Subject::Node | Subject::Leftovers => Regarding::Node,
        Subject::Service(service) => service_object(service)?,
    };
    Some(Notice { regarding, is_warning: true, scope: Scope::Node, reason: "ApplyFailed", action: "Apply", note })
}

/// As kube-proxy tells it.
fn of_refusal(refusal: &Refusal) -> Option<Notice> {
    let regarding = service_object(&refusal.service)?;
    let (reason, action) = ("FailedToStartServiceHealthcheck", "Listen");
    Some(Notice { regarding, is_warning: true, scope: Scope::Node, reason, action, note: refusal.to_string() })
}

fn of_overlap(overlap: &Overlap) -> Option<Notice> {
    let regarding = service_object(&overlap.service)?;
    let (reason, scope) = ("NodePortTaken", Scope::Node);
    Some(Notice { regarding, is_warning: true, scope, reason, action: "Inspect", note: overlap.to_string() })
}

fn of_object(problem: &ObjectProblem) -> Option<Notice> {
    let regarding = Regarding::Object(problem.object.clone()?);
    let (note, scope) = (problem.message.clone(), Scope::Cluster);
    Some(Notice { regarding, is_warning: true, scope, reason: "UnusableValue", action: "Read", note })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::datapath::overlap::Taken;
    use crate::model::{Kind, Name, NodeFacts};
    use proxy_common::addr::{Port, Proto};

    fn service(source: SourceId, name: &str) -> ServiceKey {
        ServiceKey { source, namespace: Name::from("shop"), name: Name::from(name) }
    }

    fn told(status: &Status, problems: Vec<ObjectProblem>, refusals: &Refusals, overlaps: &Overlaps) -> Vec<String> {
        let mut snapshot = Snapshot::empty(Arc::new(NodeFacts::named(Name::from("n"))), [SourceId::Kubernetes]);
        snapshot.problems.insert(SourceId::Kubernetes, problems.into());
        let told = standing(status, &snapshot, refusals, overlaps);
        told.iter().map(|notice| format!("{:?} {} {notice}", notice.scope, notice.action)).collect()
    }

    #[test]
    fn problems_become_events_on_what_they_are_about() {
        let failure = |subject, attempts| Failure { subject, error: "full".into(), attempts, waiting: 1 };
        let web = service(SourceId::Kubernetes, "web");
        let name = "kubernetes/shop/web:a/TCP/IPv4".parse().unwrap();
        let exhausted = Problem::Exhausted { name, wanted: 1, what: "slots", capacity: 2 };
        let sctp = Problem::Sctp { name: Name::from("a"), port: Port(7) };
        let status = Status {
            problems: [(web.clone(), vec![sctp, exhausted])].into(),
            failures: vec![failure(Subject::Node, 3), failure(Subject::Service(web.clone()), 4)],
            ..Status::default()
        };
        let address = "192.0.2.1:30100".parse().unwrap();
        let taken = Taken { addr: None, port: Port(30000), proto: Proto::TCP, by: "a pod".into() };
        let overlaps = Overlaps::from([((Port(30000), Proto::TCP), Overlap { service: web.clone(), taken })]);
        let refusal = Refusal { service: web, address, error: "in use".into() };
        let slice = ObjectKey { kind: Kind::EndpointSlice, namespace: Name::from("shop"), name: Name::from("x") };
        let place = slice.to_string();
        let problem = ObjectProblem { place, object: Some(slice), message: "ports: no".into() };
        let refused = "a table of this node refuses a change, which is tried again: full";
        let expected = [
            format!("Node Apply ApplyFailed about this node: {refused}"),
            "Cluster Plan UnsupportedProtocol about Service shop/web: port 7 (\"a\"): SCTP is not supported yet; \
             the port is left out"
                .to_owned(),
            format!("Node Apply ApplyFailed about Service shop/web: {refused}"),
            "Node Listen FailedToStartServiceHealthcheck about Service shop/web: healthCheckNodePort 30100: cannot \
             listen on 192.0.2.1:30100 (in use); it is tried again"
                .to_owned(),
            "Node Inspect NodePortTaken about Service shop/web: nodePort 30000/TCP is also that of a pod, which clients \
             from outside do not reach there"
                .to_owned(),
            "Node Plan TableFull about Service shop/web: kubernetes/shop/web:a/TCP/IPv4: no room for 1 more slots \
             (the table has 2); it stays as it was"
                .to_owned(),
            "Cluster Read UnusableValue about EndpointSlice shop/x: ports: no".to_owned(),
        ];
        assert_eq!(told(&status, vec![problem], &[(address, refusal)].into(), &overlaps), expected);
    }

    #[test]
    fn attempts_do_not_make_another_event() {
        let at = |attempts| {
            let failure = Failure { subject: Subject::Node, error: "full".into(), attempts, waiting: 1 };
            told(&Status { failures: vec![failure], ..Status::default() }, vec![], &Refusals::new(), &Overlaps::new())
        };
        assert_eq!(at(1), at(2));
    }

    #[test]
    fn objects_of_other_sources_are_not_told_of() {
        let web = service(SourceId::Manifests, "web");
        let failure = Failure { subject: Subject::Service(web.clone()), error: String::new(), attempts: 1, waiting: 1 };
        let status = Status {
            problems: [(web, vec![Problem::NoClusterIp])].into(),
            failures: vec![failure],
            ..Status::default()
        };
        let unnamed = ObjectProblem { place: "a.yaml".into(), object: None, message: "no".into() };
        assert!(told(&status, vec![unnamed], &Refusals::new(), &Overlaps::new()).is_empty());
    }
}
