//! Latency over time: a heatmap of one operation, and where its time went.
//!
//! Columns are seconds, the newest on the right. Rows are powers of two of a latency, the longest on
//! top, two or more to a row where there are not enough; a row's label is where it begins. The
//! darker a cell, the more requests, by the logarithm of their count.

use ratatui::Frame;
use ratatui::layout::Constraint;
use ratatui::layout::Layout;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::text::Span;
use ratatui::text::Text;
use ratatui::widgets::Paragraph;
use weft_api::Histogram;
use weft_api::histogram::bucket_start;

use super::panel;
use super::stages;
use super::stages::operation_role;
use crate::app::App;
use crate::app::OPERATIONS;
use crate::format::duration;
use crate::format::float;
use crate::format::latency;
use crate::format::time_of_day;
use crate::format::whole;
use crate::model::activity::Activity;
use crate::model::interval::Interval;
use crate::theme::Role;

/// Panels that can have the focus: the map and the stages.
pub const PANELS: usize = 2;

/// Width of the labels beside the map.
const LABEL_WIDTH: usize = 8;

/// The lowest row that is told apart, as a power of two of nanoseconds: below 512 ns all is one.
const EXPONENT_MIN: u32 = 8;

/// Draws the screen, or the panel that is enlarged.
pub fn draw(app: &App, frame: &mut Frame<'_>, area: Rect) {
    match (app.enlarged, app.focus) {
        (true, 0) => draw_map(app, frame, area, true),
        (true, _) => draw_stages(app, frame, area, true),
        (false, focus) => {
            let [map, below] = Layout::vertical([
                Constraint::Fill(1),
                Constraint::Length(stages::lines_of(area.height)),
            ])
            .areas(area);
            draw_map(app, frame, map, focus == 0);
            draw_stages(app, frame, below, focus == 1);
        }
    }
}

/// What the screen is about, of an interval: all volumes, or the chosen one.
fn chosen<'a>(app: &App, interval: &'a Interval) -> Option<&'a Activity> {
    match &app.volume {
        None => Some(&interval.total),
        Some(name) => interval.volume(name).map(|one| &one.activity),
    }
}

fn draw_stages(app: &App, frame: &mut Frame<'_>, area: Rect, focus: bool) {
    let nothing = Activity::default();
    let activity = app.shown().and_then(|interval| chosen(app, interval)).unwrap_or(&nothing);
    stages::draw(app, frame, area, activity, focus);
}

fn draw_map(app: &App, frame: &mut Frame<'_>, area: Rect, focus: bool) {
    let volume = app.volume.as_deref().unwrap_or("all volumes");
    let title = format!("Latency of {}s, {volume}", app.operation);
    let block = panel(app, &title, focus);
    let inner = block.inner(area);
    let columns = usize::from(inner.width).saturating_sub(LABEL_WIDTH + 1);
    let empty = Histogram::default();
    let window: Vec<&Histogram> = app
        .history
        .window(app.number(), columns)
        .map(|interval| {
            let one = chosen(app, interval).and_then(|all| all.operation(app.operation));
            one.map_or(&empty, |one| &one.latency)
        })
        .collect();
    let rows = usize::from(inner.height).saturating_sub(2);
    let mut lines = vec![choice(app)];
    lines.extend(map_lines(app, &window, rows, columns));
    lines.push(axis(app, columns));
    frame.render_widget(Paragraph::new(Text::from(lines)).block(block), area);
}

/// The operations, with the chosen one marked.
fn choice(app: &App) -> Line<'static> {
    let mut spans = vec![Span::raw(" ".repeat(LABEL_WIDTH + 1))];
    for operation in OPERATIONS {
        let chosen = operation == app.operation;
        let role = if chosen { operation_role(operation) } else { Role::Dim };
        let text = if chosen { format!("[{operation}] ") } else { format!(" {operation}  ") };
        spans.push(Span::styled(text, app.look.theme.style(role)));
    }
    Line::from(spans)
}

