//! Where in a recording the console is, and how it moves on: plain data, as [`crate::app`].
//!
//! Time in the recording runs with the console's, `speed` times as fast. A part of the recording is
//! kept, and more is wanted before either end of it is reached. A gap is shown for a second and
//! then left out. At the recording's end the picture stops: the present is another thing.

use weft_api::Event;

use crate::format::date_time;
use crate::model::history::History;
use crate::model::interval::Interval;
use crate::recording::PIECE;
use crate::recording::Want;

/// Intervals kept ready for what is played, and
const AHEAD: u64 = 120;
/// behind it, since charts as wide as the terminal show them.
const BEHIND: u64 = 240;

/// Recorded seconds in a second at most: then a week takes seven minutes.
pub const SPEED_MAX: u64 = 1_500;

/// How long a gap is shown.
const GAP_SHOWN_MS: u64 = 1_000;

/// Between two questions for what is not yet recorded, or of a node that does not answer.
const RETRY_MS: u64 = 1_000;

/// The nearest reading may be so far from the time that was asked for without a word about it.
const NEAR_MS: u64 = 20_000;

/// A step that is more than a single interval is so many milliseconds for each of its count.
const STEP_MS: u64 = 1_000;

/// How many intervals are to be kept at once.
fn ready() -> usize {
    usize::try_from(AHEAD + BEHIND + PIECE).unwrap_or(usize::MAX)
}

/// A part of a recording that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// What was wanted.
    pub want: Want,
    /// It, oldest first; or why not.
    pub intervals: Result<Vec<Interval>, String>,
    /// All events that are still known, if they were asked for.
    pub events: Option<Vec<Event>>,
}

/// A step to what may not be loaded yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seek {
    /// To the newest interval that ended at that time or before.
    Back(u64),
    /// To the oldest one that ended at that time or after.
    Forth(u64),
}

/// What plays a recording.
#[derive(Debug)]
pub struct Replay {
    /// The node's time when the console's was 0.
    unix_begin_ms: u64,
    /// The console's time.
    now_ms: u64,
    /// Number of the interval that is shown.
    position: u64,
    /// The recorded time that is shown: at that interval's end or after it, before the next one's.
    clock_ms: u64,
    speed: u64,
    paused: bool,
    /// Whether nothing is recorded before what is kept.
    begun: bool,
    /// Whether the end was reached: nothing was recorded after what is shown.
    ended: bool,
    /// Whether nothing was recorded after what is kept when that was last asked for. What comes to
    /// that is at its end, though more is recorded meanwhile: else it would follow the present.
    end_known: bool,
    /// The time to go to, until it is loaded.
    target_ms: Option<u64>,
    seek: Option<Seek>,
    /// What is being loaded.
    pending: Option<Want>,
    /// Nothing is asked for before this, of the console's time,
    retry_ms: u64,
    /// nor for what comes after.
    retry_after_ms: u64,
}

impl Replay {
    /// Plays from a time in the recording on. `now_ms` is the node's time now.
    #[must_use]
    pub fn new(from_ms: u64, now_ms: u64) -> Self {
        Self {
            unix_begin_ms: now_ms,
            now_ms: 0,
            position: 0,
            clock_ms: from_ms,
            speed: 1,
            paused: false,
            begun: false,
            ended: false,
            end_known: false,
            target_ms: Some(from_ms),
            seek: None,
            pending: None,
            retry_ms: 0,
            retry_after_ms: 0,
        }
    }

    /// Number of the interval that is shown.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The present, in milliseconds since 1970 by the node's clock, about.
    #[must_use]
    pub fn unix_now_ms(&self) -> u64 {
        self.unix_begin_ms.saturating_add(self.now_ms)
    }

    /// Whether the picture stands still for its being frozen, or at the end.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether it is at the recording's end.
    #[must_use]
    pub fn is_at_end(&self) -> bool {
        self.ended
    }

    /// Whether what is to be shown is not loaded yet.
    #[must_use]
    pub fn is_loading(&self) -> bool {
        self.target_ms.is_some() || self.seek.is_some()
    }

    /// Recorded seconds that are played in one.
    #[must_use]
    pub fn speed(&self) -> u64 {
        self.speed
    }

