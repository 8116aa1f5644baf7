//! Events: what happened that an operator should know, each of a kind from one list.
//!
//! [`raise`] writes the event to the log and keeps it for the API. The newest are kept for the
//! whole process, as the log is one of the process; they are gone with it.

use std::collections::VecDeque;
use std::fmt::Display;
use std::time::SystemTime;

use parking_lot::Mutex;
use weft_api::Event;
use weft_api::Severity;

/// Events kept.
const KEPT_MAX: usize = 1000;
/// Events of one kind on one subject within this time of the first are one, counted.
const REPEAT_MS: u64 = 60_000;

/// A kind of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its name in the API.
    pub name: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What can be done; empty if nothing needs to be.
    pub advice: &'static str,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $id:ident = $name:literal, $severity:ident, $advice:literal;)*) => {
        $($(#[$doc])* pub const $id: Kind =
            Kind { name: $name, severity: Severity::$severity, advice: $advice };)*

        /// Every kind there is.
        pub const KINDS: &[Kind] = &[$($id,)*];
    };
}

kinds! {
    /// The node serves.
    NODE_STARTED = "node-started", Info, "";
    /// It was told to stop.
    NODE_STOPPING = "node-stopping", Info, "";
    /// A device is out of service until the pod is opened again.
    DEVICE_OUT_OF_SERVICE = "device-out-of-service", Warning,
        "mend or replace the device, then start the node again, with --replace-missing if the device is blank";
    /// A device was not taken when the pod was opened.
    DEVICE_LEFT_OUT = "device-left-out", Warning,
        "check pod.devices in the configuration and the device itself";
    /// A blank device took the place of a missing one.
    DEVICE_REPLACED = "device-replaced", Info, "";
    /// `--force-open` opened a pod that had too few devices.
    POD_FORCED = "pod-forced", Error,
        "copy what can still be read to another pod, and keep the missing devices away from this one";
    /// The file system under a device file has no room.
    DEVICE_FULL = "device-full", Warning, "make room on the file system that holds it";
    /// Bytes on a device were not those that had been written.
    DAMAGE_FOUND = "damage-found", Warning,
        "the data was rebuilt from the other devices; if it happens again, replace the device";
    /// Damaged bytes were rebuilt and written back.
    DAMAGE_HEALED = "damage-healed", Info, "";
    /// Damaged bytes could not be written back.
    DAMAGE_LEFT = "damage-left", Warning,
        "see the reason: too few other devices can be read, or this one does not keep what it is given and is to be replaced";
    /// Redundancy was put back as far as the devices in service allow.
    REBUILD_DONE = "rebuild-done", Info, "";
    /// A scrub read everything, and nothing is damaged any more.
    SCRUB_DONE = "scrub-done", Info, "";
    /// A scrub read everything, and could not heal all that was damaged.
    SCRUB_LEFT_DAMAGE = "scrub-left-damage", Warning,
        "the events damage-left before it say where: replace the device, or scrub again when more devices are in service";
    /// A scrub ended early because someone said so.
    SCRUB_CANCELLED = "scrub-cancelled", Info, "";
    /// Writes cannot be made durable any more.
    POD_READ_ONLY = "pod-read-only", Error,
        "mend the devices and start the node again: nothing acknowledged is lost but what volumes with a write cache had not flushed";
    /// A write was refused for want of room.
    POD_FULL = "pod-full", Error, "trim or delete volumes, or move some to a larger pod";
    /// Background work failed and will be tried again.
    BACKGROUND_FAILED = "background-failed", Warning, "see the reason; reads and writes may go on";
    /// A volume was created.
    VOLUME_CREATED = "volume-created", Info, "";
    /// A volume was made larger.
    VOLUME_RESIZED = "volume-resized", Info, "";
    /// A volume was deleted.
    VOLUME_DELETED = "volume-deleted", Info, "";
    /// A volume is served to other hosts than before.
    VOLUME_HOSTS_SET = "volume-hosts-set", Info, "";
    /// A volume acknowledges writes from memory now, or does so no more.
    VOLUME_WRITE_CACHE_SET = "volume-write-cache-set", Info, "";
    /// All reservations were taken off a volume.
    RESERVATIONS_CLEARED = "reservations-cleared", Info, "";
    /// A host may connect from anywhere now.
    HOST_ADDED = "host-added", Info, "";
    /// A host may not any more.
    HOST_REMOVED = "host-removed", Info, "";
    /// A host that was never added, or that gives no valid name, tried to connect.
    HOST_REFUSED = "host-refused", Warning, "`weft host add NQN` lets it in, with --tls-key-file if it encrypts";
    /// A host did not prove that it has its key, or does not believe that we have ours.
    HOST_AUTHENTICATION_FAILED = "host-authentication-failed", Warning,
        "compare the host's keys with `weft host set NQN --dhchap-key-file` or `--tls-key-file`; if nobody changed them, find out who it was";
    /// A host has other keys.
    HOST_KEYS_SET = "host-keys-set", Info, "";
    /// A host's connection timed out.
    HOST_SILENT = "host-silent", Warning, "look at the host and the network between";
    /// A host was cut off that had stood still for long on memory that others waited for.
    HOST_STALLED = "host-stalled", Warning,
        "look at the host and the network between; if hosts have to wait often, raise memory.in_flight in the configuration";
    /// A connection was turned away because there were too many.
    CONNECTIONS_REFUSED = "connections-refused", Warning,
        "raise connections_max in the configuration, or close idle connections";
    /// What the node counts could not be recorded.
    HISTORY_FAILED = "history-failed", Warning,
        "make room or mend the file system of the data directory; hosts are not affected";
    /// Certificates, keys and the token were read again.
    CREDENTIALS_RELOADED = "credentials-reloaded", Info, "";
    /// They were to be read again, and one of them is wrong.
    CREDENTIALS_KEPT = "credentials-kept", Warning,
        "the old ones stay in force; mend the file that the reason names, and run `weft reload`";
    /// Someone who may not tried to manage the node.
    API_REFUSED = "api-refused", Warning,
        "if it was you: see [api] in the configuration; if it was not, find out who it was";
}

