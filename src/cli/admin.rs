//! The admin commands: one request to the node, one answer printed.

use std::future::Future;

use tokio::runtime;
use weft_api::Client;
use weft_api::ClientError;
use weft_api::CreateVolume;
use weft_api::Device;
use weft_api::Histogram;
use weft_api::NodeStatus;
use weft_api::Pod;
use weft_api::Stats;
use weft_api::Volume;
use weft_api::VolumeHosts;

use super::Command;
use super::DeviceCommand;
use super::ExportCommand;
use super::OutputArguments;
use super::Place;
use super::PodCommand;
use super::Switch;
use super::VolumeCommand;
use super::doctor;
use super::exit::FAILED;
use super::exit::Failure;
use super::exit::NOT_FOUND;
use super::explain::explain;
use super::export::Export;
use super::host;
use super::manual;
use super::output::Table;
use super::output::facts;
use super::output::print;
use super::output::say;
use super::output::show;
use super::task;
use super::top;
use super::watch;
use crate::node::openapi_document;
use crate::units::format_size;

/// Runs one command, against the node of `place` unless it needs none.
pub(super) fn run(command: Command, place: Place) -> Result<(), Failure> {
    let node = place.client();
    match command {
        Command::Status(output) => {
            let status = ask(node?, async |client| client.status().await)?;
            show(&output, &status, status_text)
        }
        Command::Pod(PodCommand::Show(output)) => {
            let pod = ask(node?, async |client| client.pod().await)?;
            show(&output, &pod, pod_text)
        }
        Command::Pod(PodCommand::Scrub { wait, output }) => task::scrub(wait, &output, node?),
        Command::Task(command) => task::task(command, node?),
        Command::Device(DeviceCommand::List(output)) => {
            let devices = ask(node?, async |client| client.devices().await)?;
            show(&output, &devices, |devices| device_table(devices))
        }
        Command::Volume(command) => volume(command, node?),
        Command::Export(ExportCommand::Show { name, output }) => {
            let (status, volume, hosts) = ask(node?, async |client| {
                let volume = client.volume(&name).await?;
                Ok((client.status().await?, volume, client.hosts().await?))
            })?;
            show(&output, &Export::new(&status, &volume, &hosts), Export::text)
        }
        Command::Host(command) => host::run(command, node),
        Command::Explain { name, last, output } => explain_volume(&name, last, &output, node?),
        Command::Event(command) => watch::event(command, node?),
        Command::Connection(command) => watch::connection(command, node?),
        Command::Log(arguments) => watch::log(arguments, node?),
        Command::Reload(output) => {
            ask(node?, async |client| client.reload().await)?;
            say(&output, "certificates, keys and token are read again\n")
        }
        Command::Metrics => watch::metrics(node?),
        Command::Top(arguments) => top::run(arguments, node?),
        Command::Doctor(arguments) => doctor::run(place.data, arguments),
        Command::Openapi => print(&openapi_document()),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { out } => manual::pages(out.as_deref()),
    }
}

fn explain_volume(
    name: &str,
    last_s: u64,
    output: &OutputArguments,
    node: Client,
) -> Result<(), Failure> {
    let (before, now) = ask(node, async |client| {
        let now = client.stats().await?;
        let last_ms = last_s.saturating_mul(1000);
        if last_ms >= now.uptime_ms {
            return Ok((None, now));
        }
        let recorded = client.history(now.unix_ms - last_ms, now.unix_ms, u64::MAX).await?;
        Ok((recorded.into_iter().next(), now))
    })?;
    let before = before.unwrap_or_else(|| started(&now));
    let explained = explain(name, &before, &now).ok_or_else(|| Failure {
        code: NOT_FOUND,
        message: format!("there is no volume '{}'", name.escape_debug()),
    })?;
    show(output, &explained, |explained| explained.text(last_s))
}

/// The counts of the same node when it started: nothing.
fn started(now: &Stats) -> Stats {
    let mut start = now.clone();
    start.uptime_ms = 0;
    start.volumes.clear();
    (start.pod.cache_hits, start.pod.cache_misses) = (0, 0);
    for device in &mut start.devices {
        device.read_latency = Histogram::default();
        device.write_latency = Histogram::default();
    }
    start
}

