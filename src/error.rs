//! The error every layer of the data path returns.
//!
//! Callers branch on [`ErrorKind`] only; everything else is for the person reading the log.
//! Protocol status codes do not appear here: each target maps `ErrorKind` to its own
//! (`target/*/status.rs`), in one exhaustive `match`.

use std::error;
use std::fmt;

/// What went wrong, in the few cases a caller treats differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request itself is wrong (malformed name, bad size). Retrying is useless.
    InvalidRequest,
    /// The request reaches past the end of the volume or device.
    OutOfRange,
    /// No volume, device or pod of that name.
    NotFound,
    /// The name is taken.
    Exists,
    /// Something else holds it: another node on the directory, a request in progress.
    Busy,
    /// The volume or pod is read-only.
    ReadOnly,
    /// Another host has reserved the volume.
    Reserved,
    /// The pod is full: live data and promises reach its limit.
    NoSpace,
    /// Stored bytes failed their checksum and no redundancy was left to rebuild them.
    Corrupt,
    /// A device failed this I/O; another copy or a retry may succeed.
    DeviceTransient,
    /// A device is gone, or its state after a failed write or flush is unknown: do not ask again.
    DeviceFailed,
    /// A device, or the file system below it, has no room. It is full, not failed.
    DeviceFull,
    /// Durability can no longer be promised. Sticky: only reopening the pod clears it.
    Poisoned,
    /// The node is stopping.
    ShuttingDown,
    /// This build or this machine cannot do it.
    Unsupported,
}

/// An [`ErrorKind`] with the operation that failed, on what, and its cause.
///
/// `Display` prints its own level only; [`Error::chain`] walks the causes.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    /// Present-tense verb and object, as in "read superblock". No "failed to".
    op: &'static str,
    /// On what, and what the operator can do.
    context: String,
    source: Option<Box<dyn error::Error + Send + Sync>>,
}

/// The result of everything on the data path.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error without further context.
    #[must_use]
    pub fn new(kind: ErrorKind, op: &'static str) -> Self {
        Self { kind, op, context: String::new(), source: None }
    }

    /// Says on what the operation was tried, or what the operator can do.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        if !self.context.is_empty() {
            self.context.push_str("; ");
        }
        self.context.push_str(&context.to_string());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn source(mut self, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What callers branch on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operation, for logs.
    #[must_use]
    pub fn op(&self) -> &'static str {
        self.op
    }

    /// This error and its causes in one line, outermost first.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut line = self.to_string();
        let mut cause = error::Error::source(self);
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        line
    }

    /// A copy for another waiter of the same failed work; the cause becomes part of the context.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        let cause = error::Error::source(self).map(|cause| cause.to_string().into());
        Self { kind: self.kind, op: self.op, context: self.context.clone(), source: cause }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.op)?;
        if !self.context.is_empty() {
            write!(f, " ({})", self.context)?;
        }
        if self.source.is_none() {
            write!(f, ": {}", self.kind)?;
        }
        Ok(())
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn error::Error + 'static))
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InvalidRequest => "invalid request",
            Self::OutOfRange => "out of range",
            Self::NotFound => "not found",
            Self::Exists => "exists already",
            Self::Busy => "busy",
            Self::ReadOnly => "read-only",
            Self::Reserved => "reserved by another host",
            Self::NoSpace => "no space left in the pod",
            Self::Corrupt => "data damaged beyond repair",
            Self::DeviceTransient => "device error",
            Self::DeviceFailed => "device failed",
            Self::DeviceFull => "device full",
            Self::Poisoned => "durability lost; reopen the pod",
            Self::ShuttingDown => "shutting down",
            Self::Unsupported => "not supported",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_reads_as_one_sentence() {
        let error = Error::new(ErrorKind::DeviceFailed, "read superblock")
            .context("dev-0.img")
            .source(std::io::Error::other("I/O error"));
        assert_eq!(error.chain(), "read superblock (dev-0.img): I/O error");
        assert_eq!(
            Error::new(ErrorKind::NoSpace, "write").to_string(),
            "write: no space left in the pod"
        );
    }
}
