//! Drawing: pure functions from [`App`] to a frame, one file a screen.
//!
//! ```text
//! 1 Pulse  2 Volumes ...                 healthy  live      header
//! REPLAY 2026-11-21 14:03:12 UTC ...                        only while a recording is shown
//! the screen, or its enlarged panel                         body
//! ? help  / filter ...                                      footer: keys, what is typed, or a note
//! ```

use ratatui::Frame;
use ratatui::layout::Alignment;
use ratatui::layout::Constraint;
use ratatui::layout::Layout;
use ratatui::layout::Rect;
use ratatui::style::Modifier;
use ratatui::text::Line;
use ratatui::text::Span;
use ratatui::text::Text;
use ratatui::widgets::Block;
use ratatui::widgets::Paragraph;
use ratatui::widgets::Wrap;

use crate::app::App;
use crate::app::Input;
use crate::app::Overlay;
use crate::app::Screen;
use crate::tables::TableKind;
use crate::theme::Role;

mod chart;
mod detail;
pub mod latency;
mod overlay;
pub mod pulse;
mod replay;
mod stages;
mod table;
pub mod tasks;

/// The least there must be room for.
pub const COLUMNS_MIN: u16 = 80;
/// The least there must be room for.
pub const LINES_MIN: u16 = 24;

/// Draws everything.
pub fn draw(app: &App, frame: &mut Frame<'_>) {
    let area = frame.area();
    if area.width < COLUMNS_MIN || area.height < LINES_MIN {
        return draw_too_small(frame, area);
    }
    let [header, recorded, body, footer] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(u16::from(app.replay.is_some())),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(area);
    draw_header(app, frame, header);
    replay::draw(app, frame, recorded);
    draw_body(app, frame, body);
    draw_footer(app, frame, footer);
    match app.overlay {
        Overlay::None => {}
        Overlay::Help => overlay::help(app, frame, body),
        Overlay::Equivalent => overlay::equivalent(app, frame, body),
        Overlay::Leave => overlay::leave(app, frame, body),
    }
}

fn draw_too_small(frame: &mut Frame<'_>, area: Rect) {
    let text = format!(
        "The console needs {COLUMNS_MIN} columns and {LINES_MIN} lines; here are {} and {}. \
         q quits.",
        area.width, area.height
    );
    frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
}

fn draw_header(app: &App, frame: &mut Frame<'_>, area: Rect) {
    let theme = &app.look.theme;
    let mut tabs = Vec::new();
    for (digit, screen) in (1..).zip(Screen::ALL) {
        let style = theme.style(if screen == app.screen { Role::Title } else { Role::Dim });
        let shown = screen == app.screen;
        let style = if shown { style.add_modifier(Modifier::REVERSED) } else { style };
        tabs.push(Span::styled(format!("{digit} {}", screen.name()), style));
        tabs.push(Span::raw(" "));
    }
    let state = Line::from(state(app));
    let width = u16::try_from(state.width()).unwrap_or(u16::MAX).min(area.width);
    let [left, right] =
        Layout::horizontal([Constraint::Fill(1), Constraint::Length(width)]).areas(area);
    frame.render_widget(Line::from(tabs), left);
    frame.render_widget(Paragraph::new(state).alignment(Alignment::Right), right);
}

/// The pod's health, and how old the picture is.
fn state(app: &App) -> Vec<Span<'static>> {
    let theme = &app.look.theme;
    let mut spans = Vec::new();
    if let Some(interval) = app.shown() {
        let health = interval.pod.health.clone();
        let role = health_role(&health);
        spans.push(Span::styled(health, theme.style(role)));
        spans.push(Span::raw("  "));
    }
    let (text, role) = match (app.frozen, app.stale_s(), app.shown()) {
        _ if app.replay.is_some() => ("replay".to_owned(), Role::Warning),
        (Some(number), _, Some(_)) => {
            let newest = app.history.range().and_then(|(_, last)| app.history.get(last));
            let shown = app.history.get(number);
            let age_ms = newest
                .zip(shown)
                .map_or(0, |(newest, shown)| newest.unix_ms.saturating_sub(shown.unix_ms));
            (format!("frozen -{} s", age_ms / 1000), Role::Focus)
        }
        (_, Some(age), _) => (format!("stale {age} s"), Role::Bad),
        (_, None, Some(_)) => ("live".to_owned(), Role::Good),
        (_, None, None) => ("no answer yet".to_owned(), Role::Warning),
    };
    spans.push(Span::styled(text, theme.style(role)));
    spans
}

/// The colour of a pod's health.
fn health_role(health: &str) -> Role {
    match health {
        "healthy" => Role::Good,
        "degraded" => Role::Warning,
        _ => Role::Bad,
    }
}

