//! The disks below the devices: write cache, scheduler, and whether they fail one by one.
//!
//! A device is a disk, a partition or a file; between file system and disk there may be LVM, RAID
//! or encryption. The checks go down to what has nothing below it, and speak of each disk once.

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;

use super::facts::DeviceFacts;
use super::facts::Facts;
use super::finding::Finding;

/// A disk that has no other below it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Disk {
    /// As in `/sys/block`.
    name: String,
    /// Its directory in `/sys`, links followed.
    path: PathBuf,
}

impl Disk {
    /// A file of its request queue.
    fn queue(&self, facts: &Facts, file: &str) -> Option<String> {
        facts.text(self.path.join("queue").join(file))
    }

    /// Whether it is software: a hypervisor's, whose own properties do not show, or memory.
    fn is_virtual(&self, facts: &Facts) -> bool {
        let known = ["vd", "xvd", "nbd", "loop", "zram", "ram"];
        let vendor = facts.text(self.path.join("device/vendor")).unwrap_or_default();
        known.iter().any(|prefix| self.name.starts_with(prefix))
            || ["QEMU", "VMware", "Msft", "Google"].contains(&vendor.as_str())
    }
}

/// Each disk with the number of devices on it. Devices on no disk, as in memory, are left out.
fn disks(facts: &Facts) -> BTreeMap<Disk, usize> {
    let mut disks = BTreeMap::new();
    for device in &facts.asked.devices {
        for disk in disks_of(facts, device) {
            *disks.entry(disk).or_default() += 1;
        }
    }
    disks
}

fn disks_of(facts: &Facts, device: &DeviceFacts) -> Vec<Disk> {
    let (major, minor) = device.disk;
    let by_number = facts.canonical(format!("/sys/dev/block/{major}:{minor}"));
    // File systems that span disks have a number of their own; their mount names one of the disks.
    let by_mount = || {
        let source = facts.mount_of(&device.path)?.source;
        let name = facts.canonical(source)?;
        facts.canonical(Path::new("/sys/class/block").join(name.file_name()?))
    };
    let mut found = Vec::new();
    if let Some(path) = by_number.or_else(by_mount) {
        descend(facts, &path, &mut found);
    }
    found
}

/// Adds the disks below `path`, or itself.
fn descend(facts: &Facts, path: &Path, found: &mut Vec<Disk>) {
    let path = match path.parent() {
        Some(disk) if facts.exists(path.join("partition")) => disk,
        _ => path,
    };
    let below = facts.names(path.join("slaves"));
    for name in &below {
        if let Some(path) = facts.canonical(path.join("slaves").join(name)) {
            descend(facts, &path, found);
        }
    }
    let Some(name) = path.file_name().filter(|_| below.is_empty()) else { return };
    let disk = Disk { name: name.to_string_lossy().into_owned(), path: path.to_owned() };
    if !found.contains(&disk) {
        found.push(disk);
    }
}

/// Runs `check` on each disk.
fn each(facts: &Facts, check: fn(&Facts, &Disk) -> Finding) -> Vec<Finding> {
    let disks = disks(facts);
    if disks.is_empty() && !facts.asked.devices.is_empty() {
        return vec![Finding::skip("the devices lie on no disk that /sys/block names")];
    }
    disks.keys().map(|disk| check(facts, disk).on(&disk.name)).collect()
}

