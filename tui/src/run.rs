//! The terminal: taken, fed with pictures and keys, and given back however this ends.
//!
//! The node is asked on a task of its own, so that a node that does not answer holds up neither keys
//! nor drawing. The release build aborts on panic, so the terminal is given back in a panic hook;
//! everything else ends in [`Taken`]'s drop.

use std::io;
use std::io::IsTerminal;
use std::io::Stdout;
use std::panic;
use std::path::PathBuf;
use std::sync::Once;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossterm::cursor::Show;
use crossterm::event::Event;
use crossterm::event::EventStream;
use crossterm::execute;
use crossterm::terminal::EnterAlternateScreen;
use crossterm::terminal::LeaveAlternateScreen;
use crossterm::terminal::disable_raw_mode;
use crossterm::terminal::enable_raw_mode;
use futures_util::StreamExt;
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use tokio::signal::unix::Signal;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::time;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use weft_api::Client;
use weft_api::ClientError;

use crate::Failure;
use crate::app::Action;
use crate::app::App;
use crate::app::Left;
use crate::feed::Answer;
use crate::feed::Feed;
use crate::recording::Recording;
use crate::replay::Replay;
use crate::screens;
use crate::source::Source;
use crate::theme::Look;
use crate::theme::Surroundings;
use crate::when::When;

/// How long to wait for the first answer before the console opens without one.
const FIRST_ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// How often the picture is drawn anew while nothing happens, for the age of a stale one.
const REDRAW_INTERVAL: Duration = Duration::from_millis(500);
/// The same while a recording is played, which moves on between answers.
const REDRAW_INTERVAL_REPLAY: Duration = Duration::from_millis(200);

/// How to run the console.
#[derive(Clone, Debug)]
pub struct Options {
    /// Asks the node.
    pub node: Client,
    /// Draw with ASCII, whatever the terminal can.
    pub ascii: bool,
    /// A theme file.
    pub theme: Option<PathBuf>,
    /// Whether the node is this process: then leaving asks whether it is to stop.
    pub own_node: bool,
    /// Show what was recorded, from that time on, instead of what is.
    pub replay: Option<When>,
}

/// Says whether the console can be run so, without running it.
///
/// # Errors
/// There is no terminal, or the theme is wrong.
pub fn check(options: &Options) -> Result<(), Failure> {
    look(options).map(drop)
}

fn look(options: &Options) -> Result<Look, Failure> {
    if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        let reason = "the console needs a terminal for its input and output";
        return Err(Failure::Io(io::Error::other(reason)));
    }
    let look = Surroundings::of_process().look(options.ascii, options.theme.as_ref());
    look.map_err(Failure::Theme)
}

/// Runs the console until it is left. Must run within a tokio runtime with I/O and time enabled, on
/// a thread that may wait for the terminal.
///
/// # Errors
/// No node answers, or it records nothing and is to be replayed; the theme is wrong, or the terminal
/// cannot be used.
pub async fn run(options: Options) -> Result<Left, Failure> {
    let look = look(&options)?;
    let app = App::new(look, options.node.endpoint().to_string(), options.own_node);
    let begin = Instant::now();
    let (mut app, feed) = match options.replay {
        None => open_live(app, &options, begin).await?,
        Some(from) => open_replay(app, &options, from).await?,
    };
    let mut signals = Signals::listen()?;
    let terminal = Taken::take()?;
    show(&mut app, terminal, feed, &mut signals, begin).await
}

async fn open_live(
    mut app: App,
    options: &Options,
    begin: Instant,
) -> Result<(App, Feed), Failure> {
    let mut source = Source::live(options.node.clone());
    match time::timeout(FIRST_ANSWER_TIME_MAX, source.next()).await {
        Ok(Ok(sample)) => {
            if let Some(sample) = sample {
                app.sample(sample, since(begin));
            }
        }
        Ok(Err(error @ ClientError::Unreachable { .. })) => return Err(Failure::Node(error)),
        Ok(Err(error)) => app.failed(error.to_string(), since(begin)),
        Err(_) => {}
    }
    Ok((app, Feed::live(source)))
}

/// Asks for the node's time, by which times are meant, and whether anything is recorded.
async fn open_replay(app: App, options: &Options, from: When) -> Result<(App, Feed), Failure> {
    let client = options.node.clone();
    let now_ms = client.stats().await.map_err(Failure::Node)?.unix_ms;
    let recording = Recording::Node(client);
    recording.first(0, u64::MAX).await.map_err(Failure::Node)?;
    let app = app.replaying(Replay::new(from.unix_ms(now_ms), now_ms));
    Ok((app, Feed::replay(recording, now_ms)))
}

async fn show(
    app: &mut App,
    mut terminal: Taken,
    mut feed: Feed,
    signals: &mut Signals,
    begin: Instant,
) -> Result<Left, Failure> {
    let mut events = EventStream::new();
    let period = if app.replay.is_some() { REDRAW_INTERVAL_REPLAY } else { REDRAW_INTERVAL };
    let mut redraw = time::interval(period);
    redraw.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // A thread of the node that panics gives the terminal back: nothing is drawn after that.
        if !TAKEN.load(Ordering::SeqCst) {
            return Ok(Left::Signal);
        }
        feed.ask(app);
        terminal.terminal.draw(|frame| screens::draw(app, frame))?;
        tokio::select! {
            biased;
            () = signals.next() => return Ok(Left::Signal),
            event = events.next() => match event {
                Some(Ok(Event::Key(key))) => match app.key(key) {
                    Action::Draw => {}
                    Action::Leave(left) => return Ok(left),
                },
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(Failure::Io(error)),
                // The terminal is gone.
                None => return Ok(Left::Signal),
            },
            Some(answer) = feed.next() => match answer {
                Answer::Sample(sample) => match *sample {
                    Ok(sample) => app.sample(sample, since(begin)),
                    Err(reason) => app.failed(reason, since(begin)),
                },
                Answer::Loaded(loaded) => app.loaded(loaded, since(begin)),
            },
            _ = redraw.tick() => app.tick(since(begin)),
        }
    }
}

fn since(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Signals that end a console.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            biased;
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
            _ = self.quit.recv() => {}
        }
    }
}

/// Whether the terminal is taken: what the panic hook has to know.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The terminal in raw mode, on its alternate screen; dropping it gives it back.
struct Taken {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Taken {
    fn take() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = panic::take_hook();
            panic::set_hook(Box::new(move |panic| {
                give_back();
                before(panic);
            }));
        });
        TAKEN.store(true, Ordering::SeqCst);
        // From here on dropping `taken` undoes what was done.
        let taken = Self { terminal: Terminal::new(CrosstermBackend::new(io::stdout()))? };
        enable_raw_mode()?;
        execute!(io::stdout(), EnterAlternateScreen)?;
        Ok(taken)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        give_back();
    }
}

/// Gives the terminal back, once. There is nobody to tell if that fails.
fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        let _ = disable_raw_mode();
        let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
    }
}
