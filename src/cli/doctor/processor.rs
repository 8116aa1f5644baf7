//! What the processors can do, and how many threads share them.

use super::facts::Facts;
use super::finding::Finding;

/// Instructions without which a part of the data path is several times slower: names in
/// /proc/cpuinfo of x86 and of Arm, and what they are for.
const INSTRUCTIONS: &[(&str, &str, &str)] = &[
    ("avx2", "asimd", "the erasure code"),
    ("pclmulqdq", "pmull", "checksums"),
    ("aes", "aes", "TLS"),
];

pub(super) fn processor(facts: &Facts) -> Vec<Finding> {
    let text = facts.text("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim())
    };
    let (flags, arm) = match (value("flags"), value("Features")) {
        (Some(flags), _) => (flags, false),
        (None, Some(flags)) => (flags, true),
        (None, None) => return vec![Finding::skip("/proc/cpuinfo names no instructions")],
    };
    let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    let name = |row: &(&'static str, &'static str, &'static str)| if arm { row.1 } else { row.0 };
    let (there, missing): (Vec<_>, Vec<_>) = INSTRUCTIONS.iter().partition(|row| has(name(row)));
    if missing.is_empty() {
        let names: Vec<_> = there.iter().copied().map(name).collect();
        return vec![Finding::ok(names.join(", "))];
    }
    let slow = missing.iter().map(|row| format!("no {}: {} will be slow", name(row), row.2));
    vec![Finding::warn(
        slow.collect::<Vec<_>>().join("; "),
        "in a virtual machine, give it the host's processor: qemu -cpu host",
    )]
}

/// Each thread of the data plane is pinned to a processor: two on one get in each other's way.
pub(super) fn threads(facts: &Facts) -> Vec<Finding> {
    let Some(config) = facts.config() else { return Vec::new() };
    let processors = facts.asked.processors;
    let threads = config.data_plane_threads.unwrap_or(processors);
    let found = format!("{threads} data-plane threads, {processors} processors");
    vec![if threads > processors {
        Finding::warn(found, "[threads] data_plane = \"auto\"")
    } else {
        Finding::ok(found)
    }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::facts::fake::configured;
    use crate::cli::doctor::finding::Verdict;

    #[test]
    fn a_processor_without_the_instructions_is_called_slow() {
        let verdict =
            |text| System::new(&[("/proc/cpuinfo", text)]).verdict(processor, Asked::default());
        assert_eq!(verdict("flags\t\t: fpu aes pclmulqdq avx2\n"), Verdict::Ok);
        assert_eq!(verdict("Features\t: fp asimd aes pmull\n"), Verdict::Ok);
        assert_eq!(verdict("flags\t\t: fpu aes pclmulqdq avx\n"), Verdict::Warn);
        assert_eq!(verdict("model name : unknown\n"), Verdict::Skip);
    }

    #[test]
    fn threads_beyond_processors_are_warned_of() {
        let verdict = |text| System::new(&[]).verdict(threads, configured(text));
        assert_eq!(verdict(""), Verdict::Ok);
        assert_eq!(verdict("threads.data_plane = 9"), Verdict::Warn);
    }
}
