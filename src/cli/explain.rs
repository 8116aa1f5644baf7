//! `weft explain`: where the time of a volume's requests goes, and why.
//!
//! Two readings of the node's counts are compared; everything said follows from them.

use serde::Serialize;
use weft_api::DeviceStats;
use weft_api::Histogram;
use weft_api::Operation;
use weft_api::OperationStats;
use weft_api::Stage;
use weft_api::Stats;
use weft_api::VolumeStats;

use super::output::Table;
use crate::units::format_size;

/// What is said of a volume. Times are in microseconds.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Explanation {
    volume: String,
    /// Between the two readings.
    seconds: f64,
    /// Those that happened, the one that took most time altogether first.
    operations: Vec<OperationExplained>,
}

#[derive(Debug, PartialEq, Serialize)]
struct OperationExplained {
    operation: Operation,
    requests: u64,
    bytes: u64,
    errors: u64,
    mean_us: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    /// In the order of a request's way.
    stages: Vec<StageShare>,
    /// The one that takes most time.
    costs_most: Option<Stage>,
    why: String,
}

#[derive(Debug, PartialEq, Serialize)]
struct StageShare {
    stage: Stage,
    /// Of all time, in percent.
    share: f64,
    /// Over all requests, also those that spent none there.
    mean_us: f64,
    /// Of those that spent any.
    p99_us: f64,
}

/// Explains what hosts did with a volume between two readings; `None` if there is no such volume.
pub(super) fn explain(volume: &str, before: &Stats, now: &Stats) -> Option<Explanation> {
    let find = |stats: &Stats| stats.volumes.iter().find(|of| of.name == volume).cloned();
    let ours = find(now)?;
    // A volume of that name that was deleted meanwhile is another.
    let earlier = find(before).filter(|earlier| earlier.id == ours.id);
    let evidence = Evidence::between(before, now);
    let mut operations: Vec<OperationExplained> = Operation::ALL
        .iter()
        .filter_map(|operation| {
            let counted = merged(&ours, *operation);
            let counted = match &earlier {
                Some(earlier) => since(&counted, &merged(earlier, *operation)),
                None => counted,
            };
            (counted.latency.count() + counted.errors > 0).then(|| told(&counted, &evidence))
        })
        .collect();
    operations.sort_by(|a, b| time_of(b).total_cmp(&time_of(a)));
    let passed_ms = match now.uptime_ms.checked_sub(before.uptime_ms) {
        Some(passed) => passed,
        // The node was started in between, and has counted from nothing since.
        None => now.uptime_ms,
    };
    Some(Explanation { volume: ours.name, seconds: thousandths(passed_ms), operations })
}

fn time_of(operation: &OperationExplained) -> f64 {
    operation.mean_us * as_float(operation.requests)
}

/// All front ends together.
fn merged(volume: &VolumeStats, operation: Operation) -> OperationStats {
    let mut sum = OperationStats {
        front_end: weft_api::FrontEnd::Unknown,
        operation,
        errors: 0,
        bytes: 0,
        latency: Histogram::default(),
        stages: Vec::new(),
    };
    for of in volume.operations.iter().filter(|of| of.operation == operation) {
        sum.errors += of.errors;
        sum.bytes = sum.bytes.saturating_add(of.bytes);
        sum.latency.add(&of.latency);
        for stage in &of.stages {
            match sum.stages.iter_mut().find(|known| known.stage == stage.stage) {
                Some(known) => known.latency.add(&stage.latency),
                None => sum.stages.push(stage.clone()),
            }
        }
    }
    sum
}

fn since(now: &OperationStats, before: &OperationStats) -> OperationStats {
    let mut passed = now.clone();
    passed.errors = now.errors.saturating_sub(before.errors);
    passed.bytes = now.bytes.checked_sub(before.bytes).unwrap_or(now.bytes);
    passed.latency = now.latency.since(&before.latency);
    for stage in &mut passed.stages {
        if let Some(earlier) = before.stages.iter().find(|other| other.stage == stage.stage) {
            stage.latency = stage.latency.since(&earlier.latency);
        }
    }
    passed
}

