//! `lite resume` and `lite clean`: what becomes of an interrupted run.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Context;
use clap::{Args, Parser};
use lite_job::{JobError, ResumeSettings, WorkDir, recorded_command};

use crate::args::{Cli, Command, Format, ResourceArgs};

#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// The work directory of the interrupted run
    #[arg(value_name = "DIR")]
    pub(crate) work_dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct CleanArgs {
    /// The work directory of the interrupted run
    #[arg(value_name = "DIR")]
    pub(crate) work_dir: PathBuf,
}

/// The command that is run again, if this process does that.
static AGAIN: OnceLock<Vec<String>> = OnceLock::new();

/// How a run with these flags goes on, and the command line that it notes for later.
pub(crate) fn settings(args: &ResourceArgs) -> ResumeSettings {
    ResumeSettings { restart: args.restart, checkpoint_seconds: args.checkpoint_seconds, command: command() }
}

/// The command line of this run, or of the one that is run again.
pub(crate) fn command() -> Vec<String> {
    let typed = || std::env::args_os().map(|argument| argument.into_string().ok()).collect::<Option<Vec<String>>>();
    // A command that is no text cannot be noted; the same command can still be given again.
    AGAIN.get().cloned().or_else(typed).unwrap_or_default()
}

/// Runs the command that began the run in a work directory, in the folder it was given in.
pub(crate) fn run(args: &ResumeArgs, cli: &Cli) -> anyhow::Result<()> {
    let work_dir = std::path::absolute(&args.work_dir).context("cannot find the current folder")?;
    let recorded = recorded_command(&work_dir)?;
    let arguments = with_work_dir(recorded.arguments, &work_dir);
    let broken = |why: String| {
        JobError::State(format!(
            "the command noted in `{}` cannot be run: {why}; give it again yourself",
            args.work_dir.display()
        ))
    };
    let mut again = Cli::try_parse_from(&arguments).map_err(|error| broken(error.to_string()))?;
    if matches!(again.command, Command::Resume(_)) {
        return Err(broken("it is `lite resume` itself".to_owned()).into());
    }
    if cli.format != Format::Auto {
        again.format = cli.format;
    }
    // The threads were started with what was typed now, if anything was.
    if cli.threads.is_some() {
        again.threads = None;
    }
    std::env::set_current_dir(&recorded.directory)
        .map_err(|error| broken(format!("its folder `{}`: {error}", recorded.directory.display())))?;
    AGAIN.get_or_init(|| arguments);
    super::run(&again)
}

/// The same command with this work directory: the folder may have been moved.
fn with_work_dir(mut arguments: Vec<String>, work_dir: &Path) -> Vec<String> {
    let new = work_dir.display().to_string();
    if let Some(at) = arguments.iter().position(|argument| argument == "--work-dir")
        && let Some(value) = arguments.get_mut(at + 1)
    {
        *value = new;
    } else if let Some(argument) = arguments.iter_mut().find(|argument| argument.starts_with("--work-dir=")) {
        *argument = format!("--work-dir={new}");
    } else {
        arguments.extend(["--work-dir".to_owned(), new]);
    }
    arguments
}

/// Removes what is left of an interrupted run.
pub(crate) fn clean(args: &CleanArgs, format: Format) -> anyhow::Result<()> {
    WorkDir::clean(&args.work_dir)?;
    if !matches!(format, Format::Json | Format::Quiet) {
        let shown = args.work_dir.display();
        writeln!(std::io::stderr(), "removed what an interrupted run left in {shown}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_directory_is_the_one_named_now() {
        let with = |arguments: &[&str]| {
            with_work_dir(arguments.iter().map(|a| (*a).to_owned()).collect(), Path::new("/new")).join(" ")
        };
        assert_eq!(
            with(&["lite", "auto_awq", "m", "--work-dir", "a", "--tp", "2"]),
            "lite auto_awq m --work-dir /new --tp 2"
        );
        assert_eq!(with(&["lite", "auto_awq", "m", "--work-dir=a"]), "lite auto_awq m --work-dir=/new");
        assert_eq!(with(&["lite", "auto_awq", "m"]), "lite auto_awq m --work-dir /new");
    }
}
