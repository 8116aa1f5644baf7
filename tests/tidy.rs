//! What clippy cannot say about this repository, as a test.
//!
//! Every rule is a function from one file to complaints; each complaint names the place and what to
//! do instead. `the_repository_is_tidy` runs them all over every text file; below it each rule has a
//! test that shows it a violation, so that no rule can fall asleep.
//!
//! A rule that makes some piece of code worse is changed here, with the reason, not worked around.

use std::fs;
use std::path::Path;

/// Who may use whom: a module of `src/` and every other `crate::` module it may name. Leaves first.
const LAYERS: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("canary", &[]),
    ("error", &["units"]),
    ("secret", &["error"]),
    ("env", &["error", "units"]),
    ("codec", &["error", "units"]),
    ("cache", &["units"]),
    ("format", &["canary", "codec", "error", "units"]),
    ("device", &["env", "error", "units"]),
    ("observe", &["env", "error", "units"]),
    ("pool", &["canary", "codec", "device", "env", "error", "format", "observe", "units"]),
    (
        "engine",
        &[
            "cache", "canary", "codec", "device", "env", "error", "format", "observe", "pool",
            "secret", "units",
        ],
    ),
    (
        "volume",
        &[
            "cache", "device", "engine", "env", "error", "format", "observe", "pool", "secret",
            "units",
        ],
    ),
    ("target", &["env", "error", "observe", "secret", "units", "volume"]),
    ("mgmt", &["env", "error", "observe", "secret", "target", "units", "volume"]),
    ("cli", &["device", "error", "format", "node", "secret", "units"]),
    (
        "node",
        &[
            "cache", "cli", "codec", "device", "engine", "env", "error", "format", "mgmt",
            "observe", "pool", "secret", "target", "units", "volume",
        ],
    ),
];

/// Most lines in a source file. At 700, look for the second noun inside.
const FILE_LINES_MAX: usize = 1000;

/// Most lines in a function, from `fn` to the closing brace.
const FUNCTION_LINES_MAX: usize = 70;

/// The only files in which `unsafe` may stand.
const UNSAFE_FILES: &[&str] = &["src/device/buffer.rs", "src/device/uring.rs"];

/// Where the tokio runtime may be named: the rest runs on a simulated clock too.
const RUNTIME_PLACES: &[&str] = &[
    "src/env/coarse.rs",
    "src/env/tokio_env.rs",
    "src/device/",
    "src/target/",
    "src/node/",
    "src/mgmt/",
    "src/cli/",
    "src/main.rs",
];

/// Words of the log that no protocol knows.
const STORAGE_WORDS: &[&str] = &["segment", "segments", "strip", "strips", "lsn", "lsns"];

/// Words of the protocols that the log does not know.
const PROTOCOL_WORDS: &[&str] = &["nbd", "nvme", "nvmf"];

/// Markers of unfinished work. Spelled in halves, since this file is checked too.
const MARKERS: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
    concat!("to", "do!("),
    concat!("unimple", "mented!("),
    concat!("dbg", "!("),
];

/// Directories that exist on a developer's machine only. In halves, likewise.
const DEVELOPER_PATHS: &[&str] = &[
    concat!("/ho", "me/"),
    concat!("/Us", "ers/"),
    concat!("/ro", "ot/"),
    concat!("/wo", "rk/"),
    concat!("/tmp", "/w/"),
];

/// The table of what we depend on, and why.
const DEPENDENCIES_PAGE: &str = "docs/decisions/0001-dependencies.md";

/// One file of the repository.
struct Source {
    /// From the root, with slashes: `src/pool/read.rs`.
    path: String,
    text: String,
    /// The text with comments and literals turned into spaces, line by line the same. Empty unless
    /// the file is Rust.
    code: String,
}

/// A rule: complaints about one file.
type Rule = fn(&Source) -> Vec<String>;

const RULES: &[Rule] = &[
    layers,
    one_use_per_module,
    file_length,
    function_length,
    module_header,
    unsafe_places,
    storage_words_in_targets,
    protocol_words_in_the_log,
    ordered_maps,
    runtime_places,
    biased_select,
    markers,
    developer_paths,
];

