//! `weft` without a command: start the node, say what it serves, stop it when told to.

use std::io;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process;
use tokio::runtime;
use tokio::signal::unix::Signal;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::time;
use weft_tui::Left;

use super::ServeArguments;
use super::banner;
use super::exit::FAILED;
use super::exit::Failure;
use super::output;
use super::top;
use crate::node::Node;
use crate::node::config::Config;
use crate::node::config::Overrides;
use crate::node::notify;
use crate::node::start_log;
use crate::node::start_log_file;

/// The exit code of a node that was told twice to stop: 128 and SIGINT, as shells have it.
const STOPPED_HARD: i32 = 130;

/// How long the console may take to give the terminal back when the node stops.
const CONSOLE_LEAVE_TIME_MAX: Duration = Duration::from_secs(2);

/// Runs a node until it is told to stop.
pub(super) fn run(data_dir: Option<PathBuf>, arguments: ServeArguments) -> Result<(), Failure> {
    let overrides = Overrides {
        data_dir,
        nbd: arguments.nbd,
        nvme_tcp: arguments.nvme_tcp,
        log_level: arguments.log,
        replace_missing: arguments.replace_missing,
        force_open: arguments.force_open,
    };
    let config = Config::load(arguments.config.as_deref(), overrides)?;
    let console = match arguments.tui {
        true => Some(top::own_console(arguments.look, &config.api_socket)?),
        false => None,
    };
    match &console {
        Some(_) => {
            start_log_file(&config.log, &config.data_dir).map_err(Failure::of_start)?;
        }
        None => start_log(&config.log)?,
    }
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failure("start a runtime", &error))?;
    let served = runtime.block_on(serve(config, console));
    // Not for files that somebody still waits for: they may be on a network that is gone.
    runtime.shutdown_background();
    served
}

async fn serve(config: Config, console: Option<weft_tui::Options>) -> Result<(), Failure> {
    // A file that would be longer than may be (RLIMIT_FSIZE) would end the process without a word. With
    // the signal heard, though by nobody, it is an error where the file is written.
    let too_long = signal(SignalKind::from_raw(process::Signal::XFSZ.as_raw()));
    drop(too_long.map_err(|error| failure("listen for signals", &error))?);
    let node = Node::start(config).await.map_err(Failure::of_start)?;
    let mut signals = Signals::listen()?;
    let status = node.management().status();
    output::print(&banner::text(&status, &node.management().volumes()))?;
    notify("READY=1");

    let name = match console {
        Some(options) => until_left(options, &mut signals, &node).await?,
        None => signals.until_stop(&node).await,
    };
    tracing::info!(signal = name, "stopping; SIGINT or SIGTERM stops at once");
    notify("STOPPING=1");
    let hard_stop = tokio::spawn(async move {
        let name = signals.next_of_intent().await;
        tracing::warn!(
            signal = name,
            "stopped at once; nothing acknowledged is lost but what a write cache had not flushed"
        );
        std::process::exit(STOPPED_HARD);
    });
    let stopped = node.stop().await;
    hard_stop.abort();
    stopped?;
    tracing::info!("stopped");
    Ok(())
}

/// Shows the console until the node is to stop; says what stops it.
async fn until_left(
    options: weft_tui::Options,
    signals: &mut Signals,
    node: &Node,
) -> Result<&'static str, Failure> {
    let mut left = top::start_own_console(options)?;
    let left = tokio::select! {
        biased;
        name = signals.until_stop(node) => {
            // The console has the signal too, and gives the terminal back.
            let _ = time::timeout(CONSOLE_LEAVE_TIME_MAX, left).await;
            return Ok(name);
        }
        left = &mut left => left,
    };
    match left {
        Ok(Ok(Left::StopNode)) => return Ok("console"),
        // Its terminal was closed.
        Ok(Ok(Left::Signal)) => return Ok("SIGHUP or SIGQUIT"),
        Ok(Ok(Left::KeepNode | Left::Quit)) => {}
        // Hosts are served all the same.
        Ok(Err(failure)) => output::complain(&failure.message),
        Err(_) => output::complain("the console ended"),
    }
    output::print("The node goes on, and logs to weft.log in its directory. Ctrl-C stops it.\n")?;
    Ok(signals.until_stop(node).await)
}

/// SIGINT, SIGTERM and SIGHUP.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    /// Whether the node was started on a terminal: SIGHUP then says that the terminal is gone.
    on_terminal: bool,
}

/// What a signal is for.
enum Told {
    /// Its name.
    Stop(&'static str),
    Reload,
}

impl Signals {
    /// From here on the signals no longer end the process by themselves. Before, they do, and that
    /// loses nothing either.
    fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| failure("listen for signals", &error));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            // Once it is gone, nobody can tell any more.
            on_terminal: io::stdin().is_terminal()
                || io::stdout().is_terminal()
                || io::stderr().is_terminal(),
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            biased;
            _ = self.interrupt.recv() => Told::Stop("SIGINT"),
            _ = self.terminate.recv() => Told::Stop("SIGTERM"),
            _ = self.hangup.recv() => match self.on_terminal {
                true => Told::Stop("SIGHUP"),
                false => Told::Reload,
            },
        }
    }

    /// Waits for the next that somebody meant, and returns its name. SIGHUP may be nobody's: when a
    /// terminal is closed, the shell sends one and the kernel another.
    async fn next_of_intent(&mut self) -> &'static str {
        tokio::select! {
            biased;
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }

    /// Waits for the next that is to stop a node that runs, which meanwhile does what the others ask
    /// for.
    async fn until_stop(&mut self, node: &Node) -> &'static str {
        loop {
            match self.next().await {
                Told::Stop(name) => return name,
                Told::Reload => {
                    tokio::select! {
                        biased;
                        // A file may be where reading never ends. Nothing is replaced then, as that
                        // comes after all was read.
                        name = self.next_of_intent() => return name,
                        // A failure is an event.
                        _ = node.reload() => {}
                    }
                }
            }
        }
    }
}

fn failure(op: &str, error: &io::Error) -> Failure {
    Failure { code: FAILED, message: format!("{op}: {error}") }
}

#[cfg(test)]
mod tests {
    use rustix::process::getpid;
    use rustix::process::kill_process;

    use super::*;

    #[test]
    fn a_terminal_that_is_closed_stops_a_node_and_does_not_stop_it_at_once() {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("runtime").block_on(async {
            let Ok(mut signals) = Signals::listen() else { panic!("signals can be listened for") };
            signals.on_terminal = true;
            let send = |signal| kill_process(getpid(), signal).expect("our own process");
            send(process::Signal::HUP);
            assert!(matches!(signals.next().await, Told::Stop("SIGHUP")));
            send(process::Signal::HUP);
            let at_once = time::timeout(Duration::from_millis(200), signals.next_of_intent());
            assert!(at_once.await.is_err());
            send(process::Signal::TERM);
            assert_eq!(signals.next_of_intent().await, "SIGTERM");
        });
    }
}
