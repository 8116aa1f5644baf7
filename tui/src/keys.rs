//! What each key does: one table, from which the help is drawn too.

use crossterm::event::KeyCode;
use crossterm::event::KeyEvent;
use crossterm::event::KeyModifiers;
use weft_api::Operation;

use crate::app::Screen;

/// Everything a key can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Go to a screen.
    Show(Screen),
    /// Show what the keys do.
    Help,
    /// Type a filter.
    Filter,
    /// Type a command.
    Line,
    /// Stop the picture, or go on.
    Freeze,
    /// Go back or forth in recorded time by that many intervals, which stops the picture.
    Step(i64),
    /// Enlarge the panel that has the focus, or show the row under the cursor in full.
    Enlarge,
    /// Show the commands that print the same.
    Equivalent,
    /// Leave.
    Quit,
    /// Move the cursor by that many rows, or the focus.
    Move(isize),
    /// Sort by the next column.
    NextColumn,
    /// Sort the other way round.
    Reverse,
    /// Choose the operation whose latency is shown.
    Operation(Operation),
    /// Go to the next operation, or the next panel.
    Next,
    /// Show the latency of all volumes again.
    AllVolumes,
    /// Back to where this came from.
    Back,
}

/// Keys that do the same.
#[derive(Debug)]
pub struct Binding {
    /// The keys.
    pub codes: &'static [KeyCode],
    /// How the help writes them.
    pub shown: &'static str,
    /// What they do.
    pub meaning: &'static str,
    /// What they ask for.
    pub command: Command,
}

const fn bind(
    codes: &'static [KeyCode],
    shown: &'static str,
    meaning: &'static str,
    command: Command,
) -> Binding {
    Binding { codes, shown, meaning, command }
}

/// Every key. Those with an empty meaning are explained by the one before.
pub const BINDINGS: &[Binding] = &[
    bind(&[KeyCode::Char('1')], "1", "Pulse: the pod as a whole", Command::Show(Screen::Pulse)),
    bind(&[KeyCode::Char('2')], "2", "Volumes", Command::Show(Screen::Volumes)),
    bind(&[KeyCode::Char('3')], "3", "Latency, over time", Command::Show(Screen::Latency)),
    bind(&[KeyCode::Char('4')], "4", "Devices", Command::Show(Screen::Devices)),
    bind(&[KeyCode::Char('5')], "5", "Hosts: connections", Command::Show(Screen::Hosts)),
    bind(&[KeyCode::Char('6')], "6", "Events", Command::Show(Screen::Events)),
    bind(&[KeyCode::Char(' ')], "space", "freeze the picture, or go on", Command::Freeze),
    bind(&[KeyCode::Char('[')], "[ ]", "a second back, forth (freezes)", Command::Step(-1)),
    bind(&[KeyCode::Char(']')], "", "", Command::Step(1)),
    bind(&[KeyCode::Char('{')], "{ }", "half a minute back, forth", Command::Step(-30)),
    bind(&[KeyCode::Char('}')], "", "", Command::Step(30)),
    bind(&[KeyCode::Up, KeyCode::Char('k')], "up k", "cursor or focus up", Command::Move(-1)),
    bind(&[KeyCode::Down, KeyCode::Char('j')], "down j", "cursor or focus down", Command::Move(1)),
    bind(&[KeyCode::PageUp], "PgUp", "ten rows up; PgDn: down", Command::Move(-10)),
    bind(&[KeyCode::PageDown], "", "", Command::Move(10)),
    bind(&[KeyCode::Home], "Home", "first row; End: last", Command::Move(isize::MIN)),
    bind(&[KeyCode::End], "", "", Command::Move(isize::MAX)),
    bind(&[KeyCode::Tab], "Tab", "next panel or operation", Command::Next),
    bind(&[KeyCode::Enter, KeyCode::Char('e')], "e Enter", "enlarge, or details", Command::Enlarge),
    bind(&[KeyCode::Esc], "Esc", "back; drops the filter", Command::Back),
    bind(&[KeyCode::Char('/')], "/", "filter the table", Command::Filter),
    bind(&[KeyCode::Char('s')], "s", "sort by the next column", Command::NextColumn),
    bind(&[KeyCode::Char('S')], "S", "sort the other way round", Command::Reverse),
    bind(
        &[KeyCode::Char('r')],
        "r w f",
        "reads, writes, flushes",
        Command::Operation(Operation::Read),
    ),
    bind(&[KeyCode::Char('w')], "", "", Command::Operation(Operation::Write)),
    bind(&[KeyCode::Char('f')], "", "", Command::Operation(Operation::Flush)),
    bind(&[KeyCode::Char('a')], "a", "latency of all volumes", Command::AllVolumes),
    bind(&[KeyCode::Char('y')], "y", "commands that print the same", Command::Equivalent),
    bind(&[KeyCode::Char(':')], ":", "command; :help lists them", Command::Line),
    bind(&[KeyCode::Char('?')], "?", "this help", Command::Help),
    bind(&[KeyCode::Char('q')], "q", "quit", Command::Quit),
];

/// What a key asks for; `None` for keys that do nothing.
#[must_use]
pub fn command(key: KeyEvent) -> Option<Command> {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return (key.code == KeyCode::Char('c')).then_some(Command::Quit);
    }
    BINDINGS.iter().find(|binding| binding.codes.contains(&key.code)).map(|one| one.command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_does_two_things() {
        let codes: Vec<_> = BINDINGS.iter().flat_map(|binding| binding.codes).collect();
        for (at, code) in codes.iter().enumerate() {
            assert!(!codes[..at].contains(code), "{code:?}");
        }
    }

    #[test]
    fn control_c_quits_and_other_control_keys_do_nothing() {
        let control = |c| KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL);
        assert_eq!(command(control('c')), Some(Command::Quit));
        assert_eq!(command(control('e')), None);
    }
}