#[test]
fn the_repository_is_tidy() {
    let mut files = Vec::new();
    collect(Path::new(env!("CARGO_MANIFEST_DIR")), "", &mut files);
    assert!(files.iter().any(|file| file.path == "src/lib.rs"), "the walk found no sources");
    let complaints: Vec<String> =
        files.iter().flat_map(|file| RULES.iter().flat_map(|rule| rule(file))).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_dependency_has_its_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| {
        fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("read {path}: {error}"))
    };
    let reasons = read(DEPENDENCIES_PAGE);
    let complaints: Vec<String> = ["Cargo.toml", "api/Cargo.toml", "tui/Cargo.toml"]
        .into_iter()
        .flat_map(|manifest| dependencies_without_reason(manifest, &read(manifest), &reasons))
        .collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// Complaints about dependencies in the text of a manifest that no row of `reasons` names.
fn dependencies_without_reason(manifest: &str, text: &str, reasons: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut in_dependencies = false;
    for line in text.lines() {
        if line.starts_with('[') {
            in_dependencies = line.ends_with("dependencies]");
            continue;
        }
        let name = line.split(['=', '.', ' ']).next().unwrap_or(line);
        let ours = name.starts_with("weft") || name.starts_with('#') || name.is_empty();
        let row = |row: &str| row.starts_with('|') && row.contains(&format!("`{name}`"));
        if in_dependencies && !ours && !reasons.lines().any(row) {
            complaints.push(format!(
                "{manifest}: '{name}' has no reason; give it a row in {DEPENDENCIES_PAGE}, or do \
                 without it"
            ));
        }
    }
    complaints
}

/// Adds every text file below `directory`, whose path from the root is `prefix`.
fn collect(directory: &Path, prefix: &str, files: &mut Vec<Source>) {
    const GENERATED: &[&str] = &["target/", "fuzz/target/", "fuzz/corpus/", ".git/", "weft-data/"];
    let mut entries: Vec<_> = fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("list {}: {error}", directory.display()))
        .map(|entry| entry.expect("directory entry"))
        .collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type().expect("file type");
        if kind.is_dir() {
            let prefix = format!("{path}/");
            if !GENERATED.contains(&prefix.as_str()) {
                collect(&entry.path(), &prefix, files);
            }
        } else if kind.is_file() && is_text(&path) {
            let text = fs::read_to_string(entry.path())
                .unwrap_or_else(|error| panic!("read {path}: {error}"));
            files.push(source(&path, &text));
        }
    }
}

/// Whether people write this kind of file; scripts have no extension.
fn is_text(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    match name.rsplit_once('.') {
        Some(("", _)) => false,
        Some((_, extension)) => {
            ["rs", "toml", "md", "sh", "py", "yml", "yaml", "service", "nbd"].contains(&extension)
        }
        None => path.starts_with("scripts/") || path.starts_with(".ci/"),
    }
}

fn source(path: &str, text: &str) -> Source {
    let code = if path.ends_with(".rs") { code_only(text) } else { String::new() };
    Source { path: path.to_owned(), text: text.to_owned(), code }
}

// ---- The rules ----

fn layers(file: &Source) -> Vec<String> {
    let Some(inner) = file.path.strip_prefix("src/") else { return Vec::new() };
    let module = inner.split('/').next().unwrap_or(inner).trim_end_matches(".rs");
    if module == "lib" || module == "main" {
        return Vec::new();
    }
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
        return vec![format!(
            "{}: module '{module}' has no row in LAYERS; add one to tests/tidy.rs and src/lib.rs",
            file.path
        )];
    };
    let mut complaints = Vec::new();
    for (line, code) in numbered(&file.code) {
        for used in words_after(code, "crate::") {
            let known = LAYERS.iter().any(|(name, _)| *name == used);
            if known && used != module && !allowed.contains(&used) {
                complaints.push(format!(
                    "{}:{line}: '{module}' may not use '{used}'; pass what is needed in from \
                     above, or move it down",
                    file.path
                ));
            }
        }
        if code.contains("super::super::") {
            complaints.push(format!(
                "{}:{line}: two levels up; write `crate::module`, so that the layers show",
                file.path
            ));
        }
    }
    complaints
}

