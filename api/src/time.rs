//! Times as RFC 3339 writes them, in UTC and without leap seconds; within programs, milliseconds
//! since 1970.

const MS_PER_DAY: u64 = 86_400_000;

/// A time as RFC 3339 has it: `2026-11-21T20:45:00.000Z`.
#[must_use]
pub fn format_rfc3339(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / MS_PER_DAY, unix_ms % MS_PER_DAY);
    // Years that begin in March put the leap day at their end; eras of 400 of them repeat. After
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    let since_march = days + 719_468;
    let (era, day) = (since_march / 146_097, since_march % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute) = (ms / 3_600_000, ms / 60_000 % 60);
    let (second, ms) = (ms / 1000 % 60, ms % 1000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// Reads a time as RFC 3339, section 5.6, has it; `None` if it is none, not in UTC, or before 1970.
#[must_use]
pub fn parse_rfc3339(text: &str) -> Option<u64> {
    let (date, time) = text.split_once(['T', 't'])?;
    let mut parts = date.split('-');
    let year = digits(parts.next()?, 4)?;
    let month = digits(parts.next()?, 2)?;
    let day = digits(parts.next()?, 2)?;
    if parts.next().is_some() || year < 1970 || !(1..=12).contains(&month) {
        return None;
    }
    if day == 0 || day > days_of_month(year, month) {
        return None;
    }
    let time = time.strip_suffix(['Z', 'z'])?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    if time.len() != "14:03:00".len()
        || fraction.is_empty()
        || !fraction.bytes().all(|byte| byte.is_ascii_digit())
    {
        return None;
    }
    let ms: u64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    Some(days_since_1970(year, month, day) * MS_PER_DAY + parse_time_of_day(time)? * 1000 + ms)
}

/// Reads `14:03` or `14:03:20`, in seconds after midnight; `None` for anything else.
#[must_use]
pub fn parse_time_of_day(text: &str) -> Option<u64> {
    let mut parts = text.split(':');
    let hour = digits(parts.next()?, 2)?;
    let minute = digits(parts.next()?, 2)?;
    let second = parts.next().map_or(Some(0), |part| digits(part, 2))?;
    let fits = parts.next().is_none() && hour < 24 && minute < 60 && second < 60;
    fits.then_some(hour * 3600 + minute * 60 + second)
}

fn digits(text: &str, count: usize) -> Option<u64> {
    let plain = text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// By the Gregorian calendar; the year is 1970 or later.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    let years = (year - 1970) * 365 + leaps(year - 1) - leaps(1969);
    let months: u64 = (1..month).map(|month| days_of_month(year, month)).sum();
    years + months + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates_of_the_calendar() {
        for (unix_ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_767_225_599_001, "2025-12-31T23:59:59.001Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(format_rfc3339(unix_ms), text);
            assert_eq!(parse_rfc3339(text), Some(unix_ms));
        }
    }

    #[test]
    fn every_day_reads_back_as_written() {
        // The two directions count days in different ways. To the year 2258.
        for day in 0..105_000 {
            let unix_ms = day * MS_PER_DAY + day % MS_PER_DAY;
            let text = format_rfc3339(unix_ms);
            assert_eq!(parse_rfc3339(&text), Some(unix_ms), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "2026-11-21",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-11-00T00:00:00Z",
            "2026-11-21T14:03:00",
            "2026-11-21T14:03Z",
            "2026-11-21T14:03:00+01:00",
            "2026-11-21T24:00:00Z",
            "2026-11-21 14:03:00Z",
            "1969-12-31T23:59:59Z",
            "2026-11-21T14:03:00.Z",
            "2026-11-21T14:03:00.éZ",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }
}
