//! What a node has recorded, read piece by piece in both directions.
//!
//! The API answers with readings from a time on, oldest first, and with 600 at most, which of a node
//! with many volumes would be more than is taken: so a minute is asked for at a time, or ten where
//! there is one reading in ten seconds only. What lies behind a gap is found by asking for the
//! first reading from a time on, which is one reading whatever is behind it; backwards by halving.

use weft_api::Client;
use weft_api::ClientError;
use weft_api::Event;
use weft_api::Stats;

use crate::model::interval::Interval;

/// Readings of the last hour are a second apart,
const FINE_MS: u64 = 3_600_000;
/// older ones about ten, and up to twice that: the first of each ten seconds is kept.
const FINE_APART_MS_MAX: u64 = 5_000;
/// Beyond this there is a gap.
const COARSE_APART_MS_MAX: u64 = 25_000;

/// Readings asked for at a time, about.
pub const PIECE: u64 = 60;

/// Most readings in an answer of the API.
const ANSWER_READINGS_MAX: usize = 600;

/// Where a recording is.
#[derive(Debug)]
pub enum Recording {
    /// On a node.
    Node(Client),
    /// In memory, oldest first.
    Kept(Vec<Stats>),
}

/// A piece of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// What is around a time, or the nearest there is.
    Around(u64),
    /// What is before the reading of that time.
    Before(u64),
    /// What is after the reading of that time.
    After(u64),
}

/// How readings are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// When this is, by the node's clock: old readings are farther apart.
    pub now_ms: u64,
    /// How far apart readings are at least.
    pub step_ms: u64,
    /// The last time of interest.
    pub until_ms: u64,
}

impl Choice {
    /// How far apart readings of a time are.
    fn spacing_ms(&self, unix_ms: u64) -> u64 {
        let recorded_ms = if self.is_fine(unix_ms) { 1_000 } else { 10_000 };
        self.step_ms.max(recorded_ms)
    }

    /// The time that one request asks for.
    fn span_ms(&self, unix_ms: u64) -> u64 {
        self.spacing_ms(unix_ms).saturating_mul(PIECE)
    }

    fn is_fine(&self, unix_ms: u64) -> bool {
        self.now_ms.saturating_sub(unix_ms) <= FINE_MS
    }

    /// What happened between readings that follow on each other.
    #[must_use]
    pub fn interval(&self, before: &Stats, now: &Stats) -> Interval {
        let fine = self.is_fine(before.unix_ms);
        let apart_ms_max = if fine { FINE_APART_MS_MAX } else { COARSE_APART_MS_MAX };
        Interval::recorded(before, now, self.step_ms.saturating_add(apart_ms_max))
    }
}

impl Recording {
    /// The piece that is wanted, oldest first; empty if nothing is recorded there.
    ///
    /// # Errors
    /// The node does not answer, or records nothing.
    pub async fn load(&self, want: Want, now_ms: u64) -> Result<Vec<Interval>, ClientError> {
        let choice = Choice { now_ms, step_ms: 0, until_ms: u64::MAX };
        let readings = match want {
            Want::Around(unix_ms) => self.around(unix_ms, choice).await?,
            Want::Before(unix_ms) => self.before(unix_ms, choice).await?,
            Want::After(unix_ms) => self.after(unix_ms, choice).await?,
        };
        let pairs = readings.windows(2).map(|pair| choice.interval(&pair[0], &pair[1]));
        Ok(pairs.collect())
    }

    /// The events that are still known, of any time.
    ///
    /// # Errors
    /// The node does not answer.
    pub async fn events(&self) -> Result<Vec<Event>, ClientError> {
        match self {
            Self::Node(client) => client.events(0).await,
            Self::Kept(_) => Ok(Vec::new()),
        }
    }

    /// The reading of that time and some after it. Only one, or none, at the recording's end.
    ///
    /// # Errors
    /// The node does not answer, or records nothing.
    pub async fn after(&self, unix_ms: u64, choice: Choice) -> Result<Vec<Stats>, ClientError> {
        let to_ms = unix_ms.saturating_add(choice.span_ms(unix_ms)).min(choice.until_ms);
        let mut readings = self.range(unix_ms, to_ms, choice.step_ms).await?;
        while readings.len() < 2 {
            let last = readings.last().map(|last| last.unix_ms);
            let next = last.map_or(unix_ms, |last| last.saturating_add(choice.step_ms.max(1)));
            match self.first(next, choice.until_ms).await? {
                Some(reading) => readings.push(reading),
                None => break,
            }
        }
        Ok(readings)
    }

