//! From what the file says to what the node runs on: ranges, defaults, and what must fit together.

use std::net::SocketAddr;
use std::ops::Range;
use std::ops::RangeInclusive;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use super::ApiTcpConfig;
use super::Config;
use super::DATA_DIR_DEFAULT;
use super::DEVICE_BYTES_MIN;
use super::DEVICES_MAX;
use super::FirstVolume;
use super::Given;
use super::LogConfig;
use super::NbdConfig;
use super::NvmeConfig;
use super::NvmeTcpConfig;
use super::Overrides;
use super::PodConfig;
use super::SizeText;
use super::TlsConfig;
use super::TlsProof;
use super::Wrong;
use super::device_bytes_min;
use super::raw;
use crate::format::table::STRIPS_MAX;
use crate::observe::log;
use crate::observe::log::Format;
use crate::secret::Hash;
use crate::target::nvmf::auth::Policy;
use crate::target::nvmf::auth::groups::Group;
use crate::target::nvmf::subsystem::CONTROLLER_ID_MAX;
use crate::target::nvmf::subsystem::DISCOVERY_NQN;
use crate::target::nvmf::subsystem::SecureChannel;
use crate::target::nvmf::subsystem::UnknownHosts;
use crate::units::BLOCK_BYTES_U64;
use crate::units::IO_ALIGN;
use crate::units::bytes_u64;
use crate::units::format_size;
use crate::volume::pod::VOLUME_BYTES_MAX;

/// What "not said, choose for me" is called in the file.
const AUTO: &str = "auto";
/// Longer than the turn-around of a local client at depth 1.
const POLLING_US: usize = 30;
/// Least memory for what is in flight: two of the largest requests.
const IN_FLIGHT_BYTES_MIN: u64 = 64 << 20;
/// Largest device: what offsets of 63 bits can address.
const SIZE_BYTES_MAX: u64 = 1 << 62;

/// Checks everything and fills in the defaults.
pub(super) fn validate(file: raw::File, overrides: Overrides) -> Result<Config, Wrong> {
    let data_dir = match overrides.data_dir {
        Some(dir) => dir,
        None => path("data_dir", file.data_dir, DATA_DIR_DEFAULT)?,
    };
    let memory = memory(file.memory)?;
    let api_at = span(&file.api.socket);
    let polling = polling(file.threads.polling_us)?;
    Ok(Config {
        pod: pod(file.pod, &data_dir)?,
        cache_bytes: memory.cache_bytes,
        map_cache_bytes: memory.map_cache_bytes,
        in_flight_bytes: memory.in_flight_bytes,
        data_plane_threads: threads(file.threads.data_plane)?,
        polling,
        nbd: nbd(file.nbd, overrides.nbd, &data_dir)?,
        nvme: nvme(file.nvme)?,
        nvme_tcp: nvme_tcp(file.nvme_tcp, overrides.nvme_tcp)?,
        scrub_rate: size("scrub.rate", file.scrub.rate, &(1 << 20..=1 << 40))?.unwrap_or(256 << 20),
        history_bytes: size("history.size", file.history.size, &(0..=1 << 40))?
            .unwrap_or(256 << 20),
        metrics_listen: addresses("metrics.listen", file.metrics.listen, &[])?,
        api_tcp: api_tcp(&file.api)?,
        api_socket: socket("api.socket", file.api.socket, || data_dir.join("weft.sock"))?
            .ok_or_else(|| wrong(api_at, "api.socket", "the API needs a socket"))?,
        log: log(file.log, overrides.log_level)?,
        replace_missing: overrides.replace_missing,
        force_open: overrides.force_open,
        data_dir,
    })
}

/// How RAM is used.
struct Memory {
    cache_bytes: u64,
    map_cache_bytes: u64,
    in_flight_bytes: u64,
}