fn volume(command: VolumeCommand, node: Client) -> Result<(), Failure> {
    match command {
        VolumeCommand::Create { name, size, block_size, read_only, write_cache, output } => {
            let volume = CreateVolume {
                name,
                size_bytes: size,
                logical_block_bytes: block_size,
                read_only,
                write_cache,
            };
            let created = ask(node, async |client| client.create_volume(&volume).await)?;
            show(&output, &created, volume_text)
        }
        VolumeCommand::List(output) => {
            let volumes = ask(node, async |client| client.volumes().await)?;
            show(&output, &volumes, |volumes| volume_table(volumes))
        }
        VolumeCommand::Show { name, output } => {
            let volume = ask(node, async |client| client.volume(&name).await)?;
            show(&output, &volume, volume_text)
        }
        VolumeCommand::Resize { name, size, output } => {
            let resized = ask(node, async |client| client.resize_volume(&name, size).await)?;
            show(&output, &resized, volume_text)
        }
        VolumeCommand::Hosts { name, only, all, output } => {
            let hosts = VolumeHosts { hosts: (!all).then(|| only.into_iter().collect()) };
            let set = ask(node, async |client| client.set_volume_hosts(&name, &hosts).await)?;
            show(&output, &set, volume_text)
        }
        VolumeCommand::WriteCache { name, state, output } => {
            let enabled = state == Switch::On;
            let set = ask(node, async |client| client.set_write_cache(&name, enabled).await)?;
            show(&output, &set, volume_text)
        }
        VolumeCommand::Release { name, output } => {
            ask(node, async |client| client.clear_reservations(&name).await)?;
            say(&output, &format!("volume {name} is reserved by no host\n"))
        }
        VolumeCommand::Delete { name, output } => {
            ask(node, async |client| client.delete_volume(&name).await)?;
            say(&output, &format!("volume {name} deleted\n"))
        }
    }
}

