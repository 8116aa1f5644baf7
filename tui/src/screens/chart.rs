//! Figures over time as columns of characters, and shares as gauges. The newest is on the right.

use crate::format::float;
use crate::format::whole;
use crate::theme::Symbols;

/// The last `width` values as one line each; what is not there is blank.
///
/// Heights are relative to the largest value; zero is blank and anything else is seen.
pub fn columns(values: &[f64], width: usize, height: usize, symbols: &Symbols) -> Vec<String> {
    let values = &values[values.len().saturating_sub(width)..];
    let most = maximum(values);
    let steps = symbols.levels.len();
    let filled = |value: f64| -> usize {
        // Neither a value that is not a number nor a maximum of zero has a height.
        if value.is_nan() || value <= 0.0 || most <= 0.0 {
            return 0;
        }
        let full = float((height * steps) as u64);
        usize::try_from(whole(value.min(most) / most * full)).unwrap_or(0).max(1)
    };
    let heights: Vec<usize> = values.iter().map(|value| filled(*value)).collect();
    let blank = width - heights.len();
    let line = |row: usize| {
        let below = row * steps;
        let cell = |height: &usize| match height.saturating_sub(below).min(steps) {
            0 => " ",
            level => symbols.levels[level - 1],
        };
        format!("{}{}", " ".repeat(blank), heights.iter().map(cell).collect::<String>())
    };
    (0..height).rev().map(line).collect()
}

/// [`columns`] in one line.
pub fn sparkline(values: &[f64], width: usize, symbols: &Symbols) -> String {
    columns(values, width, 1, symbols).pop().unwrap_or_default()
}

/// The largest value; 0 if there is none.
pub fn maximum(values: &[f64]) -> f64 {
    values.iter().copied().filter(|value| value.is_finite()).fold(0.0, f64::max)
}

/// A share of a whole as a bar: what is full, and what is empty.
pub fn gauge(share: f64, width: usize, symbols: &Symbols) -> (String, String) {
    let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) };
    let full = usize::try_from(whole(share * float(width as u64))).unwrap_or(0).min(width);
    let [filled, empty] = symbols.gauge;
    (filled.repeat(full), empty.repeat(width - full))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::theme::ASCII;
    use crate::theme::UNICODE;

    #[test]
    fn the_largest_fills_and_the_smallest_shows() {
        assert_eq!(sparkline(&[0.0, 1.0, 500.0, 1000.0], 6, &UNICODE), "   ▁▄█");
        assert_eq!(sparkline(&[1.0, 2.0, 4.0], 2, &ASCII), "-#");
        assert_eq!(columns(&[1.0, 2.0], 2, 2, &UNICODE), [" █", "██"]);
    }

    #[test]
    fn odd_values_draw_something() {
        assert_eq!(sparkline(&[], 3, &ASCII), "   ");
        assert_eq!(sparkline(&[f64::NAN, f64::INFINITY, 0.0], 3, &ASCII), "   ");
        assert_eq!(sparkline(&[1.0, f64::INFINITY], 2, &ASCII), "##");
        assert_eq!(columns(&[1.0], 0, 0, &ASCII), Vec::<String>::new());
        assert_eq!(gauge(f64::NAN, 4, &ASCII), (String::new(), "....".to_owned()));
        assert_eq!(gauge(7.0, 4, &ASCII), ("####".to_owned(), String::new()));
        assert_eq!(gauge(0.5, 4, &ASCII), ("##".to_owned(), "..".to_owned()));
    }
}
