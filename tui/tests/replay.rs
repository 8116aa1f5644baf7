//! A recording that is played: over more than is kept, over gaps and restarts, and to its end.

use crossterm::event::KeyCode;
use crossterm::event::KeyEvent;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use weft_api::Histogram;
use weft_api::Operation;
use weft_api::Stats;
use weft_tui::app::App;
use weft_tui::format::date_time;
use weft_tui::model::history::INTERVALS_MAX;
use weft_tui::recording::Choice;
use weft_tui::recording::Recording;
use weft_tui::recording::Want;
use weft_tui::replay::Loaded;
use weft_tui::replay::Replay;
use weft_tui::screens;
use weft_tui::source::Source;
use weft_tui::theme::Look;
use weft_tui::theme::Theme;
use weft_tui::theme::UNICODE;

mod fixture;

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
/// When the tests are.
const NOW: u64 = 1_795_291_323_000;
/// Reads a second that every reading shows.
const READS: u64 = 1_000;

/// What a node had counted that was started at `start` for the `epoch`-th time.
fn reading(unix_ms: u64, start: u64, epoch: u64) -> Stats {
    let mut stats = fixture::samples().swap_remove(0).stats;
    stats.unix_ms = unix_ms;
    stats.uptime_ms = unix_ms - start;
    stats.pod.epoch = epoch;
    stats.devices.clear();
    stats.volumes.truncate(1);
    stats.volumes[0].operations.truncate(1);
    let reads = (unix_ms - start) * READS / SECOND;
    let operation = &mut stats.volumes[0].operations[0];
    assert_eq!(operation.operation, Operation::Read);
    operation.latency = Histogram { sum_ns: reads * 1000, buckets: vec![(90, reads)] };
    operation.stages.clear();
    stats
}

/// What a node recorded that ran from `start` to `end`, as thin as it is `NOW`.
fn run(start: u64, end: u64, epoch: u64) -> Vec<Stats> {
    let template = reading(start, start, epoch);
    let mut readings = Vec::new();
    let mut unix_ms = start;
    while unix_ms <= end {
        let mut stats = template.clone();
        let reads = (unix_ms - start) * READS / SECOND;
        (stats.unix_ms, stats.uptime_ms) = (unix_ms, unix_ms - start);
        stats.volumes[0].operations[0].latency.buckets[0].1 = reads;
        readings.push(stats);
        unix_ms += if unix_ms < NOW - HOUR { 10 * SECOND } else { SECOND };
    }
    readings
}

/// A console that replays, with what it replays.
struct Console {
    app: App,
    recording: Recording,
    now_ms: u64,
}

impl Console {
    fn new(readings: Vec<Stats>, from_ms: u64) -> Self {
        let look = Look { theme: Theme::default(), symbols: &UNICODE };
        let app = App::new(look, "weft.sock".to_owned(), false);
        let app = app.replaying(Replay::new(from_ms, NOW));
        let mut console = Self { app, recording: Recording::Kept(readings), now_ms: 0 };
        console.load();
        console
    }

    /// Loads all that is wanted, one piece after the other.
    fn load(&mut self) {
        while let Some(want) = self.app.want() {
            let intervals = load(&self.recording, want);
            let loaded = Loaded { want, intervals: Ok(intervals), events: None };
            self.app.loaded(loaded, self.now_ms);
            let (first, last) = self.app.history.range().unwrap_or((0, 0));
            assert!(last - first < INTERVALS_MAX as u64, "too much is kept");
        }
    }

    fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.app.tick(self.now_ms);
        self.load();
    }

    fn press(&mut self, keys: &str) {
        for key in keys.chars() {
            let code = if key == '\n' { KeyCode::Enter } else { KeyCode::Char(key) };
            self.app.key(KeyEvent::from(code));
            self.load();
        }
    }

    /// The end of the interval that is shown.
    fn shown_ms(&self) -> u64 {
        self.app.shown().expect("something is shown").unix_ms
    }

    /// Reads a second that are shown.
    fn reads(&self) -> u64 {
        let shown = self.app.shown().expect("something is shown");
        weft_tui::format::whole(shown.per_second(shown.total.requests(Operation::Read)))
    }

    fn screen(&self) -> String {
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).expect("test backend");
        terminal.draw(|frame| screens::draw(&self.app, frame)).expect("draw");
        let cells = terminal.backend().buffer().content();
        cells
            .chunks(80)
            .map(|line| {
                let line: String = line.iter().map(ratatui::buffer::Cell::symbol).collect();
                line.trim_end().to_owned() + "\n"
            })
            .collect()
    }

    fn shows(&self, text: &str) {
        let screen = self.screen();
        assert!(screen.contains(text), "no '{text}' in\n{screen}");
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(work)
}

fn load(recording: &Recording, want: Want) -> Vec<weft_tui::model::interval::Interval> {
    block_on(recording.load(want, NOW)).expect("in memory")
}

#[test]
fn a_replay_runs_at_recorded_speed_and_shows_where_it_is() {
    let from = NOW - 20 * MINUTE;
    let mut console = Console::new(run(NOW - 2 * HOUR, NOW, 1), from);
    assert_eq!((console.shown_ms(), console.reads()), (from, READS));
    console.shows(" REPLAY  2026-11-21 19:42:03 UTC  20 min 0 s ago  playing");
    for second in 1..=1_000 {
        console.pass(SECOND);
        assert_eq!((console.shown_ms(), console.reads()), (from + second * SECOND, READS));
    }
    console.press(" ");
    console.pass(5 * SECOND);
    assert_eq!(console.shown_ms(), from + 1_000 * SECOND);
    console.shows("19:58:43 UTC  20 min 5 s ago  frozen");
    console.press("5");
    console.shows("Connections are not recorded");
}

#[test]
fn at_the_end_it_stops_and_says_so() {
    let mut console = Console::new(run(NOW - HOUR, NOW, 1), NOW - 30 * MINUTE);
    console.press(":speed 60\n");
    console.shows("playing 60 times as fast");
    for _ in 0..29 {
        console.pass(SECOND);
    }
    assert_eq!(console.shown_ms(), NOW - MINUTE);
    for _ in 0..9 {
        console.pass(200);
    }
    assert_eq!(console.shown_ms(), NOW);
    console.shows("end of the recording");
    // What is recorded since is shown when it is asked for, and not before.
    let Recording::Kept(readings) = &mut console.recording else { panic!("in memory") };
    readings.extend([reading(NOW + SECOND, NOW - HOUR, 1), reading(NOW + 2_000, NOW - HOUR, 1)]);
    console.pass(10 * SECOND);
    assert_eq!(console.shown_ms(), NOW);
    console.press("]");
    assert_eq!(console.shown_ms(), NOW + SECOND);
    console.press("]]");
    assert_eq!(console.shown_ms(), NOW + 2 * SECOND);
    console.shows("end of the recording");
    console.press("[");
    console.shows("frozen");
    console.press(":live\n");
    console.shows("does not become live");
}

#[test]
fn a_fast_replay_does_not_become_live_and_a_slow_one_stays_behind() {
    let all = run(NOW - HOUR, NOW + MINUTE, 1);
    let until = |unix_ms: u64| -> Vec<Stats> {
        all.iter().filter(|one| one.unix_ms <= unix_ms).cloned().collect()
    };
    for (speed, ends) in [(":speed 1\n", false), (":speed 30\n", true)] {
        let mut console = Console::new(until(NOW), NOW - 10 * SECOND);
        console.press(speed);
        for tick in 1..=200 {
            console.recording = Recording::Kept(until(NOW + tick * 200));
            console.pass(200);
        }
        assert_eq!(console.screen().contains("end of the recording"), ends, "{speed}");
        let shown = console.shown_ms();
        assert!(if ends { shown <= NOW + 2 * SECOND } else { shown == NOW + 30 * SECOND });
    }
}

