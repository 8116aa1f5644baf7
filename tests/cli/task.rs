//! Long work: a scrub that heals damaged device files of a running node, and the commands about it.

use std::fs;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use rustix::process::Pid;
use rustix::process::Signal;
use serde_json::Value;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::unit::UNIT_BYTES;

use crate::api::request;
use crate::support::Node;
use crate::support::PATIENCE;
use crate::support::Scratch;
use crate::support::text;

/// What is written: several rows of every strip.
const BYTES: usize = 12 << 20;
/// How a unit begins on a device.
const UNIT_MAGIC: &[u8] = b"WUN1";

/// Incompressible, so that it fills what it is to fill.
fn content() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33).to_le_bytes()
    };
    (0..BYTES / 4).flat_map(|_| next()[..4].to_vec()).collect()
}

fn with_disk<T>(
    node: &Node,
    work: impl FnOnce(&mut nbd::client::NbdClient<&mut UnixStream>) -> T,
) -> T {
    let mut stream = UnixStream::connect(node.data.join("nbd.sock")).expect("listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let export = nbd::client::handshake(&mut stream, b"vol0").expect("agreed");
    work(&mut nbd::client::NbdClient::new(&mut stream, &export))
}

fn write_all(node: &Node) {
    with_disk(node, |disk| {
        for part in content().chunks(1 << 20) {
            disk.write_all(part).expect("written");
        }
    });
}

fn check_all(node: &Node) {
    let found = with_disk(node, |disk| {
        let mut found = vec![0; BYTES];
        disk.seek(SeekFrom::Start(0)).expect("sought");
        found.chunks_mut(1 << 20).for_each(|part| disk.read_exact(part).expect("read"));
        found
    });
    assert!(found == content(), "what was written reads back otherwise");
}

fn device(node: &Node, index: usize) -> PathBuf {
    node.data.join(format!("devices/dev-{index}.img"))
}

/// Changes a byte of every unit on a device file; returns how many there were.
fn damage(node: &Node, path: &Path) -> u64 {
    let record = fs::read_to_string(node.data.join("pod.json")).expect("readable");
    let record: Value = serde_json::from_str(&record).expect("JSON");
    let journal = record["journal_bytes"].as_u64().expect("a number");
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("opened");
    let (begin, end) = (JOURNAL_OFFSET + journal, file.metadata().expect("there").len());
    let mut damaged = 0;
    for unit in (begin..end - UNIT_BYTES as u64).step_by(UNIT_BYTES) {
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, unit).expect("read");
        if magic == UNIT_MAGIC {
            let at = unit + 1000 + damaged;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[!byte[0]], at).expect("written");
            damaged += 1;
        }
    }
    file.sync_all().expect("synced");
    damaged
}

fn damage_of(task: &Value, what: &str) -> u64 {
    task["damage"][what].as_u64().unwrap_or_else(|| panic!("no {what}: {task}"))
}

#[test]
fn a_scrub_heals_what_nobody_reads_and_then_others_may_be_lost() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    write_all(&node);
    // Into segments.
    node.stop();
    let node = Node::start(&scratch, &scratch.small());
    let sound = node.json(&["pod", "scrub", "--wait"]);
    assert_eq!((&sound["state"], damage_of(&sound, "found")), (&Value::from("done"), 0), "{sound}");
    assert!(damage_of(&sound, "verified") > BYTES as u64 * 6 / 4 / UNIT_BYTES as u64, "{sound}");

    for index in [1, 4] {
        assert!(damage(&node, &device(&node, index)) > 0);
    }
    let done = node.weft(&["pod", "scrub", "--wait"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.out.contains("healed, 0 left"), "{done:?}");
    assert!(done.err.lines().all(|line| line.starts_with("scrub ")), "no bar: {done:?}");
    let tasks = node.json(&["task", "list"]);
    let healed = damage_of(&tasks[1], "healed");
    assert!(healed > 0 && healed == damage_of(&tasks[1], "found"), "{tasks}");
    let devices = node.json(&["device", "list"]);
    for index in [1, 4] {
        assert!(devices[index]["healed"].as_u64() > Some(0), "{devices}");
    }
    let again = node.json(&["pod", "scrub", "--wait"]);
    assert_eq!(damage_of(&again, "found"), 0, "{again}");
    let metrics = node.weft(&["metrics"]).out;
    assert!(metrics.contains("weft_scrub_units_healed_total"), "{metrics}");
    let events = node.weft(&["event", "list"]).out;
    assert!(events.contains("scrub-done"), "{events}");
    node.stop_despite(Some("is damaged, in a scrub"));

    for index in [0, 5] {
        fs::remove_file(scratch.path(&format!("data/devices/dev-{index}.img"))).expect("removed");
    }
    let node = Node::start(&scratch, &scratch.small());
    check_all(&node);
}

