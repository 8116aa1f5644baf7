//! Where samples come from, one after the other: a running node, or a recording.

use std::collections::VecDeque;

use weft_api::Client;
use weft_api::ClientError;
use weft_api::Event;
use weft_api::Stats;

use crate::model::Sample;
use crate::model::interval::Interval;
use crate::recording::Choice;
use crate::recording::Recording;

/// How volumes are set up is asked for with one in this many samples: it changes seldom.
const VOLUMES_EVERY: u64 = 5;

/// Gives one sample after the other.
#[derive(Debug)]
pub enum Source {
    /// A running node.
    Live(Live),
    /// Samples that were taken before.
    Recorded(VecDeque<Sample>),
    /// What a node has recorded.
    Replay(Replay),
}

/// A running node, and what was already read from it.
#[derive(Debug)]
pub struct Live {
    client: Client,
    /// The pod's epoch and the node's uptime at the last sample: how a restart is told.
    last: Option<(u64, u64)>,
    /// Number of the last event read.
    last_event: u64,
    /// Samples since the node started or was first asked.
    taken: u64,
}

/// What a node has recorded, from a time to another.
#[derive(Debug)]
pub struct Replay {
    recording: Recording,
    choice: Choice,
    /// Nothing of before this is read any more.
    next_ms: u64,
    /// What was read, oldest first.
    read: VecDeque<Stats>,
}

impl Source {
    /// The node that `client` asks.
    #[must_use]
    pub fn live(client: Client) -> Self {
        Self::Live(Live { client, last: None, last_event: 0, taken: 0 })
    }

    /// What is recorded from `from_ms` on, as it is chosen.
    #[must_use]
    pub fn replay(recording: Recording, from_ms: u64, choice: Choice) -> Self {
        Self::Replay(Replay { recording, choice, next_ms: from_ms, read: VecDeque::new() })
    }

    /// What happened between two samples that follow on each other.
    #[must_use]
    pub fn interval(&self, before: &Sample, now: &Sample) -> Interval {
        match self {
            Self::Replay(replay) => replay.choice.interval(&before.stats, &now.stats),
            Self::Live(_) | Self::Recorded(_) => {
                let earlier = (&before.stats, before.connections.as_slice());
                Interval::between(Some(earlier), &now.stats, &now.connections)
            }
        }
    }

    /// The next sample; `None` at a recording's end. Of a running node it is the present one, so the
    /// caller waits in between.
    ///
    /// # Cancellation
    /// Nothing is lost: what was read is read again by the next call.
    ///
    /// # Errors
    /// The node does not answer. Trying again is right.
    pub async fn next(&mut self) -> Result<Option<Sample>, ClientError> {
        match self {
            Self::Live(live) => live.next().await.map(Some),
            Self::Recorded(samples) => Ok(samples.pop_front()),
            Self::Replay(replay) => replay.next().await,
        }
    }
}

impl Replay {
    async fn next(&mut self) -> Result<Option<Sample>, ClientError> {
        if self.read.is_empty() {
            let readings = self.recording.after(self.next_ms, self.choice).await?;
            self.read = readings.into();
        }
        let Some(stats) = self.read.pop_front() else { return Ok(None) };
        self.next_ms = stats.unix_ms.saturating_add(self.choice.step_ms.max(1));
        // Connections and events are not recorded.
        let (connections, events) = (Vec::new(), Vec::new());
        Ok(Some(Sample { stats, connections, events, volumes: None, node: None }))
    }
}

impl Live {
    /// Asks for one thing after the other, so that a node has one request of ours at most.
    async fn next(&mut self) -> Result<Sample, ClientError> {
        let stats = self.client.stats().await?;
        if self.restarted(&stats) {
            (self.last_event, self.taken) = (0, 0);
        }
        let connections = self.client.connections().await?;
        let events = self.client.events(self.last_event).await?;
        let volumes = match self.taken % VOLUMES_EVERY {
            0 => Some(self.client.volumes().await?),
            _ => None,
        };
        let node = match self.taken {
            0 => Some(self.client.status().await?),
            _ => None,
        };
        self.last = Some((stats.pod.epoch, stats.uptime_ms));
        self.last_event = last_event(&events).unwrap_or(self.last_event);
        self.taken += 1;
        Ok(Sample { stats, connections, events, volumes, node })
    }

    fn restarted(&self, stats: &Stats) -> bool {
        self.last.is_some_and(|(epoch, uptime_ms)| {
            stats.pod.epoch != epoch || stats.uptime_ms < uptime_ms
        })
    }
}

fn last_event(events: &[Event]) -> Option<u64> {
    events.iter().map(|event| event.sequence).max()
}