    /// Plays so many times as fast as it was.
    ///
    /// # Errors
    /// A sentence: it is not a speed.
    pub fn set_speed(&mut self, text: &str) -> Result<(), String> {
        let number = text.trim_end_matches('x').parse();
        self.speed = number
            .ok()
            .filter(|speed| (1..=SPEED_MAX).contains(speed))
            .ok_or_else(|| format!("'{text}' is no speed: write 1 to {SPEED_MAX}"))?;
        Ok(())
    }

    /// Stops the picture.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Goes on; at the end, with what was recorded since.
    pub fn play(&mut self) {
        (self.paused, self.ended, self.end_known) = (false, false, false);
        self.retry_after_ms = 0;
    }

    /// Goes to a time.
    pub fn go_to(&mut self, unix_ms: u64) {
        self.target_ms = Some(unix_ms);
        // The end has stopped it, not the operator.
        self.paused &= !self.ended;
        (self.seek, self.ended, self.retry_ms) = (None, false, 0);
    }

    /// Goes one interval back or forth, or `by` seconds, and stops there.
    pub fn step(&mut self, by: i64, history: &History) {
        let Some(shown) = history.get(self.position) else { return };
        self.paused = true;
        let by_ms = if by.unsigned_abs() == 1 { 0 } else { by.unsigned_abs() * STEP_MS };
        let seek = match (self.seek, by < 0, by_ms) {
            (Some(Seek::Back(target)), true, _) => Seek::Back(target.saturating_sub(by_ms.max(1))),
            (Some(Seek::Forth(target)), false, _) => Seek::Forth(target + by_ms.max(1)),
            (_, true, 0) => Seek::Back(shown.earlier_unix_ms),
            (_, true, _) => Seek::Back(shown.unix_ms.saturating_sub(by_ms)),
            (_, false, _) => Seek::Forth(shown.unix_ms + by_ms.max(1)),
        };
        if let Seek::Forth(_) = seek {
            self.retry_after_ms = 0;
        }
        self.ended = false;
        self.seek = Some(seek);
        self.arrive(history);
    }

    /// Takes notice of the time, in milliseconds of the console's.
    pub fn tick(&mut self, now_ms: u64, history: &History) {
        let passed_ms = now_ms.saturating_sub(self.now_ms);
        self.now_ms = now_ms;
        if !self.paused && !self.is_loading() {
            self.clock_ms = self.clock_ms.saturating_add(passed_ms.saturating_mul(self.speed));
            self.follow(history);
        }
    }

    /// Shows what is at the clock's time, as far as it is loaded.
    fn follow(&mut self, history: &History) {
        let Some((_, last)) = history.range() else { return };
        while let Some(shown) = history.get(self.position) {
            if self.position >= last {
                if self.end_known && self.clock_ms > shown.unix_ms {
                    (self.ended, self.paused) = (true, true);
                }
                self.clock_ms = self.clock_ms.min(shown.unix_ms);
                return;
            }
            let Some(next) = history.get(self.position + 1) else { return };
            let gap_seen = next.gap_ms > 0 && self.clock_ms >= shown.unix_ms + GAP_SHOWN_MS;
            if gap_seen {
                self.clock_ms = self.clock_ms.max(next.unix_ms);
            } else if next.unix_ms > self.clock_ms {
                return;
            }
            self.position += 1;
        }
    }

    /// Makes the step that was waited for, if what it leads to is loaded by now.
    fn arrive(&mut self, history: &History) {
        let Some((first, last)) = history.range() else { return };
        let number = match self.seek {
            None => return,
            Some(Seek::Back(unix_ms)) => history.ended_by(unix_ms).or(self.begun.then_some(first)),
            Some(Seek::Forth(unix_ms)) => {
                let before = history.ended_by(unix_ms.saturating_sub(1));
                let number = before.map_or(first, |before| before + 1);
                if number <= last { Some(number) } else { self.ended.then_some(last) }
            }
        };
        if let Some(number) = number {
            self.seek = None;
            self.position = number;
            self.clock_ms = history.get(number).map_or(self.clock_ms, |one| one.unix_ms);
        }
    }

    /// What is to be loaded next, said once.
    pub fn want(&mut self, history: &History) -> Option<Want> {
        let want = self.wanted(history)?;
        let waits = match (self.pending, want) {
            (None, _) => false,
            // Whoever wants to be elsewhere need not wait for what was wanted here.
            (Some(pending), Want::Around(_)) => pending == want,
            (Some(_), _) => true,
        };
        if waits || self.now_ms < self.retry_ms {
            return None;
        }
        self.pending = Some(want);
        Some(want)
    }