/// The newest events.
#[derive(Debug)]
struct Recent {
    /// Of the newest.
    sequence: u64,
    events: VecDeque<Event>,
}

static RECENT: Mutex<Recent> = Mutex::new(Recent { sequence: 0, events: VecDeque::new() });

/// Something of that kind happened to `subject`: a device's name, a volume's, `pod` or `node`.
pub fn raise(kind: Kind, subject: impl Display, message: impl Display) {
    let (subject, message) = (subject.to_string(), message.to_string());
    let count = RECENT.lock().keep(kind, &subject, &message, unix_ms());
    let Kind { name, severity, advice } = kind;
    match severity {
        // A flood of the same belongs into the count.
        _ if count > 1 => tracing::debug!(event = name, subject, count, "{message}"),
        Severity::Info => tracing::info!(event = name, subject, "{message}"),
        Severity::Warning => tracing::warn!(event = name, subject, advice, "{message}"),
        Severity::Error => tracing::error!(event = name, subject, advice, "{message}"),
    }
}

/// Those after the event of that number, oldest first.
#[must_use]
pub fn after(sequence: u64) -> Vec<Event> {
    let recent = RECENT.lock();
    recent.events.iter().filter(|event| event.sequence > sequence).cloned().collect()
}

impl Recent {
    /// Keeps an event and returns how often it has come.
    fn keep(&mut self, kind: Kind, subject: &str, message: &str, unix_ms: u64) -> u64 {
        let same = |event: &Event| event.kind == kind.name && event.subject == subject;
        // It moves to the end under a new number, so that readers see that it came again.
        let last = self.events.iter().rposition(same);
        let last = last.filter(|at| {
            let first_ms = self.events[*at].unix_ms;
            unix_ms.saturating_sub(first_ms) < REPEAT_MS
        });
        let repeated = last.and_then(|at| self.events.remove(at));
        let (unix_ms, count) =
            repeated.map_or((unix_ms, 1), |event| (event.unix_ms, event.count + 1));
        if self.events.len() == KEPT_MAX {
            self.events.pop_front();
        }
        self.sequence += 1;
        self.events.push_back(Event {
            sequence: self.sequence,
            unix_ms,
            severity: kind.severity,
            kind: kind.name.to_owned(),
            subject: subject.to_owned(),
            message: message.to_owned(),
            advice: kind.advice.to_owned(),
            count,
        });
        count
    }
}

#[expect(clippy::disallowed_methods, reason = "for people only; nothing is decided by it")]
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_what_is_bad_has_advice() {
        let names: BTreeSet<_> = KINDS.iter().map(|kind| kind.name).collect();
        assert_eq!(names.len(), KINDS.len());
        for kind in KINDS {
            assert_eq!(kind.severity == Severity::Info, kind.advice.is_empty(), "{}", kind.name);
        }
    }

    #[test]
    fn every_kind_is_documented() {
        let page = include_str!("../../docs/events.md");
        let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        let row = |kind: &Kind| {
            let (severity, advice) = (kind.severity.name(), kind.advice);
            format!("| `{}` | {severity} | {advice} |", kind.name).replace("|  |", "| |")
        };
        let expected: Vec<String> = KINDS.iter().map(row).collect();
        assert_eq!(rows, expected, "docs/events.md and KINDS differ");
    }

    #[test]
    fn repeats_are_counted_and_the_oldest_go() {
        let mut recent = Recent { sequence: 0, events: VecDeque::new() };
        let mut keep = |subject: &str, at| {
            recent.keep(DAMAGE_FOUND, subject, "found", at);
            recent.events.iter().map(|e| (e.sequence, e.subject.clone(), e.count)).collect()
        };
        let seen: Vec<_> = keep("a", 0);
        assert_eq!(seen, [(1, "a".to_owned(), 1)]);
        let _: Vec<_> = keep("b", 1);
        let seen: Vec<_> = keep("a", 2);
        assert_eq!(seen, [(2, "b".to_owned(), 1), (3, "a".to_owned(), 2)]);
        let seen: Vec<_> = keep("a", 2 + REPEAT_MS);
        assert_eq!(seen.last(), Some(&(4, "a".to_owned(), 1)));
        for number in 0..KEPT_MAX {
            let _: Vec<_> = keep(&number.to_string(), 5);
        }
        assert_eq!(recent.events.len(), KEPT_MAX);
        assert_eq!(recent.events[0].subject, "0");
    }
}