#[test]
fn tasks_are_shown_waited_for_and_cancelled() {
    let scratch = Scratch::new();
    // So slow that it does not end by itself.
    let slow = scratch.config("pod.device_size = \"256MiB\"\nscrub.rate = \"1MiB\"");
    let node = Node::start(&scratch, &slow);
    write_all(&node);
    node.stop();
    let node = Node::start(&scratch, &slow);
    assert_eq!(node.json(&["task", "list"]), serde_json::json!([]));

    let (head, body) = request(&node, "POST /v1/pod/scrub", "");
    assert!(head.starts_with("HTTP/1.1 202 "), "{head}");
    let task: Value = serde_json::from_str(&body).expect("JSON");
    let id = task["id"].as_str().expect("an id").to_owned();
    assert!(head.contains(&format!("location: /v1/tasks/{id}")), "{head}");
    assert_eq!((&task["kind"], &task["state"]), (&Value::from("scrub"), &Value::from("running")));

    let second = node.weft(&["pod", "scrub"]);
    assert!(second.code == Some(5) && second.err.contains(&id), "{second:?}");
    let table = node.weft(&["task", "list"]).out;
    assert!(table.starts_with("TASK ") && table.contains("running"), "{table}");
    let stats = serde_json::from_str::<Value>(&request(&node, "GET /v1/stats", "").1);
    assert_eq!(stats.expect("JSON")["tasks"][0]["id"], id.as_str());
    let top = node.weft(&["top", "--once", "--mode", "json"]).out;
    assert!(top.contains("\"kind\":\"scrub\""), "{top}");

    interrupt_a_wait(&node, &id);
    let shown = node.json(&["task", "show", &id]);
    assert_eq!(shown["state"], "running", "{shown}");

    assert_eq!(node.weft(&["task", "cancel", &id]).code, Some(0));
    let waited = node.weft(&["task", "wait", &id]);
    assert!(waited.code == Some(1) && waited.err.contains("was cancelled"), "{waited:?}");
    let again = node.weft(&["task", "cancel", &id]);
    assert!(again.code == Some(2) && again.err.contains("ended already"), "{again:?}");
    assert_eq!(node.weft(&["task", "show", "1-99"]).code, Some(4));

    // A node that stops does not wait for the end of a scrub.
    assert_eq!(node.weft(&["pod", "scrub"]).code, Some(0));
    node.stop();
}

/// Ctrl-C while waiting.
fn interrupt_a_wait(node: &Node, id: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.args(["task", "wait", id, "--data", text(&node.data)]);
    let mut waiter = command.stderr(Stdio::piped()).spawn().expect("runs");
    // By its first line it is waiting.
    let mut said = Vec::new();
    let mut stderr = waiter.stderr.take().expect("piped");
    while !said.contains(&b'\n') {
        let mut byte = [0];
        stderr.read_exact(&mut byte).expect("a line");
        said.extend(byte);
    }
    thread::park_timeout(Duration::from_millis(100));
    rustix::process::kill_process(Pid::from_child(&waiter), Signal::INT).expect("it runs");
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).expect("readable");
    let status = waiter.wait().expect("ended");
    assert!(status.code() == Some(1) && rest.contains("goes on without you"), "{status}: {rest}");
}
