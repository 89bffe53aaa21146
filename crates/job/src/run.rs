//! The run itself.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use lite_model::{Checkpoint, CheckpointWriter, atomic_write, edit_config};
use lite_pack::PackedTensor;
use lite_quant::{InputQuantization, ScaleDtype, Weights};
use lite_runtime::{Engine, QuantizedCheckpoint};

use crate::check::{Expected, check_tensors, compare_models, fingerprint};
use crate::documents::{Documents, Finished, write_documents};
use crate::identity::identity;
use crate::journal::Journal;
use crate::passthrough::{count_not_finite, encode, not_finite};
use crate::source::source_f32;
use crate::texts::{TextCache, Texts};
use crate::workdir::WorkDir;
use crate::{
    Action, CheckReport, ErrorKind, Event, JobError, Observer, Plan, QuantSite, Recipe, SiteReport, locate_model,
    prepare,
};

/// What a finished run did.
#[derive(Debug, Clone)]
pub struct RunReport {
    /// Where the result is.
    pub output: PathBuf,
    /// Name of the layout.
    pub layout: &'static str,
    /// Bytes of the source's and the output's tensors.
    pub source_bytes: u64,
    /// Bytes of the output's tensors.
    pub output_bytes: u64,
    /// Average bits per quantized weight, with scales and zero points.
    pub bits_per_weight: f64,
    /// Every quantized linear.
    pub sites: Vec<SiteReport>,
    /// What was found on reopening.
    pub check: CheckReport,
    /// Where the calibration text came from; `None` without data.
    pub calibration: Option<String>,
    /// SHA-256 over the token ids of that text.
    pub calibration_digest: Option<String>,
    /// Where the text of the check came from.
    pub eval_source: Option<String>,
    /// SHA-256 over the token ids of that text.
    pub eval_digest: Option<String>,
    /// Wall-clock seconds of the whole run.
    pub seconds: f64,
}

/// [`run_with`] without documents.
///
/// # Errors
/// As [`run_with`].
pub fn run(recipe: &Recipe, observer: &dyn Observer, cancel: &AtomicBool) -> Result<RunReport, JobError> {
    run_with(recipe, observer, &|_| Ok(Vec::new()), cancel)
}

/// Refuses a job whose statistics are yet to be gathered.
///
/// # Errors
/// [`JobError::State`], saying how.
pub(crate) fn awaits_nothing(recipe: &Recipe) -> Result<(), JobError> {
    match &recipe.stats {
        Some(stats) if stats.awaited() => Err(JobError::State(format!(
            "the statistics in `{0}` are not gathered yet; run the job without --plan, or `lite calibrate MODEL --work-dir {0}` first",
            stats.folder.display()
        ))),
        _ => Ok(()),
    }
}

/// Plans, runs, checks and publishes.
///
/// `cancel` is looked at between batches; once set, the run ends with [`JobError::Interrupted`] and
/// leaves nothing that looks finished.
///
/// # Errors
/// See [`JobError`]; on any error the work directory holds no checkpoint of this run.
pub fn run_with(
    recipe: &Recipe,
    observer: &dyn Observer,
    documents: Documents<'_>,
    cancel: &AtomicBool,
) -> Result<RunReport, JobError> {
    run_sharing(recipe, observer, documents, cancel, &TextCache::default())
}