#[test]
fn steps_lead_past_what_is_kept_in_both_directions() {
    let begin = NOW - 6 * HOUR;
    let mut console = Console::new(run(begin, NOW, 1), NOW - 20 * MINUTE);
    console.press("[");
    assert_eq!(console.shown_ms(), NOW - 20 * MINUTE - SECOND);
    console.press("]");
    for steps in 1..=160 {
        console.press("{");
        assert_eq!(console.shown_ms(), NOW - 20 * MINUTE - steps * 30 * SECOND);
        assert_eq!(console.reads(), READS);
    }
    // Here there is a reading in ten seconds.
    console.press("[");
    let past = NOW - 100 * MINUTE - 10 * SECOND;
    assert_eq!(console.shown_ms(), past);
    for steps in 1..=190 {
        console.press("}");
        assert_eq!(console.shown_ms(), past + steps * 30 * SECOND);
    }
    console.press(":goto 5h ago\n");
    assert_eq!(console.shown_ms(), NOW - 5 * HOUR);
    for _ in 0..200 {
        console.press("{");
    }
    // The first reading has nothing before it.
    assert_eq!(console.shown_ms(), begin + 10 * SECOND);
    console.press("[[");
    assert_eq!(console.shown_ms(), begin + 10 * SECOND);
    console.press("]");
    assert_eq!(console.shown_ms(), begin + 20 * SECOND);
}

#[test]
fn a_node_that_was_down_leaves_a_gap_and_counts_anew() {
    let down = NOW - 40 * MINUTE;
    let up = down + 17 * MINUTE;
    let mut readings = run(NOW - HOUR, down, 1);
    readings.extend(run(up, NOW, 2).split_off(1));
    let mut console = Console::new(readings, down - 2 * SECOND);
    console.pass(2 * SECOND);
    assert_eq!(console.shown_ms(), down);
    console.pass(SECOND);
    assert_eq!((console.shown_ms(), console.reads()), (up + SECOND, READS));
    let shown = console.app.shown().expect("shown");
    assert_eq!((shown.gap_ms, shown.span_ms, shown.restarted), (up - down, SECOND, true));
    console.shows("UTC  23 min 2 s ago  after a gap of 17 min 0 s");
    console.shows("Load, after a gap of 17 min 0 s");
    console.pass(SECOND);
    assert_eq!((console.shown_ms(), console.reads()), (up + 2 * SECOND, READS));
    console.press("[[");
    assert_eq!(console.shown_ms(), down);
    console.press("}");
    assert_eq!(console.shown_ms(), up + SECOND);
    console.press("{");
    assert_eq!(console.shown_ms(), down);
    console.press(&format!(":goto {}\n", weft_tui::when::rfc3339(down + 5 * MINUTE)));
    console.shows("nothing is recorded of 2026-11-21 19:27:03 UTC; this is the nearest");
    assert_eq!(console.shown_ms(), up + SECOND);
}

#[test]
fn days_without_a_node_are_stepped_over() {
    let day = 24 * HOUR;
    let mut readings = run(NOW - 6 * day, NOW - 6 * day + 5 * MINUTE, 1);
    let before = readings.last().expect("some").unix_ms;
    readings.extend(run(NOW - 3 * MINUTE, NOW, 2));
    let mut console = Console::new(readings, NOW - 3 * MINUTE);
    for _ in 0..10 {
        console.press("[");
    }
    let shown = console.app.shown().expect("shown");
    assert!(shown.unix_ms < before && console.reads() == READS, "{}", date_time(shown.unix_ms));
    console.press(":goto 3d ago\n");
    assert_eq!(console.shown_ms(), NOW - 3 * MINUTE);
    console.press(":goto 7d\n");
    assert_eq!(console.shown_ms(), NOW - 6 * day + 10 * SECOND);
    console.press(":goto now\n");
    assert_eq!(console.shown_ms(), NOW);
}

