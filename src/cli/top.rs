//! `weft top`, and the console of `weft --tui`: both are the crate `weft-tui`, a client of the API.

use std::io;
use std::io::IsTerminal;
use std::path::Path;
use std::thread;
use std::time::Duration;

use clap::Args;
use clap::ValueEnum;
use tokio::runtime;
use tokio::sync::oneshot;
use weft_api::Client;
use weft_tui::Left;
use weft_tui::When;
use weft_tui::plain;

use super::LookArguments;
use super::exit::FAILED;
use super::exit::Failure;
use super::exit::USAGE;

/// Seconds between two readings unless said otherwise.
const INTERVAL_S_DEFAULT: u64 = 1;

/// Where a replay begins unless said otherwise: ten minutes ago.
const REPLAY_FROM_DEFAULT: When = When::Ago(600);

/// How to watch.
#[derive(Debug, Args)]
pub(super) struct TopArguments {
    /// Print instead of opening the console; text where standard output is no terminal. csv has a
    /// header, then for each interval a row for the pod and one for each volume
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Print one interval and leave: two readings are taken, an interval apart
    #[arg(long)]
    once: bool,
    /// Seconds between two readings when printing, 1 to 3600 [default: 1]. The console's is 1
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: Option<u64>,
    /// Show what the node has recorded instead of what is: a second apart for the last hour, ten for
    /// the last week. space stops and goes on, [ ] { } step, :speed 10 and :goto 14:03 too
    #[arg(long)]
    replay: bool,
    /// Where the replay begins: '20m ago', 2h, 7d, 14:03 or 2026-11-21T14:03:00Z, in UTC
    /// [default: 10m ago]
    #[arg(short, long, value_name = "TIME", requires = "replay", value_parser = When::parse)]
    time: Option<When>,
    /// Print the replay up to this time [default: now]
    #[arg(long, value_name = "TIME", requires = "replay", value_parser = When::parse)]
    until: Option<When>,
    #[command(flatten)]
    look: LookArguments,
}

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// A table for each interval
    Text,
    /// One object a line for each interval; latencies in nanoseconds
    Json,
    /// Comma-separated values; latencies in nanoseconds
    Csv,
}

impl TopArguments {
    /// How to print; `None` to open the console.
    fn printed(&self, terminal: bool) -> Option<plain::Mode> {
        match self.mode {
            Some(Mode::Text) => Some(plain::Mode::Text),
            Some(Mode::Json) => Some(plain::Mode::Json),
            Some(Mode::Csv) => Some(plain::Mode::Csv),
            // Neither makes sense with a console.
            None if self.once || self.interval.is_some() || self.until.is_some() => {
                Some(plain::Mode::Text)
            }
            None => (!terminal).then_some(plain::Mode::Text),
        }
    }

    /// Where a replay begins; `None` to show what is.
    fn replayed(&self) -> Option<When> {
        self.replay.then(|| self.time.unwrap_or(REPLAY_FROM_DEFAULT))
    }
}

/// Watches the node that `node` asks.
pub(super) fn run(arguments: TopArguments, node: Client) -> Result<(), Failure> {
    let runtime = runtime()?;
    let Some(mode) = arguments.printed(io::stdout().is_terminal()) else {
        let replay = arguments.replayed();
        let options = weft_tui::Options { replay, ..options(arguments.look, node, false) };
        return match runtime.block_on(weft_tui::run(options))? {
            Left::Quit | Left::StopNode | Left::KeepNode => Ok(()),
            Left::Signal => Err(failed("a signal ended the console")),
        };
    };
    let interval = Duration::from_secs(arguments.interval.unwrap_or(INTERVAL_S_DEFAULT));
    let until = arguments.until.unwrap_or(When::Ago(0));
    let replay = arguments.replayed().map(|from| plain::Span { from, until });
    let once = arguments.once;
    let options = plain::Options { node, mode, once, interval, replay };
    Ok(runtime.block_on(plain::print(&options))?)
}

/// What the console of the node of this process is to be like.
///
/// # Errors
/// There is no terminal, or the theme is wrong: better known before the node starts.
pub(super) fn own_console(
    look: LookArguments,
    socket: &Path,
) -> Result<weft_tui::Options, Failure> {
    let options = options(look, Client::new(socket), true);
    weft_tui::check(&options)?;
    Ok(options)
}

/// Runs the console on a thread and a runtime of its own, so that a terminal that does not take
/// what is written cannot hold up the node. The receiver gets how it was left.
pub(super) fn start_own_console(
    options: weft_tui::Options,
) -> Result<oneshot::Receiver<Result<Left, Failure>>, Failure> {
    let (sender, left) = oneshot::channel();
    let runtime = runtime()?;
    let work = move || {
        let done = runtime.block_on(weft_tui::run(options)).map_err(Failure::from);
        // Nobody listens any more when the node has stopped meanwhile.
        let _ = sender.send(done);
    };
    let started = thread::Builder::new().name("console".to_owned()).spawn(work);
    started.map_err(|error| failed(&format!("start the console's thread: {error}")))?;
    Ok(left)
}

fn options(look: LookArguments, node: Client, own_node: bool) -> weft_tui::Options {
    let LookArguments { ascii, theme } = look;
    weft_tui::Options { node, ascii, theme, own_node, replay: None }
}

fn runtime() -> Result<runtime::Runtime, Failure> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| failed(&format!("start a runtime: {error}")))
}

fn failed(message: &str) -> Failure {
    Failure { code: FAILED, message: message.to_owned() }
}

impl From<weft_tui::Failure> for Failure {
    fn from(failure: weft_tui::Failure) -> Self {
        match failure {
            weft_tui::Failure::Node(error) => error.into(),
            weft_tui::Failure::Theme(message) => Self { code: USAGE, message },
            weft_tui::Failure::Io(_) => failed(&failure.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn the_console_opens_on_a_terminal_only() {
        let arguments = |mode, once, interval| TopArguments {
            mode,
            once,
            interval,
            replay: false,
            time: None,
            until: None,
            look: LookArguments { ascii: false, theme: None },
        };
        assert_eq!(arguments(None, false, None).printed(true), None);
        assert_eq!(arguments(None, false, None).printed(false), Some(plain::Mode::Text));
        assert_eq!(arguments(None, true, None).printed(true), Some(plain::Mode::Text));
        assert_eq!(arguments(None, false, Some(5)).printed(true), Some(plain::Mode::Text));
        assert_eq!(arguments(Some(Mode::Csv), false, None).printed(true), Some(plain::Mode::Csv));
    }

    #[test]
    fn times_go_with_a_replay_only() {
        #[derive(Debug, Parser)]
        struct Whole {
            #[command(flatten)]
            top: TopArguments,
        }
        let read = |line: &str| {
            let words =
                std::iter::once("top").chain(line.split('|').filter(|word| !word.is_empty()));
            Whole::try_parse_from(words).map(|whole| whole.top)
        };
        assert_eq!(read("").expect("live").replayed(), None);
        assert_eq!(read("--replay").expect("default").replayed(), Some(When::Ago(600)));
        let replay = read("--replay|-t|20m ago").expect("as in the manual");
        assert_eq!(replay.replayed(), Some(When::Ago(1200)));
        assert_eq!(replay.printed(true), None);
        let part = read("--replay|--time|14:03|--until|now").expect("a part");
        assert_eq!(part.printed(true), Some(plain::Mode::Text));
        assert!(read("-t|20m").is_err() && read("--until|now").is_err());
        assert!(read("--replay|-t|yesterday").is_err());
    }
}
