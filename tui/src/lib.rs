//! The console of a node: `weft top` and `weft --tui`.
//!
//! It is a client of the management API and of nothing else, so it can run anywhere the API's socket
//! is, and can neither block nor break a node. What happens in it:
//!
//! ```text
//! source   asks the node once a second, on a task of its own
//!   |  Sample
//! model    two readings -> rates and percentiles; ten minutes of them
//!   |
//! app      all state; keys and samples change it, nothing else does
//!   |
//! screens  state -> characters and colours
//!   |
//! run      the terminal: keys in, pictures out, restored at the end however that comes
//! ```
//!
//! A replay has `recording`, which reads what the node has recorded, in place of the source, and
//! `replay` in the app, which says what of it is shown and what is to be read next.
//!
//! `plain` prints the model as text, JSON or CSV where there is no terminal.

#![forbid(unsafe_code)]

use std::fmt;
use std::io;

use weft_api::ClientError;

pub mod app;
mod equivalent;
mod feed;
pub mod format;
pub mod keys;
pub mod line;
pub mod model;
pub mod plain;
pub mod recording;
pub mod replay;
mod run;
pub mod screens;
pub mod source;
pub mod table;
pub mod tables;
pub mod theme;
pub mod when;

pub use app::Left;
pub use run::Options;
pub use run::check;
pub use run::run;
pub use when::When;

/// Why the console, or the printing of its figures, ended.
#[derive(Debug)]
pub enum Failure {
    /// The node does not answer.
    Node(ClientError),
    /// The theme file cannot be used; a sentence that names file, line and key.
    Theme(String),
    /// The terminal or standard output cannot be used.
    Io(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(error) => error.fmt(f),
            Self::Theme(reason) => f.write_str(reason),
            Self::Io(error) => write!(f, "use the terminal: {error}"),
        }
    }
}

impl std::error::Error for Failure {}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
