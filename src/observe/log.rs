//! The log: lines with fields on standard error or in a file, for people or for machines.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::Registry;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// The levels in force, once logging was started.
static LEVELS: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts logging for the whole process; to be called once.
///
/// `filter` is a level, or levels by module; `json` writes one object a line. With a `file` lines
/// go there, without to standard error.
///
/// # Errors
/// `InvalidRequest` if the filter cannot be read, `Exists` if logging was started before.
pub fn start(filter: &str, json: bool, file: Option<File>) -> Result<()> {
    let (filter, handle) = reload::Layer::new(parsed(filter)?);
    let registry = tracing_subscriber::registry().with(filter);
    let colours = file.is_none() && io::IsTerminal::is_terminal(&io::stderr());
    let writer = match file {
        Some(file) => BoxMakeWriter::new(Arc::new(file)),
        None => BoxMakeWriter::new(io::stderr),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let started = if json {
        registry.with(lines.json().flatten_event(true)).try_init()
    } else {
        registry.with(lines.with_target(false).with_ansi(colours)).try_init()
    };
    started.map_err(|error| Error::new(ErrorKind::Exists, "start logging").source(error))?;
    let _ = LEVELS.set(handle);
    Ok(())
}

/// The levels in force.
///
/// # Errors
/// `Unsupported` if logging was never started.
pub fn level() -> Result<String> {
    let levels = LEVELS.get().ok_or_else(not_started)?;
    levels.with_current(ToString::to_string).map_err(|_| not_started())
}

/// Changes the levels, for as long as the process lives.
///
/// # Errors
/// `InvalidRequest` if the filter cannot be read, `Unsupported` if logging was never started.
pub fn set_level(filter: &str) -> Result<()> {
    let filter = parsed(filter)?;
    LEVELS.get().ok_or_else(not_started)?.reload(filter).map_err(|_| not_started())
}

fn parsed(filter: &str) -> Result<EnvFilter> {
    EnvFilter::try_new(filter)
        .map_err(|error| Error::new(ErrorKind::InvalidRequest, "read log level").source(error))
}

fn not_started() -> Error {
    Error::new(ErrorKind::Unsupported, "look at log level").context("this process has no log")
}
