//! NVMe status codes, and the one place that chooses them for our errors.

use crate::error::ErrorKind;

/// Set in a status: retrying the same command will fail again. (NVMe Base 1.4, 4.6.1)
const DO_NOT_RETRY: u16 = 1 << 14;

/// The status field of a completion without its phase bit: code, code type, and DNR.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(u16);

impl std::fmt::Debug for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Status({:#06x})", self.0)
    }
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Self = Self($value);)*
        }
    };
}

// Type in bits 10:8, code in bits 7:0. (NVMe Base 1.4, 4.6.1.2; NVMe-oF 1.1, 2.2)
statuses! {
    /// Successful Completion.
    SUCCESS = 0x000;
    /// Invalid Command Opcode.
    INVALID_OPCODE = DO_NOT_RETRY | 0x001;
    /// Invalid Field in Command.
    INVALID_FIELD = DO_NOT_RETRY | 0x002;
    /// Internal Error.
    INTERNAL = 0x006;
    /// Command Aborted due to Failed Fused Command.
    FUSED_FAILED = 0x009;
    /// Command Aborted due to Missing Fused Command.
    FUSED_MISSING = 0x00a;
    /// Invalid Namespace or Format.
    INVALID_NAMESPACE = DO_NOT_RETRY | 0x00b;
    /// Command Sequence Error.
    SEQUENCE_ERROR = DO_NOT_RETRY | 0x00c;
    /// Data SGL Length Invalid.
    SGL_LENGTH_INVALID = DO_NOT_RETRY | 0x00f;
    /// SGL Descriptor Type Invalid.
    SGL_TYPE_INVALID = DO_NOT_RETRY | 0x011;
    /// SGL Offset Invalid.
    SGL_OFFSET_INVALID = DO_NOT_RETRY | 0x016;
    /// Atomic Write Unit Exceeded.
    ATOMIC_UNIT_EXCEEDED = DO_NOT_RETRY | 0x014;
    /// Host Identifier Inconsistent Format.
    HOST_ID_FORMAT = DO_NOT_RETRY | 0x018;
    /// Namespace is Write Protected.
    WRITE_PROTECTED = DO_NOT_RETRY | 0x020;
    /// Transient Transport Error: the data digest was wrong.
    TRANSIENT_TRANSPORT = 0x022;
    /// LBA Out of Range.
    LBA_OUT_OF_RANGE = DO_NOT_RETRY | 0x080;
    /// Capacity Exceeded: the pod is full.
    CAPACITY_EXCEEDED = DO_NOT_RETRY | 0x081;
    /// Namespace Not Ready.
    NAMESPACE_NOT_READY = 0x082;
    /// Reservation Conflict: what another host holds does not allow it, or the key is wrong.
    RESERVATION_CONFLICT = DO_NOT_RETRY | 0x083;
    /// Asynchronous Event Request Limit Exceeded.
    EVENT_LIMIT_EXCEEDED = DO_NOT_RETRY | 0x105;
    /// Invalid Log Page.
    INVALID_LOG_PAGE = DO_NOT_RETRY | 0x109;
    /// Feature Identifier Not Saveable.
    NOT_SAVEABLE = DO_NOT_RETRY | 0x10d;
    /// Feature Not Changeable.
    NOT_CHANGEABLE = DO_NOT_RETRY | 0x10e;
    /// Connect: Incompatible Format.
    CONNECT_FORMAT = DO_NOT_RETRY | 0x180;
    /// Connect: Controller Busy. Worth a retry: another host may leave.
    CONNECT_BUSY = 0x181;
    /// Connect: Invalid Parameters. The result says which.
    CONNECT_INVALID = DO_NOT_RETRY | 0x182;
    /// Connect: Invalid Host. Worth a retry: it may be added.
    CONNECT_INVALID_HOST = 0x184;
    /// Authentication Required.
    AUTHENTICATION_REQUIRED = DO_NOT_RETRY | 0x191;
    /// Write Fault.
    WRITE_FAULT = 0x280;
    /// Unrecovered Read Error.
    UNRECOVERED_READ = DO_NOT_RETRY | 0x281;
    /// Compare Failure.
    COMPARE_FAILURE = DO_NOT_RETRY | 0x285;
}

impl Status {
    /// The value on the wire: phase bit 0, which fabrics do not use.
    #[must_use]
    pub fn wire(self) -> u16 {
        self.0 << 1
    }

    /// Whether the command succeeded.
    #[must_use]
    pub fn is_success(self) -> bool {
        self.0 == 0
    }
}

/// What a command does, as far as the choice of a status depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads data.
    Read,
    /// Changes data, or makes it durable.
    Write,
}

/// The status of a failed command.
#[must_use]
pub fn status(kind: ErrorKind, access: Access) -> Status {
    match kind {
        ErrorKind::OutOfRange => Status::LBA_OUT_OF_RANGE,
        ErrorKind::InvalidRequest | ErrorKind::Unsupported => Status::INVALID_FIELD,
        ErrorKind::ReadOnly => Status::WRITE_PROTECTED,
        ErrorKind::Reserved => Status::RESERVATION_CONFLICT,
        ErrorKind::NoSpace | ErrorKind::DeviceFull => Status::CAPACITY_EXCEEDED,
        // The volume was deleted under the host.
        ErrorKind::NotFound => Status::INVALID_NAMESPACE,
        // A moment later the volume is gone, or the node serves again.
        ErrorKind::ShuttingDown | ErrorKind::Busy => Status::NAMESPACE_NOT_READY,
        ErrorKind::Corrupt => match access {
            Access::Read => Status::UNRECOVERED_READ,
            // A partial block could not be completed with what is stored.
            Access::Write => Status::WRITE_FAULT,
        },
        ErrorKind::DeviceTransient | ErrorKind::DeviceFailed | ErrorKind::Poisoned => {
            match access {
                Access::Read => Status::INTERNAL,
                Access::Write => Status::WRITE_FAULT,
            }
        }
        ErrorKind::Exists => Status::INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_status_and_only_lasting_ones_forbid_a_retry() {
        let table = [
            (ErrorKind::InvalidRequest, 0x4002),
            (ErrorKind::OutOfRange, 0x4080),
            (ErrorKind::NotFound, 0x400b),
            (ErrorKind::Exists, 0x006),
            (ErrorKind::Busy, 0x082),
            (ErrorKind::ReadOnly, 0x4020),
            (ErrorKind::Reserved, 0x4083),
            (ErrorKind::NoSpace, 0x4081),
            (ErrorKind::Corrupt, 0x280),
            (ErrorKind::DeviceTransient, 0x280),
            (ErrorKind::DeviceFailed, 0x280),
            (ErrorKind::DeviceFull, 0x4081),
            (ErrorKind::Poisoned, 0x280),
            (ErrorKind::ShuttingDown, 0x082),
            (ErrorKind::Unsupported, 0x4002),
        ];
        for (kind, value) in table {
            assert_eq!(status(kind, Access::Write).wire(), value << 1, "{kind:?}");
        }
        assert_eq!(status(ErrorKind::Corrupt, Access::Read), Status::UNRECOVERED_READ);
        assert_eq!(status(ErrorKind::DeviceFailed, Access::Read), Status::INTERNAL);
    }
}
