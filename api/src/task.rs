//! Long work of a node: what it is, how far it is, and how it ended.

use std::fmt;

use serde::Deserialize;
use serde::Serialize;

use crate::stats::names;

/// Long work, under way or ended. A node keeps its newest until it stops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Task {
    /// The pod's epoch and a number, as `7-1`: never used again for the same pod.
    pub id: String,
    /// What is done.
    pub kind: TaskKind,
    /// How it stands.
    pub state: TaskState,
    /// When it was started, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// When it ended; null while it runs.
    pub finished_unix_ms: Option<u64>,
    /// Of `total`, done.
    pub done: u64,
    /// All there is to do, as far as is known: it may change while the task runs.
    pub total: u64,
    /// What `done` and `total` count.
    pub unit: TaskUnit,
    /// Seconds until it is done, at the rate of its last minute; null if that says nothing.
    pub eta_s: Option<u64>,
    /// Whether it can be cancelled.
    pub cancellable: bool,
    /// What there is to say, in words; empty if nothing.
    pub message: String,
    /// What a scrub found; null for other kinds.
    pub damage: Option<Damage>,
}

impl Task {
    /// How much is done, in percent, rounded down. Nothing to do is all of it.
    #[must_use]
    pub fn percent(&self) -> u64 {
        let percent = u128::from(self.done.min(self.total)) * 100;
        percent
            .checked_div(u128::from(self.total))
            .map_or(100, |percent| u64::try_from(percent).unwrap_or(100))
    }

    /// Whether it ended as it should: done, and with no damage left.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.state == TaskState::Done && self.damage.is_none_or(|damage| damage.left == 0)
    }
}

/// What a scrub read, and what it did about it. In units: pieces of 64 KiB, each with a checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Damage {
    /// Units read, and found as they were written.
    pub verified: u64,
    /// Units damaged or unreadable, and superblocks.
    pub found: u64,
    /// Of them, rebuilt, written back, and read again as they should be.
    pub healed: u64,
    /// Of them, still damaged.
    pub left: u64,
}

/// What a node's scrubs found since it started, all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ScrubStats {
    /// What they read and did, the one under way included.
    pub damage: Damage,
    /// When the last one was done, in milliseconds since 1970; null if none was.
    pub done_unix_ms: Option<u64>,
}

names! {
    /// Kinds of long work.
    TaskKind {
        /// Putting missing redundancy back. The node starts it by itself.
        Rebuild = "rebuild",
        /// Reading everything that is stored, and healing what is damaged.
        Scrub = "scrub",
    }
}

names! {
    /// How a task stands.
    TaskState {
        /// Under way.
        Running = "running",
        /// Ended as it should.
        Done = "done",
        /// Ended early, for a reason that its message says.
        Failed = "failed",
        /// Ended early, because someone said so.
        Cancelled = "cancelled",
    }
}

names! {
    /// What a task's progress is counted in.
    TaskUnit {
        /// Segments, the units of erasure coding.
        Segments = "segments",
        /// Bytes on devices.
        Bytes = "bytes",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(done: u64, total: u64) -> Task {
        Task {
            id: "7-1".to_owned(),
            kind: TaskKind::Scrub,
            state: TaskState::Done,
            started_unix_ms: 0,
            finished_unix_ms: Some(1),
            done,
            total,
            unit: TaskUnit::Bytes,
            eta_s: None,
            cancellable: true,
            message: String::new(),
            damage: None,
        }
    }

    #[test]
    fn percents_are_of_what_there_is() {
        assert_eq!(task(0, 0).percent(), 100);
        assert_eq!(task(1, 3).percent(), 33);
        assert_eq!(task(9, 3).percent(), 100);
        assert_eq!(task(u64::MAX / 2, u64::MAX).percent(), 49);
    }

    #[test]
    fn damage_left_is_no_success() {
        let mut done = task(1, 1);
        assert!(done.succeeded());
        done.damage = Some(Damage { found: 1, healed: 1, ..Damage::default() });
        assert!(done.succeeded());
        done.damage = Some(Damage { found: 1, left: 1, ..Damage::default() });
        assert!(!done.succeeded());
        let cancelled = Task { state: TaskState::Cancelled, ..task(1, 1) };
        assert!(!cancelled.succeeded());
    }
}
