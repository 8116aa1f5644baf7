//! Long work under way: a bar, how much is done, and how long it will take.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::text::Span;
use ratatui::text::Text;
use ratatui::widgets::Paragraph;
use weft_api::Task;
use weft_api::TaskUnit;

use super::chart;
use super::panel;
use crate::app::App;
use crate::format;
use crate::format::size;
use crate::theme::Role;

/// Width of a bar.
const BAR_WIDTH: usize = 10;

/// Lines that the panel takes; none if nothing is under way.
pub fn panel_lines(tasks: &[Task]) -> u16 {
    if tasks.is_empty() { 0 } else { u16::try_from(tasks.len()).unwrap_or(u16::MAX) + 2 }
}

/// Draws the panel, a line a task.
pub fn draw(app: &App, frame: &mut Frame<'_>, area: Rect, tasks: &[Task]) {
    let lines: Vec<Line<'_>> = tasks.iter().map(|task| line(app, task)).collect();
    let block = panel(app, "Tasks", false);
    frame.render_widget(Paragraph::new(Text::from(lines)).block(block), area);
}

fn line(app: &App, task: &Task) -> Line<'static> {
    let mut spans = vec![Span::raw(format!("{:<8}", task.kind.name()))];
    spans.extend(bar(app, task));
    spans.push(Span::raw(format!(" {:>3} %  {}", task.percent(), amount(task))));
    if let Some(left) = left(task) {
        spans.push(Span::raw(format!(", {left} left")));
    }
    if let Some(damage) = task.damage.filter(|damage| damage.found > 0) {
        let role = if damage.left > 0 { Role::Bad } else { Role::Warning };
        let text = match damage.found == damage.healed {
            true => format!(", {} healed", damage.healed),
            false => format!(", {} of {} healed", damage.healed, damage.found),
        };
        spans.push(Span::styled(text, app.look.theme.style(role)));
    }
    if !task.message.is_empty() {
        let text = format!(", {}", task.message);
        spans.push(Span::styled(text, app.look.theme.style(Role::Warning)));
    }
    Line::from(spans)
}

/// What is under way, within a line of half a screen.
pub fn short(app: &App, tasks: &[Task]) -> Vec<Span<'static>> {
    match tasks {
        [] => vec![Span::raw("none")],
        [task] => {
            let mut spans = vec![Span::raw(format!("{} ", task.kind))];
            spans.extend(bar(app, task));
            let left = left(task).map(|left| format!(", {left}")).unwrap_or_default();
            spans.push(Span::raw(format!(" {} %{left}", task.percent())));
            spans
        }
        several => {
            let one = |task: &Task| format!("{} {} %", task.kind, task.percent());
            vec![Span::raw(several.iter().map(one).collect::<Vec<_>>().join(", "))]
        }
    }
}

fn bar(app: &App, task: &Task) -> [Span<'static>; 2] {
    let share = format::share(task.done, task.total).unwrap_or(1.0);
    let (full, empty) = chart::gauge(share, BAR_WIDTH, app.look.symbols);
    let theme = &app.look.theme;
    [Span::styled(full, theme.style(Role::Good)), Span::styled(empty, theme.style(Role::Dim))]
}

/// How much of how much: `42 of 100 segments`.
pub fn amount(task: &Task) -> String {
    match task.unit {
        TaskUnit::Bytes => format!("{} of {}", size(task.done), size(task.total)),
        TaskUnit::Segments | TaskUnit::Unknown => {
            format!("{} of {} {}", task.done, task.total, task.unit)
        }
    }
}

fn left(task: &Task) -> Option<String> {
    task.eta_s.map(format::duration)
}
