//! Weft's management API: its types, and a small client.
//!
//! HTTP/1.1 with JSON bodies over a node's Unix socket, or over TCP with TLS and a token:
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`NodeStatus`] |
//! | `GET /v1/pod` | | [`Pod`] |
//! | `GET /v1/devices` | | array of [`Device`], in order of index |
//! | `GET /v1/volumes` | | array of [`Volume`], in order of name |
//! | `POST /v1/volumes` | [`CreateVolume`] | 201 and the [`Volume`] |
//! | `GET /v1/volumes/{name}` | | [`Volume`] |
//! | `PATCH /v1/volumes/{name}` | [`ResizeVolume`] | [`Volume`] |
//! | `DELETE /v1/volumes/{name}` | | 204 |
//! | `PUT /v1/volumes/{name}/hosts` | [`VolumeHosts`] | [`Volume`] |
//! | `PUT /v1/volumes/{name}/write-cache` | [`WriteCache`] | [`Volume`] |
//! | `DELETE /v1/volumes/{name}/reservations` | | 204 |
//! | `GET /v1/hosts` | | array of [`Host`], in order of NQN |
//! | `POST /v1/hosts` | [`AddHost`] | 201 and the [`Host`] |
//! | `PUT /v1/hosts/{nqn}/dhchap` | [`DhchapKeys`] | [`Host`] |
//! | `DELETE /v1/hosts/{nqn}/dhchap` | | [`Host`] |
//! | `PUT /v1/hosts/{nqn}/tls` | [`HostTlsKey`] | [`Host`] |
//! | `DELETE /v1/hosts/{nqn}/tls` | | [`Host`] |
//! | `DELETE /v1/hosts/{nqn}` | | 204 |
//! | `POST /v1/pod/scrub` | | 202, the [`Task`], and where it is as `Location` |
//! | `GET /v1/tasks` | | array of [`Task`], oldest first; the newest are kept until the node stops |
//! | `GET /v1/tasks/{id}` | | [`Task`] |
//! | `POST /v1/tasks/{id}/cancel` | | 202 and the [`Task`], which ends soon |
//! | `GET /v1/stats` | | [`Stats`] |
//! | `GET /v1/history?from_ms=A&to_ms=B&step_ms=S` | | array of [`Stats`] recorded between two times, at least so far apart, oldest first, 600 at most |
//! | `GET /v1/connections` | | array of [`Connection`], in order of id |
//! | `GET /v1/events?after=N` | | array of [`Event`] after the N-th, oldest first; the newest 1000 are kept |
//! | `GET /v1/log` | | [`LogLevel`] |
//! | `PUT /v1/log` | [`LogLevel`] | [`LogLevel`] |
//! | `POST /v1/reload` | | 204 when certificates, keys and the token have been read again |
//! | `GET /v1/openapi.json` | | all this for programs, as an OpenAPI document |
//! | `GET /metrics` | | the same counts for Prometheus, as text |
//!
//! Over TCP every request carries `Authorization: Bearer TOKEN`; one that does not is answered with
//! status 401 and the kind `Unauthorized`. A change is durable when it is answered. Whatever fails
//! is answered with a [`Problem`] (RFC 9457). Sizes are in bytes; unknown keys in a request are
//! refused, and those in an answer are to be ignored, since later versions add some.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use serde::Deserialize;
use serde::Serialize;

mod client;
mod endpoint;
mod event;
pub mod histogram;
mod stats;
mod task;
mod time;

pub use client::Client;
pub use client::ClientError;
pub use client::percent_encode;
pub use endpoint::Endpoint;
pub use endpoint::Https;
pub use endpoint::URL_PREFIX;
pub use event::Event;
pub use event::LogLevel;
pub use event::Severity;
pub use histogram::Histogram;
pub use stats::Connection;
pub use stats::DeviceStats;
pub use stats::FrontEnd;
pub use stats::FrontEndStats;
pub use stats::InFlightStats;
pub use stats::Operation;
pub use stats::OperationStats;
pub use stats::Stage;
pub use stats::StageStats;
pub use stats::Stats;
pub use stats::VolumeStats;
pub use task::Damage;
pub use task::ScrubStats;
pub use task::Task;
pub use task::TaskKind;
pub use task::TaskState;
pub use task::TaskUnit;
pub use time::format_rfc3339;
pub use time::parse_rfc3339;
pub use time::parse_time_of_day;