fn told(counted: &OperationStats, evidence: &Evidence) -> OperationExplained {
    let requests = counted.latency.count();
    let total = counted.latency.sum_ns.max(1);
    let mut stages: Vec<StageShare> = counted
        .stages
        .iter()
        .filter(|stage| stage.latency.sum_ns > 0)
        .map(|stage| StageShare {
            stage: stage.stage,
            share: as_float(stage.latency.sum_ns) * 100.0 / as_float(total),
            mean_us: us(stage.latency.sum_ns) / as_float(requests.max(1)),
            p99_us: us(stage.latency.quantile_ns(0.99)),
        })
        .collect();
    stages.sort_by_key(|stage| stage.stage);
    let costs_most = stages.iter().max_by(|a, b| a.share.total_cmp(&b.share));
    let costs_most = costs_most.map(|stage| stage.stage);
    OperationExplained {
        operation: counted.operation,
        requests,
        bytes: counted.bytes,
        errors: counted.errors,
        mean_us: us(counted.latency.mean_ns()),
        p50_us: us(counted.latency.quantile_ns(0.5)),
        p99_us: us(counted.latency.quantile_ns(0.99)),
        p999_us: us(counted.latency.quantile_ns(0.999)),
        stages,
        costs_most,
        why: costs_most.map(|stage| evidence.why(stage)).unwrap_or_default(),
    }
}

/// What the rest of the node did meanwhile.
struct Evidence {
    /// Of all devices.
    reads: Histogram,
    writes: Histogram,
    slowest_reader: Option<(String, f64)>,
    slowest_writer: Option<(String, f64)>,
    hits: u64,
    misses: u64,
    used_percent: u64,
    journal_percent: u64,
}

impl Evidence {
    fn between(before: &Stats, now: &Stats) -> Self {
        let mut evidence = Self {
            reads: Histogram::default(),
            writes: Histogram::default(),
            slowest_reader: None,
            slowest_writer: None,
            hits: now.pod.cache_hits.saturating_sub(before.pod.cache_hits),
            misses: now.pod.cache_misses.saturating_sub(before.pod.cache_misses),
            used_percent: percent(now.pod.used_bytes, now.pod.capacity_bytes),
            journal_percent: percent(now.pod.journal_used_bytes, now.pod.journal_bytes),
        };
        for device in &now.devices {
            let same = |other: &&DeviceStats| other.device.uuid == device.device.uuid;
            let earlier = before.devices.iter().find(same);
            let since = |now: &Histogram, then: fn(&DeviceStats) -> &Histogram| {
                earlier.map_or_else(|| now.clone(), |earlier| now.since(then(earlier)))
            };
            let reads = since(&device.read_latency, |of| &of.read_latency);
            let writes = since(&device.write_latency, |of| &of.write_latency);
            slower(&mut evidence.slowest_reader, &device.device.name, &reads);
            slower(&mut evidence.slowest_writer, &device.device.name, &writes);
            evidence.reads.add(&reads);
            evidence.writes.add(&writes);
        }
        evidence
    }

    /// Why a stage takes time, with the figures that bear it out.
    fn why(&self, stage: Stage) -> String {
        match stage {
            Stage::Parse => {
                "requests wait to be begun: the connection has as much in flight as it \
                 may, its thread is busy with others, or a host is slow to send what it writes"
                    .to_owned()
            }
            Stage::Lock => "requests on the same blocks wait for one another".to_owned(),
            Stage::Compress => "the processor compresses what is written".to_owned(),
            Stage::Space => format!(
                "writes wait until reclaim has made room: the pod is {} % full",
                self.used_percent
            ),
            Stage::Journal => format!(
                "writes wait until enough devices hold them: {}; the journal is {} % full",
                devices("writes", &self.writes, self.slowest_writer.as_ref()),
                self.journal_percent
            ),
            Stage::Map => format!(
                "nodes of the map are read from devices: {}. More memory.map_cache keeps them",
                devices("reads", &self.reads, self.slowest_reader.as_ref())
            ),
            Stage::Cache => {
                "requests are answered from RAM; this is the processor's work for them \
                 and for those that came with them"
                    .to_owned()
            }
            Stage::Device => format!(
                "data is read from devices: {}; RAM had {} % of what was asked for. More \
                 memory.cache keeps more of it",
                devices("reads", &self.reads, self.slowest_reader.as_ref()),
                percent(self.hits, self.hits + self.misses)
            ),
            Stage::Decode => {
                "the processor verifies and decompresses what devices return".to_owned()
            }
            Stage::Reply => "answers wait for their turn on the processor, or for a host or a \
                 network that takes them slowly"
                .to_owned(),
            Stage::Rest | Stage::Unknown => {
                "requests wait for a processor: the node's threads are busy, or others use its \
                 processors"
                    .to_owned()
            }
        }
    }
}

