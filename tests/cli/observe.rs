//! What a node tells of itself: counts, connections, events, metrics, log levels.

use std::fs;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::api::request;
use crate::support::Node;
use crate::support::PATIENCE;
use crate::support::Scratch;

/// Between two looks.
const A_MOMENT: Duration = Duration::from_millis(100);

fn get(node: &Node, path: &str) -> Value {
    let (head, body) = request(node, &format!("GET {path}"), "");
    assert!(head.starts_with("HTTP/1.1 200 "), "{path}: {head}\n{body}");
    serde_json::from_str(&body).expect("JSON")
}

/// The counts of one operation on vol0, once there are so many: an answer is counted after it was
/// sent.
fn counts(node: &Node, operation: &str, count: u64) -> Value {
    let look = || {
        let stats = get(node, "/v1/stats");
        let operations = stats["volumes"][0]["operations"].as_array().expect("a list").clone();
        operations.into_iter().find(|of| of["operation"] == operation && requests(of) == count)
    };
    let counted = (0..100).find_map(|_| {
        look().or_else(|| {
            thread::park_timeout(A_MOMENT);
            None
        })
    });
    counted.unwrap_or_else(|| panic!("no {count} of {operation}: {}", get(node, "/v1/stats")))
}

fn requests(counts: &Value) -> u64 {
    let buckets = counts["latency"]["buckets"].as_array().expect("a list");
    buckets.iter().map(|bucket| bucket[1].as_u64().expect("a count")).sum()
}

#[test]
fn what_hosts_do_is_counted_by_volume_operation_and_stage() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let before = get(&node, "/v1/stats");
    assert_eq!(before["volumes"][0]["name"], "vol0");
    assert_eq!(before["volumes"][0]["operations"], Value::Array(Vec::new()));
    assert_eq!(get(&node, "/v1/connections"), Value::Array(Vec::new()));

    let mut stream = UnixStream::connect(node.data.join("nbd.sock")).expect("listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let export = nbd::client::handshake(&mut stream, b"vol0").expect("agreed");
    let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
    for _ in 0..5 {
        disk.seek(SeekFrom::Start(0)).expect("seeks");
        disk.write_all(&[7; 8192]).expect("written");
        disk.seek(SeekFrom::Start(0)).expect("seeks");
        disk.read_exact(&mut [0; 4096]).expect("read");
    }
    let writes = counts(&node, "write", 5);
    assert_eq!(writes["bytes"], 5 * 8192);
    assert_eq!((&writes["front_end"], &writes["errors"]), (&"nbd".into(), &0.into()));
    let reads = counts(&node, "read", 5);
    assert_eq!(reads["bytes"], 5 * 4096);

    let stages = writes["stages"].as_array().expect("a list");
    let of = |name: &str| stages.iter().find(|stage| stage["stage"] == name);
    let journal = of("journal").expect("writes wait for the journal");
    assert_eq!(requests(journal), 5);
    let spent: u64 = stages.iter().filter_map(|stage| stage["latency"]["sum_ns"].as_u64()).sum();
    let total = writes["latency"]["sum_ns"].as_u64().expect("a sum");
    assert!(spent.abs_diff(total) <= total / 100, "{spent} ns in stages, {total} ns altogether");

    let connections = get(&node, "/v1/connections");
    assert_eq!(connections.as_array().map(Vec::len), Some(1), "{connections}");
    let connection = &connections[0];
    assert_eq!((&connection["peer"], &connection["volume"]), (&"unix".into(), &"vol0".into()));
    assert_eq!(connection["requests"], 10);
    assert_eq!(connection["bytes_written"], 5 * 8192);
    let front_ends = get(&node, "/v1/stats")["front_ends"].clone();
    assert_eq!(
        (&front_ends[0]["front_end"], &front_ends[0]["connections_open"]),
        (&"nbd".into(), &1.into())
    );
}

