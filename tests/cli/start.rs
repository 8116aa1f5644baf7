//! First and later starts, and starts that are refused.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::process::Stdio;

use rustix::process::Signal;

use crate::support::Node;
use crate::support::PATIENCE;
use crate::support::Scratch;
use crate::support::text;
use crate::support::weft;

/// Whether an NBD target answers.
fn greets(mut stream: impl Read) -> bool {
    let mut greeting = [0; 8];
    stream.read_exact(&mut greeting).is_ok() && greeting == *b"NBDMAGIC"
}

#[test]
fn the_embedded_default_creates_a_pod_and_a_volume_and_serves_them() {
    let scratch = Scratch::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.args(["--data", text(&scratch.path("data")), "--nbd", "127.0.0.1:0"]);
    command.args(["--nvme-tcp", "127.0.0.1:0"]);
    let node = Node::run(&scratch, command);

    let status = node.json(&["status"]);
    assert_eq!(status["pid"], node.pid());
    assert_eq!(status["pod"]["data_strips"], 4);
    assert_eq!(status["pod"]["parity_strips"], 2);
    assert_eq!(status["pod"]["can_lose"], 2);
    let devices = node.json(&["device", "list"]);
    assert_eq!(devices.as_array().map(Vec::len), Some(6));
    for index in 0..6 {
        assert!(node.data.join(format!("devices/dev-{index}.img")).exists());
    }
    let volume = node.json(&["volume", "show", "vol0"]);
    assert_eq!(volume["size_bytes"], 8_u64 << 30);

    let address = status["listeners"][0]["address"].as_str().expect("an address");
    assert!(node.banner.contains(&format!("nbdinfo nbd://{address}/vol0")), "{}", node.banner);
    assert!(node.banner.contains("nbd+unix:///vol0?socket="), "{}", node.banner);
    assert!(node.banner.contains("nbd-client"), "{}", node.banner);
    let nqn = status["subsystem_nqn"].as_str().expect("a name");
    let connect = format!("-n {nqn}\n");
    assert!(node.banner.contains(&connect), "{}", node.banner);
    assert!(node.banner.contains("sudo nvme connect -t tcp -a 127.0.0.1 -s "), "{}", node.banner);
    assert!(greets(TcpStream::connect(address).expect("listens")));
    assert!(greets(UnixStream::connect(node.data.join("nbd.sock")).expect("listens")));
    node.stop();
}

#[test]
fn a_second_start_finds_the_same_pod_even_without_the_configuration() {
    let scratch = Scratch::new();
    let config = scratch.config(
        "pod.device_size = \"256MiB\"\npod.data_strips = 2\npod.parity_strips = 1\n\
         pod.first_volume = \"first\"",
    );
    let node = Node::start(&scratch, &config);
    let before = node.json(&["pod", "show"]);
    assert_eq!(node.weft(&["volume", "create", "db", "--size", "1GiB"]).code, Some(0));
    node.stop();

    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.args(["--data", text(&scratch.path("data")), "--nbd", "127.0.0.1:0"]);
    command.args(["--nvme-tcp", "127.0.0.1:0"]);
    let node = Node::run(&scratch, command);
    let after = node.json(&["pod", "show"]);
    assert_eq!(after["uuid"], before["uuid"]);
    assert_eq!(after["device_count"], 3);
    assert!(after["epoch"].as_u64() > before["epoch"].as_u64());
    let volumes = node.json(&["volume", "list"]);
    let names: Vec<_> = volumes.as_array().expect("an array").iter().map(|v| &v["name"]).collect();
    assert_eq!(names, ["db", "first"]);
    node.stop();
}

#[test]
fn a_killed_node_leaves_nothing_that_stops_the_next() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let node = Node::start(&scratch, &config);
    let uuid = node.json(&["pod", "show"])["uuid"].clone();
    node.signal(Signal::KILL);
    let data = node.data.clone();
    assert!(!node.wait().success());
    assert!(data.join("weft.sock").exists() && data.join("nbd.sock").exists());

    let node = Node::start(&scratch, &config);
    assert_eq!(node.json(&["pod", "show"])["uuid"], uuid);
    assert!(greets(UnixStream::connect(data.join("nbd.sock")).expect("listens")));
    node.stop();
}

#[test]
fn a_second_node_on_the_directory_is_refused() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let node = Node::start(&scratch, &config);
    let refused = weft(&["--config", text(&config)]);
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(refused.err.contains(&format!("process {}", node.pid())), "{refused:?}");
    assert_eq!(node.weft(&["status"]).code, Some(0), "the first serves on");
    node.stop();
}

#[test]
fn an_address_in_use_is_refused_before_anything_is_created() {
    let scratch = Scratch::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("bound").to_string();
    for option in ["--nbd", "--nvme-tcp"] {
        let refused = weft(&["--config", text(&scratch.small()), option, &address]);
        assert_eq!(refused.code, Some(5), "{refused:?}");
        assert!(refused.err.contains(&address) && refused.err.contains(option), "{refused:?}");
    }
    assert!(!scratch.path("data/devices").exists());
    assert!(!scratch.path("data/pod.json").exists());
}

