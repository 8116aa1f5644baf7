//! The command line: without a command `weft` is the node; each command is a thin client of a
//! running node's management API, but for `doctor`, `host key`, `openapi`, `completions` and `man`, which need no
//! node.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use clap::CommandFactory;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;
use clap::error::ErrorKind;
use weft_api::Client;
use weft_api::Endpoint;
use weft_api::URL_PREFIX;

use crate::node::config::DATA_DIR_DEFAULT;
use crate::node::config::DEFAULT_FILE;
use crate::units;

mod admin;
mod banner;
mod doctor;
mod exit;
mod explain;
mod export;
mod host;
mod manual;
mod output;
mod serve;
mod task;
mod top;
mod watch;

use exit::Failure;

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong arguments, configuration or request, 3 no node answers,
4 no such volume or task, 5 conflict (name taken, directory or address in use by another process),
6 not authorized (the token is not the node's)";

/// Serves erasure-coded, compressed volumes over NBD and NVMe/TCP.
///
/// Without a command it runs a node on a directory, which it creates at the first start: six
/// sparse device files, 4 data + 2 parity, and a volume vol0 of 8 GiB.
#[derive(Debug, Parser)]
#[command(name = "weft", version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    serve: ServeArguments,
    #[command(subcommand)]
    command: Option<Command>,
}

impl Arguments {
    /// Refuses options of the one use with the other, which clap cannot say.
    fn checked(self) -> Result<Self, clap::Error> {
        let serve = &self.serve;
        let to_serve = [
            (serve.nbd.is_some(), "--nbd"),
            (serve.nvme_tcp.is_some(), "--nvme-tcp"),
            (serve.config.is_some(), "--config"),
            (serve.log.is_some(), "--log"),
            (serve.print_config, "--print-config"),
            (serve.replace_missing, "--replace-missing"),
            (serve.force_open, "--force-open"),
            (serve.tui, "--tui"),
            (serve.look.ascii, "--ascii"),
            (serve.look.theme.is_some(), "--theme"),
        ];
        let refuse =
            |reason: String| Err(Self::command().error(ErrorKind::ArgumentConflict, reason));
        let Place { api, token_file, ca, .. } = &self.place;
        if self.command.is_none() && (api.is_some() || token_file.is_some() || ca.is_some()) {
            return refuse(
                "--api, --token-file and --ca go with a command; a node takes [api] from its \
                 configuration"
                    .to_owned(),
            );
        }
        if self.command.is_none() && !serve.tui && (serve.look.ascii || serve.look.theme.is_some())
        {
            return refuse("--ascii and --theme go with --tui or `weft top`".to_owned());
        }
        match to_serve.iter().find(|(given, _)| *given) {
            Some((_, option)) if self.command.is_some() => {
                refuse(format!("{option} is for running a node and goes with no command"))
            }
            _ => Ok(self),
        }
    }
}

/// Which node. Before a command and after it alike.
#[derive(Debug, Args)]
struct Place {
    /// The node's directory [default: ./weft-data]
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The node's API, for commands: its socket, or https://HOST:PORT [default: DIR/weft.sock]
    #[arg(long, global = true, value_name = "PATH|URL")]
    api: Option<PathBuf>,
    /// The token to show at a URL; the file the node has as api.token_file, or a copy
    /// [environment: WEFT_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// PEM file of who signed the certificate of the node at a URL [environment: WEFT_CA]
    #[arg(long, global = true, value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl Place {
    fn socket(&self) -> PathBuf {
        let data = self.data.as_deref().unwrap_or(Path::new(DATA_DIR_DEFAULT));
        self.api.clone().unwrap_or_else(|| data.join("weft.sock"))
    }

