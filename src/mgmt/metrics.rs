//! The node's counts in Prometheus' text format, version 0.0.4.
//!
//! [`METRICS`] is the one list of what there is; `docs/metrics.md` is checked against it. Names
//! and units follow Prometheus' conventions: seconds and bytes, `_total` for what only grows.

use std::fmt::Write;

use weft_api::Histogram;
use weft_api::Stats;
use weft_api::histogram::bucket_start;

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it means.
    pub help: &'static str,
    /// Writes its samples.
    write: fn(&mut Samples<'_>, &Stats),
}

const POD: &[&str] = &["pod"];
const DEVICE: &[&str] = &["pod", "device", "name"];
const VOLUME: &[&str] = &["pod", "volume"];
const REQUEST: &[&str] = &["pod", "volume", "front_end", "operation"];
const STAGE: &[&str] = &["pod", "volume", "front_end", "operation", "stage"];
const TASK: &[&str] = &["pod", "kind", "unit"];
const FRONT_END: &[&str] = &["front_end"];

macro_rules! metrics {
    ($($name:literal, $kind:literal, $labels:expr, $help:literal, $write:expr;)*) => {
        /// Every metric there is.
        pub const METRICS: &[Metric] = &[$(Metric {
            name: $name, kind: $kind, labels: $labels, help: $help, write: $write,
        },)*];
    };
}

