//! Times as people write them: `20m ago`, `14:03`, `2026-11-21T14:03:00Z`. All in UTC.
//!
//! What was written is kept apart from the time it means, which depends on the node's clock.

use weft_api::parse_rfc3339;
use weft_api::parse_time_of_day;

const MS_PER_DAY: u64 = 86_400_000;

/// A time as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// So many seconds ago.
    Ago(u64),
    /// Milliseconds since 1970.
    At(u64),
    /// So many seconds after midnight, the last time this was.
    TimeOfDay(u64),
}

impl When {
    /// Reads `20m ago` or `20m` (in s, m, h, d), `now`, `14:03`, `14:03:20`, or RFC 3339 in UTC.
    ///
    /// # Errors
    /// A sentence that says what can be written.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let found = if text == "now" {
            Some(Self::Ago(0))
        } else if text.contains(['T', 't']) {
            parse_rfc3339(text).map(Self::At)
        } else if text.contains(':') {
            parse_time_of_day(text).map(Self::TimeOfDay)
        } else {
            seconds(text.strip_suffix("ago").unwrap_or(text)).map(Self::Ago)
        };
        found.ok_or_else(|| {
            format!("'{text}' is not a time: write 20m ago, 2h, 14:03 or 2026-11-21T14:03:00Z")
        })
    }

    /// What it means, in milliseconds since 1970, when it is `now_ms`.
    #[must_use]
    pub fn unix_ms(self, now_ms: u64) -> u64 {
        match self {
            Self::Ago(seconds) => now_ms.saturating_sub(seconds.saturating_mul(1000)),
            Self::At(unix_ms) => unix_ms,
            Self::TimeOfDay(seconds) => {
                let today = now_ms / MS_PER_DAY * MS_PER_DAY + seconds * 1000;
                if today <= now_ms { today } else { today.saturating_sub(MS_PER_DAY) }
            }
        }
    }
}

/// Milliseconds since 1970 as RFC 3339, to the second: what [`When::parse`] reads.
#[must_use]
pub fn rfc3339(unix_ms: u64) -> String {
    crate::format::date_time(unix_ms).replace(' ', "T") + "Z"
}

/// A length of time, in seconds.
fn seconds(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim() {
        "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-21 20:02:03.
    const NOW_MS: u64 = 1_795_291_323_000;

    fn read(text: &str) -> u64 {
        When::parse(text).expect(text).unix_ms(NOW_MS)
    }

    #[test]
    fn lengths_of_time_are_counted_back_from_now() {
        for (text, seconds) in [
            ("20m ago", 1200),
            ("20m", 1200),
            (" 90 s ago ", 90),
            ("2h", 7200),
            ("7d ago", 604_800),
            ("now", 0),
        ] {
            assert_eq!(read(text), NOW_MS - seconds * 1000, "{text}");
        }
        assert_eq!(read("99999999999999d"), 0);
    }

    #[test]
    fn a_time_of_day_is_the_last_one() {
        assert_eq!(read("20:02:03"), NOW_MS);
        assert_eq!(read("20:02"), NOW_MS - 3_000);
        assert_eq!(read("20:03"), NOW_MS + 57_000 - MS_PER_DAY);
        assert_eq!(read("00:00"), NOW_MS / MS_PER_DAY * MS_PER_DAY);
    }

    #[test]
    fn dates_are_by_the_calendar() {
        assert_eq!(read("2026-11-21T20:02:03Z"), NOW_MS);
        assert_eq!(read("2026-11-21t20:02:03.25z"), NOW_MS + 250);
        assert_eq!(read("1970-01-01T00:00:00Z"), 0);
        for day in (0..60_000).step_by(13) {
            let text = rfc3339(day * MS_PER_DAY + 1_000);
            assert_eq!(read(&text), day * MS_PER_DAY + 1_000, "{text}");
        }
        assert_eq!(read("2000-02-29T00:00:00Z"), 951_782_400_000);
    }

    #[test]
    fn others_are_refused() {
        for text in [
            "",
            "ago",
            "20",
            "m",
            "-1m",
            "1.5h",
            "5 weeks",
            "99999999999999999999d",
            "24:00",
            "14:60",
            "14:3",
            "14:03:99",
            "1:2:3:4",
            "2026-11-21",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-11-00T00:00:00Z",
            "2026-11-21T14:03:00",
            "2026-11-21T14:03Z",
            "2026-11-21T14:03:00+01:00",
            "1969-12-31T23:59:59Z",
            "2026-11-21T14:03:00.Z",
            "２:00",
            "2026-11-21T14:03:00.éZ",
        ] {
            assert!(When::parse(text).is_err(), "{text}");
        }
    }
}