    /// A client of the node.
    fn client(&self) -> Result<Client, Failure> {
        let socket = self.socket();
        let usage = |message: String| Failure { code: exit::USAGE, message };
        let url = socket.to_str().filter(|text| text.starts_with(URL_PREFIX));
        let Some(url) = url else {
            if has_scheme(&socket) {
                return Err(usage(format!(
                    "--api {}: write https://HOST:PORT, or the path of a socket",
                    socket.display()
                )));
            }
            return match self.token_file.is_some() || self.ca.is_some() {
                false => Ok(Client::new(&socket)),
                true => Err(usage("--token-file and --ca go with --api https://...".to_owned())),
            };
        };
        let file = |given: &Option<PathBuf>, option: &str, variable: &str| {
            let given = given.clone().or_else(|| std::env::var_os(variable).map(PathBuf::from));
            given.ok_or_else(|| usage(format!("{url} needs {option} FILE, or {variable}")))
        };
        let token_file = file(&self.token_file, "--token-file", "WEFT_TOKEN_FILE")?;
        let ca = file(&self.ca, "--ca", "WEFT_CA")?;
        Ok(Client::to(Endpoint::https(url, &token_file, &ca).map_err(usage)?))
    }
}

/// How to run a node.
#[derive(Debug, Args)]
struct ServeArguments {
    /// Listen for NBD on this TCP address, and on no other [default: 127.0.0.1:10809]
    #[arg(long, value_name = "ADDRESS:PORT")]
    nbd: Option<SocketAddr>,
    /// Listen for NVMe over TCP on this address, and on no other [default: 127.0.0.1:4420, and
    /// 127.0.0.1:8009 for discovery]
    #[arg(long, value_name = "ADDRESS:PORT")]
    nvme_tcp: Option<SocketAddr>,
    /// Read the configuration from this file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// error, warn, info, debug, trace, or by module: info,weft::target=debug
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
    /// Let blank devices take the places of missing ones (files of the data directory are made
    /// anew); what was lost is made again from the others while the node serves
    #[arg(long)]
    replace_missing: bool,
    /// Open the pod although more of its devices are missing than it can do without, to copy what
    /// is still there to another pod. For devices that are lost for good only: what was acknowledged
    /// last may be missing or old without a sign of it, and it stays lost even if they come back, as
    /// what this run writes wins. Never while another node may have them
    #[arg(long, conflicts_with = "replace_missing")]
    force_open: bool,
    /// Show the console in this terminal; the log goes to DIR/weft.log. Leaving it asks whether the
    /// node is to stop or to go on
    #[arg(long, conflicts_with = "print_config")]
    tui: bool,
    #[command(flatten)]
    look: LookArguments,
    /// Print every configuration key with its default and meaning, and exit
    #[arg(long)]
    print_config: bool,
}

/// How the console looks.
#[derive(Debug, Args)]
struct LookArguments {
    /// Draw the console with ASCII only; the default where TERM is linux or the locale is not
    /// UTF-8. NO_COLOR=1 does without colours
    #[arg(long)]
    ascii: bool,
    /// Take the console's colours from this TOML file: `text`, `dim`, `title`, `border`, `focus`,
    /// `good`, `warning`, `bad`, `read`, `write`, `flush` = a name, 0 to 255, or "#rrggbb"
    #[arg(long, value_name = "FILE")]
    theme: Option<PathBuf>,
}

