//! NBD error values, and the one place that chooses them for our errors.

use crate::error::ErrorKind;
use crate::target::nbd::wire::Command;

/// The error values a server may send. (proto.md, "Error values")
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NbdError {
    /// EPERM: the export is read-only.
    NotPermitted,
    /// EPERM: a host of another protocol has reserved the volume.
    Reserved,
    /// EIO.
    Io,
    /// EINVAL.
    Invalid,
    /// ENOSPC: full, or a write past the end.
    NoSpace,
    /// EOVERFLOW: a chunked read beyond the maximum.
    Overflow,
    /// ESHUTDOWN: the volume or the node goes away.
    Shutdown,
}

impl NbdError {
    /// The number on the wire.
    #[must_use]
    pub fn value(self) -> u32 {
        match self {
            Self::NotPermitted | Self::Reserved => 1,
            Self::Io => 5,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::Shutdown => 108,
        }
    }

    /// A few words for the client's log.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::NotPermitted => "the export is read-only",
            Self::Reserved => "the export is reserved by another host",
            Self::Io => "I/O error",
            Self::Invalid => "invalid request",
            Self::NoSpace => "no space left",
            Self::Overflow => "read larger than the maximum of 32 MiB",
            Self::Shutdown => "the export is shutting down",
        }
    }
}

/// The error value for a failed `command`.
#[must_use]
pub fn nbd_error(kind: ErrorKind, command: Command) -> NbdError {
    match kind {
        // The protocol singles out what would have stored bytes past the end; TRIM stores none.
        ErrorKind::OutOfRange => match command {
            Command::Write | Command::WriteZeroes => NbdError::NoSpace,
            Command::Read
            | Command::Disconnect
            | Command::Flush
            | Command::Trim
            | Command::Cache
            | Command::BlockStatus => NbdError::Invalid,
        },
        // ENOTSUP is reserved for FAST_ZERO, which we always honour.
        ErrorKind::InvalidRequest | ErrorKind::Unsupported => NbdError::Invalid,
        ErrorKind::ReadOnly => NbdError::NotPermitted,
        ErrorKind::Reserved => NbdError::Reserved,
        ErrorKind::NoSpace | ErrorKind::DeviceFull => NbdError::NoSpace,
        // The volume was deleted under the client.
        ErrorKind::NotFound | ErrorKind::ShuttingDown => NbdError::Shutdown,
        ErrorKind::Exists
        | ErrorKind::Busy
        | ErrorKind::Corrupt
        | ErrorKind::DeviceTransient
        | ErrorKind::DeviceFailed
        | ErrorKind::Poisoned => NbdError::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // spec: nbd-error-values
    #[test]
    fn every_kind_has_a_value_the_protocol_knows() {
        let table = [
            (ErrorKind::InvalidRequest, 22),
            (ErrorKind::OutOfRange, 28),
            (ErrorKind::NotFound, 108),
            (ErrorKind::Exists, 5),
            (ErrorKind::Busy, 5),
            (ErrorKind::ReadOnly, 1),
            (ErrorKind::Reserved, 1),
            (ErrorKind::NoSpace, 28),
            (ErrorKind::Corrupt, 5),
            (ErrorKind::DeviceTransient, 5),
            (ErrorKind::DeviceFailed, 5),
            (ErrorKind::DeviceFull, 28),
            (ErrorKind::Poisoned, 5),
            (ErrorKind::ShuttingDown, 108),
            (ErrorKind::Unsupported, 22),
        ];
        for (kind, value) in table {
            assert_eq!(nbd_error(kind, Command::Write).value(), value, "{kind:?}");
        }
        for command in [Command::Read, Command::Trim, Command::BlockStatus, Command::Cache] {
            assert_eq!(nbd_error(ErrorKind::OutOfRange, command), NbdError::Invalid);
        }
    }
}
