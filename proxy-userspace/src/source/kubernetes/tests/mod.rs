//! The source against an API server that does what servers do on their bad days.

mod server;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::access::{self, Access};
use super::session::Limits;
use super::{Kubernetes, SPEC};
use crate::model::content::Content;
use crate::model::{Event, Kind, Name, NodeFacts, Object, ObjectProblem, SourceId, Update};
use crate::source::contact::{Contact, Outage, State};
use server::{Piece, Reply, Server, event, page, status};

fn service(name: &str, version: u32, port: u32) -> String {
    format!(
        "{{\"metadata\":{{\"name\":\"{name}\",\"namespace\":\"default\",\"resourceVersion\":\"{version}\",\
         \"annotations\":{{\"note\":\"grün\"}}}},\
         \"spec\":{{\"clusterIP\":\"10.96.0.1\",\"ports\":[{{\"port\":{port}}}]}}}}"
    )
}

/// A running source and what it tells.
struct Rig {
    updates: mpsc::Receiver<Update>,
    content: Content,
    problems: Arc<[ObjectProblem]>,
    contact: watch::Receiver<State>,
    task: JoinHandle<Result<(), access::Error>>,
    /// Holds the file `token`.
    dir: TempDir,
}

impl Rig {
    fn follow(server: &Server) -> Self {
        Self::follow_with(server.addr, Limits::default())
    }

    /// Follows a server as a kubeconfig says that names another, with the token `one`.
    fn follow_with(server: SocketAddr, limits: Limits) -> Self {
        const KUBECONFIG: &str = "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
            contexts: [{name: c, context: {cluster: c, user: u}}]\n\
            clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\n\
            users: [{name: u, user: {tokenFile: token}}]\n";
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "one").unwrap();
        let file = dir.path().join("kubeconfig");
        std::fs::write(&file, KUBECONFIG).unwrap();
        let server = access::Server::parse(&format!("http://{server}")).unwrap();
        let access = Access::Kubeconfig { file, server: Some(server) };
        let (sender, updates) = mpsc::channel(64);
        let told = Contact::default();
        let contact = told.watch();
        let source = Kubernetes { access, node: Name::from("node-a"), updates: sender, contact: told, limits };
        let content = Content::new(Arc::new(NodeFacts::named(Name::from("node-a"))), &[SPEC]);
        Self { updates, content, problems: Arc::default(), contact, task: tokio::spawn(source.run()), dir }
    }

    /// The next update, taken into the model.
    async fn next(&mut self) -> Event {
        let update = tokio::time::timeout(Duration::from_secs(30), self.updates.recv()).await;
        let update = update.expect("there is news within a generous time").expect("the source goes on");
        assert_eq!(update.source, SourceId::Kubernetes);
        self.content.apply(update.clone());
        let [event] = update.events.try_into().expect("this source tells each event by itself");
        if let Event::Problems(problems) = &event {
            self.problems = problems.clone();
        }
        event
    }

    /// What is told of services next, in words.
    async fn service_event(&mut self) -> String {
        loop {
            match self.next().await {
                Event::Init(Kind::Service) => return "init".into(),
                Event::InitDone(Kind::Service) => return "done".into(),
                Event::InitApply(Object::Service { name, service, .. }) => {
                    return format!("listed {name} {}", service.ports[0].port);
                }
                Event::Apply(Object::Service { name, service, .. }) => {
                    return format!("put {name} {}", service.ports[0].port);
                }
                Event::InitKeep(key) if key.kind == Kind::Service => return format!("kept {}", key.name),
                Event::Delete(key) if key.kind == Kind::Service => return format!("gone {}", key.name),
                _ => {}
            }
        }
    }

    /// The next `count` things told of services.
    async fn service_events(&mut self, count: usize) -> Vec<String> {
        let mut events = Vec::new();
        while events.len() < count {
            events.push(self.service_event().await);
        }
        events
    }

    /// Waits until the problems are so.
    async fn until_problems(&mut self, is_so: impl Fn(&[String]) -> bool) -> Vec<String> {
        loop {
            let problems: Vec<_> = self.problems.iter().map(ToString::to_string).collect();
            if is_so(&problems) {
                return problems;
            }
            self.next().await;
        }
    }

    /// Waits until the outages are so, in words.
    async fn until_outages(&mut self, is_so: impl Fn(&[String]) -> bool) -> Vec<String> {
        loop {
            let text = |outage: &Outage| format!("{}: {}", outage.what, outage.why);
            let outages: Vec<_> = self.contact.borrow_and_update().outages.iter().map(text).collect();
            if is_so(&outages) {
                return outages;
            }
            let mut contact = self.contact.clone();
            tokio::select! {
                _ = self.next() => {}
                changed = contact.changed() => changed.expect("the source goes on"),
            }
        }
    }

    /// Waits until the first lists are in the model.
    async fn until_visible(&mut self) {
        while self.content.snapshot().is_pending(SourceId::Kubernetes) {
            self.next().await;
        }
    }

    fn services(&self) -> Vec<String> {
        self.content.snapshot().services.keys().map(|key| key.name.to_string()).collect()
    }
}

