//! The conversion itself: survey, write, reopen, publish.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lite_job::{Event, JobError, Observer, WorkDir, locate_model};
use lite_model::{
    Checkpoint, CheckpointWriter, OutputTensor, atomic_write, edit_config, free_space, printable, remove_from_config,
};
use lite_pack::targets::{Target, Verdict, check_scales};
use lite_pack::{Layout, Unpacked};
use lite_quant::{ActivationScheme, InputQuantization, Weights};
use lite_runtime::{FloatSource, QuantizedCheckpoint, StoredLinear};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::adapt::{Facts, restate};
use crate::choose::words;
use crate::documents::{Documents, write_documents};
use crate::nearest::round;
use crate::plain::{dtype_name, encode, relative_error};
use crate::plan::{Chosen, Other, Plan, Recipe, Survey, layout_of};
use crate::source::Source;
use crate::{ConvertError, PLAIN};

/// What a finished conversion did.
#[derive(Debug, Clone, Serialize)]
pub struct ConvertReport {
    /// Where the result is.
    pub output: PathBuf,
    /// The source's layout.
    pub from: String,
    /// The result's.
    pub layout: String,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the result's tensors.
    pub output_bytes: u64,
    /// Linears whose dequantized values are equal bit by bit.
    pub exact: usize,
    /// Linears that were rounded, in the order of the files.
    pub rounded: Vec<LinearError>,
    /// Other tensors, copied byte for byte.
    pub copied: usize,
    /// Engines that load the result.
    pub engines: Vec<String>,
    /// Things the user should know.
    pub notes: Vec<String>,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// What rounding did to one linear.
#[derive(Debug, Clone, Serialize)]
pub struct LinearError {
    /// Module name.
    pub module: String,
    /// The result's scheme in words.
    pub scheme: String,
    /// `‖Ŵ − W‖ / ‖W‖` over the dequantized weights.
    pub error: f64,
}

/// [`convert_with`] without documents.
///
/// # Errors
/// As [`convert_with`].
pub fn convert(recipe: &Recipe, observer: &dyn Observer, cancel: &AtomicBool) -> Result<ConvertReport, ConvertError> {
    convert_with(recipe, observer, &|_| Ok(Vec::new()), cancel)
}

/// Converts, checks and publishes.
///
/// `cancel` is looked at between linears.
///
/// # Errors
/// See [`ConvertError`]; on any error the work directory holds no checkpoint of this run.
pub fn convert_with(
    recipe: &Recipe,
    observer: &dyn Observer,
    documents: Documents<'_>,
    cancel: &AtomicBool,
) -> Result<ConvertReport, ConvertError> {
    let start = Instant::now();
    if recipe.layout.is_some() || recipe.target.is_none() {
        // A name nobody knows should not cost a download.
        layout_of(recipe, None)?;
    }
    let wanted = lite_job::Recipe {
        revision: recipe.revision.clone(),
        download_dir: recipe.download_dir.clone(),
        work_dir: recipe.work_dir.clone(),
        overwrite: recipe.overwrite,
        ..lite_job::Recipe::new(recipe.model.clone())
    };
    WorkDir::finish_published(&recipe.work_dir);
    WorkDir::check_named(&wanted)?;
    let folder = locate_model(&wanted, observer, cancel)?;
    WorkDir::check(&recipe.work_dir, Some(&folder), recipe.overwrite)?;
    let source = Source::open(&folder)?;
    let go_on = || match cancel.load(Ordering::Relaxed) {
        true => Err(ConvertError::Job(JobError::Interrupted(recipe.work_dir.clone()))),
        false => Ok(()),
    };
    let step = |step: &'static str, done: usize, of: usize| {
        observer.event(Event::Checking { step, done, of });
        go_on()
    };
    let surveys = survey(&source, &step)?;
    let plan = Plan::new(recipe, &source, &surveys)?;
    plan.warnings.iter().for_each(|warning| observer.event(Event::Warning(warning)));
    plan.notes.iter().for_each(|note| observer.event(Event::Note(note)));
    let output_bytes: u64 = plan.outputs.iter().map(OutputTensor::bytes).fold(0, u64::saturating_add);
    fit_disk(&recipe.work_dir, output_bytes)?;
    let (work, _) = WorkDir::open(&recipe.work_dir, Some(&folder), recipe.overwrite)?;
    let loads = |(target, verdict): &(Target, Verdict)| match verdict {
        Verdict::Loads(_) => Some(target.name().to_owned()),
        Verdict::Refuses(_) => None,
    };
    let report = |rounded: Vec<LinearError>| ConvertReport {
        output: recipe.work_dir.clone(),
        from: source
            .quantized()
            .map_or_else(
                || FloatSource::new(source.checkpoint()).kind_of_codes(),
                |quantized| quantized.layout().name(),
            )
            .to_owned(),
        layout: plan.layout.map_or(PLAIN, |layout| layout.name()).to_owned(),
        source_bytes: source.checkpoint().total_bytes(),
        output_bytes,
        exact: source.linears.len() - rounded.len(),
        rounded,
        copied: plan.others.iter().filter(|(_, what)| *what == Other::Copied).count(),
        engines: plan.engines.iter().filter_map(loads).collect(),
        notes: plan.notes.clone(),
        seconds: start.elapsed().as_secs_f64(),
    };
    let staging = work.staging();
    let run = Run { recipe, source: &source, plan: &plan, step: &step };
    let result = run.produce(&staging).map(report).and_then(|report| {
        write_documents(&source, &plan, &report, &staging, documents)?;
        Ok(report)
    });
    let mut report = match result {
        Ok(report) => report,
        Err(error) => {
            work.abandon();
            return Err(error);
        }
    };
    work.commit()?;
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

type Step<'a> = &'a dyn Fn(&'static str, usize, usize) -> Result<(), ConvertError>;

/// Reads every linear once: whether it can be read at all, its scheme, and what its values allow.
fn survey(source: &Source, step: Step<'_>) -> Result<Vec<Survey>, ConvertError> {
    let mut surveys = Vec::with_capacity(source.linears.len());
    for (done, linear) in source.linears.iter().enumerate() {
        step("reading", done, source.linears.len())?;
        let Unpacked { weights, input } = source.unpack(linear)?;
        source.release(linear);
        let scheme =
            lite_quant::LinearScheme { weights: weights.scheme(), activations: source.activations(&linear.module) };
        surveys.push(Survey { scheme, facts: Facts::of(&weights), input: input.is_some() });
    }
    Ok(surveys)
}

fn fit_disk(work_dir: &Path, wanted: u64) -> Result<(), ConvertError> {
    let absolute = std::path::absolute(work_dir).unwrap_or_else(|_| work_dir.to_owned());
    let free = absolute.ancestors().find(|path| path.exists()).and_then(free_space);
    match free {
        Some(free) if free < wanted.saturating_add(16 << 20) => Err(JobError::Resources(format!(
            "the result needs about {} MB on the disk of `{}`, {} MB are free: free some space or choose another --work-dir",
            wanted / 1_000_000,
            work_dir.display(),
            free / 1_000_000
        ))
        .into()),
        _ => Ok(()),
    }
}

/// SHA-256 of what a linear computes with.
type Fingerprint = [u8; 32];

fn fingerprint(values: &[f32], input: Option<&InputQuantization>) -> Fingerprint {
    let mut hash = Sha256::new();
    let mut buffer = Vec::with_capacity(4 * 4096);
    for chunk in values.chunks(4096) {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
        hash.update(&buffer);
    }
    if let Some(input) = input {
        hash.update(input.scale.to_le_bytes());
        hash.update(input.zero_point.to_le_bytes());
    }
    hash.finalize().into()
}

struct Run<'a> {
    recipe: &'a Recipe,
    source: &'a Source,
    plan: &'a Plan,
    step: Step<'a>,
}

impl Run<'_> {
    /// Writes and checks everything in the staging folder.
    fn produce(&self, staging: &Path) -> Result<Vec<LinearError>, ConvertError> {
        let writer = CheckpointWriter::create(staging, self.plan.outputs.clone(), self.recipe.max_shard_bytes)?;
        let checkpoint = self.source.checkpoint();
        for (name, what) in &self.plan.others {
            (self.step)("copying", 0, 0)?;
            if *what == Other::Copied {
                writer.write(name, &checkpoint.tensor(name)?.data)?;
                checkpoint.release([name.as_str()]);
            }
        }
        let (mut expected, mut errors) = (BTreeMap::new(), Vec::new());
        let linears = &self.source.linears;
        for (done, linear) in linears.iter().enumerate() {
            (self.step)("converting", done, linears.len())?;
            let (found, error) = match self.plan.layout {
                Some(layout) => self.pack(layout, linear, &self.plan.chosen[done], &writer)?,
                None => self.dequantize(linear, &writer)?,
            };
            expected.insert(linear.module.as_str(), found);
            errors.extend(error);
            self.source.release(linear);
        }
        writer.finish()?;
        checkpoint.copy_side_files(staging)?;
        self.write_config(staging)?;
        self.check(staging, &expected)?;
        Ok(errors)
    }

