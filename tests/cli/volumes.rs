//! Volumes by the command line, and the exit codes scripts rely on.

use std::os::unix::net::UnixStream;

use crate::support::ERROR_POLICY;
use crate::support::Node;
use crate::support::REPLY_INFO;
use crate::support::Scratch;
use crate::support::plain_answer;
use crate::support::text;
use crate::support::weft;

#[test]
fn a_volume_lives_from_create_to_delete() {
    let scratch = Scratch::new();
    let config = scratch.config("pod.device_size = \"256MiB\"\npod.first_volume = \"\"");
    let node = Node::start(&scratch, &config);
    assert_eq!(node.json(&["volume", "list"]), serde_json::json!([]));

    let created = node.json(&[
        "volume",
        "create",
        "db",
        "--size",
        "100GiB",
        "--block-size",
        "512",
        "--read-only",
    ]);
    assert_eq!(created["size_bytes"], 100_u64 << 30);
    assert_eq!(created["logical_block_bytes"], 512);
    assert_eq!(created["read_only"], true);
    assert_eq!(node.json(&["volume", "show", "db"]), created);

    let resized = node.json(&["volume", "resize", "db", "--size", "200GiB"]);
    assert_eq!(resized["size_bytes"], 200_u64 << 30);
    assert_eq!(resized["uuid"], created["uuid"]);
    let table = node.weft(&["volume", "list"]).out;
    assert!(table.contains("db      200 GiB"), "{table}");
    assert!(table.contains("read-only"), "{table}");

    assert_eq!(node.weft(&["volume", "delete", "db"]).code, Some(0));
    assert_eq!(node.json(&["volume", "list"]), serde_json::json!([]));

    // Which node, said before the command or within it.
    let (data, api) = (text(&node.data), node.data.join("weft.sock"));
    let created = weft(&["--data", data, "volume", "create", "a", "--size", "1GiB"]);
    assert_eq!(created.code, Some(0), "{created:?}");
    let listed = weft(&["--api", text(&api), "volume", "list"]);
    assert!(listed.code == Some(0) && listed.out.contains("1 GiB"), "{listed:?}");
    let listed = weft(&["volume", "--api", text(&api), "list"]);
    assert_eq!(listed.code, Some(0), "{listed:?}");
    node.stop();
}

#[test]
fn a_write_cache_is_turned_on_and_off_and_outlives_a_restart() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let node = Node::start(&scratch, &config);
    assert_eq!(node.json(&["volume", "show", "vol0"])["write_cache"], false);
    let created = node.json(&["volume", "create", "a", "--size", "1GiB", "--write-cache"]);
    assert_eq!(created["write_cache"], true);
    assert_eq!(node.json(&["volume", "write-cache", "vol0", "on"])["write_cache"], true);
    assert_eq!(node.json(&["volume", "write-cache", "a", "off"])["write_cache"], false);
    assert!(node.weft(&["volume", "show", "a"]).out.contains("write cache  off"));
    assert!(node.weft(&["event", "list"]).out.contains("volume-write-cache-set"));
    node.stop();

    let node = Node::start(&scratch, &config);
    assert_eq!(node.json(&["volume", "show", "vol0"])["write_cache"], true);
    assert_eq!(node.json(&["volume", "show", "a"])["write_cache"], false);
    assert!(node.weft(&["volume", "show", "vol0"]).out.contains("write cache  on, over NBD"));
    assert_eq!(node.weft(&["volume", "write-cache", "nope", "on"]).code, Some(4));
    assert_eq!(node.weft(&["volume", "write-cache", "a", "maybe"]).code, Some(2));
    node.stop();
}

#[test]
fn hosts_are_added_and_a_volume_is_for_some_of_them() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let nqn = "nqn.2014-08.org.nvmexpress:uuid:6a3f6f0c-1d2e-4c57-9f0a-0e5a5d0e2f6b";
    assert_eq!(node.json(&["host", "list"]), serde_json::json!([]));
    assert_eq!(node.json(&["host", "add", nqn])["nqn"], nqn);
    assert_eq!(node.json(&["host", "list"]), serde_json::json!([{ "nqn": nqn }]));

    let export = || plain_answer(UnixStream::connect(node.data.join("nbd.sock")).expect("listens"));
    assert_eq!(node.json(&["volume", "show", "vol0"])["hosts"], serde_json::Value::Null);
    assert_eq!(export(), REPLY_INFO);
    let shown = node.json(&["volume", "hosts", "vol0", "--only", nqn]);
    assert_eq!(shown["hosts"], serde_json::json!([nqn]));
    assert!(node.weft(&["volume", "show", "vol0"]).out.contains(nqn));
    assert_eq!(export(), ERROR_POLICY, "clients of NBD have no name");
    let shown = node.json(&["export", "show", "vol0"]);
    assert_eq!(shown["nbd"], serde_json::json!([]));
    assert_eq!(shown["nvme"][0]["config_json"][0]["hostnqn"], nqn);
    assert!(node.weft(&["export", "show", "vol0"]).out.contains("not served over NBD"));
    assert_eq!(node.weft(&["host", "remove", nqn]).code, Some(0));
    assert_eq!(node.json(&["volume", "show", "vol0"])["hosts"], serde_json::json!([]));
    assert_eq!(export(), ERROR_POLICY, "an empty list admits nobody");
    node.json(&["volume", "hosts", "vol0", "--all"]);
    assert_eq!(node.json(&["volume", "show", "vol0"])["reservations"], serde_json::Value::Null);
    assert_eq!(node.weft(&["volume", "release", "vol0"]).code, Some(0));
    assert_eq!(export(), REPLY_INFO);
    node.stop();
}