fn slower(slowest: &mut Option<(String, f64)>, name: &str, latency: &Histogram) {
    let p99 = us(latency.quantile_ns(0.99));
    if p99 > slowest.as_ref().map_or(0.0, |(_, known)| *known) {
        *slowest = Some((name.to_owned(), p99));
    }
}

fn devices(what: &str, latency: &Histogram, slowest: Option<&(String, f64)>) -> String {
    let Some((name, p99)) = slowest else { return format!("the devices saw no {what}") };
    format!(
        "their {what} take {} (p50) and {} (p99), on {name} {}",
        time(us(latency.quantile_ns(0.5))),
        time(us(latency.quantile_ns(0.99))),
        time(*p99)
    )
}

impl Explanation {
    /// For people. `asked_s` is the time they wanted to hear of.
    pub(super) fn text(&self, asked_s: u64) -> String {
        let mut text = format!("{}, the last {:.0} s", self.volume, self.seconds);
        if self.seconds + 2.0 < as_float(asked_s) {
            text.push_str(" (nothing older is known of this run of the node)");
        }
        text.push('\n');
        if self.operations.is_empty() {
            text.push_str("no requests\n");
        }
        for operation in &self.operations {
            text.push('\n');
            text.push_str(&operation.text(self.seconds));
        }
        text
    }
}

impl OperationExplained {
    fn text(&self, seconds: f64) -> String {
        let rate = as_float(self.requests) / seconds.max(0.001);
        let mut text = format!(
            "{}: {} requests ({rate:.0}/s), {}",
            self.operation,
            self.requests,
            format_size(self.bytes)
        );
        if self.errors > 0 {
            text.push_str(&format!("; {} more failed", self.errors));
        }
        text.push_str(&format!(
            "\n  mean {}, p50 {}, p99 {}, p99.9 {}\n",
            time(self.mean_us),
            time(self.p50_us),
            time(self.p99_us),
            time(self.p999_us)
        ));
        let mut table = Table::new(&["  STAGE", "SHARE", "MEAN", "P99"], &[1, 2, 3]);
        for stage in &self.stages {
            table.row(vec![
                format!("  {}", stage.stage),
                format!("{:.1} %", stage.share),
                time(stage.mean_us),
                time(stage.p99_us),
            ]);
        }
        if let Some(stage) = self.costs_most {
            text.push_str(&table.text());
            text.push_str(&format!("  {stage} costs most: {}\n", self.why));
        }
        text
    }
}

/// A time in microseconds, in the unit that fits: `12.3 us`, `4.56 ms`, `1.20 s`.
fn time(us: f64) -> String {
    match us {
        us if us < 1000.0 => format!("{us:.1} us"),
        us if us < 1_000_000.0 => format!("{:.2} ms", us / 1000.0),
        us => format!("{:.2} s", us / 1_000_000.0),
    }
}

fn us(nanoseconds: u64) -> f64 {
    as_float(nanoseconds) / 1000.0
}

fn thousandths(count: u64) -> f64 {
    as_float(count) / 1000.0
}

