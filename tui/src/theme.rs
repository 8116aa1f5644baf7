//! How the console looks: colours by role, and the characters it draws with.
//!
//! The default colours are the 16 that every terminal has, so that a virtual machine's first
//! console shows them too; a theme file may name others. State is never told by colour alone.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use ratatui::style::Color;
use ratatui::style::Modifier;
use ratatui::style::Style;
use ratatui::symbols::border;
use serde::Deserialize;
use serde::Deserializer;
use serde::de::Error as _;

/// What something on the screen is, which decides its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Figures and words.
    Text,
    /// What only explains.
    Dim,
    /// Headings.
    Title,
    /// Frames.
    Border,
    /// The frame of the panel that has the focus, and keys.
    Focus,
    /// As it should be.
    Good,
    /// Less than it should be.
    Warning,
    /// Hosts see errors, or will.
    Bad,
    /// Of reads.
    Read,
    /// Of writes.
    Write,
    /// Of flushes.
    Flush,
}

/// A colour for each role.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Theme {
    #[serde(deserialize_with = "colour")]
    text: Color,
    #[serde(deserialize_with = "colour")]
    dim: Color,
    #[serde(deserialize_with = "colour")]
    title: Color,
    #[serde(deserialize_with = "colour")]
    border: Color,
    #[serde(deserialize_with = "colour")]
    focus: Color,
    #[serde(deserialize_with = "colour")]
    good: Color,
    #[serde(deserialize_with = "colour")]
    warning: Color,
    #[serde(deserialize_with = "colour")]
    bad: Color,
    #[serde(deserialize_with = "colour")]
    read: Color,
    #[serde(deserialize_with = "colour")]
    write: Color,
    #[serde(deserialize_with = "colour")]
    flush: Color,
}

impl Default for Theme {
    fn default() -> Self {
        Self {
            text: Color::Reset,
            dim: Color::DarkGray,
            title: Color::Cyan,
            border: Color::DarkGray,
            focus: Color::Yellow,
            good: Color::Green,
            warning: Color::Yellow,
            bad: Color::LightRed,
            read: Color::Cyan,
            write: Color::Magenta,
            flush: Color::Yellow,
        }
    }
}

impl Theme {
    /// Every role in the terminal's own colour, for `NO_COLOR` (no-color.org).
    #[must_use]
    pub fn plain() -> Self {
        let reset = Color::Reset;
        Self {
            text: reset,
            dim: reset,
            title: reset,
            border: reset,
            focus: reset,
            good: reset,
            warning: reset,
            bad: reset,
            read: reset,
            write: reset,
            flush: reset,
        }
    }

    /// Reads a theme, as TOML: a colour for each role that is not to be the default.
    ///
    /// # Errors
    /// A sentence with line and key.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())
    }

    /// [`Theme::parse`] of a file.
    ///
    /// # Errors
    /// A sentence that also names the file.
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("read theme {}: {error}", path.display()))?;
        Self::parse(&text).map_err(|reason| format!("theme {}: {reason}", path.display()))
    }

    /// The style of a role.
    #[must_use]
    pub fn style(&self, role: Role) -> Style {
        let colour = match role {
            Role::Text => self.text,
            Role::Dim => self.dim,
            Role::Title => self.title,
            Role::Border => self.border,
            Role::Focus => self.focus,
            Role::Good => self.good,
            Role::Warning => self.warning,
            Role::Bad => self.bad,
            Role::Read => self.read,
            Role::Write => self.write,
            Role::Flush => self.flush,
        };
        let style = Style::new().fg(colour);
        match role {
            Role::Title | Role::Focus | Role::Bad => style.add_modifier(Modifier::BOLD),
            Role::Text
            | Role::Dim
            | Role::Border
            | Role::Good
            | Role::Warning
            | Role::Read
            | Role::Write
            | Role::Flush => style,
        }
    }
}

fn colour<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Color, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == "default" {
        return Ok(Color::Reset);
    }
    text.parse().map_err(|_| {
        D::Error::custom(format!(
            "'{text}' is no colour: write default, a name (red, light-red, gray, ...), a number \
             from 0 to 255, or #rrggbb"
        ))
    })
}

