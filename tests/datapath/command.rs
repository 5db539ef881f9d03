//! The command line as a stranger meets it: with and without privilege, with wrong paths, with a reader that goes away.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};

use serde_json::Value;
use shunt_tests::agent;
use shunt_tests::traffic::Ports;

use crate::node::{Lone, service};

/// Names of the fields of a JSON object.
#[track_caller]
fn fields(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap_or_else(|| panic!("no object: {value}")).keys().map(String::as_str).collect()
}

fn set<const N: usize>(names: [&'static str; N]) -> BTreeSet<&'static str> {
    BTreeSet::from(names)
}

/// What scripts build on.
#[test]
fn json_has_the_same_fields_always() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.start([]);
    for subcommand in ["services", "backends", "flows"] {
        assert_eq!(node.json(subcommand), Value::Array(vec![]), "{subcommand}");
    }
    node.manifests.write_text("web", &service("web", "10.96.0.10", &["10.244.1.1"], 8080));
    shunt_tests::wait::until("the service", || node.json("services") != Value::Array(vec![]));
    let to = SocketAddr::from((Ipv4Addr::new(10, 96, 0, 10), 80));
    node.place.tcp(to).expect("an answer");

    let services = node.json("services");
    let expected = set([
        "id",
        "name",
        "frontends",
        "cluster",
        "local",
        "affinity_seconds",
        "sockets",
        "flows",
        "packets",
        "bytes",
        "refused",
    ]);
    assert!(fields(&services[0]).is_superset(&expected), "{services}");
    assert_eq!(fields(&services[0]["frontends"][0]), set(["at", "inside", "outside"]));
    assert_eq!(fields(&node.json("backends")[0]), set(["id", "address", "local", "services"]));
    let socket = node.admin_socket();
    let output = node.shunt(["status", "-o", "json", "--admin-socket", socket.to_str().expect("text")]);
    let status: Value = serde_json::from_slice(&output.stdout).expect("it prints JSON");
    let expected = set(["layout", "agent", "socket_hooks", "devices", "attach", "tables", "drops", "report"]);
    assert!(fields(&status).is_superset(&expected), "{status}");
    let report = &status["report"];
    let lists = ["pending_sources", "sources", "refused", "problems", "xdp_refused", "nearly_full", "families_off"];
    assert_eq!(fields(report), &set(lists) | &set(["ready", "devices"]));
    let expected =
        set(["name", "listed", "stale", "last_contact", "last_contact_age", "outages", "objects", "rejected"]);
    assert_eq!(fields(&report["sources"][0]), expected);
    // Without an agent the same, but for what only an agent can tell.
    node.stop();
    let status = node.json("status");
    assert_eq!((&status["agent"], &status["report"]), (&Value::Bool(false), &Value::Null));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    for words in [&["completions", "bash"][..], &["example"], &["version"], &["agent", "--help"]] {
        let mut command = Command::new(agent::program());
        let mut child = command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(
            (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
            (Some(0), ""),
            "{words:?}"
        );
    }
}

#[test]
fn without_privilege_the_commands_say_what_is_missing() {
    let mut node = Lone::new();
    node.start([]);
    node.stop();
    let program = node.bed.dir().join("shunt");
    // Where everybody may look.
    std::fs::hard_link(agent::program(), &program)
        .or_else(|_| std::fs::copy(agent::program(), &program).map(drop))
        .expect("the program can be put beside the test's files");
    for subcommand in ["status", "services", "backends", "flows", "cleanup"] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--"]).arg(&program);
        let output = command.arg(subcommand).arg("--bpffs").arg(&node.bpffs).output().expect("setpriv is there");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{subcommand}: {stderr}");
        assert!(stderr.contains("Permission denied") && stderr.contains("hint: this needs root"), "{stderr}");
    }
    assert!(!node.device_pins().is_empty(), "nothing was removed");
}

#[test]
fn a_wrong_directory_is_named() {
    let node = Lone::new();
    let nowhere = node.bed.dir().join("nowhere");
    std::fs::write(node.bed.dir().join("file"), "").expect("a file can be made");
    for (path, what) in [(nowhere, "nothing is pinned below"), (node.bed.dir().join("file"), "Not a directory")] {
        for subcommand in ["status", "services", "backends", "flows"] {
            let mut command = Command::new(agent::program());
            let output = command.arg(subcommand).arg("--bpffs").arg(&path).output().expect("it runs");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{subcommand}: {stderr}");
            assert!(stderr.contains(what) && stderr.contains(path.to_str().expect("text")), "{stderr}");
            assert!(!stderr.contains("BPF object"), "what is missing is not the program's fault: {stderr}");
        }
    }
}
