//! Volumes and what hosts do with them.

use weft_api::Operation;

use super::TREND;
use crate::format::count;
use crate::format::float;
use crate::format::latency_or_nothing;
use crate::format::rate;
use crate::format::size;
use crate::format::throughput;
use crate::model::activity::Activity;
use crate::model::interval::Interval;
use crate::model::interval::VolumeInterval;
use crate::table::Cell;
use crate::table::Column;
use crate::table::Row;
use crate::table::figure;
use crate::table::words;
use crate::theme::Role;

/// Its columns.
pub const COLUMNS: &[Column] = &[
    words("VOLUME", 10, 0),
    figure("R IOPS", 6, 1),
    figure("W IOPS", 6, 1),
    figure("READ/S", 10, 3),
    figure("WRITE/S", 10, 3),
    figure("R P50", 7, 6),
    figure("R P99", 7, 4),
    figure("W P50", 7, 6),
    figure("W P99", 7, 4),
    figure("ERRORS", 6, 2),
    figure("SIZE", 8, 7),
    figure("STORED", 8, 8),
    words(TREND, 8, 2),
];

/// The column it is sorted by at first: the busiest writers are on top.
pub const SORT: usize = 2;

/// A row for each volume.
pub fn rows(interval: &Interval) -> Vec<Row> {
    let row = |one: &VolumeInterval| {
        let (name, activity) = (&one.name, &one.activity);
        let bytes_of = |bytes| Cell::figure(float(bytes), size(bytes));
        let cells = vec![
            Cell::text(name, Role::Text),
            iops(interval, activity, Operation::Read, Role::Read),
            iops(interval, activity, Operation::Write, Role::Write),
            bytes(interval, activity, Operation::Read),
            bytes(interval, activity, Operation::Write),
            quantile(activity, Operation::Read, 0.5),
            quantile(activity, Operation::Read, 0.99),
            quantile(activity, Operation::Write, 0.5),
            quantile(activity, Operation::Write, 0.99),
            errors(activity.errors()),
            bytes_of(one.size_bytes),
            bytes_of(one.allocated_bytes),
            Cell::figure(interval.per_second(activity.requests_all()), String::new()),
        ];
        Row { key: name.clone(), cells }
    };
    interval.volumes.iter().map(row).collect()
}

/// Requests a second of a volume.
pub fn trend(interval: &Interval, name: &str) -> f64 {
    let volume = interval.volume(name);
    volume.map_or(0.0, |one| interval.per_second(one.activity.requests_all()))
}

fn iops(interval: &Interval, activity: &Activity, operation: Operation, role: Role) -> Cell {
    let value = interval.per_second(activity.requests(operation));
    let role = if value > 0.0 { role } else { Role::Dim };
    Cell { role, ..Cell::figure(value, rate(value)) }
}

fn bytes(interval: &Interval, activity: &Activity, operation: Operation) -> Cell {
    let value = interval.per_second(activity.bytes(operation));
    Cell::figure(value, throughput(value))
}

fn quantile(activity: &Activity, operation: Operation, share: f64) -> Cell {
    let value = activity.quantile_ns(operation, share);
    Cell::figure(value.map_or(0.0, float), latency_or_nothing(value))
}

/// A count that should be zero.
pub fn errors(errors: u64) -> Cell {
    let role = if errors > 0 { Role::Bad } else { Role::Dim };
    Cell { role, ..Cell::figure(float(errors), count(errors)) }
}
