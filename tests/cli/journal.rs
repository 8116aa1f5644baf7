//! The log as entries of systemd's journal, which is a socket of the test here.
//!
//! The socket's path is fixed, so the node gets a `/run` of its own: the tests need user namespaces.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use crate::support::Node;
use crate::support::PATIENCE;
use crate::support::Scratch;
use crate::support::text;
use crate::support::weft;

/// Gives what comes after it a `/run` in which `$0` is the journal's directory.
const OWN_RUN: &str = "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && \
                       mount --bind \"$0\" /run/systemd/journal && exec \"$@\"";

/// A journal, as far as the node sees.
struct Journal(UnixDatagram);

impl Journal {
    fn new(scratch: &Scratch) -> Self {
        fs::create_dir(scratch.path("journal")).expect("created");
        let socket = UnixDatagram::bind(scratch.path("journal/socket")).expect("bound");
        socket.set_read_timeout(Some(PATIENCE)).expect("set");
        Self(socket)
    }

    /// The first entry with this field and value.
    fn wait_for(&self, field: &str, value: &str) -> Vec<u8> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = self.0.recv(&mut buffer).expect("an entry");
            let entry = &buffer[..length];
            if has(entry, field, value) {
                return entry.to_vec();
            }
        }
    }
}

/// Whether an entry has a field of that value. (systemd, "Native Journal Protocol")
fn has(entry: &[u8], field: &str, value: &str) -> bool {
    let length = (value.len() as u64).to_le_bytes();
    let sized = [field.as_bytes(), b"\n", &length, value.as_bytes(), b"\n"].concat();
    let plain = format!("{field}={value}\n");
    let contains = |part: &[u8]| entry.windows(part.len()).any(|window| window == part);
    contains(&sized) || contains(plain.as_bytes())
}

/// A node with a `/run` of its own; none where that is not allowed, which is said aloud.
fn node_command(scratch: &Scratch, format: &str) -> Option<Command> {
    let probe =
        Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none", "/run"]).output();
    if !probe.is_ok_and(|done| done.status.success()) {
        let notice = "NOT TESTED: entries of the journal; `unshare -rm` is not allowed here\n";
        let _ = io::Write::write_all(&mut io::stderr(), notice.as_bytes());
        return None;
    }
    let config =
        scratch.config(&format!("pod.device_size = \"256MiB\"\nlog.format = \"{format}\""));
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", OWN_RUN, text(&scratch.path("journal"))]);
    command.args([env!("CARGO_BIN_EXE_weft"), "--config", text(&config)]);
    Some(command)
}

#[test]
fn events_are_entries_with_fields_and_priorities() {
    let scratch = Scratch::new();
    let journal = Journal::new(&scratch);
    let Some(command) = node_command(&scratch, "journald") else { return };
    let node = Node::run(&scratch, command);
    let started = journal.wait_for("WEFT_EVENT", "node-started");
    assert!(has(&started, "PRIORITY", "6") && has(&started, "SYSLOG_IDENTIFIER", "weft"));
    assert!(has(&started, "WEFT_SUBJECT", "node"), "{}", String::from_utf8_lossy(&started));

    node.json(&["volume", "create", "db", "--size", "1MiB"]);
    let changed = journal.wait_for("WEFT_PATH", "/v1/volumes");
    assert!(has(&changed, "WEFT_METHOD", "POST") && has(&changed, "WEFT_STATUS", "201"));

    fs::remove_file(node.data.join("devices/dev-3.img")).expect("removed");
    let lost = journal.wait_for("WEFT_EVENT", "device-out-of-service");
    assert!(has(&lost, "PRIORITY", "4"), "{}", String::from_utf8_lossy(&lost));
    let words = String::from_utf8_lossy(&lost).into_owned();
    assert!(words.contains("WEFT_ADVICE\n") && words.contains("--replace-missing"), "{words}");
    assert_eq!(node.log(), "", "nothing is said twice");
}

#[test]
fn a_service_of_systemd_logs_to_the_journal_by_itself() {
    let scratch = Scratch::new();
    let journal = Journal::new(&scratch);
    let Some(mut command) = node_command(&scratch, "auto") else { return };
    // Standard error becomes this file, which here plays the stream that systemd makes.
    fs::write(scratch.path("log"), "").expect("written");
    let stream = fs::metadata(scratch.path("log")).expect("there");
    command.env("JOURNAL_STREAM", format!("{}:{}", stream.dev(), stream.ino()));
    let node = Node::run(&scratch, command);
    journal.wait_for("WEFT_EVENT", "node-started");
    assert_eq!(node.log(), "");
    node.stop();

    // The same variable with another standard error, as of a program that a service started.
    let mut command = node_command(&scratch, "auto").expect("allowed a moment ago");
    command.env("JOURNAL_STREAM", "1:1");
    let node = Node::run(&scratch, command);
    assert!(node.log().contains("node-started"), "{}", node.log());
    node.stop();
}

#[test]
fn a_journal_that_must_be_there_and_is_not_is_an_error() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("journal")).expect("created");
    let Some(mut command) = node_command(&scratch, "journald") else { return };
    let done = command.output().expect("runs");
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{error}");
    assert!(error.contains("journal") && error.contains("log.format"), "{error}");
    let printed = weft(&["--print-config"]).out;
    assert!(printed.contains("\nformat = \"auto\"\n"), "{printed}");
}