/// [`run_with`] as one of several jobs that share `texts`.
///
/// # Errors
/// As [`run_with`].
pub fn run_sharing(
    recipe: &Recipe,
    observer: &dyn Observer,
    documents: Documents<'_>,
    cancel: &AtomicBool,
    texts: &TextCache,
) -> Result<RunReport, JobError> {
    let start = Instant::now();
    WorkDir::finish_published(&recipe.work_dir);
    WorkDir::check_named(recipe)?;
    let model = locate_model(recipe, observer, cancel)?;
    let checkpoint = Checkpoint::open(&model)?;
    let plan = prepare(recipe, &checkpoint)?;
    awaits_nothing(recipe)?;
    for warning in &plan.warnings {
        observer.event(Event::Warning(warning));
    }
    for note in &plan.notes {
        observer.event(Event::Note(note));
    }
    observer.event(Event::Planned(&plan));
    let texts = Texts::load(recipe, &plan, texts, observer, cancel)?;
    // What is as fast as the disk starts over.
    let resumable = plan.statistics.is_none() && plan.spec.is_some();
    let windows = texts.calibration.as_ref().filter(|_| resumable);
    let open = if windows.is_some() || recipe.resume.restart { WorkDir::open_kept } else { WorkDir::open };
    let (work, remains) = open(&recipe.work_dir, Some(checkpoint.root()), recipe.overwrite)?;
    observer.event(Event::Opened { log: &work.log_file() });
    let mut journal = match windows {
        Some(windows) => {
            let identity = identity(recipe, &plan, &checkpoint, Some(windows))?;
            let (journal, notes) = Journal::open(&work, remains, identity, recipe, &plan)?;
            notes.iter().for_each(|note| observer.event(Event::Note(note)));
            Some(journal)
        }
        None => {
            work.clear()?;
            if remains {
                let note = "an earlier run did not finish here; its remains were cleared and the run starts over";
                observer.event(Event::Note(note));
            }
            None
        }
    };
    let runner = Runner { recipe, plan: &plan, checkpoint: &checkpoint, observer, cancel, work: &work };
    let report = |sites, check| RunReport {
        output: recipe.work_dir.clone(),
        layout: plan.layout.name(),
        source_bytes: plan.source_bytes,
        output_bytes: plan.output_bytes,
        bits_per_weight: plan.bits_per_weight(),
        sites,
        check,
        calibration: match &plan.statistics {
            Some(statistics) => Some(statistics.description()),
            None => texts.calibration.as_ref().map(|w| w.source.description.clone()),
        },
        calibration_digest: match &plan.statistics {
            Some(statistics) => Some(statistics.text_digest().to_owned()),
            None => texts.calibration.as_ref().map(|w| w.digest.clone()),
        },
        eval_source: texts.eval.as_ref().map(|w| w.source.description.clone()),
        eval_digest: texts.eval.as_ref().map(|w| w.digest.clone()),
        seconds: start.elapsed().as_secs_f64(),
    };
    let result = runner.produce(&texts, journal.as_mut()).and_then(|(sites, check)| {
        let report = report(sites, check);
        let staging = work.staging();
        let finished = Finished { checkpoint: &checkpoint, plan: &plan, report: &report, staging: &staging };
        write_documents(&finished, documents)?;
        Ok(report)
    });
    let mut report = match result {
        Ok(report) => report,
        Err(error) => {
            let again = matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::Io | ErrorKind::Resources);
            let done = journal.map_or(0, |journal| journal.done());
            if !again || done == 0 {
                work.abandon();
                return Err(error);
            }
            work.keep();
            let shown = recipe.work_dir.display();
            let resume =
                if recipe.resume.command.is_empty() { String::new() } else { format!(" or `lite resume {shown}`") };
            let next = format!("run the same command again{resume} to go on, or `lite clean {shown}` to remove them");
            return Err(JobError::Stopped { source: Box::new(error), done, of: plan.folds.len(), next });
        }
    };
    work.commit()?;
    report.seconds = start.elapsed().as_secs_f64();
    observer.event(Event::Finished(&report));
    Ok(report)
}

/// Bytes of a plain tensor that are in memory at a time.
pub(crate) const PART: usize = 64 << 20;

pub(crate) struct Runner<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) plan: &'a Plan,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) observer: &'a dyn Observer,
    pub(crate) cancel: &'a AtomicBool,
    pub(crate) work: &'a WorkDir,
}

