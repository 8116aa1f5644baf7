//! The log: lines with fields on standard error or in a file, for people or for machines; or
//! entries of systemd's journal, with the fields as fields. `docs/events.md` describes them.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::sync::Mutex;
use std::sync::OnceLock;

use tracing_journald::Priority;
use tracing_journald::PriorityMappings;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::Registry;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::util::TryInitError;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::observe::log_file::LogFile;

/// The levels in force, once logging was started.
static LEVELS: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// What is logged where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The journal if standard error leads there, else text.
    Auto,
    /// Lines for people.
    Text,
    /// One object a line.
    Json,
    /// The journal, wherever standard error leads.
    Journald,
}

/// Starts logging for the whole process; to be called once.
///
/// `filter` is a level, or levels by module. With a `file` lines go there, without to standard
/// error.
///
/// # Errors
/// `InvalidRequest` if the filter cannot be read, `Exists` if logging was started before,
/// `Unsupported` if there must be a journal and there is none.
pub fn start(filter: &str, format: Format, file: Option<LogFile>) -> Result<()> {
    let (filter, handle) = reload::Layer::new(parsed(filter)?);
    let registry = tracing_subscriber::registry().with(filter);
    if let Some(journal) = journal(format, file.is_some())? {
        registry.with(journal).try_init().map_err(started_before)?;
        let _ = LEVELS.set(handle);
        return Ok(());
    }
    let colours = file.is_none() && io::IsTerminal::is_terminal(&io::stderr());
    let writer = match file {
        Some(file) => BoxMakeWriter::new(Mutex::new(file)),
        None => BoxMakeWriter::new(io::stderr),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let started = if format == Format::Json {
        registry.with(lines.json().flatten_event(true)).try_init()
    } else {
        registry.with(lines.with_target(false).with_ansi(colours)).try_init()
    };
    started.map_err(started_before)?;
    let _ = LEVELS.set(handle);
    Ok(())
}

fn started_before(error: TryInitError) -> Error {
    Error::new(ErrorKind::Exists, "start logging").source(error)
}

/// What writes to the journal, if that is where the log goes.
fn journal(format: Format, to_file: bool) -> Result<Option<tracing_journald::Layer>> {
    let stderr = rustix::fs::fstat(io::stderr()).ok().map(|stat| (stat.st_dev, stat.st_ino));
    let stream = env::var_os("JOURNAL_STREAM");
    if to_file || !wants_journal(format, stream.as_deref(), stderr) {
        return Ok(None);
    }
    // As the levels are called in syslog, whose numbers the journal uses.
    let priorities = PriorityMappings {
        error: Priority::Error,
        warn: Priority::Warning,
        info: Priority::Informational,
        debug: Priority::Debug,
        trace: Priority::Debug,
    };
    match tracing_journald::layer() {
        Ok(layer) => Ok(Some(
            layer
                .with_field_prefix(Some("WEFT".to_owned()))
                .with_syslog_identifier("weft".to_owned())
                .with_priority_mappings(priorities),
        )),
        // Lines on standard error get there too.
        Err(_) if format == Format::Auto => Ok(None),
        Err(error) => Err(Error::new(ErrorKind::Unsupported, "open systemd's journal")
            .context("choose another log.format where there is none")
            .source(error)),
    }
}

/// Whether entries go to the journal itself. `stream` is the environment's JOURNAL_STREAM: device
/// and inode of the socket that systemd made standard error, which is here now `stderr`.
/// (systemd.exec(5))
fn wants_journal(format: Format, stream: Option<&OsStr>, stderr: Option<(u64, u64)>) -> bool {
    match format {
        Format::Text | Format::Json => false,
        Format::Journald => true,
        Format::Auto => {
            let stream = stream.and_then(OsStr::to_str).and_then(|text| text.split_once(':'));
            let stream = stream.and_then(|(device, inode)| {
                Some((device.parse::<u64>().ok()?, inode.parse::<u64>().ok()?))
            });
            stream.is_some() && stream == stderr
        }
    }
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

/// Looks whether `filter` can be read.
///
/// # Errors
/// `InvalidRequest` if it cannot.
pub fn check_level(filter: &str) -> Result<()> {
    parsed(filter).map(drop)
}

/// A word alone must be a level. To the filter it could also be a module, of which all is logged,
/// and of everything else nothing: a level mistyped would silence the log.
fn parsed(filter: &str) -> Result<EnvFilter> {
    const OP: &str = "read log level";
    let known = |part: &str| part.contains('=') || part.parse::<LevelFilter>().is_ok();
    let mut parts = filter.split(',');
    if filter.trim_matches([' ', ',']).is_empty() || !parts.all(known) {
        return Err(Error::new(ErrorKind::InvalidRequest, OP).context(format!(
            "'{filter}' is none of error, warn, info, debug and trace, nor MODULE=LEVEL,..."
        )));
    }
    EnvFilter::try_new(filter)
        .map_err(|error| Error::new(ErrorKind::InvalidRequest, OP).source(error))
}

fn not_started() -> Error {
    Error::new(ErrorKind::Unsupported, "look at log level").context("this process has no log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_alone_is_a_level() {
        for good in ["info", "WARN", "off", "weft=debug", "info,weft::target=debug,", "warn,a=off"]
        {
            assert!(check_level(good).is_ok(), "{good}");
        }
        for bad in [
            "inof",
            "",
            " ",
            ",",
            " info",
            "info,weft::target",
            "a=b=c",
            "weft=inof",
            "wran,weft=info",
        ] {
            assert!(check_level(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_journal_is_written_to_if_standard_error_is_it() {
        let wants =
            |format, stream: &str| wants_journal(format, Some(OsStr::new(stream)), Some((8, 4711)));
        assert!(wants(Format::Auto, "8:4711"));
        // Standard error was redirected since, or the variable is not systemd's.
        for stream in ["8:4712", "9:4711", "8", "", "8:x", ":", "8:4711:1"] {
            assert!(!wants(Format::Auto, stream), "{stream}");
        }
        assert!(!wants_journal(Format::Auto, None, Some((8, 4711))));
        assert!(!wants_journal(Format::Auto, Some(OsStr::new("8:4711")), None));
        assert!(!wants(Format::Text, "8:4711") && !wants(Format::Json, "8:4711"));
        assert!(wants_journal(Format::Journald, None, None));
    }
}