/// How many requests took how long, by power of two, in each column.
fn octaves(window: &[&Histogram]) -> Vec<Vec<(u32, u64)>> {
    let octave = |bucket: u16| {
        bucket_start(usize::from(bucket)).checked_ilog2().unwrap_or(0).max(EXPONENT_MIN)
    };
    let column = |histogram: &&Histogram| {
        let mut counts: Vec<(u32, u64)> = Vec::new();
        for &(bucket, count) in &histogram.buckets {
            match counts.last_mut().filter(|(last, _)| *last == octave(bucket)) {
                Some((_, sum)) => *sum = sum.saturating_add(count),
                None => counts.push((octave(bucket), count)),
            }
        }
        counts
    };
    window.iter().map(column).collect()
}

fn map_lines(app: &App, window: &[&Histogram], rows: usize, columns: usize) -> Vec<Line<'static>> {
    let theme = &app.look.theme;
    let octaves = octaves(window);
    let all = || octaves.iter().flatten();
    let range = all().map(|one| one.0).max().zip(all().map(|one| one.0).min());
    let Some((top, bottom)) = range else {
        let text = format!("No {} was answered in this time.", app.operation);
        let mut lines = vec![Line::default(); rows.saturating_sub(1)];
        lines.insert(rows / 2, Line::styled(text, theme.style(Role::Dim)));
        lines.truncate(rows);
        return lines;
    };
    let most = all().map(|(_, count)| *count).max().unwrap_or(0);
    // The last row is the shortest latency there was; what is left above it stays empty.
    let count = u32::try_from(rows).unwrap_or(u32::MAX).max(1);
    let per_row = (top - bottom + 1).div_ceil(count);
    let top = bottom.saturating_add(count.saturating_mul(per_row)) - 1;
    let row_of = |octave: u32| usize::try_from((top - octave) / per_row).unwrap_or(0);
    let mut cells = vec![vec![0_u64; octaves.len()]; rows];
    for (at, column) in octaves.iter().enumerate() {
        for (octave, count) in column {
            if let Some(cell) = cells.get_mut(row_of(*octave)) {
                cell[at] = cell[at].saturating_add(*count);
            }
        }
    }
    let style = theme.style(operation_role(app.operation));
    let blank = " ".repeat(columns - octaves.len());
    let mut lines = Vec::new();
    for (row, counts) in (0_u32..).zip(&cells) {
        let begin = (top + 1).saturating_sub((row + 1) * per_row);
        let label = latency(1 << begin.min(63));
        let text: String = counts.iter().map(|count| shade(app, *count, most)).collect();
        lines.push(Line::from(vec![
            Span::styled(format!("{label:>LABEL_WIDTH$} "), theme.style(Role::Dim)),
            Span::styled(format!("{blank}{text}"), style),
        ]));
    }
    lines
}

/// The shade for a count: a shade for each quarter of the logarithm of the largest.
fn shade(app: &App, count: u64, most: u64) -> &'static str {
    let shades = app.look.symbols.shades;
    if count == 0 {
        return " ";
    }
    let share = float(count).ln_1p() / float(most.max(1)).ln_1p();
    let at = usize::try_from(whole((share * float(shades.len() as u64)).ceil())).unwrap_or(1);
    shades[at.clamp(1, shades.len()) - 1]
}

/// When the first column and the last one were, the first as far left as both have room.
fn axis(app: &App, columns: usize) -> Line<'static> {
    let newest = app.shown().map_or(0, |interval| interval.unix_ms);
    let end = time_of_day(newest);
    let mut window = app.history.window(app.number(), columns);
    let oldest = window.next().map_or(newest, |interval| interval.unix_ms);
    let begin = duration(newest.saturating_sub(oldest) / 1000) + " earlier";
    let blank = columns.saturating_sub(1 + window.count());
    let at = blank.min(columns.saturating_sub(begin.len() + 1 + end.len()));
    let width = columns.saturating_sub(at + begin.len());
    let text = format!("{}{begin}{end:>width$}", " ".repeat(LABEL_WIDTH + 1 + at));
    Line::styled(text, app.look.theme.style(Role::Dim))
}
