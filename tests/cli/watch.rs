//! The commands that show what a node tells of itself: events, connections, log levels, metrics.

use std::io::BufRead;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;

use serde_json::Value;

use crate::support::Node;
use crate::support::PATIENCE;
use crate::support::Scratch;
use crate::support::text;

#[test]
fn events_are_listed_for_people_and_for_programs() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    node.json(&["volume", "create", "db", "--size", "1MiB"]);
    let events = node.json(&["event", "list"]);
    assert_eq!(events[1]["kind"], "volume-created", "{events}");
    let later = node.json(&["event", "list", "--after", "1"]);
    assert_eq!(later.as_array().map(Vec::len), Some(1), "{later}");

    let table = node.weft(&["event", "list"]).out;
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("TIME ") && lines.len() == 3, "{table}");
    let (time, rest) = lines[2].split_once("  ").expect("columns");
    assert!(time.starts_with("20") && time.ends_with('Z') && time.len() == 24, "{table}");
    assert!(rest.contains("volume-created") && rest.contains("db"), "{table}");
    node.stop();
}

#[test]
fn following_prints_each_event_when_it_comes() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.args(["event", "list", "--follow", "-o", "json", "--data", text(&node.data)]);
    let mut follower = command.stdout(Stdio::piped()).spawn().expect("runs");
    let lines = BufReader::new(follower.stdout.take().expect("piped")).lines();
    let (sender, received) = mpsc::channel();
    let forward = move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)).ok();
    thread::Builder::new().spawn(forward).expect("a thread");
    let next = || {
        let line = received.recv_timeout(PATIENCE).expect("an event");
        serde_json::from_str::<Value>(&line).expect("an object a line")["kind"].clone()
    };
    assert_eq!(next(), "node-started");
    node.json(&["volume", "create", "db", "--size", "1MiB"]);
    assert_eq!(next(), "volume-created");
    follower.kill().expect("it runs");
    follower.wait().expect("ended");
    node.stop();
}

#[test]
fn connections_and_metrics_are_printed() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    assert_eq!(node.weft(&["connection", "list"]).out.lines().count(), 1);
    let mut stream = UnixStream::connect(node.data.join("nbd.sock")).expect("listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    nbd::client::handshake(&mut stream, b"vol0").expect("agreed");
    let connections = node.json(&["connection", "list"]);
    assert_eq!(connections[0]["volume"], "vol0", "{connections}");
    let table = node.weft(&["connection", "list"]).out;
    assert!(table.contains("  nbd ") && table.contains("  vol0"), "{table}");
    let metrics = node.weft(&["metrics"]);
    assert!(metrics.out.contains("\nweft_connections{front_end=\"nbd\"} 1\n"), "{metrics:?}");
}

#[test]
fn log_levels_are_shown_and_set() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    assert_eq!(node.weft(&["log"]).out, "info\n");
    assert_eq!(node.weft(&["log", "warn,weft::target=debug"]).code, Some(0));
    assert_eq!(node.json(&["log"])["level"], "weft::target=debug,warn");
    let refused = node.weft(&["log", "weft=loudest"]);
    assert!(refused.code == Some(2) && refused.err.contains("read log level"), "{refused:?}");
    let mistyped = node.weft(&["log", "inof"]);
    assert!(mistyped.code == Some(2) && mistyped.err.contains("'inof' is none"), "{mistyped:?}");
    assert_eq!(node.json(&["log"])["level"], "weft::target=debug,warn");
}
