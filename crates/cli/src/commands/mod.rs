//! One module per subcommand.

pub(crate) mod arch;
pub(crate) mod blocked_fp8;
mod calibrate;
pub(crate) mod convert;
pub(crate) mod env;
pub(crate) mod eval;
pub(crate) mod experts;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod plan;
mod quantize;
pub(crate) mod report_args;
pub(crate) mod resume;
pub(crate) mod rtn;
pub(crate) mod run;
pub(crate) mod scheme_args;
pub(crate) mod smooth_quant;
pub(crate) mod verify;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::Context;

use crate::args::{Cli, Command, MethodName};

/// Runs the subcommand.
pub(crate) fn run(cli: &Cli) -> anyhow::Result<()> {
    if let Some(threads) = cli.threads {
        anyhow::ensure!(threads > 0, lite_job::JobError::Usage("--threads 0: give at least one thread".to_owned()));
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("cannot start the threads")?;
    }
    if let Some(path) = &cli.arch {
        arch::name(path)?;
    }
    match &cli.command {
        Command::AutoAwq(args) => quantize::run(MethodName::Awq, args, cli.format),
        Command::AutoGptq(args) => quantize::run(MethodName::Gptq, args, cli.format),
        Command::Calibrate(args) => calibrate::run(args, cli.format),
        Command::Env(args) => env::run(args, cli.format),
        Command::Eval(args) => eval::run(args, cli.format),
        Command::Generate(args) => generate::run(args, cli.format),
        Command::Convert(args) => convert::run(args, cli.format),
        Command::Inspect(args) => inspect::run(args, cli.format),
        Command::Verify(args) => verify::run(args, cli.format),
        Command::Rtn(args) => rtn::run(args, cli.format),
        Command::BlockedFp8(args) => blocked_fp8::run(args, cli.format),
        Command::SmoothQuant(args) => smooth_quant::run(args, cli.format),
        Command::Run(args) => run::run(args, cli.format),
        Command::Resume(args) => resume::run(args, cli),
        Command::Clean(args) => resume::clean(args, cli.format),
        Command::Plan(args) => plan::run(args, cli.format),
    }
}

/// A flag that Ctrl-C and SIGTERM set; a second Ctrl-C ends the process at once.
fn cancel_flag() -> anyhow::Result<Arc<AtomicBool>> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    if let Some(flag) = FLAG.get() {
        return Ok(flag.clone());
    }
    let flag = FLAG.get_or_init(Arc::default).clone();
    let set = flag.clone();
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::Relaxed) {
            #[allow(clippy::exit, reason = "the user insists; nothing under a final name is half written")]
            std::process::exit(130);
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(flag)
}