    /// Packs and writes one linear; returns what must be read back, and what rounding did.
    fn pack(
        &self,
        layout: &dyn Layout,
        linear: &StoredLinear,
        chosen: &Chosen,
        writer: &CheckpointWriter,
    ) -> Result<(Fingerprint, Option<LinearError>), ConvertError> {
        let Unpacked { weights, input } = self.source.unpack(linear)?;
        let module = || linear.module.clone();
        let values = weights.dequantize();
        let (packed, expected, error) = if chosen.rounded {
            let (n, k) = (linear.out_features, linear.in_features);
            let rounded = round(&values, n, k, &chosen.scheme.weights)
                .map_err(|error| ConvertError::Input(format!("`{}`: {error}", printable(&linear.module))))?;
            let kept = chosen.scheme.activations == self.source.activations(&linear.module);
            let input = input.filter(|_| kept);
            let new = rounded.dequantize();
            let error = relative_error(&values, &new);
            let error = LinearError { module: module(), scheme: words(&chosen.scheme), error };
            ((rounded, input), fingerprint(&new, input.as_ref()), Some(error))
        } else {
            let restated = restate(&weights, &chosen.scheme.weights).ok_or_else(|| ConvertError::CannotHold {
                module: module(),
                reason: format!("it is no {}", words(&chosen.scheme)),
            })?;
            ((restated, input), fingerprint(&values, input.as_ref()), None)
        };
        let (weights, input) = packed;
        if let (Some(target), Weights::Int(ints)) = (self.recipe.target, &weights)
            && let Some(violation) = check_scales(target, &linear.module, &ints.scales)
            && violation.severity == lite_pack::targets::Severity::Refused
        {
            return Err(JobError::Target { target: target.name().to_owned(), violations: vec![violation] }.into());
        }
        let activations: Option<&ActivationScheme> = chosen.scheme.activations.as_ref();
        let tensors = layout
            .pack(&weights, activations, input.as_ref())
            .map_err(|source| ConvertError::Pack { module: module(), source })?;
        for tensor in tensors {
            writer.write(&format!("{}.{}", linear.module, tensor.suffix), &tensor.data)?;
        }
        Ok((expected, error))
    }

