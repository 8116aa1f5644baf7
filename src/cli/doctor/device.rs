//! The pod's devices, each for itself: there, of the right kind, free, large enough.

use super::facts::DeviceFacts;
use super::facts::Facts;
use super::facts::Kind;
use super::facts::Opened;
use super::finding::Finding;
use crate::cli::shell_word;
use crate::node::config::DEVICE_BYTES_MIN;
use crate::units::format_size;

/// Each device is opened as a node opens it, and closed again; nothing is written.
pub(super) fn devices(facts: &Facts) -> Vec<Finding> {
    let check = |device| device_of(facts, device).on(name(facts, device));
    facts.asked.devices.iter().map(check).collect()
}

fn device_of(facts: &Facts, device: &DeviceFacts) -> Finding {
    let path = shell_word(&device.path);
    match &device.kind {
        Kind::Missing => return missing(facts, device),
        Kind::Other(what) => {
            return Finding::error(what.clone(), "name a file or a block device in [pod] devices");
        }
        Kind::File { .. } | Kind::Block => {}
    }
    match &device.opened {
        Opened::No => Finding::skip("not tried"),
        Opened::Busy(reason) => busy(facts, device, reason),
        Opened::Refused(reason) => {
            let fix = match device.kind {
                Kind::Block => "usermod -aG disk \"$USER\", and log in again".to_owned(),
                _ => format!("chown \"$USER\" {path}"),
            };
            Finding::error(reason.clone(), fix)
        }
        Opened::Yes { length, .. } if *length < DEVICE_BYTES_MIN => {
            let (has, least) = (format_size(*length), format_size(DEVICE_BYTES_MIN));
            let found = format!("{has}, and the least is {least}");
            Finding::error(found, "name a larger one in [pod] devices")
        }
        Opened::Yes { length, direct: false } => Finding::warn(
            format!(
                "{}, its file system refuses O_DIRECT: the page cache is used",
                format_size(*length)
            ),
            "move it to ext4, XFS or a block device",
        ),
        Opened::Yes { length, direct: true } => {
            Finding::ok(format!("{}, O_DIRECT works", format_size(*length)))
        }
    }
}

/// A device that is not there is made at the first start, and lost at a later one.
fn missing(facts: &Facts, device: &DeviceFacts) -> Finding {
    let path = shell_word(&device.path);
    if facts.asked.directory.pod {
        return Finding::error(
            "is missing, and the pod has it",
            format!("mount what holds {path}; if it is lost for good: weft --replace-missing"),
        );
    }
    if device.path.starts_with("/dev") {
        let found = "there is no such device; a file in memory would be made instead";
        return Finding::error(found, "lsblk, and name one that is there in [pod] devices");
    }
    Finding::ok("will be made at the first start")
}

/// Says who has the device, which is as it should be if it is the node that runs.
fn busy(facts: &Facts, device: &DeviceFacts, reason: &str) -> Finding {
    if let Some(node) = &facts.asked.node
        && reason.contains(&format!("process {} ", node.pid))
    {
        return Finding::ok(format!("in use by the node that runs, process {}", node.pid));
    }
    let path = shell_word(&device.path);
    match user(facts, device) {
        Some((what, fix)) => Finding::error(what, fix),
        None => Finding::error(reason.to_owned(), format!("fuser -v {path}")),
    }
}

/// What in the kernel uses a block device, and how to make it let go.
fn user(facts: &Facts, device: &DeviceFacts) -> Option<(String, String)> {
    let path = shell_word(&device.path);
    let canonical = facts.canonical(&device.path).unwrap_or_else(|| device.path.clone());
    let is_it = |source: &str| facts.canonical(source).is_some_and(|other| other == canonical);
    if let Some(mount) = facts.mounts().iter().find(|mount| is_it(&mount.source)) {
        let point = shell_word(&mount.point);
        return Some((format!("is mounted on {point}"), format!("umount {point}")));
    }
    let swaps = facts.text("/proc/swaps").unwrap_or_default();
    let mut swaps = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    if swaps.any(is_it) {
        return Some(("is swap space".to_owned(), format!("swapoff {path}")));
    }
    let (major, minor) = device.disk;
    let holders = facts.names(format!("/sys/dev/block/{major}:{minor}/holders"));
    let holder = holders.first()?;
    Some((format!("is part of {holder} (LVM, RAID or encryption)"), format!("lsblk {path}")))
}

/// A device as the operator knows it: those in the node's directory without it.
pub(super) fn name(facts: &Facts, device: &DeviceFacts) -> String {
    let path = device.path.strip_prefix(&facts.asked.directory.path).unwrap_or(&device.path);
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::facts::fake::device;
    use crate::cli::doctor::finding::Verdict;

    fn one(device: DeviceFacts) -> Asked {
        Asked { devices: vec![device], ..Asked::default() }
    }

    #[test]
    fn a_device_must_be_there_free_and_large_enough() {
        let verdict = |kind, opened| {
            let device = DeviceFacts { kind, opened, ..device("/srv/d0") };
            System::new(&[]).verdict(devices, one(device))
        };
        let opened = |length, direct| Opened::Yes { length, direct };
        assert_eq!(verdict(Kind::Block, opened(4 << 30, true)), Verdict::Ok);
        assert_eq!(verdict(Kind::Block, opened(4 << 30, false)), Verdict::Warn);
        assert_eq!(verdict(Kind::Block, opened(4 << 20, true)), Verdict::Error);
        assert_eq!(verdict(Kind::Block, Opened::Refused("no".into())), Verdict::Error);
        assert_eq!(verdict(Kind::Block, Opened::Busy("somebody".into())), Verdict::Error);
        assert_eq!(verdict(Kind::Other("a pipe".into()), Opened::No), Verdict::Error);
        assert_eq!(verdict(Kind::Missing, Opened::No), Verdict::Ok);
    }

    #[test]
    fn a_device_of_an_existing_pod_must_not_be_missing_nor_one_below_dev() {
        let gone = |path| DeviceFacts { kind: Kind::Missing, opened: Opened::No, ..device(path) };
        let mut asked = one(gone("/srv/d0"));
        asked.directory.pod = true;
        assert_eq!(System::new(&[]).verdict(devices, asked), Verdict::Error);
        assert_eq!(System::new(&[]).verdict(devices, one(gone("/dev/sdx"))), Verdict::Error);
    }

    #[test]
    fn what_holds_a_busy_device_is_named() {
        let busy = || {
            let opened = Opened::Busy("it is mounted or in use by the kernel".into());
            one(DeviceFacts { kind: Kind::Block, opened, ..device("/dev/sdb") })
        };
        let says = |path: &str, content: &str| {
            let system = System::new(&[("/dev/sdb", ""), (path, content)]);
            let found = system.says(devices, busy()).remove(0);
            assert_eq!(found.verdict, Verdict::Error);
            found.fix.expect("advice")
        };
        let mount = "30 1 8:16 / /mnt/a rw - ext4 /dev/sdb rw\n";
        assert_eq!(says("/proc/self/mountinfo", mount), "umount /mnt/a");
        assert_eq!(says("/proc/swaps", "Filename Type\n/dev/sdb partition\n"), "swapoff /dev/sdb");
        assert_eq!(says("/sys/dev/block/8:0/holders/dm-0", ""), "lsblk /dev/sdb");
        assert_eq!(says("/proc/uptime", "1"), "fuser -v /dev/sdb");
    }
}