fn memory(raw: raw::Memory) -> Result<Memory, Wrong> {
    let cache = 1 << 20..=SIZE_BYTES_MAX;
    let cache_bytes = size("memory.cache", raw.cache, &cache)?.unwrap_or(1 << 30);
    let map_cache_bytes = size("memory.map_cache", raw.map_cache, &cache)?.unwrap_or(256 << 20);
    let in_flight = IN_FLIGHT_BYTES_MIN..=SIZE_BYTES_MAX;
    let in_flight_bytes = size("memory.in_flight", raw.in_flight, &in_flight)?
        .unwrap_or((cache_bytes / 4).max(IN_FLIGHT_BYTES_MIN));
    Ok(Memory { cache_bytes, map_cache_bytes, in_flight_bytes })
}

fn pod(raw: raw::Pod, data_dir: &Path) -> Result<PodConfig, Wrong> {
    let geometry_given = raw.data_strips.is_some() || raw.parity_strips.is_some();
    let devices_at = span(&raw.devices);
    let (strips_key, strips_at) = match span(&raw.data_strips) {
        Some(at) => ("pod.data_strips", Some(at)),
        None => ("pod.parity_strips", span(&raw.parity_strips)),
    };
    let data_strips = number("pod.data_strips", raw.data_strips, 1..=STRIPS_MAX - 1)?.unwrap_or(4);
    let parity_strips =
        number("pod.parity_strips", raw.parity_strips, 1..=STRIPS_MAX - 1)?.unwrap_or(2);
    check_strips(data_strips, parity_strips)
        .map_err(|reason| wrong(strips_at, strips_key, reason))?;
    let devices_given = raw.devices.as_ref().is_some_and(|devices| !devices.get_ref().is_empty());
    let devices = devices(raw.devices, data_strips, parity_strips, data_dir)?;
    check_geometry(devices.len(), data_strips, parity_strips)
        .map_err(|reason| wrong(devices_at, "pod.devices", reason))?;

    let (device_bytes, journal_bytes) = lengths(raw.device_size, raw.journal_size)?;
    Ok(PodConfig {
        devices,
        devices_given,
        device_bytes,
        data_strips,
        parity_strips,
        geometry_given,
        journal_bytes,
        first_volume: first_volume(raw.first_volume, raw.first_volume_size)?,
    })
}

/// Length of device files and of the journal on each, as far as they are said. What "auto" comes to
/// is known when the pod is created, which then looks whether they fit.
fn lengths(
    device_size: Given<SizeText>,
    journal_size: Given<SizeText>,
) -> Result<(Option<u64>, Option<u64>), Wrong> {
    const JOURNAL: &str = "pod.journal_size";
    let aligned = |bytes: u64| bytes / IO_ALIGN * IO_ALIGN;
    let journal_at = span(&journal_size);
    let device_size_range = DEVICE_BYTES_MIN..=SIZE_BYTES_MAX;
    let device_bytes = size("pod.device_size", device_size, &device_size_range)?.map(aligned);
    let journal_bytes = size(JOURNAL, journal_size, &(4 << 20..=16 << 30))?.map(aligned);
    if let (Some(device), Some(journal)) = (device_bytes, journal_bytes)
        && device < device_bytes_min(journal)
    {
        let reason = format!(
            "needs devices of at least {}, and pod.device_size is {}",
            format_size(device_bytes_min(journal)),
            format_size(device)
        );
        return Err(wrong(journal_at, JOURNAL, reason));
    }
    Ok((device_bytes, journal_bytes))
}

/// The devices listed, or files of our own, as few as the geometry allows.
fn devices(
    given: Given<Vec<String>>,
    data_strips: usize,
    parity_strips: usize,
    data_dir: &Path,
) -> Result<Vec<PathBuf>, Wrong> {
    let (listed, at) = split(given);
    let listed = listed.unwrap_or_default();
    if listed.len() > DEVICES_MAX {
        return Err(wrong(at, "pod.devices", format!("a pod has at most {DEVICES_MAX}")));
    }
    if listed.is_empty() {
        let count = devices_min(data_strips, parity_strips);
        let file = |index| data_dir.join("devices").join(format!("dev-{index}.img"));
        return Ok((0..count).map(file).collect());
    }
    let mut paths: Vec<PathBuf> = Vec::new();
    for text in listed {
        let path = PathBuf::from(&text);
        if text.is_empty() {
            return Err(wrong(at, "pod.devices", "a path is empty"));
        }
        if paths.contains(&path) {
            return Err(wrong(at, "pod.devices", format!("'{text}' is listed twice")));
        }
        paths.push(path);
    }
    Ok(paths)
}

