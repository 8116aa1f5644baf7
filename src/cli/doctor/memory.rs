//! Whether the caches, and what hosts may have in flight, fit into this machine's memory.

use std::path::Path;

use super::facts::Facts;
use super::finding::Finding;
use crate::units::format_size;

/// What a node takes besides: write buffers, connections, tables. Arbitrary, more than
/// small pods use.
const OTHER_BYTES: u64 = 256 << 20;

/// The caches are filled in the course of time, so a budget that is too large ends in the kernel's
/// killing the node on some later day.
pub(super) fn memory(facts: &Facts) -> Vec<Finding> {
    let Some(config) = facts.config() else { return Vec::new() };
    let kib = |name| meminfo(facts, name).map(|kib| kib << 10);
    let (Some(total), Some(available)) = (kib("MemTotal"), kib("MemAvailable")) else {
        return vec![Finding::skip("/proc/meminfo cannot be read")];
    };
    let caches = config.cache_bytes.saturating_add(config.map_cache_bytes);
    let needed = caches.saturating_add(config.in_flight_bytes).saturating_add(OTHER_BYTES);
    let group = group_limit(facts).filter(|limit| *limit < total);
    let most = group.unwrap_or(total);
    let takes = format!("a node takes up to {}", format_size(needed));
    let smaller = format!("[memory] cache = \"{}MiB\"", ((most / 2) >> 20).max(1));
    let finding = if needed > most {
        let of = if group.is_some() { "its control group may use" } else { "the machine has" };
        Finding::error(format!("{takes}, and {of} {}", format_size(most)), smaller)
    } else if facts.asked.node.is_none() && needed > available {
        // A node that runs has its caches already, and they are not available any more.
        let huge = huge_pages(facts);
        let found = format!("{takes}, and {} is available", format_size(available));
        match huge {
            0 => Finding::warn(
                found,
                format!("[memory] cache = \"{}MiB\"", cut(config.cache_bytes, needed - available)),
            ),
            huge => Finding::warn(
                format!(
                    "{found}; {} lies in huge pages, which a node does not use",
                    format_size(huge)
                ),
                "sysctl -w vm.nr_hugepages=0",
            ),
        }
    } else {
        Finding::ok(format!("{takes} of {}", format_size(most)))
    };
    vec![finding]
}

/// The cache in MiB, less what is missing.
fn cut(cache_bytes: u64, missing: u64) -> u64 {
    (cache_bytes.saturating_sub(missing) >> 20).max(1)
}

/// A value of /proc/meminfo.
fn meminfo(facts: &Facts, name: &str) -> Option<u64> {
    let text = facts.text("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Bytes in free huge pages.
fn huge_pages(facts: &Facts) -> u64 {
    let value = |name| meminfo(facts, name).unwrap_or(0);
    value("HugePages_Free") * (value("Hugepagesize") << 10)
}

/// The least limit of memory of the control groups this process is in, of either version.
fn group_limit(facts: &Facts) -> Option<u64> {
    let groups = facts.text("/proc/self/cgroup")?;
    let limits = groups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let (kind, file) = match controllers {
            "" => ("cgroup2", "memory.max"),
            names if names.split(',').any(|name| name == "memory") => {
                ("cgroup", "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let mounts = facts.mounts();
        let mount = mounts
            .iter()
            .find(|mount| mount.kind == kind && (kind == "cgroup2" || mount.has("memory")))?;
        let path = Path::new(path.trim_start_matches('/'));
        let limit = |group: &Path| facts.number(mount.point.join(group).join(file));
        path.ancestors().filter_map(limit).min()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::facts::fake::configured;
    use crate::cli::doctor::finding::Verdict;

    const MEMINFO: &str = "/proc/meminfo";

    fn text(total_mib: u64, available_mib: u64, huge: u64) -> String {
        format!(
            "MemTotal:       {} kB\nMemFree: 1 kB\nMemAvailable:   {} kB\n\
             HugePages_Free:    {huge}\nHugepagesize:       2048 kB\n",
            total_mib << 10,
            available_mib << 10
        )
    }

    #[test]
    fn caches_must_fit_into_the_machine_and_should_into_what_is_available() {
        let verdict = |total, available| {
            let system = System::new(&[(MEMINFO, &text(total, available, 0))]);
            system.verdict(memory, configured(""))
        };
        assert_eq!(verdict(16 << 10, 12 << 10), Verdict::Ok);
        assert_eq!(verdict(16 << 10, 1 << 10), Verdict::Warn);
        assert_eq!(verdict(1 << 10, 900), Verdict::Error);
        assert_eq!(System::new(&[]).verdict(memory, configured("")), Verdict::Skip);
    }

    #[test]
    fn reserved_huge_pages_are_blamed() {
        let system = System::new(&[(MEMINFO, &text(16 << 10, 1 << 10, 4096))]);
        let found = system.says(memory, configured("")).remove(0);
        assert!(found.found.contains("8 GiB lies in huge pages"), "{found:?}");
        assert_eq!(found.fix.as_deref(), Some("sysctl -w vm.nr_hugepages=0"));
    }

    #[test]
    fn the_least_limit_of_a_control_group_of_either_version_counts() {
        let mounts = "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                      31 1 0:27 / /sys/fs/memory rw - cgroup cgroup rw,memory\n";
        let verdict = |group: &str, file: &str, limit: &str| {
            let system = System::new(&[
                (MEMINFO, &text(16 << 10, 12 << 10, 0)),
                ("/proc/self/cgroup", group),
                ("/proc/self/mountinfo", mounts),
                (file, limit),
            ]);
            system.verdict(memory, configured(""))
        };
        let (group, file) = ("0::/a/b\n", "/sys/fs/cgroup/a/memory.max");
        assert_eq!(verdict(group, file, "max\n"), Verdict::Ok);
        assert_eq!(verdict(group, file, "1073741824\n"), Verdict::Error);
        assert_eq!(verdict(group, file, "8589934592\n"), Verdict::Ok);
        let (group, file) = ("4:memory:/a\n0::/\n", "/sys/fs/memory/a/memory.limit_in_bytes");
        assert_eq!(verdict(group, file, "1073741824\n"), Verdict::Error);
    }
}