impl Runner<'_> {
    /// Writes and checks everything in the staging folder.
    fn produce(
        &self,
        texts: &Texts,
        journal: Option<&mut Journal>,
    ) -> Result<(Vec<SiteReport>, CheckReport), JobError> {
        let staging = self.work.staging();
        let outputs = self.plan.tensors.iter().flat_map(|row| &row.outputs).chain(&self.plan.added).cloned().collect();
        let writer = CheckpointWriter::create(&staging, outputs, self.recipe.max_shard_bytes)?;
        let mut expected = Expected::default();
        self.write_plain(&writer, &mut expected)?;
        let sites = match (&self.plan.spec, &self.plan.statistics, &texts.calibration) {
            (Some(spec), Some(statistics), _) => {
                self.solve_from_statistics(spec, statistics, &writer, &mut expected)?
            }
            (Some(spec), None, Some(windows)) => self.calibrated(spec, windows, &writer, &mut expected, journal)?,
            _ => self.data_free(&writer, &mut expected)?,
        };
        writer.finish()?;
        self.checkpoint.copy_side_files(&staging)?;
        self.write_config(&staging)?;
        let check = self.check(&staging, texts, &expected)?;
        Ok((sites, check))
    }

    pub(crate) fn go_on(&self) -> Result<(), JobError> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(JobError::Interrupted(self.recipe.work_dir.clone()));
        }
        Ok(())
    }

    /// Copies and converts what is neither quantized nor rescaled.
    fn write_plain(&self, writer: &CheckpointWriter, expected: &mut Expected) -> Result<(), JobError> {
        for row in &self.plan.tensors {
            self.go_on()?;
            let [output] = row.outputs.as_slice() else { continue };
            match row.action {
                Action::Copy => {
                    let view = self.checkpoint.tensor(&row.source)?;
                    let mut broken = 0;
                    // Pages are let go once they are written.
                    let parts = view.data.chunks(PART).enumerate().inspect(|(i, part)| {
                        self.checkpoint.release_part(&row.source, 0..i * PART);
                        broken += count_not_finite(part, view.dtype);
                    });
                    writer.write_parts(&output.name, parts.map(|(_, part)| part))?;
                    if broken > 0 {
                        return Err(not_finite(&row.source, broken));
                    }
                }
                Action::Convert => {
                    let values = source_f32(self.checkpoint, &row.source)?;
                    let data = encode(&row.source, &values, output.dtype)?;
                    expected.tensor(&output.name, &data);
                    writer.write(&output.name, &data)?;
                }
                _ => continue,
            }
            self.checkpoint.release([row.source.as_str()]);
        }
        Ok(())
    }

    /// Packs and writes one solved linear.
    pub(crate) fn write_linear(
        &self,
        site: &QuantSite,
        weights: &Weights,
        input: Option<&InputQuantization>,
        writer: &CheckpointWriter,
        expected: &mut Expected,
    ) -> Result<(), JobError> {
        for packed in self.pack_linear(site, weights, input, expected)? {
            writer.write(&format!("{}.{}", site.module, packed.suffix), &packed.data)?;
        }
        Ok(())
    }

    /// The tensors of one solved linear; notes what must be read back.
    pub(crate) fn pack_linear(
        &self,
        site: &QuantSite,
        weights: &Weights,
        input: Option<&InputQuantization>,
        expected: &mut Expected,
    ) -> Result<Vec<PackedTensor>, JobError> {
        let scales = match weights {
            Weights::Int(linear) => &linear.scales,
            Weights::Float(linear) => &linear.scales,
        };
        let dtype = crate::schemes::scale_dtype(&site.scheme).unwrap_or(ScaleDtype::F32);
        // Scales saturate; one that did stands for smaller weights than there are.
        let too_large = scales.iter().filter(|scale| scale.is_nan() || **scale >= dtype.largest()).count();
        if too_large > 0 {
            return Err(JobError::Input(format!(
                "`{}`: {too_large} of its scales are too large for {dtype:?} (largest {:e}); use --dtype bfloat16, or leave it plain with --ignore",
                lite_model::printable(&site.module),
                dtype.largest()
            )));
        }
        if let Some(target) = self.recipe.target
            && let Some(violation) = lite_pack::targets::check_scales(target, &site.module, scales)
        {
            return Err(JobError::Target { target: target.name().to_owned(), violations: vec![violation] });
        }
        let packed = self.plan.layout.pack(weights, site.scheme.activations.as_ref(), input)?;
        expected.linears.insert(site.module.clone(), fingerprint(weights, input));
        Ok(packed)
    }

    fn write_config(&self, staging: &Path) -> Result<(), JobError> {
        let config = self.checkpoint.config();
        let mut set = Vec::new();
        if let Some((_, name)) = self.plan.dtype {
            let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            set.push((key, serde_json::Value::from(name)));
        }
        set.push(("quantization_config", self.plan.quantization_config.clone()));
        // What a wrapper model says of its language model's former codes no longer holds.
        for (key, value) in config {
            if value.get("quantization_config").is_some() {
                let mut inner = value.clone();
                if let Some(keys) = inner.as_object_mut() {
                    keys.shift_remove("quantization_config");
                }
                set.push((key.as_str(), inner));
            }
        }
        for (name, value) in &self.plan.layout_files {
            atomic_write(&staging.join(name), format!("{value:#}\n").as_bytes())?;
        }
        let text = edit_config(self.checkpoint.config_text(), &set)?;
        Ok(atomic_write(&staging.join("config.json"), text.as_bytes())?)
    }

    fn check(&self, staging: &Path, texts: &Texts, expected: &Expected) -> Result<CheckReport, JobError> {
        let written = QuantizedCheckpoint::open(staging)?;
        let progress = |done: usize, of: usize| {
            self.observer.event(Event::Checking { step: "tensors", done, of });
            self.go_on()
        };
        let (linears, plain) = check_tensors(self.plan, self.checkpoint, &written, expected, &progress)?;
        let comparison = match (&self.plan.spec, &texts.eval) {
            (Some(spec), Some(windows)) => {
                let progress = |step: &'static str, done: usize, of: usize| {
                    self.observer.event(Event::Checking { step, done, of });
                    !self.cancel.load(Ordering::Relaxed)
                };
                let engine = Engine::of(&written, spec)?;
                if engine.mixed() > 0 {
                    self.observer.event(Event::Note(&format!(
                        "{} inputs are read by linears that quantize them in different ways or not at all; the comparison leaves those inputs in f32",
                        engine.mixed()
                    )));
                }
                match compare_models(self.plan, spec, self.checkpoint, &written, &engine, windows, &progress) {
                    Err(JobError::Runtime(lite_runtime::RuntimeError::Interrupted)) => {
                        return Err(JobError::Interrupted(self.recipe.work_dir.clone()));
                    }
                    other => Some(other?),
                }
            }
            _ => None,
        };
        Ok(CheckReport { linears, plain, comparison })
    }
}

/// Sends a block's events with the time it took.
pub(crate) struct LayerClock<'a> {
    pub(crate) observer: &'a dyn Observer,
    of: usize,
    start: Instant,
}

impl<'a> LayerClock<'a> {
    pub(crate) fn new(observer: &'a dyn Observer, of: usize) -> Self {
        Self { observer, of, start: Instant::now() }
    }

    pub(crate) fn started(&mut self, block: usize) {
        self.start = Instant::now();
        self.observer.event(Event::LayerStarted { block, of: self.of });
    }

    pub(crate) fn step(&self, block: usize, step: &'static str) {
        self.observer.event(Event::LayerStep { block, step });
    }

    /// `errors`: relative output error of each linear.
    pub(crate) fn done(&self, block: usize, errors: &[f64]) {
        let mean = errors.iter().map(|e| e * e).sum::<f64>() / errors.len().max(1) as f64;
        let error = (!errors.is_empty()).then(|| mean.sqrt());
        let seconds = self.start.elapsed().as_secs_f64();
        self.observer.event(Event::LayerDone { block, of: self.of, error, seconds });
    }
}
