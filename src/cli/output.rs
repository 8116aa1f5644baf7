//! Printing: tables for people, JSON for scripts, and no panic when nobody reads.

use std::io;
use std::io::Write;

use serde::Serialize;

use super::Format;
use super::OutputArguments;
use super::exit::FAILED;
use super::exit::Failure;

/// Writes `text` to standard output. A reader that has left, as `head` does, is no failure.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    print_while_read(text).map(drop)
}

/// The same, and says whether anyone reads it.
pub(super) fn print_while_read(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            Err(Failure { code: FAILED, message: format!("write to standard output: {error}") })
        }
    }
}

/// Writes an error for people to standard error, if that is open.
pub(super) fn complain(message: &str) {
    let _ = writeln!(io::stderr().lock(), "weft: {message}");
}

/// Prints an answer: `text` of it for people, or the answer itself for programs.
pub(super) fn show<T: Serialize>(
    output: &OutputArguments,
    answer: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    print(&match output.output {
        Format::Table => text(answer),
        Format::Json => json(answer),
        Format::Yaml => yaml(answer),
    })
}

/// For what the API answers nothing to: a word for people.
pub(super) fn say(output: &OutputArguments, text: &str) -> Result<(), Failure> {
    match output.output {
        Format::Table => print(text),
        Format::Json | Format::Yaml => Ok(()),
    }
}

/// `value` as YAML, in which every string stays on its line.
pub(super) fn yaml<T: Serialize>(value: &T) -> String {
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    serde_saphyr::to_string_with_options(value, options).expect("our own types always encode")
}

/// `value` as JSON, indented.
fn json<T: Serialize>(value: &T) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("our own types always encode");
    text.push('\n');
    text
}

/// `value` as JSON on one line, for streams.
pub(super) fn json_line<T: Serialize>(value: &T) -> String {
    let text = serde_json::to_string(value).expect("our own types always encode");
    format!("{text}\n")
}

/// Rows under a header, in columns as wide as their widest cell.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns of figures, which stand to the right.
    right: &'static [usize],
}

impl Table {
    pub(super) fn new(header: &[&str], right: &'static [usize]) -> Self {
        Self { rows: vec![header.iter().map(|&cell| cell.to_owned()).collect()], right }
    }

    /// Adds a row of as many cells as the header has.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        assert_eq!(cells.len(), self.rows[0].len(), "a row is as long as the header");
        self.rows.push(cells);
    }

    /// The table as text, two spaces between columns and none at the end of a line.
    pub(super) fn text(&self) -> String {
        let column_width = |column: usize| {
            self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.rows[0].len()).map(column_width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if column > 0 {
                    line.push_str("  ");
                }
                let cell = if self.right.contains(&column) {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                };
                line.push_str(&cell);
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Named values, one a line.
pub(super) fn facts(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    pairs.iter().map(|(name, value)| format!("{name:<width$}  {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    proptest! {
        /// Names are free text, and words such as `no` and `1e3` are something else in YAML.
        #[test]
        fn yaml_reads_back_as_what_it_was(texts in vec(any_text(), 0..4), number: u64, word: bool) {
            let value = serde_json::json!({
                "texts": texts, "number": number, "word": word, "nothing": null, "empty": {},
            });
            let read: serde_json::Value = yaml_serde::from_str(&yaml(&value)).expect("YAML");
            prop_assert_eq!(read, value);
        }
    }

    fn any_text() -> impl Strategy<Value = String> {
        const TRICKY: &[&str] =
            &["", "no", "on", "~", "null", "1e3", "0x1f", "1_000", "12:30", "- a", "a: b", "# a"];
        prop_oneof![select(TRICKY).prop_map(str::to_owned), any::<String>()]
    }

    #[test]
    fn words_that_older_yaml_takes_for_truth_are_quoted() {
        let text = yaml(&["no", "on", "y", "12:30", "1e3"]);
        assert!(text.lines().all(|line| line.ends_with('"')), "{text}");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", "SIZE", "NOTE"], &[1]);
        table.row(vec!["vol0".into(), "8 GiB".into(), String::new()]);
        table.row(vec!["a-long-name".into(), "1 KiB".into(), "ä".into()]);
        let expected = "\
NAME          SIZE  NOTE
vol0         8 GiB
a-long-name  1 KiB  ä
";
        assert_eq!(table.text(), expected);
    }
}