    /// Writes one linear as plain floats.
    fn dequantize(
        &self,
        linear: &StoredLinear,
        writer: &CheckpointWriter,
    ) -> Result<(Fingerprint, Option<LinearError>), ConvertError> {
        let values = self.source.unpack(linear)?.weights.dequantize();
        let (bytes, rounded) = encode(&values, self.plan.dtype).ok_or_else(|| {
            ConvertError::Usage(format!(
                "`{}` holds values too large for {:?}; use --dtype bfloat16",
                printable(&linear.module),
                self.plan.dtype
            ))
        })?;
        writer.write(&format!("{}.weight", linear.module), &bytes)?;
        let error = relative_error(&values, &rounded);
        let scheme = dtype_name(self.plan.dtype).to_owned();
        let error = (error > 0.0).then(|| LinearError { module: linear.module.clone(), scheme, error });
        Ok((Sha256::digest(&bytes).into(), error))
    }

    fn write_config(&self, staging: &Path) -> Result<(), ConvertError> {
        let checkpoint = self.source.checkpoint();
        let mut set = Vec::new();
        for (key, value) in checkpoint.config() {
            // What a wrapper model says of its language model's former codes no longer holds.
            if value.get("quantization_config").is_some() {
                let mut inner = value.clone();
                if let Some(keys) = inner.as_object_mut() {
                    keys.shift_remove("quantization_config");
                }
                set.push((key.as_str(), inner));
            }
        }
        let text = match &self.plan.config {
            Some(config) => {
                set.push(("quantization_config", config.clone()));
                checkpoint.config_text().to_owned()
            }
            None => {
                if self.recipe.dtype.is_some() {
                    let key = if checkpoint.config().contains_key("dtype") { "dtype" } else { "torch_dtype" };
                    set.push((key, Value::from(dtype_name(self.plan.dtype))));
                }
                remove_from_config(checkpoint.config_text(), &["quantization_config"])?
            }
        };
        for (name, value) in &self.plan.layout_files {
            atomic_write(&staging.join(name), format!("{value:#}\n").as_bytes())?;
        }
        let text = edit_config(&text, &set)?;
        Ok(atomic_write(&staging.join("config.json"), text.as_bytes())?)
    }

