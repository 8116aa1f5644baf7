//! Long work as *tasks*: what is under way, how far it is, and how it ended.
//!
//! Whoever does the work starts a task, says how far it is and how it ended; the API, the console
//! and metrics only read. So the progress and the remaining time of a task are computed here and
//! nowhere else. Tasks live in RAM: ids carry the pod's epoch, so that a client which waits for
//! one across a restart is told that it is gone, and not of another.
//!
//! # Invariants
//! * At most one task of a kind is running.
//! * All that run are kept, and the newest that ended, so many as `ENDED_MAX` says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use weft_api::Damage;
use weft_api::ScrubStats;
use weft_api::Task;
use weft_api::TaskKind;
use weft_api::TaskState;
use weft_api::TaskUnit;

use crate::env::EnvRef;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Tasks kept after they ended. Arbitrary: a screenful.
const ENDED_MAX: usize = 20;
/// The time from which the rate of a task is taken.
const RATE_WINDOW: Duration = Duration::from_secs(60);
/// Readings of its progress are at least so far apart; also the shortest time that tells a rate.
const RATE_STEP: Duration = Duration::from_secs(1);

/// The tasks of one pod.
pub struct Tasks {
    env: EnvRef,
    /// Of the pod; the first half of ids.
    epoch: u64,
    /// Short lock: nothing is awaited while it is held, and nothing else locked.
    state: Mutex<State>,
}

struct State {
    /// Tasks started; the second half of ids.
    started: u64,
    /// Oldest first.
    entries: VecDeque<Entry>,
    /// What scrubs found that have ended.
    scrubbed: ScrubStats,
}

struct Entry {
    task: Task,
    cancelled: bool,
    /// When how much was done, within [`RATE_WINDOW`].
    marks: VecDeque<(Duration, u64)>,
}

impl Entry {
    fn mark(&mut self, now: Duration) {
        if self.marks.back().is_some_and(|(at, _)| now < *at + RATE_STEP) {
            return;
        }
        self.marks.push_back((now, self.task.done));
        while self.marks.len() > 1 && self.marks[0].0 + RATE_WINDOW < now {
            self.marks.pop_front();
        }
    }

    /// The task as it is shown at `now`.
    fn shown(&self, now: Duration) -> Task {
        let eta_s = if self.task.state == TaskState::Running { self.eta_s(now) } else { None };
        Task { eta_s, ..self.task.clone() }
    }

    fn eta_s(&self, now: Duration) -> Option<u64> {
        let (at, done_then) = *self.marks.front()?;
        let took = now.checked_sub(at).filter(|took| *took >= RATE_STEP)?;
        let left = u128::from(self.task.total.saturating_sub(self.task.done));
        let done = u128::from(self.task.done.saturating_sub(done_then));
        let left_ms = (left * took.as_millis()).checked_div(done)?;
        u64::try_from(left_ms.div_ceil(1000)).ok()
    }
}

impl Tasks {
    /// No tasks, of the pod in its `epoch`.
    #[must_use]
    pub fn new(env: EnvRef, epoch: u64) -> Arc<Self> {
        let state = State { started: 0, entries: VecDeque::new(), scrubbed: ScrubStats::default() };
        Arc::new(Self { env, epoch, state: Mutex::new(state) })
    }

    /// Starts a task that has `total` to do.
    ///
    /// # Errors
    /// `Busy` if one of its kind runs, which is named.
    pub fn start(
        self: &Arc<Self>,
        kind: TaskKind,
        unit: TaskUnit,
        total: u64,
    ) -> Result<RunningTask> {
        let mut state = self.state.lock();
        if let Some(id) = state.running(kind) {
            return Err(Error::new(ErrorKind::Busy, "start task").context(format_args!(
                "{kind} {id} is under way already: wait for it with `weft task wait {id}`, or \
                 look at it with `weft task show {id}`"
            )));
        }
        state.started += 1;
        let id = format!("{}-{}", self.epoch, state.started);
        let task = Task {
            id: id.clone(),
            kind,
            state: TaskState::Running,
            started_unix_ms: self.env.unix_ms(),
            finished_unix_ms: None,
            done: 0,
            total,
            unit,
            eta_s: None,
            cancellable: kind == TaskKind::Scrub,
            message: String::new(),
            damage: (kind == TaskKind::Scrub).then(Damage::default),
        };
        let marks = VecDeque::from([(self.env.now(), 0)]);
        state.entries.push_back(Entry { task, cancelled: false, marks });
        Ok(RunningTask { tasks: Arc::clone(self), id })
    }

