//! What lies above a screen: help, the commands that print the same, and the question on leaving.

use ratatui::Frame;
use ratatui::layout::Constraint;
use ratatui::layout::Layout;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::text::Span;
use ratatui::text::Text;
use ratatui::widgets::Clear;
use ratatui::widgets::Paragraph;
use ratatui::widgets::Wrap;

use super::panel;
use crate::app::App;
use crate::equivalent;
use crate::keys::BINDINGS;
use crate::line::COMMANDS;
use crate::theme::Role;

/// Keys and commands.
pub fn help(app: &App, frame: &mut Frame<'_>, area: Rect) {
    let keys = BINDINGS.iter().filter(|binding| !binding.meaning.is_empty());
    let mut lines: Vec<Line<'_>> =
        keys.map(|binding| entry(app, binding.shown, 8, binding.meaning)).collect();
    lines.extend(COMMANDS.iter().map(|(command, meaning)| entry(app, command, 20, meaning)));
    let inner = popup(app, frame, area, "Keys; any key closes this");
    let right = lines.split_off(lines.len().div_ceil(2));
    let halves: [Rect; 2] = Layout::horizontal([Constraint::Fill(1); 2]).areas(inner);
    frame.render_widget(Paragraph::new(Text::from(lines)), halves[0]);
    frame.render_widget(Paragraph::new(Text::from(right)), halves[1]);
}

fn entry(app: &App, key: &str, width: usize, meaning: &'static str) -> Line<'static> {
    let key = Span::styled(format!("{key:<width$}"), app.look.theme.style(Role::Focus));
    Line::from(vec![key, Span::raw(meaning)])
}

/// The commands that print what is shown.
pub fn equivalent(app: &App, frame: &mut Frame<'_>, area: Rect) {
    let inner = popup(app, frame, area, "The same from a shell; any key closes this");
    let lines: Vec<Line<'_>> = equivalent::commands(app).into_iter().map(Line::from).collect();
    frame.render_widget(Paragraph::new(Text::from(lines)).wrap(Wrap { trim: false }), inner);
}

/// Whether the node is to stop too.
pub fn leave(app: &App, frame: &mut Frame<'_>, area: Rect) {
    let inner = popup(app, frame, area, "Leave the console");
    let lines = vec![
        Line::from("The node runs in this terminal."),
        Line::default(),
        entry(app, "s", 5, "stop the node; nothing acknowledged is lost"),
        entry(app, "k", 5, "keep it running in the foreground, without the console"),
        entry(app, "Esc", 5, "stay"),
    ];
    frame.render_widget(Paragraph::new(Text::from(lines)), inner);
}

/// Clears a place for text and frames it; returns the inside.
fn popup(app: &App, frame: &mut Frame<'_>, area: Rect, title: &str) -> Rect {
    frame.render_widget(Clear, area);
    let block = panel(app, title, true);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    inner
}