#[test]
fn devices_too_short_for_the_journal_are_refused_before_anything_is_created() {
    let scratch = Scratch::new();
    let short = |index: usize| {
        let path = scratch.path(&format!("short-{index}"));
        fs::File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("created");
        path
    };
    let there: Vec<_> = (0..6).map(short).collect();
    for more in [
        "pod.journal_size = \"4GiB\"".to_owned(),
        format!("pod.devices = {there:?}"),
        format!("pod.devices = {there:?}\npod.journal_size = \"63MiB\""),
    ] {
        let refused = weft(&["--config", text(&scratch.config(&more))]);
        assert_eq!(refused.code, Some(2), "{more}: {refused:?}");
        let told = ["the smallest device has", "pod.journal_size"];
        assert!(told.iter().all(|told| refused.err.contains(told)), "{refused:?}");
        assert!(!scratch.path("data/pod.json").exists(), "{more}");
        assert!(!scratch.path("data/devices/dev-0.img").exists(), "{more}");
    }
    Node::start(&scratch, &scratch.small()).stop();
}

#[test]
fn a_creation_cut_short_is_begun_again() {
    let scratch = Scratch::new();
    let config = scratch.small();
    Node::start(&scratch, &config).stop();
    // As a crash between the first record and the last leaves it, one device not yet there.
    let record = scratch.path("data/pod.json");
    let mut value: serde_json::Value =
        serde_json::from_slice(&fs::read(&record).expect("there")).expect("JSON");
    value["state"] = "creating".into();
    let uuid = value["uuid"].take();
    fs::write(&record, value.to_string()).expect("written");
    fs::remove_file(scratch.path("data/devices/dev-5.img")).expect("removed");

    let node = Node::start(&scratch, &config);
    assert_ne!(node.json(&["pod", "show"])["uuid"], uuid, "a new pod");
    assert_eq!(node.json(&["volume", "list"])[0]["name"], "vol0");
    assert!(node.log().contains("cut short"), "{}", node.log());
    node.stop_despite(Some("cut short"));
}

#[test]
fn devices_that_hold_something_else_are_left_alone() {
    let scratch = Scratch::new();
    let mut precious = vec![0; 1 << 20];
    precious[512] = 0x55;
    let file = scratch.path("disk");
    fs::write(&file, &precious).expect("written");
    let devices = [file.clone(), scratch.path("new-0"), scratch.path("new-1")];
    let config = scratch
        .config(&format!("pod.devices = {devices:?}\npod.data_strips = 1\npod.parity_strips = 1"));
    let refused = weft(&["--config", text(&config)]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(refused.err.contains("not blank"), "{refused:?}");
    assert_eq!(fs::read(&file).expect("there"), precious);
    assert!(!devices[1].exists() && !scratch.path("data/pod.json").exists());
}

#[test]
fn a_device_in_use_by_a_node_elsewhere_is_refused() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let devices: Vec<_> = (0..6).map(|i| node.data.join(format!("devices/dev-{i}.img"))).collect();
    let config = scratch.config(&format!("pod.devices = {devices:?}"));
    let other = scratch.path("other");
    let refused = weft(&["--config", text(&config), "--data", text(&other)]);
    assert_eq!(refused.code, Some(5), "{refused:?}");
    assert!(refused.err.contains("dev-0.img") && !refused.err.contains("wipe"), "{refused:?}");
    assert!(!other.join("pod.json").exists());
    node.stop();
}

#[test]
fn two_devices_that_are_one_file_are_refused_as_that() {
    let scratch = Scratch::new();
    let (file, link) = (scratch.path("disk"), scratch.path("link"));
    fs::File::create(&file).and_then(|file| file.set_len(256 << 20)).expect("created");
    std::os::unix::fs::symlink(&file, &link).expect("linked");
    let devices = [file, link, scratch.path("new")];
    let config = scratch
        .config(&format!("pod.devices = {devices:?}\npod.data_strips = 1\npod.parity_strips = 1"));
    let refused = weft(&["--config", text(&config)]);
    assert!(refused.err.contains("link") && refused.err.contains("one file"), "{refused:?}");
    assert!(!refused.err.contains("stop that one"), "{refused:?}");
}

