//! The API over TCP: with TLS and the token only, for every command.

use std::fs;
use std::io;
use std::io::Read;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Instant;

use weft_api::Client;
use weft_api::ClientError;
use weft_api::Endpoint;
use weft_api::Problem;

use crate::support::Node;
use crate::support::Outcome;
use crate::support::PATIENCE;
use crate::support::Scratch;
use crate::support::certificate;
use crate::support::text;
use crate::support::weft;

/// A token as `openssl rand -hex 32` makes them.
const TOKEN: &str = "3a7bd3e2360a3d29eea436fcfb7e44c735d117c42d1c1835420b6b9942dd4f1b";

/// Words of the one event that all refusals are.
const REFUSED: &str = "api-refused";

/// Writes a file that only its owner may read.
fn secret(path: &Path, content: &str) {
    fs::write(path, content).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("set");
}

/// A configuration with the API and metrics on free ports of loopback.
fn config(scratch: &Scratch) -> std::path::PathBuf {
    certificate(scratch, "node");
    secret(&scratch.path("token"), &format!("{TOKEN}\n"));
    let path = |name: &str| scratch.path(name).display().to_string();
    scratch.config(&format!(
        "pod.device_size = \"256MiB\"\napi.listen = [\"127.0.0.1:0\"]\napi.certificate = {:?}\n\
         api.key = {:?}\napi.token_file = {:?}\nmetrics.listen = [\"127.0.0.1:0\"]",
        path("node.pem"),
        path("node.key"),
        path("token"),
    ))
}

/// Where the API listens over TCP.
fn address(node: &Node) -> String {
    listener(node, "api", true)
}

fn listener(node: &Node, protocol: &str, tls: bool) -> String {
    let status = node.json(&["status"]);
    let listeners = status["listeners"].as_array().expect("a list");
    let found = listeners.iter().find(|listener| listener["protocol"] == protocol);
    let found = found.expect("listens");
    assert_eq!((&found["transport"], &found["tls"]), (&"tcp".into(), &tls.into()));
    found["address"].as_str().expect("text").to_owned()
}

/// Runs a command at a URL.
fn at(url: &str, token: &Path, ca: &Path, command: &[&str]) -> Outcome {
    let place = ["--api", url, "--token-file", text(token), "--ca", text(ca)];
    weft(&[command, &place].concat())
}

/// What a program gets that asks for the status with that token.
fn problem(url: &str, token: &Path, ca: &Path) -> Problem {
    let client = Client::to(Endpoint::https(url, token, ca).expect("complete"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.expect("a runtime").block_on(client.status()) {
        Err(ClientError::Problem(problem)) => problem,
        other => panic!("refused, not {other:?}"),
    }
}

#[test]
fn every_command_works_over_tls_with_the_token() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &config(&scratch));
    let address = address(&node);
    assert!(node.banner.contains(&format!("API        tcp {address}")), "{}", node.banner);
    let (token, ca) = (scratch.path("token"), scratch.path("node.pem"));
    for url in [format!("https://{address}"), address.replace("127.0.0.1", "https://localhost")] {
        let done = at(&url, &token, &ca, &["status"]);
        assert_eq!(done.code, Some(0), "{url}: {done:?}");
    }
    let url = format!("https://{address}");
    let here = |command: &[&str]| {
        let done = at(&url, &token, &ca, command);
        assert_eq!(done.code, Some(0), "{done:?}");
        done.out
    };
    here(&["volume", "create", "far", "--size", "1MiB"]);
    assert!(here(&["volume", "list"]).contains("\nfar "));
    assert!(here(&["event", "list"]).contains("volume-created"));
    assert!(here(&["metrics"]).contains("weft_build_info"));
    assert!(here(&["top", "--once", "--mode", "csv"]).contains("far"));
    assert_eq!(at(&url, &token, &ca, &["volume", "show", "nope"]).code, Some(4));
    let log = node.log();
    assert!(log.contains("127.0.0.1:") && log.contains("/v1/volumes"), "{log}");
    node.stop();
}