#[test]
fn what_was_counted_is_recorded_and_explained() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let node = Node::start(&scratch, &config);
    let mut stream = UnixStream::connect(node.data.join("nbd.sock")).expect("listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let export = nbd::client::handshake(&mut stream, b"vol0").expect("agreed");
    let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
    disk.write_all(&[7; 8192]).expect("written");
    counts(&node, "write", 1);

    let explained = node.json(&["explain", "vol0"]);
    let writes = &explained["operations"][0];
    assert_eq!((&writes["operation"], &writes["requests"]), (&"write".into(), &1.into()));
    assert_eq!(writes["costs_most"], "journal", "{explained}");
    let told = node.weft(&["explain", "vol0"]).out;
    assert!(told.contains("journal costs most: writes wait until"), "{told}");
    assert_eq!(node.weft(&["explain", "nope"]).code, Some(4));

    let recorded = || get(&node, "/v1/history").as_array().expect("a list").clone();
    let seen = (0..300).any(|_| {
        thread::park_timeout(A_MOMENT);
        recorded().len() >= 3
    });
    assert!(seen, "nothing is recorded");
    let times: Vec<u64> =
        recorded().iter().map(|stats| stats["unix_ms"].as_u64().expect("a time")).collect();
    assert!(times.is_sorted(), "{times:?}");
    let from = get(&node, &format!("/v1/history?from_ms={}&step_ms=3600000", times[1]));
    assert_eq!(from.as_array().map(Vec::len), Some(1));
    assert_eq!(from[0]["unix_ms"], times[1]);
    // The last second holds no write.
    let explained = node.json(&["explain", "vol0", "--last", "1s"]);
    assert_eq!(explained["operations"], Value::Array(Vec::new()), "{explained}");

    // A second run has what the first one recorded.
    node.stop();
    let node = Node::start(&scratch, &config);
    let recorded = get(&node, "/v1/history");
    assert_eq!(recorded[1]["unix_ms"], times[1]);
}

#[test]
fn a_node_that_records_nothing_says_so() {
    let scratch = Scratch::new();
    let config = scratch.config("pod.device_size = \"256MiB\"\nhistory.size = 0");
    let node = Node::start(&scratch, &config);
    let (head, problem) = request(&node, "GET /v1/history", "");
    assert!(head.starts_with("HTTP/1.1 501 "), "{head}");
    assert!(problem.contains("history.size"), "{problem}");
    assert!(!node.data.join("history.redb").exists());
}

#[test]
fn events_come_in_order_and_after_a_number() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    node.json(&["volume", "create", "db", "--size", "1MiB"]);
    let events = get(&node, "/v1/events");
    let kinds: Vec<&str> =
        events.as_array().expect("a list").iter().filter_map(|e| e["kind"].as_str()).collect();
    assert_eq!(kinds, ["node-started", "volume-created"], "{events}");
    assert_eq!((&events[1]["subject"], &events[1]["severity"]), (&"db".into(), &"info".into()));

    fs::remove_file(node.data.join("devices/dev-3.img")).expect("removed");
    let lost = (0..300).find_map(|_| {
        thread::park_timeout(A_MOMENT);
        let later = get(&node, "/v1/events?after=2");
        later.as_array().and_then(|all| all.first().cloned())
    });
    let lost = lost.expect("the loss is told");
    assert_eq!(lost["kind"], "device-out-of-service");
    assert_eq!(lost["severity"], "warning");
    assert!(lost["subject"].as_str().is_some_and(|name| name.ends_with("dev-3.img")), "{lost}");
    assert!(lost["advice"].as_str().is_some_and(|advice| !advice.is_empty()), "{lost}");

    let (head, _) = request(&node, "GET /v1/events?after=-1", "");
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
    let (head, _) = request(&node, "GET /v1/events?before=1", "");
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
}

#[test]
fn metrics_are_on_the_api_socket_and_where_the_configuration_says() {
    // Let go at once, so that the node can have it.
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let address = free.expect("a free port");
    let scratch = Scratch::new();
    let config =
        scratch.config(&format!("pod.device_size = \"256MiB\"\nmetrics.listen = [\"{address}\"]"));
    let node = Node::start(&scratch, &config);
    let (head, text) = request(&node, "GET /metrics", "");
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    let uuid = node.json(&["pod", "show"])["uuid"].as_str().expect("text").to_owned();
    assert!(text.contains(&format!("\nweft_pod_healthy{{pod=\"{uuid}\"}} 1\n")), "{text}");

    let ask = |path: &str| {
        let mut stream = TcpStream::connect(address).expect("listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let line = format!("GET {path} HTTP/1.1\r\nHost: weft\r\nConnection: close\r\n\r\n");
        stream.write_all(line.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered");
        answer
    };
    assert!(ask("/metrics").contains("\nweft_volume_size_bytes{"));
    assert!(ask("/v1/status").starts_with("HTTP/1.1 404 "), "only metrics are served there");
}

#[test]
fn log_levels_change_while_the_node_runs() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    assert_eq!(get(&node, "/v1/log")["level"], "info");
    let set = |level: &str| request(&node, "PUT /v1/log", &format!("{{\"level\":\"{level}\"}}"));
    let (head, _) = set("info,weft::target=debug");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(get(&node, "/v1/log")["level"], "weft::target=debug,info");
    drop(UnixStream::connect(node.data.join("nbd.sock")).expect("listens"));
    let seen = (0..100).any(|_| {
        thread::park_timeout(A_MOMENT);
        node.log().contains("DEBUG")
    });
    assert!(seen, "{}", node.log());
    let (head, problem) = set("weft=loudest");
    assert!(head.starts_with("HTTP/1.1 400 "), "{head} {problem}");
    assert_eq!(get(&node, "/v1/log")["level"], "weft::target=debug,info");
}