/// A node, for a first look.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct NodeStatus {
    /// Version of the node's program.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The directory it runs on, absolute.
    pub data_dir: String,
    /// Seconds since it began to serve.
    pub uptime_s: u64,
    /// Threads that serve hosts.
    pub data_plane_threads: usize,
    /// Connections of hosts, now.
    pub connections: usize,
    /// Where hosts connect.
    pub listeners: Vec<Listener>,
    /// The pod's NVMe subsystem.
    pub subsystem_nqn: String,
    /// The pod it serves.
    pub pod: Pod,
    /// How many volumes the pod has.
    pub volume_count: usize,
}

/// An address at which the node listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Listener {
    /// `nbd`, `nvme`, `nvme-discovery` where hosts look for the discovery log, `metrics` where
    /// Prometheus looks, or `api`.
    pub protocol: String,
    /// `tcp` or `unix`.
    pub transport: String,
    /// `127.0.0.1:10809`, or the absolute path of a Unix socket.
    pub address: String,
    /// Whether those who connect can or must encrypt.
    #[serde(default)]
    pub tls: bool,
}

/// A pod: devices, and volumes with one writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Pod {
    /// Identity.
    pub uuid: String,
    /// Opens so far.
    pub epoch: u64,
    /// Data strips in a segment: k.
    pub data_strips: usize,
    /// Parity strips in a segment: m.
    pub parity_strips: usize,
    /// `healthy`, `degraded`, `read-only`, or `failed` with fewer devices in service than data strips.
    pub health: String,
    /// Devices that may still fail, all at once, without loss.
    pub can_lose: usize,
    /// Segments, the units of erasure coding, with data in them now or when the last checkpoint was
    /// written, from which a crash would bring it back.
    #[serde(default)]
    pub segments: u64,
    /// Of them, with fewer strips in service than they should have: what a rebuild has left to do.
    #[serde(default)]
    pub segments_degraded: u64,
    /// Devices the pod has.
    pub device_count: usize,
    /// Of them, in service.
    pub devices_in_service: usize,
    /// What volumes may store, after parity, before compression.
    pub capacity_bytes: u64,
    /// Of it, in use or promised.
    pub used_bytes: u64,
    /// Live data as hosts wrote it.
    pub logical_bytes: u64,
    /// The same after compression.
    pub physical_bytes: u64,
    /// Length of the journal.
    pub journal_bytes: u64,
    /// Of it, not yet behind a checkpoint.
    pub journal_used_bytes: u64,
    /// Acknowledged and not yet in a segment.
    pub buffered_bytes: u64,
    /// RAM that holds decoded chunks now.
    pub cache_bytes: u64,
    /// Reads answered from it since the node started.
    pub cache_hits: u64,
    /// Reads that asked a device since the node started.
    pub cache_misses: u64,
    /// Checkpoints since the node started.
    pub checkpoints: u64,
}

