//! Completions for shells, and manual pages: both made of the same description as `--help`.
//!
//! What that description does not say stands here: what each exit code means, the files of a
//! node's directory, and examples, which a test parses.

use std::fs;
use std::path::Path;

use clap::Command;
use clap::CommandFactory;
use clap::ValueEnum;
use clap_complete::shells;
use clap_mangen::Man;

use super::Arguments;
use super::doctor;
use super::exit::FAILED;
use super::exit::Failure;
use super::output;

/// Shells with completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// What the exit codes mean, as `--help` says it in one line.
const EXIT_STATUS: &[(&str, &str)] = &[
    ("0", "done"),
    ("1", "failed"),
    ("2", "wrong arguments, configuration or request"),
    ("3", "no node answers"),
    ("4", "no such volume or task"),
    ("5", "conflict (name taken, directory or address in use by another process)"),
    ("6", "not authorized (the token is not the node's)"),
];

/// The node's directory.
const FILES: &[(&str, &str)] = &[
    ("DIR/weft.lock", "held while a node runs on DIR; has its process id in it"),
    (
        "DIR/pod.json",
        "which pod belongs here: its identity, geometry and devices. It holds nothing that the \
         devices do not, and is never edited by hand",
    ),
    ("DIR/devices/dev-0.img ...", "devices of the pod, unless pod.devices names others"),
    ("DIR/history.redb", "recorded counts (history.size); may be deleted while no node runs"),
    ("DIR/weft.sock", "the management API, for the commands (api.socket)"),
    ("DIR/nbd.sock", "NBD for this machine (nbd.unix_socket)"),
];

/// Examples by command: what for, and a line to paste.
const EXAMPLES: &[(&str, &str, &str)] = &[
    ("weft", "Run a node with the defaults, in ./weft-data", "weft"),
    ("weft", "Write a configuration, and run a node on it", "weft --print-config >weft.toml"),
    ("weft", "", "weft --config weft.toml"),
    (
        "weft",
        "Before that, see whether the machine is fit for it",
        "weft doctor --config weft.toml",
    ),
    (
        "weft",
        "Create a volume, and print how hosts attach it",
        "weft volume create db --size 100GiB",
    ),
    ("weft", "", "weft export show db"),
    ("weft status", "Ask the node that runs on a directory", "weft status --data /srv/weft"),
    ("weft pod show", "Space, health and redundancy", "weft pod show"),
    ("weft pod scrub", "Each month, from cron: find and heal damage", "weft pod scrub --wait"),
    ("weft task list", "What is under way, and how it went", "weft task list"),
    ("weft task show", "One task, for a script", "weft task show 7-1 -o json"),
    ("weft task wait", "Wait for a rebuild or a scrub", "weft task wait 7-1"),
    ("weft task cancel", "End a scrub", "weft task cancel 7-1"),
    ("weft device list", "States and counters, for a script", "weft device list -o json"),
    ("weft volume create", "A thin volume", "weft volume create db --size 100GiB"),
    ("weft volume list", "All volumes, as YAML", "weft volume list -o yaml"),
    ("weft volume show", "One volume", "weft volume show db"),
    (
        "weft volume resize",
        "Grow a volume; hosts see it at once",
        "weft volume resize db --size 200GiB",
    ),
    (
        "weft volume hosts",
        "Serve a volume to one host only",
        "weft volume hosts db --only nqn.2014-08.org.example:db1",
    ),
    ("weft volume hosts", "Serve it to all again", "weft volume hosts db --all"),
    (
        "weft volume write-cache",
        "Before a bulk load, and off again after it",
        "weft volume write-cache db on",
    ),
    ("weft volume release", "After a host that held it is gone", "weft volume release db"),
    ("weft volume delete", "With all its data", "weft volume delete db"),
    ("weft export show", "Lines for nvme-cli, nbdtab, fstab and qemu", "weft export show db"),
    ("weft host add", "Let a host in", "weft host add nqn.2014-08.org.example:db1"),
    (
        "weft host add",
        "Let a host in that proves who it is",
        "weft host add nqn.2014-08.org.example:db1 --dhchap-key-file db1.key",
    ),
    (
        "weft host set",
        "From now on, both sides prove who they are",
        "weft host set nqn.2014-08.org.example:db1 --dhchap-key-file db1.key --dhchap-ctrl-key-file ctrl.key",
    ),
    (
        "weft host set",
        "No authentication any more",
        "weft host set nqn.2014-08.org.example:db1 --no-dhchap",
    ),
    (
        "weft host set",
        "From now on, it encrypts",
        "weft host set nqn.2014-08.org.example:db1 --tls-key-file db1.tls",
    ),
    ("weft host key", "A new key for TLS", "weft host key --tls >db1.tls"),
    (
        "weft host key",
        "A new key; umask 077 before, so that nobody else can read it",
        "weft host key >db1.key",
    ),
    ("weft host list", "Who may connect", "weft host list"),
    ("weft host remove", "Lock it out", "weft host remove nqn.2014-08.org.example:db1"),
    ("weft event list", "What happened, as a table", "weft event list"),
    (
        "weft event list",
        "Each event when it comes, for a script",
        "weft event list --follow -o json",
    ),
    ("weft connection list", "Who is connected", "weft connection list"),
    ("weft log", "What the node logs now", "weft log"),
    ("weft log", "Log what hosts do, until the restart", "weft log info,weft::target=debug"),
    ("weft reload", "After a certificate was renewed; also a unit's ExecReload=", "weft reload"),
    ("weft metrics", "What Prometheus would read", "weft metrics"),
    ("weft explain", "Why is it slow?", "weft explain db --last 5m"),
    ("weft top", "Watch a node", "weft top"),
    ("weft top", "Figures for a script, once", "weft top --mode json --once"),
    ("weft top", "Watch what happened", "weft top --replay -t 20m"),
    ("weft doctor", "Is this machine fit for a node?", "weft doctor --config weft.toml"),
    ("weft doctor", "Is this host fit for using volumes?", "weft doctor --host"),
    ("weft openapi", "For a generator of clients", "weft openapi >weft.json"),
    (
        "weft completions",
        "For bash",
        "weft completions bash >/usr/share/bash-completion/completions/weft",
    ),
    (
        "weft completions",
        "For zsh",
        "weft completions zsh >/usr/local/share/zsh/site-functions/_weft",
    ),
    ("weft completions", "For fish", "weft completions fish >/etc/fish/completions/weft.fish"),
    ("weft man", "Read it here", "weft man | man -l -"),
    ("weft man", "Install all pages", "weft man --out /usr/local/share/man/man1"),
];