#[tokio::test]
async fn pages_are_one_list_and_the_watch_goes_on_from_it() {
    let server = Server::start().await;
    server.reply("list services", Reply::Body(200, page(7, Some("t"), &[service("a", 3, 1)])));
    server.reply("next services", Reply::Body(200, page(7, None, &[service("b", 2, 2)])));
    let watch = server.watch("services");
    let mut rig = Rig::follow(&server);
    assert_eq!(rig.service_events(4).await, ["init", "listed a 1", "listed b 2", "done"]);
    watch.event("ADDED", &service("c", 8, 3));
    watch.event("MODIFIED", &service("a", 9, 4));
    watch.event("DELETED", &service("b", 10, 2));
    assert_eq!(rig.service_events(3).await, ["put c 3", "put a 4", "gone b"]);
    let asked = server.asked("services");
    assert_eq!(asked, ["list services spec.clusterIP%21%3DNone", "next services t", "watch services 7"]);
}

#[tokio::test]
async fn nothing_is_visible_before_every_kind_is_listed() {
    let server = Server::start().await;
    server.list("services", 7, &[service("a", 3, 1)]);
    let (slices, rest) = mpsc::unbounded_channel();
    server.reply("list endpointslices", Reply::Pieces(rest));
    let mut rig = Rig::follow(&server);
    let mut done = 0;
    while done < 3 {
        done += usize::from(matches!(rig.next().await, Event::InitDone(_)));
    }
    assert!(rig.services().is_empty());
    slices.send(Piece::Bytes(page(7, None, &[]).into_bytes())).unwrap();
    slices.send(Piece::End).unwrap();
    rig.until_visible().await;
    assert_eq!(rig.services(), ["a"]);
}

