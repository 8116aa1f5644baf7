//! The node's configuration: a TOML file becomes a [`Config`] here, and nowhere else.
//!
//! Three steps: text → `raw::File` (unknown keys refused) → `validate` → [`Config`], in which
//! every value is in its range and every default filled in. An error names the file, the line and
//! the key. `docs/config.toml` documents every key and holds the defaults; a test compares.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::ops::RangeInclusive;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;

use crate::format::superblock::JOURNAL_OFFSET;
use crate::observe::log::Format;
use crate::target::nvmf::auth::Policy;
use crate::target::nvmf::subsystem::SecureChannel;
use crate::target::nvmf::subsystem::UnknownHosts;
use crate::units;

mod raw;
mod validate;

/// Every key, with its default and what it means.
pub const DEFAULT_FILE: &str = include_str!("../../docs/config.toml");

/// Where a node runs if nothing says otherwise.
pub const DATA_DIR_DEFAULT: &str = "./weft-data";

/// Shortest device. Less would leave no room for data beside journal, superblocks and reserve.
pub const DEVICE_BYTES_MIN: u64 = 256 << 20;

/// Most devices of a pod: what a superblock can number.
pub const DEVICES_MAX: usize = 65535;

/// What every device has for data at least: the fewest strips of the shortest kind, 64 of 64 KiB,
/// that a pod is created with.
const DATA_BYTES_MIN: u64 = 4 << 20;

/// Files a node has open besides devices and connections of hosts: sockets it listens on, connections
/// of the API, rings, epoll and event descriptors of each thread, the log. Arbitrary, with room to spare.
const FILES_OTHER: usize = 256;

/// A configuration in which everything holds that must.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The node's directory.
    pub data_dir: PathBuf,
    /// What a new pod becomes, and what an old one must be.
    pub pod: PodConfig,
    /// RAM for decoded chunks, in bytes.
    pub cache_bytes: u64,
    /// RAM for nodes of the map, in bytes.
    pub map_cache_bytes: u64,
    /// RAM for what hosts have in flight, beyond the little each connection has of its own, in bytes.
    pub in_flight_bytes: u64,
    /// Threads that serve hosts; `None`: one for each processor.
    pub data_plane_threads: Option<usize>,
    /// How long such a thread looks for more work before it sleeps; `None`: it sleeps at once.
    pub polling: Option<Duration>,
    /// How hosts connect.
    pub nbd: NbdConfig,
    /// What NVMe hosts find, however they connect.
    pub nvme: NvmeConfig,
    /// How hosts connect by NVMe over TCP.
    pub nvme_tcp: NvmeTcpConfig,
    /// The API's Unix socket.
    pub api_socket: PathBuf,
    /// The API over TCP; `None`: not served there.
    pub api_tcp: Option<ApiTcpConfig>,
    /// TCP addresses at which Prometheus finds metrics.
    pub metrics_listen: Vec<SocketAddr>,
    /// Bytes a second that a scrub reads at most.
    pub scrub_rate: u64,
    /// Disk space for recorded counts, in bytes; 0: none are recorded.
    pub history_bytes: u64,
    /// How to log.
    pub log: LogConfig,
    /// Let blank devices take the places of missing ones at this start.
    pub replace_missing: bool,
    /// Open the pod at this start with fewer devices than it needs to be sure of anything.
    pub force_open: bool,
}

/// What a new pod becomes. `None` means "not said": see each field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodConfig {
    /// Paths, in order of index.
    pub devices: Vec<PathBuf>,
    /// Whether the file lists them; otherwise they are files of our own in the data directory.
    pub devices_given: bool,
    /// Length of device files to create, in bytes; `None`: by the free space.
    pub device_bytes: Option<u64>,
    /// k, for a new pod.
    pub data_strips: usize,
    /// m, for a new pod.
    pub parity_strips: usize,
    /// Whether the file says so, so that a pod which has another k or m is refused.
    pub geometry_given: bool,
    /// Journal ring on each device, in bytes; `None`: by the devices' length.
    pub journal_bytes: Option<u64>,
    /// Created together with the pod.
    pub first_volume: Option<FirstVolume>,
}

/// The volume a new pod begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstVolume {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// How NBD clients connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdConfig {
    /// TCP addresses.
    pub listen: Vec<SocketAddr>,
    /// Unix socket, if any.
    pub unix_socket: Option<PathBuf>,
    /// Connections at once.
    pub connections_max: usize,
    /// TLS on TCP; `None`: off.
    pub tls: Option<TlsConfig>,
}

/// What NVMe hosts find, however they connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeConfig {
    /// The subsystem's name; `None`: made of the pod's identity.
    pub subsystem_nqn: Option<String>,
    /// Numbers for controllers.
    pub controller_ids: RangeInclusive<u16>,
    /// From where hosts may connect that were never added.
    pub unknown_hosts: UnknownHosts,
    /// How hosts that have a key may authenticate.
    pub authentication: Policy,
}