/// The characters drawn with, each one column wide.
#[derive(Debug, PartialEq, Eq)]
pub struct Symbols {
    /// Parts of a cell filled from below; the last is all of it.
    pub levels: &'static [&'static str],
    /// From a little to much; the last is most.
    pub shades: &'static [&'static str],
    /// Ends text that was clipped.
    pub ellipsis: &'static str,
    /// Sorted upwards, and downwards.
    pub sorted: [&'static str; 2],
    /// Full and empty part of a gauge.
    pub gauge: [&'static str; 2],
    /// Frames.
    pub border: border::Set<'static>,
}

/// For terminals that speak UTF-8.
pub static UNICODE: Symbols = Symbols {
    levels: &["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"],
    shades: &["░", "▒", "▓", "█"],
    ellipsis: "…",
    sorted: ["▲", "▼"],
    gauge: ["█", "░"],
    border: border::PLAIN,
};

/// For all others.
pub static ASCII: Symbols = Symbols {
    levels: &["_", ".", ":", "-", "=", "+", "*", "#"],
    shades: &[".", ":", "*", "#"],
    ellipsis: "~",
    sorted: ["^", "v"],
    gauge: ["#", "."],
    border: border::Set {
        top_left: "+",
        top_right: "+",
        bottom_left: "+",
        bottom_right: "+",
        vertical_left: "|",
        vertical_right: "|",
        horizontal_top: "-",
        horizontal_bottom: "-",
    },
};

/// Colours and characters.
#[derive(Clone, Debug)]
pub struct Look {
    /// Colours.
    pub theme: Theme,
    /// Characters.
    pub symbols: &'static Symbols,
}

/// What of the environment decides how the console looks.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// `TERM`.
    pub term: String,
    /// The first that is set and not empty of `LC_ALL`, `LC_CTYPE` and `LANG`.
    pub locale: String,
    /// Whether `NO_COLOR` is set and not empty.
    pub no_color: bool,
}

impl Surroundings {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            term: set("TERM").unwrap_or_default(),
            locale: ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default(),
            no_color: set("NO_COLOR").is_some(),
        }
    }

    /// Whether only ASCII can be shown: on Linux's own console, whose font has few characters, and
    /// where the locale is not UTF-8.
    #[must_use]
    pub fn ascii_only(&self) -> bool {
        let locale = self.locale.to_ascii_lowercase();
        self.term == "linux" || !(locale.contains("utf-8") || locale.contains("utf8"))
    }

    /// How the console looks here.
    ///
    /// # Errors
    /// What [`Theme::load`] says.
    pub fn look(&self, ascii: bool, theme: Option<&PathBuf>) -> Result<Look, String> {
        let chosen = theme.map(|path| Theme::load(path)).transpose()?.unwrap_or_default();
        let theme = if self.no_color { Theme::plain() } else { chosen };
        let symbols = if ascii || self.ascii_only() { &ASCII } else { &UNICODE };
        Ok(Look { theme, symbols })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_theme_changes_the_roles_it_names() {
        let theme = Theme::parse("good = \"light-blue\"\nbad = \"#ff0000\"\ntext = \"7\"\n");
        let theme = theme.expect("a theme");
        assert_eq!(theme.good, Color::LightBlue);
        assert_eq!(theme.bad, Color::Rgb(255, 0, 0));
        assert_eq!(theme.text, Color::Indexed(7));
        assert_eq!(theme.read, Theme::default().read);
        assert_eq!(Theme::parse(""), Ok(Theme::default()));
    }

    #[test]
    fn a_wrong_theme_is_refused_with_line_and_key() {
        let error = Theme::parse("good = \"green\"\nbadd = \"red\"\n").expect_err("unknown key");
        assert!(error.contains("line 2") && error.contains("badd"), "{error}");
        let error = Theme::parse("good = \"greenish\"\n").expect_err("no colour");
        assert!(error.contains("line 1") && error.contains("'greenish' is no colour"), "{error}");
        let error = Theme::load(Path::new("no/such.toml")).expect_err("no file");
        assert!(error.contains("no/such.toml"), "{error}");
    }

    #[test]
    fn surroundings_decide_between_unicode_and_ascii() {
        let at = |term: &str, locale: &str| Surroundings {
            term: term.to_owned(),
            locale: locale.to_owned(),
            no_color: false,
        };
        assert!(!at("xterm-256color", "en_US.UTF-8").ascii_only());
        assert!(!at("tmux", "C.utf8").ascii_only());
        assert!(at("linux", "en_US.UTF-8").ascii_only());
        assert!(at("xterm", "C").ascii_only());
        assert!(at("xterm", "").ascii_only());
        let no_color = Surroundings { no_color: true, ..at("xterm", "C.UTF-8") };
        assert_eq!(no_color.look(false, None).expect("a look").theme, Theme::plain());
    }

    #[test]
    fn ascii_symbols_are_ascii() {
        let all = ASCII.levels.iter().chain(ASCII.shades).chain(&ASCII.sorted).chain(&ASCII.gauge);
        assert!(all.copied().all(str::is_ascii) && ASCII.ellipsis.is_ascii());
    }
}