metrics! {
    "weft_build_info", "gauge", &["version"], "The node's version; always 1",
        |out, _| out.value(&[env!("CARGO_PKG_VERSION")], 1);
    "weft_uptime_seconds", "gauge", &[], "Time since the node began to serve",
        |out, stats| out.seconds(&[], stats.uptime_ms * 1_000_000);
    "weft_connections", "gauge", FRONT_END, "Connections of hosts, now",
        |out, stats| front_ends(out, stats, |of| of.connections_open);
    "weft_connections_accepted_total", "counter", FRONT_END, "Connections accepted",
        |out, stats| front_ends(out, stats, |of| of.connections_total);
    "weft_connections_refused_total", "counter", FRONT_END,
        "Connections turned away because a limit was reached",
        |out, stats| front_ends(out, stats, |of| of.connections_refused);
    "weft_authentications_failed_total", "counter", FRONT_END,
        "Authentications of hosts that failed",
        |out, stats| front_ends(out, stats, |of| of.authentications_failed);
    "weft_in_flight_limit_bytes", "gauge", &[],
        "Memory for what hosts have in flight, beyond what each connection has of its own",
        |out, stats| out.value(&[], stats.in_flight.limit_bytes);
    "weft_in_flight_bytes", "gauge", &[],
        "Of it, taken",
        |out, stats| out.value(&[], stats.in_flight.taken_bytes);
    "weft_in_flight_waiting", "gauge", &[],
        "Connections that wait for it, now",
        |out, stats| out.value(&[], stats.in_flight.waiting);
    "weft_in_flight_waits_total", "counter", &[],
        "How often a connection had to wait for it",
        |out, stats| out.value(&[], stats.in_flight.waits);

    "weft_pod_healthy", "gauge", POD, "1 if all devices are in service and writes are possible",
        |out, stats| pod(out, stats, |pod| u64::from(pod.health == "healthy"));
    "weft_pod_writable", "gauge", POD, "0 once writes cannot be made durable any more",
        |out, stats| pod(out, stats, |pod| u64::from(matches!(&*pod.health, "healthy" | "degraded")));
    "weft_pod_can_lose_devices", "gauge", POD, "Devices that may still fail, all at once, without loss",
        |out, stats| pod(out, stats, |pod| pod.can_lose as u64);
    "weft_pod_segments", "gauge", POD, "Segments, the units of erasure coding, with data in them",
        |out, stats| pod(out, stats, |pod| pod.segments);
    "weft_pod_segments_degraded", "gauge", POD,
        "Segments with fewer strips in service than they should have; a rebuild lowers it",
        |out, stats| pod(out, stats, |pod| pod.segments_degraded);
    "weft_pod_devices", "gauge", POD, "Devices the pod has",
        |out, stats| pod(out, stats, |pod| pod.device_count as u64);
    "weft_pod_devices_in_service", "gauge", POD, "Devices in service",
        |out, stats| pod(out, stats, |pod| pod.devices_in_service as u64);
    "weft_pod_capacity_bytes", "gauge", POD, "What volumes may store, after parity, before compression",
        |out, stats| pod(out, stats, |pod| pod.capacity_bytes);
    "weft_pod_used_bytes", "gauge", POD, "Of the capacity, in use or promised",
        |out, stats| pod(out, stats, |pod| pod.used_bytes);
    "weft_pod_logical_bytes", "gauge", POD, "Live data as hosts wrote it",
        |out, stats| pod(out, stats, |pod| pod.logical_bytes);
    "weft_pod_physical_bytes", "gauge", POD, "Live data after compression",
        |out, stats| pod(out, stats, |pod| pod.physical_bytes);
    "weft_pod_journal_bytes", "gauge", POD, "Length of the journal",
        |out, stats| pod(out, stats, |pod| pod.journal_bytes);
    "weft_pod_journal_used_bytes", "gauge", POD, "Of the journal, not yet behind a checkpoint",
        |out, stats| pod(out, stats, |pod| pod.journal_used_bytes);
    "weft_pod_write_buffer_bytes", "gauge", POD, "Acknowledged and not yet in a segment",
        |out, stats| pod(out, stats, |pod| pod.buffered_bytes);
    "weft_pod_cache_bytes", "gauge", POD, "RAM that holds decoded data",
        |out, stats| pod(out, stats, |pod| pod.cache_bytes);
    "weft_pod_cache_hits_total", "counter", POD, "Reads answered from the RAM cache",
        |out, stats| pod(out, stats, |pod| pod.cache_hits);
    "weft_pod_cache_misses_total", "counter", POD, "Reads that asked a device",
        |out, stats| pod(out, stats, |pod| pod.cache_misses);
    "weft_pod_checkpoints_total", "counter", POD, "Checkpoints",
        |out, stats| pod(out, stats, |pod| pod.checkpoints);

    "weft_task_done", "gauge", TASK,
        "Of a task under way, done; there is no series while none of the kind runs",
        |out, stats| tasks(out, stats, |task| task.done);
    "weft_task_total", "gauge", TASK, "All there is to do",
        |out, stats| tasks(out, stats, |task| task.total);
    "weft_scrub_units_verified_total", "counter", POD,
        "Units, pieces of 64 KiB, that scrubs read and found as they were written",
        |out, stats| out.value(&[&stats.pod.uuid], stats.scrub.damage.verified);
    "weft_scrub_units_damaged_total", "counter", POD, "Units and superblocks that scrubs found damaged",
        |out, stats| out.value(&[&stats.pod.uuid], stats.scrub.damage.found);
    "weft_scrub_units_healed_total", "counter", POD,
        "Of them, written back and read again as they should be",
        |out, stats| out.value(&[&stats.pod.uuid], stats.scrub.damage.healed);
    "weft_scrub_units_left_total", "counter", POD, "Of them, that could not be healed",
        |out, stats| out.value(&[&stats.pod.uuid], stats.scrub.damage.left);
    "weft_scrub_done_timestamp_seconds", "gauge", POD,
        "When the last scrub was done; 0 if none was since the node started",
        |out, stats| out.value(&[&stats.pod.uuid], stats.scrub.done_unix_ms.unwrap_or(0) / 1000);

    "weft_device_in_service", "gauge", DEVICE, "1 if the device takes reads and writes",
        |out, stats| devices(out, stats, |of| u64::from(of.device.state == "in service"));
    "weft_device_size_bytes", "gauge", DEVICE, "Length of the device",
        |out, stats| devices(out, stats, |of| of.device.size_bytes);
    "weft_device_read_errors_total", "counter", DEVICE, "Reads failed",
        |out, stats| devices(out, stats, |of| of.device.read_errors);
    "weft_device_write_errors_total", "counter", DEVICE, "Writes and flushes failed",
        |out, stats| devices(out, stats, |of| of.device.write_errors);
    "weft_device_checksum_errors_total", "counter", DEVICE,
        "Reads whose bytes were not what had been written",
        |out, stats| devices(out, stats, |of| of.device.checksum_errors);
    "weft_device_healed_total", "counter", DEVICE, "Damaged places rebuilt and written back",
        |out, stats| devices(out, stats, |of| of.device.healed);
    "weft_device_read_duration_seconds", "histogram", DEVICE, "Reads completed by the device",
        |out, stats| device_histograms(out, stats, |of| &of.read_latency);
    "weft_device_write_duration_seconds", "histogram", DEVICE,
        "Writes and flushes completed by the device",
        |out, stats| device_histograms(out, stats, |of| &of.write_latency);

    "weft_volume_size_bytes", "gauge", VOLUME, "Size of the volume",
        |out, stats| volumes(out, stats, |of| of.size_bytes);
    "weft_volume_allocated_bytes", "gauge", VOLUME, "What it stores, before compression and parity",
        |out, stats| volumes(out, stats, |of| of.allocated_bytes);
    "weft_request_errors_total", "counter", REQUEST, "Requests answered with an error",
        |out, stats| requests(out, stats, |out, labels, of| out.value(labels, of.errors));
    "weft_request_bytes_total", "counter", REQUEST, "Bytes read, written or zeroed by requests",
        |out, stats| requests(out, stats, |out, labels, of| out.value(labels, of.bytes));
    "weft_request_duration_seconds", "histogram", REQUEST,
        "Requests, from their arrival to their answer in the socket",
        |out, stats| requests(out, stats, |out, labels, of| out.histogram(labels, &of.latency));
    "weft_request_stage_seconds_total", "counter", STAGE, "Time requests spent in each stage",
        |out, stats| requests(out, stats, stages);
}