    /// All that are kept, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Task> {
        let now = self.env.now();
        self.state.lock().entries.iter().map(|entry| entry.shown(now)).collect()
    }

    /// Those under way, oldest first.
    #[must_use]
    pub fn running(&self) -> Vec<Task> {
        let mut tasks = self.list();
        tasks.retain(|task| task.state == TaskState::Running);
        tasks
    }

    /// The task of that id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn find(&self, id: &str) -> Result<Task> {
        let now = self.env.now();
        let state = self.state.lock();
        let entry = state.entries.iter().find(|entry| entry.task.id == id);
        entry.map(|entry| entry.shown(now)).ok_or_else(|| unknown("find task", id))
    }

    /// Cancels a task, which ends soon after.
    ///
    /// # Errors
    /// `NotFound`; `InvalidRequest` if it cannot be cancelled or has ended.
    pub fn cancel(&self, id: &str) -> Result<Task> {
        const OP: &str = "cancel task";
        let refused = |task: &Task, why: &str| {
            let context = format!("{} {id} {why}", task.kind);
            Error::new(ErrorKind::InvalidRequest, OP).context(context)
        };
        let now = self.env.now();
        let mut state = self.state.lock();
        let entry = state.entries.iter_mut().find(|entry| entry.task.id == id);
        let entry = entry.ok_or_else(|| unknown(OP, id))?;
        if entry.task.state != TaskState::Running {
            return Err(refused(&entry.task, "has ended already"));
        }
        if !entry.task.cancellable {
            let why = "puts missing redundancy back and cannot be cancelled: it yields to hosts, \
                       and ends by itself";
            return Err(refused(&entry.task, why));
        }
        entry.cancelled = true;
        entry.task.message = "is being cancelled".to_owned();
        Ok(entry.shown(now))
    }

    /// What scrubs found, the one under way included.
    #[must_use]
    pub fn scrub_stats(&self) -> ScrubStats {
        let state = self.state.lock();
        let running = state.entries.iter().filter(|one| one.task.state == TaskState::Running);
        let mut stats = state.scrubbed;
        for damage in running.filter_map(|entry| entry.task.damage) {
            stats.damage = sum(stats.damage, damage);
        }
        stats
    }
}

impl State {
    fn running(&self, kind: TaskKind) -> Option<&str> {
        let mut tasks = self.entries.iter().map(|entry| &entry.task);
        let running = |task: &&Task| task.kind == kind && task.state == TaskState::Running;
        tasks.find(running).map(|task| task.id.as_str())
    }

    fn entry(&mut self, id: &str) -> Option<&mut Entry> {
        self.entries.iter_mut().rev().find(|entry| entry.task.id == id)
    }

    /// Forgets the oldest of those that ended, if there are too many.
    fn forget(&mut self) {
        let ended = |entry: &Entry| entry.task.state != TaskState::Running;
        while self.entries.iter().filter(|entry| ended(entry)).count() > ENDED_MAX {
            let oldest = self.entries.iter().position(ended);
            oldest.and_then(|at| self.entries.remove(at));
        }
    }
}

fn unknown(op: &'static str, id: &str) -> Error {
    Error::new(ErrorKind::NotFound, op).context(format_args!(
        "there is no task '{}': a node keeps the last {ENDED_MAX} until it stops",
        id.escape_debug()
    ))
}

fn sum(a: Damage, b: Damage) -> Damage {
    Damage {
        verified: a.verified + b.verified,
        found: a.found + b.found,
        healed: a.healed + b.healed,
        left: a.left + b.left,
    }
}

/// A task in the hands of who does it. Dropped before it is finished, it has failed.
pub struct RunningTask {
    tasks: Arc<Tasks>,
    id: String,
}

impl RunningTask {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Says how far it is.
    pub fn progress(&self, done: u64, total: u64) {
        let now = self.tasks.env.now();
        self.change(|entry| {
            (entry.task.done, entry.task.total) = (done, total);
            entry.mark(now);
        });
    }

    /// Says what is in its way; nothing, if empty.
    pub fn say(&self, message: &str) {
        self.change(|entry| message.clone_into(&mut entry.task.message));
    }

    /// Says what a scrub has found so far.
    pub fn found(&self, damage: Damage) {
        self.change(|entry| entry.task.damage = Some(damage));
    }

    /// Whether someone wants it to end.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        let mut state = self.tasks.state.lock();
        state.entry(&self.id).is_none_or(|entry| entry.cancelled)
    }

    /// It ended like this.
    pub fn finish(self, state: TaskState, message: &str) {
        self.end(state, message);
    }

    fn change(&self, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.tasks.state.lock().entry(&self.id) {
            change(entry);
        }
    }

    fn end(&self, ended: TaskState, message: &str) {
        let unix_ms = self.tasks.env.unix_ms();
        let mut state = self.tasks.state.lock();
        let Some(entry) = state.entry(&self.id) else { return };
        if entry.task.state != TaskState::Running {
            return;
        }
        entry.task.state = ended;
        entry.task.finished_unix_ms = Some(unix_ms);
        message.clone_into(&mut entry.task.message);
        if let Some(damage) = entry.task.damage {
            state.scrubbed.damage = sum(state.scrubbed.damage, damage);
            if ended == TaskState::Done {
                state.scrubbed.done_unix_ms = Some(unix_ms);
            }
        }
        state.forget();
    }
}

