//! What the records of a block depend on. Two runs of one identity solve every block alike, bit for bit.
//!
//! Of the model: its config.json, the headers of its files, every tensor of up to a MiB and 16 samples of 4 KiB of
//! each larger one; to read all of a large model again would cost what resuming saves. Of the text: every token. Not
//! part of it, for no block depends on them: where the model and the result are, threads, shard size, the final check, and
//! the memory budget as long as it leaves the windows per forward pass what they were.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use lite_calib::Windows;
use lite_model::Checkpoint;
use sha2::{Digest, Sha256};

use crate::run::awaits_nothing;
use crate::texts::{TextCache, Texts};
use crate::{JobError, Observer, Plan, Recipe};

/// Tensors up to this size are read as a whole.
const WHOLE: usize = 1 << 20;
/// Samples of a larger one.
const SAMPLES: usize = 16;
/// Bytes of each.
const SAMPLE: usize = 4096;

/// Named values; BTreeMap, so that they are compared and written in one order.
pub(crate) type Identity = BTreeMap<String, String>;

/// The identity of this run.
///
/// # Errors
/// [`JobError::Model`] if the model cannot be read.
pub(crate) fn identity(
    recipe: &Recipe,
    plan: &Plan,
    checkpoint: &Checkpoint,
    windows: Option<&Windows>,
) -> Result<Identity, JobError> {
    // A new setting has to be put on one side or the other.
    let Recipe {
        model: _,
        // The decoder has the digest of that file.
        arch: _,
        revision: _,
        download_dir: _,
        work_dir: _,
        overwrite: _,
        eval: _,
        max_shard_bytes: _,
        max_memory: _,
        resume: _,
        tensor_parallel: _,
        // The plan has the files; no record is made from statistics.
        stats: _,
        // The plan has the device that came of it, and the batch.
        device: _,
        batch_size: _,
        method,
        solver,
        experts,
        overrides,
        ignore,
        scheme,
        power_of_two_scales,
        kv_cache,
        bits,
        group_size,
        symmetric,
        range,
        dtype,
        layout: _,
        target,
        calib,
    } = recipe;
    let mut all = Identity::new();
    let mut put = |name: &str, value: String| {
        all.insert(name.to_owned(), value);
    };
    put("version", env!("CARGO_PKG_VERSION").to_owned());
    put("model", model_digest(checkpoint)?);
    if let Some(definition) = plan.spec.as_ref().and_then(|spec| spec.definition.clone()) {
        put("arch", definition);
    }
    put("method", format!("{method:?}"));
    put("solver", format!("{solver:?}"));
    put("experts", format!("{experts:?}"));
    put("override", format!("{overrides:?}"));
    put("ignore", format!("{ignore:?}"));
    put("scheme", format!("{scheme:?}"));
    put("power-of-two scales", power_of_two_scales.to_string());
    put("kv-cache", format!("{kv_cache:?}"));
    put("w-bits", bits.to_string());
    put("w-group-size", group_size.to_string());
    put("symmetric", symmetric.to_string());
    put("range", format!("{range:?}"));
    put("dtype", format!("{dtype:?}"));
    put("layout", plan.layout.name().to_owned());
    put("target", target.map_or("none", |target| target.name()).to_owned());
    let text = match (&plan.statistics, windows) {
        (Some(statistics), _) => format!("{} ({})", statistics.description(), statistics.text_digest()),
        (None, Some(windows)) => format!("{} ({})", windows.source.description, windows.digest),
        (None, None) => "none".to_owned(),
    };
    put("calibration text", text);
    put("calib-samples", windows.map_or(plan.windows, |windows| windows.tokens.len()).to_string());
    put("calib-seqlen", plan.seqlen.to_string());
    put("seed", calib.seed.to_string());
    put("only what needs windows", calib.if_needed.to_string());
    put("batch-size", plan.batch.to_string());
    put("device", device_class(plan));
    put("plan", plan_digest(plan));
    Ok(all)
}