/// How NVMe hosts connect over TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeTcpConfig {
    /// Addresses that the discovery log names.
    pub listen: Vec<SocketAddr>,
    /// Addresses that it does not: hosts ask there for the log.
    pub discovery: Vec<SocketAddr>,
    /// What the log names instead of `listen`; empty: `listen`.
    pub advertise: Vec<SocketAddr>,
    /// Connections at once.
    pub connections_max: usize,
    /// Whether hosts may or must encrypt.
    pub tls: SecureChannel,
}

/// TLS for TCP connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// Refuse hosts that do not ask for it.
    pub required: bool,
    /// How the two ends prove who they are.
    pub proof: TlsProof,
}

/// How the two ends of a TLS connection prove who they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsProof {
    /// By certificates.
    Certificates {
        /// PEM file with the certificate chain.
        certificate: PathBuf,
        /// PEM file with the private key.
        key: PathBuf,
        /// PEM file with the issuers of clients' certificates; `None`: clients need none.
        client_ca: Option<PathBuf>,
    },
    /// By keys that both have.
    Keys {
        /// File with a line `NAME:HEX` for each host.
        psk_file: PathBuf,
    },
}

/// How the API is served over TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiTcpConfig {
    /// Addresses; not empty.
    pub listen: Vec<SocketAddr>,
    /// PEM file with the certificate chain.
    pub certificate: PathBuf,
    /// PEM file with the private key.
    pub key: PathBuf,
    /// File with the token that requests carry.
    pub token_file: PathBuf,
}

/// How to log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// For whom, and where.
    pub format: Format,
    /// A level, or levels by module.
    pub level: String,
}

/// What the command line says, which wins over the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--data`.
    pub data_dir: Option<PathBuf>,
    /// `--nbd`.
    pub nbd: Option<SocketAddr>,
    /// `--nvme-tcp`.
    pub nvme_tcp: Option<SocketAddr>,
    /// `--log`.
    pub log_level: Option<String>,
    /// `--replace-missing`.
    pub replace_missing: bool,
    /// `--force-open`.
    pub force_open: bool,
}

/// What is wrong with a configuration, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file; `None` if the text came from elsewhere.
    pub file: Option<PathBuf>,
    /// Line, counted from 1; `None` if the file could not be read, or the value is a default.
    pub line: Option<usize>,
    /// The key with its tables, as in `pod.data_strips`; empty if the text is not TOML.
    pub key: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}", file.display())?,
            None => f.write_str("configuration")?,
        }
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.reason)
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Files that a node with so many devices has open if all connections there may be are there.
    #[must_use]
    pub fn open_files_max(&self, devices: usize) -> u64 {
        let connections = self.nbd.connections_max + self.nvme_tcp.connections_max;
        units::bytes_u64(connections + devices + FILES_OTHER)
    }

    /// Reads `file`, or takes the defaults if there is none; `overrides` win.
    ///
    /// # Errors
    /// The first thing that is wrong, with file, line and key.
    pub fn load(file: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let Some(path) = file else { return Self::parse("", overrides) };
        let text = fs::read_to_string(path).map_err(|error| ConfigError {
            file: Some(path.to_owned()),
            line: None,
            key: String::new(),
            reason: format!("cannot be read: {error}"),
        })?;
        Self::parse(&text, overrides)
            .map_err(|error| ConfigError { file: Some(path.to_owned()), ..error })
    }

    /// The same from text.
    ///
    /// # Errors
    /// The first thing that is wrong, with line and key.
    pub fn parse(text: &str, overrides: Overrides) -> Result<Self, ConfigError> {
        let file: raw::File = toml::from_str(text).map_err(|error| not_toml(text, &error))?;
        validate::validate(file, overrides).map_err(|wrong| ConfigError {
            file: None,
            line: wrong.span.map(|span| line_at(text, &span)),
            key: wrong.key.to_owned(),
            reason: wrong.reason,
        })
    }
}

/// The shortest device that has room for such a journal, and for anything beside it.
pub(super) fn device_bytes_min(journal_bytes: u64) -> u64 {
    JOURNAL_OFFSET + journal_bytes + DATA_BYTES_MIN
}

/// A value of the right type that is not allowed.
struct Wrong {
    /// Where in the text; `None` for what the text does not say.
    span: Option<Range<usize>>,
    key: &'static str,
    reason: String,
}

/// Describes what the TOML reader refused: syntax, an unknown key, a value of another type.
fn not_toml(text: &str, error: &toml::de::Error) -> ConfigError {
    let line = error.span().map(|span| line_at(text, &span));
    let key = error.span().and_then(|span| key_at(text, &span)).unwrap_or_default();
    let reason = error.message().replace('\n', "; ");
    ConfigError { file: None, line, key, reason }
}