/// What a durable write costs, and whether it is one.
pub(super) fn write_cache(facts: &Facts) -> Vec<Finding> {
    each(facts, |facts, disk| {
        let Some(cache) = disk.queue(facts, "write_cache") else {
            return Finding::skip("the kernel does not say whether it has a write cache");
        };
        let fua = disk.queue(facts, "fua").as_deref() == Some("1");
        let back = cache == "write back";
        if !back && volatile_by_itself(facts, disk) {
            return Finding::error(
                "has a volatile write cache, and the kernel was told to ignore it: what is \
                 acknowledged can be lost with the power",
                format!("echo write back >/sys/block/{}/queue/write_cache", disk.name),
            );
        }
        match (back, fua) {
            (false, _) => Finding::ok("no volatile write cache"),
            (true, true) => Finding::ok("volatile write cache, FUA"),
            (true, false) if disk.is_virtual(facts) => Finding::ok(
                "volatile write cache of a virtual disk: what is below must heed flushes (not \
                 cache=unsafe)",
            ),
            (true, false) => Finding::warn(
                "volatile write cache without FUA: each durable write flushes the whole cache",
                format!(
                    "take a disk with power-loss protection; on SATA boot with libata.fua=1, or \
                     do without the cache: hdparm -W 0 /dev/{}",
                    disk.name
                ),
            ),
        }
    })
}

/// Whether a SCSI or SATA disk itself says that its cache is volatile.
fn volatile_by_itself(facts: &Facts, disk: &Disk) -> bool {
    let directory = disk.path.join("device/scsi_disk");
    facts.names(&directory).iter().any(|name| {
        let kind = facts.text(directory.join(name).join("cache_type")).unwrap_or_default();
        kind.starts_with("write back")
    })
}

pub(super) fn rotational(facts: &Facts) -> Vec<Finding> {
    each(facts, |facts, disk| match disk.queue(facts, "rotational").as_deref() {
        // Hypervisors say it of anything.
        Some(_) if disk.is_virtual(facts) => Finding::ok("a virtual disk"),
        Some("0") => Finding::ok("does not turn"),
        Some(_) => Finding::warn(
            "turns: every durable write waits for it, 4 to 10 ms",
            "name SSDs in [pod] devices",
        ),
        None => Finding::skip("the kernel does not say whether it turns"),
    })
}

/// A node asks for what it needs in the order it needs it; fairness between processes costs.
pub(super) fn scheduler(facts: &Facts) -> Vec<Finding> {
    each(facts, |facts, disk| {
        let Some(line) = disk.queue(facts, "scheduler") else {
            return Finding::skip("the kernel does not say which scheduler it has");
        };
        let turns = disk.queue(facts, "rotational").as_deref() == Some("1");
        match line.split(['[', ']']).nth(1).unwrap_or(&line) {
            slow @ ("bfq" | "cfq") => {
                let good = if turns && !disk.is_virtual(facts) { "mq-deadline" } else { "none" };
                Finding::warn(
                    format!("{slow}, which costs time on every request"),
                    format!("echo {good} >/sys/block/{}/queue/scheduler", disk.name),
                )
            }
            name => Finding::ok(name),
        }
    })
}