fn one_use_per_module(file: &Source) -> Vec<String> {
    complain_about_lines(file, "one `use crate::module` each, so that grep finds it", |code| {
        let dense: String = code.chars().filter(|c| !c.is_whitespace()).collect();
        dense.contains("usecrate::{") || dense.contains("use{crate::")
    })
}

fn file_length(file: &Source) -> Vec<String> {
    let lines = file.text.lines().count();
    if file.code.is_empty() || lines <= FILE_LINES_MAX {
        return Vec::new();
    }
    vec![format!(
        "{}: {lines} lines, at most {FILE_LINES_MAX}; find the second noun and give it a file",
        file.path
    )]
}

fn function_length(file: &Source) -> Vec<String> {
    functions(&file.code)
        .into_iter()
        .filter(|function| function.lines > FUNCTION_LINES_MAX)
        .map(|Function { name, line, lines }| {
            format!(
                "{}:{line}: fn {name} has {lines} lines, at most {FUNCTION_LINES_MAX}; keep the \
                 decisions here and move straight work into functions of their own",
                file.path
            )
        })
        .collect()
}

fn module_header(file: &Source) -> Vec<String> {
    let source = file.path.ends_with(".rs") && in_sources(&file.path);
    if !source || file.text.starts_with("//!") {
        return Vec::new();
    }
    vec![format!(
        "{}: starts without `//!`; say what the file owns, who calls it and what must hold",
        file.path
    )]
}

fn unsafe_places(file: &Source) -> Vec<String> {
    if UNSAFE_FILES.contains(&file.path.as_str()) {
        return Vec::new();
    }
    let advice = format!("`unsafe` belongs in {}; use their types", UNSAFE_FILES.join(" and "));
    complain_about_lines(file, &advice, |code| identifiers(code).any(|word| word == "unsafe"))
}

fn storage_words_in_targets(file: &Source) -> Vec<String> {
    if !file.path.starts_with("src/target/") {
        return Vec::new();
    }
    let advice = "a target knows no storage word; ask the `Volume` for what the client needs";
    complain_about_lines(file, advice, |code| {
        identifiers(code)
            .filter(|word| !word.starts_with("strip_prefix") && !word.starts_with("strip_suffix"))
            .any(|word| has_part(word, STORAGE_WORDS))
    })
}

fn protocol_words_in_the_log(file: &Source) -> Vec<String> {
    if !file.path.starts_with("src/engine/") && !file.path.starts_with("src/pool/") {
        return Vec::new();
    }
    let advice = "the log knows no protocol; translate in src/target/ and speak of volumes here";
    complain_about_lines(file, advice, |code| {
        identifiers(code).any(|word| has_part(word, PROTOCOL_WORDS))
    })
}

fn ordered_maps(file: &Source) -> Vec<String> {
    // The node's source of randomness, which the simulator replaces.
    if file.path == "src/env/tokio_env.rs" {
        return Vec::new();
    }
    let advice = "random iteration order: take BTreeMap, or rustc_hash::FxHashMap and FxHashSet";
    complain_about_lines(file, advice, |code| {
        identifiers(code).any(|word| ["HashMap", "HashSet", "RandomState"].contains(&word))
    })
}

fn runtime_places(file: &Source) -> Vec<String> {
    let exempt = RUNTIME_PLACES.iter().any(|place| file.path.starts_with(place));
    if exempt || !file.path.starts_with("src/") {
        return Vec::new();
    }
    let advice = "take time, spawning and streams from `env`, so that the simulator owns them";
    complain_about_lines(file, advice, |code| {
        words_after(code, "tokio::")
            .any(|word| ["net", "time", "spawn", "task", "runtime", "fs", "signal"].contains(&word))
    })
}

