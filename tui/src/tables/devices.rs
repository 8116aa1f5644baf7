//! The pod's devices.

use weft_api::Histogram;

use super::TREND;
use super::volumes::errors;
use crate::format::float;
use crate::format::latency_or_nothing;
use crate::format::rate;
use crate::format::size;
use crate::model::interval::Interval;
use crate::table::Cell;
use crate::table::Column;
use crate::table::Row;
use crate::table::figure;
use crate::table::path;
use crate::table::word;
use crate::table::words;
use crate::theme::Role;

/// Its columns.
pub const COLUMNS: &[Column] = &[
    figure("DEV", 4, 0),
    word("STATE", 10, 0),
    figure("READ/S", 6, 1),
    figure("WRITE/S", 7, 1),
    figure("R P50", 7, 6),
    figure("R P99", 7, 2),
    figure("W P50", 7, 6),
    figure("W P99", 7, 2),
    figure("ERRORS", 6, 3),
    figure("HEALED", 6, 4),
    figure("SIZE", 8, 8),
    path("NAME", 17, 5),
    words(TREND, 8, 7),
];

/// The colour of a device's state.
pub fn state_role(state: &str) -> Role {
    match state {
        "in service" => Role::Good,
        "missing" | "hung" => Role::Warning,
        _ => Role::Bad,
    }
}

/// A row for each device. Errors are of any kind since the node started.
pub fn rows(interval: &Interval) -> Vec<Row> {
    let mut rows = Vec::new();
    for one in &interval.devices {
        let device = &one.device;
        let all_errors = device
            .read_errors
            .saturating_add(device.write_errors)
            .saturating_add(device.checksum_errors);
        let per_second = |count| {
            let value = interval.per_second(count);
            Cell::figure(value, rate(value))
        };
        rows.push(Row {
            key: device.index.to_string(),
            cells: vec![
                Cell { role: Role::Text, ..index(device.index) },
                Cell::text(&device.state, state_role(&device.state)),
                per_second(one.reads),
                per_second(one.writes),
                quantile(&one.read_latency, 0.5),
                quantile(&one.read_latency, 0.99),
                quantile(&one.write_latency, 0.5),
                quantile(&one.write_latency, 0.99),
                errors(all_errors),
                Cell::figure(float(device.healed), device.healed.to_string()),
                Cell::figure(float(device.size_bytes), size(device.size_bytes)),
                Cell::text(&device.name, Role::Dim),
                per_second(one.reads.saturating_add(one.writes)),
            ],
        });
    }
    rows
}

/// Reads and writes a second of a device.
pub fn trend(interval: &Interval, key: &str) -> f64 {
    let device = key.parse().ok().and_then(|index| interval.device(index));
    device.map_or(0.0, |one| interval.per_second(one.reads.saturating_add(one.writes)))
}

fn index(index: usize) -> Cell {
    Cell::figure(float(index as u64), index.to_string())
}

fn quantile(latency: &Histogram, share: f64) -> Cell {
    let value = (latency.count() > 0).then(|| latency.quantile_ns(share));
    Cell::figure(value.map_or(0.0, float), latency_or_nothing(value))
}
