//! What happened between two readings of a node: the one place where counters become rates.
//!
//! # Invariants
//!
//! * Volumes are matched by number and devices by their place, so one that was deleted and made
//!   anew does not inherit counters.
//! * A node that was restarted in between has counted from nothing: then the interval begins at its
//!   start. It is told by its epoch, which grows with each open, or by uptime going back.
//! * A counter that goes back all the same counts from nothing; no difference is negative.

use weft_api::Connection;
use weft_api::Device;
use weft_api::DeviceStats;
use weft_api::FrontEndStats;
use weft_api::Histogram;
use weft_api::InFlightStats;
use weft_api::OperationStats;
use weft_api::Pod;
use weft_api::ScrubStats;
use weft_api::StageStats;
use weft_api::Stats;
use weft_api::Task;
use weft_api::VolumeStats;

use super::activity::Activity;
use super::activity::Tally;
use crate::format::float;

/// What happened between two readings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval {
    /// When it ended, in milliseconds since 1970 by the node's clock.
    pub unix_ms: u64,
    /// The node's uptime when it ended.
    pub uptime_ms: u64,
    /// How long it was; 0 if there was no earlier reading, and then nothing happened in it.
    pub span_ms: u64,
    /// When the reading before was taken, by the node's clock.
    pub earlier_unix_ms: u64,
    /// How long before the interval nothing was recorded: the node was down, or its machine. 0 if
    /// it follows on what was before.
    pub gap_ms: u64,
    /// Whether the node was started in it.
    pub restarted: bool,
    /// The pod when it ended. Its counters are still since the node started.
    pub pod: Pod,
    /// Reads answered from RAM.
    pub cache_hits: u64,
    /// Reads that asked a device.
    pub cache_misses: u64,
    /// What hosts did with all volumes.
    pub total: Activity,
    /// The same of each volume, in order of name.
    pub volumes: Vec<VolumeInterval>,
    /// Devices, in order of index.
    pub devices: Vec<DeviceInterval>,
    /// Connections open when it ended.
    pub connections: Vec<ConnectionInterval>,
    /// Protocols when it ended.
    pub front_ends: Vec<FrontEndStats>,
    /// Long work that was under way when it ended.
    pub tasks: Vec<Task>,
}

/// What hosts did with one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInterval {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Its size when the interval ended.
    pub size_bytes: u64,
    /// What was stored then, before compression and parity.
    pub allocated_bytes: u64,
    /// What was done.
    pub activity: Activity,
}

/// What a device did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInterval {
    /// The device when the interval ended. Its counters are since the node started.
    pub device: Device,
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Their latencies.
    pub read_latency: Histogram,
    /// Their latencies.
    pub write_latency: Histogram,
}

/// What a connection did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionInterval {
    /// The connection when the interval ended. Its counters are since it was accepted.
    pub connection: Connection,
    /// Requests taken.
    pub requests: u64,
    /// Bytes returned by reads.
    pub bytes_read: u64,
    /// Bytes of completed writes.
    pub bytes_written: u64,
}

impl Interval {
    /// The interval from `earlier` to `now`.
    #[must_use]
    pub fn between(
        earlier: Option<(&Stats, &[Connection])>,
        now: &Stats,
        connections: &[Connection],
    ) -> Self {
        let Some((before, open_before)) = earlier else {
            // Nothing is known of what happened before, so nothing has.
            return Self {
                span_ms: 0,
                ..Self::between(Some((now, connections)), now, connections)
            };
        };
        let restarted = now.pod.epoch != before.pod.epoch || now.uptime_ms < before.uptime_ms;
        let begin = if restarted { &at_start(now) } else { before };
        let open_before = if restarted { &[] } else { open_before };
        let (volumes, total) = volumes(begin, now);
        Self {
            unix_ms: now.unix_ms,
            earlier_unix_ms: before.unix_ms,
            gap_ms: 0,
            uptime_ms: now.uptime_ms,
            span_ms: now.uptime_ms.saturating_sub(begin.uptime_ms),
            restarted,
            cache_hits: more(begin.pod.cache_hits, now.pod.cache_hits),
            cache_misses: more(begin.pod.cache_misses, now.pod.cache_misses),
            pod: now.pod.clone(),
            total,
            volumes,
            devices: now.devices.iter().map(|one| device(begin, one)).collect(),
            connections: connections.iter().map(|one| connection(open_before, one)).collect(),
            front_ends: now.front_ends.clone(),
            tasks: now.tasks.clone(),
        }
    }

    /// The interval between two recorded readings. If more than `apart_ms_max` of it is not
    /// recorded there is a gap before it; if its counters have run on over the gap it has no rates.
    #[must_use]
    pub fn recorded(before: &Stats, now: &Stats, apart_ms_max: u64) -> Self {
        let apart_ms = now.unix_ms.saturating_sub(before.unix_ms);
        let interval = Self::between(Some((before, &[])), now, &[]);
        if interval.span_ms > apart_ms_max {
            return Self {
                earlier_unix_ms: before.unix_ms,
                gap_ms: apart_ms,
                restarted: interval.restarted,
                ..Self::between(None, now, &[])
            };
        }
        let missing_ms = apart_ms.saturating_sub(interval.span_ms);
        let gap_ms = if missing_ms > apart_ms_max { missing_ms } else { 0 };
        Self { gap_ms, ..interval }
    }