#[test]
fn counters_that_ran_on_over_a_gap_make_no_rate() {
    let mut readings = run(NOW - HOUR, NOW, 1);
    readings.retain(|one| !(NOW - 30 * MINUTE..NOW - 29 * MINUTE).contains(&one.unix_ms));
    let mut console = Console::new(readings, NOW - 30 * MINUTE - SECOND);
    console.press("]");
    let shown = console.app.shown().expect("shown");
    assert!(shown.is_gap() && shown.gap_ms == 61 * SECOND, "{}", shown.gap_ms);
    assert_eq!((console.shown_ms(), console.reads()), (NOW - 29 * MINUTE, 0));
    console.press("]");
    assert_eq!(console.reads(), READS);
}

#[test]
fn nothing_recorded_and_a_node_that_is_away_are_told() {
    let mut console = Console::new(Vec::new(), NOW - MINUTE);
    console.shows("nothing is recorded yet");
    console.recording = Recording::Kept(run(NOW - HOUR, NOW, 1));
    console.pass(SECOND);
    assert_eq!(console.shown_ms(), NOW - MINUTE);

    console.press(" :goto 30m\n");
    console.app.key(KeyEvent::from(KeyCode::Char('{')));
    for _ in 0..30 {
        console.app.key(KeyEvent::from(KeyCode::Char('{')));
    }
    console.shows("reading the recording");
    let want = console.app.want().expect("more is wanted");
    let away = Loaded { want, intervals: Err("no node answers".to_owned()), events: None };
    console.app.loaded(away, console.now_ms);
    console.shows("no node answers");
    assert_eq!(console.app.want(), None);
    // All that was stepped meanwhile is made up for.
    console.pass(SECOND);
    assert_eq!(console.shown_ms(), NOW + SECOND - 30 * MINUTE - 31 * 30 * SECOND);
}

#[test]
fn events_are_those_of_the_time_that_is_shown() {
    let mut console = Console::new(run(NOW - HOUR, NOW, 1), NOW - 20 * MINUTE);
    let events = fixture::samples().into_iter().flat_map(|sample| sample.events);
    let events = (1..).zip(events).map(|(number, mut event)| {
        event.unix_ms = NOW - 20 * MINUTE - 25 * SECOND + number * 20 * SECOND;
        event
    });
    console.press("]");
    let want = Want::Before(0);
    let loaded = Loaded { want, intervals: Ok(Vec::new()), events: Some(events.collect()) };
    console.app.loaded(loaded, console.now_ms);
    console.press("6");
    console.shows("Events (1)");
    console.press("{");
    console.shows("keeps no events of this time");
    console.press("}}");
    console.shows("Events (2)");
}

#[test]
fn a_speed_and_a_time_must_be_ones() {
    let mut console = Console::new(run(NOW - HOUR, NOW, 1), NOW - 20 * MINUTE);
    for (command, reason) in [
        (":speed 0\n", "'0' is no speed"),
        (":speed fast\n", "'fast' is no speed"),
        (":goto yesterday\n", "'yesterday' is not a time"),
    ] {
        console.press(command);
        console.shows(reason);
    }
    console.press(":goto 19:50\n");
    assert_eq!(console.shown_ms(), NOW - 12 * MINUTE - 3 * SECOND);
}

#[test]
fn a_source_gives_every_reading_once_and_thins_them() {
    let all = |step_ms, until_ms| {
        let choice = Choice { now_ms: NOW, step_ms, until_ms };
        let recording = Recording::Kept(run(NOW - 2 * HOUR, NOW, 1));
        let mut source = Source::replay(recording, NOW - 90 * MINUTE, choice);
        let mut times = Vec::new();
        while let Some(sample) = block_on(source.next()).expect("in memory") {
            times.push(sample.stats.unix_ms);
        }
        times
    };
    let times = all(0, NOW);
    assert_eq!((times.len(), times.last()), (180 + 3601, Some(&NOW)));
    assert!(times.is_sorted_by(|one, next| one < next));
    assert_eq!(all(MINUTE, NOW).len(), 91);
    assert_eq!(all(0, NOW - 89 * MINUTE).len(), 7);
    assert_eq!(all(0, NOW - 91 * MINUTE).len(), 0);
}
