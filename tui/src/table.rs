//! Tables that can be sorted, filtered and walked, before anything is drawn.

use std::cmp::Ordering;

use crate::theme::Role;

/// A column.
#[derive(Debug)]
pub struct Column {
    /// Its heading, by which `:sort` knows it too.
    pub title: &'static str,
    /// Its width; of one that grows, the least.
    pub width: u16,
    /// Whether it takes what is left, as names do.
    pub grows: bool,
    /// Whether it is a figure, which stands to the right.
    pub right: bool,
    /// Whether the end is what matters of text that is too long, as of paths.
    pub tail: bool,
    /// Columns with the highest rank go first where there is no room for all.
    pub rank: u8,
}

/// A column of words that takes what room is left.
pub const fn words(title: &'static str, width: u16, rank: u8) -> Column {
    Column { title, width, grows: true, right: false, tail: false, rank }
}

/// A column of paths that takes what room is left.
pub const fn path(title: &'static str, width: u16, rank: u8) -> Column {
    Column { title, width, grows: true, right: false, tail: true, rank }
}

/// A column of words of a known width.
pub const fn word(title: &'static str, width: u16, rank: u8) -> Column {
    Column { title, width, grows: false, right: false, tail: false, rank }
}

/// A column of figures.
pub const fn figure(title: &'static str, width: u16, rank: u8) -> Column {
    Column { title, width, grows: false, right: true, tail: false, rank }
}

/// One cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// What it shows.
    pub text: String,
    /// What a figure is sorted by; words are sorted by their text.
    pub value: Option<f64>,
    /// Its colour.
    pub role: Role,
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>, role: Role) -> Self {
        Self { text: text.into(), value: None, role }
    }

    /// A figure; zero is dim, since it is the figures that are not that matter.
    pub fn figure(value: f64, text: String) -> Self {
        let role = if value > 0.0 { Role::Text } else { Role::Dim };
        Self { text, value: Some(value), role }
    }

    fn order(&self, other: &Self) -> Ordering {
        match (self.value, other.value) {
            (Some(one), Some(other)) => one.total_cmp(&other),
            _ => self.text.cmp(&other.text),
        }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What the row is about: a volume's name, a device's number. The cursor stays on it when rows
    /// change their order.
    pub key: String,
    /// A cell for each column.
    pub cells: Vec<Cell>,
}

/// What the operator did with a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableState {
    /// The column it is sorted by.
    pub sort: usize,
    /// Whether the largest comes first.
    pub descending: bool,
    /// Only rows with this text in a cell are shown, in whatever case.
    pub filter: String,
    /// Key of the row the cursor is on; if there is none such, it is on the first.
    pub selected: Option<String>,
}

impl TableState {
    /// A table sorted by that column.
    #[must_use]
    pub fn sorted(sort: usize, descending: bool) -> Self {
        Self { sort, descending, ..Self::default() }
    }

    /// The rows that are shown, in their order.
    #[must_use]
    pub fn arrange(&self, mut rows: Vec<Row>) -> Vec<Row> {
        let filter = self.filter.to_lowercase();
        if !filter.is_empty() {
            rows.retain(|row| {
                row.cells.iter().any(|cell| cell.text.to_lowercase().contains(&filter))
            });
        }
        rows.sort_by(|one, other| {
            let order = match (one.cells.get(self.sort), other.cells.get(self.sort)) {
                (Some(one), Some(other)) => one.order(other),
                _ => Ordering::Equal,
            };
            if self.descending { order.reverse() } else { order }
        });
        rows
    }

    /// Where the cursor is in arranged rows.
    #[must_use]
    pub fn cursor(&self, rows: &[Row]) -> usize {
        rows.iter().position(|row| Some(&row.key) == self.selected.as_ref()).unwrap_or(0)
    }

    /// Moves the cursor by that many rows, and stops at either end.
    pub fn step(&mut self, rows: &[Row], by: isize) {
        let at = self.cursor(rows).saturating_add_signed(by).min(rows.len().saturating_sub(1));
        self.selected = rows.get(at).map(|row| row.key.clone());
    }

    /// Sorts by a column: figures with the largest first, words from A.
    pub fn sort_by(&mut self, columns: &[Column], column: usize) {
        self.sort = column;
        self.descending = columns.get(column).is_some_and(|column| column.right);
    }
}

