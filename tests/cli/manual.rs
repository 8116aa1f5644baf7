//! Completions and manual pages, as shells and man(1) read them, and YAML beside JSON.

use std::fs;
use std::process::Command;

use crate::support::Node;
use crate::support::Scratch;
use crate::support::text;
use crate::support::weft;

#[test]
fn completions_know_every_command() {
    let scratch = Scratch::new();
    for shell in ["bash", "zsh", "fish"] {
        let done = weft(&["completions", shell]);
        assert_eq!(done.code, Some(0), "{done:?}");
        for word in ["volume", "resize", "doctor", "completions", "read-only"] {
            assert!(done.out.contains(word), "{shell}: no {word}");
        }
        let path = scratch.path(shell);
        fs::write(&path, &done.out).expect("written");
        // The stage `manual` of scripts/test has all three shells; here the one that is everywhere.
        if shell == "bash" {
            let checked = Command::new("bash").arg("-n").arg(&path).status().expect("runs");
            assert!(checked.success(), "{checked}");
        }
    }
    assert_eq!(weft(&["completions", "tcsh"]).code, Some(2));
}

#[test]
fn every_command_has_a_page() {
    let scratch = Scratch::new();
    let out = scratch.path("man/man1");
    let done = weft(&["man", "--out", text(&out)]);
    assert_eq!((done.code, done.out.as_str()), (Some(0), ""), "{done:?}");
    for name in ["weft", "weft-volume", "weft-volume-create", "weft-doctor", "weft-man"] {
        let page = fs::read_to_string(out.join(format!("{name}.1"))).expect("a page");
        assert!(page.contains(&format!(".TH {}", name.to_uppercase())), "{page}");
    }
    assert_eq!(weft(&["man"]).out, fs::read_to_string(out.join("weft.1")).expect("a page"));
    let refused = weft(&["man", "--out", "/dev/null/man"]);
    assert!(refused.code == Some(1) && refused.err.contains("/dev/null/man"), "{refused:?}");
}

#[test]
fn yaml_says_what_json_does() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &scratch.small());
    for command in [
        &["pod", "show"][..],
        &["volume", "list"],
        &["volume", "show", "vol0"],
        &["export", "show", "vol0"],
        &["host", "list"],
        &["device", "list"],
    ] {
        let yaml = node.weft(&[command, &["-o", "yaml"]].concat());
        let yaml: serde_json::Value = yaml_serde::from_str(&yaml.out).expect("YAML");
        assert_eq!(yaml, node.json(command), "{command:?}");
    }
    let deleted = node.weft(&["volume", "delete", "vol0", "-o", "yaml"]);
    assert_eq!((deleted.code, deleted.out.as_str()), (Some(0), ""));
    node.stop();
}
