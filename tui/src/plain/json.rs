//! Intervals as JSON, one object a line. Keys are only ever added.

use std::collections::BTreeMap;

use serde::Serialize;
use weft_api::Task;

use crate::format;
use crate::model::activity::Activity;
use crate::model::activity::OperationActivity;
use crate::model::interval::DeviceInterval;
use crate::model::interval::Interval;

#[derive(Serialize)]
struct IntervalJson<'a> {
    unix_ms: u64,
    uptime_ms: u64,
    interval_ms: u64,
    restarted: bool,
    pod: PodJson<'a>,
    volumes: Vec<VolumeJson<'a>>,
    devices: Vec<DeviceJson<'a>>,
    connections: u64,
    /// Long work under way.
    tasks: &'a [Task],
}

#[derive(Serialize)]
struct PodJson<'a> {
    uuid: &'a str,
    health: &'a str,
    can_lose: usize,
    capacity_bytes: u64,
    used_bytes: u64,
    logical_bytes: u64,
    physical_bytes: u64,
    /// Between 0 and 1.
    journal_fill: Option<f64>,
    /// Between 0 and 1; null if nothing was read.
    cache_hit_share: Option<f64>,
    operations: BTreeMap<&'static str, OperationJson>,
}

#[derive(Serialize)]
struct VolumeJson<'a> {
    name: &'a str,
    operations: BTreeMap<&'static str, OperationJson>,
}

/// By operation; those that did not happen are left out.
#[derive(Serialize)]
struct OperationJson {
    iops: f64,
    errors_per_s: f64,
    bytes_per_s: f64,
    p50_ns: u64,
    p99_ns: u64,
    p999_ns: u64,
    stages: BTreeMap<&'static str, StageJson>,
}

#[derive(Serialize)]
struct StageJson {
    /// Of the time of all requests, between 0 and 1.
    share: f64,
    mean_ns: u64,
    p99_ns: u64,
}

#[derive(Serialize)]
struct DeviceJson<'a> {
    index: usize,
    name: &'a str,
    state: &'a str,
    reads_per_s: f64,
    writes_per_s: f64,
    read_p99_ns: u64,
    write_p99_ns: u64,
    /// Of any kind, since the node started.
    errors: u64,
    healed: u64,
}

/// The interval and a line feed.
pub(super) fn interval(interval: &Interval) -> String {
    let pod = &interval.pod;
    let asked = interval.cache_hits.saturating_add(interval.cache_misses);
    let value = IntervalJson {
        unix_ms: interval.unix_ms,
        uptime_ms: interval.uptime_ms,
        interval_ms: interval.span_ms,
        restarted: interval.restarted,
        pod: PodJson {
            uuid: &pod.uuid,
            health: &pod.health,
            can_lose: pod.can_lose,
            capacity_bytes: pod.capacity_bytes,
            used_bytes: pod.used_bytes,
            logical_bytes: pod.logical_bytes,
            physical_bytes: pod.physical_bytes,
            journal_fill: format::share(pod.journal_used_bytes, pod.journal_bytes),
            cache_hit_share: format::share(interval.cache_hits, asked),
            operations: operations(interval, &interval.total),
        },
        volumes: interval
            .volumes
            .iter()
            .map(|one| VolumeJson {
                name: &one.name,
                operations: operations(interval, &one.activity),
            })
            .collect(),
        devices: interval.devices.iter().map(|one| device(interval, one)).collect(),
        connections: interval.connections_open(),
        tasks: &interval.tasks,
    };
    let mut text = serde_json::to_string(&value).expect("our own types always encode");
    text.push('\n');
    text
}

fn operations(interval: &Interval, activity: &Activity) -> BTreeMap<&'static str, OperationJson> {
    activity.operations().map(|one| (one.operation.name(), operation(interval, one))).collect()
}

fn operation(interval: &Interval, one: &OperationActivity) -> OperationJson {
    let stages = one.stages.iter().map(|stage| {
        let share = format::share(stage.sum_ns, one.latency.sum_ns).unwrap_or(0.0);
        let value = StageJson { share, mean_ns: stage.mean_ns(), p99_ns: stage.p99_ns };
        (stage.stage.name(), value)
    });
    OperationJson {
        iops: interval.per_second(one.requests),
        errors_per_s: interval.per_second(one.errors),
        bytes_per_s: interval.per_second(one.bytes),
        p50_ns: one.latency.quantile_ns(0.5),
        p99_ns: one.latency.quantile_ns(0.99),
        p999_ns: one.latency.quantile_ns(0.999),
        stages: stages.collect(),
    }
}

fn device<'a>(interval: &Interval, one: &'a DeviceInterval) -> DeviceJson<'a> {
    let device = &one.device;
    DeviceJson {
        index: device.index,
        name: &device.name,
        state: &device.state,
        reads_per_s: interval.per_second(one.reads),
        writes_per_s: interval.per_second(one.writes),
        read_p99_ns: one.read_latency.quantile_ns(0.99),
        write_p99_ns: one.write_latency.quantile_ns(0.99),
        errors: device
            .read_errors
            .saturating_add(device.write_errors)
            .saturating_add(device.checksum_errors),
        healed: device.healed,
    }
}