/// The fewest devices on which a pod of this geometry keeps its promises.
fn devices_min(data_strips: usize, parity_strips: usize) -> usize {
    (data_strips + parity_strips).max(2 * parity_strips + 1)
}

/// Says why there cannot be so many strips, if there cannot.
fn check_strips(data_strips: usize, parity_strips: usize) -> Result<(), String> {
    if data_strips + parity_strips > STRIPS_MAX {
        return Err(format!(
            "{data_strips} data + {parity_strips} parity strips are more than {STRIPS_MAX}"
        ));
    }
    Ok(())
}

/// Says why `devices` devices cannot carry the geometry, if they cannot.
fn check_geometry(devices: usize, data_strips: usize, parity_strips: usize) -> Result<(), String> {
    let strips = data_strips + parity_strips;
    if devices < strips {
        return Err(format!(
            "{data_strips} data + {parity_strips} parity strips need at least {strips} devices, \
             one for each strip; there are {devices}"
        ));
    }
    if devices < 2 * parity_strips + 1 {
        return Err(format!(
            "{parity_strips} parity strips need at least {} devices, so that after the loss of \
             {parity_strips} a majority is left and two halves of the pod can never both be open; \
             there are {devices}",
            2 * parity_strips + 1
        ));
    }
    Ok(())
}

fn first_volume(
    name: Given<String>,
    size_text: Given<SizeText>,
) -> Result<Option<FirstVolume>, Wrong> {
    let sizes = BLOCK_BYTES_U64..=VOLUME_BYTES_MAX;
    let size_at = span(&size_text);
    let size_bytes = size("pod.first_volume_size", size_text, &sizes)?.unwrap_or(8 << 30);
    if !size_bytes.is_multiple_of(BLOCK_BYTES_U64) {
        let reason = "must be a multiple of 4 KiB";
        return Err(wrong(size_at, "pod.first_volume_size", reason));
    }
    let (name, at) = split(name);
    let name = name.unwrap_or_else(|| "vol0".to_owned());
    if name.is_empty() {
        return Ok(None);
    }
    weft_api::check_volume_name(&name).map_err(|reason| wrong(at, "pod.first_volume", reason))?;
    Ok(Some(FirstVolume { name, size_bytes }))
}

fn threads(raw: Given<raw::Count>) -> Result<Option<usize>, Wrong> {
    const KEY: &str = "threads.data_plane";
    let (value, at) = split(raw);
    match value {
        None => Ok(None),
        Some(raw::Count::Text(text)) if text == AUTO => Ok(None),
        Some(raw::Count::Number(count)) if (1..=256).contains(&count) => Ok(Some(count)),
        Some(raw::Count::Number(_) | raw::Count::Text(_)) => {
            Err(wrong(at, KEY, "must be 1 to 256, or \"auto\""))
        }
    }
}

fn polling(given: Given<usize>) -> Result<Option<Duration>, Wrong> {
    // Past a millisecond it would be a thread that never sleeps.
    let span_us = number("threads.polling_us", given, 0..=1000)?.unwrap_or(POLLING_US);
    Ok((span_us > 0).then(|| Duration::from_micros(bytes_u64(span_us))))
}

fn nbd(raw: raw::Nbd, listen: Option<SocketAddr>, data_dir: &Path) -> Result<NbdConfig, Wrong> {
    let given = addresses("nbd.listen", raw.listen, &[10809])?;
    let unix_socket = socket("nbd.unix_socket", raw.unix_socket, || data_dir.join("nbd.sock"))?;
    let connections =
        number("nbd.connections_max", raw.connections_max, 1..=65536)?.unwrap_or(1024);
    Ok(NbdConfig {
        listen: listen.map_or(given, |address| vec![address]),
        unix_socket,
        connections_max: connections,
        tls: tls(raw.tls)?,
    })
}