/// Prints what a shell reads to complete commands and options.
pub(super) fn completions(shell: Shell) -> Result<(), Failure> {
    let mut command = Arguments::command();
    let mut script = Vec::new();
    match shell {
        Shell::Bash => clap_complete::generate(shells::Bash, &mut command, "weft", &mut script),
        Shell::Zsh => clap_complete::generate(shells::Zsh, &mut command, "weft", &mut script),
        Shell::Fish => clap_complete::generate(shells::Fish, &mut command, "weft", &mut script),
    }
    output::print(&String::from_utf8_lossy(&script))
}

/// Prints the page of `weft`, or writes those of all commands into `out`.
pub(super) fn pages(out: Option<&Path>) -> Result<(), Failure> {
    let mut command = Arguments::command().disable_help_subcommand(true);
    command.build();
    let Some(out) = out else { return output::print(&page(&command)) };
    fs::create_dir_all(out).map_err(|error| failed("make the directory", out, &error))?;
    for command in all(&command) {
        let path = out.join(format!("{}.1", page_name(command)));
        fs::write(&path, page(command)).map_err(|error| failed("write", &path, &error))?;
    }
    Ok(())
}

fn failed(op: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure { code: FAILED, message: format!("{op} {}: {error}", path.display()) }
}

/// The command and all below it.
fn all(command: &Command) -> Vec<&Command> {
    let below = command.get_subcommands().flat_map(all);
    std::iter::once(command).chain(below).collect()
}

