//! Every screen as text, drawn from a fixture and compared with `tests/screens/*.txt`.
//!
//! `UPDATE_SCREENS=1 cargo test -p weft-tui --test screens` writes the files anew; look at what
//! changed before committing them.

use std::fs;
use std::path::PathBuf;

use crossterm::event::KeyCode;
use crossterm::event::KeyEvent;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::Color;
use weft_tui::app::App;
use weft_tui::recording::Recording;
use weft_tui::replay::Loaded;
use weft_tui::replay::Replay;
use weft_tui::screens;
use weft_tui::theme::ASCII;
use weft_tui::theme::Look;
use weft_tui::theme::Symbols;
use weft_tui::theme::Theme;
use weft_tui::theme::UNICODE;

mod fixture;

fn updating() -> bool {
    std::env::var_os("UPDATE_SCREENS").is_some()
}

fn console(symbols: &'static Symbols) -> App {
    let look = Look { theme: Theme::default(), symbols };
    let mut app = App::new(look, "weft-data/weft.sock".to_owned(), true);
    for (second, sample) in (0..).zip(fixture::samples()) {
        app.sample(sample, second * 1000);
    }
    app
}

fn press(app: &mut App, keys: &str) {
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '\t' => KeyCode::Tab,
            '\x1b' => KeyCode::Esc,
            other => KeyCode::Char(other),
        };
        app.key(KeyEvent::from(code));
    }
}

fn terminal(app: &App, width: u16, height: u16) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("test backend");
    terminal.draw(|frame| screens::draw(app, frame)).expect("draw");
    terminal
}