fn percent(part: u64, whole: u64) -> u64 {
    let percent = u128::from(part) * 100 / u128::from(whole.max(1));
    u64::try_from(percent).unwrap_or(u64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn as_float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use weft_api::FrontEnd;
    use weft_api::StageStats;
    use weft_api::histogram::bucket_of;

    use super::*;

    fn latency(us: u64, count: u64) -> Histogram {
        let bucket = u16::try_from(bucket_of(us * 1000)).expect("few buckets");
        Histogram { sum_ns: us * 1000 * count, buckets: vec![(bucket, count)] }
    }

    /// Three devices, and nothing done.
    fn idle(uptime_s: u64) -> Stats {
        let device = |index: usize| {
            serde_json::json!({
                "index": index, "uuid": format!("{index}"), "name": format!("/dev/vd{index}"),
                "size_bytes": 0, "state": "in service", "reason": null, "reads": 0, "writes": 0,
                "read_errors": 0, "write_errors": 0, "checksum_errors": 0, "healed": 0,
                "read_latency": {"sum_ns": 0, "buckets": []},
                "write_latency": {"sum_ns": 0, "buckets": []},
            })
        };
        let stats = serde_json::json!({
            "unix_ms": uptime_s * 1000, "uptime_ms": uptime_s * 1000, "volumes": [],
            "front_ends": [], "devices": [device(0), device(1), device(2)],
            "pod": {
                "uuid": "p", "epoch": 1, "data_strips": 1, "parity_strips": 1, "health": "healthy",
                "can_lose": 1, "device_count": 3, "devices_in_service": 3, "capacity_bytes": 100,
                "used_bytes": 50, "logical_bytes": 0, "physical_bytes": 0, "journal_bytes": 100,
                "journal_used_bytes": 25, "buffered_bytes": 0, "cache_bytes": 0, "cache_hits": 0,
                "cache_misses": 0, "checkpoints": 0,
            },
        });
        serde_json::from_value(stats).expect("stats")
    }

    fn stats(uptime_s: u64, writes: u64) -> Stats {
        let mut stats = idle(uptime_s);
        let operation = |front_end, count: u64| OperationStats {
            front_end,
            operation: Operation::Write,
            errors: 0,
            bytes: count * 4096,
            latency: latency(100, count),
            stages: vec![
                StageStats { stage: Stage::Compress, latency: latency(10, count) },
                StageStats { stage: Stage::Journal, latency: latency(90, count) },
            ],
        };
        stats.volumes = vec![VolumeStats {
            id: 1,
            name: "db".to_owned(),
            size_bytes: 1 << 30,
            allocated_bytes: 0,
            operations: vec![
                operation(FrontEnd::Nbd, writes),
                operation(FrontEnd::NvmeTcp, writes),
            ],
        }];
        for device in &mut stats.devices {
            device.write_latency = latency(50, 3 * writes);
        }
        if let Some(device) = stats.devices.last_mut() {
            device.write_latency = latency(5000, 3 * writes);
        }
        stats
    }

    #[test]
    fn the_stage_that_costs_most_is_named_with_the_device_to_blame() {
        let explained = explain("db", &stats(100, 10), &stats(160, 40)).expect("a volume");
        assert!((explained.seconds - 60.0).abs() < 0.001);
        let writes = &explained.operations[0];
        assert_eq!((writes.operation, writes.requests), (Operation::Write, 60));
        assert_eq!(writes.costs_most, Some(Stage::Journal));
        assert!((writes.stages[1].share - 90.0).abs() < 0.1, "{writes:?}");
        let slow = stats(0, 0).devices.last().expect("devices").device.name.clone();
        assert!(writes.why.contains(&format!("on {slow} 5.")), "{}", writes.why);
        let text = explained.text(60);
        assert!(
            text.starts_with("db, the last 60 s\n\nwrite: 60 requests (1/s), 240 KiB\n"),
            "{text}"
        );
        assert!(text.contains("\n  journal   90.0 %  90.0 us"), "{text}");
        assert!(text.contains("journal costs most: writes wait until enough devices"), "{text}");
        assert!(!text.contains("nothing older"), "{text}");
        assert!(explained.text(300).contains("nothing older"), "asked for more than there is");
    }

    #[test]
    fn a_restart_and_a_new_volume_of_the_name_count_from_nothing() {
        let explained = explain("db", &stats(1000, 50), &stats(20, 4)).expect("a volume");
        assert_eq!(explained.operations[0].requests, 8);
        assert!((explained.seconds - 20.0).abs() < 0.001);
        let mut other = stats(100, 1);
        other.volumes[0].id = 2;
        let explained = explain("db", &stats(90, 50), &other).expect("a volume");
        assert_eq!(explained.operations[0].requests, 2);
        assert_eq!(explain("nope", &stats(1, 1), &stats(2, 1)), None);
        let idle = explain("db", &stats(1, 1), &stats(2, 1)).expect("a volume");
        assert_eq!(idle.text(1), "db, the last 1 s\nno requests\n");
    }

    #[test]
    fn every_stage_has_a_reason() {
        let evidence = Evidence::between(&stats(1, 1), &stats(2, 2));
        for stage in Stage::ALL {
            assert!(evidence.why(*stage).len() > 30, "{stage}");
        }
    }
}
