//! The management API as raw HTTP, for what the commands never send.

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use crate::support::Node;
use crate::support::PATIENCE;
use crate::support::Scratch;

/// Sends a request and returns the answer's status line and headers, and its body.
pub fn request(node: &Node, line: &str, body: &str) -> (String, String) {
    let mut stream = UnixStream::connect(node.data.join("weft.sock")).expect("listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let length = body.len();
    let text = format!(
        "{line} HTTP/1.1\r\nHost: weft\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_owned(), body.to_owned())
}

#[test]
fn what_is_refused_is_a_problem_with_the_engines_kind() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let mode = fs::metadata(node.data.join("weft.sock")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let long = format!("{{\"name\":\"{}\",\"size_bytes\":4096}}", "a".repeat(100 << 10));
    for (line, body, status, kind) in [
        ("GET /v1/nothing", "", 404, "NotFound"),
        ("GET /v1/volumes/nope", "", 404, "NotFound"),
        ("GET /v1/volumes/%2e%2e%2fpod", "", 404, "NotFound"),
        ("PUT /v1/pod", "", 405, "InvalidRequest"),
        ("POST /v1/volumes", "{", 400, "InvalidRequest"),
        ("POST /v1/volumes", "{\"name\":\"a\"}", 422, "InvalidRequest"),
        ("POST /v1/volumes", "{\"name\":\"a\",\"size_bytes\":4096,\"x\":1}", 422, "InvalidRequest"),
        ("POST /v1/volumes", "{\"name\":\"-a\",\"size_bytes\":4096}", 400, "InvalidRequest"),
        ("POST /v1/volumes", "{\"name\":\"a\",\"size_bytes\":0}", 400, "InvalidRequest"),
        ("POST /v1/volumes", "{\"name\":\"vol0\",\"size_bytes\":4096}", 409, "Exists"),
        ("POST /v1/volumes", &long, 413, "InvalidRequest"),
        ("PATCH /v1/volumes/vol0", "{\"size_bytes\":4096}", 400, "InvalidRequest"),
    ] {
        let (head, answer) = request(&node, line, body);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{line} {body}: {head}");
        assert!(head.contains("content-type: application/problem+json"), "{line}: {head}");
        let problem: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!(problem["kind"], kind, "{line} {body}: {problem}");
        assert_eq!(problem["status"], status, "{line}: {problem}");
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{problem}");
    }

    let (head, _) = request(&node, "POST /v1/volumes", "{\"name\":\"a\",\"size_bytes\":4096}");
    assert!(head.starts_with("HTTP/1.1 201 "), "{head}");
    let (head, body) = request(&node, "DELETE /v1/volumes/a", "");
    assert!(head.starts_with("HTTP/1.1 204 ") && body.is_empty(), "{head}");
    node.stop();
}
