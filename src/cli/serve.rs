//! `weft` without a command: start the node, say what it serves, stop it when told to.

use std::path::PathBuf;

use tokio::runtime;
use tokio::signal::unix::Signal;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;

use super::ServeArguments;
use super::banner;
use super::exit::FAILED;
use super::exit::Failure;
use super::output;
use crate::node::Node;
use crate::node::config::Config;
use crate::node::config::Overrides;
use crate::node::notify;
use crate::node::start_log;

/// The exit code of a node that was told twice to stop: 128 and SIGINT, as shells have it.
const STOPPED_HARD: i32 = 130;

/// Runs a node until it is told to stop.
pub(super) fn run(data_dir: Option<PathBuf>, arguments: ServeArguments) -> Result<(), Failure> {
    let overrides = Overrides {
        data_dir,
        nbd: arguments.nbd,
        nvme_tcp: arguments.nvme_tcp,
        log_level: arguments.log,
        replace_missing: arguments.replace_missing,
    };
    let config = Config::load(arguments.config.as_deref(), overrides)?;
    start_log(&config.log)?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failure("start a runtime", &error))?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<(), Failure> {
    let node = Node::start(config).await?;
    let mut stop = StopSignals::listen()?;
    let status = node.management().status();
    output::print(&banner::text(&status, &node.management().volumes()))?;
    notify("READY=1");

    let name = stop.next().await;
    tracing::info!(signal = name, "stopping; once more stops at once");
    notify("STOPPING=1");
    let hard_stop = tokio::spawn(async move {
        let name = stop.next().await;
        tracing::warn!(signal = name, "stopped at once; nothing acknowledged is lost");
        std::process::exit(STOPPED_HARD);
    });
    let stopped = node.stop().await;
    hard_stop.abort();
    stopped?;
    tracing::info!("stopped");
    Ok(())
}

/// SIGINT and SIGTERM.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// From here on the signals no longer end the process by themselves. Before, they do, and that
    /// loses nothing either.
    fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| failure("listen for signals", &error));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// Waits for the next of them and returns its name.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            biased;
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

fn failure(op: &str, error: &std::io::Error) -> Failure {
    Failure { code: FAILED, message: format!("{op}: {error}") }
}
