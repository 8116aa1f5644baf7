//! Every file in `tests/config/valid` is taken; every one in `tests/config/invalid` is refused
//! with the words its first line promises (`# expect: ...`), and with its own name and line.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use weft::node::config::Config;
use weft::node::config::Overrides;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config").join(folder);
    let entries = fs::read_dir(folder).expect("the folder is there");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

#[test]
fn valid_files_are_taken() {
    for file in files("valid") {
        if let Err(error) = Config::load(Some(&file), Overrides::default()) {
            panic!("{error}");
        }
    }
}

#[test]
fn invalid_files_are_refused_with_file_line_and_reason() {
    for file in files("invalid") {
        let text = fs::read_to_string(&file).expect("readable");
        let expected = text.lines().next().and_then(|line| line.strip_prefix("# expect: "));
        let expected = expected.expect("the first line says what is expected");
        let error = match Config::load(Some(&file), Overrides::default()) {
            Ok(_) => panic!("{} was taken", file.display()),
            Err(error) => error.to_string(),
        };
        let told = error.strip_prefix(&format!("{}:", file.display()));
        let told = told.unwrap_or_else(|| panic!("no file and line in: {error}"));
        assert!(told.starts_with(expected), "{}: {told}\nexpected {expected}", file.display());
    }
}