/// The number of the line on which `span` begins, from 1.
fn line_at(text: &str, span: &Range<usize>) -> usize {
    let before = &text.as_bytes()[..span.start.min(text.len())];
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

/// The key that the line of `span` sets, with the table it stands in, if it sets one.
fn key_at(text: &str, span: &Range<usize>) -> Option<String> {
    let line_number = line_at(text, span);
    let mut table = String::new();
    let mut found = None;
    for line in text.lines().take(line_number) {
        let line = line.trim();
        found = line.split_once('=').map(|(key, _)| key.trim().to_owned());
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            table = name.trim().to_owned();
            found = Some(String::new());
        }
    }
    let key = found?;
    let parts = [table.as_str(), key.as_str()];
    Some(parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("."))
}

/// A size as the file writes it: a number of bytes, or a number with a unit.
#[derive(Clone, Debug, serde::Deserialize)]
#[serde(untagged, expecting = "expected a size: a whole number of bytes, or as \"8GiB\"")]
enum SizeText {
    Bytes(u64),
    Text(String),
}

impl SizeText {
    fn bytes(&self) -> Result<u64, String> {
        match self {
            Self::Bytes(bytes) => Ok(*bytes),
            Self::Text(text) => units::parse_size(text),
        }
    }
}

/// What a key is set to, and where.
type Given<T> = Option<Spanned<T>>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::PodId;
    use crate::format::table::STRIPS_MAX;
    use crate::pool::Geometry;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Overrides::default())
    }

    #[test]
    fn the_documented_file_is_the_defaults() {
        let documented = parse(DEFAULT_FILE).expect("the documented file is valid");
        let mut defaults = parse("").expect("nothing said is valid");
        assert!(documented.pod.geometry_given && !defaults.pod.geometry_given);
        defaults.pod.geometry_given = true;
        assert_eq!(documented, defaults);
    }

    #[test]
    fn a_geometry_is_taken_if_and_only_if_a_pod_can_have_it() {
        assert!(DEFAULT_FILE.contains(&format!("At most {STRIPS_MAX} strips")));
        let strips = 0..=STRIPS_MAX + 1;
        for (data_strips, parity_strips) in
            strips.clone().flat_map(|data| strips.clone().map(move |parity| (data, parity)))
        {
            let fewest = (data_strips + parity_strips).max(2 * parity_strips + 1);
            for devices in [fewest - 1, fewest] {
                let paths: Vec<_> = (0..devices).map(|index| format!("disk{index}")).collect();
                let text = format!(
                    "[pod]\ndata_strips = {data_strips}\nparity_strips = {parity_strips}\n\
                     devices = {paths:?}"
                );
                let geometry = Geometry {
                    pod: PodId([0; 16]),
                    devices,
                    data_strips,
                    parity_strips,
                    strip_bytes: 1 << 20,
                    journal_bytes: 8 << 20,
                };
                assert_eq!(parse(&text).is_ok(), geometry.validate().is_ok(), "{text}");
            }
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_table() {
        let error = parse("data_dir = \"x\"\n\n[nbd]\nlisten = []\nlissten = []\n")
            .expect_err("unknown key");
        assert_eq!(error.line, Some(5));
        assert_eq!(error.key, "nbd.lissten");
        assert!(error.reason.contains("unknown field `lissten`"), "{error}");
    }

    #[test]
    fn tls_is_proven_by_certificates_or_by_keys() {
        let proof = |keys: &str| {
            let text = format!("[nbd.tls]\nmode = \"required\"\n{keys}");
            parse(&text).map(|config| config.nbd.tls.expect("it is required").proof)
        };
        let (certificate, key) = ("certificate = \"c\"\n", "key = \"k\"\n");
        let by_certificates =
            TlsProof::Certificates { certificate: "c".into(), key: "k".into(), client_ca: None };
        assert_eq!(proof(&format!("{certificate}{key}")), Ok(by_certificates));
        let by_keys = TlsProof::Keys { psk_file: "p".into() };
        assert_eq!(proof("psk_file = \"p\"\ncertificate = \"\""), Ok(by_keys));
        for (text, wrong, line) in [
            ("", "nbd.tls.certificate", 2),
            (certificate, "nbd.tls.key", 2),
            ("client_ca = \"a\"\npsk_file = \"p\"", "nbd.tls.psk_file", 4),
        ] {
            let error = proof(text).expect_err("refused");
            assert_eq!((error.key.as_str(), error.line), (wrong, Some(line)), "{error}");
        }
    }

    #[test]
    fn overrides_win() {
        let overrides = Overrides {
            data_dir: Some("/elsewhere".into()),
            nbd: Some("127.0.0.1:0".parse().expect("an address")),
            nvme_tcp: Some("127.0.0.1:1".parse().expect("an address")),
            log_level: Some("debug".into()),
            replace_missing: false,
            force_open: false,
        };
        let config = Config::parse(DEFAULT_FILE, overrides).expect("valid");
        assert_eq!(config.api_socket, Path::new("/elsewhere/weft.sock"));
        assert_eq!(config.nbd.listen, ["127.0.0.1:0".parse().expect("an address")]);
        assert_eq!(config.nvme_tcp.listen, ["127.0.0.1:1".parse().expect("an address")]);
        assert_eq!(config.nvme_tcp.discovery, []);
        assert_eq!(config.log.level, "debug");
    }
}
