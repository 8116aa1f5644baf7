//! A host's side: the volumes that are attached now, and whether they come back after a restart.

use std::path::Path;

use super::facts::Facts;
use super::finding::Finding;

/// Kilobytes in a request below which large reads and writes are cut into too many. The kernel's
/// own default for disks is 1280; half a megabyte already fills a stripe.
const REQUEST_KIB_MIN: u64 = 512;

/// Block devices that are volumes, or could be: those of NBD that are attached, and the paths of
/// NVMe over TCP.
fn attached(facts: &Facts) -> Vec<String> {
    let volume = |name: &String| {
        let file = |path: &str| Path::new("/sys/block").join(name).join(path);
        match name.starts_with("nbd") {
            true => facts.exists(file("pid")),
            false => facts.text(file("device/transport")).as_deref() == Some("tcp"),
        }
    };
    let mut names = facts.names("/sys/block");
    names.retain(volume);
    names
}

/// Queue settings of attached volumes: the node has a scheduler and merges by itself.
pub(super) fn queues(facts: &Facts) -> Vec<Finding> {
    let names = attached(facts);
    if names.is_empty() {
        return vec![Finding::skip("no volume is attached")];
    }
    names.iter().map(|name| queue(facts, name).on(name)).collect()
}

fn queue(facts: &Facts, name: &str) -> Finding {
    let place = format!("/sys/block/{name}/queue");
    let scheduler = facts.text(format!("{place}/scheduler")).unwrap_or_default();
    let scheduler = scheduler.split(['[', ']']).nth(1).unwrap_or("none");
    let number = |file: &str| facts.number(format!("{place}/{file}"));
    let (kib, kib_max) = (number("max_sectors_kb"), number("max_hw_sectors_kb"));
    if scheduler != "none" {
        return Finding::warn(
            format!("scheduler {scheduler}: costs time, and gains nothing before a network"),
            format!("echo none >{place}/scheduler"),
        );
    }
    match (kib, kib_max) {
        (Some(kib), Some(most)) if kib < REQUEST_KIB_MIN.min(most) => Finding::warn(
            format!("max_sectors_kb {kib}: large requests are cut into pieces"),
            format!("echo {} >{place}/max_sectors_kb", most.min(1280)),
        ),
        _ => Finding::ok(format!("scheduler none, max_sectors_kb {}", kib.unwrap_or(0))),
    }
}

/// Files that say what to attach at each start, and the unit that does it.
const LISTS: &[(&str, &str)] = &[
    ("/etc/nvme/discovery.conf", "nvmf-autoconnect.service"),
    ("/etc/nvme/config.json", "nvmf-autoconnect.service"),
    ("/etc/nbdtab", "nbd@"),
];

/// What is listed to be attached at each start needs a unit that does it.
pub(super) fn reconnect(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    for (file, unit) in LISTS {
        let text = facts.text(file).unwrap_or_default();
        let entries: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .collect();
        if entries.is_empty() || text == "[]" {
            continue;
        }
        let finding = if enabled(facts, unit) {
            Finding::ok("attached at each start")
        } else if *unit == "nbd@" {
            let device = entries[0].split_whitespace().next().unwrap_or("nbd0");
            Finding::warn("not attached at a start", format!("systemctl enable nbd@{device}"))
        } else {
            Finding::warn("not attached at a start", format!("systemctl enable {unit}"))
        };
        found.push(finding.on(*file));
    }
    if found.is_empty() {
        found.push(Finding::skip("nothing is listed to be attached at a start"));
    }
    found
}

/// Whether systemd starts the unit, or one of that template.
fn enabled(facts: &Facts, unit: &str) -> bool {
    const PLACE: &str = "/etc/systemd/system";
    let wanted = |directory: &String| {
        let named = |name: &String| name == unit || (unit.ends_with('@') && name.starts_with(unit));
        facts.names(Path::new(PLACE).join(directory)).iter().any(named)
    };
    let wants = |name: &String| name.ends_with(".wants") || name.ends_with(".requires");
    facts.names(PLACE).iter().filter(|name| wants(name)).any(wanted)
}

