//! Says rarely what goes on for long: a log that repeats itself hides what is new in it.

use std::time::Duration;

use tokio::time::Instant;

/// Least time between two lines of the same.
const PAUSE: Duration = Duration::from_secs(60);

/// When one thing was last said.
#[derive(Debug, Default)]
pub struct Rarely {
    said: Option<Instant>,
}

impl Rarely {
    /// Whether to say it now, which then counts as done.
    pub fn due(&mut self, now: Instant) -> bool {
        let due = self.said.is_none_or(|said| now.saturating_duration_since(said) >= PAUSE);
        if due {
            self.said = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_time_and_then_once_a_minute() {
        let begin = Instant::now();
        let mut told = Rarely::default();
        let due = (0..1300).filter(|tenth| told.due(begin + Duration::from_millis(tenth * 100)));
        assert_eq!(due.collect::<Vec<_>>(), [0, 600, 1200]);
    }
}
