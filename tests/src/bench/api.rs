//! An API server that lists objects in pages and never tells a change: what a cold start from the Kubernetes API reads.
//!
//! Objects carry the metadata that a real server adds, which an agent has to read over.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};

use crate::bed::Bed;
use crate::place::Place;

/// Services, or slices, of one page: as many as the agent asks for.
const PAGE: usize = 500;

/// A running server. Its threads end with the process.
pub struct Server(SocketAddr);

/// Pages by resource and position.
type Pages = BTreeMap<(&'static str, usize), Vec<u8>>;

impl Server {
    /// A server at `place` with the given services, each with its slice.
    pub fn start(place: &Place, services: impl Iterator<Item = Vec<Value>>) -> Self {
        let (services, slices) = services
            .map(|objects| {
                let [service, slice] = <[Value; 2]>::try_from(objects).expect("a service and its slice");
                (as_served(service), as_served(slice))
            })
            .unzip();
        let pages: Arc<Pages> = Arc::new(pages("services", services).chain(pages("endpointslices", slices)).collect());
        let listener = place.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).expect("a port is free");
        let addr = listener.local_addr().expect("it is bound");
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let pages = pages.clone();
                thread::spawn(move || serve(stream, &pages));
            }
        });
        Self(addr)
    }

    /// A file that leads to it.
    pub fn kubeconfig(&self, bed: &Bed) -> PathBuf {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "bench",
            "clusters": [{ "name": "bench", "cluster": { "server": format!("http://{}", self.0) } }],
            "users": [{ "name": "bench", "user": { "token": "bench" } }],
            "contexts": [{ "name": "bench", "context": { "cluster": "bench", "user": "bench" } }],
        });
        let path = bed.dir().join("kubeconfig");
        std::fs::write(&path, config.to_string()).expect("the test's directory takes files");
        path
    }
}

/// An object with what a server and its controllers add.
fn as_served(mut object: Value) -> Value {
    let metadata = &mut object["metadata"];
    metadata["uid"] = "6f7ee0c7-0d0e-4c39-8a0a-000000000000".into();
    metadata["resourceVersion"] = "1234".into();
    metadata["creationTimestamp"] = "2024-05-05T10:00:00Z".into();
    metadata["managedFields"] = json!([{
        "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1",
        "time": "2024-05-05T10:00:00Z", "fieldsType": "FieldsV1",
        "fieldsV1": { "f:metadata": { "f:labels": { ".": {}, "f:app": {} } }, "f:endpoints": {}, "f:ports": {} },
    }]);
    for endpoint in object["endpoints"].as_array_mut().into_iter().flatten() {
        endpoint["targetRef"] = json!({
            "kind": "Pod", "namespace": "filler", "name": "filler-7d4b9c5f6-abcde",
            "uid": "6f7ee0c7-0d0e-4c39-8a0a-000000000001",
        });
        endpoint["zone"] = "zone-a".into();
    }
    object
}

fn pages(resource: &'static str, objects: Vec<Value>) -> impl Iterator<Item = ((&'static str, usize), Vec<u8>)> {
    let count = objects.len();
    let page = move |(number, objects): (usize, &[Value])| {
        let next = (number + 1) * PAGE;
        let token = if next < count { next.to_string() } else { String::new() };
        let page = json!({ "metadata": { "resourceVersion": "9", "continue": token }, "items": objects });
        ((resource, number * PAGE), page.to_string().into_bytes())
    };
    objects.chunks(PAGE).enumerate().map(page).collect::<Vec<_>>().into_iter()
}

/// Answers the requests of a connection until the client ends it.
fn serve(stream: TcpStream, pages: &Pages) -> io::Result<()> {
    let mut requests = BufReader::new(stream.try_clone()?).lines();
    let mut answers = stream;
    while let Some(line) = requests.next() {
        let request = line?;
        // The head ends with an empty line; requests to list have no body.
        while requests.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
        if request.contains("watch=true") {
            // It stays open; nothing ever happens.
            answers.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            continue;
        }
        let body = body(&request, pages);
        write!(answers, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len())?;
        answers.write_all(body)?;
    }
    Ok(())
}

/// What is asked for; an empty list for what there is none of.
fn body<'a>(request: &str, pages: &'a Pages) -> &'a [u8] {
    let path = request.split([' ', '?']).nth(1).unwrap_or_default();
    let resource = if path.contains("/namespaces/") { "" } else { path.rsplit('/').next().unwrap_or_default() };
    let token = request.split(['?', '&', ' ']).find_map(|part| part.strip_prefix("continue="));
    let from = token.and_then(|token| token.parse().ok()).unwrap_or(0);
    let page = pages.iter().find(|((name, first), _)| *name == resource && *first == from);
    page.map_or(br#"{"metadata":{"resourceVersion":"9"},"items":[]}"#, |(_, page)| page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_and_what_is_not_there_is_an_empty_list() {
        let objects: Vec<Value> = (0..PAGE + 1).map(|number| json!({ "number": number })).collect();
        let pages: Pages = pages("services", objects).collect();
        let read = |request: &str| serde_json::from_slice::<Value>(body(request, &pages)).expect("JSON");
        let first = read("GET /api/v1/services?&limit=500 HTTP/1.1");
        assert_eq!(first["metadata"]["continue"], PAGE.to_string());
        let second = read(&format!("GET /api/v1/services?&limit=500&continue={PAGE} HTTP/1.1"));
        assert_eq!((&second["items"][0]["number"], &second["metadata"]["continue"]), (&PAGE.into(), &"".into()));
        assert_eq!(read("GET /api/v1/nodes?limit=1 HTTP/1.1")["items"], json!([]));
        assert_eq!(read("GET /api/v1/namespaces/default/services?x HTTP/1.1")["items"], json!([]));
    }
}