fn draw_body(app: &App, frame: &mut Frame<'_>, area: Rect) {
    if app.shown().is_none() {
        return draw_waiting(app, frame, area);
    }
    match app.screen {
        Screen::Pulse => pulse::draw(app, frame, area),
        Screen::Latency => latency::draw(app, frame, area),
        Screen::Volumes => draw_table(app, frame, area, TableKind::Volumes),
        Screen::Devices => draw_table(app, frame, area, TableKind::Devices),
        Screen::Hosts => draw_table(app, frame, area, TableKind::Hosts),
        Screen::Events => draw_table(app, frame, area, TableKind::Events),
    }
}

fn draw_table(app: &App, frame: &mut Frame<'_>, area: Rect, kind: TableKind) {
    match app.selected(kind).filter(|_| app.enlarged) {
        Some(key) => detail::draw(app, frame, area, kind, &key),
        None => {
            let devices = (kind == TableKind::Devices).then(|| app.shown()).flatten();
            let tasks = devices.map_or(&[][..], |interval| interval.tasks.as_slice());
            let below = Constraint::Length(tasks::panel_lines(tasks));
            let [table, below] = Layout::vertical([Constraint::Fill(1), below]).areas(area);
            table::draw(app, frame, table, kind);
            if !tasks.is_empty() {
                tasks::draw(app, frame, below, tasks);
            }
        }
    }
}

fn draw_waiting(app: &App, frame: &mut Frame<'_>, area: Rect) {
    let asking = if app.replay.is_some() { "reading what was recorded" } else { "asking the node" };
    let reason = app.offline.clone().unwrap_or_else(|| asking.to_owned());
    let text = format!("{reason}\n\n{}\n\nIt is asked again every second.", app.socket);
    let block = panel(app, "Waiting for the node", true);
    frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }).block(block), area);
}

fn draw_footer(app: &App, frame: &mut Frame<'_>, area: Rect) {
    let theme = &app.look.theme;
    let is_stale = app.stale_s().is_some() || app.replay.is_some();
    let line = match app.input {
        Input::Filter => typing("/", app),
        Input::Line => typing(":", app),
        Input::None if !app.note.is_empty() => {
            Line::styled(app.note.clone(), theme.style(Role::Bad))
        }
        Input::None => match app.offline.as_ref().filter(|_| is_stale) {
            Some(reason) => Line::styled(reason.clone(), theme.style(Role::Warning)),
            None => hints(app),
        },
    };
    frame.render_widget(line, area);
}

fn typing(prompt: &'static str, app: &App) -> Line<'static> {
    let cursor = Span::raw(" ").style(Modifier::REVERSED);
    Line::from(vec![
        Span::styled(prompt, app.look.theme.style(Role::Focus)),
        Span::raw(app.typed.clone()),
        cursor,
    ])
}

fn hints(app: &App) -> Line<'static> {
    let own: &[(&str, &str)] = match (app.screen, app.enlarged) {
        (Screen::Pulse, _) => &[("Tab", "panel"), ("e", "enlarge")],
        (Screen::Latency, _) => &[("r w f", "operation"), ("e", "enlarge")],
        (Screen::Volumes, true) => &[("r w f", "operation"), ("Esc", "back")],
        (_, true) => &[("Esc", "back")],
        (_, false) => &[("/", "filter"), ("s S", "sort"), ("e", "details")],
    };
    let all = [
        ("?", "help"),
        ("q", "quit"),
        ("space", "freeze"),
        ("[ ]", "step"),
        (":", "command"),
        ("y", "as commands"),
    ];
    let mut spans = Vec::new();
    for (key, meaning) in own.iter().chain(&all) {
        spans.push(Span::styled(*key, app.look.theme.style(Role::Focus)));
        spans.push(Span::styled(format!(" {meaning}  "), app.look.theme.style(Role::Dim)));
    }
    Line::from(spans)
}

/// A frame with a title.
fn panel<'a>(app: &App, title: &'a str, focus: bool) -> Block<'a> {
    let theme = &app.look.theme;
    let border = if focus { Role::Focus } else { Role::Border };
    Block::bordered()
        .border_set(app.look.symbols.border)
        .border_style(theme.style(border))
        .title(Span::styled(format!(" {title} "), theme.style(Role::Title)))
}

/// Facts, one a line: name, then what there is to say.
fn facts(app: &App, pairs: Vec<(&'static str, Vec<Span<'static>>)>) -> Text<'static> {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    for (name, value) in pairs {
        let name = Span::styled(format!("{name:<width$}  "), app.look.theme.style(Role::Dim));
        let mut line = vec![name];
        line.extend(value);
        lines.push(Line::from(line));
    }
    Text::from(lines)
}