/// A device of a pod. Counters are since the node started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Device {
    /// Its place in the pod, from 0.
    pub index: usize,
    /// Identity.
    pub uuid: String,
    /// Path or address.
    pub name: String,
    /// Its length.
    pub size_bytes: u64,
    /// `in service`, `failed`, `missing` or `hung`.
    pub state: String,
    /// Why it is not in service.
    pub reason: Option<String>,
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Reads failed.
    pub read_errors: u64,
    /// Writes failed.
    pub write_errors: u64,
    /// Reads whose bytes were not what had been written.
    pub checksum_errors: u64,
    /// Damaged places rebuilt and written back.
    pub healed: u64,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Volume {
    /// Number within the pod.
    pub id: u64,
    /// Its name, which is also its export's.
    pub name: String,
    /// Identity.
    pub uuid: String,
    /// Its size.
    pub size_bytes: u64,
    /// The smallest request hosts are told of: 512 or 4096.
    pub logical_block_bytes: u32,
    /// Whether hosts may only read.
    pub read_only: bool,
    /// What is stored, before compression and parity.
    pub allocated_bytes: u64,
    /// The only hosts it is served to, by NQN; absent or null: all, and NBD clients.
    #[serde(default)]
    pub hosts: Option<BTreeSet<String>>,
    /// What NVMe hosts have reserved; absent or null if none has registered.
    #[serde(default)]
    pub reservations: Option<Reservations>,
    /// Whether writes over NBD are acknowledged from memory, and durable once flushed.
    #[serde(default)]
    pub write_cache: bool,
}

/// NVMe hosts that share a volume, by Host Identifier. (NVMe Base 1.4, 8.8)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Reservations {
    /// The type of the reservation in words; null if nobody holds the volume.
    pub held: Option<String>,
    /// The holder; null if all registrants are, or nobody is.
    pub holder: Option<String>,
    /// Who has registered.
    pub registrants: Vec<String>,
    /// Whether all this outlives a restart.
    pub persistent: bool,
}

/// A host that may connect from anywhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its NVMe qualified name; see [`check_nqn`].
    pub nqn: String,
    /// How it authenticates; left out if it need not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dhchap: Option<Dhchap>,
    /// How it encrypts; left out if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<HostTls>,
}

/// That a host encrypts. The key itself is never told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct HostTls {
    /// How the key is bound to the host's name: `none`, `sha256` or `sha384`.
    pub key_hash: String,
}

/// That a host authenticates. Keys themselves are never told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Dhchap {
    /// How the host's key is bound to its name: `none`, `sha256`, `sha384` or `sha512`.
    pub key_hash: String,
    /// The same of the controller's key; left out if there is none, so that the host cannot ask for
    /// a proof that it talks to this pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctrl_key_hash: Option<String>,
}

/// What `POST /v1/hosts` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct AddHost {
    /// Its NVMe qualified name; see [`check_nqn`].
    pub nqn: String,
    /// What it has to prove that it has; left out: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dhchap: Option<DhchapKeys>,
    /// By which it has to encrypt; left out: it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<HostTlsKey>,
}

/// A key for TLS, as `nvme gen-tls-key` and `weft host key --tls` write it: `NVMeTLSkey-1:hh:...:`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct HostTlsKey {
    /// It.
    pub key: String,
}

impl std::fmt::Debug for HostTlsKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostTlsKey")
    }
}

/// Keys of DH-HMAC-CHAP, as `nvme gen-dhchap-key` and `weft host key` write them: `DHHC-1:hh:...:`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DhchapKeys {
    /// The host's.
    pub key: String,
    /// The controller's, towards this host; left out: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctrl_key: Option<String>,
}

impl std::fmt::Debug for DhchapKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DhchapKeys")
    }
}

/// What `PUT /v1/volumes/{name}/hosts` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VolumeHosts {
    /// The only hosts it is to be served to, by NQN; null: all, and NBD clients.
    pub hosts: Option<BTreeSet<String>>,
}

/// What `POST /v1/volumes` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// See [`check_volume_name`].
    pub name: String,
    /// Its size; a multiple of 4096 bytes.
    pub size_bytes: u64,
    /// 512 or 4096; 512 when left out.
    #[serde(default = "default_logical_block_bytes")]
    pub logical_block_bytes: u32,
    /// Whether hosts may only read.
    #[serde(default)]
    pub read_only: bool,
    /// Whether writes over NBD are acknowledged from memory, and durable once flushed.
    #[serde(default)]
    pub write_cache: bool,
}

fn default_logical_block_bytes() -> u32 {
    512
}

/// What `PATCH /v1/volumes/{name}` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// The new size; a multiple of 4096 bytes and not below the present one.
    pub size_bytes: u64,
}

