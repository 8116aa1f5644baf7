//! All the console knows, and what keys and readings do to it. Plain data: no socket, no terminal,
//! no clock; time comes in as a value.

use std::collections::BTreeMap;
use std::collections::VecDeque;

use crossterm::event::KeyCode;
use crossterm::event::KeyEvent;
use crossterm::event::KeyEventKind;
use crossterm::event::KeyModifiers;
use weft_api::Event;
use weft_api::NodeStatus;
use weft_api::Operation;
use weft_api::Volume;

use crate::keys;
use crate::keys::Command;
use crate::line;
use crate::line::Typed;
use crate::model::Sample;
use crate::model::history::History;
use crate::model::interval::Interval;
use crate::recording::Want;
use crate::replay::Loaded;
use crate::replay::Replay;
use crate::table::Row;
use crate::table::TableState;
use crate::table::column_named;
use crate::tables;
use crate::tables::TableKind;
use crate::theme::Look;
use crate::when::When;

/// Events kept, as many as the node keeps.
const EVENTS_MAX: usize = 1000;

/// A picture older than this is marked stale: more than two polls were missed.
const STALE_MS: u64 = 2_500;

/// Longest filter or command typed, in characters. Arbitrary; longer than any name.
const INPUT_LENGTH_MAX: usize = 256;

/// Operations whose latency is shown, in the order of Tab.
pub const OPERATIONS: [Operation; 3] = [Operation::Read, Operation::Write, Operation::Flush];

/// What fills the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "see src/screens")]
pub enum Screen {
    Pulse,
    Volumes,
    Latency,
    Devices,
    Hosts,
    Events,
}

impl Screen {
    /// Every one, in the order of their digits.
    pub const ALL: [Self; 6] =
        [Self::Pulse, Self::Volumes, Self::Latency, Self::Devices, Self::Hosts, Self::Events];

    /// Its name, on the screen and in commands.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pulse => "Pulse",
            Self::Volumes => "Volumes",
            Self::Latency => "Latency",
            Self::Devices => "Devices",
            Self::Hosts => "Hosts",
            Self::Events => "Events",
        }
    }

    /// The table it shows.
    #[must_use]
    pub fn table(self) -> Option<TableKind> {
        match self {
            Self::Volumes => Some(TableKind::Volumes),
            Self::Devices => Some(TableKind::Devices),
            Self::Hosts => Some(TableKind::Hosts),
            Self::Events => Some(TableKind::Events),
            Self::Pulse | Self::Latency => None,
        }
    }

    /// How many panels can have the focus.
    fn panels(self) -> usize {
        match self {
            Self::Pulse => crate::screens::pulse::PANELS,
            Self::Latency => crate::screens::latency::PANELS,
            Self::Volumes | Self::Devices | Self::Hosts | Self::Events => 1,
        }
    }
}

/// What is being typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Nothing.
    None,
    /// A filter, which is applied as it grows.
    Filter,
    /// A command.
    Line,
}

/// What lies above the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// Nothing.
    None,
    /// What the keys do.
    Help,
    /// The commands that print the same.
    Equivalent,
    /// Whether the node is to stop with the console.
    Leave,
}

/// How the console was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The operator has left a console that is not the node's own.
    Quit,
    /// The node is to stop.
    StopNode,
    /// The node is to go on without a console.
    KeepNode,
    /// A signal ended it.
    Signal,
}

/// What the caller has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Draw.
    Draw,
    /// Restore the terminal and leave.
    Leave(Left),
}

/// The console.
#[derive(Debug)]
pub struct App {
    /// What was recorded.
    pub history: History,
    /// How volumes are set up.
    pub volumes: Vec<Volume>,
    /// The node, once it was asked.
    pub node: Option<NodeStatus>,
    events: VecDeque<Event>,
    /// What fills the terminal.
    pub screen: Screen,
    /// The panel that has the focus, of screens with several.
    pub focus: usize,
    /// Whether it fills the terminal; of a table, whether the row under the cursor does.
    pub enlarged: bool,
    /// The operation whose latency is shown.
    pub operation: Operation,
    /// The volume whose latency is shown; `None` for all.
    pub volume: Option<String>,
    /// Number of the interval the picture of what is now was stopped at.
    pub frozen: Option<u64>,
    /// What plays a recording; `None` if the console shows what is now.
    pub replay: Option<Replay>,
    /// What is being typed.
    pub input: Input,
    /// The text so far.
    pub typed: String,
    /// What lies above the screen.
    pub overlay: Overlay,
    /// What there is to say about the last command.
    pub note: String,
    /// How everything looks.
    pub look: Look,
    /// The node's API socket or URL, as commands need it.
    pub socket: String,
    /// Why the last reading failed.
    pub offline: Option<String>,
    tables: BTreeMap<TableKind, TableState>,
    /// Whether the node is this process.
    own_node: bool,
    now_ms: u64,
    /// When the node last answered.
    answered_ms: Option<u64>,
}

