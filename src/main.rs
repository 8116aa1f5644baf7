//! The weft binary: arguments to a command to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    weft::cli::run(std::env::args_os())
}