/// What to ask of a running node, or to do without one.
#[derive(Debug, Subcommand)]
enum Command {
    /// Show the node, its pod and where it listens
    #[command(after_help = EXIT_CODES)]
    Status(OutputArguments),
    /// The pod: devices, space and redundancy as a whole
    #[command(subcommand, after_help = EXIT_CODES)]
    Pod(PodCommand),
    /// The pod's devices
    #[command(subcommand, after_help = EXIT_CODES)]
    Device(DeviceCommand),
    /// Long work: rebuilds, which a node starts by itself, and scrubs
    #[command(subcommand, after_help = EXIT_CODES)]
    Task(TaskCommand),
    /// Volumes; each is an NBD export of its name and an NVMe namespace of its number
    #[command(subcommand, after_help = EXIT_CODES)]
    Volume(VolumeCommand),
    /// How hosts get at a volume
    #[command(subcommand, after_help = EXIT_CODES)]
    Export(ExportCommand),
    /// Hosts that may connect over NVMe from anywhere
    #[command(subcommand, after_help = EXIT_CODES)]
    Host(HostCommand),
    /// What happened that an operator should know
    #[command(subcommand, after_help = EXIT_CODES)]
    Event(EventCommand),
    /// Connections of hosts
    #[command(subcommand, after_help = EXIT_CODES)]
    Connection(ConnectionCommand),
    /// Show what a running node logs, or change it until the node is restarted
    #[command(after_help = EXIT_CODES)]
    Log(LogArguments),
    /// Make a running node read certificates, keys and the API's token again
    ///
    /// All of them, or none if one is wrong. Connections that stand go on; those from then on see
    /// the new certificates. The configuration itself is read when a node starts only.
    #[command(after_help = EXIT_CODES)]
    Reload(OutputArguments),
    /// Print what a running node counts, in Prometheus' text format
    #[command(after_help = EXIT_CODES)]
    Metrics,
    /// Say where the time of a volume's requests goes, and why
    #[command(after_help = EXIT_CODES)]
    Explain {
        /// The volume's name
        name: String,
        /// Look at this much of the past: 30s, 5m, 2h, 7d
        #[arg(long, value_name = "TIME", default_value = "5m", value_parser = units::parse_duration_s)]
        last: u64,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Watch a running node: a console on a terminal, text, JSON or CSV elsewhere
    #[command(after_help = EXIT_CODES)]
    Top(top::TopArguments),
    /// Check whether this machine is fit for a node, or with --host for using volumes
    ///
    /// Needs no node, and changes nothing. Prints what is wrong and how to put it right. Ends in 1
    /// if anything is an ERR: a node would not start, or lose what it acknowledged.
    #[command(after_help = EXIT_CODES)]
    Doctor(doctor::DoctorArguments),
    /// Print the OpenAPI document of the management API, as a node serves it at /v1/openapi.json
    #[command(after_help = EXIT_CODES)]
    Openapi,
    /// Print the completion of commands and options for a shell
    #[command(after_help = EXIT_CODES)]
    Completions {
        /// Which shell
        shell: manual::Shell,
    },
    /// Print the manual page of weft, or write those of all commands
    #[command(after_help = EXIT_CODES)]
    Man {
        /// Write weft.1, weft-volume.1 and so on into this directory, which is made if need be
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
}

/// How to print.
#[derive(Debug, Args)]
struct OutputArguments {
    /// Table for people; JSON or YAML for programs, with every field
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
    Yaml,
}

#[derive(Debug, Subcommand)]
enum PodCommand {
    /// Show the pod
    Show(OutputArguments),
    /// Read everything that is stored, parity too, and heal what is damaged, while hosts go on
    ///
    /// At most scrub.rate, and slower while hosts use the pod. Damage is found elsewhere only where
    /// data is read, so scrub now and then: once a month is usual.
    Scrub {
        /// Wait for its end, and show how far it is. Ends in 1 if damage could not be healed.
        /// Ctrl-C ends the waiting, not the scrub
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        output: OutputArguments,
    },
}

#[derive(Debug, Subcommand)]
enum TaskCommand {
    /// List tasks, oldest first: those under way, and the last 20 that ended since the node started
    List(OutputArguments),
    /// Show one task
    Show {
        /// Its id
        id: String,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Wait for the end of a task, and show how far it is
    ///
    /// Ends in 1 if the task failed, was cancelled, or left damage. Ctrl-C ends the waiting, not the
    /// task.
    Wait {
        /// Its id
        id: String,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Cancel a task. A rebuild cannot be cancelled
    Cancel {
        /// Its id
        id: String,
        #[command(flatten)]
        output: OutputArguments,
    },
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// List the devices with their state and counters
    List(OutputArguments),
}

#[derive(Debug, Subcommand)]
enum VolumeCommand {
    /// Create a thin volume; it takes space only as it is written
    Create {
        /// 1 to 64 letters, digits, '.', '_' and '-', not beginning with '.' or '-'
        name: String,
        /// A multiple of 4 KiB, as 100GiB (units are binary)
        #[arg(long, value_parser = units::parse_size)]
        size: u64,
        /// The unit hosts address, for good: 512 or 4096 bytes. 4096 is the good size either way
        #[arg(long, value_name = "BYTES", default_value = "512", value_parser = block_size)]
        block_size: u32,
        /// Hosts may only read
        #[arg(long)]
        read_only: bool,
        /// Acknowledge writes over NBD from memory: quicker, but a crash takes what was not flushed.
        /// Without it every write is durable when it is acknowledged
        #[arg(long)]
        write_cache: bool,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// List all volumes
    List(OutputArguments),
    /// Show one volume
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Make a volume larger; making it smaller is refused
    Resize {
        /// Its name
        name: String,
        /// The new size, a multiple of 4 KiB, as 200GiB
        #[arg(long, value_parser = units::parse_size)]
        size: u64,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Say which hosts a volume is served to. One that is for some hosts only is not served over
    /// NBD, whose clients have no name
    Hosts {
        /// Its name
        name: String,
        /// Serve it to these hosts only, which were added before
        #[arg(long, value_name = "NQN", num_args = 1.., required_unless_present = "all")]
        only: Vec<String>,
        /// Serve it to every host that may connect, and over NBD
        #[arg(long, conflicts_with = "only")]
        all: bool,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Turn a volume's write cache on or off: with it, writes over NBD are acknowledged from memory and
    /// durable once flushed
    WriteCache {
        /// Its name
        name: String,
        /// Off makes durable what was acknowledged before
        state: Switch,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Take all reservations off a volume, of whatever hosts: for when a host that holds it is gone
    /// for good
    Release {
        /// Its name
        name: String,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Delete a volume and all its data, at once and for ever
    Delete {
        /// Its name
        name: String,
        #[command(flatten)]
        output: OutputArguments,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Subcommand)]
enum ExportCommand {
    /// Print ready lines for nvme-cli, nbd-client, nbdtab, fstab and qemu
    Show {
        /// The volume's name
        name: String,
        #[command(flatten)]
        output: OutputArguments,
    },
}

#[derive(Debug, Subcommand)]
enum HostCommand {
    /// Let a host connect from anywhere. Others may only from where nvme.unknown_hosts says: by
    /// default, this machine
    Add {
        /// Its NVMe qualified name; a Linux host's is in /etc/nvme/hostnqn
        nqn: String,
        #[command(flatten)]
        keys: KeyArguments,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Say by which keys a host authenticates (DH-HMAC-CHAP) and encrypts (TLS), in place of those
    /// before
    ///
    /// Connections that are there stay as they are; from its next one on the host must prove that
    /// it has the key, and encrypt if it has one for that. The keys are stored in the pod as they
    /// are, so whoever can read its devices has them; no command shows them.
    #[command(group = clap::ArgGroup::new("what").required(true).multiple(true)
        .args(["dhchap_key_file", "no_dhchap", "tls_key_file", "no_tls"]))]
    Set {
        /// Its NVMe qualified name
        nqn: String,
        #[command(flatten)]
        keys: KeyArguments,
        /// It need not authenticate any more
        #[arg(long, conflicts_with = "dhchap_key_file")]
        no_dhchap: bool,
        /// It does not encrypt any more
        #[arg(long, conflicts_with = "tls_key_file")]
        no_tls: bool,
        #[command(flatten)]
        output: OutputArguments,
    },
    /// Make a new key for a host or a controller and print it; needs no node
    Key {
        /// The hash that binds it to a name; it also says how long the key is. none: 32 bytes
        #[arg(long, value_enum, default_value_t = KeyHash::Sha256)]
        hash: KeyHash,
        /// A key for TLS; there is none for sha512
        #[arg(long)]
        tls: bool,
    },
    /// List the hosts that were added, and whether they authenticate and encrypt
    List(OutputArguments),
    /// Remove a host, also from every volume that is served to it, and end its connections
    Remove {
        /// Its NVMe qualified name
        nqn: String,
        #[command(flatten)]
        output: OutputArguments,
    },
}

/// Files that hold keys, so that these are on no command line.
#[derive(Debug, Args)]
struct KeyArguments {
    /// File with the key that the host must prove to have (DHHC-1:...); - for standard input
    #[arg(long, value_name = "FILE")]
    dhchap_key_file: Option<PathBuf>,
    /// File with the key that the node proves to have when the host asks; better not the host's
    #[arg(long, value_name = "FILE", requires = "dhchap_key_file")]
    dhchap_ctrl_key_file: Option<PathBuf>,
    /// File with the key by which the host must encrypt (NVMeTLSkey-1:...); - for standard input
    #[arg(long, value_name = "FILE")]
    tls_key_file: Option<PathBuf>,
}

/// What a new key is bound to a name with.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum KeyHash {
    None,
    Sha256,
    Sha384,
    Sha512,
}

#[derive(Debug, Subcommand)]
enum EventCommand {
    /// List events, oldest first; a node keeps its newest 1000 until it stops
    List {
        /// Only those after the event of this number; -o json shows the numbers
        #[arg(long, value_name = "N", default_value_t = 0)]
        after: u64,
        /// Go on and print each event when it comes, until interrupted: a line each; with -o json
        /// an object a line, with -o yaml a document each
        #[arg(long)]
        follow: bool,
        #[command(flatten)]
        output: OutputArguments,
    },
}

#[derive(Debug, Subcommand)]
enum ConnectionCommand {
    /// List connections with what they have done; NVMe hosts open several
    List(OutputArguments),
}

/// What to log.
#[derive(Debug, Args)]
struct LogArguments {
    /// error, warn, info, debug, trace, or by module: info,weft::target=debug
    level: Option<String>,
    #[command(flatten)]
    output: OutputArguments,
}

fn block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("must be 512 or 4096".to_owned()),
    }
}

/// Runs the program with these arguments, the first being its name.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = Arguments::try_parse_from(arguments).and_then(Arguments::checked);
    let arguments = match parsed {
        Ok(arguments) => arguments,
        Err(error) => {
            // Standard output or error being closed changes nothing.
            let _ = error.print();
            return if error.use_stderr() { exit::USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    let done = match arguments.command {
        Some(command) => admin::run(command, arguments.place),
        None if arguments.serve.print_config => output::print(DEFAULT_FILE),
        None => serve::run(arguments.place.data, arguments.serve),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { code, message }) => {
            output::complain(&message);
            code.into()
        }
    }
}

/// Whether it can only be meant as a URL.
fn has_scheme(path: &Path) -> bool {
    let scheme = path.to_str().and_then(|text| text.split_once("://")).map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| {
        !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric())
    })
}

/// A path for people to paste into a shell.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    fn parsed(line: &str) -> Result<Arguments, clap::Error> {
        let words = std::iter::once("weft").chain(line.split_whitespace());
        Arguments::try_parse_from(words).and_then(Arguments::checked)
    }

    #[test]
    fn the_node_is_named_before_or_after_the_command() {
        for line in [
            "--data /d volume create a --size 1GiB",
            "volume --data /d create a --size 1GiB",
            "volume create a --size 1GiB --data /d",
            "--data /other status --data /d",
            "--api /d/weft.sock pod show",
            "pod show --api /d/weft.sock",
        ] {
            let arguments = parsed(line).expect(line);
            assert_eq!(arguments.place.socket(), Path::new("/d/weft.sock"), "{line}");
        }
        let arguments = parsed("--data /d --nbd 127.0.0.1:0").expect("a node");
        assert_eq!(arguments.place.data.as_deref(), Some(Path::new("/d")));
        let arguments = parsed("status").expect("the default");
        assert_eq!(arguments.place.socket(), Path::new("./weft-data/weft.sock"));
    }

    #[test]
    fn options_of_a_node_and_of_a_command_do_not_mix() {
        for line in [
            "--nbd 127.0.0.1:0 status",
            "--nvme-tcp 127.0.0.1:0 status",
            "--config weft.toml volume list",
            "--log debug status",
            "--print-config status",
            "--replace-missing status",
            "--force-open status",
            "--force-open --replace-missing",
            "--tui status",
            "--tui top",
            "--ascii status",
            "--api /d/weft.sock",
            "--ascii",
            "--theme night.toml",
        ] {
            let error = parsed(line).expect_err(line);
            assert_eq!(error.kind(), ErrorKind::ArgumentConflict, "{line}");
        }
    }

    #[test]
    fn a_url_that_is_none_of_a_node_is_a_wrong_argument() {
        for url in ["http://h:1", "HTTPS://h:1", "unix://d/weft.sock", "nbd://h"] {
            let place = parsed(&format!("status --api {url}")).expect(url).place;
            assert_eq!(place.client().expect_err(url).code, exit::USAGE, "{url}");
        }
        for path in ["/d/weft.sock", "weft.sock", "./odd://weft.sock", "://"] {
            assert!(!has_scheme(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(shell_word(Path::new("/srv/weft-data")), "/srv/weft-data");
        assert_eq!(shell_word(Path::new("/my data/it's")), "'/my data/it'\\''s'");
    }
}