/// As in `weft-volume-create`.
fn page_name(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

/// As in `weft volume create`.
fn line_of(command: &Command) -> &str {
    command.get_bin_name().unwrap_or_else(|| command.get_name())
}

/// A page, in the language of man(7).
fn page(command: &Command) -> String {
    // Exit codes have a section of their own here.
    let command = command.clone().after_help(None::<&str>);
    let name = page_name(&command).to_owned();
    let man = Man::new(command.clone());
    // No date: pages of one version are the same whenever they are written.
    let title = name.to_uppercase();
    let version = env!("CARGO_PKG_VERSION");
    let mut text = format!(".TH {title} 1 \"\" \"weft {version}\" \"Weft\"\n").into_bytes();
    let mut render = || -> std::io::Result<()> {
        man.render_name_section(&mut text)?;
        man.render_synopsis_section(&mut text)?;
        man.render_description_section(&mut text)?;
        man.render_options_section(&mut text)?;
        if command.has_subcommands() {
            man.render_subcommands_section(&mut text)?;
        }
        Ok(())
    };
    render().expect("memory takes all that is written");
    let mut text = String::from_utf8_lossy(&text).into_owned();
    text.push_str(&table("EXIT STATUS", EXIT_STATUS));
    if name == "weft-doctor" {
        text.push_str(&table("CHECKS", &doctor::checks(false)));
        text.push_str(&table("CHECKS OF A HOST", &doctor::checks(true)));
    }
    text.push_str(&files(&name));
    text.push_str(&examples(line_of(&command)));
    text.push_str(&see_also(&name));
    text
}

/// Terms, each with what it means below it.
fn table(title: &str, rows: &[(&str, &str)]) -> String {
    let row = |(term, meaning): &(&str, &str)| {
        format!(".TP\n\\fB{}\\fR\n{}\n", escaped(term), escaped(meaning))
    };
    format!(".SH \"{title}\"\n{}", rows.iter().map(row).collect::<String>())
}

/// Pages of commands name the directory's files too: it is where they find the node.
fn files(page: &str) -> String {
    let introduction = "DIR is what --data names, ./weft-data by default.";
    match page {
        "weft-completions" | "weft-man" | "weft-openapi" => String::new(),
        _ => {
            let rows = table("FILES", FILES);
            rows.replacen(".TP", &format!("{}\n.TP", escaped(introduction)), 1)
        }
    }
}

/// Examples of a command, or of those below it.
fn examples(line: &str) -> String {
    let below = format!("{line} ");
    let own = EXAMPLES.iter().any(|(command, ..)| *command == line);
    let mut text = String::from(".SH EXAMPLES\n");
    for (command, purpose, example) in EXAMPLES {
        if *command != line && (own || !command.starts_with(&below)) {
            continue;
        }
        if !purpose.is_empty() {
            let paragraph = if text.ends_with(".RE\n") { ".PP\n" } else { "" };
            text.push_str(&format!("{paragraph}{}:\n", escaped(purpose)));
        }
        text.push_str(&format!(".PP\n.RS 4\n.nf\n{}\n.fi\n.RE\n", escaped(example)));
    }
    text
}

fn see_also(page: &str) -> String {
    let rest = ".BR nbd\\-client (8),\n.BR nvme (1)\n";
    let first = if page == "weft" { "" } else { ".BR weft (1),\n" };
    format!(".SH \"SEE ALSO\"\n{first}{rest}")
}

/// Plain text for roff: nothing in it is a request, and a minus stays one that can be pasted.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    match text.starts_with('.') {
        true => format!("\\&{text}"),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::EXIT_CODES;

    fn built() -> Command {
        let mut command = Arguments::command().disable_help_subcommand(true);
        command.build();
        command
    }

    #[test]
    fn pages_and_help_agree_on_exit_codes() {
        let codes: Vec<String> =
            EXIT_STATUS.iter().map(|(code, meaning)| format!("{code} {meaning}")).collect();
        assert_eq!(EXIT_CODES.replace('\n', " "), format!("Exit codes: {}", codes.join(", ")));
    }

    #[test]
    fn every_example_parses_and_every_command_has_one() {
        for (command, _, example) in EXAMPLES {
            let line = example.split(['>', '|']).next().expect("a line");
            let parsed = Arguments::command().try_get_matches_from(line.split_whitespace());
            assert!(parsed.is_ok(), "{example}: {parsed:?}");
            assert!(example.starts_with(command) || *command == "weft", "{example}");
        }
        let root = built();
        for command in all(&root).into_iter().filter(|command| !command.has_subcommands()) {
            let line = line_of(command);
            assert!(EXAMPLES.iter().any(|(command, ..)| *command == line), "{line} has none");
        }
    }

    #[test]
    fn a_page_has_its_sections_in_the_usual_order() {
        let root = built();
        for command in all(&root) {
            let page = page(command);
            let at = |section: &str| {
                page.find(&format!("\n.SH {section}"))
                    .unwrap_or_else(|| panic!("{}: no {section}\n{page}", page_name(command)))
            };
            let sections = [
                "NAME",
                "SYNOPSIS",
                "DESCRIPTION",
                "OPTIONS",
                "\"EXIT STATUS\"",
                "EXAMPLES",
                "\"SEE ALSO\"",
            ];
            assert!(sections.iter().map(|section| at(section)).is_sorted(), "{page}");
        }
    }

    #[test]
    fn text_cannot_become_a_request() {
        assert_eq!(escaped(".TH \\x it's -o"), "\\&.TH \\ex it\\(aqs \\-o");
    }
}
