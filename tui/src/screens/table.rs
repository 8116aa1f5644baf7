//! Any table: headings, the rows that fit around the cursor, and trends.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::Modifier;
use ratatui::text::Line;
use ratatui::text::Span;
use ratatui::text::Text;
use ratatui::widgets::Paragraph;

use super::chart::sparkline;
use super::panel;
use crate::app::App;
use crate::format::clip;
use crate::format::clip_start;
use crate::table::Column;
use crate::table::Row;
use crate::table::TableState;
use crate::table::fit;
use crate::tables::TREND;
use crate::tables::TableKind;
use crate::theme::Role;

/// Draws a table into a panel.
pub fn draw(app: &App, frame: &mut Frame<'_>, area: Rect, kind: TableKind) {
    let rows = app.rows(kind);
    let state = app.table(kind);
    let cursor = state.cursor(&rows);
    let title = title(kind, rows.len(), state);
    let block = panel(app, &title, true);
    let inner = block.inner(area);
    let columns = kind.columns();
    let widths = fit(columns, inner.width);
    let mut lines = vec![heading(app, state, columns, &widths)];
    let visible = usize::from(inner.height).saturating_sub(1);
    let first = (cursor + 1).saturating_sub(visible);
    for (at, row) in rows.iter().enumerate().skip(first).take(visible) {
        let line = line(app, kind, row, &widths);
        lines.push(if at == cursor { line.style(Modifier::REVERSED) } else { line });
    }
    if rows.is_empty() {
        lines.push(Line::styled(nothing(app, kind, state), app.look.theme.style(Role::Dim)));
    }
    frame.render_widget(Paragraph::new(Text::from(lines)).block(block), area);
}

fn title(kind: TableKind, count: usize, state: &TableState) -> String {
    let name = match kind {
        TableKind::Volumes => "Volumes",
        TableKind::Devices => "Devices",
        TableKind::Hosts => "Connections of hosts",
        TableKind::Events => "Events",
    };
    match state.filter.as_str() {
        "" => format!("{name} ({count})"),
        filter => format!("{name} ({count}) with '{}'", clip(filter, 30, "~")),
    }
}

fn nothing(app: &App, kind: TableKind, state: &TableState) -> String {
    if !state.filter.is_empty() {
        return "No row has this text; Esc drops the filter.".to_owned();
    }
    match kind {
        TableKind::Volumes => "No volumes: create one with `weft volume create`.",
        TableKind::Devices => "No devices.",
        TableKind::Hosts if app.replay.is_some() => {
            "Connections are not recorded, only how many there were: see Pulse."
        }
        TableKind::Hosts => "No host is connected.",
        TableKind::Events if app.replay.is_some() => {
            "The node keeps no events of this time or before it."
        }
        TableKind::Events => "Nothing has happened since the node started.",
    }
    .to_owned()
}

fn heading(
    app: &App,
    state: &TableState,
    columns: &[Column],
    widths: &[(usize, u16)],
) -> Line<'static> {
    let theme = &app.look.theme;
    let symbols = app.look.symbols;
    let mut spans = Vec::new();
    for (at, width) in widths {
        let column = &columns[*at];
        let sorted = *at == state.sort;
        let width = usize::from(*width);
        let mark = symbols.sorted[usize::from(state.descending)];
        let text = if sorted {
            let room = width.saturating_sub(1);
            format!("{}{mark}", column.title.chars().take(room).collect::<String>())
        } else {
            column.title.to_owned()
        };
        let style = theme.style(if sorted { Role::Focus } else { Role::Dim });
        let text = aligned(&text, width, column.right, symbols.ellipsis);
        push_cell(&mut spans, Span::styled(text, style));
    }
    Line::from(spans)
}

fn line(app: &App, kind: TableKind, row: &Row, widths: &[(usize, u16)]) -> Line<'static> {
    let symbols = app.look.symbols;
    let mut spans = Vec::new();
    for (at, width) in widths {
        let column = &kind.columns()[*at];
        let width = usize::from(*width);
        if column.title == TREND {
            let values = kind.trend(&app.history, app.number(), &row.key, width);
            let text = sparkline(&values, width, symbols);
            push_cell(&mut spans, Span::styled(text, app.look.theme.style(Role::Good)));
        } else if let Some(cell) = row.cells.get(*at) {
            let short = if column.tail { clip_start } else { clip };
            let text = short(&cell.text, width, symbols.ellipsis);
            let text = aligned(&text, width, column.right, symbols.ellipsis);
            push_cell(&mut spans, Span::styled(text, app.look.theme.style(cell.role)));
        }
    }
    Line::from(spans)
}

fn push_cell(spans: &mut Vec<Span<'static>>, cell: Span<'static>) {
    if !spans.is_empty() {
        spans.push(Span::raw(" "));
    }
    spans.push(cell);
}

/// `text` in exactly `width` columns.
fn aligned(text: &str, width: usize, right: bool, ellipsis: &str) -> String {
    let text = clip(text, width, ellipsis);
    if right { format!("{text:>width$}") } else { format!("{text:<width$}") }
}
