//! Keeps `docs/spec/nbd.toml` and the tests that claim its requirements in step.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Values of `key = "value"` lines, requirement by requirement. The file is ours and plain, so
/// this needs no TOML parser.
fn requirements() -> Vec<BTreeMap<String, String>> {
    let text = fs::read_to_string(root().join("docs/spec/nbd.toml")).unwrap();
    let fields = |part: &str| {
        let pairs = part.lines().filter_map(|line| line.split_once(" = "));
        pairs.map(|(key, value)| (key.to_owned(), value.trim_matches('"').to_owned())).collect()
    };
    text.split("[[requirement]]").skip(1).map(fields).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Requirement ids claimed by `// spec:` lines, with the file.
fn claims() -> BTreeSet<(String, String)> {
    let mut claims = BTreeSet::new();
    for directory in ["src/target/nbd", "tests"] {
        for entry in fs::read_dir(root().join(directory)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let file = path.strip_prefix(root()).unwrap().display().to_string();
            for line in fs::read_to_string(&path).unwrap().lines() {
                if let Some(id) = line.trim().strip_prefix("// spec: nbd-") {
                    claims.insert((format!("nbd-{id}"), file.clone()));
                }
            }
        }
    }
    claims
}

#[test]
fn every_requirement_is_tested_or_excused() {
    let claims = claims();
    let mut ids = BTreeSet::new();
    for requirement in requirements() {
        let id = &requirement["id"];
        assert!(ids.insert(id.clone()), "{id} appears twice");
        match requirement.get("test") {
            Some(file) => {
                assert!(claims.contains(&(id.clone(), file.clone())), "no test of {id} in {file}");
            }
            None => assert!(requirement.contains_key("exception"), "{id} has neither"),
        }
    }
    for (id, file) in claims {
        assert!(ids.contains(&id), "{file} claims {id}, which docs/spec/nbd.toml does not have");
    }
}