/// All metrics as text.
#[must_use]
pub fn text(stats: &Stats) -> String {
    let mut text = String::new();
    for metric in METRICS {
        let Metric { name, kind, help, .. } = metric;
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        (metric.write)(&mut Samples { metric, text: &mut text }, stats);
    }
    text
}

fn front_ends(out: &mut Samples<'_>, stats: &Stats, value: fn(&weft_api::FrontEndStats) -> u64) {
    for of in &stats.front_ends {
        out.value(&[of.front_end.name()], value(of));
    }
}

fn pod(out: &mut Samples<'_>, stats: &Stats, value: fn(&weft_api::Pod) -> u64) {
    out.value(&[&stats.pod.uuid], value(&stats.pod));
}

fn tasks(out: &mut Samples<'_>, stats: &Stats, value: fn(&weft_api::Task) -> u64) {
    for task in &stats.tasks {
        out.value(&[&stats.pod.uuid, task.kind.name(), task.unit.name()], value(task));
    }
}

fn devices(out: &mut Samples<'_>, stats: &Stats, value: fn(&weft_api::DeviceStats) -> u64) {
    for of in &stats.devices {
        let index = of.device.index.to_string();
        out.value(&[&stats.pod.uuid, &index, &of.device.name], value(of));
    }
}

fn device_histograms(
    out: &mut Samples<'_>,
    stats: &Stats,
    histogram: fn(&weft_api::DeviceStats) -> &Histogram,
) {
    for of in &stats.devices {
        let index = of.device.index.to_string();
        out.histogram(&[&stats.pod.uuid, &index, &of.device.name], histogram(of));
    }
}

fn volumes(out: &mut Samples<'_>, stats: &Stats, value: fn(&weft_api::VolumeStats) -> u64) {
    for of in &stats.volumes {
        out.value(&[&stats.pod.uuid, &of.name], value(of));
    }
}

fn requests(
    out: &mut Samples<'_>,
    stats: &Stats,
    write: fn(&mut Samples<'_>, &[&str], &weft_api::OperationStats),
) {
    for volume in &stats.volumes {
        for of in &volume.operations {
            let (front_end, operation) = (of.front_end.name(), of.operation.name());
            write(out, &[&stats.pod.uuid, &volume.name, front_end, operation], of);
        }
    }
}

fn stages(out: &mut Samples<'_>, labels: &[&str], of: &weft_api::OperationStats) {
    for stage in &of.stages {
        let mut labels = labels.to_vec();
        labels.push(stage.stage.name());
        out.seconds(&labels, stage.latency.sum_ns);
    }
}

/// Where the samples of one metric go.
struct Samples<'a> {
    metric: &'a Metric,
    text: &'a mut String,
}