/// The identity of a run that was only planned, for [`same_identity`] later; its calibration text is read.
///
/// # Errors
/// As reading the text and the model gives them.
pub fn planned_identity(
    recipe: &Recipe,
    plan: &Plan,
    checkpoint: &Checkpoint,
    cache: &TextCache,
    observer: &dyn Observer,
    cancel: &AtomicBool,
) -> Result<BTreeMap<String, String>, JobError> {
    awaits_nothing(recipe)?;
    let texts = Texts::load(recipe, plan, cache, observer, cancel)?;
    identity(recipe, plan, checkpoint, texts.calibration.as_ref())
}

/// Whether a run is what was planned.
///
/// # Errors
/// [`JobError::State`] with every difference.
pub fn same_identity(planned: &BTreeMap<String, String>, found: &BTreeMap<String, String>) -> Result<(), JobError> {
    let differences = differences(planned, found);
    if differences.is_empty() {
        return Ok(());
    }
    Err(JobError::State(format!(
        "this run is not what was planned:\n  {}\nplan it again with `lite plan --out`, or run without --plan",
        differences.join("\n  ")
    )))
}

/// `NAME: OLD → NEW` of every value that differs.
pub(crate) fn differences(old: &Identity, new: &Identity) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let shown = |value: Option<&String>| value.map_or_else(|| "nothing".to_owned(), |v| lite_model::printable(v));
    let mut differs: Vec<&String> = names.into_iter().filter(|name| old.get(*name) != new.get(*name)).collect();
    // Its digest follows from the others, and says nothing to a reader.
    if differs.len() > 1 {
        differs.retain(|name| *name != "plan");
    }
    differs
        .into_iter()
        .map(|name| format!("{}: {} → {}", lite_model::printable(name), shown(old.get(name)), shown(new.get(name))))
        .collect()
}

/// Sums are formed in an order that depends on the device and on its vector width.
fn device_class(plan: &Plan) -> String {
    if !plan.device.is_cpu() {
        return "cuda".to_owned();
    }
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx512f") {
        return "cpu, AVX-512".to_owned();
    } else if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        return "cpu, AVX2".to_owned();
    }
    format!("cpu, {}", std::env::consts::ARCH)
}

fn model_digest(checkpoint: &Checkpoint) -> Result<String, JobError> {
    let mut hash = Sha256::new();
    hash.update(checkpoint.header_digest());
    for name in checkpoint.names() {
        // Experts may lie among others: copying them to look at samples would read all of the model.
        let data = checkpoint.stretch(name)?;
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update((data.len() as u64).to_le_bytes());
        if data.len() <= WHOLE {
            hash.update(data);
        } else {
            // The first sample begins with the tensor, the last one ends with it.
            let step = (data.len() - SAMPLE) / (SAMPLES - 1);
            (0..SAMPLES).for_each(|i| hash.update(&data[i * step..i * step + SAMPLE]));
        }
        checkpoint.release([name]);
    }
    Ok(hex(&hash.finalize()))
}

/// Which linears there are and how each is coded, which inputs are folded, and what is written.
fn plan_digest(plan: &Plan) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{:?}{:?}{:?}{:?}", plan.sites, plan.folds, plan.dtype, plan.added));
    for row in &plan.tensors {
        hash.update(format!("{row:?}"));
    }
    hex(&hash.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_told_by_name() {
        let of = |pairs: &[(&str, &str)]| -> Identity {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let (old, new) = (of(&[("a", "1"), ("b", "2"), ("c", "\u{1b}[31m")]), of(&[("a", "1"), ("b", "3")]));
        let told = differences(&old, &new);
        assert_eq!(told[0], "b: 2 → 3");
        assert!(told[1].starts_with("c: ") && told[1].ends_with("→ nothing") && !told[1].contains('\u{1b}'));
        assert!(differences(&old, &old).is_empty());
    }
}
