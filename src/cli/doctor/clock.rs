//! Whether somebody keeps the wall clock right.
//!
//! Nothing on the devices depends on it, but logs, events and TLS certificates do.

use super::facts::Facts;
use super::finding::Finding;

/// Files that say a clock is kept by the program named, which cannot be asked.
const KEEPERS: &[(&str, &str)] = &[
    ("/run/systemd/timesync/synchronized", "systemd-timesyncd"),
    ("/run/chrony/chronyd.pid", "chronyd"),
    ("/run/chronyd.pid", "chronyd"),
    ("/run/ntpd.pid", "ntpd"),
    ("/run/openntpd.pid", "ntpd"),
];

pub(super) fn clock(facts: &Facts) -> Vec<Finding> {
    // The kernel's own answer, which timedated has from adjtimex(2).
    let synchronised = facts.asked.answers.get("timedatectl").map(|answer| answer.trim());
    if synchronised == Some("yes") {
        return vec![Finding::ok("synchronised")];
    }
    let keeper = KEEPERS.iter().find(|(path, _)| facts.exists(path)).map(|(_, keeper)| *keeper);
    match (keeper, synchronised) {
        (Some(keeper), None) => return vec![Finding::ok(format!("kept by {keeper}"))],
        (Some(keeper), Some(_)) => {
            let found = format!("{keeper} runs, but has not synchronised it");
            return vec![Finding::warn(found, format!("systemctl status {keeper}"))];
        }
        (None, _) => {}
    }
    if synchronised.is_none() && contained(facts) {
        return vec![Finding::skip("a container: the clock is its host's")];
    }
    vec![Finding::warn(
        "nobody keeps it right: times in logs and events will be off, and TLS may fail",
        facts.install(("chrony", "chrony")),
    )]
}

fn contained(facts: &Facts) -> bool {
    ["/run/systemd/container", "/.dockerenv", "/run/.containerenv"]
        .iter()
        .any(|path| facts.exists(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::finding::Verdict;

    #[test]
    fn a_clock_that_nobody_keeps_is_warned_of() {
        let verdict = |files: &[(&str, &str)], answer: Option<&str>| {
            let mut asked = Asked::default();
            asked.answers.extend(answer.map(|answer| ("timedatectl", answer.to_owned())));
            System::new(files).verdict(clock, asked)
        };
        assert_eq!(verdict(&[], Some("yes\n")), Verdict::Ok);
        assert_eq!(verdict(&[], Some("no\n")), Verdict::Warn);
        assert_eq!(verdict(&[], None), Verdict::Warn);
        assert_eq!(verdict(&[("/run/systemd/timesync/synchronized", "")], None), Verdict::Ok);
        assert_eq!(verdict(&[("/run/chrony/chronyd.pid", "1")], None), Verdict::Ok);
        assert_eq!(verdict(&[("/run/chrony/chronyd.pid", "1")], Some("no")), Verdict::Warn);
        assert_eq!(verdict(&[("/.dockerenv", "")], None), Verdict::Skip);
    }
}
