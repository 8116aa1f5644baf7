//! Where the time of requests went, by stage.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::text::Span;
use ratatui::text::Text;
use ratatui::widgets::Paragraph;
use weft_api::Operation;

use super::chart::gauge;
use super::panel;
use crate::app::App;
use crate::format;
use crate::format::float;
use crate::format::latency;
use crate::model::activity::Activity;
use crate::model::activity::OperationActivity;
use crate::model::activity::StageActivity;
use crate::theme::Role;

/// Lines of the panel where there is little room: what a write needs.
const LINES_MIN: u16 = 11;

/// Lines of the panel where there is room: a heading, a sum, every stage, and the frame.
const LINES_MAX: u16 = 15;

/// How many lines the panel should have of so many.
pub fn lines_of(height: u16) -> u16 {
    (height / 2).clamp(LINES_MIN, LINES_MAX)
}

/// Width of the bar that shows a stage's share. Arbitrary; what fits beside the figures.
const BAR_WIDTH: usize = 20;

/// Draws the stages of one operation into a panel.
pub fn draw(app: &App, frame: &mut Frame<'_>, area: Rect, activity: &Activity, focus: bool) {
    let operation = app.operation;
    let title = format!("Where the time of a {operation} goes");
    let block = panel(app, &title, focus);
    let lines = match activity.operation(operation).filter(|one| one.requests > 0) {
        Some(one) => lines(app, one),
        None => vec![Line::styled(
            format!("No {operation} was answered in this second."),
            app.look.theme.style(Role::Dim),
        )],
    };
    frame.render_widget(Paragraph::new(Text::from(lines)).block(block), area);
}

fn lines(app: &App, one: &OperationActivity) -> Vec<Line<'static>> {
    let theme = &app.look.theme;
    let heading = format!(
        "{:<9} {:>7} {:<BAR_WIDTH$} {:>8} {:>8} {:>8} {:>8}",
        "STAGE", "SHARE", "", "REQUESTS", "MEAN", "P50", "P99"
    );
    let mut lines = vec![Line::styled(heading, theme.style(Role::Dim))];
    let all = format!(
        "{:<9} {:>7} {:<BAR_WIDTH$} {:>8} {:>8} {:>8} {:>8}",
        "all",
        "",
        "",
        format::count(one.requests),
        latency(one.latency.mean_ns()),
        latency(one.latency.quantile_ns(0.5)),
        latency(one.latency.quantile_ns(0.99))
    );
    lines.push(Line::styled(all, theme.style(Role::Title)));
    lines.extend(one.stages.iter().map(|stage| stage_line(app, one, stage)));
    lines
}

fn stage_line(app: &App, one: &OperationActivity, stage: &StageActivity) -> Line<'static> {
    let theme = &app.look.theme;
    let share = format::share(stage.sum_ns, one.latency.sum_ns).unwrap_or(0.0);
    let (full, _) = gauge(share, BAR_WIDTH, app.look.symbols);
    let figures = format!(
        " {:>8} {:>8} {:>8} {:>8}",
        format::count(stage.requests),
        latency(stage.mean_ns()),
        latency(stage.p50_ns),
        latency(stage.p99_ns)
    );
    Line::from(vec![
        Span::raw(format!("{:<9} {:>7} ", stage.stage.name(), percent(share))),
        Span::styled(format!("{full:<BAR_WIDTH$}"), theme.style(operation_role(one.operation))),
        Span::raw(figures),
    ])
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * float(100))
}

/// The colour of an operation.
pub fn operation_role(operation: Operation) -> Role {
    match operation {
        Operation::Read => Role::Read,
        Operation::Write => Role::Write,
        Operation::Flush => Role::Flush,
        Operation::Zero | Operation::Other | Operation::Unknown => Role::Text,
    }
}
