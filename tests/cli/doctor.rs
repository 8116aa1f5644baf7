//! `weft doctor` on this machine: beside nothing, beside a node, and with what is wrong.

use std::net::TcpListener;
use std::process::Command;

use serde_json::Value;

use crate::support::Node;
use crate::support::Outcome;
use crate::support::Scratch;
use crate::support::text;
use crate::support::weft;

/// The findings of one check.
fn of<'a>(report: &'a Value, check: &str) -> Vec<&'a Value> {
    let findings = report["findings"].as_array().expect("findings");
    findings.iter().filter(|finding| finding["check"] == check).collect()
}

fn report(done: &Outcome) -> Value {
    serde_json::from_str(&done.out).unwrap_or_else(|error| panic!("{error}: {done:?}"))
}

/// Whether every finding of the check has this verdict.
fn all(report: &Value, check: &str, verdict: &str) -> bool {
    let found = of(report, check);
    !found.is_empty() && found.iter().all(|finding| finding["verdict"] == verdict)
}

#[test]
fn a_machine_that_runs_a_node_is_fit_for_it() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let doctor = || weft(&["doctor", "--config", text(&config), "-o", "json"]);
    let before = doctor();
    assert_eq!(before.code, Some(0), "{before:?}");
    let before = report(&before);
    assert!(!scratch.path("data").exists(), "nothing is made");

    let node = Node::start(&scratch, &config);
    let beside = doctor();
    assert_eq!(beside.code, Some(0), "{beside:?}");
    let beside = report(&beside);
    let pid = format!("process {}", node.pid());
    for check in ["io-uring", "config", "devices", "listen", "data-dir"] {
        assert!(all(&before, check, "OK"), "{before:#}");
        assert!(all(&beside, check, "OK"), "{beside:#}");
    }
    for check in ["devices", "listen"] {
        let names = |finding: &&Value| finding["found"].as_str().is_some_and(|s| s.contains(&pid));
        assert!(of(&beside, check).iter().any(names), "{beside:#}");
    }
    node.stop();
}

#[test]
fn a_running_node_is_known_by_whatever_path() {
    let scratch = Scratch::new();
    let config = scratch.small();
    let node = Node::start(&scratch, &config);
    let here = scratch.path("");
    let up = format!("../{}/data", here.file_name().expect("a name").display());
    for data in ["data", "./data/", &up] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
        command.args(["doctor", "--config", text(&config), "--data", data, "-o", "json"]);
        let output = command.current_dir(&here).output().expect("runs");
        let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(output.status.success() && all(&found, "listen", "OK"), "{data}: {found:#}");
    }
    node.stop();
}

#[test]
fn what_is_wrong_is_an_error_with_advice_and_ends_in_1() {
    let scratch = Scratch::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("an address");
    let config = scratch.config(&format!(
        "pod.devices = [{0:?}, \"/dev/null\", {1:?}]\npod.data_strips = 1\npod.parity_strips = 1\n\
         api.socket = \"auto\"\n[nvme]\nunknown_hosts = \"loopback\"\n[log]\nlevel = \"info\"\n",
        scratch.path("a"),
        scratch.path("b"),
    ));
    let changed = std::fs::read_to_string(&config)
        .expect("readable")
        .replace("nbd.listen = [\"127.0.0.1:0\"]", &format!("nbd.listen = [\"{address}\"]"));
    std::fs::write(&config, changed).expect("written");

    let done = weft(&["doctor", "--config", text(&config), "-o", "json"]);
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.err.contains("2 errors"), "{done:?}");
    let found = report(&done);
    for check in ["listen", "devices"] {
        let errors: Vec<_> =
            of(&found, check).into_iter().filter(|finding| finding["verdict"] == "ERR").collect();
        assert_eq!(errors.len(), 1, "{found:#}");
        assert!(errors[0]["fix"].is_string(), "{found:#}");
    }

    let table = weft(&["doctor", "--config", text(&config)]);
    assert!(table.out.contains("ERR   listen") && table.out.contains("fix: ss -ltnp"), "{table:?}");

    std::fs::write(&config, "[pod]\ndata_strips = 0\n").expect("written");
    let done = weft(&["doctor", "--config", text(&config), "-o", "json"]);
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(all(&report(&done), "config", "ERR"));
    assert!(all(&report(&done), "devices", "SKIP"));
}

#[test]
fn a_host_is_looked_at_without_a_node() {
    let done = weft(&["doctor", "--host", "-o", "yaml"]);
    // Whether the machine of the test has the modules is not for the test to say.
    assert!(matches!(done.code, Some(0 | 1)), "{done:?}");
    let found: Value = yaml_serde::from_str(&done.out).expect("YAML");
    for check in ["nbd-module", "nvme-tcp-module", "nbd-client", "nvme-cli", "identity"] {
        assert!(!of(&found, check).is_empty(), "{found:#}");
    }
}