#[tokio::test]
async fn events_may_be_cut_anywhere_into_pieces() {
    let server = Server::start().await;
    let watch = server.watch("services");
    let mut rig = Rig::follow(&server);
    rig.service_events(2).await;
    let lines = [event("ADDED", &service("a", 8, 1)), event("ADDED", &service("b", 9, 2))].concat();
    lines.as_bytes().chunks(7).for_each(|piece| watch.bytes(piece));
    assert_eq!(rig.service_events(2).await, ["put a 1", "put b 2"]);
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_from_its_last_version() {
    let server = Server::start().await;
    server.list("services", 7, &[service("a", 3, 1)]);
    let (first, second, third) = (server.watch("services"), server.watch("services"), server.watch("services"));
    for version in [50, 60] {
        server.reply("probe services", Reply::Body(200, page(version, None, &[])));
    }
    let mut rig = Rig::follow(&server);
    rig.service_events(3).await;
    first.event("BOOKMARK", "{\"kind\":\"Service\",\"metadata\":{\"resourceVersion\":\"50\"}}");
    first.end();
    second.event("MODIFIED", &service("a", 60, 2));
    second.bytes(&event("MODIFIED", &service("a", 61, 9)).as_bytes()[..40]);
    second.cut();
    third.event("MODIFIED", &service("a", 61, 3));
    assert_eq!(rig.service_events(2).await, ["put a 2", "put a 3"]);
    let asked = server.asked("services");
    let expected = ["watch services 7", "probe services", "watch services 50", "probe services", "watch services 60"];
    let without_selector: Vec<_> =
        asked[1..].iter().map(|asked| asked.trim_end_matches(" spec.clusterIP%21%3DNone")).collect();
    assert_eq!(without_selector, expected);
    // The cut was a failure, and it is over.
    rig.until_outages(<[String]>::is_empty).await;
}

#[tokio::test]
async fn a_version_that_is_too_old_means_a_new_list_which_prunes_at_its_end() {
    for is_event in [false, true] {
        let server = Server::start().await;
        server.list("services", 7, &[service("a", 3, 1), service("b", 3, 1)]);
        server.list("services", 20, &[service("b", 3, 1), service("c", 19, 1)]);
        match is_event {
            true => server.watch("services").event("ERROR", &status(410)),
            false => server.reply("watch services", Reply::Body(410, status(410))),
        }
        let mut rig = Rig::follow(&server);
        rig.service_events(4).await;
        rig.until_visible().await;
        assert_eq!(rig.service_events(2).await, ["init", "listed b 1"]);
        assert_eq!(rig.services(), ["a", "b"], "nothing is pruned before the end");
        assert_eq!(rig.service_events(2).await, ["listed c 1", "done"]);
        assert_eq!(rig.services(), ["b", "c"]);
        let state = rig.contact.borrow().clone();
        assert!(state.outages.is_empty(), "an old version is no failure: {state:?}");
    }
}

#[tokio::test]
async fn a_server_with_another_store_is_listed_anew_although_its_version_is_higher() {
    let server = Server::start().await;
    server.list("services", 7, &[service("a", 3, 1)]);
    server.list("services", 900, &[service("b", 800, 1)]);
    let watch = server.watch("services");
    let mut rig = Rig::follow(&server);
    rig.service_events(3).await;
    rig.until_visible().await;
    server.set_identity("store-2");
    server.reply("probe services", Reply::Body(200, page(900, None, &[])));
    watch.end();
    assert_eq!(rig.service_events(3).await, ["init", "listed b 1", "done"]);
    assert_eq!(rig.services(), ["b"]);
}

#[tokio::test]
async fn a_store_that_went_back_in_time_is_listed_anew() {
    let server = Server::start().await;
    server.list("services", 700, &[service("a", 3, 1)]);
    server.list("services", 12, &[]);
    server.reply("probe services", Reply::Body(200, page(12, None, &[])));
    let watch = server.watch("services");
    let mut rig = Rig::follow(&server);
    rig.service_events(3).await;
    rig.until_visible().await;
    watch.cut();
    assert_eq!(rig.service_events(2).await, ["init", "done"]);
    assert!(rig.services().is_empty());
}

#[tokio::test]
async fn a_list_that_fails_half_way_begins_anew_and_prunes_nothing() {
    let server = Server::start().await;
    server.list("services", 7, &[service("a", 3, 1), service("b", 3, 1)]);
    server.watch("services").event("ERROR", &status(410));
    server.reply("list services", Reply::Body(200, page(9, Some("t"), &[service("a", 3, 1)])));
    server.reply("next services", Reply::Body(410, status(410)));
    let (last, pieces) = mpsc::unbounded_channel();
    server.reply("list services", Reply::Pieces(pieces));
    let mut rig = Rig::follow(&server);
    rig.service_events(4).await;
    rig.until_visible().await;
    assert_eq!(rig.service_events(2).await, ["init", "listed a 1"]);
    let outages = rig.until_outages(|outages| !outages.is_empty()).await;
    assert_eq!(outages, ["Service: the API server answers 410: told to"]);
    assert_eq!(rig.services(), ["a", "b"]);
    last.send(Piece::Bytes(page(9, None, &[service("b", 3, 1)]).into())).unwrap();
    last.send(Piece::End).unwrap();
    assert_eq!(rig.service_events(3).await, ["init", "listed b 1", "done"]);
    assert_eq!(rig.services(), ["b"]);
    rig.until_outages(<[String]>::is_empty).await;
}

#[tokio::test]
async fn answers_that_make_no_sense_leave_everything_as_it_was() {
    let server = Server::start().await;
    server.list("services", 7, &[service("a", 3, 1)]);
    let first = server.watch("services");
    let second = server.watch("services");
    server.reply("probe services", Reply::Body(502, "<html>bad gateway</html>".into()));
    server.reply("probe services", Reply::Body(200, page(7, None, &[])));
    let mut rig = Rig::follow(&server);
    rig.service_events(3).await;
    rig.until_visible().await;
    first.bytes("no event\n");
    let outages = rig.until_outages(|outages| !outages.is_empty()).await;
    assert!(outages[0].contains("cannot be understood"), "{outages:?}");
    rig.until_outages(|outages| outages.iter().any(|outage| outage.contains("answers 502"))).await;
    rig.until_outages(<[String]>::is_empty).await;
    second.event("ADDED", &service("b", 8, 2));
    assert_eq!(rig.service_event().await, "put b 2");
    assert_eq!(rig.services(), ["a", "b"]);
}

#[tokio::test]
async fn an_object_that_cannot_be_used_stays_as_it_was_and_harms_no_other() {
    let server = Server::start().await;
    server.list("services", 7, &[service("a", 3, 1), service("b", 3, 2)]);
    let watch = server.watch("services");
    server.list("services", 20, &[service("a", 19, 99999), service("b", 3, 2)]);
    let last = server.watch("services");
    let mut rig = Rig::follow(&server);
    rig.service_events(4).await;
    rig.until_visible().await;
    watch.event("MODIFIED", &service("a", 8, 99999));
    watch.event("MODIFIED", "{\"metadata\":{\"name\":\"b\",\"namespace\":\"default\"},\"spec\":{\"ports\":7}}");
    watch.event("ADDED", &service("c", 9, 3));
    assert_eq!(rig.service_event().await, "put c 3");
    let problems = rig.until_problems(|problems| problems.len() == 2).await;
    assert!(problems[0].starts_with("Service default/a: spec.ports[0].port: 99999 is not a port"), "{problems:?}");
    assert!(problems[1].starts_with("Service default/b: spec.ports: invalid type"), "{problems:?}");
    // A new list does not take it away either, and forgets what is no longer wrong.
    watch.event("ERROR", &status(410));
    assert_eq!(rig.service_events(4).await, ["init", "kept a", "listed b 2", "done"]);
    assert_eq!(rig.services(), ["a", "b"]);
    rig.until_problems(|problems| problems.len() == 1 && problems[0].contains("default/a")).await;
    last.event("DELETED", &service("a", 21, 99999));
    assert_eq!(rig.service_event().await, "gone a");
    rig.until_problems(<[String]>::is_empty).await;
    assert_eq!(rig.services(), ["b"]);
}

#[tokio::test]
async fn a_service_that_no_longer_counts_is_gone() {
    let server = Server::start().await;
    server.list("services", 7, &[service("a", 3, 1)]);
    let watch = server.watch("services");
    let mut rig = Rig::follow(&server);
    rig.service_events(3).await;
    rig.until_visible().await;
    watch.event("MODIFIED", &service("a", 8, 1).replace("10.96.0.1", "None"));
    assert_eq!(rig.service_event().await, "gone a");
    assert!(rig.services().is_empty());
}

#[tokio::test]
async fn a_server_that_cannot_select_by_cluster_ip_is_asked_without() {
    let server = Server::start().await;
    server.reply("list services", Reply::Body(400, status(400)));
    server.list("services", 7, &[service("a", 3, 1), service("headless", 3, 1).replace("10.96.0.1", "None")]);
    let mut rig = Rig::follow(&server);
    assert_eq!(rig.service_events(3).await, ["init", "listed a 1", "done"]);
    assert_eq!(server.asked("services")[1], "list services");
}

#[tokio::test]
async fn a_cluster_without_service_cidrs_is_served() {
    for code in [403, 404] {
        let server = Server::start().await;
        server.reply("list servicecidrs", Reply::Body(code, status(code)));
        server.list("services", 7, &[service("a", 3, 1)]);
        let mut rig = Rig::follow(&server);
        rig.until_visible().await;
        assert_eq!(rig.services(), ["a"]);
    }
}

#[tokio::test]
async fn a_kind_that_is_needed_and_refused_is_waited_for() {
    let server = Server::start().await;
    server.reply("list endpointslices", Reply::Body(403, status(403)));
    server.list("services", 7, &[service("a", 3, 1)]);
    let mut rig = Rig::follow(&server);
    rig.until_outages(|outages| outages.iter().any(|outage| outage.contains("EndpointSlice"))).await;
    assert!(rig.content.snapshot().is_pending(SourceId::Kubernetes));
    rig.until_visible().await;
    assert_eq!(rig.services(), ["a"]);
}

#[tokio::test]
async fn a_token_that_was_replaced_is_read_again() {
    let server = Server::start().await;
    server.set_token("one");
    server.list("services", 7, &[service("a", 3, 1)]);
    let (first, second) = (server.watch("services"), server.watch("services"));
    let mut rig = Rig::follow(&server);
    rig.until_visible().await;
    std::fs::write(rig.dir.path().join("token"), "two").unwrap();
    server.set_token("two");
    first.end();
    second.event("ADDED", &service("b", 8, 2));
    assert_eq!(rig.service_event().await, "put b 2");
    assert_eq!(rig.services(), ["a", "b"]);
}

#[tokio::test]
async fn a_server_that_is_not_there_yet_is_waited_for() {
    let taken = Server::start().await;
    let addr = taken.addr;
    drop(taken);
    let mut rig = Rig::follow_with(addr, Limits::default());
    let outages = rig.until_outages(|outages| outages.len() == SPEC.kinds.len()).await;
    assert!(outages[0].contains("Connection refused"), "{outages:?}");
    assert_eq!(rig.contact.borrow().heard, None);
    let server = Server::start_at(addr).await;
    server.list("services", 7, &[service("a", 3, 1)]);
    rig.until_visible().await;
    rig.until_outages(<[String]>::is_empty).await;
    assert!(rig.contact.borrow().heard.is_some());
}

#[tokio::test]
async fn a_server_that_falls_silent_is_asked_again() {
    let server = Server::start().await;
    server.list("services", 7, &[service("a", 3, 1)]);
    let silent = server.watch("services");
    server.reply("probe services", Reply::Body(200, page(7, None, &[])));
    let second = server.watch("services");
    let limits = Limits { watch: Duration::from_millis(200), ..Limits::default() };
    let mut rig = Rig::follow_with(server.addr, limits);
    rig.service_events(3).await;
    second.event("ADDED", &service("b", 8, 2));
    assert_eq!(rig.service_event().await, "put b 2");
    drop(silent);
}

#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let server = Server::start().await;
    let mut rig = Rig::follow(&server);
    rig.until_visible().await;
    drop(rig.updates);
    rig.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn credentials_that_are_missing_are_named() {
    let dir = std::env::temp_dir().join("no such directory");
    let server = access::Server::parse("192.0.2.1:6443").unwrap();
    let (updates, _updates) = mpsc::channel(1);
    let run = |access| Kubernetes::new(access, Name::from("a"), updates.clone(), Contact::default()).run();
    let error = run(Access::ServiceAccount { dir: dir.clone(), server }).await.unwrap_err();
    assert!(error.to_string().contains("no such directory/token: only pods"), "{error}");
    let error = run(Access::Kubeconfig { file: dir.join("config"), server: None }).await.unwrap_err();
    assert!(error.to_string().contains("no such directory/config"), "{error}");
}