    /// Some readings up to that of that time. Only one, or none, at the recording's begin.
    async fn before(&self, unix_ms: u64, choice: Choice) -> Result<Vec<Stats>, ClientError> {
        let from_ms = unix_ms.saturating_sub(choice.span_ms(unix_ms));
        let readings = self.range(from_ms, unix_ms, 0).await?;
        if readings.len() >= 2 {
            return Ok(readings);
        }
        match self.near_newest(unix_ms, choice).await? {
            Some(from_ms) => self.range(from_ms, unix_ms, 0).await,
            None => Ok(readings),
        }
    }

    async fn around(&self, unix_ms: u64, choice: Choice) -> Result<Vec<Stats>, ClientError> {
        let from_ms = unix_ms.saturating_sub(choice.span_ms(unix_ms));
        let begin_ms = match self.first(from_ms, u64::MAX).await? {
            Some(first) if first.unix_ms > unix_ms => {
                // The time is in a gap, which is to be seen as one; or before the recording.
                let over_gap = self.before(first.unix_ms, choice).await?;
                if over_gap.len() >= 2 {
                    return Ok(over_gap);
                }
                Some(first.unix_ms)
            }
            Some(first) => Some(first.unix_ms),
            None => self.near_newest(from_ms, choice).await?,
        };
        let Some(begin_ms) = begin_ms else { return Ok(Vec::new()) };
        let readings = self.after(begin_ms, choice).await?;
        // A single one is the newest there is.
        if readings.len() < 2 { self.before(begin_ms, choice).await } else { Ok(readings) }
    }

    /// The time of a reading before a time that is not far from the newest of those; `None` if
    /// there is none.
    async fn near_newest(
        &self,
        before_ms: u64,
        choice: Choice,
    ) -> Result<Option<u64>, ClientError> {
        let Some(until_ms) = before_ms.checked_sub(1) else { return Ok(None) };
        let Some(oldest) = self.first(0, until_ms).await? else { return Ok(None) };
        // The newest is at `low` or after it, and before `high`.
        let (mut low, mut high) = (oldest.unix_ms, before_ms);
        while high.saturating_sub(low) > choice.span_ms(high) {
            let middle = low + (high - low) / 2;
            match self.first(middle, until_ms).await? {
                Some(reading) => low = reading.unix_ms,
                None => high = middle,
            }
        }
        Ok(Some(low))
    }

    /// The first reading of a time or after it.
    ///
    /// # Errors
    /// The node does not answer, or records nothing.
    pub async fn first(&self, from_ms: u64, to_ms: u64) -> Result<Option<Stats>, ClientError> {
        Ok(self.range(from_ms, to_ms, u64::MAX).await?.into_iter().next())
    }

    async fn range(
        &self,
        from_ms: u64,
        to_ms: u64,
        step_ms: u64,
    ) -> Result<Vec<Stats>, ClientError> {
        match self {
            Self::Node(client) => {
                client.history(from_ms, to_ms, step_ms).await.map_err(say_what_to_set)
            }
            Self::Kept(readings) => Ok(chosen(readings, from_ms, to_ms, step_ms)),
        }
    }
}

/// Readings as the API chooses them.
fn chosen(readings: &[Stats], from_ms: u64, to_ms: u64, step_ms: u64) -> Vec<Stats> {
    let mut found: Vec<Stats> = Vec::new();
    let mut next_ms = from_ms;
    for one in readings {
        if found.len() < ANSWER_READINGS_MAX && (next_ms..=to_ms).contains(&one.unix_ms) {
            next_ms = one.unix_ms.saturating_add(step_ms.max(1));
            found.push(one.clone());
        }
    }
    found
}

/// Of a node that records nothing, what would make it.
fn say_what_to_set(error: ClientError) -> ClientError {
    match error {
        ClientError::Problem(mut problem) if problem.kind == "Unsupported" => {
            "this node records no history: its history.size is 0; set it, as \"256MiB\", and \
             start the node again"
                .clone_into(&mut problem.detail);
            ClientError::Problem(problem)
        }
        other => other,
    }
}
