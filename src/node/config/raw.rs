//! The configuration file exactly as it is written: every key optional, nothing checked but types.
//!
//! What the keys mean is said in `docs/config.toml` and in [`super::Config`].

use serde::Deserialize;

use super::Given;
use super::SizeText;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) data_dir: Given<String>,
    #[serde(default)]
    pub(super) pod: Pod,
    #[serde(default)]
    pub(super) memory: Memory,
    #[serde(default)]
    pub(super) threads: Threads,
    #[serde(default)]
    pub(super) nbd: Nbd,
    #[serde(default)]
    pub(super) nvme: Nvme,
    #[serde(default)]
    pub(super) nvme_tcp: NvmeTcp,
    #[serde(default)]
    pub(super) api: Api,
    #[serde(default)]
    pub(super) metrics: Metrics,
    #[serde(default)]
    pub(super) scrub: Scrub,
    #[serde(default)]
    pub(super) history: History,
    #[serde(default)]
    pub(super) log: Log,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pod {
    pub(super) devices: Given<Vec<String>>,
    pub(super) device_size: Given<SizeText>,
    pub(super) data_strips: Given<usize>,
    pub(super) parity_strips: Given<usize>,
    pub(super) journal_size: Given<SizeText>,
    pub(super) first_volume: Given<String>,
    pub(super) first_volume_size: Given<SizeText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Memory {
    pub(super) cache: Given<SizeText>,
    pub(super) map_cache: Given<SizeText>,
    pub(super) in_flight: Given<SizeText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Threads {
    pub(super) data_plane: Given<Count>,
    pub(super) polling_us: Given<usize>,
}

/// A count, or "auto".
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a number or \"auto\"")]
pub(super) enum Count {
    Number(usize),
    Text(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nbd {
    pub(super) listen: Given<Vec<String>>,
    pub(super) unix_socket: Given<String>,
    pub(super) connections_max: Given<usize>,
    #[serde(default)]
    pub(super) tls: Tls,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nvme {
    pub(super) subsystem_nqn: Given<String>,
    pub(super) controller_id_min: Given<usize>,
    pub(super) controller_id_max: Given<usize>,
    pub(super) unknown_hosts: Given<String>,
    pub(super) dhchap_hashes: Given<Vec<String>>,
    pub(super) dhchap_groups: Given<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NvmeTcp {
    pub(super) listen: Given<Vec<String>>,
    pub(super) discovery: Given<Vec<String>>,
    pub(super) advertise: Given<Vec<String>>,
    pub(super) connections_max: Given<usize>,
    pub(super) tls: Given<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tls {
    pub(super) mode: Given<String>,
    pub(super) certificate: Given<String>,
    pub(super) key: Given<String>,
    pub(super) client_ca: Given<String>,
    pub(super) psk_file: Given<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Api {
    pub(super) socket: Given<String>,
    pub(super) listen: Given<Vec<String>>,
    pub(super) certificate: Given<String>,
    pub(super) key: Given<String>,
    pub(super) token_file: Given<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Metrics {
    pub(super) listen: Given<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Scrub {
    pub(super) rate: Given<SizeText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct History {
    pub(super) size: Given<SizeText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Log {
    pub(super) format: Given<String>,
    pub(super) level: Given<String>,
}
