//! The commands that print what a screen shows, for scripts and for learning.

use weft_api::URL_PREFIX;

use crate::app::App;
use crate::app::Screen;
use crate::tables::TableKind;
use crate::when::rfc3339;

/// Commands that print what is shown now.
#[must_use]
pub fn commands(app: &App) -> Vec<String> {
    let api = format!("--api {}", shell_word(&app.socket));
    let weft = |command: &str| format!("weft {command} {api}");
    let get = |path: &str| match app.socket.starts_with(URL_PREFIX) {
        true => format!(
            "curl --cacert \"$WEFT_CA\" -H \"Authorization: Bearer $(cat \"$WEFT_TOKEN_FILE\")\" {}",
            shell_word(&format!("{}{path}", app.socket.trim_end_matches('/')))
        ),
        false => format!(
            "curl --unix-socket {} {}",
            shell_word(&app.socket),
            shell_word(&format!("http://weft{path}"))
        ),
    };
    if let (Some(_), Some(shown)) = (&app.replay, app.shown()) {
        let begin_ms = shown.unix_ms.saturating_sub(60_000);
        let (from, until) = (rfc3339(begin_ms), rfc3339(shown.unix_ms));
        let replay = |rest: &str| weft(&format!("top --replay -t {from} {rest}"));
        return vec![
            replay(&format!("--until {until} --mode csv")),
            replay(&format!("--until {until} --mode json")),
            get(&format!("/v1/history?from_ms={begin_ms}&to_ms={}", shown.unix_ms)),
        ];
    }
    match app.screen {
        Screen::Pulse => {
            vec![weft("status"), weft("pod show"), weft("top --once --mode text")]
        }
        Screen::Volumes => {
            let mut commands = vec![weft("volume list"), weft("top --once --mode csv")];
            if let Some(name) = app.selected(TableKind::Volumes) {
                let name = shell_word(&name);
                commands.push(weft(&format!("volume show {name}")));
                commands.push(weft(&format!("export show {name}")));
            }
            commands
        }
        Screen::Latency => vec![weft("top --once --mode json"), get("/v1/stats")],
        Screen::Devices => vec![weft("device list"), weft("task list")],
        Screen::Hosts => vec![get("/v1/connections"), weft("host list")],
        Screen::Events => vec![get("/v1/events?after=0")],
    }
}

/// A word for people to paste into a shell.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(shell_word("weft-data/weft.sock"), "weft-data/weft.sock");
        assert_eq!(shell_word("my data/it's"), "'my data/it'\\''s'");
    }
}
