//! `--arch`: architectures that files describe.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lite_job::{JobError, Recipe};
use lite_recipe::{RecipeError, register_architecture};
use serde_json::Value;

/// The file named on the command line.
static NAMED: OnceLock<PathBuf> = OnceLock::new();

/// Makes the architecture of the file after `--arch` known to whatever opens a model in this process.
pub(crate) fn name(path: &Path) -> anyhow::Result<()> {
    register_architecture(path)?;
    if NAMED.get_or_init(|| path.to_owned()) != path {
        let message = "--arch is part of the command that is run again; leave it out here".to_owned();
        return Err(JobError::Usage(message).into());
    }
    Ok(())
}

/// The file named on the command line.
pub(crate) fn named() -> Option<PathBuf> {
    NAMED.get().cloned()
}

/// The same as what `--set` of a recipe file would be.
pub(crate) fn set() -> Option<String> {
    NAMED.get().map(|path| format!("arch={}", Value::from(path.to_string_lossy())))
}

/// Makes the architectures that recipes name known.
pub(crate) fn of<'r>(recipes: impl IntoIterator<Item = &'r Recipe>) -> Result<(), RecipeError> {
    recipes.into_iter().filter_map(|recipe| recipe.arch.as_deref()).try_for_each(register_architecture)
}
