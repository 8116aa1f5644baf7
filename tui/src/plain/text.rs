//! One interval as a table for people.

use weft_api::Operation;

use crate::format;
use crate::format::latency_or_nothing;
use crate::format::rate;
use crate::format::throughput;
use crate::model::activity::Activity;
use crate::model::interval::Interval;
use crate::screens::tasks;

/// The interval, after a line on what was not recorded before it.
pub(super) fn recorded(one: &Interval) -> String {
    let gap = match one.gap_ms {
        0 => String::new(),
        gap_ms => format!("(nothing recorded for {})\n\n", format::duration(gap_ms / 1000)),
    };
    if one.is_gap() { gap } else { gap + &interval(one) }
}

/// The interval: a line on the pod, then its volumes and a sum.
fn interval(interval: &Interval) -> String {
    let pod = &interval.pod;
    let asked = interval.cache_hits.saturating_add(interval.cache_misses);
    let mut text = format!(
        "{} UTC  {}, can lose {} more, {} of {} used, journal {}, cache hits {}, connections {}{}\n",
        format::date_time(interval.unix_ms),
        pod.health,
        pod.can_lose,
        format::size(pod.used_bytes),
        format::size(pod.capacity_bytes),
        format::percent(pod.journal_used_bytes, pod.journal_bytes),
        format::percent(interval.cache_hits, asked),
        interval.connections_open(),
        if interval.restarted { ", restarted" } else { "" },
    );
    let longest = interval.volumes.iter().map(|one| one.name.len()).max().unwrap_or(0);
    let width = longest.max("VOLUME".len());
    text.push_str(&format!(
        "{:<width$} {:>7} {:>7} {:>11} {:>11} {:>8} {:>8} {:>8} {:>8} {:>8}\n",
        "VOLUME",
        "R IOPS",
        "W IOPS",
        "READ/S",
        "WRITE/S",
        "R P50",
        "R P99",
        "W P50",
        "W P99",
        "ERRORS/S"
    ));
    for volume in &interval.volumes {
        text.push_str(&row(interval, &volume.name, &volume.activity, width));
    }
    text.push_str(&row(interval, "all", &interval.total, width));
    for task in &interval.tasks {
        text.push_str(&format!("{} {} %: {}", task.kind, task.percent(), tasks::amount(task)));
        if let Some(eta_s) = task.eta_s {
            text.push_str(&format!(", {} left", format::duration(eta_s)));
        }
        text.push('\n');
    }
    text.push('\n');
    text
}

fn row(interval: &Interval, name: &str, activity: &Activity, width: usize) -> String {
    let iops = |operation| rate(interval.per_second(activity.requests(operation)));
    let bytes = |operation| throughput(interval.per_second(activity.bytes(operation)));
    let quantile = |operation, share| latency_or_nothing(activity.quantile_ns(operation, share));
    format!(
        "{name:<width$} {:>7} {:>7} {:>11} {:>11} {:>8} {:>8} {:>8} {:>8} {:>8}\n",
        iops(Operation::Read),
        iops(Operation::Write),
        bytes(Operation::Read),
        bytes(Operation::Write),
        quantile(Operation::Read, 0.5),
        quantile(Operation::Read, 0.99),
        quantile(Operation::Write, 0.5),
        quantile(Operation::Write, 0.99),
        rate(interval.per_second(activity.errors())),
    )
}
