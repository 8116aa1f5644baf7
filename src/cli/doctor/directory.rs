//! The node's directory and the file systems that hold it and its device files.

use std::collections::BTreeMap;

use super::facts::DeviceFacts;
use super::facts::Facts;
use super::facts::Kind;
use super::facts::Mount;
use super::finding::Finding;
use crate::cli::shell_word;
use crate::node::config::DEVICE_BYTES_MIN;
use crate::units::bytes_u64;
use crate::units::format_size;

pub(super) fn data_dir(facts: &Facts) -> Vec<Finding> {
    if facts.config().is_none() {
        return Vec::new();
    }
    let directory = &facts.asked.directory;
    let path = shell_word(&directory.path);
    let finding = match (directory.exists, directory.writable) {
        (true, true) if directory.pod => Finding::ok("has a pod"),
        (true, true) => Finding::ok("has no pod yet: the first start makes one"),
        (false, true) => Finding::ok("will be made at the first start"),
        (true, false) => {
            Finding::error("this user may not write to it", format!("chown -R \"$USER\" {path}"))
        }
        (false, false) => Finding::error(
            "is not there, and this user may not make it",
            format!("install -d -m 700 -o \"$USER\" {path}"),
        ),
    };
    vec![finding.on(directory.path.display().to_string())]
}

/// Each file system in which a file of the node lies.
pub(super) fn file_system(facts: &Facts) -> Vec<Finding> {
    if facts.config().is_none() {
        return Vec::new();
    }
    let files = files(facts).map(|device| &device.path);
    let mut mounts: Vec<Mount> = Vec::new();
    for path in std::iter::once(&facts.asked.directory.path).chain(files) {
        let mount = facts.mount_of(path);
        mounts.extend(mount.filter(|mount| !mounts.contains(mount)));
    }
    if mounts.is_empty() {
        return vec![Finding::skip("/proc/self/mountinfo cannot be read")];
    }
    let subject = |mount: &Mount| mount.point.display().to_string();
    mounts.iter().map(|mount| mounted(mount).on(subject(mount))).collect()
}

/// Devices that are files, or would become some. What is missing below /dev is no file's place.
fn files(facts: &Facts) -> impl Iterator<Item = &DeviceFacts> {
    facts.asked.devices.iter().filter(|device| match device.kind {
        Kind::File { .. } => true,
        Kind::Missing => !device.path.starts_with("/dev"),
        Kind::Block | Kind::Other(_) => false,
    })
}

fn mounted(mount: &Mount) -> Finding {
    let point = shell_word(&mount.point);
    let kind = mount.kind.as_str();
    if mount.has("ro") {
        let fix = format!("mount -o remount,rw {point}");
        return Finding::error(format!("{kind}, read-only"), fix);
    }
    if let Some(option) = ["nobarrier", "barrier=0"].into_iter().find(|option| mount.has(option)) {
        return Finding::error(
            format!(
                "{kind} with {option}: flushes do not reach the disk, and what is acknowledged \
                     can be lost with the power"
            ),
            format!("mount -o remount,barrier=1 {point}, and in /etc/fstab"),
        );
    }
    let elsewhere = "--data DIR on ext4 or XFS";
    match kind {
        "tmpfs" | "ramfs" => {
            Finding::warn(format!("{kind}: everything is gone when the machine stops"), elsewhere)
        }
        "overlay" | "aufs" => {
            let found = format!("{kind}: a container's own layer, gone with the container");
            Finding::warn(found, "docker run -v /srv/weft:/srv/weft, and --data /srv/weft")
        }
        "nfs" | "nfs4" | "cifs" | "smb3" | "9p" | "ceph" | "glusterfs" => Finding::warn(
            format!("{kind}: the network's file system, whose locks and flushes may not hold"),
            elsewhere,
        ),
        "vfat" | "exfat" | "msdos" | "fuseblk" => {
            Finding::error(format!("{kind} has no sparse files or no locks"), elsewhere)
        }
        "btrfs" if !mount.has("nodatacow") => Finding::warn(
            "btrfs copies on each write: device files fall to pieces and grow slow",
            "mkdir -p DIR/devices && chattr +C DIR/devices, before the first start",
        ),
        _ => Finding::ok(kind),
    }
}

/// Device files are sparse: what is promised to the pod must still find room when it is written.
pub(super) fn space(facts: &Facts) -> Vec<Finding> {
    let Some(config) = facts.config() else { return Vec::new() };
    // By file system: one of its files, how many there are, what they may still take, what is free.
    let mut systems: BTreeMap<_, (&DeviceFacts, u64, u64, u64)> = BTreeMap::new();
    for device in files(facts) {
        let Some(free) = device.free_bytes else { continue };
        let wanted = match device.kind {
            Kind::File { length, allocated } => length.saturating_sub(allocated),
            Kind::Missing => config.pod.device_bytes.unwrap_or(DEVICE_BYTES_MIN),
            Kind::Block | Kind::Other(_) => 0,
        };
        let entry = systems.entry(device.disk).or_insert((device, 0, 0, free));
        entry.1 += 1;
        entry.2 += wanted;
    }
    if systems.is_empty() {
        return vec![Finding::ok("no device is a file")];
    }
    let judge = |(device, count, wanted, free): (&DeviceFacts, u64, u64, u64)| {
        let found = room(facts, config.pod.device_bytes, count, wanted, free);
        match facts.mount_of(&device.path) {
            Some(mount) => found.on(mount.point.display().to_string()),
            None => found,
        }
    };
    systems.into_values().map(judge).collect()
}