impl Drop for RunningTask {
    fn drop(&mut self) {
        self.end(TaskState::Failed, "it was cut short");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Clock;
    use crate::env::sim::SimEnv;

    fn tasks() -> (Arc<SimEnv>, Arc<Tasks>) {
        let env = SimEnv::new(1);
        (Arc::clone(&env), Tasks::new(env, 7))
    }

    fn wait(env: &Arc<SimEnv>, seconds: u64) {
        let sleep = env.sleep(Duration::from_secs(seconds));
        env.run(sleep);
    }

    #[test]
    fn the_time_left_follows_from_the_last_minute() {
        let (env, tasks) = tasks();
        let running = tasks.start(TaskKind::Rebuild, TaskUnit::Segments, 1000).expect("started");
        assert_eq!(tasks.list()[0].eta_s, None, "nothing is known yet");
        for second in 1..=100 {
            wait(&env, 1);
            running.progress(second, 1000);
        }
        assert_eq!(tasks.list()[0].eta_s, Some(900), "one a second");
        for second in 1..=80 {
            wait(&env, 1);
            running.progress(100 + 5 * second, 1000);
        }
        assert_eq!(tasks.list()[0].eta_s, Some(100), "five a second, and what was before is over");
        running.finish(TaskState::Done, "");
        assert_eq!(tasks.list()[0].eta_s, None);
    }

    #[test]
    fn one_of_a_kind_runs_and_the_second_is_told_which() {
        let (_env, tasks) = tasks();
        let first = tasks.start(TaskKind::Scrub, TaskUnit::Bytes, 1).expect("started");
        let refused = tasks.start(TaskKind::Scrub, TaskUnit::Bytes, 1).err().expect("refused");
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.chain().contains("7-1"), "{}", refused.chain());
        tasks.start(TaskKind::Rebuild, TaskUnit::Segments, 1).expect("another kind");
        first.finish(TaskState::Done, "");
        tasks.start(TaskKind::Scrub, TaskUnit::Bytes, 1).expect("the first has ended");
    }

    #[test]
    fn a_scrub_is_cancelled_once_and_a_rebuild_never() {
        let (_env, tasks) = tasks();
        let scrub = tasks.start(TaskKind::Scrub, TaskUnit::Bytes, 1).expect("started");
        let rebuild = tasks.start(TaskKind::Rebuild, TaskUnit::Segments, 1).expect("started");
        assert!(!scrub.is_cancelled());
        assert_eq!(tasks.cancel(scrub.id()).expect("cancelled").state, TaskState::Running);
        assert!(scrub.is_cancelled());
        let refused = tasks.cancel(rebuild.id()).expect_err("a rebuild");
        assert_eq!(refused.kind(), ErrorKind::InvalidRequest);
        let id = scrub.id().to_owned();
        scrub.finish(TaskState::Cancelled, "");
        assert_eq!(tasks.cancel(&id).expect_err("ended").kind(), ErrorKind::InvalidRequest);
        assert_eq!(tasks.cancel("7-9").expect_err("unknown").kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_dropped_has_failed_and_only_the_newest_are_kept() {
        let (_env, tasks) = tasks();
        let kept = tasks.start(TaskKind::Rebuild, TaskUnit::Segments, 1).expect("started");
        for _ in 0..ENDED_MAX + 5 {
            drop(tasks.start(TaskKind::Scrub, TaskUnit::Bytes, 1).expect("started"));
        }
        let all = tasks.list();
        assert_eq!(all.len(), ENDED_MAX + 1);
        assert_eq!(all[0].id, kept.id(), "what runs is kept");
        assert!(all[1..].iter().all(|task| task.state == TaskState::Failed));
        assert_eq!(tasks.running().len(), 1);
    }

    #[test]
    fn scrubs_are_counted_together() {
        let (_env, tasks) = tasks();
        for _ in 0..2 {
            let scrub = tasks.start(TaskKind::Scrub, TaskUnit::Bytes, 1).expect("started");
            scrub.found(Damage { verified: 5, found: 2, healed: 1, left: 1 });
            scrub.finish(TaskState::Done, "");
        }
        let scrub = tasks.start(TaskKind::Scrub, TaskUnit::Bytes, 1).expect("started");
        scrub.found(Damage { verified: 5, ..Damage::default() });
        let stats = tasks.scrub_stats();
        assert_eq!(stats.damage, Damage { verified: 15, found: 4, healed: 2, left: 2 });
        assert!(stats.done_unix_ms.is_some());
    }
}
