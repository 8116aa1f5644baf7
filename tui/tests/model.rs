//! Readings become rates: also over restarts, deleted volumes, and counters that go back.

use weft_api::Histogram;
use weft_api::Operation;
use weft_tui::model::history::History;
use weft_tui::model::history::INTERVALS_MAX;
use weft_tui::model::interval::Interval;

mod fixture;

#[test]
fn two_readings_make_rates_and_percentiles() {
    let samples = fixture::samples();
    let (before, now) = (&samples[1], &samples[2]);
    let interval = Interval::between(
        Some((&before.stats, before.connections.as_slice())),
        &now.stats,
        &now.connections,
    );
    assert_eq!((interval.span_ms, interval.restarted), (1000, false));
    let count =
        |sample: &weft_tui::model::Sample| sample.stats.volumes[0].operations[1].latency.count();
    let db0 = interval.volume("db0").expect("db0");
    assert_eq!(db0.activity.requests(Operation::Write), count(now) - count(before));
    assert!(interval.total.requests(Operation::Read) > db0.activity.requests(Operation::Read));
    let p99 = db0.activity.quantile_ns(Operation::Write, 0.99).expect("writes");
    assert!((240_000..3_000_000).contains(&p99), "{p99}");
    assert_eq!(db0.activity.quantile_ns(Operation::Zero, 0.99), None);
    assert_eq!((interval.cache_hits, interval.cache_misses), (16_000, 900));
    assert_eq!(interval.device(0).expect("a device").writes, 750);
    assert_eq!(interval.connections[1].requests, 9_000);
    assert!((interval.per_second(500) - 500.0).abs() < 1e-9);
}

#[test]
fn a_longer_interval_has_the_same_rates() {
    let samples = fixture::samples();
    let (before, now) = (&samples[6], &samples[11]);
    let interval = Interval::between(
        Some((&before.stats, before.connections.as_slice())),
        &now.stats,
        &now.connections,
    );
    assert_eq!(interval.span_ms, 5_000);
    assert!((interval.per_second(interval.cache_hits) - 16_000.0).abs() < 1e-9);
}

#[test]
fn a_restart_counts_from_nothing() {
    let samples = fixture::samples();
    let before = &samples[11];
    let mut now = samples[0].clone();
    now.stats.uptime_ms = 4_000;
    now.stats.pod.epoch += 1;
    now.stats.pod.cache_hits = 8;
    let interval = Interval::between(
        Some((&before.stats, before.connections.as_slice())),
        &now.stats,
        &now.connections,
    );
    assert_eq!((interval.span_ms, interval.restarted), (4_000, true));
    assert_eq!(interval.cache_hits, 8);
    let db0 = interval.volume("db0").expect("db0");
    let counted = now.stats.volumes[0].operations[1].latency.count();
    assert_eq!(db0.activity.requests(Operation::Write), counted);
}

#[test]
fn a_volume_made_anew_inherits_nothing() {
    let samples = fixture::samples();
    let before = &samples[10];
    let mut now = samples[11].clone();
    let volume = &mut now.stats.volumes[0];
    volume.id = 77;
    volume.operations.truncate(1);
    volume.operations[0].latency = Histogram { sum_ns: 500_000, buckets: vec![(20, 5)] };
    let interval = Interval::between(
        Some((&before.stats, before.connections.as_slice())),
        &now.stats,
        &now.connections,
    );
    let db0 = interval.volume("db0").expect("db0");
    assert_eq!(db0.activity.requests(Operation::Read), 5);
    assert_eq!(db0.activity.requests(Operation::Write), 0);
}

#[test]
fn without_an_earlier_reading_nothing_has_happened() {
    let sample = fixture::samples().remove(0);
    let interval = Interval::between(None, &sample.stats, &sample.connections);
    assert_eq!((interval.span_ms, interval.total.requests_all()), (0, 0));
    assert!(interval.per_second(9).abs() < f64::EPSILON);
    assert_eq!(interval.volumes.len(), 4);
}

#[test]
fn ten_minutes_are_kept_and_numbers_stay() {
    let sample = fixture::samples().remove(0);
    let mut history = History::default();
    assert!(history.range().is_none() && history.get(0).is_none());
    assert_eq!(history.window(5, 10).count(), 0);
    for second in 0..1_000 {
        let mut stats = sample.stats.clone();
        stats.uptime_ms += second * 1000;
        history.push(stats, Vec::new());
    }
    let (first, last) = history.range().expect("intervals");
    assert_eq!(last - first + 1, INTERVALS_MAX as u64);
    let uptime = |number| history.get(number).expect("an interval").uptime_ms;
    assert_eq!(uptime(last) - uptime(last - 30), 30_000);
    assert_eq!(uptime(0), uptime(first));
    assert_eq!(uptime(u64::MAX), uptime(last));
    assert_eq!(history.window(last, 5).count(), 5);
    assert_eq!(history.window(first, 5).count(), 1);
}

#[test]
fn very_many_volumes_shorten_the_history_and_nothing_grows() {
    let mut sample = fixture::samples().remove(0);
    let one = sample.stats.volumes[0].clone();
    sample.stats.volumes = (0..20_000)
        .map(|id| {
            let mut volume = one.clone();
            (volume.id, volume.name) = (id, format!("volume-{id}"));
            volume.operations.clear();
            volume
        })
        .collect();
    let mut history = History::default();
    for second in 0..60 {
        let mut stats = sample.stats.clone();
        stats.uptime_ms += second * 1000;
        history.push(stats, Vec::new());
    }
    let (first, last) = history.range().expect("intervals");
    assert!((10..59).contains(&(last - first)), "{first} to {last}");
}
