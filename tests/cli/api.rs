//! The management API as raw HTTP, for what the commands never send.

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::process::Uid;

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

#[test]
fn another_user_is_sent_away_though_the_socket_lets_all_in() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        let notice = "NOT TESTED: another user at the API's socket; that takes root\n";
        let _ = std::io::stderr().write_all(notice.as_bytes());
        return;
    }
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let socket = node.data.join("weft.sock");
    for (path, mode) in [(&node.data, 0o755), (&socket, 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
    }
    // The user of this thread alone, which ends with it.
    let ask = move || {
        rustix::thread::set_thread_uid(Uid::from_raw(NOBODY)).expect("root may");
        let mut stream = UnixStream::connect(socket).expect("its mode allows it");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let _ = stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: weft\r\n\r\n");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    };
    let asked = thread::Builder::new().spawn(ask).expect("a thread").join().expect("no panic");
    assert_eq!(asked, b"", "{}", String::from_utf8_lossy(&asked));
    let events = node.json(&["event", "list"]);
    let last = &events.as_array().and_then(|all| all.last()).expect("an event");
    assert_eq!(last["kind"], "api-refused", "{events}");
    let told = last["message"].as_str().is_some_and(|text| text.contains("uid 65534"));
    assert!(told, "{last}");
    node.stop_despite(Some("api-refused"));
}