/// The column whose title begins with a word, in whatever case; `-` may stand for a blank.
#[must_use]
pub fn column_named(columns: &[Column], word: &str) -> Option<usize> {
    let plain = |text: &str| text.to_lowercase().replace('-', " ");
    let word = plain(word);
    let exact = columns.iter().position(|column| plain(column.title) == word);
    exact.or_else(|| columns.iter().position(|column| plain(column.title).starts_with(&word)))
}

/// Which columns fit into a width, with the width of each; one blank stands between two.
#[must_use]
pub fn fit(columns: &[Column], width: u16) -> Vec<(usize, u16)> {
    let mut by_rank: Vec<usize> = (0..columns.len()).collect();
    by_rank.sort_by_key(|at| columns[*at].rank);
    let mut left = width;
    let mut fitting = Vec::new();
    for at in by_rank {
        let needed = columns[at].width + u16::from(!fitting.is_empty());
        let Some(rest) = left.checked_sub(needed) else { break };
        left = rest;
        fitting.push((at, columns[at].width));
    }
    fitting.sort_unstable();
    let growing = fitting.iter().filter(|(at, _)| columns[*at].grows).count();
    let Ok(growing @ 1..) = u16::try_from(growing) else { return fitting };
    let mut odd = left % growing;
    for (at, width) in &mut fitting {
        if columns[*at].grows {
            *width += left / growing + u16::from(odd > 0);
            odd = odd.saturating_sub(1);
        }
    }
    fitting
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column] =
        &[words("NAME", 6, 0), figure("IOPS", 6, 1), figure("R P99", 7, 2), words("TREND", 4, 3)];

    fn rows() -> Vec<Row> {
        let row = |name: &str, iops: f64| Row {
            key: name.to_owned(),
            cells: vec![Cell::text(name, Role::Text), Cell::figure(iops, iops.to_string())],
        };
        vec![row("db0", 5.0), row("web", 30.0), row("DB1", f64::NAN)]
    }

    fn keys(rows: &[Row]) -> Vec<&str> {
        rows.iter().map(|row| row.key.as_str()).collect()
    }

    #[test]
    fn rows_are_sorted_and_filtered() {
        let mut state = TableState::sorted(0, false);
        assert_eq!(keys(&state.arrange(rows())), ["DB1", "db0", "web"]);
        state.sort_by(COLUMNS, 1);
        assert_eq!(keys(&state.arrange(rows())), ["DB1", "web", "db0"]);
        state.filter = "dB".to_owned();
        assert_eq!(keys(&state.arrange(rows())), ["DB1", "db0"]);
        state.sort = 99;
        assert_eq!(keys(&state.arrange(rows())).len(), 2);
    }

    #[test]
    fn the_cursor_stays_on_its_row() {
        let mut state = TableState::sorted(0, false);
        state.step(&state.arrange(rows()), 1);
        assert_eq!(state.selected.as_deref(), Some("db0"));
        state.sort_by(COLUMNS, 1);
        assert_eq!(state.cursor(&state.arrange(rows())), 2);
        state.step(&state.arrange(rows()), 10);
        assert_eq!(state.selected.as_deref(), Some("db0"));
        state.step(&state.arrange(rows()), -10);
        assert_eq!(state.selected.as_deref(), Some("DB1"));
        state.step(&[], 1);
        assert_eq!((state.cursor(&[]), state.selected.as_deref()), (0, None));
    }

    #[test]
    fn columns_are_found_by_the_start_of_their_title() {
        assert_eq!(column_named(COLUMNS, "iops"), Some(1));
        assert_eq!(column_named(COLUMNS, "r-p99"), Some(2));
        assert_eq!(column_named(COLUMNS, "na"), Some(0));
        assert_eq!(column_named(COLUMNS, "x"), None);
    }

    #[test]
    fn columns_of_high_rank_go_where_there_is_no_room() {
        assert_eq!(fit(COLUMNS, 40), [(0, 13), (1, 6), (2, 7), (3, 11)]);
        assert_eq!(fit(COLUMNS, 22), [(0, 7), (1, 6), (2, 7)]);
        assert_eq!(fit(COLUMNS, 13), [(0, 6), (1, 6)]);
        assert_eq!(fit(COLUMNS, 0), []);
    }
}
