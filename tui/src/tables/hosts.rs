//! Connections of hosts, by front end.

use weft_api::Connection;

use super::TREND;
use super::volumes::errors;
use crate::format::duration;
use crate::format::float;
use crate::format::rate;
use crate::format::throughput;
use crate::model::interval::ConnectionInterval;
use crate::model::interval::Interval;
use crate::table::Cell;
use crate::table::Column;
use crate::table::Row;
use crate::table::figure;
use crate::table::word;
use crate::table::words;
use crate::theme::Role;

/// Its columns.
pub const COLUMNS: &[Column] = &[
    figure("ID", 5, 6),
    word("BY", 8, 0),
    words("PEER", 15, 1),
    words("SERVES", 11, 1),
    figure("IN FLIGHT", 9, 2),
    figure("IOPS", 6, 2),
    figure("READ/S", 10, 3),
    figure("WRITE/S", 10, 3),
    figure("ERRORS", 6, 5),
    words("HOST", 24, 4),
    figure("OPEN", 12, 7),
    words(TREND, 8, 8),
];

/// The column it is sorted by at first: the protocol.
pub const SORT: usize = 1;

/// A row for each connection.
pub fn rows(interval: &Interval) -> Vec<Row> {
    interval.connections.iter().map(|one| row(interval, one)).collect()
}

fn row(interval: &Interval, one: &ConnectionInterval) -> Row {
    let connection = &one.connection;
    let iops = interval.per_second(one.requests);
    let bytes = |count| {
        let value = interval.per_second(count);
        Cell::figure(value, throughput(value))
    };
    Row {
        key: connection.id.to_string(),
        cells: vec![
            Cell::figure(float(connection.id), connection.id.to_string()),
            Cell::text(connection.front_end.name(), Role::Title),
            Cell::text(&connection.peer, Role::Text),
            Cell::text(serves(connection), Role::Text),
            Cell::figure(float(connection.in_flight), connection.in_flight.to_string()),
            Cell::figure(iops, rate(iops)),
            bytes(one.bytes_read),
            bytes(one.bytes_written),
            errors(connection.errors),
            Cell::text(host(connection), Role::Dim),
            Cell::figure(float(connection.open_s), duration(connection.open_s)),
            Cell::figure(iops, String::new()),
        ],
    }
}

/// What a connection is for: an NBD client's volume, or `ctrl 1 q 2` of NVMe.
pub fn serves(connection: &Connection) -> String {
    match (&connection.volume, connection.controller, connection.queue) {
        (Some(volume), _, _) => volume.clone(),
        (None, Some(controller), Some(0)) => format!("ctrl {controller} admin"),
        (None, Some(controller), Some(queue)) => format!("ctrl {controller} q {queue}"),
        (None, Some(controller), None) => format!("ctrl {controller}"),
        (None, None, _) => "-".to_owned(),
    }
}

/// The host's name; of one that only has a UUID, as nearly all, just that.
fn host(connection: &Connection) -> &str {
    let name = connection.host.as_deref().unwrap_or("-");
    name.strip_prefix("nqn.2014-08.org.nvmexpress:").unwrap_or(name)
}

/// Requests a second of a connection.
pub fn trend(interval: &Interval, key: &str) -> f64 {
    let one = interval.connections.iter().find(|one| one.connection.id.to_string() == key);
    one.map_or(0.0, |one| interval.per_second(one.requests))
}