#[test]
fn without_the_token_nothing_is_answered() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &config(&scratch));
    let url = format!("https://{}", address(&node));
    let ca = scratch.path("node.pem");
    for wrong in [String::new(), TOKEN.replace('3', "4"), format!("{TOKEN}0")] {
        let path = scratch.path("wrong");
        secret(&path, &wrong);
        for command in [&["status"][..], &["volume", "delete", "vol0"], &["metrics"]] {
            let refused = at(&url, &path, &ca, command);
            assert_eq!(refused.code, Some(6), "{wrong:?} {command:?}: {refused:?}");
            assert!(refused.err.contains("Authorization: Bearer"), "{refused:?}");
            assert!(refused.err.contains("--token-file"), "{refused:?}");
        }
    }
    let problem = problem(&url, &scratch.path("wrong"), &ca);
    assert_eq!((problem.status, &*problem.kind), (401, "Unauthorized"), "{problem:?}");
    assert_eq!(node.json(&["volume", "list"])[0]["name"], "vol0");
    let events = node.json(&["event", "list"]);
    let refused: Vec<_> =
        events.as_array().expect("a list").iter().filter(|e| e["kind"] == REFUSED).collect();
    assert_eq!(refused.len(), 1, "a flood is one event: {events}");
    assert_eq!((&refused[0]["subject"], &refused[0]["count"]), (&"api".into(), &10.into()));
    node.stop_despite(Some(REFUSED));
}

#[test]
fn strangers_and_plain_text_are_refused_and_hold_up_nobody() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &config(&scratch));
    let address = address(&node);
    let url = format!("https://{address}");
    let token = scratch.path("token");
    // These say nothing and stay.
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(&address).expect("listens")).collect();

    let mut plain = TcpStream::connect(&address).expect("listens");
    plain.set_read_timeout(Some(PATIENCE)).expect("set");
    let request =
        format!("GET /v1/status HTTP/1.1\r\nHost: weft\r\nAuthorization: Bearer {TOKEN}\r\n\r\n");
    plain.write_all(request.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));

    certificate(&scratch, "other");
    let untrusted = at(&url, &token, &scratch.path("other.pem"), &["status"]);
    assert_eq!(untrusted.code, Some(1), "{untrusted:?}");
    assert!(untrusted.err.contains("is not trusted"), "{untrusted:?}");
    let done = at(&url, &token, &scratch.path("node.pem"), &["status"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    // With most of them still there it stops at once.
    node.stop_despite(Some(REFUSED));
    drop(silent);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a real node, whose patience takes a real clock")]
fn who_says_nothing_or_half_a_request_is_sent_away_in_time() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &config(&scratch));
    let patience = |address: String, said: &'static [u8]| {
        let mut stream = TcpStream::connect(address).expect("listens");
        stream.set_read_timeout(Some(2 * PATIENCE)).expect("set");
        thread::spawn(move || {
            let start = Instant::now();
            stream.write_all(said).expect("sent");
            let mut answer = Vec::new();
            let ended = stream.read_to_end(&mut answer);
            let timed_out = ended.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
            assert!(!timed_out && answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
            start.elapsed().as_secs()
        })
    };
    let no_tls = patience(address(&node), b"");
    let half = patience(listener(&node, "metrics", false), b"GET /metrics HTTP/1.1\r\nHost:");
    assert!((9..20).contains(&no_tls.join().expect("ends")), "10 s to agree on TLS");
    assert!((29..45).contains(&half.join().expect("ends")), "30 s for a head");
    node.stop_despite(Some(REFUSED));
}

#[test]
fn strangers_take_no_place_from_this_machine() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &config(&scratch));
    // More than there are places at each door, and none of them says anything.
    let silent = |address: String| -> Vec<TcpStream> {
        let connect = |_| {
            let stream = TcpStream::connect(&address).expect("the kernel accepts");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            stream
        };
        (0..140).map(connect).collect()
    };
    let closed = |stream: &mut TcpStream| match stream.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    };
    let mut at_api = silent(address(&node));
    assert!(closed(at_api.last_mut().expect("many")), "it is closed without an answer");
    let events = node.json(&["event", "list"]);
    let refused = events.as_array().and_then(|all| all.last()).expect("an event");
    let told = refused["message"].as_str().is_some_and(|text| text.contains("connections already"));
    assert!(refused["kind"] == REFUSED && told, "{refused}");

    // Prometheus has no name to be let in by, so the oldest gives way to it.
    let mut at_metrics = silent(listener(&node, "metrics", false));
    assert!(closed(&mut at_metrics[0]), "it gave way");
    let newest = at_metrics.last_mut().expect("many");
    newest.write_all(b"GET /metrics HTTP/1.1\r\nHost: weft\r\n\r\n").expect("sent");
    let mut answer = [0; 15];
    newest.read_exact(&mut answer).expect("answered");
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    node.stop_despite(Some(REFUSED));
}

