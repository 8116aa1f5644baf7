//! Ten minutes of a node, in intervals of about a second: the last ones, or a part of a recording
//! that moves back and forth with who looks at it.

use std::collections::VecDeque;

use weft_api::Connection;
use weft_api::Stats;

use super::interval::Interval;

/// Intervals kept: ten minutes of seconds.
pub const INTERVALS_MAX: usize = 600;

/// Most memory kept, in the units of [`Interval::weight`]: about 80 MB. A pod of some hundred busy
/// volumes gets all its ten minutes; one of very many gets fewer.
const WEIGHT_MAX: usize = 1_600_000;

/// Number of the first interval of a part of a recording: there is room before it.
const MIDDLE: u64 = 1 << 62;

/// What is kept of a node. Intervals are numbered in their order and keep their number for good.
#[derive(Debug, Default)]
pub struct History {
    /// The last reading, from which the next interval begins.
    last: Option<(Stats, Vec<Connection>)>,
    intervals: VecDeque<Interval>,
    /// Number of the oldest interval kept.
    first: u64,
    weight: usize,
}

impl History {
    /// Adds a reading.
    pub fn push(&mut self, stats: Stats, connections: Vec<Connection>) {
        let before = self.last.as_ref().map(|(stats, open)| (stats, open.as_slice()));
        let interval = Interval::between(before, &stats, &connections);
        // The first picture has no rates; it goes as soon as there is one that has.
        if self.intervals.len() == 1 && self.intervals[0].span_ms == 0 {
            self.drop_oldest();
        }
        self.weight += interval.weight();
        self.intervals.push_back(interval);
        self.last = Some((stats, connections));
        while self.is_over() && self.intervals.len() > 1 {
            self.drop_oldest();
        }
    }

    /// Forgets everything and keeps a part of a recording, oldest first.
    pub fn begin_with(&mut self, intervals: Vec<Interval>) {
        *self = Self { first: MIDDLE, ..Self::default() };
        self.append(intervals, MIDDLE);
    }

    /// Adds what comes after the newest, and lets go of the oldest, but not from `kept` on.
    pub fn append(&mut self, intervals: Vec<Interval>, kept: u64) {
        for interval in intervals {
            self.weight += interval.weight();
            self.intervals.push_back(interval);
        }
        while self.is_over() && self.intervals.len() > 1 && self.first < kept {
            self.drop_oldest();
        }
    }

    /// Adds what comes before the oldest, oldest first, and lets go of the newest, but not of `kept`
    /// and those before.
    pub fn prepend(&mut self, intervals: Vec<Interval>, kept: u64) {
        for interval in intervals.into_iter().rev() {
            self.weight += interval.weight();
            self.intervals.push_front(interval);
            self.first -= 1;
        }
        while self.is_over()
            && self.range().is_some_and(|(first, last)| last > kept && last > first)
        {
            if let Some(newest) = self.intervals.pop_back() {
                self.weight = self.weight.saturating_sub(newest.weight());
            }
        }
    }

    fn is_over(&self) -> bool {
        self.intervals.len() > INTERVALS_MAX || self.weight > WEIGHT_MAX
    }

    /// Whether `count` intervals like those kept may be kept.
    #[must_use]
    pub fn can_hold(&self, count: usize) -> bool {
        self.weight / self.intervals.len().max(1) * count <= WEIGHT_MAX
    }

    /// Number of the newest interval that ended at that time or before; `None` if none did.
    #[must_use]
    pub fn ended_by(&self, unix_ms: u64) -> Option<u64> {
        let count = self.intervals.partition_point(|one| one.unix_ms <= unix_ms) as u64;
        (count > 0).then(|| self.first + count - 1)
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.intervals.pop_front() {
            self.weight = self.weight.saturating_sub(oldest.weight());
            self.first += 1;
        }
    }

    /// Numbers of the oldest and of the newest interval kept.
    #[must_use]
    pub fn range(&self) -> Option<(u64, u64)> {
        let length = self.intervals.len() as u64;
        (length > 0).then(|| (self.first, self.first + length - 1))
    }

    /// The interval of that number, or the nearest one kept.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<&Interval> {
        let (first, last) = self.range()?;
        let at = usize::try_from(number.clamp(first, last) - first).ok()?;
        self.intervals.get(at)
    }

    /// The `count` intervals up to the one of that number, oldest first; fewer if there are no more.
    pub fn window(&self, number: u64, count: usize) -> impl Iterator<Item = &Interval> {
        let end = match self.range() {
            None => 0,
            Some((first, last)) => {
                usize::try_from(number.clamp(first, last) - first + 1).unwrap_or(0)
            }
        };
        self.intervals.range(end.saturating_sub(count)..end)
    }
}
