//! Long work of a node: started, watched, waited for, cancelled.
//!
//! Progress goes to standard error: a line that is drawn anew if that is a terminal, else a line
//! now and then. The task as it ended goes to standard output, in the format asked for.

use std::io;
use std::io::IsTerminal;
use std::io::Write;
use std::time::Duration;

use tokio::signal;
use tokio::time;
use tokio::time::Instant;
use weft_api::Client;
use weft_api::Damage;
use weft_api::Task;
use weft_api::TaskState;
use weft_api::TaskUnit;
use weft_api::format_rfc3339;

use super::OutputArguments;
use super::TaskCommand;
use super::admin::ask;
use super::admin::format_duration;
use super::exit::FAILED;
use super::exit::Failure;
use super::output::Table;
use super::output::facts;
use super::output::show;
use crate::units::format_size;

/// How often a task that is waited for is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How often its progress is said where it cannot be drawn.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Width of the bar.
const BAR_WIDTH: u64 = 24;

/// Runs `weft task`.
pub(super) fn task(command: TaskCommand, node: Client) -> Result<(), Failure> {
    match command {
        TaskCommand::List(output) => {
            let tasks = ask(node, async |client| client.tasks().await)?;
            show(&output, &tasks, |tasks| task_table(tasks))
        }
        TaskCommand::Show { id, output } => {
            let task = ask(node, async |client| client.task(&id).await)?;
            show(&output, &task, task_text)
        }
        TaskCommand::Wait { id, output } => {
            let waited = ask(node, async |client| Ok(wait(&client, &id).await))?;
            ended(&waited?, &output)
        }
        TaskCommand::Cancel { id, output } => {
            let task = ask(node, async |client| client.cancel_task(&id).await)?;
            show(&output, &task, |task| format!("{} {} is being cancelled\n", task.kind, task.id))
        }
    }
}

/// Runs `weft pod scrub`.
pub(super) fn scrub(wait: bool, output: &OutputArguments, node: Client) -> Result<(), Failure> {
    if !wait {
        let task = ask(node, async |client| client.start_scrub().await)?;
        return show(output, &task, |task| {
            format!("scrub {} started: `weft task wait {}` shows how far it is\n", task.id, task.id)
        });
    }
    let waited = ask(node, async |client| {
        let task = client.start_scrub().await?;
        Ok(self::wait(&client, &task.id).await)
    })?;
    ended(&waited?, output)
}

/// Prints how a task ended, which decides how the command does.
fn ended(task: &Task, output: &OutputArguments) -> Result<(), Failure> {
    show(output, task, task_text)?;
    if task.succeeded() {
        return Ok(());
    }
    let what = match task.state {
        TaskState::Done => "left damage that it could not heal: see `weft event list`",
        TaskState::Cancelled => "was cancelled",
        TaskState::Failed | TaskState::Running | TaskState::Unknown => "failed",
    };
    let message = format!("{} {} {what}", task.kind, task.id);
    Err(Failure { code: FAILED, message })
}

/// Waits until the task has ended; progress goes to standard error.
///
/// # Errors
/// The node does not answer or does not know the task; or the user would not wait.
async fn wait(client: &Client, id: &str) -> Result<Task, Failure> {
    let mut progress = Progress::new();
    let mut interrupted = std::pin::pin!(signal::ctrl_c());
    loop {
        let task = client.task(id).await;
        let task = task.inspect_err(|_| progress.clear())?;
        if task.state != TaskState::Running {
            progress.clear();
            return Ok(task);
        }
        progress.say(&task);
        tokio::select! {
            biased;
            _ = &mut interrupted => {
                progress.clear();
                return Err(goes_on(&task));
            }
            () = time::sleep(LOOK_INTERVAL) => {}
        }
    }
}

fn goes_on(task: &Task) -> Failure {
    let Task { kind, id, .. } = task;
    let cancel =
        if task.cancellable { format!("; `weft task cancel {id}` ends it") } else { String::new() };
    let message =
        format!("{kind} {id} goes on without you: `weft task wait {id}` waits again{cancel}");
    Failure { code: FAILED, message }
}

/// Progress on standard error.
struct Progress {
    terminal: bool,
    /// Characters of the line that is drawn now.
    drawn: usize,
    /// When it was last said in a line of its own.
    said: Option<Instant>,
}

impl Progress {
    fn new() -> Self {
        Self { terminal: io::stderr().is_terminal(), drawn: 0, said: None }
    }

    /// Says how far the task is. Standard error being closed changes nothing.
    fn say(&mut self, task: &Task) {
        let line = progress_line(task, self.terminal);
        if self.terminal {
            let width = self.drawn;
            self.drawn = line.chars().count();
            let _ = write!(io::stderr(), "\r{line:<width$}");
            let _ = io::stderr().flush();
        } else if self.said.is_none_or(|said| said.elapsed() >= LINE_INTERVAL) {
            self.said = Some(Instant::now());
            let _ = writeln!(io::stderr(), "{line}");
        }
    }

