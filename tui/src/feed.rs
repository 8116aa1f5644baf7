//! What asks the node while the console draws: tasks of their own, one for what is now and one for
//! what was recorded, so that neither keys nor drawing wait for an answer.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;

use crate::app::App;
use crate::model::Sample;
use crate::recording::Recording;
use crate::recording::Want;
use crate::replay::Loaded;
use crate::source::Source;

/// How often the node is asked.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How often a replay asks for events: those of a recorded time only become fewer.
const EVENTS_INTERVAL: Duration = Duration::from_secs(30);
/// Answers not yet drawn. Drawing keeps up, so this only has to be more than none.
const ANSWERS_WAITING_MAX: usize = 4;

/// What the console is told.
#[derive(Debug)]
pub enum Answer {
    /// A reading of the node, or why there is none.
    Sample(Box<Result<Sample, String>>),
    /// A part of a recording.
    Loaded(Loaded),
}

/// The tasks; dropping it ends them.
#[derive(Debug)]
pub struct Feed {
    answers: mpsc::Receiver<Answer>,
    /// What the console wants to have loaded. Only the latest counts.
    wants: watch::Sender<Option<Want>>,
    _tasks: JoinSet<()>,
}

impl Feed {
    /// Readings of a node.
    pub fn live(source: Source) -> Self {
        let (sender, answers) = mpsc::channel(ANSWERS_WAITING_MAX);
        let mut tasks = JoinSet::new();
        tasks.spawn(poll(source, sender));
        Self { answers, wants: watch::Sender::new(None), _tasks: tasks }
    }

    /// Parts of a recording, as they are wanted. `now_ms` is the node's time now.
    pub fn replay(recording: Recording, now_ms: u64) -> Self {
        let (sender, answers) = mpsc::channel(ANSWERS_WAITING_MAX);
        let (wants, wanted) = watch::channel(None);
        let mut tasks = JoinSet::new();
        tasks.spawn(load(recording, now_ms, wanted, sender));
        Self { answers, wants, _tasks: tasks }
    }

    /// Lets what the console wants now be loaded.
    pub fn ask(&self, app: &mut App) {
        if let Some(want) = app.want() {
            self.wants.send_replace(Some(want));
        }
    }

    /// The next answer; `None` if there will be none.
    ///
    /// # Cancellation
    /// Nothing is lost.
    pub async fn next(&mut self) -> Option<Answer> {
        self.answers.recv().await
    }
}

/// Asks for samples until nobody wants them any more.
async fn poll(mut source: Source, answers: mpsc::Sender<Answer>) {
    let mut ticks = time::interval_at(Instant::now() + POLL_INTERVAL, POLL_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let sample = match source.next().await {
            Ok(Some(sample)) => Ok(sample),
            Ok(None) => return,
            Err(error) => Err(error.to_string()),
        };
        if answers.send(Answer::Sample(Box::new(sample))).await.is_err() {
            return;
        }
    }
}

/// Loads what is wanted until nobody wants anything any more.
async fn load(
    recording: Recording,
    unix_begin_ms: u64,
    mut wanted: watch::Receiver<Option<Want>>,
    answers: mpsc::Sender<Answer>,
) {
    let begin = Instant::now();
    let mut events_due = begin;
    while wanted.changed().await.is_ok() {
        let Some(want) = *wanted.borrow_and_update() else { continue };
        let passed_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let loaded = recording.load(want, unix_begin_ms.saturating_add(passed_ms)).await;
        let intervals = loaded.map_err(|error| error.to_string());
        let mut events = None;
        if Instant::now() >= events_due {
            events = recording.events().await.ok();
            events_due = Instant::now() + EVENTS_INTERVAL;
        }
        let loaded = Loaded { want, intervals, events };
        if answers.send(Answer::Loaded(loaded)).await.is_err() {
            return;
        }
    }
}