/// What `PUT /v1/volumes/{name}/write-cache` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct WriteCache {
    /// Whether writes over NBD are acknowledged from memory, and durable once flushed. Turning it off
    /// makes durable what was acknowledged before.
    pub enabled: bool,
}

/// Why a request failed, as `application/problem+json` (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Problem {
    /// The kind in words, the same for every problem of the kind.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What was tried, on what, and what can be done.
    pub detail: String,
    /// The kind's name, for programs: `NotFound`, `Exists`, `NoSpace`, ...; `Unauthorized` if the
    /// request was not looked at for want of the token.
    pub kind: String,
}

/// Longest volume name. Arbitrary; it fits a column of a table and every protocol's limit.
pub const VOLUME_NAME_BYTES_MAX: usize = 64;

/// Says what is wrong with a volume's name.
///
/// A name is 1 to 64 ASCII letters, digits, dots, dashes and underscores, and begins with none of
/// dot and dash: safe in a URI, a path, a systemd unit and on a command line.
///
/// # Errors
/// A sentence for whoever chose the name.
pub fn check_volume_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > VOLUME_NAME_BYTES_MAX {
        return Err(format!("a volume name has 1 to {VOLUME_NAME_BYTES_MAX} characters"));
    }
    if name.starts_with(['-', '.']) {
        return Err(format!("volume name '{name}' begins with a dash or a dot"));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match name.chars().find(|c| !allowed(*c)) {
        None => Ok(()),
        Some(other) => Err(format!(
            "volume name '{}' has a {other:?}: use letters, digits, '.', '_' and '-'",
            name.escape_debug()
        )),
    }
}

/// Longest NQN, in bytes. (NVMe Base 1.4, 7.9)
pub const NQN_BYTES_MAX: usize = 223;

/// Says what is wrong with a host's NVMe qualified name.
///
/// # Errors
/// A sentence for whoever wrote it.
pub fn check_nqn(nqn: &str) -> Result<(), String> {
    let quoted = nqn.escape_debug();
    if !nqn.starts_with("nqn.") {
        return Err(format!(
            "'{quoted}' is not an NVMe qualified name, which begins with 'nqn.': a Linux host's is \
             in /etc/nvme/hostnqn"
        ));
    }
    if nqn.len() > NQN_BYTES_MAX {
        return Err(format!("an NVMe qualified name has at most {NQN_BYTES_MAX} bytes"));
    }
    match nqn.chars().find(|c| c.is_whitespace() || c.is_control()) {
        None => Ok(()),
        Some(other) => Err(format!("'{quoted}' has a {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_safe_everywhere_are_taken_and_others_refused() {
        let longest = "v".repeat(VOLUME_NAME_BYTES_MAX);
        for name in ["vol0", "a", "db-1.wal_2", "0", "_x", longest.as_str()] {
            assert_eq!(check_volume_name(name), Ok(()), "{name}");
        }
        let too_long = "v".repeat(VOLUME_NAME_BYTES_MAX + 1);
        for name in ["", "-x", ".x", "..", "a/b", "a b", "ä", "a\0", "a\n", "a?b", &too_long] {
            assert!(check_volume_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn qualified_names_are_told_from_other_text() {
        let longest = format!("nqn.{}", "x".repeat(NQN_BYTES_MAX - 4));
        for nqn in ["nqn.2014-08.org.nvmexpress:uuid:0", "nqn.x:wirt-ä", &longest] {
            assert_eq!(check_nqn(nqn), Ok(()), "{nqn}");
        }
        for nqn in ["", "iqn.x", "nqn.a b", "nqn.a\n", "nqn.a\0", &format!("{longest}x")] {
            assert!(check_nqn(nqn).is_err(), "{nqn:?}");
        }
    }

    #[test]
    fn unknown_keys_in_a_request_are_refused() {
        let text = r#"{"name":"a","size_bytes":4096,"sise":1}"#;
        let error = serde_json::from_str::<CreateVolume>(text).expect_err("unknown key");
        assert!(error.to_string().contains("sise"), "{error}");
    }
}