    fn wanted(&self, history: &History) -> Option<Want> {
        if let Some(unix_ms) = self.target_ms {
            return Some(Want::Around(unix_ms));
        }
        let (first, last) = history.range()?;
        let before = Want::Before(history.get(first)?.earlier_unix_ms);
        let after = Want::After(history.get(last)?.unix_ms);
        if matches!(self.seek, Some(Seek::Back(_))) {
            return (!self.begun).then_some(before);
        }
        let (ahead, behind) = if history.can_hold(ready()) { (AHEAD, BEHIND) } else { (1, 1) };
        let seeks = matches!(self.seek, Some(Seek::Forth(_)));
        let short_ahead = seeks || last.saturating_sub(self.position) < ahead;
        if short_ahead && !self.ended && self.now_ms >= self.retry_after_ms {
            return Some(after);
        }
        (!self.begun && self.position.saturating_sub(first) < behind).then_some(before)
    }

    /// Takes what was loaded. What is no longer wanted is dropped.
    ///
    /// # Errors
    /// A sentence for the operator: it could not be loaded, or is not what was asked for.
    pub fn loaded(
        &mut self,
        want: Want,
        intervals: Result<Vec<Interval>, String>,
        history: &mut History,
    ) -> Result<(), String> {
        if self.pending != Some(want) {
            return Ok(());
        }
        self.pending = None;
        let intervals = intervals.inspect_err(|_| self.retry_ms = self.now_ms + RETRY_MS)?;
        let said = match want {
            Want::Around(unix_ms) => self.begin_at(unix_ms, intervals, history),
            Want::Before(_) => {
                self.begun = intervals.is_empty();
                // Whoever goes back leaves what is shown.
                let leaves = matches!(self.seek, Some(Seek::Back(_)));
                history.prepend(intervals, if leaves { 0 } else { self.position });
                Ok(())
            }
            Want::After(_) => {
                self.take_after(intervals, history);
                Ok(())
            }
        };
        let (first, last) = history.range().unwrap_or_default();
        self.position = self.position.clamp(first, last);
        self.arrive(history);
        said
    }

    fn begin_at(
        &mut self,
        unix_ms: u64,
        intervals: Vec<Interval>,
        history: &mut History,
    ) -> Result<(), String> {
        if intervals.is_empty() {
            self.retry_ms = self.now_ms + RETRY_MS;
            return Err("nothing is recorded yet".to_owned());
        }
        history.begin_with(intervals);
        (self.target_ms, self.seek) = (None, None);
        (self.begun, self.ended, self.end_known) = (false, false, false);
        (self.retry_ms, self.retry_after_ms) = (0, 0);
        let first = history.range().map_or(0, |(first, _)| first);
        self.position = history.ended_by(unix_ms).unwrap_or(first);
        let shown_ms = history.get(self.position).map_or(0, |shown| shown.unix_ms);
        self.clock_ms = unix_ms.max(shown_ms);
        self.follow(history);
        let shown_ms = history.get(self.position).map_or(0, |shown| shown.unix_ms);
        if shown_ms.abs_diff(unix_ms) > NEAR_MS {
            return Err(format!(
                "nothing is recorded of {} UTC; this is the nearest there is",
                date_time(unix_ms)
            ));
        }
        Ok(())
    }

    fn take_after(&mut self, intervals: Vec<Interval>, history: &mut History) {
        let is_empty = intervals.is_empty();
        self.end_known = is_empty;
        // As much as charts show is not let go of, as far as there is room.
        let behind = if history.can_hold(ready()) { BEHIND } else { 0 };
        let leaves = matches!(self.seek, Some(Seek::Forth(_)));
        let kept = if leaves { u64::MAX } else { self.position.saturating_sub(behind) };
        history.append(intervals, kept);
        if !is_empty {
            return;
        }
        let last = history.range().map_or(0, |(_, last)| last);
        if self.position >= last || self.seek.is_some() {
            (self.ended, self.paused) = (true, true);
        } else {
            // There is more to play; meanwhile more is recorded.
            self.retry_after_ms = self.now_ms + RETRY_MS;
        }
    }
}