fn biased_select(file: &Source) -> Vec<String> {
    if !file.path.starts_with("src/") {
        return Vec::new();
    }
    let select = concat!("sel", "ect!");
    let mut complaints = Vec::new();
    for (at, _) in file.code.match_indices(select) {
        let body = file.code[at + select.len()..].trim_start_matches([' ', '\n', '{', '(']);
        if !body.starts_with("biased") {
            let line = line_of(&file.code, at);
            complaints.push(format!(
                "{}:{line}: the branch is chosen at random; start the body with `biased;`",
                file.path
            ));
        }
    }
    complaints
}

fn markers(file: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    for (line, text) in numbered(&file.text) {
        for marker in MARKERS.iter().filter(|marker| text.contains(**marker)) {
            complaints.push(format!(
                "{}:{line}: '{marker}'; finish it, refuse it with a clear error, or leave it out",
                file.path
            ));
        }
    }
    complaints
}

fn developer_paths(file: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    for (line, text) in numbered(&file.text) {
        let starts_here = |at: usize| {
            let before = text[..at].chars().next_back();
            !before.is_some_and(|c| c.is_alphanumeric() || "_.~/})-".contains(c))
        };
        for path in DEVELOPER_PATHS {
            if text.match_indices(path).any(|(at, _)| starts_here(at)) {
                complaints.push(format!(
                    "{}:{line}: '{path}' exists on one machine only; use a path relative to the \
                     repository, or mktemp",
                    file.path
                ));
            }
        }
    }
    complaints
}

// ---- Reading Rust, as far as the rules need it ----

/// One complaint for each line of code that is `wrong`.
fn complain_about_lines(file: &Source, advice: &str, wrong: impl Fn(&str) -> bool) -> Vec<String> {
    numbered(&file.code)
        .filter(|(_, code)| wrong(code))
        .map(|(line, _)| format!("{}:{line}: {advice}", file.path))
        .collect()
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines())
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

fn in_sources(path: &str) -> bool {
    path.starts_with("src/") || path.contains("/src/")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn identifiers(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c| !is_word(c)).filter(|word| !word.is_empty())
}

/// The word after each `prefix` that is not itself the end of a longer path or word.
fn words_after<'a>(code: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    code.match_indices(prefix)
        .filter(|(at, _)| !code[..*at].ends_with(|c| is_word(c) || c == ':'))
        .map(|(at, _)| {
            let rest = &code[at + prefix.len()..];
            &rest[..rest.find(|c| !is_word(c)).unwrap_or(rest.len())]
        })
}

/// Whether a part of an identifier, in snake_case or CamelCase, is one of `words`.
fn has_part(identifier: &str, words: &[&str]) -> bool {
    let mut parts = vec![String::new()];
    let mut lower = false;
    for c in identifier.chars() {
        if c == '_' || (c.is_uppercase() && lower) {
            parts.push(String::new());
        }
        lower = c.is_lowercase() || c.is_numeric();
        if c != '_' {
            parts.last_mut().expect("never empty").extend(c.to_lowercase());
        }
    }
    parts.iter().any(|part| words.contains(&part.as_str()))
}

/// A function found in code.
struct Function {
    name: String,
    line: usize,
    /// From `fn` to the closing brace, both included.
    lines: usize,
}

/// Every function with a body.
fn functions(code: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let name: String = code[at + 3..].chars().take_while(|c| is_word(*c)).collect();
        if let Some(end) = body_end(&code[at..]).filter(|_| !name.is_empty()) {
            let lines = code[at..at + end].matches('\n').count() + 1;
            found.push(Function { name, line: line_of(code, at), lines });
        }
    }
    found
}

/// Where the body of the function at the start of `code` ends; `None` for a mere declaration.
fn body_end(code: &str) -> Option<usize> {
    let mut brackets = 0_usize;
    let mut braces = 0_usize;
    for (at, c) in code.char_indices() {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets = brackets.checked_sub(1)?,
            ';' if brackets == 0 && braces == 0 => return None,
            '{' => braces += 1,
            '}' => {
                braces = braces.checked_sub(1)?;
                if braces == 0 && brackets == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

/// Rust without comments and the insides of literals: spaces stand in their place.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let after_word = code.ends_with(is_word);
        let hidden = hidden_length(rest, after_word);
        if hidden == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        code.extend(rest[..hidden].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[hidden..];
    }
    code
}

/// Length of the comment or literal that starts `text`, or 0.
fn hidden_length(text: &str, after_word: bool) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return block_comment_length(text);
    }
    if let Some(inside) = text.strip_prefix('"') {
        return 1 + quoted_length(inside, '"');
    }
    if let Some(raw) = raw_string_length(text).filter(|_| !after_word) {
        return raw;
    }
    if let Some(inside) = text.strip_prefix('\'') {
        let mut chars = inside.chars();
        let escaped = chars.next() == Some('\\');
        // Otherwise it is a lifetime.
        if escaped || chars.next() == Some('\'') {
            return 1 + quoted_length(inside, '\'');
        }
    }
    0
}

