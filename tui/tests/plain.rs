//! The same figures as text, JSON and CSV.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use weft_api::Client;
use weft_tui::Failure;
use weft_tui::plain;
use weft_tui::plain::CSV_HEADER;
use weft_tui::plain::Mode;
use weft_tui::plain::Options;
use weft_tui::source::Source;

mod fixture;

fn printed(mode: Mode, once: bool) -> (Result<(), Failure>, String) {
    let mut source = Source::Recorded(VecDeque::from(fixture::samples()));
    let interval = Duration::from_millis(1);
    let options = Options { node: Client::new(Path::new("")), mode, once, interval, replay: None };
    let mut out = Vec::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime");
    let done = runtime.block_on(plain::print_from(&mut source, &options, &mut out));
    (done, String::from_utf8(out).expect("text"))
}

#[test]
fn text_has_a_table_for_each_interval() {
    let (done, text) = printed(Mode::Text, true);
    done.expect("printed");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("2026-11-21 20:00:01 UTC  healthy, can lose 2 more"), "{text}");
    assert!(lines[1].starts_with("VOLUME") && lines[2].starts_with("db0"), "{text}");
    assert!(text.contains("\nall ") && text.is_ascii(), "{text}");
    let (done, text) = printed(Mode::Text, false);
    done.expect("a recording ends");
    assert_eq!(text.matches("VOLUME").count(), 11);
}

#[test]
fn json_is_an_object_a_line() {
    let (_, text) = printed(Mode::Json, false);
    assert_eq!(text.lines().count(), 11);
    for line in text.lines() {
        let value: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(value["pod"]["operations"]["write"]["iops"].as_f64().expect("a rate") > 9_000.0);
        assert_eq!(value["volumes"][0]["name"], "db0");
        assert_eq!(value["volumes"][1]["operations"], serde_json::json!({}));
        assert!(value["devices"][0]["write_p99_ns"].as_u64().expect("a latency") > 0);
    }
}

#[test]
fn csv_has_as_many_cells_as_its_header() {
    let (done, text) = printed(Mode::Csv, true);
    done.expect("printed");
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(CSV_HEADER));
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 5);
    assert!(rows.iter().all(|row| row.len() == CSV_HEADER.split(',').count()), "{text}");
    assert_eq!((rows[0][2], rows[1][2], rows[1][3]), ("pod", "volume", "db0"));
}

#[test]
fn the_console_page_has_every_column() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/console.md");
    let page = std::fs::read_to_string(page).expect("the page");
    for column in CSV_HEADER.split(',') {
        assert!(page.contains(&format!("`{column}`")), "{column}");
    }
}

#[test]
fn a_reader_that_leaves_is_told_from_other_failures() {
    struct Closed;
    impl std::io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut source = Source::Recorded(VecDeque::from(fixture::samples()));
    let options = Options {
        node: Client::new(Path::new("")),
        mode: Mode::Csv,
        once: true,
        interval: Duration::from_millis(1),
        replay: None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let done =
        runtime.expect("a runtime").block_on(plain::print_from(&mut source, &options, &mut Closed));
    let Err(Failure::Io(error)) = done else { panic!("{done:?}") };
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}
