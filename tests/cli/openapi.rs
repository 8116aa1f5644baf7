//! The OpenAPI document against a running node: every path answers, and as described.

use serde_json::Value;
use serde_json::json;

use crate::api::request;
use crate::support::Node;
use crate::support::Scratch;
use crate::support::weft;

/// Methods as the document writes them.
const METHODS: &[&str] = &["get", "put", "post", "delete", "patch"];

fn document() -> Value {
    let done = weft(&["openapi"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    serde_json::from_str(&done.out).expect("JSON")
}

/// Every operation: its method, its path and its description.
fn operations(document: &Value) -> Vec<(&str, &str, &Value)> {
    let paths = document["paths"].as_object().expect("paths");
    paths
        .iter()
        .flat_map(|(path, item)| {
            let known =
                METHODS.iter().filter_map(move |method| Some((*method, item.get(*method)?)));
            known.map(move |(method, operation)| (method, path.as_str(), operation))
        })
        .collect()
}

/// Asserts that an answer is what the document says of that status.
fn check(document: &Value, operation: &Value, what: &str, (head, body): &(String, String)) {
    let status = head.split(' ').nth(1).expect("a status");
    let responses = &operation["responses"];
    let success = status.starts_with('2');
    let described = if success { &responses[status] } else { &responses["default"] };
    assert!(described.is_object(), "{what}: {status} is not described: {responses}");
    let Some(content) = described["content"].as_object() else {
        assert!(body.is_empty(), "{what}: {body}");
        return;
    };
    let (kind, described) = content.iter().next().expect("a type");
    assert!(head.contains(&format!("content-type: {kind}")), "{what}: {kind}\n{head}");
    if kind.starts_with("text/") {
        return;
    }
    // References begin at the root, so the schema brings the components along.
    let mut schema = described["schema"].clone();
    schema["components"] = document["components"].clone();
    let validator = jsonschema::draft202012::new(&schema).expect("a schema");
    let answer: Value = serde_json::from_str(body).expect("JSON");
    let wrong: Vec<_> = validator.iter_errors(&answer).map(|error| error.to_string()).collect();
    assert!(wrong.is_empty(), "{what}: {wrong:#?}\n{answer:#}");
}

#[test]
fn the_served_document_is_the_printed_one_and_every_path_answers() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let document = document();
    let (head, served) = request(&node, "GET /v1/openapi.json", "");
    assert!(head.contains("content-type: application/json"), "{head}");
    assert_eq!(serde_json::from_str::<Value>(&served).expect("JSON"), document);
    assert_eq!(document["openapi"], "3.1.0");

    let all = operations(&document);
    assert!(all.len() >= 20, "{all:?}");
    for (method, path, operation) in all {
        let problem = &operation["responses"]["default"]["content"];
        assert!(problem["application/problem+json"].is_object(), "{method} {path}: {problem}");
        let line = format!(
            "{} {}",
            method.to_uppercase(),
            path.replace("{name}", "nope").replace("{nqn}", "nqn.nope").replace("{id}", "nope")
        );
        let answer = request(&node, &line, "");
        let missing = answer.0.starts_with("HTTP/1.1 404") && !path.contains('{');
        assert!(!missing && !answer.0.starts_with("HTTP/1.1 405"), "{line}: {}", answer.0);
        assert!(!answer.1.contains("there is no /v1"), "{line}: {}", answer.1);
        check(&document, operation, &line, &answer);
    }
    node.stop();
}

#[test]
fn answers_are_as_described() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let document = document();
    let ask = |method: &str, path: &str, line: &str, body: &str| {
        let operation = &document["paths"][path][method];
        assert!(operation.is_object(), "{method} {path} is not described");
        let answer = request(&node, &format!("{} {line}", method.to_uppercase()), body);
        assert!(answer.0.starts_with("HTTP/1.1 2"), "{line}: {} {}", answer.0, answer.1);
        check(&document, operation, line, &answer);
    };
    const NQN: &str = "nqn.2014-08.org.example:one";
    let volume = json!({ "name": "db", "size_bytes": 1 << 20 }).to_string();
    let host = json!({ "nqn": NQN }).to_string();
    let hosts = json!({ "hosts": [NQN] }).to_string();
    ask("post", "/v1/volumes", "/v1/volumes", &volume);
    ask(
        "patch",
        "/v1/volumes/{name}",
        "/v1/volumes/db",
        &json!({ "size_bytes": 2 << 20 }).to_string(),
    );
    ask("post", "/v1/hosts", "/v1/hosts", &host);
    ask("put", "/v1/volumes/{name}/hosts", "/v1/volumes/db/hosts", &hosts);
    ask("get", "/v1/volumes/{name}", "/v1/volumes/db", "");
    ask("delete", "/v1/volumes/{name}/reservations", "/v1/volumes/db/reservations", "");
    ask("put", "/v1/log", "/v1/log", &json!({ "level": "info" }).to_string());

    ask("post", "/v1/pod/scrub", "/v1/pod/scrub", "");
    let tasks: Value = serde_json::from_str(&request(&node, "GET /v1/tasks", "").1).expect("JSON");
    let id = tasks[0]["id"].as_str().expect("an id");
    ask("get", "/v1/tasks/{id}", &format!("/v1/tasks/{id}"), "");

    // Something to count and someone connected.
    let socket = node.data.join("nbd.sock");
    let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("listens");
    let export = nbd::client::handshake(&mut stream, b"vol0").expect("agreed");
    let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
    std::io::Write::write_all(&mut disk, &[7; 8192]).expect("written");
    for path in [
        "/v1/status",
        "/v1/pod",
        "/v1/devices",
        "/v1/volumes",
        "/v1/hosts",
        "/v1/tasks",
        "/v1/stats",
        "/v1/history",
        "/v1/connections",
        "/v1/events",
        "/v1/log",
    ] {
        ask("get", path, path, "");
    }
    ask("get", "/v1/events", "/v1/events?after=1", "");
    const KEY: &str = "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
    let keys = json!({ "key": KEY, "ctrl_key": KEY }).to_string();
    ask("put", "/v1/hosts/{nqn}/dhchap", &format!("/v1/hosts/{NQN}/dhchap"), &keys);
    const TLS_KEY: &str = "NVMeTLSkey-1:01:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwNf9LrZ:";
    let key = json!({ "key": TLS_KEY }).to_string();
    ask("put", "/v1/hosts/{nqn}/tls", &format!("/v1/hosts/{NQN}/tls"), &key);
    ask("get", "/v1/hosts", "/v1/hosts", "");
    ask("delete", "/v1/hosts/{nqn}/tls", &format!("/v1/hosts/{NQN}/tls"), "");
    ask("delete", "/v1/hosts/{nqn}/dhchap", &format!("/v1/hosts/{NQN}/dhchap"), "");
    ask("delete", "/v1/hosts/{nqn}", &format!("/v1/hosts/{NQN}"), "");
    ask("delete", "/v1/volumes/{name}", "/v1/volumes/db", "");
    node.stop();
}
