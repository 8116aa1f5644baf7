//! What a check says: a verdict, what was found, and how to put it right.

use serde::Serialize;

/// How good what was found is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Verdict {
    /// As it should be.
    Ok,
    /// The check could not look, or there was nothing to look at.
    Skip,
    /// It works, but is slow, fragile or not what the operator may think it is.
    Warn,
    /// A node does not start, or loses what it acknowledged.
    #[serde(rename = "ERR")]
    Error,
}

impl Verdict {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Skip => "SKIP",
            Self::Warn => "WARN",
            Self::Error => "ERR",
        }
    }
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// The check's name; filled in by whoever runs it.
    pub(super) check: &'static str,
    pub(super) verdict: Verdict,
    /// On which device, address or file; empty: the machine as a whole.
    pub(super) on: Vec<String>,
    /// What was found; for a check that could not look, why.
    pub(super) found: String,
    /// A command or a line of the configuration to paste; `None` if nothing is to be done.
    pub(super) fix: Option<String>,
}

impl Finding {
    pub(super) fn ok(found: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, found.into(), None)
    }

    pub(super) fn skip(why: impl Into<String>) -> Self {
        Self::new(Verdict::Skip, why.into(), None)
    }

    pub(super) fn warn(found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Verdict::Warn, found.into(), Some(fix.into()))
    }

    pub(super) fn error(found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(Verdict::Error, found.into(), Some(fix.into()))
    }

    /// Says on what.
    pub(super) fn on(mut self, subject: impl Into<String>) -> Self {
        self.on.push(subject.into());
        self
    }

    fn new(verdict: Verdict, found: String, fix: Option<String>) -> Self {
        Self { check: "", verdict, on: Vec::new(), found, fix }
    }
}

/// Puts findings that differ in nothing but their subject into one, at the first one's place.
pub(super) fn merged(findings: Vec<Finding>) -> Vec<Finding> {
    let mut merged: Vec<Finding> = Vec::new();
    for finding in findings {
        let same = |other: &&mut Finding| {
            (other.check, other.verdict, &other.found, &other.fix)
                == (finding.check, finding.verdict, &finding.found, &finding.fix)
        };
        match merged.iter_mut().find(same) {
            Some(other) => other.on.extend(finding.on),
            None => merged.push(finding),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_that_differ_in_their_subject_only_become_one() {
        let all = vec![
            Finding::ok("4 GiB").on("a"),
            Finding::warn("4 GiB", "grow it").on("b"),
            Finding::ok("4 GiB").on("c"),
        ];
        let merged = merged(all);
        assert_eq!(merged.len(), 2);
        assert_eq!(merged[0].on, ["a", "c"]);
        assert_eq!(merged[1].on, ["b"]);
    }
}