    /// Reads everything back.
    fn check(&self, staging: &Path, expected: &BTreeMap<&str, Fingerprint>) -> Result<(), ConvertError> {
        let differs = |name: &str, what| ConvertError::Differs { name: name.to_owned(), what };
        let (quantized, plain): (Option<QuantizedCheckpoint>, Option<Checkpoint>) = match self.plan.layout {
            Some(_) => (Some(QuantizedCheckpoint::open(staging).map_err(ConvertError::Source)?), None),
            None => (None, Some(Checkpoint::open(staging)?)),
        };
        let Some(out) = quantized.as_ref().map(QuantizedCheckpoint::checkpoint).or(plain.as_ref()) else {
            return Ok(());
        };
        let linears = &self.source.linears;
        for (done, linear) in linears.iter().enumerate() {
            (self.step)("comparing", done, linears.len())?;
            let found = match &quantized {
                Some(written) => {
                    let (module, n, k) = (&linear.module, linear.out_features, linear.in_features);
                    let Unpacked { weights, input } = written.linear(module, n, k).map_err(ConvertError::Source)?;
                    fingerprint(&weights.dequantize(), input.as_ref())
                }
                None => Sha256::digest(out.tensor(&format!("{}.weight", linear.module))?.data).into(),
            };
            if expected.get(linear.module.as_str()) != Some(&found) {
                return Err(differs(&linear.module, "values"));
            }
            let suffixes = self.plan.layout.map_or(&["weight"][..], |layout| layout.suffixes());
            let parts: Vec<String> = suffixes.iter().map(|suffix| format!("{}.{suffix}", linear.module)).collect();
            out.release(parts.iter().map(String::as_str));
        }
        for (name, _) in self.plan.others.iter().filter(|(_, what)| *what == Other::Copied) {
            let (new, old) = (out.tensor(name)?, self.source.checkpoint().tensor(name)?);
            if (new.dtype, new.shape, new.data) != (old.dtype, old.shape, old.data) {
                return Err(differs(name, "bytes"));
            }
            out.release([name.as_str()]);
            self.source.checkpoint().release([name.as_str()]);
        }
        let count = out.names().count();
        if count != self.plan.outputs.len() {
            return Err(differs("config.json", "the number of tensors"));
        }
        Ok(())
    }
}
