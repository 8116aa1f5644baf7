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
use crate::model::interval::Interval;
use crate::source::Source;

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
}

/// Prints intervals to standard output, the first after one interval, until nobody reads them.
///
/// # Errors
/// No node answers when it is first asked, or with `once`; later it is waited for. Or standard
/// output cannot be written.
pub async fn print(options: &Options) -> Result<(), Failure> {
    let mut source = Source::live(options.node.clone());
    let printed = print_from(&mut source, options, &mut io::stdout()).await;
    match printed {
        Err(Failure::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// [`print()`] from any source to any writer.
///
/// # Errors
/// As [`print()`]; a recording ends in [`ClientError::Broken`] unless only one interval is printed.
pub async fn print_from(
    source: &mut Source,
    options: &Options,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let mut ticks = time::interval_at(Instant::now() + options.interval, options.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = source.next().await.map_err(Failure::Node)?;
    if options.mode == Mode::Csv {
        writeln!(out, "{}", csv::HEADER)?;
        out.flush()?;
    }
    loop {
        ticks.tick().await;
        let now = next(source, options.once).await?;
        let earlier = (&before.stats, before.connections.as_slice());
        let interval = Interval::between(Some(earlier), &now.stats, &now.connections);
        let text = match options.mode {
            Mode::Text => text::interval(&interval),
            Mode::Json => json::interval(&interval),
            Mode::Csv => csv::interval(&interval),
        };
        out.write_all(text.as_bytes())?;
        out.flush()?;
        if options.once {
            return Ok(());
        }
        before = now;
    }
}

/// The next sample; a node that is away is waited for, and that is said once.
async fn next(source: &mut Source, once: bool) -> Result<Sample, Failure> {
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