fn room(facts: &Facts, device_bytes: Option<u64>, count: u64, wanted: u64, free: u64) -> Finding {
    let fresh = files(facts).any(|device| device.kind == Kind::Missing);
    let (size, has) = (format_size(wanted), format_size(free));
    let files = if count == 1 { "device file" } else { "device files" };
    let found = format!("{count} {files} may still take {size}, and {has} is free");
    if free >= wanted {
        return match (fresh, device_bytes) {
            // How long they will be is then half of what is free, or less.
            (true, None) => Finding::ok(format!("{has} is free for {count} {files}")),
            _ => Finding::ok(found),
        };
    }
    if !fresh {
        let directory = shell_word(&facts.asked.directory.path);
        return Finding::warn(
            format!("{found}: writes will fail before the pod is full"),
            format!("du -xh --max-depth=2 {directory}/.., and make room"),
        );
    }
    let fits = ((free / 2 / count.max(1)) >> 20).max(1);
    if fits << 20 < DEVICE_BYTES_MIN {
        let least = format_size(DEVICE_BYTES_MIN * bytes_u64(facts.asked.devices.len()));
        return Finding::error(
            format!("{found}; the least is {least}"),
            "--data DIR with more room",
        );
    }
    Finding::warn(
        format!("{found}: writes will fail before the pod is full"),
        format!("[pod] device_size = \"{fits}MiB\""),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::DirectoryFacts;
    use crate::cli::doctor::facts::Opened;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::facts::fake::configured;
    use crate::cli::doctor::facts::fake::device;
    use crate::cli::doctor::finding::Verdict;

    fn directory(exists: bool, writable: bool) -> Asked {
        let path = "/srv/weft".into();
        let directory = DirectoryFacts { path, exists, writable, ..DirectoryFacts::default() };
        Asked { directory, ..configured("") }
    }

    #[test]
    fn the_directory_must_be_writable_or_one_that_can_be_made() {
        let verdict =
            |exists, writable| System::new(&[]).verdict(data_dir, directory(exists, writable));
        assert_eq!(verdict(true, true), Verdict::Ok);
        assert_eq!(verdict(false, true), Verdict::Ok);
        assert_eq!(verdict(true, false), Verdict::Error);
        assert_eq!(verdict(false, false), Verdict::Error);
    }

    #[test]
    fn file_systems_that_forget_or_lie_are_told_apart_from_good_ones() {
        let verdict = |rest: &str| {
            let line = format!("30 1 8:1 / /srv {rest}\n");
            let system = System::new(&[("/proc/self/mountinfo", &line)]);
            system.verdict(file_system, directory(true, true))
        };
        assert_eq!(verdict("rw,noatime - ext4 /dev/sda1 rw"), Verdict::Ok);
        assert_eq!(verdict("rw - xfs /dev/sda1 rw"), Verdict::Ok);
        assert_eq!(verdict("rw - ext4 /dev/sda1 rw,nobarrier"), Verdict::Error);
        assert_eq!(verdict("ro - ext4 /dev/sda1 rw"), Verdict::Error);
        assert_eq!(verdict("rw - tmpfs tmpfs rw"), Verdict::Warn);
        assert_eq!(verdict("rw - overlay overlay rw"), Verdict::Warn);
        assert_eq!(verdict("rw - nfs4 server:/a rw"), Verdict::Warn);
        assert_eq!(verdict("rw - btrfs /dev/sda1 rw"), Verdict::Warn);
        assert_eq!(verdict("rw - vfat /dev/sda1 rw"), Verdict::Error);
    }

    #[test]
    fn sparse_files_must_find_room_when_they_fill() {
        let verdict = |free, kind: Kind, text| {
            let opened = Opened::No;
            let file = DeviceFacts { free_bytes: Some(free), kind, opened, ..device("/srv/d0") };
            let asked = Asked { devices: vec![file; 6], ..configured(text) };
            System::new(&[]).verdict(space, asked)
        };
        let used = || Kind::File { length: 4 << 30, allocated: 1 << 30 };
        assert_eq!(verdict(18 << 30, used(), ""), Verdict::Ok);
        assert_eq!(verdict(17 << 30, used(), ""), Verdict::Warn);
        assert_eq!(verdict(17 << 30, Kind::Missing, ""), Verdict::Ok);
        assert_eq!(verdict(1 << 30, Kind::Missing, ""), Verdict::Error);
        let size = "pod.device_size = \"4GiB\"";
        assert_eq!(verdict(17 << 30, Kind::Missing, size), Verdict::Warn);
        assert_eq!(verdict(25 << 30, Kind::Missing, size), Verdict::Ok);
        assert_eq!(verdict(0, Kind::Block, ""), Verdict::Ok);
    }
}