fn nvme(raw: raw::Nvme) -> Result<NvmeConfig, Wrong> {
    const NQN: &str = "nvme.subsystem_nqn";
    const LEAST: &str = "nvme.controller_id_min";
    const MOST: &str = "nvme.controller_id_max";
    let (nqn, nqn_at) = split(raw.subsystem_nqn);
    let subsystem_nqn = nqn.filter(|nqn| nqn != AUTO);
    if let Some(nqn) = &subsystem_nqn {
        weft_api::check_nqn(nqn).map_err(|reason| wrong(nqn_at.clone(), NQN, reason))?;
        if nqn == DISCOVERY_NQN {
            return Err(wrong(
                nqn_at,
                NQN,
                "is the name of discovery, which every node answers to",
            ));
        }
    }
    let least_at = span(&raw.controller_id_min);
    let ids = 1..=usize::from(CONTROLLER_ID_MAX);
    let least = number(LEAST, raw.controller_id_min, ids.clone())?.unwrap_or(1);
    let most = number(MOST, raw.controller_id_max, ids)?.unwrap_or(CONTROLLER_ID_MAX.into());
    if least > most {
        return Err(wrong(least_at, LEAST, format!("must not be above {MOST}, which is {most}")));
    }
    let id = |value| u16::try_from(value).expect("at most CONTROLLER_ID_MAX");
    let (unknown, unknown_at) = split(raw.unknown_hosts);
    let unknown_hosts = match unknown.as_deref() {
        None | Some("loopback") => UnknownHosts::Loopback,
        Some("refused") => UnknownHosts::Refused,
        Some("anywhere") => UnknownHosts::Anywhere,
        Some(other) => {
            let reason = format!("'{other}' is none of \"refused\", \"loopback\" and \"anywhere\"");
            return Err(wrong(unknown_at, "nvme.unknown_hosts", reason));
        }
    };
    let all = Policy::default();
    let authentication = Policy {
        hashes: some_of("nvme.dhchap_hashes", raw.dhchap_hashes, &all.hashes, Hash::name)?,
        groups: some_of("nvme.dhchap_groups", raw.dhchap_groups, &all.groups, Group::name)?,
    };
    let controller_ids = id(least)..=id(most);
    Ok(NvmeConfig { subsystem_nqn, controller_ids, unknown_hosts, authentication })
}

/// Those named, at least one, in their order; all if nothing is given.
fn some_of<T: Copy>(
    key: &'static str,
    given: Given<Vec<String>>,
    all: &[T],
    name: fn(T) -> &'static str,
) -> Result<Vec<T>, Wrong> {
    let (names, at) = split(given);
    let Some(names) = names else { return Ok(all.to_vec()) };
    let find = |given: &String| all.iter().copied().find(|one| name(*one) == given);
    if let Some(other) = names.iter().find(|given| find(given).is_none()) {
        let known: Vec<_> = all.iter().map(|one| name(*one)).collect();
        let reason = format!("'{other}' is none of {}", known.join(", "));
        return Err(wrong(at, key, reason));
    }
    if names.is_empty() {
        return Err(wrong(at, key, "needs at least one, or no host could authenticate"));
    }
    Ok(names.iter().filter_map(find).collect())
}

fn nvme_tcp(raw: raw::NvmeTcp, listen: Option<SocketAddr>) -> Result<NvmeTcpConfig, Wrong> {
    let given = addresses("nvme_tcp.listen", raw.listen, &[4420])?;
    let discovery = addresses("nvme_tcp.discovery", raw.discovery, &[8009])?;
    let connections =
        number("nvme_tcp.connections_max", raw.connections_max, 1..=65536)?.unwrap_or(1024);
    let (listen, discovery) = match listen {
        Some(address) => (vec![address], Vec::new()),
        None => (given, discovery),
    };
    Ok(NvmeTcpConfig {
        listen,
        discovery,
        advertise: addresses("nvme_tcp.advertise", raw.advertise, &[])?,
        connections_max: connections,
        tls: secure_channel(raw.tls)?,
    })
}

