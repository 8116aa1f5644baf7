//! What happened on the node.

use weft_api::Event;
use weft_api::Severity;

use crate::format::date_time;
use crate::format::float;
use crate::table::Cell;
use crate::table::Column;
use crate::table::Row;
use crate::table::word;
use crate::table::words;
use crate::theme::Role;

/// Its columns.
pub const COLUMNS: &[Column] = &[
    word("TIME (UTC)", 19, 0),
    word("SEVERITY", 8, 0),
    word("SUBJECT", 17, 1),
    words("WHAT", 30, 1),
    words("ADVICE", 30, 2),
];

/// The colour of a severity.
pub fn role(severity: Severity) -> Role {
    match severity {
        Severity::Info => Role::Text,
        Severity::Warning => Role::Warning,
        Severity::Error => Role::Bad,
    }
}

/// A row for each event.
pub fn rows<'a>(events: impl Iterator<Item = &'a Event>) -> Vec<Row> {
    let message = |event: &Event| match event.count {
        0 | 1 => format!("{}: {}", event.kind, event.message),
        count => format!("{}, {count} times: {}", event.kind, event.message),
    };
    let row = |event: &Event| Row {
        key: key(event),
        cells: vec![
            Cell { role: Role::Dim, ..time(event) },
            severity(event.severity),
            Cell::text(&event.subject, Role::Text),
            Cell::text(message(event), Role::Text),
            Cell::text(&event.advice, Role::Dim),
        ],
    };
    events.map(row).collect()
}

/// Tells events apart, also of before and after a restart, which numbers them anew; one that happens
/// again stays the same.
pub fn key(event: &Event) -> String {
    format!("{} {} {}", event.unix_ms, event.kind, event.subject)
}

fn time(event: &Event) -> Cell {
    Cell::figure(float(event.unix_ms), date_time(event.unix_ms))
}

/// Sorted by how bad it is, not by its letters.
fn severity(severity: Severity) -> Cell {
    let rank = match severity {
        Severity::Info => 1.0,
        Severity::Warning => 2.0,
        Severity::Error => 3.0,
    };
    Cell { role: role(severity), ..Cell::figure(rank, severity.name().to_owned()) }
}