#[test]
fn a_place_that_is_not_there_is_no_missing_volume() {
    let scratch = Scratch::new();
    let nowhere = scratch.path("nowhere/nbd.sock");
    let socket = scratch.config(&format!("nbd.unix_socket = {nowhere:?}"));
    let refused = weft(&["--config", text(&socket)]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let refused = weft(&["--config", text(&scratch.small()), "--data", "/proc/weft"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
}

#[test]
fn a_missing_device_is_shown_and_a_pod_without_devices_is_not_created_anew() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let node = Node::start(&scratch, &config);
    let uuid = node.json(&["pod", "show"])["uuid"].clone();
    node.stop();

    fs::remove_file(scratch.path("data/devices/dev-2.img")).expect("removed");
    let node = Node::start(&scratch, &config);
    let pod = node.json(&["pod", "show"]);
    assert_eq!((&pod["uuid"], &pod["devices_in_service"]), (&uuid, &5.into()));
    assert_eq!(node.json(&["device", "list"])[2]["state"], "missing");
    node.stop_despite(Some("dev-2.img"));

    fs::rename(scratch.path("data/devices"), scratch.path("unmounted")).expect("moved");
    let refused = weft(&["--config", text(&config)]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(!scratch.path("data/devices").exists(), "nothing is created in its place");
}

#[test]
fn a_pod_of_which_too_many_devices_are_lost_opens_by_force_only() {
    let scratch = Scratch::new();
    let devices: Vec<_> = (0..7).map(|index| scratch.path(&format!("dev-{index}"))).collect();
    let config = scratch.config(&format!(
        "pod.devices = {devices:?}\npod.device_size = \"512MiB\"\npod.data_strips = 1\n\
         pod.parity_strips = 2"
    ));
    Node::start(&scratch, &config).stop();
    // Those that the first segments are not on, or nothing of the pod could be read.
    devices[4..].iter().for_each(|device| fs::remove_file(device).expect("removed"));

    let refused = weft(&["--config", text(&config)]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for told in ["4 of 7 devices are there, 5 are needed", "--force-open", "for good"] {
        assert!(refused.err.contains(told), "{told}: {refused:?}");
    }
    let both = weft(&["--config", text(&config), "--force-open", "--replace-missing"]);
    assert_eq!(both.code, Some(2), "{both:?}");

    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.args(["--config", text(&config), "--force-open"]);
    let node = Node::run(&scratch, command);
    assert_eq!(node.json(&["pod", "show"])["devices_in_service"], 4);
    assert_eq!(node.json(&["volume", "list"])[0]["name"], "vol0");
    let events = node.json(&["event", "list"]);
    let forced = |event: &serde_json::Value| event["kind"] == "pod-forced";
    assert!(events.as_array().expect("a list").iter().any(forced), "{events}");
    node.stop_despite(Some("dev"));
}

#[test]
fn what_contradicts_the_pod_is_refused_with_the_reason() {
    let scratch = Scratch::new();
    Node::start(&scratch, &scratch.small()).stop();
    for (more, expected) in [
        ("pod.data_strips = 3\npod.parity_strips = 1", "created with 4 + 2"),
        ("pod.device_size = \"1GiB\"", "created with 256 MiB"),
        ("pod.journal_size = \"32MiB\"", "pod.journal_size is set to 32 MiB"),
    ] {
        let refused = weft(&["--config", text(&scratch.config(more))]);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.err.contains(expected), "{refused:?}");
    }
}

#[test]
fn an_unknown_key_is_refused_with_file_line_and_key() {
    let scratch = Scratch::new();
    let config = scratch.config("pod.devises = []");
    let refused = weft(&["--config", text(&config)]);
    assert_eq!(refused.code, Some(2));
    let expected = format!("weft: {}:6: pod.devises: unknown field `devises`", config.display());
    assert!(refused.err.starts_with(&expected), "{refused:?}");
    assert!(!scratch.path("data").exists());
}

#[test]
fn print_config_is_the_documented_file() {
    let printed = weft(&["--print-config"]);
    assert_eq!(printed.code, Some(0));
    assert_eq!(printed.out, include_str!("../../docs/config.toml"));
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_weft"))
        .arg("--print-config")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn sockets_of_systemd_replace_the_configured_ones_and_it_is_told_when_ready() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let handed = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = handed.local_addr().expect("bound");
    let notify = scratch.path("notify");
    let told = UnixDatagram::bind(&notify).expect("bound");
    told.set_read_timeout(Some(PATIENCE)).expect("set");

    // The shell puts the socket where systemd does: descriptor 3.
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" --config \"$1\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_weft"), text(&config)]);
    command.env("NOTIFY_SOCKET", &notify).stdin(Stdio::from(OwnedFd::from(handed)));
    let node = Node::run(&scratch, command);

    let mut message = [0; 64];
    let length = told.recv(&mut message).expect("told");
    assert_eq!(&message[..length], b"READY=1");
    let listeners = node.json(&["status"])["listeners"].clone();
    let nbd = listeners.as_array().expect("a list").iter().filter(|one| one["protocol"] == "nbd");
    assert_eq!(nbd.count(), 1, "{listeners}");
    assert_eq!(listeners[0]["address"], address.to_string());
    assert!(greets(TcpStream::connect(address).expect("listens")));
    assert!(!node.data.join("nbd.sock").exists());
    node.stop();
}
