//! Intervals as comma-separated values (RFC 4180, with `\n` between lines).

use weft_api::Operation;

use crate::model::activity::Activity;
use crate::model::interval::Interval;

/// The first line. Latencies are in nanoseconds and empty where nothing was answered; rates are in
/// requests, errors or bytes a second. `scope` is `pod` or `volume`, and the pod's `name` its UUID.
pub const HEADER: &str = "unix_ms,interval_ms,scope,name,read_iops,write_iops,flush_iops,zero_iops,\
    read_bytes_per_s,write_bytes_per_s,read_p50_ns,read_p99_ns,read_p999_ns,write_p50_ns,\
    write_p99_ns,write_p999_ns,flush_p50_ns,flush_p99_ns,flush_p999_ns,errors_per_s";

/// The rows of an interval: the pod's, then one for each volume.
pub(super) fn interval(interval: &Interval) -> String {
    let mut text = row(interval, "pod", &interval.pod.uuid, &interval.total);
    for volume in &interval.volumes {
        text.push_str(&row(interval, "volume", &volume.name, &volume.activity));
    }
    text
}

fn row(interval: &Interval, scope: &str, name: &str, activity: &Activity) -> String {
    let rate = |count| format!("{:.1}", interval.per_second(count));
    let mut cells = vec![
        interval.unix_ms.to_string(),
        interval.span_ms.to_string(),
        scope.to_owned(),
        quoted(name),
    ];
    for operation in [Operation::Read, Operation::Write, Operation::Flush, Operation::Zero] {
        cells.push(rate(activity.requests(operation)));
    }
    for operation in [Operation::Read, Operation::Write] {
        cells.push(rate(activity.bytes(operation)));
    }
    for operation in [Operation::Read, Operation::Write, Operation::Flush] {
        for share in [0.5, 0.99, 0.999] {
            let quantile = activity.quantile_ns(operation, share);
            cells.push(quantile.map_or(String::new(), |ns| ns.to_string()));
        }
    }
    cells.push(rate(activity.errors()));
    format!("{}\n", cells.join(","))
}

/// A name as one cell. Ours need no quotes, but a later node may allow other ones.
fn quoted(name: &str) -> String {
    if name.contains([',', '"', '\n', '\r']) {
        return format!("\"{}\"", name.replace('"', "\"\""));
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_cell() {
        assert_eq!(quoted("db-0"), "db-0");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
