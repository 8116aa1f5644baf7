//! Where samples come from: a running node, or a recording.

use std::collections::VecDeque;

use weft_api::Client;
use weft_api::ClientError;
use weft_api::Event;
use weft_api::Stats;

use crate::model::Sample;

/// How volumes are set up is asked for with one in this many samples: it changes seldom.
const VOLUMES_EVERY: u64 = 5;

/// Gives one sample after the other.
#[derive(Debug)]
pub enum Source {
    /// A running node.
    Live(Live),
    /// Samples that were taken before.
    Recorded(VecDeque<Sample>),
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

impl Source {
    /// The node that `client` asks.
    #[must_use]
    pub fn live(client: Client) -> Self {
        Self::Live(Live { client, last: None, last_event: 0, taken: 0 })
    }

    /// The next sample. Of a running node it is the present one, so the caller waits in between.
    ///
    /// # Cancellation
    /// Nothing is lost: what was read is read again by the next call.
    ///
    /// # Errors
    /// The node does not answer, or the recording is at its end. Trying again is right.
    pub async fn next(&mut self) -> Result<Sample, ClientError> {
        match self {
            Self::Live(live) => live.next().await,
            Self::Recorded(samples) => samples
                .pop_front()
                .ok_or_else(|| ClientError::Broken("the recording is at its end".to_owned())),
        }
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
