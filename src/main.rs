//! The weft binary: arguments to a command to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    weft::cli::run(std::env::args_os())
}

/// Why not the system's: docs/decisions/0001-dependencies.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
