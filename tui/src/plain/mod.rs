//! The console's figures without a terminal: text for people, JSON and CSV for programs.

use std::io;
use std::io::Write;
use std::time::Duration;

use tokio::time;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use weft_api::Client;
use weft_api::ClientError;

use crate::Failure;
use crate::model::Sample;
use crate::recording::Choice;
use crate::recording::Recording;
use crate::source::Source;
use crate::when::When;

mod csv;
mod json;
mod text;

pub use csv::HEADER as CSV_HEADER;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A table for each interval.
    Text,
    /// One JSON object a line for each interval.
    Json,
    /// A header, then a row for the pod and one for each volume of each interval.
    Csv,
}

/// What to print.
#[derive(Clone, Debug)]
pub struct Options {
    /// Asks the node.
    pub node: Client,
    /// In which form.
    pub mode: Mode,
    /// Print one interval and leave.
    pub once: bool,
    /// Time between two readings.
    pub interval: Duration,
    /// Print what was recorded instead of what is.
    pub replay: Option<Span>,
}

/// A part of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where it begins.
    pub from: When,
    /// Where it ends.
    pub until: When,
}

/// Prints intervals to standard output, the first after one interval, until nobody reads them; of a
/// recording those of the span, at once.
///
/// # Errors
/// No node answers when it is first asked, or with `once`; later it is waited for. Or standard
/// output cannot be written.
pub async fn print(options: &Options) -> Result<(), Failure> {
    let mut source = match options.replay {
        None => Source::live(options.node.clone()),
        Some(span) => replay(span, options).await.map_err(Failure::Node)?,
    };
    let printed = print_from(&mut source, options, &mut io::stdout()).await;
    match printed {
        Err(Failure::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// The recording of the node; times are by its clock.
async fn replay(span: Span, options: &Options) -> Result<Source, ClientError> {
    let client = options.node.clone();
    let now_ms = client.stats().await?.unix_ms;
    let interval_ms = u64::try_from(options.interval.as_millis()).unwrap_or(u64::MAX);
    // Readings come a second apart or a little less: every one is printed.
    let step_ms = if interval_ms <= 1000 { 0 } else { interval_ms };
    let choice = Choice { now_ms, step_ms, until_ms: span.until.unix_ms(now_ms) };
    Ok(Source::replay(Recording::Node(client), span.from.unix_ms(now_ms), choice))
}

/// [`print()`] from any source to any writer. A recording ends, which is no error.
///
/// # Errors
/// As [`print()`].
pub async fn print_from(
    source: &mut Source,
    options: &Options,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let mut ticks = time::interval_at(Instant::now() + options.interval, options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let first = source.next().await.map_err(Failure::Node)?;
    if options.mode == Mode::Csv {
        writeln!(out, "{}", csv::HEADER)?;
        out.flush()?;
    }
    let Some(mut before) = first else { return Ok(()) };
    loop {
        if let Source::Live(_) = source {
            ticks.tick().await;
        }
        let Some(now) = next(source, options.once).await? else { return Ok(()) };
        let interval = source.interval(&before, &now);
        before = now;
        let text = match options.mode {
            Mode::Text => text::recorded(&interval),
            // What was not recorded has no figures, and zero is one.
            Mode::Json | Mode::Csv if interval.is_gap() => continue,
            Mode::Json => json::interval(&interval),
            Mode::Csv => csv::interval(&interval),
        };
        out.write_all(text.as_bytes())?;
        out.flush()?;
        if options.once {
            return Ok(());
        }
    }
}

/// The next sample, or `None` at the end; a node that is away is waited for, and that is said once.
async fn next(source: &mut Source, once: bool) -> Result<Option<Sample>, Failure> {
    const RETRY: Duration = Duration::from_secs(1);
    let mut said = false;
    loop {
        match source.next().await {
            Ok(sample) => return Ok(sample),
            Err(error @ ClientError::Unreachable { .. }) if !once => {
                if !said {
                    // Standard error being closed changes nothing.
                    let _ = writeln!(io::stderr(), "weft: {error}; waiting for it");
                    said = true;
                }
                time::sleep(RETRY).await;
            }
            // It went away while it answered; the next try says whether it is back.
            Err(ClientError::Broken(_)) if !once && matches!(source, Source::Live(_)) => {
                time::sleep(RETRY).await;
            }
            Err(error) => return Err(Failure::Node(error)),
        }
    }
}
