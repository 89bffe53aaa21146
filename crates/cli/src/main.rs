//! `lite`: quantize LLM checkpoints offline. See `lite --help`.
#![deny(unsafe_code)]

mod allocator;
mod args;
mod commands;
mod exit;
mod log;
mod memory;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    match commands::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error, cli.format),
    }
}
