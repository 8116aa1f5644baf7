//! Stopping: clean, at once, and with hosts connected.

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::mknodat;
use rustix::fs::open;
use rustix::process::Signal;

use crate::support::Node;
use crate::support::PATIENCE;
use crate::support::Scratch;
use crate::support::attach;
use crate::support::text;
use crate::tls;

/// Between two looks at the log.
const A_MOMENT: Duration = Duration::from_millis(10);

#[test]
fn either_signal_stops_cleanly_and_takes_the_sockets_away() {
    let scratch = Scratch::new();
    let config = scratch.small();
    for signal in [Signal::INT, Signal::TERM] {
        let node = Node::start(&scratch, &config);
        let data = node.data.clone();
        assert!(data.join("weft.sock").exists() && data.join("nbd.sock").exists());
        node.signal(signal);
        assert!(node.wait().success());
        assert!(!data.join("weft.sock").exists() && !data.join("nbd.sock").exists());
    }
}

#[test]
fn a_hangup_away_from_a_terminal_reloads() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.args(["--config", text(&config)]).stdin(Stdio::null());
    let node = Node::run(&scratch, command);
    node.signal(Signal::HUP);
    let reloaded = (0..PATIENCE.as_millis() / A_MOMENT.as_millis()).any(|_| {
        thread::park_timeout(A_MOMENT);
        node.log().contains("credentials-reloaded")
    });
    assert!(reloaded, "{}", node.log());
    assert_eq!(node.json(&["status"])["pid"], node.pid());
    node.stop();
}

/// As one on a network that is gone is.
#[test]
fn a_certificate_that_cannot_be_read_to_its_end_does_not_hold_up_a_stop() {
    let scratch = Scratch::new();
    let config = tls::config(&scratch);
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.args(["--config", text(&config)]).stdin(Stdio::null());
    let node = Node::run(&scratch, command);
    let certificate = scratch.path("node.pem");
    fs::remove_file(&certificate).expect("removed");
    mknodat(CWD, &certificate, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("made");
    node.signal(Signal::HUP);
    // It can be opened only once somebody reads, who then waits for what we never write.
    let open = || open(&certificate, OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty()).ok();
    let held = (0..PATIENCE.as_millis() / A_MOMENT.as_millis()).find_map(|_| {
        thread::park_timeout(A_MOMENT);
        open()
    });
    assert!(held.is_some(), "nobody reads the certificate");
    node.signal(Signal::TERM);
    assert!(node.wait().success());
}

#[test]
fn an_idle_connection_does_not_hold_up_a_stop() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let mut host = UnixStream::connect(node.data.join("nbd.sock")).expect("listens");
    let mut greeting = [0; 18];
    host.read_exact(&mut greeting).expect("greeted");
    assert_eq!(node.json(&["status"])["connections"], 1);
    node.stop();
    host.set_read_timeout(Some(PATIENCE)).expect("set");
    assert_eq!(host.read(&mut greeting).unwrap_or(0), 0, "the connection is closed");
}

/// What such a host leaves behind is under way on the thread that served it.
#[test]
fn a_host_that_leaves_with_writes_under_way_does_not_hold_up_a_stop() {
    const WRITE_BYTES: u32 = 1 << 20;
    let scratch = Scratch::new();
    let config = scratch.small();
    for _ in 0..10 {
        let node = Node::start(&scratch, &config);
        let mut host = UnixStream::connect(node.data.join("nbd.sock")).expect("listens");
        attach(&mut host);
        let payload: Vec<u8> = (0..WRITE_BYTES).map(|i| (i % 251).to_le_bytes()[0]).collect();
        for number in 0..8_u64 {
            let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1];
            request.extend(number.to_be_bytes());
            request.extend((number * u64::from(WRITE_BYTES)).to_be_bytes());
            request.extend(WRITE_BYTES.to_be_bytes());
            host.write_all(&[&request, payload.as_slice()].concat()).expect("sent");
        }
        drop(host);
        node.signal(Signal::TERM);
        assert!(node.wait().success());
    }
}

#[test]
fn a_second_signal_stops_at_once() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    // A request whose body never comes holds up the clean stop for seconds.
    let mut stuck = UnixStream::connect(node.data.join("weft.sock")).expect("listens");
    let head = "POST /v1/volumes HTTP/1.1\r\nHost: weft\r\nContent-Type: application/json\r\n\
                Content-Length: 100\r\n\r\n{";
    stuck.write_all(head.as_bytes()).expect("sent");
    // An answered request proves that the one before it has been taken up.
    assert_eq!(node.weft(&["status"]).code, Some(0));
    node.signal(Signal::TERM);
    while !node.log().contains("stopping") {
        std::thread::yield_now();
    }
    node.signal(Signal::INT);
    assert_eq!(node.wait().code(), Some(130));
}
