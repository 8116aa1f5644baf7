//! The commands typed after `:`.

use crate::app::Screen;

/// A command that was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Go to a screen.
    Show(Screen),
    /// Sort the table by the column whose heading begins so.
    Sort(String),
    /// Show only rows with this text; all if it is empty.
    Filter(String),
    /// Show the latency of one volume; of all if it is empty.
    Volume(String),
    /// Stop the picture.
    Freeze,
    /// Let it go on.
    Live,
    /// Replay so many times as fast as it was.
    Speed(String),
    /// Go to a time in the recording.
    Goto(String),
    /// Show the help.
    Help,
    /// Leave.
    Quit,
}

/// What can be typed, for the help.
pub const COMMANDS: &[(&str, &str)] = &[
    (":pulse :volumes ...", "go to a screen"),
    (":sort COLUMN", "by a heading"),
    (":filter [TEXT]", "only rows with it"),
    (":volume [NAME]", "its latency; all"),
    (":freeze :live", "stop or go on"),
    (":goto TIME", "14:03, 2h ago"),
    (":speed N", "of a replay"),
    (":help :quit", ""),
];

/// Reads a command. Words may be shortened as long as it is clear what they mean.
///
/// # Errors
/// A sentence that says what there is.
pub fn parse(text: &str) -> Result<Typed, String> {
    let text = text.trim();
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let rest = rest.trim();
    let screens = Screen::ALL.into_iter().map(|one| (one.name().to_lowercase(), Typed::Show(one)));
    let others = [
        ("sort", Typed::Sort(rest.to_owned())),
        ("filter", Typed::Filter(rest.to_owned())),
        ("volume", Typed::Volume(rest.to_owned())),
        ("freeze", Typed::Freeze),
        ("live", Typed::Live),
        ("speed", Typed::Speed(rest.to_owned())),
        ("goto", Typed::Goto(rest.to_owned())),
        ("help", Typed::Help),
        ("quit", Typed::Quit),
    ];
    let mut commands: Vec<(String, Typed)> = screens.collect();
    commands.extend(others.map(|(name, command)| (name.to_owned(), command)));
    if let Some((_, exact)) = commands.iter().find(|(name, _)| name == word) {
        return Ok(exact.clone());
    }
    commands.retain(|(name, _)| !word.is_empty() && name.starts_with(&word.to_lowercase()));
    match commands.as_slice() {
        [(_, only)] => Ok(only.clone()),
        [] => Err(format!("no command '{word}'; :help lists them")),
        several => {
            let names: Vec<&str> = several.iter().map(|(name, _)| name.as_str()).collect();
            Err(format!("'{word}' may be {}", names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_may_be_shortened() {
        assert_eq!(parse("quit"), Ok(Typed::Quit));
        assert_eq!(parse(" q "), Ok(Typed::Quit));
        assert_eq!(parse("dev"), Ok(Typed::Show(Screen::Devices)));
        assert_eq!(parse("sort  r p99"), Ok(Typed::Sort("r p99".to_owned())));
        assert_eq!(parse("volume db0"), Ok(Typed::Volume("db0".to_owned())));
        assert_eq!(parse("volumes"), Ok(Typed::Show(Screen::Volumes)));
    }

    #[test]
    fn others_are_refused_with_what_there_is() {
        assert!(parse("").is_err());
        assert!(parse("x").expect_err("none").contains(":help"));
        assert_eq!(parse("h").expect_err("two"), "'h' may be hosts, help");
    }
}