fn secure_channel(given: Given<String>) -> Result<SecureChannel, Wrong> {
    let (mode, at) = split(given);
    match mode.as_deref() {
        Some("off") => Ok(SecureChannel::Off),
        None | Some("optional") => Ok(SecureChannel::Optional),
        Some("required") => Ok(SecureChannel::Required),
        Some(other) => {
            let reason = format!("'{other}' is none of \"off\", \"optional\" and \"required\"");
            Err(wrong(at, "nvme_tcp.tls", reason))
        }
    }
}

/// The addresses listed; if none are, those of this machine with the default ports.
fn addresses(
    key: &'static str,
    given: Given<Vec<String>>,
    default_ports: &[u16],
) -> Result<Vec<SocketAddr>, Wrong> {
    let (listed, at) = split(given);
    let Some(listed) = listed else {
        let local = |port: &u16| SocketAddr::from(([127, 0, 0, 1], *port));
        return Ok(default_ports.iter().map(local).collect());
    };
    let parse = |text: &String| {
        text.parse().map_err(|_| {
            let port = default_ports.first().unwrap_or(&9443);
            let reason =
                format!("'{text}' is not an address: write 127.0.0.1:{port} or [::1]:{port}");
            wrong(at.clone(), key, reason)
        })
    };
    listed.iter().map(parse).collect()
}

fn tls(raw: raw::Tls) -> Result<Option<TlsConfig>, Wrong> {
    let (mode, at) = split(raw.mode);
    let required = match mode.as_deref() {
        None | Some("off") => return Ok(None),
        Some("optional") => false,
        Some("required") => true,
        Some(other) => {
            let reason = format!("'{other}' is none of \"off\", \"optional\" and \"required\"");
            return Err(wrong(at, "nbd.tls.mode", reason));
        }
    };
    let file =
        |given: Given<String>| split(given).0.filter(|text| !text.is_empty()).map(PathBuf::from);
    let psk_at = span(&raw.psk_file);
    let certificates = (file(raw.certificate), file(raw.key), file(raw.client_ca));
    let proof = match (certificates, file(raw.psk_file)) {
        ((Some(certificate), Some(key), client_ca), None) => {
            TlsProof::Certificates { certificate, key, client_ca }
        }
        ((None, None, None), Some(psk_file)) => TlsProof::Keys { psk_file },
        (_, Some(_)) => {
            let reason = "is instead of certificate, key and client_ca: leave those empty";
            return Err(wrong(psk_at, "nbd.tls.psk_file", reason));
        }
        ((certificate, _, _), None) => {
            let key = if certificate.is_none() { "nbd.tls.certificate" } else { "nbd.tls.key" };
            let reason = "is needed unless nbd.tls.mode is \"off\" or there is a psk_file";
            return Err(wrong(at, key, reason));
        }
    };
    Ok(Some(TlsConfig { required, proof }))
}

/// All of it or nothing: without a certificate or a token there is no API over TCP.
fn api_tcp(raw: &raw::Api) -> Result<Option<ApiTcpConfig>, Wrong> {
    let listen_at = span(&raw.listen);
    let listen = addresses("api.listen", raw.listen.clone(), &[])?;
    if listen.is_empty() {
        return Ok(None);
    }
    let file = |key, given: &Given<String>| match split(given.clone()).0 {
        Some(text) if !text.is_empty() => Ok(PathBuf::from(text)),
        _ => Err(wrong(listen_at.clone(), key, "is needed if api.listen is not empty")),
    };
    Ok(Some(ApiTcpConfig {
        certificate: file("api.certificate", &raw.certificate)?,
        key: file("api.key", &raw.key)?,
        token_file: file("api.token_file", &raw.token_file)?,
        listen,
    }))
}