impl App {
    /// A console that knows nothing yet, of the node at `socket`, which is this process's own or not.
    #[must_use]
    pub fn new(look: Look, socket: String, own_node: bool) -> Self {
        let state = |kind| match kind {
            TableKind::Volumes => TableState::sorted(tables::volumes::SORT, true),
            TableKind::Devices => TableState::sorted(0, false),
            TableKind::Hosts => TableState::sorted(tables::hosts::SORT, false),
            TableKind::Events => TableState::sorted(0, true),
        };
        Self {
            history: History::default(),
            volumes: Vec::new(),
            node: None,
            events: VecDeque::new(),
            screen: Screen::Pulse,
            focus: 0,
            enlarged: false,
            operation: Operation::Read,
            volume: None,
            frozen: None,
            replay: None,
            input: Input::None,
            typed: String::new(),
            overlay: Overlay::None,
            note: String::new(),
            look,
            socket,
            offline: None,
            tables: TableKind::ALL.into_iter().map(|kind| (kind, state(kind))).collect(),
            own_node,
            now_ms: 0,
            answered_ms: None,
        }
    }

    /// The same, for a recording.
    #[must_use]
    pub fn replaying(self, replay: Replay) -> Self {
        Self { replay: Some(replay), ..self }
    }

    /// What of the recording is to be loaded, said once.
    pub fn want(&mut self) -> Option<Want> {
        self.replay.as_mut()?.want(&self.history)
    }

    /// Takes a part of the recording.
    pub fn loaded(&mut self, loaded: Loaded, now_ms: u64) {
        self.tick(now_ms);
        let Some(replay) = self.replay.as_mut() else { return };
        let failed = loaded.intervals.as_ref().err().cloned();
        let done = replay.loaded(loaded.want, loaded.intervals, &mut self.history);
        match failed {
            // It is asked again: until then the last picture says so.
            Some(reason) => self.offline = Some(reason),
            None => {
                self.offline = None;
                self.note = done.err().unwrap_or_else(|| std::mem::take(&mut self.note));
            }
        }
        if let Some(events) = loaded.events {
            self.events = events.into();
        }
    }

    /// Takes a reading of the node.
    pub fn sample(&mut self, sample: Sample, now_ms: u64) {
        self.history.push(sample.stats, sample.connections);
        for event in sample.events {
            // One that happened again comes with a higher count: it takes the place of the other.
            self.events.retain(|other| tables::events::key(other) != tables::events::key(&event));
            self.events.push_back(event);
        }
        let surplus = self.events.len().saturating_sub(EVENTS_MAX);
        self.events.drain(..surplus);
        if let Some(volumes) = sample.volumes {
            self.volumes = volumes;
        }
        if sample.node.is_some() {
            self.node = sample.node;
        }
        self.offline = None;
        self.answered_ms = Some(now_ms);
        self.now_ms = now_ms;
    }

    /// Takes notice that the node did not answer. The last picture stays.
    pub fn failed(&mut self, reason: String, now_ms: u64) {
        self.offline = Some(reason);
        self.now_ms = now_ms;
    }

