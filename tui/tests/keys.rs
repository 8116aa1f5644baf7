//! What keys do to the console's state.

use crossterm::event::KeyCode;
use crossterm::event::KeyEvent;
use crossterm::event::KeyModifiers;
use weft_api::Operation;
use weft_tui::app::Action;
use weft_tui::app::App;
use weft_tui::app::Input;
use weft_tui::app::Left;
use weft_tui::app::Overlay;
use weft_tui::app::Screen;
use weft_tui::tables::TableKind;
use weft_tui::theme::ASCII;
use weft_tui::theme::Look;
use weft_tui::theme::Theme;

mod fixture;

fn console(own_node: bool) -> App {
    let look = Look { theme: Theme::default(), symbols: &ASCII };
    let mut app = App::new(look, "weft.sock".to_owned(), own_node);
    for (second, sample) in (0..).zip(fixture::samples()) {
        app.sample(sample, second * 1000);
    }
    app
}

fn press(app: &mut App, code: KeyCode) -> Action {
    app.key(KeyEvent::from(code))
}

fn type_text(app: &mut App, text: &str) -> Action {
    text.chars().map(|key| press(app, KeyCode::Char(key))).last().expect("a key")
}

fn control(app: &mut App, key: char) -> Action {
    app.key(KeyEvent::new(KeyCode::Char(key), KeyModifiers::CONTROL))
}

#[test]
fn digits_choose_screens() {
    let mut app = console(false);
    for (digit, screen) in (1_u8..).zip(Screen::ALL) {
        press(&mut app, KeyCode::Char(char::from(b'0' + digit)));
        assert_eq!(app.screen, screen);
    }
}

#[test]
fn quitting_leaves_or_asks() {
    let mut app = console(false);
    assert_eq!(type_text(&mut app, "q"), Action::Leave(Left::Quit));
    assert_eq!(control(&mut console(false), 'c'), Action::Leave(Left::Quit));

    let mut own = console(true);
    assert_eq!(type_text(&mut own, "q"), Action::Draw);
    assert_eq!(own.overlay, Overlay::Leave);
    press(&mut own, KeyCode::Esc);
    assert_eq!(own.overlay, Overlay::None);
    assert_eq!(type_text(&mut own, "qk"), Action::Leave(Left::KeepNode));
    assert_eq!(type_text(&mut console(true), "qs"), Action::Leave(Left::StopNode));
    let mut own = console(true);
    control(&mut own, 'c');
    assert_eq!(control(&mut own, 'c'), Action::Leave(Left::StopNode));
}

#[test]
fn a_filter_grows_as_it_is_typed_and_goes_with_escape() {
    let mut app = console(false);
    type_text(&mut app, "2/db");
    assert_eq!(app.input, Input::Filter);
    assert_eq!(app.rows(TableKind::Volumes).len(), 1);
    press(&mut app, KeyCode::Backspace);
    control(&mut app, 'u');
    assert_eq!(app.rows(TableKind::Volumes).len(), 4);
    type_text(&mut app, "q");
    assert_eq!(app.rows(TableKind::Volumes).len(), 0);
    press(&mut app, KeyCode::Enter);
    assert_eq!((app.input, app.table(TableKind::Volumes).filter.as_str()), (Input::None, "q"));
    press(&mut app, KeyCode::Esc);
    assert_eq!(app.table(TableKind::Volumes).filter, "");
    type_text(&mut app, "1/");
    assert_eq!(app.input, Input::None);
    assert!(!app.note.is_empty());
}

#[test]
fn commands_do_what_they_say() {
    let mut app = console(false);
    let run = |app: &mut App, text: &str| {
        type_text(app, ":");
        type_text(app, text);
        press(app, KeyCode::Enter)
    };
    run(&mut app, "volumes");
    run(&mut app, "sort read/s");
    assert_eq!(app.selected(TableKind::Volumes).as_deref(), Some("web"));
    run(&mut app, "filter idle");
    assert_eq!(app.rows(TableKind::Volumes).len(), 1);
    run(&mut app, "freeze");
    assert!(app.frozen.is_some());
    run(&mut app, "live");
    assert!(app.frozen.is_none());
    run(&mut app, "volume web");
    assert_eq!((app.screen, app.volume.as_deref()), (Screen::Latency, Some("web")));
    run(&mut app, "volume nosuch");
    assert_eq!(app.note, "no volume 'nosuch'");
    run(&mut app, "nonsense");
    assert!(app.note.contains("nonsense"));
    assert_eq!(run(&mut app, "quit"), Action::Leave(Left::Quit));
}

#[test]
fn the_selected_volume_is_followed_to_its_latency() {
    let mut app = console(false);
    type_text(&mut app, "2je");
    assert!(app.enlarged);
    let selected = app.selected(TableKind::Volumes);
    type_text(&mut app, "3");
    assert_eq!(app.volume, selected);
    type_text(&mut app, "f");
    assert_eq!(app.operation, Operation::Flush);
    press(&mut app, KeyCode::Tab);
    assert_eq!(app.operation, Operation::Read);
    type_text(&mut app, "a");
    assert_eq!(app.volume, None);
}

#[test]
fn escape_and_a_key_at_once_are_both() {
    let mut app = console(false);
    type_text(&mut app, "2e");
    app.key(KeyEvent::new(KeyCode::Char('4'), KeyModifiers::ALT));
    assert_eq!((app.screen, app.enlarged), (Screen::Devices, false));
    type_text(&mut app, "/x");
    app.key(KeyEvent::new(KeyCode::Char('q'), KeyModifiers::ALT));
    assert_eq!(app.table(TableKind::Devices).filter, "");
}

#[test]
fn sorting_goes_round_the_columns() {
    let mut app = console(false);
    type_text(&mut app, "2");
    let columns = TableKind::Volumes.columns().len();
    let begin = app.table(TableKind::Volumes).sort;
    for _ in 0..columns {
        type_text(&mut app, "s");
        assert_eq!(app.rows(TableKind::Volumes).len(), 4);
    }
    assert_eq!(app.table(TableKind::Volumes).sort, begin);
    let descending = app.table(TableKind::Volumes).descending;
    type_text(&mut app, "S");
    assert_ne!(app.table(TableKind::Volumes).descending, descending);
}

#[test]
fn stepping_stops_at_both_ends() {
    let mut app = console(false);
    let (first, last) = app.history.range().expect("intervals");
    for _ in 0..20 {
        type_text(&mut app, "[");
    }
    assert_eq!(app.frozen, Some(first));
    type_text(&mut app, "}");
    assert_eq!(app.frozen, Some(last));
    type_text(&mut app, " ");
    assert_eq!(app.frozen, None);
    let empty = Look { theme: Theme::default(), symbols: &ASCII };
    let mut empty = App::new(empty, String::new(), false);
    type_text(&mut empty, "[ ]2e/x");
    assert_eq!((empty.frozen, empty.enlarged), (None, false));
}

#[test]
fn no_sequence_of_keys_breaks_anything() {
    let mut app = console(true);
    let mut seed = 1_u64;
    let codes: Vec<KeyCode> = weft_tui::keys::BINDINGS
        .iter()
        .flat_map(|binding| binding.codes)
        .copied()
        .chain([KeyCode::Backspace, KeyCode::Left, KeyCode::Char('x')])
        .collect();
    for _ in 0..5_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = usize::try_from(seed >> 33).expect("31 bits") % codes.len();
        press(&mut app, codes[at]);
        assert!(app.shown().is_some());
    }
}