fn log(raw: raw::Log, level_override: Option<String>) -> Result<LogConfig, Wrong> {
    let (format, at) = split(raw.format);
    let format = match format.as_deref() {
        None | Some(AUTO) => Format::Auto,
        Some("text") => Format::Text,
        Some("json") => Format::Json,
        Some("journald") => Format::Journald,
        Some(other) => {
            let reason =
                format!("'{other}' is none of \"auto\", \"text\", \"json\" and \"journald\"");
            return Err(wrong(at, "log.format", reason));
        }
    };
    let (level, at) = match level_override {
        Some(level) => (Some(level), None),
        None => split(raw.level),
    };
    let level = level.unwrap_or_else(|| "info".to_owned());
    if log::check_level(&level).is_err() {
        let reason = format!(
            "'{level}' is none of error, warn, info, debug and trace, nor MODULE=LEVEL,..."
        );
        return Err(wrong(at, "log.level", reason));
    }
    Ok(LogConfig { format, level })
}

/// A path that is not empty.
fn path(key: &'static str, given: Given<String>, default: &str) -> Result<PathBuf, Wrong> {
    match split(given) {
        (None, _) => Ok(PathBuf::from(default)),
        (Some(text), at) if text.is_empty() => Err(wrong(at, key, "is empty")),
        (Some(text), _) => Ok(PathBuf::from(text)),
    }
}

/// The path of a Unix socket; `None` if the file says "".
fn socket(
    key: &'static str,
    given: Given<String>,
    default: impl FnOnce() -> PathBuf,
) -> Result<Option<PathBuf>, Wrong> {
    // The kernel's bound on a Unix socket's path, less its closing zero (unix(7), sun_path).
    const SOCKET_PATH_BYTES_MAX: usize = 107;
    let (text, at) = split(given);
    let path = match text.as_deref() {
        Some("") => return Ok(None),
        None | Some(AUTO) => default(),
        Some(text) => PathBuf::from(text),
    };
    let length = path.as_os_str().len();
    if length > SOCKET_PATH_BYTES_MAX {
        let reason = format!(
            "'{}' has {length} bytes, and the path of a socket at most {SOCKET_PATH_BYTES_MAX}: \
             choose a shorter one",
            path.display()
        );
        return Err(wrong(at, key, reason));
    }
    Ok(Some(path))
}

/// A size within its range; `None` if it is not said, or "auto".
fn size(
    key: &'static str,
    given: Given<SizeText>,
    allowed: &RangeInclusive<u64>,
) -> Result<Option<u64>, Wrong> {
    let (text, at) = split(given);
    let Some(text) = text else { return Ok(None) };
    if matches!(&text, SizeText::Text(text) if text == AUTO)
        && matches!(key, "pod.device_size" | "pod.journal_size" | "memory.in_flight")
    {
        return Ok(None);
    }
    let bytes = text.bytes().map_err(|reason| wrong(at.clone(), key, reason))?;
    if !allowed.contains(&bytes) {
        let (least, most) = (format_size(*allowed.start()), format_size(*allowed.end()));
        return Err(wrong(at, key, format!("must be {least} to {most}")));
    }
    Ok(Some(bytes))
}

/// A number within its range.
fn number(
    key: &'static str,
    given: Given<usize>,
    allowed: RangeInclusive<usize>,
) -> Result<Option<usize>, Wrong> {
    match split(given) {
        (Some(value), at) if !allowed.contains(&value) => {
            let reason = format!("must be {} to {}", allowed.start(), allowed.end());
            Err(wrong(at, key, reason))
        }
        (value, _) => Ok(value),
    }
}

fn split<T>(given: Given<T>) -> (Option<T>, Option<Range<usize>>) {
    let at = span(&given);
    (given.map(toml::Spanned::into_inner), at)
}

fn span<T>(given: &Given<T>) -> Option<Range<usize>> {
    given.as_ref().map(toml::Spanned::span)
}

fn wrong(span: Option<Range<usize>>, key: &'static str, reason: impl Into<String>) -> Wrong {
    Wrong { span, key, reason: reason.into() }
}
