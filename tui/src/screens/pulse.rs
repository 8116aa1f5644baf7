//! The pod as a whole: what it has left to lose, what hosts do, and the last minutes of it.

use ratatui::Frame;
use ratatui::layout::Constraint;
use ratatui::layout::Layout;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::text::Span;
use ratatui::text::Text;
use ratatui::widgets::Paragraph;
use weft_api::Operation;
use weft_api::Pod;

use super::chart;
use super::facts;
use super::health_role;
use super::panel;
use super::stages::operation_role;
use super::tasks;
use crate::app::App;
use crate::app::OPERATIONS;
use crate::format;
use crate::format::float;
use crate::format::latency;
use crate::format::rate;
use crate::format::size;
use crate::format::throughput;
use crate::model::interval::Interval;
use crate::theme::Role;

/// Panels that can have the focus: the pod, the load, and each chart.
pub const PANELS: usize = 2 + CHARTS.len();

/// Lines of the upper panels: eight facts and their frame.
const FACTS_LINES: u16 = 11;

/// Width of a gauge.
const GAUGE_WIDTH: usize = 10;

/// A figure over time.
struct Chart {
    title: &'static str,
    operation: Operation,
    value: fn(&Interval, Operation) -> f64,
    text: fn(f64) -> String,
}

const fn iops(title: &'static str, operation: Operation) -> Chart {
    let value = |one: &Interval, operation| one.per_second(one.total.requests(operation));
    Chart { title, operation, value, text: rate }
}

const fn bytes(title: &'static str, operation: Operation) -> Chart {
    let value = |one: &Interval, operation| one.per_second(one.total.bytes(operation));
    Chart { title, operation, value, text: throughput }
}

const fn p99(title: &'static str, operation: Operation) -> Chart {
    let value =
        |one: &Interval, operation| float(one.total.quantile_ns(operation, 0.99).unwrap_or(0));
    Chart { title, operation, value, text: |value| latency(format::whole(value)) }
}

/// The charts, row by row.
const CHARTS: [Chart; 6] = [
    iops("Reads/s", Operation::Read),
    iops("Writes/s", Operation::Write),
    bytes("Read", Operation::Read),
    bytes("Write", Operation::Write),
    p99("Read p99", Operation::Read),
    p99("Write p99", Operation::Write),
];

/// Draws the screen, or the panel that is enlarged.
pub fn draw(app: &App, frame: &mut Frame<'_>, area: Rect) {
    let Some(interval) = app.shown() else { return };
    if app.enlarged {
        return draw_panel(app, frame, area, interval, app.focus);
    }
    let [above, below] =
        Layout::vertical([Constraint::Length(FACTS_LINES), Constraint::Fill(1)]).areas(area);
    let halves = Layout::horizontal([Constraint::Fill(1); 2]);
    let [pod, load] = halves.areas(above);
    draw_panel(app, frame, pod, interval, 0);
    draw_panel(app, frame, load, interval, 1);
    let rows: [Rect; 3] = Layout::vertical([Constraint::Fill(1); 3]).areas(below);
    for (at, row) in rows.into_iter().enumerate() {
        let [left, right] = halves.areas(row);
        draw_panel(app, frame, left, interval, 2 + 2 * at);
        draw_panel(app, frame, right, interval, 3 + 2 * at);
    }
}

fn draw_panel(app: &App, frame: &mut Frame<'_>, area: Rect, interval: &Interval, panel: usize) {
    match panel {
        0 => draw_pod(app, frame, area, interval),
        1 => draw_load(app, frame, area, interval),
        chart => {
            if let Some(chart) = CHARTS.get(chart - 2) {
                draw_chart(app, frame, area, chart, app.focus == panel);
            }
        }
    }
}

fn draw_pod(app: &App, frame: &mut Frame<'_>, area: Rect, interval: &Interval) {
    let theme = &app.look.theme;
    let pod = &interval.pod;
    let text = |text: String| vec![Span::raw(text)];
    let health = Span::styled(pod.health.clone(), theme.style(health_role(&pod.health)));
    let lines = vec![
        ("health", vec![health, Span::raw(format!(", can lose {} more", pod.can_lose))]),
        ("devices", text(devices(pod))),
        ("tasks", tasks(app, interval)),
        ("space", gauge(app, pod.used_bytes, pod.capacity_bytes)),
        ("data", text(reduction(pod))),
        ("journal", gauge(app, pod.journal_used_bytes, pod.journal_bytes)),
        ("cache", text(cache(interval))),
        ("hosts", text(hosts(interval))),
        ("node", text(node(app, interval))),
    ];
    let block = panel(app, "Pod", app.focus == 0);
    frame.render_widget(Paragraph::new(facts(app, lines)).block(block), area);
}

fn devices(pod: &Pod) -> String {
    format!(
        "{} of {} in service, {}+{}",
        pod.devices_in_service, pod.device_count, pod.data_strips, pod.parity_strips
    )
}

/// What is under way; if nothing is, what waits for devices to be replaced.
fn tasks(app: &App, interval: &Interval) -> Vec<Span<'static>> {
    let pod = &interval.pod;
    if interval.tasks.is_empty() && pod.segments_degraded > 0 {
        let text = format!("{} of {} segments degraded", pod.segments_degraded, pod.segments);
        return vec![Span::styled(text, app.look.theme.style(Role::Warning))];
    }
    tasks::short(app, &interval.tasks)
}