/// Up to and including the closing quote; escapes are skipped.
fn quoted_length(inside: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in inside.char_indices() {
        if c == quote && !escaped {
            return at + c.len_utf8();
        }
        escaped = c == '\\' && !escaped;
    }
    inside.len()
}

/// Length of `r"…"`, `br#"…"#` and the like at the start of `text`.
fn raw_string_length(text: &str) -> Option<usize> {
    let marked = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let inside = marked.trim_start_matches('#');
    let hashes = marked.len() - inside.len();
    let body = inside.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let closing = body.find(&end).map_or(body.len(), |at| at + end.len());
    Some(text.len() - body.len() + closing)
}

/// Block comments nest.
fn block_comment_length(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

// ---- Each rule is shown a violation, and something like it that is fine ----

/// Asserts that `rule` complains about `bad`, saying `advice`, and not about `good`.
fn assert_rule(rule: Rule, path: &str, bad: &str, advice: &str, good: &str) {
    let complaints = rule(&source(path, bad));
    assert_eq!(complaints.len(), 1, "{bad}\n{complaints:?}");
    assert!(complaints[0].contains(path) && complaints[0].contains(advice), "{complaints:?}");
    assert_eq!(rule(&source(path, good)), Vec::<String>::new(), "{good}");
}

#[test]
fn a_call_upwards_is_refused() {
    let good = "use crate::units::Lba;\n// crate::engine is above us\nuse crate::pool::x;";
    let path = "src/pool/read.rs";
    assert_rule(layers, path, "use crate::engine::Engine;", "may not use 'engine'", good);
    assert_rule(layers, path, "let x = super::super::engine::run();", "crate::module", good);
    assert_rule(layers, "src/target/nbd/wire.rs", "fn f(p: crate::pool::Pool) {}", "'pool'", "");
}

#[test]
fn a_module_without_a_layer_is_refused() {
    let complaints = layers(&source("src/misc.rs", "//! Misc."));
    assert!(complaints.len() == 1 && complaints[0].contains("no row in LAYERS"), "{complaints:?}");
}

#[test]
fn layers_have_no_cycle() {
    for (at, (module, allowed)) in LAYERS.iter().enumerate() {
        for used in *allowed {
            let below = LAYERS.iter().position(|(name, _)| name == used).expect("has a row");
            // The node constructs everything, and the command line starts it.
            assert!(below < at || (*module, *used) == ("cli", "node"), "{module} uses {used}");
        }
    }
}

#[test]
fn grouped_crate_imports_are_refused() {
    let good = "use crate::units::{Lba, Lsn};";
    assert_rule(one_use_per_module, "src/a.rs", "use crate::{units, error};", "grep", good);
}

#[test]
fn long_files_are_refused() {
    let good = "//\n".repeat(FILE_LINES_MAX);
    assert_rule(file_length, "tests/a.rs", &format!("{good}//\n"), "second noun", &good);
}

#[test]
fn long_functions_are_refused() {
    let function =
        |lines: usize| format!("pub fn f(a: [u8; 2]) {{\n{}}}\n", "g();\n".repeat(lines));
    let bad = function(FUNCTION_LINES_MAX - 1);
    let good = function(FUNCTION_LINES_MAX - 2).repeat(2);
    assert_rule(function_length, "src/a.rs", &bad, "fn f has 71 lines", &good);
}

#[test]
fn files_without_header_are_refused() {
    assert_rule(module_header, "src/a.rs", "use std::fs;\n", "what the file owns", "//! A.\n");
    assert_rule(module_header, "api/src/lib.rs", "", "what the file owns", "//! A.\n");
}

#[test]
fn unsafe_elsewhere_is_refused() {
    let good = "#![forbid(unsafe_code)] // unsafe\nlet s = \"unsafe\";";
    assert_rule(unsafe_places, "src/pool/a.rs", "unsafe { x() }", "use their types", good);
    assert_eq!(unsafe_places(&source(UNSAFE_FILES[0], "unsafe { x() }")), Vec::<String>::new());
}

#[test]
fn storage_words_in_targets_are_refused() {
    let good = "let name = line.strip_prefix(SEGMENTED); // no segment, no LSN";
    for bad in ["let segment_count = 1;", "struct StripIndex;", "fn f(at: Lsn) {}"] {
        let path = "src/target/nbd/session.rs";
        assert_rule(storage_words_in_targets, path, bad, "ask the `Volume`", good);
    }
}

#[test]
fn protocol_words_in_the_log_are_refused() {
    let good = "let checksum = crc64(bytes); // CRC-64/NVME";
    for bad in ["let nbd_flags = 0;", "struct NvmeStatus;"] {
        for path in ["src/engine/write.rs", "src/pool/mod.rs"] {
            assert_rule(protocol_words_in_the_log, path, bad, "speak of volumes", good);
        }
    }
}

#[test]
fn maps_in_random_order_are_refused() {
    let bad = "use std::collections::HashMap;";
    assert_rule(ordered_maps, "src/a.rs", bad, "FxHashMap", "use rustc_hash::FxHashMap;");
}

#[test]
fn the_runtime_below_the_seam_is_refused() {
    let good = "use tokio::sync::Notify; // not tokio::time";
    assert_rule(runtime_places, "src/engine/a.rs", "tokio::time::sleep(d).await;", "`env`", good);
    let above = source("src/node/mod.rs", "tokio::spawn(x);");
    assert_eq!(runtime_places(&above), Vec::<String>::new());
}

#[test]
fn unbiased_select_is_refused() {
    let good = "tokio::select! {\n    biased;\n    x = f() => {}\n}";
    let bad = "tokio::select! {\n    x = f() => {}\n}";
    assert_rule(biased_select, "src/node/a.rs", bad, "start the body", good);
}

#[test]
fn markers_of_unfinished_work_are_refused() {
    for marker in MARKERS {
        let bad = format!("fn f() {{ // {marker}");
        assert_rule(markers, "scripts/test", &bad, "leave it out", "what is left to do");
    }
}

#[test]
fn paths_of_one_machine_are_refused() {
    for path in DEVELOPER_PATHS {
        let bad = format!("see {path}notes.md");
        let good = format!("see docs{path}notes.md and ${{DIR}}{path}");
        assert_rule(developer_paths, "docs/a.md", &bad, "relative to the repository", &good);
    }
}

#[test]
fn dependencies_without_reason_are_refused() {
    let manifest =
        "[package]\nname = \"x\"\n[dev-dependencies]\nbytes.workspace = true\nleft = \"1\"";
    let complaints = dependencies_without_reason("Cargo.toml", manifest, "| `bytes` | buffers |");
    assert!(complaints.len() == 1 && complaints[0].contains("'left'"), "{complaints:?}");
}

#[test]
fn comments_and_literals_are_not_code() {
    let hidden = [
        "// x unsafe\n",
        "/* unsafe /* unsafe */ unsafe */",
        "\"unsafe \\\" unsafe\"",
        "r#\"unsafe \" unsafe\"#",
        "br\"unsafe\"",
        "'\\''; \"unsafe\"",
        "'\"'; // unsafe",
        "b'\"'; // unsafe",
        "\"\"; // unsafe",
    ];
    for text in hidden {
        assert!(!code_only(text).contains("unsafe"), "{text} -> {}", code_only(text));
        let shown = format!("{text}\nfn f<'a>(x: &'a str) {{ unsafe {{}} }}");
        assert!(code_only(&shown).contains("fn f<'a>(x: &'a str) { unsafe {} }"), "{text}");
    }
}
