//! Exit codes, which scripts rely on, and what ends in which.

use std::process::ExitCode;

use weft_api::ClientError;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::node::config::ConfigError;

/// An exit code that is not success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Code(u8);

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code.0)
    }
}

/// Something failed that is none of the others.
pub(super) const FAILED: Code = Code(1);
/// Wrong arguments, configuration or request: trying again is useless. Also clap's own.
pub(super) const USAGE: Code = Code(2);
/// No node answers.
pub(super) const UNREACHABLE: Code = Code(3);
/// No such volume or task.
pub(super) const NOT_FOUND: Code = Code(4);
/// The name is taken; or directory or address are in use.
pub(super) const CONFLICT: Code = Code(5);
/// The node wants its token, and this is not it: another token helps, another request does not.
pub(super) const UNAUTHORIZED: Code = Code(6);

/// Why a command ends in something else than success.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) message: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            ErrorKind::InvalidRequest | ErrorKind::OutOfRange => USAGE,
            ErrorKind::NotFound => NOT_FOUND,
            ErrorKind::Exists | ErrorKind::Busy => CONFLICT,
            ErrorKind::ReadOnly
            | ErrorKind::Reserved
            | ErrorKind::NoSpace
            | ErrorKind::Corrupt
            | ErrorKind::DeviceTransient
            | ErrorKind::DeviceFailed
            | ErrorKind::DeviceFull
            | ErrorKind::Poisoned
            | ErrorKind::ShuttingDown
            | ErrorKind::Unsupported => FAILED,
        };
        Self { code, message: error.chain() }
    }
}

impl Failure {
    /// Of a node that does not start. A path that is not there is then no volume or task.
    pub(super) fn of_start(error: Error) -> Self {
        let failure = Self::from(error);
        match failure.code {
            NOT_FOUND => Self { code: FAILED, ..failure },
            _ => failure,
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self { code: USAGE, message: error.to_string() }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let code = match &error {
            ClientError::Unreachable { .. } => UNREACHABLE,
            ClientError::Untrusted { .. } | ClientError::Broken(_) => FAILED,
            ClientError::Problem(problem) => match problem.status {
                401 => UNAUTHORIZED,
                404 => NOT_FOUND,
                409 => CONFLICT,
                400..=499 if problem.status != 403 => USAGE,
                _ => FAILED,
            },
        };
        let hint = match code {
            UNREACHABLE => "; start one with `weft`, or name it with --data or --api",
            UNAUTHORIZED => "; name a file with it by --token-file or WEFT_TOKEN_FILE",
            _ => "",
        };
        Self { code, message: format!("{error}{hint}") }
    }
}