/// How long the kernel tries to reach a lost node before it fails everything that waits.
pub(super) fn loss_timeout(facts: &Facts) -> Vec<Finding> {
    /// Seconds for which a machine may be down to be restarted.
    const SHORT: u64 = 120;
    const PLACE: &str = "/sys/class/nvme";
    let over_tcp = |name: &String| {
        let transport = facts.text(Path::new(PLACE).join(name).join("transport"));
        transport.as_deref() == Some("tcp")
    };
    let mut names = facts.names(PLACE);
    names.retain(over_tcp);
    if names.is_empty() {
        return vec![Finding::skip("no controller is connected over TCP")];
    }
    let judge = |name: &String| {
        let file = format!("{PLACE}/{name}/ctrl_loss_tmo");
        let text = facts.text(&file).unwrap_or_default();
        let finding = match text.parse::<u64>() {
            Ok(seconds) if seconds < SHORT => Finding::warn(
                format!("I/O fails when the node is away for {seconds} s"),
                format!("echo 600 >{file}, and nvme connect --ctrl-loss-tmo=600"),
            ),
            Ok(seconds) => Finding::ok(format!("waits {seconds} s for a node that is away")),
            Err(_) => Finding::ok("waits for ever for a node that is away"),
        };
        finding.on(name)
    };
    names.iter().map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::finding::Verdict;

    #[test]
    fn attached_volumes_need_no_scheduler_and_large_requests() {
        let verdict = |scheduler, kib, who: (&str, &str)| {
            let system = System::new(&[
                who,
                ("/sys/block/nbd0/queue/scheduler", scheduler),
                ("/sys/block/nbd0/queue/max_sectors_kb", kib),
                ("/sys/block/nbd0/queue/max_hw_sectors_kb", "32767\n"),
            ]);
            system.verdict(queues, Asked::default())
        };
        let pid = ("/sys/block/nbd0/pid", "7\n");
        assert_eq!(verdict("[none] bfq\n", "1280\n", pid), Verdict::Ok);
        assert_eq!(verdict("none [mq-deadline]\n", "1280\n", pid), Verdict::Warn);
        assert_eq!(verdict("[none] bfq\n", "128\n", pid), Verdict::Warn);
        assert_eq!(verdict("none [bfq]\n", "128\n", ("/sys/block/sda/size", "1")), Verdict::Skip);
        let path = System::new(&[
            ("/sys/block/nvme0c0n1/device/transport", "tcp\n"),
            ("/sys/block/nvme1n1/device/transport", "pcie\n"),
            ("/sys/block/nvme0c0n1/queue/scheduler", "none [bfq]\n"),
        ]);
        assert_eq!(path.says(queues, Asked::default())[0].on, ["nvme0c0n1"]);
    }

    #[test]
    fn what_is_listed_needs_a_unit_that_attaches_it() {
        let verdict = |files: &[_]| System::new(files).verdict(reconnect, Asked::default());
        let list = ("/etc/nvme/discovery.conf", "# comment\n-t tcp -a 10.0.0.1\n");
        let unit = "/etc/systemd/system/default.target.wants/nvmf-autoconnect.service";
        assert_eq!(verdict(&[list]), Verdict::Warn);
        assert_eq!(verdict(&[list, (unit, "")]), Verdict::Ok);
        assert_eq!(verdict(&[("/etc/nvme/discovery.conf", "# comment\n")]), Verdict::Skip);
        let table = ("/etc/nbdtab", "nbd3 10.0.0.1 vol0 persist\n");
        let found = System::new(&[table]).says(reconnect, Asked::default()).remove(0);
        assert_eq!(found.fix.as_deref(), Some("systemctl enable nbd@nbd3"));
        let unit = "/etc/systemd/system/multi-user.target.wants/nbd@nbd3.service";
        assert_eq!(verdict(&[table, (unit, "")]), Verdict::Ok);
    }

    #[test]
    fn a_short_wait_for_a_lost_node_is_warned_of() {
        let verdict = |seconds| {
            let system = System::new(&[
                ("/sys/class/nvme/nvme0/transport", "tcp\n"),
                ("/sys/class/nvme/nvme0/ctrl_loss_tmo", seconds),
                ("/sys/class/nvme/nvme1/transport", "pcie\n"),
            ]);
            system.verdict(loss_timeout, Asked::default())
        };
        assert_eq!(verdict("600\n"), Verdict::Ok);
        assert_eq!(verdict("off\n"), Verdict::Ok);
        assert_eq!(verdict("10\n"), Verdict::Warn);
        assert_eq!(System::new(&[]).verdict(loss_timeout, Asked::default()), Verdict::Skip);
    }
}