    /// Takes notice of the time, in milliseconds from wherever it began.
    pub fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        if let Some(replay) = &mut self.replay {
            replay.tick(now_ms, &self.history);
        }
    }

    /// Seconds since the node last answered, if that is longer than it should be.
    #[must_use]
    pub fn stale_s(&self) -> Option<u64> {
        let age = self.now_ms.saturating_sub(self.answered_ms?);
        (age >= STALE_MS).then_some(age / 1000)
    }

    /// Number of the interval that is shown.
    #[must_use]
    pub fn number(&self) -> u64 {
        if let Some(replay) = &self.replay {
            return replay.position();
        }
        let last = self.history.range().map_or(0, |(_, last)| last);
        self.frozen.unwrap_or(last)
    }

    /// The interval that is shown; `None` before the first reading.
    #[must_use]
    pub fn shown(&self) -> Option<&Interval> {
        self.history.get(self.number())
    }

    /// The events up to the moment that is shown.
    pub fn events_shown(&self) -> impl Iterator<Item = &Event> {
        let is_past = self.frozen.is_some() || self.replay.is_some();
        let shown = self.shown().filter(|_| is_past);
        let until = shown.map_or(u64::MAX, |interval| interval.unix_ms);
        self.events.iter().filter(move |event| event.unix_ms <= until)
    }

    /// What the operator did with a table.
    #[must_use]
    pub fn table(&self, kind: TableKind) -> &TableState {
        self.tables.get(&kind).expect("every table has its state")
    }

    fn table_mut(&mut self, kind: TableKind) -> &mut TableState {
        self.tables.entry(kind).or_default()
    }

    /// The rows of a table as they are shown.
    #[must_use]
    pub fn rows(&self, kind: TableKind) -> Vec<Row> {
        self.table(kind).arrange(kind.rows(self))
    }

    /// Key of the row under the cursor of a table.
    #[must_use]
    pub fn selected(&self, kind: TableKind) -> Option<String> {
        let mut rows = self.rows(kind);
        let at = self.table(kind).cursor(&rows);
        (at < rows.len()).then(|| rows.swap_remove(at).key)
    }

    /// Does what a key asks for.
    pub fn key(&mut self, key: KeyEvent) -> Action {
        if key.kind == KeyEventKind::Release {
            return Action::Draw;
        }
        // Terminals send the same bytes for Alt with a key and for Esc and then the key.
        if key.modifiers.contains(KeyModifiers::ALT) {
            return match self.press(KeyEvent::from(KeyCode::Esc)) {
                Action::Draw => {
                    self.press(KeyEvent::new(key.code, key.modifiers - KeyModifiers::ALT))
                }
                leave @ Action::Leave(_) => leave,
            };
        }
        self.press(key)
    }

    fn press(&mut self, key: KeyEvent) -> Action {
        let control_c =
            key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
        if self.overlay == Overlay::Leave {
            return self.answer_leave(key.code, control_c);
        }
        if self.input != Input::None && !control_c {
            return self.edit(key);
        }
        self.note.clear();
        if self.overlay != Overlay::None && !control_c {
            self.overlay = Overlay::None;
            return Action::Draw;
        }
        keys::command(key).map_or(Action::Draw, |command| self.obey(command))
    }

    fn answer_leave(&mut self, code: KeyCode, control_c: bool) -> Action {
        match code {
            _ if control_c => Action::Leave(Left::StopNode),
            KeyCode::Char('s' | 'S') => Action::Leave(Left::StopNode),
            KeyCode::Char('k' | 'K') => Action::Leave(Left::KeepNode),
            _ => {
                self.overlay = Overlay::None;
                Action::Draw
            }
        }
    }

    /// A key while a filter or a command is typed.
    fn edit(&mut self, key: KeyEvent) -> Action {
        let mut done = Action::Draw;
        match key.code {
            KeyCode::Esc => {
                self.typed.clear();
                self.filter_as_typed();
                self.input = Input::None;
            }
            KeyCode::Enter => {
                let input = std::mem::replace(&mut self.input, Input::None);
                if input == Input::Line {
                    let text = std::mem::take(&mut self.typed);
                    done = self.execute(&text);
                }
            }
            KeyCode::Backspace => {
                self.typed.pop();
                self.filter_as_typed();
            }
            KeyCode::Char('u') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                self.typed.clear();
                self.filter_as_typed();
            }
            KeyCode::Char(c) if self.typed.chars().count() < INPUT_LENGTH_MAX => {
                self.typed.push(c);
                self.filter_as_typed();
            }
            _ => {}
        }
        done
    }

    fn filter_as_typed(&mut self) {
        if let (Input::Filter, Some(kind)) = (self.input, self.screen.table()) {
            self.table_mut(kind).filter = self.typed.clone();
        }
    }

    fn execute(&mut self, text: &str) -> Action {
        let typed = match line::parse(text) {
            Ok(typed) => typed,
            Err(reason) => {
                self.note = reason;
                return Action::Draw;
            }
        };
        match typed {
            Typed::Show(screen) => self.show(screen),
            Typed::Sort(word) => self.sort(&word),
            Typed::Filter(text) => match self.screen.table() {
                Some(kind) => self.table_mut(kind).filter = text,
                None => "this screen has no table".clone_into(&mut self.note),
            },
            Typed::Volume(name) => self.show_latency_of(name),
            Typed::Freeze => self.freeze(true),
            Typed::Live if self.replay.is_some() => {
                "a replay does not become live; space goes on".clone_into(&mut self.note);
            }
            Typed::Live => self.freeze(false),
            Typed::Speed(text) => self.with_replay(|replay| replay.set_speed(&text)),
            Typed::Goto(text) => self.with_replay(|replay| {
                let when = When::parse(&text)?;
                replay.go_to(when.unix_ms(replay.unix_now_ms()));
                Ok(())
            }),
            Typed::Help => self.overlay = Overlay::Help,
            Typed::Quit => return self.quit(),
        }
        Action::Draw
    }

    fn obey(&mut self, command: Command) -> Action {
        match command {
            Command::Show(screen) => self.show(screen),
            Command::Help => self.overlay = Overlay::Help,
            Command::Equivalent => self.overlay = Overlay::Equivalent,
            Command::Filter => self.begin_filter(),
            Command::Line => {
                self.input = Input::Line;
                self.typed.clear();
            }
            Command::Freeze => {
                let frozen = self.replay.as_ref().map_or(self.frozen.is_some(), Replay::is_paused);
                self.freeze(!frozen);
            }
            Command::Step(by) => self.step(by),
            Command::Enlarge => {
                self.enlarged = match self.screen.table() {
                    Some(kind) => !self.enlarged && self.selected(kind).is_some(),
                    None => !self.enlarged,
                };
            }
            Command::Quit => return self.quit(),
            Command::Move(by) => self.move_by(by),
            Command::NextColumn => self.next_column(),
            Command::Reverse => {
                if let Some(kind) = self.screen.table() {
                    let state = self.table_mut(kind);
                    state.descending = !state.descending;
                }
            }
            Command::Operation(operation) => self.choose(operation),
            Command::Next => self.next(),
            Command::AllVolumes => self.volume = None,
            Command::Back => self.back(),
        }
        Action::Draw
    }

    fn show(&mut self, screen: Screen) {
        // From a volume to its latency: what is selected stays selected.
        if self.screen == Screen::Volumes && screen == Screen::Latency && self.enlarged {
            self.volume = self.selected(TableKind::Volumes);
        }
        self.screen = screen;
        self.focus = 0;
        self.enlarged = false;
    }

    fn show_latency_of(&mut self, name: String) {
        let known = self.shown().is_some_and(|interval| interval.volume(&name).is_some());
        if !name.is_empty() && !known {
            self.note = format!("no volume '{name}'");
            return;
        }
        self.show(Screen::Latency);
        self.volume = (!name.is_empty()).then_some(name);
    }

    fn begin_filter(&mut self) {
        match self.screen.table() {
            Some(kind) => {
                self.enlarged = false;
                self.typed = self.table(kind).filter.clone();
                self.input = Input::Filter;
            }
            None => "this screen has no table".clone_into(&mut self.note),
        }
    }

    fn sort(&mut self, word: &str) {
        let Some(kind) = self.screen.table() else {
            "this screen has no table".clone_into(&mut self.note);
            return;
        };
        match column_named(kind.columns(), word) {
            Some(column) => self.table_mut(kind).sort_by(kind.columns(), column),
            None => self.note = format!("no column '{word}'"),
        }
    }

    fn next_column(&mut self) {
        if let Some(kind) = self.screen.table() {
            let columns = kind.columns();
            let state = self.table_mut(kind);
            state.sort_by(columns, (state.sort + 1) % columns.len());
        }
    }

    fn freeze(&mut self, freeze: bool) {
        match &mut self.replay {
            Some(replay) if freeze => replay.pause(),
            Some(replay) => replay.play(),
            None => self.frozen = self.history.range().map(|_| self.number()).filter(|_| freeze),
        }
    }

    fn with_replay(&mut self, work: impl FnOnce(&mut Replay) -> Result<(), String>) {
        self.note = match self.replay.as_mut().map(work) {
            Some(Ok(())) => String::new(),
            Some(Err(reason)) => reason,
            None => "this is no replay: weft top --replay shows what was recorded".to_owned(),
        };
    }

    fn step(&mut self, by: i64) {
        if let Some(replay) = &mut self.replay {
            return replay.step(by, &self.history);
        }
        if let Some((first, last)) = self.history.range() {
            self.frozen = Some(self.number().saturating_add_signed(by).clamp(first, last));
        }
    }

    fn move_by(&mut self, by: isize) {
        match self.screen.table() {
            Some(kind) => {
                let rows = self.rows(kind);
                self.table_mut(kind).step(&rows, by);
            }
            None => {
                let last = self.screen.panels() - 1;
                self.focus = self.focus.saturating_add_signed(by.signum()).min(last);
            }
        }
    }

    /// Tab: the next operation where there are operations to choose from, else the next panel.
    fn next(&mut self) {
        if self.shows_operation() {
            let at = OPERATIONS.iter().position(|one| *one == self.operation).unwrap_or(0);
            self.operation = OPERATIONS[(at + 1) % OPERATIONS.len()];
        } else {
            self.focus = (self.focus + 1) % self.screen.panels();
        }
    }

    fn choose(&mut self, operation: Operation) {
        if self.shows_operation() {
            self.operation = operation;
        }
    }

    fn shows_operation(&self) -> bool {
        self.screen == Screen::Latency || (self.screen == Screen::Volumes && self.enlarged)
    }

    fn back(&mut self) {
        if self.enlarged {
            self.enlarged = false;
        } else if let Some(kind) = self.screen.table() {
            self.table_mut(kind).filter.clear();
        }
    }

    fn quit(&mut self) -> Action {
        if !self.own_node {
            return Action::Leave(Left::Quit);
        }
        self.input = Input::None;
        self.overlay = Overlay::Leave;
        Action::Draw
    }
}