/// Bounds of the buckets shown, as powers of two of nanoseconds: 8 us to 17 s, each twice the one
/// before. The finer buckets of the API would make hundreds of series for each volume.
const BOUNDS: std::ops::RangeInclusive<u32> = 13..=34;

impl Samples<'_> {
    fn value(&mut self, labels: &[&str], value: u64) {
        self.sample("", labels, None, &value.to_string());
    }

    fn seconds(&mut self, labels: &[&str], nanoseconds: u64) {
        self.sample("", labels, None, &seconds(nanoseconds));
    }

    fn histogram(&mut self, labels: &[&str], histogram: &Histogram) {
        for bound in BOUNDS {
            let below = |bucket: &u16| bucket_start(usize::from(*bucket)) < 1 << bound;
            let counts = histogram.buckets.iter().filter(|(bucket, _)| below(bucket));
            let count: u64 = counts.map(|(_, count)| count).sum();
            self.sample("_bucket", labels, Some(&seconds(1 << bound)), &count.to_string());
        }
        let count = histogram.count().to_string();
        self.sample("_bucket", labels, Some("+Inf"), &count);
        self.sample("_sum", labels, None, &seconds(histogram.sum_ns));
        self.sample("_count", labels, None, &count);
    }

    fn sample(&mut self, suffix: &str, labels: &[&str], bound: Option<&str>, value: &str) {
        debug_assert_eq!(labels.len(), self.metric.labels.len());
        let named = self.metric.labels.iter().copied().zip(labels.iter().copied());
        let all: Vec<String> = named
            .chain(bound.map(|bound| ("le", bound)))
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
            .collect();
        let labels = if all.is_empty() { String::new() } else { format!("{{{}}}", all.join(",")) };
        let _ = writeln!(self.text, "{}{suffix}{labels} {value}", self.metric.name);
    }
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Nanoseconds as decimal seconds, exactly.
fn seconds(nanoseconds: u64) -> String {
    format!("{}.{:09}", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use weft_api::FrontEnd;
    use weft_api::Operation;

    use super::*;
    use crate::observe::requests::Requests;

    #[test]
    fn every_metric_is_documented_and_none_twice() {
        let page = include_str!("../../docs/metrics.md");
        let documented: Vec<&str> =
            page.lines().filter(|line| line.starts_with("| `weft_")).collect();
        let expected: Vec<String> = METRICS
            .iter()
            .map(|metric| {
                let labels = metric.labels.join(", ");
                format!("| `{}` | {} | {labels} | {} |", metric.name, metric.kind, metric.help)
            })
            .collect();
        assert_eq!(documented, expected, "docs/metrics.md and METRICS differ");
        let names: BTreeSet<_> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
    }

    #[test]
    fn a_histogram_counts_up_to_each_bound() {
        let requests = Requests::default();
        let reads = requests.kind(FrontEnd::Nbd, Operation::Read);
        for us in [3, 30, 300, 3_000_000, 30_000_000] {
            reads.done(1, 4096, Duration::from_micros(us));
        }
        let metric = METRICS.iter().find(|metric| metric.name == "weft_request_duration_seconds");
        let mut text = String::new();
        let mut out = Samples { metric: metric.expect("listed"), text: &mut text };
        out.histogram(&["p", "a\"b", "nbd", "read"], &requests.snapshot()[0].latency);
        let labels = "pod=\"p\",volume=\"a\\\"b\",front_end=\"nbd\",operation=\"read\"";
        for (bound, count) in [
            ("0.000008192", 1),
            ("0.000032768", 2),
            ("0.000524288", 3),
            ("17.179869184", 4),
            ("+Inf", 5),
        ] {
            let line = format!(
                "weft_request_duration_seconds_bucket{{{labels},le=\"{bound}\"}} {count}\n"
            );
            assert!(text.contains(&line), "{line} in\n{text}");
        }
        assert!(text.contains(&format!("_sum{{{labels}}} 33.000333000\n")), "{text}");
        assert!(text.contains(&format!("_count{{{labels}}} 5\n")), "{text}");
    }
}
