//! `lite`: quantize LLM checkpoints offline. See `lite --help`.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod exit;
mod log;
mod memory;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

/// Activations are allocated and freed batch after batch; the system's allocator hands each large block back and
/// pays for its pages again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    match commands::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error, cli.format),
    }
}