/// A share of a whole: a bar and both figures.
fn gauge(app: &App, part: u64, whole: u64) -> Vec<Span<'static>> {
    let share = format::share(part, whole).unwrap_or(0.0);
    let (full, empty) = chart::gauge(share, GAUGE_WIDTH, app.look.symbols);
    let role = match share {
        share if share >= 0.95 => Role::Bad,
        share if share >= 0.8 => Role::Warning,
        _ => Role::Good,
    };
    vec![
        Span::styled(full, app.look.theme.style(role)),
        Span::styled(empty, app.look.theme.style(Role::Dim)),
        Span::raw(format!(" {} of {}", size(part), size(whole))),
    ]
}

fn reduction(pod: &Pod) -> String {
    let ratio = format::ratio(pod.logical_bytes, pod.physical_bytes);
    format!("{}, reduced {ratio}", size(pod.logical_bytes))
}

fn cache(interval: &Interval) -> String {
    let asked = interval.cache_hits.saturating_add(interval.cache_misses);
    let hits = format::percent(interval.cache_hits, asked);
    format!("{hits} hits, {} in RAM", size(interval.pod.cache_bytes))
}

fn hosts(interval: &Interval) -> String {
    let open: Vec<String> = interval
        .front_ends
        .iter()
        .map(|one| format!("{} {}", one.connections_open, one.front_end))
        .collect();
    let refused: u64 = interval.front_ends.iter().map(|one| one.connections_refused).sum();
    match (open.is_empty(), refused) {
        (true, _) => format::NOTHING.to_owned(),
        (false, 0) => open.join(", "),
        (false, refused) => format!("{}; {refused} refused", open.join(", ")),
    }
}

fn node(app: &App, interval: &Interval) -> String {
    let version = app.node.as_ref().map_or("", |node| node.version.as_str());
    // Which version it was is not recorded.
    let weft = if version.is_empty() { "weft".to_owned() } else { format!("weft {version}") };
    format!("{weft} up {}", format::duration(interval.uptime_ms / 1000))
}

/// A line of the load's table: what it says, and how of an operation.
type LoadLine = (&'static str, fn(&Interval, Operation) -> String);

fn draw_load(app: &App, frame: &mut Frame<'_>, area: Rect, interval: &Interval) {
    const LINES: [LoadLine; 6] = [
        ("IOPS", |one, operation| rate(one.per_second(one.total.requests(operation)))),
        ("bytes", |one, operation| throughput(one.per_second(one.total.bytes(operation)))),
        ("p50", |one, operation| quantile(one, operation, 0.5)),
        ("p99", |one, operation| quantile(one, operation, 0.99)),
        ("p99.9", |one, operation| quantile(one, operation, 0.999)),
        ("err/s", |one, operation| {
            let errors = one.total.operation(operation).map_or(0, |one| one.errors);
            rate(one.per_second(errors))
        }),
    ];
    let theme = &app.look.theme;
    let mut lines = Vec::new();
    let mut heading = vec![Span::raw(format!("{:<5}", ""))];
    for operation in OPERATIONS {
        let style = theme.style(operation_role(operation));
        heading.push(Span::styled(format!("{:>11}", operation.name()), style));
    }
    lines.push(Line::from(heading));
    for (name, text) in LINES {
        let mut spans = vec![Span::styled(format!("{name:<5}"), theme.style(Role::Dim))];
        for operation in OPERATIONS {
            // A flush moves nothing.
            let none = name == "bytes" && operation == Operation::Flush;
            let text = if none { format::NOTHING.to_owned() } else { text(interval, operation) };
            spans.push(Span::raw(format!("{text:>11}")));
        }
        lines.push(Line::from(spans));
    }
    let zero = rate(interval.per_second(interval.total.requests(Operation::Zero)));
    lines.push(Line::styled(format!("trims and zeroes {zero}/s"), theme.style(Role::Dim)));
    let title = match interval.gap_ms {
        0 => "Load".to_owned(),
        gap_ms => format!("Load, after a gap of {}", format::duration(gap_ms / 1000)),
    };
    let block = panel(app, &title, app.focus == 1);
    frame.render_widget(Paragraph::new(Text::from(lines)).block(block), area);
}

fn quantile(interval: &Interval, operation: Operation, share: f64) -> String {
    format::latency_or_nothing(interval.total.quantile_ns(operation, share))
}

fn draw_chart(app: &App, frame: &mut Frame<'_>, area: Rect, chart: &Chart, focus: bool) {
    let width = usize::from(area.width).saturating_sub(2);
    let height = usize::from(area.height).saturating_sub(2);
    let values: Vec<f64> = app
        .history
        .window(app.number(), width)
        .map(|interval| (chart.value)(interval, chart.operation))
        .collect();
    let now = values.last().copied().unwrap_or(0.0);
    let most = chart::maximum(&values);
    let title = format!("{} {} (max {})", chart.title, (chart.text)(now), (chart.text)(most));
    let style = app.look.theme.style(operation_role(chart.operation));
    let lines: Vec<Line<'_>> = chart::columns(&values, width, height, app.look.symbols)
        .into_iter()
        .map(|line| Line::styled(line, style))
        .collect();
    let block = panel(app, &title, focus);
    frame.render_widget(Paragraph::new(Text::from(lines)).block(block), area);
}
