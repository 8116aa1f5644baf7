//! The line that says that a recording is shown, of which time, and how it moves.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::Modifier;
use ratatui::text::Line;
use ratatui::text::Span;

use crate::app::App;
use crate::format::date_time;
use crate::format::duration;
use crate::model::interval::Interval;
use crate::replay::Replay;
use crate::theme::Role;

/// Draws the line; nothing if what is shown is the present.
pub fn draw(app: &App, frame: &mut Frame<'_>, area: Rect) {
    let Some(replay) = &app.replay else { return };
    let theme = &app.look.theme;
    let mark = theme.style(Role::Warning).add_modifier(Modifier::REVERSED | Modifier::BOLD);
    let mut spans = vec![Span::styled(" REPLAY ", mark), Span::raw(" ")];
    if let Some(shown) = app.shown() {
        let behind_s = replay.unix_now_ms().saturating_sub(shown.unix_ms) / 1000;
        let time = format!("{} UTC", date_time(shown.unix_ms));
        spans.push(Span::styled(time, theme.style(Role::Title)));
        spans.push(Span::raw(format!("  {} ago  ", duration(behind_s))));
        let (text, role) = state(replay, shown);
        spans.push(Span::styled(text, theme.style(role)));
    }
    frame.render_widget(Line::from(spans), area);
}

fn state(replay: &Replay, shown: &Interval) -> (String, Role) {
    if replay.is_loading() {
        return ("reading the recording".to_owned(), Role::Dim);
    }
    if replay.is_at_end() {
        return ("end of the recording".to_owned(), Role::Warning);
    }
    if shown.gap_ms > 0 {
        let gap = duration(shown.gap_ms / 1000);
        return (format!("after a gap of {gap}"), Role::Bad);
    }
    match (replay.is_paused(), replay.speed()) {
        (true, _) => ("frozen".to_owned(), Role::Focus),
        (false, 1) => ("playing".to_owned(), Role::Good),
        (false, speed) => (format!("playing {speed} times as fast"), Role::Good),
    }
}
