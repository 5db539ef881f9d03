//! What a person gets wrong: it is named by `shunt status`, harms nothing else, and is over when it is mended.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use serde_json::Value;
use shunt_tests::traffic::Ports;
use shunt_tests::wait;

use crate::node::{Lone, service};

fn vip(last: u8) -> SocketAddr {
    (Ipv4Addr::new(10, 96, 0, last), 80).into()
}

/// What the running agent says.
#[track_caller]
fn report(node: &Lone) -> Value {
    let socket = node.admin_socket();
    let output = node.shunt(["status", "-o", "json", "--admin-socket", socket.to_str().expect("text")]);
    assert!(output.status.success(), "{output:?}");
    let status: Value = serde_json::from_slice(&output.stdout).expect("it prints JSON");
    status["report"].clone()
}

/// The same for people.
#[track_caller]
fn text(node: &Lone) -> String {
    let socket = node.admin_socket();
    let output = node.shunt(["status", "--admin-socket", socket.to_str().expect("text")]);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// What `list` of the report says of `subject`.
fn messages(node: &Lone, list: &str, subject: &str) -> Vec<String> {
    let report = report(node);
    let entries = report[list].as_array().expect("a list").iter().filter(|entry| entry["subject"] == subject);
    entries.map(|entry| entry["message"].as_str().expect("text").to_owned()).collect()
}

#[test]
fn of_two_services_with_one_address_the_older_has_it_and_the_other_is_told() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    let created = |text: String, year: u16| {
        let stamp = format!("namespace: default, creationTimestamp: '{year}-01-01T00:00:00Z'}}\nspec");
        text.replacen("namespace: default}\nspec", &stamp, 1)
    };
    // Only the older one leads somewhere.
    node.manifests.write_text("a", &created(service("a", "10.96.0.10", &["10.244.1.1"], 9), 2020));
    node.manifests.write_text("b", &created(service("b", "10.96.0.10", &["10.244.1.1"], 8080), 2010));
    node.manifests.write_text("c", &service("c", "10.96.0.11", &["10.244.1.1"], 8080));
    node.start([]);
    for port in [10, 11] {
        assert_eq!(node.place.tcp(vip(port)).expect("an answer").server, "node");
    }
    let expected = ["10.96.0.10:80/TCP belongs to manifests/default/b:/TCP/IPv4"];
    assert_eq!(messages(&node, "problems", "manifests/default/a"), expected);
    assert!(text(&node).contains("problem       manifests/default/a: 10.96.0.10:80/TCP belongs to"), "{}", text(&node));
    // It gets the address when the older one is gone, and there is nothing to tell any more.
    node.manifests.delete("b");
    wait::until("the address to change hands", || report(&node)["problems"].as_array().is_some_and(Vec::is_empty));
    assert!(node.place.tcp(vip(10)).is_err(), "nobody listens where the younger one leads");
}

#[test]
fn a_service_without_room_is_named_and_served_when_there_is_some() {
    /// Of the least that a table may have; number 0 of either is never used.
    const FIT: u8 = 15;
    let ports: [u16; FIT as usize + 1] = std::array::from_fn(|number| 8080 + number as u16);
    for (flags, what) in [
        (["--max-services", "16", "--max-backends", "100"], "no room for 1 more services (the table has 16)"),
        (["--max-services", "100", "--max-backends", "16"], "no room for 1 more backends (the table has 16)"),
    ] {
        let mut node = Lone::new();
        let _server = node.place.serve(Ports { tcp: &ports, udp: &[] });
        let write = |node: &Lone, number: u8| {
            let (name, at) = (format!("s{number}"), format!("10.96.0.{}", number + 1));
            node.manifests.write_text(&name, &service(&name, &at, &["10.244.1.1"], ports[usize::from(number)]));
        };
        (0..FIT).for_each(|number| write(&node, number));
        node.start(flags);
        write(&node, FIT);
        let last = format!("manifests/default/s{FIT}");
        wait::until("the service to be refused", || !messages(&node, "problems", &last).is_empty());
        let told = messages(&node, "problems", &last).join("\n");
        assert!(told.contains(what), "{told}");
        for number in 0..FIT {
            assert_eq!(node.place.tcp(vip(number + 1)).expect("the others are served").server, "node");
        }
        assert!(node.place.tcp(vip(FIT + 1)).is_err(), "it has no room");
        node.manifests.delete("s1");
        wait::until("room", || node.place.tcp(vip(FIT + 1)).is_ok());
        wait::until("nothing to tell", || report(&node)["problems"].as_array().is_some_and(Vec::is_empty));
        for number in [0, 2] {
            assert_eq!(node.place.tcp(vip(number + 1)).expect("the others are served").server, "node");
        }
    }
}

#[test]
fn what_cannot_be_read_is_named_with_its_place_and_stays_as_it_was() {
    let mut node = Lone::new();
    let _server = node.place.serve(Ports { tcp: &[8080], udp: &[] });
    node.manifests.write_text("web", &service("web", "10.96.0.1", &["10.244.1.1"], 8080));
    node.start([]);
    let source = |node: &Lone| report(node)["sources"][0].clone();
    let told = source(&node);
    assert_eq!((&told["name"], &told["listed"], &told["stale"]), (&"manifests".into(), &true.into(), &false.into()));
    assert_eq!((&told["objects"]["Service"], &told["objects"]["EndpointSlice"]), (&1.into(), &1.into()));
    assert!(told["last_contact_age"].as_u64().is_some(), "{told}");

    // Half of a file, and an object with a port that is none.
    let half = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default}\nspec: {ports: [";
    let bad = service("bad", "10.96.0.2", &[], 8080).replace("port: 80,", "port: 80000,");
    node.manifests.write_text("web", half);
    node.manifests.write_text("bad", &bad);
    let rejected = |node: &Lone| -> Vec<String> {
        let source = source(node);
        let rejected = source["rejected"].as_array().expect("a list").iter();
        rejected.map(|entry| format!("{}: {}", entry["subject"], entry["message"])).collect()
    };
    wait::until("both to be told", || rejected(&node).len() == 2);
    let told = rejected(&node);
    assert!(told[0].contains("bad.yaml: Service default/bad") && told[0].contains("80000 is not a port"), "{told:?}");
    assert!(told[1].contains("web.yaml") && told[1].contains("line 4") && told[1].contains("stays"), "{told:?}");
    assert!(text(&node).contains("rejected      manifests: web.yaml: does not parse"), "{}", text(&node));
    assert_eq!(node.place.tcp(vip(1)).expect("an answer").server, "node");

    // The whole folder goes away.
    let away = node.manifests.dir().with_extension("away");
    fs::rename(node.manifests.dir(), &away).expect("the folder can be moved");
    wait::until("the folder to be missed", || source(&node)["stale"] == true);
    let told = text(&node);
    assert!(told.contains("stale         manifests: no news of the folder since 20"), "{told}");
    assert!(told.contains("manifests cannot be listed: No such file"), "{told}");
    assert_eq!(node.place.tcp(vip(1)).expect("an answer").server, "node");
    fs::rename(&away, node.manifests.dir()).expect("the folder can be moved");
    node.manifests.write_text("web", &service("web", "10.96.0.1", &["10.244.1.1"], 8080));
    node.manifests.delete("bad");
    wait::until("nothing to tell", || source(&node)["stale"] == false && rejected(&node).is_empty());
}
