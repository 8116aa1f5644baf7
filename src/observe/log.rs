//! The log: lines with fields on standard error, for people or for machines.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Starts logging for the whole process; to be called once.
///
/// `filter` is a level, or levels by module; `json` writes one object a line.
///
/// # Errors
/// `InvalidRequest` if the filter cannot be read, `Exists` if logging was started before.
pub fn start(filter: &str, json: bool) -> Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| Error::new(ErrorKind::InvalidRequest, "read log level").source(error))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_target(false).with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init()
    };
    started.map_err(|error| Error::new(ErrorKind::Exists, "start logging").source(error))
}
