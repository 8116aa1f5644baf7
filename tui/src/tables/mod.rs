//! The tables of the screens: which columns they have, and their rows from the model.

use crate::app::App;
use crate::model::history::History;
use crate::model::interval::Interval;
use crate::table::Column;
use crate::table::Row;

pub mod devices;
pub mod events;
pub mod hosts;
pub mod volumes;

/// The heading of the column that shows the last minute; its cells are drawn, not written.
pub const TREND: &str = "TREND";

/// A screen that is a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TableKind {
    /// Volumes.
    Volumes,
    /// Devices.
    Devices,
    /// Connections.
    Hosts,
    /// Events.
    Events,
}

impl TableKind {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Volumes, Self::Devices, Self::Hosts, Self::Events];

    /// Its columns.
    #[must_use]
    pub fn columns(self) -> &'static [Column] {
        match self {
            Self::Volumes => volumes::COLUMNS,
            Self::Devices => devices::COLUMNS,
            Self::Hosts => hosts::COLUMNS,
            Self::Events => events::COLUMNS,
        }
    }

    /// Its rows at the moment that is shown, in no order.
    #[must_use]
    pub fn rows(self, app: &App) -> Vec<Row> {
        let Some(interval) = app.shown() else { return Vec::new() };
        match self {
            Self::Volumes => volumes::rows(interval),
            Self::Devices => devices::rows(interval),
            Self::Hosts => hosts::rows(interval),
            Self::Events => events::rows(app.events_shown()),
        }
    }

    /// What a row's trend shows, oldest first.
    #[must_use]
    pub fn trend(self, history: &History, number: u64, key: &str, count: usize) -> Vec<f64> {
        let value: fn(&Interval, &str) -> f64 = match self {
            Self::Volumes => volumes::trend,
            Self::Devices => devices::trend,
            Self::Hosts => hosts::trend,
            Self::Events => return Vec::new(),
        };
        history.window(number, count).map(|interval| value(interval, key)).collect()
    }
}