/// Asks the node, and waits for its answer.
pub(super) fn ask<T, F>(node: Client, request: impl FnOnce(Client) -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, ClientError>>,
{
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime
        .map_err(|error| Failure { code: FAILED, message: format!("start a runtime: {error}") })?;
    Ok(runtime.block_on(request(node))?)
}

fn status_text(status: &NodeStatus) -> String {
    let mut lines = vec![
        ("version", status.version.clone()),
        ("process", status.pid.to_string()),
        ("directory", status.data_dir.clone()),
        ("serving for", format_duration(status.uptime_s)),
        ("data-plane threads", status.data_plane_threads.to_string()),
        ("connections", status.connections.to_string()),
        ("volumes", status.volume_count.to_string()),
    ];
    for listener in &status.listeners {
        let text = format!("{} {}", listener.transport, listener.address);
        lines.push((listener.protocol.as_str(), text));
    }
    lines.extend([
        ("pod", status.pod.uuid.clone()),
        ("health", health(&status.pod)),
        ("capacity", capacity(&status.pod)),
    ]);
    facts(&lines)
}

fn pod_text(pod: &Pod) -> String {
    let of = |part, whole| format!("{} of {}", format_size(part), format_size(whole));
    facts(&[
        ("pod", pod.uuid.clone()),
        ("health", health(pod)),
        ("geometry", format!("{} data + {} parity", pod.data_strips, pod.parity_strips)),
        ("devices", format!("{} of {} in service", pod.devices_in_service, pod.device_count)),
        ("redundancy", redundancy(pod)),
        ("capacity", capacity(pod)),
        ("data", data(pod)),
        ("journal", of(pod.journal_used_bytes, pod.journal_bytes)),
        ("write buffer", format_size(pod.buffered_bytes)),
        ("cache", cache(pod)),
        ("checkpoints", pod.checkpoints.to_string()),
        ("epoch", pod.epoch.to_string()),
    ])
}

fn health(pod: &Pod) -> String {
    let devices = if pod.can_lose == 1 { "device" } else { "devices" };
    format!("{}, may lose {} more {devices}", pod.health, pod.can_lose)
}

fn redundancy(pod: &Pod) -> String {
    match pod.segments_degraded {
        0 => format!("whole in all {} segments", pod.segments),
        degraded => format!("missing in {degraded} of {} segments", pod.segments),
    }
}

fn capacity(pod: &Pod) -> String {
    format!("{} used of {}", format_size(pod.used_bytes), format_size(pod.capacity_bytes))
}

fn data(pod: &Pod) -> String {
    let (logical, physical) = (format_size(pod.logical_bytes), format_size(pod.physical_bytes));
    let ratio = ratio(pod.logical_bytes, pod.physical_bytes);
    format!("{logical}, compressed to {physical}{ratio}")
}

fn cache(pod: &Pod) -> String {
    let asked = pod.cache_hits + pod.cache_misses;
    let hits = match asked {
        0 => String::new(),
        asked => {
            format!(", {} % of {asked} reads", u128::from(pod.cache_hits) * 100 / u128::from(asked))
        }
    };
    format!("{}{hits}", format_size(pod.cache_bytes))
}

/// ` (2.4 : 1)`, in tenths rounded down; nothing if there is nothing to compare.
fn ratio(logical: u64, physical: u64) -> String {
    if physical == 0 {
        return String::new();
    }
    let tenths = u128::from(logical) * 10 / u128::from(physical);
    format!(" ({}.{} : 1)", tenths / 10, tenths % 10)
}

fn device_table(devices: &[Device]) -> String {
    let header = [
        "DEVICE",
        "STATE",
        "SIZE",
        "READS",
        "WRITES",
        "READ ERRORS",
        "WRITE ERRORS",
        "CHECKSUM ERRORS",
        "HEALED",
        "NAME",
    ];
    let mut table = Table::new(&header, &[0, 2, 3, 4, 5, 6, 7, 8]);
    for device in devices {
        let state = match &device.reason {
            Some(reason) => format!("{} ({reason})", device.state),
            None => device.state.clone(),
        };
        table.row(vec![
            device.index.to_string(),
            state,
            format_size(device.size_bytes),
            device.reads.to_string(),
            device.writes.to_string(),
            device.read_errors.to_string(),
            device.write_errors.to_string(),
            device.checksum_errors.to_string(),
            device.healed.to_string(),
            device.name.clone(),
        ]);
    }
    table.text()
}

fn volume_table(volumes: &[Volume]) -> String {
    let mut table = Table::new(&["VOLUME", "SIZE", "ALLOCATED", "BLOCK", "ACCESS"], &[1, 2, 3]);
    for volume in volumes {
        table.row(vec![
            volume.name.clone(),
            format_size(volume.size_bytes),
            format_size(volume.allocated_bytes),
            volume.logical_block_bytes.to_string(),
            access(volume).to_owned(),
        ]);
    }
    table.text()
}

fn volume_text(volume: &Volume) -> String {
    facts(&[
        ("volume", volume.name.clone()),
        ("uuid", volume.uuid.clone()),
        ("size", format_size(volume.size_bytes)),
        ("allocated", format_size(volume.allocated_bytes)),
        ("block", volume.logical_block_bytes.to_string()),
        ("access", access(volume).to_owned()),
        ("write cache", if volume.write_cache { "on, over NBD" } else { "off" }.to_owned()),
        ("hosts", hosts(volume)),
        ("reserved", reserved(volume)),
    ])
}

fn reserved(volume: &Volume) -> String {
    let Some(all) = &volume.reservations else { return "no".to_owned() };
    let registered = format!("registered: {}", all.registrants.join(", "));
    match (&all.held, &all.holder) {
        (None, _) => format!("no; {registered}"),
        (Some(held), None) => format!("{held}; {registered}"),
        (Some(held), Some(holder)) => format!("{held}, by {holder}; {registered}"),
    }
}

fn hosts(volume: &Volume) -> String {
    match &volume.hosts {
        None => "all".to_owned(),
        Some(hosts) if hosts.is_empty() => "none".to_owned(),
        Some(hosts) => hosts.iter().map(String::as_str).collect::<Vec<_>>().join(", "),
    }
}

fn access(volume: &Volume) -> &'static str {
    if volume.read_only { "read-only" } else { "read-write" }
}

/// `3 d 4 h 5 min 6 s`, without leading zeroes.
pub(super) fn format_duration(seconds: u64) -> String {
    let parts = [(seconds / 86400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "min")];
    let mut text = String::new();
    for (count, unit) in parts {
        if count > 0 || !text.is_empty() {
            text.push_str(&format!("{count} {unit} "));
        }
    }
    format!("{text}{} s", seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_ratios_read_well() {
        assert_eq!(format_duration(59), "59 s");
        assert_eq!(format_duration(3600), "1 h 0 min 0 s");
        assert_eq!(format_duration(90061), "1 d 1 h 1 min 1 s");
        assert_eq!(ratio(24, 10), " (2.4 : 1)");
        assert_eq!(ratio(0, 0), "");
    }
}
