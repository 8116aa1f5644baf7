//! The log: lines with fields on standard error or in a file, for people or for machines.

use std::fs::File;
use std::io;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Starts logging for the whole process; to be called once.
///
/// `filter` is a level, or levels by module; `json` writes one object a line. With a `file` lines
/// go there, without to standard error.
///
/// # Errors
/// `InvalidRequest` if the filter cannot be read, `Exists` if logging was started before.
pub fn start(filter: &str, json: bool, file: Option<File>) -> Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| Error::new(ErrorKind::InvalidRequest, "read log level").source(error))?;
    let colours = file.is_none() && io::IsTerminal::is_terminal(&io::stderr());
    let writer = match file {
        Some(file) => BoxMakeWriter::new(Arc::new(file)),
        None => BoxMakeWriter::new(io::stderr),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    let started = if json {
        builder.json().flatten_event(true).try_init()
    } else {
        builder.with_target(false).with_ansi(colours).try_init()
    };
    started.map_err(|error| Error::new(ErrorKind::Exists, "start logging").source(error))
}