/// A pod survives the loss of as many devices as it has parity strips: those of one disk are lost
/// together.
pub(super) fn shared_disks(facts: &Facts) -> Vec<Finding> {
    let Some(config) = facts.config() else { return Vec::new() };
    let recorded = facts.asked.directory.parity_strips;
    let parity = recorded.unwrap_or(config.pod.parity_strips);
    let disks = disks(facts);
    if disks.is_empty() {
        return vec![Finding::skip("the devices lie on no disk that /sys/block names")];
    }
    let fragile: Vec<_> = disks.iter().filter(|(_, count)| **count > parity).collect();
    if fragile.is_empty() {
        return vec![Finding::ok(format!("no disk has more than {parity} of the devices"))];
    }
    let warn = |(disk, count): (&Disk, &usize)| {
        Finding::warn(
            format!("has {count} of the devices, and the pod survives the loss of {parity}"),
            "one disk for each: [pod] devices = [\"/dev/disk/by-id/...\", ...]",
        )
        .on(&disk.name)
    };
    fragile.into_iter().map(warn).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::facts::fake::configured;
    use crate::cli::doctor::facts::fake::device;
    use crate::cli::doctor::finding::Verdict;

    /// A disk sda with these files, and its partition sda1 with a file system 8:1.
    fn system(files: &[(&str, &str)]) -> System {
        let path = |name: &str| format!("/sys/devices/pci0/sda/{name}");
        let mut all = vec![(path("sda1/partition"), "1")];
        all.extend(files.iter().map(|(name, content)| (path(name), *content)));
        let all: Vec<(&str, &str)> =
            all.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        System::new(&all).link("/sys/dev/block/8:1", "../../devices/pci0/sda/sda1")
    }

    fn asked(count: usize) -> Asked {
        let file = DeviceFacts { disk: (8, 1), ..device("/srv/d0") };
        Asked { devices: vec![file; count], ..configured("") }
    }

    fn verdict(check: fn(&Facts) -> Vec<Finding>, files: &[(&str, &str)]) -> Verdict {
        system(files).verdict(check, asked(6))
    }

    #[test]
    fn a_volatile_cache_without_fua_is_slow_and_an_ignored_one_loses_data() {
        let verdict = |cache, fua, more: &[(&str, &str)]| {
            let files = [("queue/write_cache", cache), ("queue/fua", fua)];
            verdict(write_cache, &[&files, more].concat())
        };
        assert_eq!(verdict("write through\n", "0\n", &[]), Verdict::Ok);
        assert_eq!(verdict("write back\n", "1\n", &[]), Verdict::Ok);
        assert_eq!(verdict("write back\n", "0\n", &[]), Verdict::Warn);
        let virtual_disk = [("device/vendor", "QEMU    \n")];
        assert_eq!(verdict("write back\n", "0\n", &virtual_disk), Verdict::Ok);
        let volatile = [("device/scsi_disk/0:0:0:0/cache_type", "write back\n")];
        assert_eq!(verdict("write through\n", "0\n", &volatile), Verdict::Error);
        let files: [(&str, &str); 0] = [];
        assert_eq!(super::tests::verdict(write_cache, &files), Verdict::Skip);
    }

    #[test]
    fn disks_that_turn_and_fair_schedulers_are_warned_of() {
        assert_eq!(verdict(rotational, &[("queue/rotational", "0\n")]), Verdict::Ok);
        assert_eq!(verdict(rotational, &[("queue/rotational", "1\n")]), Verdict::Warn);
        assert_eq!(verdict(scheduler, &[("queue/scheduler", "[none] bfq\n")]), Verdict::Ok);
        assert_eq!(verdict(scheduler, &[("queue/scheduler", "none [bfq]\n")]), Verdict::Warn);
    }

    #[test]
    fn more_devices_on_a_disk_than_may_be_lost_are_warned_of() {
        let verdict = |count| system(&[]).verdict(shared_disks, asked(count));
        assert_eq!(verdict(2), Verdict::Ok);
        assert_eq!(verdict(3), Verdict::Warn);
        let mut recorded = asked(2);
        recorded.directory.parity_strips = Some(1);
        assert_eq!(system(&[]).verdict(shared_disks, recorded), Verdict::Warn);
        assert_eq!(System::new(&[]).verdict(shared_disks, asked(6)), Verdict::Skip);
    }

    #[test]
    fn the_disk_below_lvm_is_found_also_by_its_mount() {
        let mount = "30 1 0:40 / /srv rw - btrfs /dev/mapper/vg-lv rw\n";
        let system = System::new(&[
            ("/proc/self/mountinfo", mount),
            ("/dev/dm-0", ""),
            ("/sys/devices/pci0/nvme0n1/queue/write_cache", "write back"),
            ("/sys/devices/pci0/nvme0n1/queue/fua", "1"),
            ("/sys/devices/virtual/dm-0/queue/write_cache", "write through"),
        ])
        .link("/dev/mapper/vg-lv", "../dm-0")
        .link("/sys/class/block/dm-0", "../../devices/virtual/dm-0")
        .link("/sys/devices/virtual/dm-0/slaves/nvme0n1", "../../../pci0/nvme0n1");
        let device = DeviceFacts { disk: (0, 40), ..device("/srv/d0") };
        let found = system.says(write_cache, Asked { devices: vec![device], ..Asked::default() });
        assert_eq!(found[0].on, ["nvme0n1"]);
        assert_eq!(found[0].found, "volatile write cache, FUA");
    }
}
