//! What happened on a node that an operator should know.

use serde::Deserialize;
use serde::Serialize;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Event {
    /// Counts events since the node started, from 1.
    pub sequence: u64,
    /// When it first happened, in milliseconds since 1970.
    pub unix_ms: u64,
    /// How bad it is.
    pub severity: Severity,
    /// What kind, the same for every event of the kind: `device-failed`, `pod-full`, ...
    pub kind: String,
    /// On what: a device's path, a volume's name.
    pub subject: String,
    /// What happened, in words.
    pub message: String,
    /// What can be done about it; empty if nothing needs to be.
    pub advice: String,
    /// How often it happened within a minute. Each time it gets a new number.
    pub count: u64,
}

/// How bad an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Redundancy or room is less than it should be.
    Warning,
    /// Hosts see errors, or will.
    Error,
}

impl Severity {
    /// Its name, in the API and on screens.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// The node's log, as `GET` and `PUT /v1/log` have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// error, warn, info, debug, trace, or by module: `info,weft::target=debug`.
    pub level: String,
}
