//! What the kernel lets a node do: io_uring, files, locked memory.

use super::facts::Facts;
use super::finding::Finding;

/// First kernel that charges rings to the memory of the control group instead of the limit of
/// locked memory.
const RINGS_NOT_LOCKED: (u32, u32) = (5, 12);
/// First kernel that knows the flags with which rings are quickest (`device/uring.rs`).
const RINGS_QUICK: (u32, u32) = (6, 1);
/// Locked memory that a thread's ring takes on older kernels: 256 entries of 64 bytes, twice as
/// many completions of 16, and what surrounds them, rounded up generously.
const RING_BYTES: u64 = 64 << 10;

/// Devices are read and written through io_uring, and through nothing else.
pub(super) fn io_uring(facts: &Facts) -> Vec<Finding> {
    let disabled = facts.number("/proc/sys/kernel/io_uring_disabled").unwrap_or(0);
    let finding = match &facts.asked.ring {
        None => Finding::skip("no ring was tried"),
        Some(Err(reason)) if disabled > 0 => Finding::error(
            format!("refused: {reason}; kernel.io_uring_disabled is {disabled}"),
            "sysctl -w kernel.io_uring_disabled=0 && \
             echo kernel.io_uring_disabled=0 >/etc/sysctl.d/90-weft.conf",
        ),
        Some(Err(reason)) => Finding::error(
            format!("refused: {reason}"),
            "in a container, allow it: docker run --security-opt seccomp=unconfined; \
             otherwise boot a kernel with CONFIG_IO_URING",
        ),
        Some(Ok(())) if facts.kernel_version().is_some_and(|version| version < RINGS_QUICK) => {
            Finding::warn(
                format!("works, the slower way: Linux {}", facts.kernel().unwrap_or_default()),
                "boot Linux 6.1 or newer",
            )
        }
        Some(Ok(())) if disabled == 1 => Finding::warn(
            "works for this user, but kernel.io_uring_disabled is 1: not for every other",
            "sysctl -w kernel.io_uring_disabled=0 && \
             echo kernel.io_uring_disabled=0 >/etc/sysctl.d/90-weft.conf",
        ),
        Some(Ok(())) => {
            Finding::ok(format!("a ring works, Linux {}", facts.kernel().unwrap_or_default()))
        }
    };
    vec![finding]
}

/// Every connection and every device takes a descriptor. The soft limit does not matter: a node
/// raises it to the hard one.
pub(super) fn open_files(facts: &Facts) -> Vec<Finding> {
    let Some(config) = facts.config() else { return Vec::new() };
    let Some((_, hard)) = facts.limits("Max open files") else {
        return vec![Finding::skip("/proc/self/limits cannot be read")];
    };
    let connections = config.nbd.connections_max + config.nvme_tcp.connections_max;
    let devices = facts.asked.devices.len();
    let needed = config.open_files_max(devices);
    let limit = match hard {
        u64::MAX => "unlimited".to_owned(),
        hard => hard.to_string(),
    };
    let found = format!("{limit}; {connections} connections and {devices} devices need {needed}");
    vec![if hard < needed {
        Finding::warn(
            found,
            format!("LimitNOFILE={needed} in the unit's [Service], or: ulimit -Hn {needed}"),
        )
    } else {
        Finding::ok(found)
    }]
}

/// Rings count as locked memory on old kernels only; nothing else of a node is locked.
pub(super) fn locked_memory(facts: &Facts) -> Vec<Finding> {
    let Some(version) = facts.kernel_version() else {
        return vec![Finding::skip("/proc/sys/kernel/osrelease cannot be read")];
    };
    if version >= RINGS_NOT_LOCKED {
        return vec![Finding::ok("does not matter on this kernel")];
    }
    let Some((soft, _)) = facts.limits("Max locked memory") else {
        return vec![Finding::skip("/proc/self/limits cannot be read")];
    };
    let threads = facts.config().and_then(|config| config.data_plane_threads);
    // The engine's thread is one more.
    let rings = crate::units::bytes_u64(threads.unwrap_or(facts.asked.processors) + 1);
    let needed = rings * RING_BYTES;
    vec![if soft < needed {
        Finding::warn(
            format!("{soft} bytes may be locked; {rings} rings need {needed} on Linux before 5.12"),
            "LimitMEMLOCK=infinity in the unit's [Service], or: ulimit -l unlimited",
        )
    } else {
        Finding::ok(format!("enough for {rings} rings"))
    }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::facts::fake::configured;
    use crate::cli::doctor::finding::Verdict;

    const RELEASE: &str = "/proc/sys/kernel/osrelease";
    const LIMITS: &str = "/proc/self/limits";

    fn ring(result: Result<(), String>) -> Asked {
        Asked { ring: Some(result), ..Asked::default() }
    }

    #[test]
    fn a_ring_that_is_refused_is_an_error_and_the_setting_is_named() {
        let verdict = |files: &[(&str, &str)], result| {
            System::new(files).says(io_uring, ring(result)).remove(0)
        };
        let new = (RELEASE, "6.8.0-31-generic\n");
        assert_eq!(verdict(&[new], Ok(())).verdict, Verdict::Ok);
        assert_eq!(verdict(&[(RELEASE, "5.15.0")], Ok(())).verdict, Verdict::Warn);
        let disabled = ("/proc/sys/kernel/io_uring_disabled", "2\n");
        let refused = verdict(&[new, disabled], Err("not permitted".into()));
        assert_eq!(refused.verdict, Verdict::Error);
        assert!(refused.fix.is_some_and(|fix| fix.contains("io_uring_disabled=0")));
        let refused = verdict(&[new], Err("not permitted".into()));
        assert!(refused.fix.is_some_and(|fix| fix.contains("seccomp")));
        let some = ("/proc/sys/kernel/io_uring_disabled", "1\n");
        assert_eq!(verdict(&[new, some], Ok(())).verdict, Verdict::Warn);
    }

    #[test]
    fn the_hard_limit_of_files_must_reach_for_every_connection() {
        let limits = |hard: &str| format!("Max open files            1024      {hard}    files\n");
        let verdict =
            |hard| System::new(&[(LIMITS, &limits(hard))]).verdict(open_files, configured(""));
        assert_eq!(verdict("524288"), Verdict::Ok);
        assert_eq!(verdict("unlimited"), Verdict::Ok);
        assert_eq!(verdict("1024"), Verdict::Warn);
        assert_eq!(System::new(&[]).verdict(open_files, configured("")), Verdict::Skip);
    }

    #[test]
    fn locked_memory_matters_on_old_kernels_only() {
        let limits = "Max locked memory         65536                65536            bytes\n";
        let verdict = |release| {
            let system = System::new(&[(RELEASE, release), (LIMITS, limits)]);
            system.verdict(locked_memory, configured(""))
        };
        assert_eq!(verdict("6.1.0-18-amd64"), Verdict::Ok);
        assert_eq!(verdict("5.10.0-28-amd64"), Verdict::Warn);
    }
}