    /// Takes the line that is drawn away again.
    fn clear(&mut self) {
        if self.drawn > 0 {
            let _ = write!(io::stderr(), "\r{:width$}\r", "", width = self.drawn);
            self.drawn = 0;
        }
    }
}

/// `scrub 7-1 [#####.....]  42 %, 3.1 GiB of 7.4 GiB, 2 min 3 s left`; the bar only if it is wanted.
fn progress_line(task: &Task, bar: bool) -> String {
    let percent = task.percent();
    let bar = match bar {
        true => {
            let full = percent * BAR_WIDTH / 100;
            let cell = |at| if at < full { '#' } else { '.' };
            format!(" [{}]", (0..BAR_WIDTH).map(cell).collect::<String>())
        }
        false => String::new(),
    };
    let left = task.eta_s.map(|eta_s| format!(", {} left", format_duration(eta_s)));
    let found = task
        .damage
        .filter(|damage| damage.found > 0)
        .map(|damage| format!(", {} damaged, {} healed", damage.found, damage.healed));
    let said = Some(&task.message).filter(|said| !said.is_empty()).map(|said| format!(", {said}"));
    let more: String = [left, found, said].into_iter().flatten().collect();
    format!("{} {}{bar} {percent:>3} %, {}{more}", task.kind, task.id, amount(task))
}

fn amount(task: &Task) -> String {
    match task.unit {
        TaskUnit::Bytes => format!("{} of {}", format_size(task.done), format_size(task.total)),
        TaskUnit::Segments | TaskUnit::Unknown => {
            format!("{} of {} {}", task.done, task.total, task.unit)
        }
    }
}

fn task_table(tasks: &[Task]) -> String {
    let header = ["TASK", "KIND", "STATE", "STARTED", "DONE", "LEFT", "MESSAGE"];
    let mut table = Table::new(&header, &[4, 5]);
    for task in tasks {
        table.row(vec![
            task.id.clone(),
            task.kind.to_string(),
            task.state.to_string(),
            format_rfc3339(task.started_unix_ms),
            format!("{} %", task.percent()),
            task.eta_s.map(format_duration).unwrap_or_default(),
            task.message.clone(),
        ]);
    }
    table.text()
}

fn task_text(task: &Task) -> String {
    let mut lines = vec![
        ("task", task.id.clone()),
        ("kind", task.kind.to_string()),
        ("state", task.state.to_string()),
        ("started", format_rfc3339(task.started_unix_ms)),
    ];
    if let Some(finished) = task.finished_unix_ms {
        lines.push(("ended", format_rfc3339(finished)));
        let took_s = finished.saturating_sub(task.started_unix_ms) / 1000;
        lines.push(("took", format_duration(took_s)));
    }
    lines.push(("done", format!("{} %, {}", task.percent(), amount(task))));
    if let Some(eta_s) = task.eta_s {
        lines.push(("left", format_duration(eta_s)));
    }
    if let Some(Damage { verified, found, healed, left }) = task.damage {
        lines.push(("verified", format!("{verified} units of 64 KiB")));
        let damaged = format!("{found} found, {healed} healed, {left} left");
        lines.push(("damaged", damaged));
    }
    if !task.message.is_empty() {
        lines.push(("message", task.message.clone()));
    }
    facts(&lines)
}

#[cfg(test)]
mod tests {
    use weft_api::TaskKind;

    use super::*;

    fn scrub() -> Task {
        Task {
            id: "7-1".to_owned(),
            kind: TaskKind::Scrub,
            state: TaskState::Running,
            started_unix_ms: 0,
            finished_unix_ms: None,
            done: 1 << 20,
            total: 4 << 20,
            unit: TaskUnit::Bytes,
            eta_s: Some(63),
            cancellable: true,
            message: String::new(),
            damage: Some(Damage { verified: 16, found: 2, healed: 2, left: 0 }),
        }
    }

    #[test]
    fn progress_is_a_line_with_and_without_a_bar() {
        let plain = "scrub 7-1  25 %, 1 MiB of 4 MiB, 1 min 3 s left, 2 damaged, 2 healed";
        assert_eq!(progress_line(&scrub(), false), plain);
        let bar = "scrub 7-1 [######..................]  25 %, 1 MiB of 4 MiB";
        assert!(progress_line(&scrub(), true).starts_with(bar));
        let task = Task { unit: TaskUnit::Segments, eta_s: None, damage: None, ..scrub() };
        let line = progress_line(&Task { done: 3, total: 9, ..task }, false);
        assert_eq!(line, "scrub 7-1  33 %, 3 of 9 segments");
    }

    #[test]
    fn who_would_not_wait_is_told_that_it_goes_on() {
        let message = goes_on(&scrub()).message;
        assert!(message.contains("goes on") && message.contains("weft task cancel 7-1"));
        let rebuild = Task { cancellable: false, ..scrub() };
        assert!(!goes_on(&rebuild).message.contains("cancel"));
    }
}