#[test]
fn a_reload_takes_a_new_certificate_and_token_for_the_api() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &config(&scratch));
    let url = format!("https://{}", address(&node));
    let (old_ca, new_ca) = (scratch.path("old.pem"), scratch.path("new.pem"));
    let (old_token, new_token) = (scratch.path("old"), scratch.path("new"));
    fs::copy(scratch.path("node.pem"), &old_ca).expect("copied");
    secret(&old_token, TOKEN);
    secret(&new_token, &TOKEN.replace('3', "4"));
    let code = |token: &Path, ca: &Path| at(&url, token, ca, &["status"]).code;

    certificate(&scratch, "new");
    fs::copy(&new_ca, scratch.path("node.pem")).expect("copied");
    fs::copy(scratch.path("new.key"), scratch.path("node.key")).expect("copied");
    secret(&scratch.path("token"), "too short");
    // One of three is wrong: none is taken.
    let refused = at(&url, &old_token, &old_ca, &["reload"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.err.contains("at least 32") && refused.err.contains("token"), "{refused:?}");
    assert_eq!(code(&old_token, &old_ca), Some(0));

    fs::copy(&new_token, scratch.path("token")).expect("copied");
    let done = at(&url, &old_token, &old_ca, &["reload"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert_eq!(code(&new_token, &new_ca), Some(0));
    assert_eq!(code(&old_token, &new_ca), Some(6));
    assert_eq!(code(&new_token, &old_ca), Some(1));

    let events = node.json(&["event", "list"]);
    let of = |kind: &str| {
        let mut all = events.as_array().expect("a list").iter();
        all.find(|event| event["kind"] == kind).unwrap_or_else(|| panic!("{kind}: {events}"))
    };
    assert!(of("credentials-kept")["message"].as_str().is_some_and(|m| m.contains("at least 32")));
    assert!(of("credentials-kept")["advice"].as_str().is_some_and(|a| a.contains("weft reload")));
    of("credentials-reloaded");
    // Those of the refused reload and of the refused callers.
    node.signal(rustix::process::Signal::TERM);
    assert!(node.wait().success());
}

#[test]
fn a_url_needs_token_and_issuer_and_a_socket_neither() {
    let scratch = Scratch::new();
    certificate(&scratch, "node");
    secret(&scratch.path("token"), TOKEN);
    let (token, ca) = (scratch.path("token"), scratch.path("node.pem"));
    let url = "https://127.0.0.1:1";
    assert_eq!(at(url, &token, &ca, &["status"]).code, Some(3));
    for (arguments, words) in [
        (&["--ca", text(&ca)][..], "--token-file"),
        (&["--token-file", text(&token)], "--ca"),
        (&["--token-file", text(&token), "--ca", "/nonexistent"], "/nonexistent"),
        (&["--token-file", text(&token), "--ca", text(&token)], "no certificate"),
        (&["--token-file", "/nonexistent", "--ca", text(&ca)], "/nonexistent"),
    ] {
        let refused = weft(&[&["status", "--api", url], arguments].concat());
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.err.contains(words), "{words}: {refused:?}");
    }
    let refused = weft(&["status", "--ca", text(&ca)]);
    assert!(refused.code == Some(2) && refused.err.contains("go with --api https"), "{refused:?}");
}

#[test]
fn a_node_with_a_loose_or_missing_token_does_not_start() {
    let scratch = Scratch::new();
    let config = config(&scratch);
    let token = scratch.path("token");
    let refused = |words: &str| {
        let refused = weft(&["--config", text(&config)]);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.err.contains(words) && refused.err.contains("token"), "{refused:?}");
    };
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).expect("set");
    refused("chmod 0600");
    secret(&token, "too short");
    refused("at least 32");
    fs::remove_file(&token).expect("removed");
    refused("No such file");
}