/// What is on the screen, without blanks at the end of lines.
fn text(app: &App, width: u16, height: u16) -> String {
    let terminal = terminal(app, width, height);
    let buffer = terminal.backend().buffer();
    let mut text = String::new();
    for line in buffer.content().chunks(usize::from(width)) {
        let line: String = line.iter().map(ratatui::buffer::Cell::symbol).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn compare(name: &str, shown: &str) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/screens");
    let path = directory.join(format!("{name}.txt"));
    if updating() {
        fs::create_dir_all(&directory).expect("a directory");
        fs::write(&path, shown).expect("write the screen");
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(shown == expected, "{name} is not what it was; now:\n{shown}\nand was:\n{expected}");
}

#[test]
fn the_fixture_is_what_its_code_makes() {
    if updating() {
        fs::write(fixture::path(), fixture::text()).expect("write the fixture");
    }
    assert!(fs::read_to_string(fixture::path()).expect("fixture") == fixture::text());
}

#[test]
fn every_screen_is_drawn_as_it_was() {
    let views = [
        ("pulse", "1"),
        ("volumes", "2"),
        ("volume", "2jew"),
        ("latency", "3"),
        ("latency-of-one", ":volume db0\nw"),
        ("devices", "4"),
        ("device", "4jjje"),
        ("hosts", "5"),
        ("host", "5e"),
        ("events", "6"),
        ("event", "6je"),
        ("help", "?"),
        ("commands", "2y"),
        ("leave", "q"),
        ("enlarged", "1\t\te"),
    ];
    for (name, keys) in views {
        for (width, height) in [(80, 24), (120, 40)] {
            for (kind, symbols) in [("unicode", &UNICODE), ("ascii", &ASCII)] {
                let mut app = console(symbols);
                press(&mut app, keys);
                let shown = text(&app, width, height);
                assert!(kind != "ascii" || shown.is_ascii(), "{name} is not in ASCII:\n{shown}");
                compare(&format!("{name}-{width}x{height}-{kind}"), &shown);
            }
        }
    }
}

#[test]
fn a_replay_is_drawn_as_it_was() {
    for (width, height) in [(80, 24), (120, 40)] {
        for (kind, symbols) in [("unicode", &UNICODE), ("ascii", &ASCII)] {
            let shown = text(&replay(symbols), width, height);
            assert!(kind != "ascii" || shown.is_ascii(), "not in ASCII:\n{shown}");
            compare(&format!("replay-{width}x{height}-{kind}"), &shown);
        }
    }
}

/// The fixture as a recording, two minutes later.
fn replay(symbols: &'static Symbols) -> App {
    let readings: Vec<_> = fixture::samples().into_iter().map(|sample| sample.stats).collect();
    let from_ms = readings[8].unix_ms;
    let now_ms = from_ms + 120_000;
    let look = Look { theme: Theme::default(), symbols };
    let app = App::new(look, "weft-data/weft.sock".to_owned(), false);
    let mut app = app.replaying(Replay::new(from_ms, now_ms));
    let recording = Recording::Kept(readings);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    while let Some(want) = app.want() {
        let intervals = runtime.block_on(recording.load(want, now_ms)).expect("in memory");
        app.loaded(Loaded { want, intervals: Ok(intervals), events: None }, 0);
    }
    app
}

#[test]
fn an_empty_node_has_every_screen() {
    let mut sample = fixture::samples().remove(0);
    sample.stats.volumes.clear();
    sample.stats.devices.clear();
    sample.stats.front_ends.clear();
    sample.connections.clear();
    sample.events.clear();
    sample.volumes = Some(Vec::new());
    let look = Look { theme: Theme::default(), symbols: &UNICODE };
    let mut app = App::new(look, "weft.sock".to_owned(), false);
    let before = text(&app, 80, 24);
    assert!(before.contains("no answer yet") && before.contains("weft.sock"), "{before}");
    for second in 0..3 {
        app.sample(sample.clone(), second * 1000);
    }
    for (keys, words) in [
        ("1", "healthy"),
        ("2", "No volumes"),
        ("e", "No volumes"),
        ("3", "No read was answered"),
        ("4", "No devices"),
        ("5", "No host is connected"),
        ("6", "Nothing has happened"),
    ] {
        press(&mut app, keys);
        let shown = text(&app, 80, 24);
        assert!(shown.contains(words), "{keys}: {shown}");
    }
}

#[test]
fn any_size_is_drawn_and_a_small_one_says_so() {
    let mut app = console(&UNICODE);
    assert!(text(&app, 79, 24).contains("needs 80 columns and 24 lines; here are 79 and 24"));
    for keys in ["1", "2", "e", "3", "4", "5", "6", "?", "?y", "yq"] {
        press(&mut app, keys);
        for (width, height) in [(0, 0), (1, 1), (20, 5), (80, 24), (81, 25), (300, 100)] {
            if width > 0 {
                text(&app, width, height);
            }
        }
    }
    press(&mut app, "\x1b\x1b1");
    let wide = text(&app, 200, 60);
    assert!(wide.contains("Writes/s"), "{wide}");
}

#[test]
fn a_node_that_goes_away_leaves_its_last_picture_marked_stale() {
    let mut app = console(&UNICODE);
    press(&mut app, "2");
    assert!(text(&app, 80, 24).contains("live"));
    app.failed("no node answers at weft.sock".to_owned(), 18_500);
    let shown = text(&app, 80, 24);
    assert!(shown.contains("stale 7 s") && shown.contains("db0"), "{shown}");
    assert!(shown.contains("no node answers at weft.sock"), "{shown}");
    app.tick(21_000);
    assert!(text(&app, 80, 24).contains("stale 10 s"));
    app.sample(fixture::samples().pop().expect("samples"), 22_000);
    assert!(text(&app, 80, 24).contains("live"));
}

#[test]
fn a_filter_a_sort_and_the_cursor_show() {
    let mut app = console(&UNICODE);
    press(&mut app, "2/w");
    let typing = text(&app, 80, 24);
    assert!(typing.contains("/w") && typing.contains("Volumes (1) with 'w'"), "{typing}");
    press(&mut app, "\n");
    assert!(!text(&app, 80, 24).contains("db0"));
    press(&mut app, "/zzz\n");
    assert!(text(&app, 80, 24).contains("No row has this text"));
    press(&mut app, "\x1b:sort vol\n");
    let sorted = text(&app, 80, 24);
    let at = |name: &str| sorted.find(name).expect(name);
    assert!(at("db0") < at("idle") && at("idle") < at("web"), "{sorted}");
    press(&mut app, "S");
    let reversed = text(&app, 80, 24);
    assert!(reversed.find("web") < reversed.find("db0"), "{reversed}");
    press(&mut app, ":sort nothing\n");
    assert!(text(&app, 80, 24).contains("no column 'nothing'"));
}

#[test]
fn stepping_back_shows_the_past_and_stays_there() {
    let mut app = console(&UNICODE);
    assert!(text(&app, 80, 24).contains("degraded, can lose 1 more"));
    press(&mut app, "[[[[[[[[[[");
    let past = text(&app, 80, 24);
    assert!(past.contains("healthy, can lose 2 more") && past.contains("frozen -10 s"), "{past}");
    app.sample(fixture::samples().pop().expect("samples"), 12_000);
    assert!(text(&app, 80, 24).contains("healthy, can lose 2 more"));
    press(&mut app, "6");
    assert!(!text(&app, 80, 24).contains("device-failed") && text(&app, 80, 24).contains("(1)"));
    press(&mut app, "]");
    assert!(app.frozen.is_some());
    press(&mut app, " ");
    assert!(text(&app, 80, 24).contains("live"));
}

#[test]
fn five_hundred_volumes_scroll_and_odd_figures_are_drawn() {
    let mut app = console(&ASCII);
    for mut sample in fixture::samples() {
        let one = sample.stats.volumes[0].clone();
        sample.stats.volumes = (0..500)
            .map(|id| {
                let mut volume = one.clone();
                volume.id = 10 + id;
                volume.name = format!("volume-{id:03}");
                volume
            })
            .collect();
        sample.stats.pod.capacity_bytes = 0;
        sample.stats.pod.journal_bytes = 0;
        sample.stats.pod.physical_bytes = 0;
        sample.stats.pod.used_bytes = u64::MAX;
        sample.stats.pod.logical_bytes = u64::MAX;
        // Uptime stands still and everything goes back: counts as a restart, or as nothing.
        app.sample(sample.clone(), 0);
        sample.stats.uptime_ms = 0;
        sample.stats.pod.cache_hits = 0;
        sample.connections.iter_mut().for_each(|one| one.requests = 0);
        app.sample(sample, 0);
    }
    press(&mut app, "2:sort vol\n");
    for _ in 0..450 {
        press(&mut app, "j");
    }
    let shown = text(&app, 80, 24);
    assert!(shown.contains("volume-450") && !shown.contains("volume-000"), "{shown}");
    for keys in ["1", "3", "4", "5", "6", "2e"] {
        press(&mut app, keys);
        text(&app, 80, 24);
    }
}

#[test]
fn without_colour_nothing_is_coloured() {
    let mut app = console(&UNICODE);
    app.look.theme = Theme::plain();
    for keys in ["1", "2", "3", "4", "5", "6", "?"] {
        press(&mut app, keys);
        let terminal = terminal(&app, 80, 24);
        let mut cells = terminal.backend().buffer().content().iter();
        assert!(cells.all(|cell| cell.fg == Color::Reset && cell.bg == Color::Reset), "{keys}");
        press(&mut app, "\x1b");
    }
}