    /// Whether there are no rates, since nothing was recorded.
    #[must_use]
    pub fn is_gap(&self) -> bool {
        self.gap_ms > 0 && self.span_ms == 0
    }

    /// Connections open when it ended, as the front ends count them: a recording has no more.
    #[must_use]
    pub fn connections_open(&self) -> u64 {
        self.front_ends.iter().map(|one| one.connections_open).sum()
    }

    /// How often in a second something happened that happened `count` times.
    #[must_use]
    pub fn per_second(&self, count: u64) -> f64 {
        if self.span_ms == 0 { 0.0 } else { float(count) * 1000.0 / float(self.span_ms) }
    }

    /// One volume.
    #[must_use]
    pub fn volume(&self, name: &str) -> Option<&VolumeInterval> {
        let at = self.volumes.binary_search_by(|one| one.name.as_str().cmp(name)).ok()?;
        self.volumes.get(at)
    }

    /// One device.
    #[must_use]
    pub fn device(&self, index: usize) -> Option<&DeviceInterval> {
        self.devices.iter().find(|one| one.device.index == index)
    }

    /// How much memory this takes, in units of a few dozen bytes.
    #[must_use]
    pub fn weight(&self) -> usize {
        let volumes: usize = self.volumes.iter().map(|one| 2 + one.activity.weight()).sum();
        let devices = self
            .devices
            .iter()
            .map(|one| 4 + (one.read_latency.buckets.len() + one.write_latency.buckets.len()) / 2);
        10 + self.total.weight()
            + volumes
            + devices.sum::<usize>()
            + 6 * self.connections.len()
            + 6 * self.tasks.len()
    }
}

/// A node's counters when it started.
fn at_start(now: &Stats) -> Stats {
    let pod = Pod { cache_hits: 0, cache_misses: 0, ..now.pod.clone() };
    Stats {
        unix_ms: now.unix_ms.saturating_sub(now.uptime_ms),
        uptime_ms: 0,
        pod,
        devices: Vec::new(),
        volumes: Vec::new(),
        front_ends: Vec::new(),
        in_flight: InFlightStats::default(),
        tasks: Vec::new(),
        scrub: ScrubStats::default(),
    }
}

/// How far a counter has grown; one that went back has counted from nothing.
fn more(before: u64, now: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

fn volumes(begin: &Stats, now: &Stats) -> (Vec<VolumeInterval>, Activity) {
    let mut before: Vec<&VolumeStats> = begin.volumes.iter().collect();
    before.sort_by_key(|one| one.id);
    let mut total = Tally::default();
    let mut volumes: Vec<VolumeInterval> = now
        .volumes
        .iter()
        .map(|one| {
            let at = before.binary_search_by_key(&one.id, |volume| volume.id).ok();
            let operations = at.map_or(&[][..], |at| &before[at].operations[..]);
            let mut own = Tally::default();
            for now in &one.operations {
                let grown = operation(operations, now);
                own.add(&grown);
                total.add(&grown);
            }
            VolumeInterval {
                id: one.id,
                name: one.name.clone(),
                size_bytes: one.size_bytes,
                allocated_bytes: one.allocated_bytes,
                activity: own.finish(),
            }
        })
        .collect();
    volumes.sort_by(|one, other| one.name.cmp(&other.name));
    (volumes, total.finish())
}

/// How far the counters of an operation have grown.
fn operation(before: &[OperationStats], now: &OperationStats) -> OperationStats {
    let same =
        |one: &&OperationStats| (one.front_end, one.operation) == (now.front_end, now.operation);
    let Some(before) = before.iter().find(same) else { return now.clone() };
    let stages = now.stages.iter().map(|one| {
        let before = before.stages.iter().find(|other| other.stage == one.stage);
        let latency = before.map_or(one.latency.clone(), |old| one.latency.since(&old.latency));
        StageStats { stage: one.stage, latency }
    });
    OperationStats {
        front_end: now.front_end,
        operation: now.operation,
        errors: more(before.errors, now.errors),
        bytes: more(before.bytes, now.bytes),
        latency: now.latency.since(&before.latency),
        stages: stages.collect(),
    }
}

fn device(begin: &Stats, now: &DeviceStats) -> DeviceInterval {
    let same = |one: &&DeviceStats| {
        (one.device.index, &one.device.uuid) == (now.device.index, &now.device.uuid)
    };
    let before = begin.devices.iter().find(same);
    let grown = |count: fn(&Device) -> u64| {
        more(before.map_or(0, |one| count(&one.device)), count(&now.device))
    };
    let nothing = Histogram::default();
    DeviceInterval {
        reads: grown(|device| device.reads),
        writes: grown(|device| device.writes),
        read_latency: now.read_latency.since(before.map_or(&nothing, |one| &one.read_latency)),
        write_latency: now.write_latency.since(before.map_or(&nothing, |one| &one.write_latency)),
        device: now.device.clone(),
    }
}

fn connection(before: &[Connection], now: &Connection) -> ConnectionInterval {
    let before = before.iter().find(|one| one.id == now.id);
    let grown = |count: fn(&Connection) -> u64| more(before.map_or(0, count), count(now));
    ConnectionInterval {
        requests: grown(|one| one.requests),
        bytes_read: grown(|one| one.bytes_read),
        bytes_written: grown(|one| one.bytes_written),
        connection: now.clone(),
    }
}
