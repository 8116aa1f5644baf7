//! One row of a table in full.

use ratatui::Frame;
use ratatui::layout::Constraint;
use ratatui::layout::Layout;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::text::Span;
use ratatui::text::Text;
use ratatui::widgets::Paragraph;
use ratatui::widgets::Wrap;
use weft_api::Volume;

use super::chart::columns;
use super::facts;
use super::panel;
use super::stages;
use crate::app::App;
use crate::format::size;
use crate::tables::TREND;
use crate::tables::TableKind;
use crate::tables::events;
use crate::theme::Role;

/// Draws the row of that key.
pub fn draw(app: &App, frame: &mut Frame<'_>, area: Rect, kind: TableKind, key: &str) {
    match kind {
        TableKind::Volumes => draw_volume(app, frame, area, key),
        TableKind::Devices | TableKind::Hosts => draw_row(app, frame, area, kind, key),
        TableKind::Events => draw_event(app, frame, area, key),
    }
}

fn draw_volume(app: &App, frame: &mut Frame<'_>, area: Rect, name: &str) {
    let [above, below] =
        Layout::vertical([Constraint::Fill(1), Constraint::Length(stages::lines_of(area.height))])
            .areas(area);
    draw_row(app, frame, above, TableKind::Volumes, name);
    if let Some(volume) = app.shown().and_then(|interval| interval.volume(name)) {
        stages::draw(app, frame, below, &volume.activity, false);
    }
}

/// Every cell of a row with its heading, in two columns, and its trend below.
fn draw_row(app: &App, frame: &mut Frame<'_>, area: Rect, kind: TableKind, key: &str) {
    let Some(row) = app.rows(kind).into_iter().find(|row| row.key == key) else { return };
    let title = match kind {
        TableKind::Volumes => format!("Volume {key}"),
        TableKind::Devices => format!("Device {key}"),
        TableKind::Hosts => format!("Connection {key}"),
        TableKind::Events => "Event".to_owned(),
    };
    let block = panel(app, &title, true);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let mut pairs: Vec<(&'static str, Vec<Span<'static>>)> = Vec::new();
    for (column, cell) in kind.columns().iter().zip(row.cells) {
        if column.title != TREND {
            let style = app.look.theme.style(cell.role);
            pairs.push((column.title, vec![Span::styled(cell.text, style)]));
        }
    }
    pairs.extend(more(app, kind, key));
    let right = pairs.split_off(pairs.len().div_ceil(2));
    let lines = u16::try_from(pairs.len()).unwrap_or(0);
    let [above, below] =
        Layout::vertical([Constraint::Length(lines), Constraint::Fill(1)]).areas(inner);
    let halves: [Rect; 2] = Layout::horizontal([Constraint::Fill(1); 2]).areas(above);
    frame.render_widget(Paragraph::new(facts(app, pairs)), halves[0]);
    frame.render_widget(Paragraph::new(facts(app, right)), halves[1]);
    draw_trend(app, frame, below, kind, key);
}

fn draw_trend(app: &App, frame: &mut Frame<'_>, area: Rect, kind: TableKind, key: &str) {
    let (width, height) = (usize::from(area.width), usize::from(area.height));
    let values = kind.trend(&app.history, app.number(), key, width);
    let style = app.look.theme.style(Role::Good);
    let lines: Vec<Line<'_>> = columns(&values, width, height, app.look.symbols)
        .into_iter()
        .map(|line| Line::styled(line, style))
        .collect();
    frame.render_widget(Paragraph::new(Text::from(lines)), area);
}

/// What the table has no column for.
fn more(app: &App, kind: TableKind, key: &str) -> Vec<(&'static str, Vec<Span<'static>>)> {
    let plain = |text: String| vec![Span::raw(text)];
    match kind {
        TableKind::Volumes => app
            .volumes
            .iter()
            .find(|one| one.name == key)
            .map(|one| {
                vec![
                    ("ACCESS", plain(access(one))),
                    ("BLOCK", plain(size(u64::from(one.logical_block_bytes)))),
                    ("HOSTS", plain(served_to(one))),
                    ("W CACHE", plain(if one.write_cache { "on" } else { "off" }.to_owned())),
                ]
            })
            .unwrap_or_default(),
        TableKind::Devices => {
            let device = key.parse().ok().and_then(|index| app.shown()?.device(index));
            let Some(device) = device.map(|one| &one.device) else { return Vec::new() };
            vec![
                ("READ ERRORS", plain(device.read_errors.to_string())),
                ("WRITE ERRORS", plain(device.write_errors.to_string())),
                ("CHECKSUM ERRORS", plain(device.checksum_errors.to_string())),
                ("REASON", plain(device.reason.clone().unwrap_or_else(|| "-".to_owned()))),
            ]
        }
        TableKind::Hosts | TableKind::Events => Vec::new(),
    }
}

fn access(volume: &Volume) -> String {
    if volume.read_only { "read-only" } else { "read-write" }.to_owned()
}

fn served_to(volume: &Volume) -> String {
    match &volume.hosts {
        None => "all".to_owned(),
        Some(hosts) => format!("{} of those added", hosts.len()),
    }
}

fn draw_event(app: &App, frame: &mut Frame<'_>, area: Rect, key: &str) {
    let Some(event) = app.events_shown().find(|event| events::key(event) == key) else { return };
    let style = app.look.theme.style(events::role(event.severity));
    let advice = if event.advice.is_empty() { "Nothing needs to be done." } else { &event.advice };
    let text = Text::from(vec![
        Line::from(crate::format::date_time(event.unix_ms) + " UTC"),
        Line::styled(format!("{}: {}", event.severity.name(), event.kind), style),
        Line::from(event.subject.clone()),
        Line::default(),
        Line::from(event.message.clone()),
        Line::default(),
        Line::from(advice.to_owned()),
    ]);
    let block = panel(app, "Event", true);
    frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }).block(block), area);
}
