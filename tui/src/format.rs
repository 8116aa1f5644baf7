//! Figures as short text, in ASCII on every terminal: at most ten columns each, units included.

use weft_api::format_rfc3339;

/// What stands where there is nothing to show: no request, no latency.
pub const NOTHING: &str = "-";

/// A size, `8 GiB` or `1.5 TiB`, as the command line writes it.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = float(bytes);
    // 1023.95 and above would be rounded to 1024.0 of the smaller unit.
    while unit + 1 < UNITS.len() && value >= 1023.95 {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 100.0 && value.fract() > 0.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A throughput in bytes a second.
#[must_use]
pub fn throughput(bytes_per_second: f64) -> String {
    format!("{}/s", size(whole(bytes_per_second)))
}

/// How often something happens in a second: `0`, `0.3`, `950`, `12.3k`, `1.2M`.
#[must_use]
pub fn rate(per_second: f64) -> String {
    let value = if per_second.is_finite() { per_second.max(0.0) } else { 0.0 };
    match value {
        0.0 => "0".to_owned(),
        value if value < 9.95 && value.fract() > 0.05 => format!("{value:.1}"),
        value if value < 9_999.5 => format!("{value:.0}"),
        value if value < 999_950.0 => format!("{:.1}k", value / 1e3),
        value if value < 999_950_000.0 => format!("{:.1}M", value / 1e6),
        value => format!("{:.1}G", value / 1e9),
    }
}

/// A count, in full as long as it is short.
#[must_use]
pub fn count(count: u64) -> String {
    if count < 1_000_000 { count.to_string() } else { rate(float(count)) }
}

/// A latency of so many nanoseconds; `us` is for microseconds, as fio writes it.
#[must_use]
pub fn latency(nanoseconds: u64) -> String {
    const UNITS: [(&str, f64); 3] = [("us", 1e3), ("ms", 1e6), ("s", 1e9)];
    let nanoseconds = float(nanoseconds);
    // The unit changes where rounding would make four digits.
    let (unit, scale) =
        UNITS.into_iter().find(|(_, scale)| nanoseconds < 999.5 * scale).unwrap_or(("s", 1e9));
    let value = nanoseconds / scale;
    let digits = match value {
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

/// [`latency`] of what may not have been measured.
#[must_use]
pub fn latency_or_nothing(nanoseconds: Option<u64>) -> String {
    nanoseconds.map_or(NOTHING.to_owned(), latency)
}

/// A share of a whole, in percent, or nothing if there is no whole.
#[must_use]
pub fn percent(part: u64, whole: u64) -> String {
    share(part, whole).map_or(NOTHING.to_owned(), |share| format!("{:.1} %", share * 100.0))
}

/// `part / whole`, between 0 and 1; `None` if there is no whole.
#[must_use]
pub fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| (float(part) / float(whole)).clamp(0.0, 1.0))
}

/// How much smaller data became: `2.4 : 1`.
#[must_use]
pub fn ratio(before: u64, after: u64) -> String {
    if after == 0 {
        return NOTHING.to_owned();
    }
    format!("{:.1} : 1", float(before) / float(after))
}

/// `3 d 4 h`, `4 h 5 min`, `5 min 6 s` or `6 s`.
#[must_use]
pub fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{minutes} min {} s", seconds % 60),
        3_600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// The time of day in UTC: `14:02:03`.
#[must_use]
pub fn time_of_day(unix_ms: u64) -> String {
    let date_time = date_time(unix_ms);
    date_time.split_once(' ').map_or(String::new(), |(_, time)| time.to_owned())
}

/// Date and time in UTC: `2026-11-21 14:02:03`.
#[must_use]
pub fn date_time(unix_ms: u64) -> String {
    let text = format_rfc3339(unix_ms).replace('T', " ");
    text.split_once('.').map_or(String::new(), |(to_the_second, _)| to_the_second.to_owned())
}

/// A count as a float, for figures people read.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "a rounded figure for people")]
pub fn float(count: u64) -> f64 {
    count as f64
}

/// A figure without its fraction; 0 for what is negative or none.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "saturates, which is what a figure for people should do"
)]
pub fn whole(value: f64) -> u64 {
    value.round() as u64
}

/// `text` in at most `width` columns, the last of them `mark` if something was left out.
#[must_use]
pub fn clip(text: &str, width: usize, mark: &str) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    if width > 0 {
        short.push_str(mark);
    }
    short
}

/// [`clip`], of which the end stays.
#[must_use]
pub fn clip_start(text: &str, width: usize, mark: &str) -> String {
    let surplus = text.chars().count().saturating_sub(width);
    if surplus == 0 || width == 0 {
        return clip(text, width, mark);
    }
    text.chars().skip(surplus + 1).fold(mark.to_owned(), |mut short, c| {
        short.push(c);
        short
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_change_units_where_they_should() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(8 << 30), "8 GiB");
        assert_eq!(size(3 << 39), "1.5 TiB");
        assert_eq!(size(u64::MAX), "16 EiB");
        assert_eq!(size((1 << 20) - 1), "1.0 MiB");
        assert_eq!(
            [0.0, 0.3, 1.0, 950.0, 12_345.0, 1.2e6].map(rate).join(" "),
            "0 0.3 1 950 12.3k 1.2M"
        );
        assert_eq!([f64::NAN, f64::INFINITY, -1.0].map(rate).join(" "), "0 0 0");
        assert_eq!(latency(0), "0.00 us");
        assert_eq!(latency(999_400), "999 us");
        assert_eq!(latency(999_999), "1.00 ms");
        assert_eq!(latency(69_000_000_000), "69.0 s");
        assert_eq!(latency(u64::MAX).len(), "18446744074 s".len());
        assert_eq!(percent(1, 0), NOTHING);
        assert_eq!(percent(5, 4), "100.0 %");
        assert_eq!(ratio(1, 0), NOTHING);
    }

    #[test]
    fn times_are_by_the_calendar() {
        assert_eq!(date_time(0), "1970-01-01 00:00:00");
        assert_eq!(date_time(951_782_400_000), "2000-02-29 00:00:00");
        assert_eq!(date_time(1_795_291_323_000), "2026-11-21 20:02:03");
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(3_661), "1 h 1 min");
        assert_eq!(duration(90_000), "1 d 1 h");
    }

    #[test]
    fn text_is_clipped_by_columns() {
        assert_eq!(clip("abc", 3, "~"), "abc");
        assert_eq!(clip("abcd", 3, "~"), "ab~");
        assert_eq!(clip("abcd", 0, "~"), "");
        assert_eq!(clip("äöü", 2, "…"), "ä…");
        assert_eq!(clip_start("abc", 3, "~"), "abc");
        assert_eq!(clip_start("abcd", 3, "~"), "~cd");
        assert_eq!(clip_start("abcd", 0, "~"), "");
    }
}