#[test]
fn hosts_get_keys_that_nothing_shows() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    let nqn = "nqn.2014-08.org.example:one";
    let made = |hash: &str| {
        let key = weft(&["host", "key", "--hash", hash]);
        assert_eq!(key.code, Some(0), "{key:?}");
        key.out
    };
    let (key, ctrl) = (made("none"), made("sha512"));
    assert!(key.starts_with("DHHC-1:00:") && ctrl.starts_with("DHHC-1:03:"));
    assert_ne!(made("none"), key);
    let (key_file, ctrl_file) = (scratch.path("key"), scratch.path("ctrl"));
    std::fs::write(&key_file, &key).expect("written");
    std::fs::write(&ctrl_file, &ctrl).expect("written");
    let (key_file, ctrl_file) = (text(&key_file), text(&ctrl_file));

    let mut shown = String::new();
    let mut run = |arguments: &[&str]| {
        let done = node.weft(arguments);
        assert_eq!(done.code, Some(0), "{done:?}");
        shown += &done.out;
        shown += &done.err;
        done.out
    };
    let added = run(&["host", "add", nqn, "--dhchap-key-file", key_file]);
    assert!(added.contains("host (none)"), "{added}");
    let both =
        ["host", "set", nqn, "--dhchap-key-file", key_file, "--dhchap-ctrl-key-file", ctrl_file];
    assert!(run(&both).contains("host (none) + ctrl (sha512)"));
    assert!(run(&["host", "list"]).contains("host (none) + ctrl (sha512)"));
    assert!(run(&["export", "show", "vol0"]).contains("--dhchap-ctrl-secret"));
    let listed = run(&["host", "list", "-o", "json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let expected = serde_json::json!({ "key_hash": "none", "ctrl_key_hash": "sha512" });
    assert_eq!(listed[0]["dhchap"], expected);
    run(&["event", "list", "-o", "json"]);
    run(&["host", "set", nqn, "--no-dhchap"]);
    assert_eq!(node.json(&["host", "list"]), serde_json::json!([{ "nqn": nqn }]));

    std::fs::write(scratch.path("wrong"), key.replace(":00:", ":02:")).expect("written");
    for (arguments, words) in [
        (&["--dhchap-key-file", text(&scratch.path("wrong"))][..], "for 02 it has 48"),
        (&["--dhchap-key-file", text(&scratch.path("nowhere"))], "nowhere"),
        (&["--dhchap-ctrl-key-file", ctrl_file], "--dhchap-key-file"),
        (&["--dhchap-key-file", key_file, "--no-dhchap"], "cannot be used"),
        (&[], "--no-dhchap"),
    ] {
        let done = node.weft(&[&["host", "set", nqn][..], arguments].concat());
        assert_eq!(done.code, Some(2), "{arguments:?}: {done:?}");
        assert!(done.err.contains(words), "{arguments:?}: {done:?}");
        shown += &done.err;
    }
    let unknown = node.weft(&["host", "set", "nqn.x", "--no-dhchap"]);
    assert_eq!(unknown.code, Some(4), "{unknown:?}");
    for written in [key, ctrl] {
        let secret = written.split(':').nth(2).expect("between colons");
        assert!(!shown.contains(secret), "a key is shown: {shown}");
    }
    node.stop();
}

#[test]
fn every_refusal_has_its_exit_code() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    for (code, arguments, words) in [
        (5, &["volume", "create", "vol0", "--size", "1GiB"][..], "exists"),
        (4, &["volume", "show", "nope"], "not found"),
        (4, &["volume", "resize", "nope", "--size", "1GiB"], "not found"),
        (4, &["volume", "delete", "nope"], "not found"),
        (4, &["export", "show", "nope"], "not found"),
        (4, &["volume", "release", "nope"], "no volume"),
        (2, &["volume", "resize", "vol0", "--size", "1GiB"], "smaller"),
        (2, &["volume", "create", "a/b", "--size", "1GiB"], "'a/b'"),
        (2, &["volume", "create", "a", "--size", "1000"], "multiple of 4 KiB"),
        (2, &["volume", "create", "a", "--size", "1GiB", "--block-size", "1024"], "512 or 4096"),
        (2, &["volume", "create", "a", "--size", "ten"], "not a size"),
        (2, &["volume", "create", "a"], "--size"),
        (2, &["host", "add", "iqn.x"], "qualified name"),
        (4, &["host", "remove", "nqn.x"], "no host"),
        (4, &["volume", "hosts", "vol0", "--only", "nqn.x"], "host add"),
        (4, &["volume", "hosts", "nope", "--all"], "not found"),
        (2, &["volume", "hosts", "vol0"], "--only"),
        (2, &["volume", "hosts", "vol0", "--all", "--only", "nqn.x"], "--all"),
        (2, &["volumes"], "unrecognized"),
        (2, &["--nbd", "127.0.0.1:0", "status"], "--nbd"),
    ] {
        let done = node.weft(arguments);
        assert_eq!(done.code, Some(code), "{arguments:?}: {done:?}");
        assert!(done.err.contains(words), "{arguments:?}: {done:?}");
        assert_eq!(done.out, "", "{arguments:?}");
    }
    node.stop();

    let nobody = weft(&["status", "--data", text(&scratch.path("data"))]);
    assert_eq!(nobody.code, Some(3), "{nobody:?}");
    let nobody = weft(&["volume", "list", "--api", text(&scratch.path("nowhere.sock"))]);
    assert_eq!(nobody.code, Some(3), "{nobody:?}");
}

#[test]
fn help_tells_the_exit_codes() {
    for arguments in [&["--help"][..], &["volume", "--help"], &["status", "--help"]] {
        let help = weft(arguments);
        assert_eq!(help.code, Some(0));
        assert!(help.out.contains("Exit codes: 0 done"), "{help:?}");
    }
}
