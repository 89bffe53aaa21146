//! `lite calibrate`: the float model on the calibration windows, and what its inputs are like.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Device;
use lite_calib::{ModelTokenizer, Windows};
use lite_decoder::{Block, DecoderSpec, Rope, WeightSource, with_cpu_slice};
use lite_model::{Checkpoint, CheckpointWriter, OutputTensor, atomic_write};
use lite_quant::{ScaleDtype, Scheme};
use lite_stats::StatsTap;
use sha2::{Digest, Sha256};

use crate::estimate::{Costs, MemoryEstimate};
use crate::hidden::HiddenStates;
use crate::limits::{batch_size, calibration_shape, device, fit_disk, fit_memory};
use crate::plan::{known_decoder, prepare, refuse_quantized};
use crate::rows::{architecture, described_architecture, plain_dtype};
use crate::run::LayerClock;
use crate::source::ModelSource;
use crate::statistics::{Facts, Statistics, inputs, tensors, write_input};
use crate::texts::calibration_windows;
use crate::workdir::WorkDir;
use crate::{Event, HubFetcher, JobError, Observer, Recipe, Solver, locate_model};

/// What gathering statistics will take.
#[derive(Debug)]
pub struct StatisticsPlan {
    /// `architectures[0]`.
    pub arch: String,
    /// Decoder blocks.
    pub blocks: usize,
    /// Inputs of all blocks: one Gram matrix each.
    pub inputs: usize,
    /// Bytes of the statistics.
    pub bytes: u64,
    /// Calibration windows.
    pub windows: usize,
    /// Tokens per window.
    pub seqlen: usize,
    /// Windows per forward pass.
    pub batch: usize,
    /// Memory.
    pub memory: MemoryEstimate,
    /// Bytes needed on disk while the run lasts.
    pub disk_bytes: u64,
    /// Free bytes where the work directory is, if known.
    pub disk_free: Option<u64>,
}

/// What was gathered.
#[derive(Debug, Clone)]
pub struct StatisticsReport {
    /// The folder of the statistics.
    pub output: PathBuf,
    /// Decoder blocks.
    pub blocks: usize,
    /// Inputs of all blocks.
    pub inputs: usize,
    /// Bytes of the statistics.
    pub bytes: u64,
    /// Tokens behind each of them.
    pub tokens: u64,
    /// The text, in words.
    pub calibration: String,
    /// SHA-256 over all token ids.
    pub text_digest: String,
    /// Wall-clock seconds of the whole run.
    pub seconds: f64,
}

/// Gathers the statistics of every input of every block of the float model and publishes them in the work directory.
///
/// Of `recipe`, what concerns the model's files, the calibration text and the resources is looked at; nothing is
/// quantized.
///
/// # Errors
/// See [`JobError`]; on any error the work directory holds no statistics of this run.
pub fn calibrate(recipe: &Recipe, observer: &dyn Observer, cancel: &AtomicBool) -> Result<StatisticsReport, JobError> {
    let start = Instant::now();
    WorkDir::finish_published(&recipe.work_dir);
    WorkDir::check(&recipe.work_dir, None, recipe.overwrite)?;
    let model = locate_model(recipe, observer, cancel)?;
    let checkpoint = Checkpoint::open(&model)?;
    refuse_quantized(&checkpoint)?;
    let spec = known_decoder(&checkpoint)?;
    if spec.blocks.iter().any(|block| block.moe().is_some()) {
        return Err(JobError::Unsupported(
            "a model with experts: statistics of every expert would take more room than the model; run the method itself, which gathers them expert by expert"
                .to_owned(),
        ));
    }
    let mut words = Words { notes: Vec::new(), warnings: checkpoint.warnings.clone() };
    let device = device(recipe, &mut words.notes)?;
    let plan = plan(recipe, &checkpoint, &spec, &mut words)?;
    words.warnings.iter().for_each(|warning| observer.event(Event::Warning(warning)));
    words.notes.iter().for_each(|note| observer.event(Event::Note(note)));
    observer.event(Event::PlannedStatistics(&plan));
    let windows = load_windows(recipe, &checkpoint, &spec, &plan, observer, cancel)?;
    let described = described_architecture(checkpoint.config(), Some(&spec));
    let facts = Facts::new(&checkpoint, &described, &windows, recipe.calib.seed)?;
    let (work, remains) = WorkDir::open(&recipe.work_dir, Some(checkpoint.root()), recipe.overwrite)?;
    observer.event(Event::Opened { log: &work.log_file() });
    if remains {
        observer
            .event(Event::Note("an earlier run did not finish here; its remains were cleared and the run starts over"));
    }
    let gatherer =
        Gatherer { recipe, plan: &plan, spec: &spec, checkpoint: &checkpoint, device, observer, cancel, work: &work };
    if let Err(error) = gatherer.produce(&windows, &facts) {
        work.abandon();
        return Err(error);
    }
    work.commit()?;
    Ok(StatisticsReport {
        output: recipe.work_dir.clone(),
        blocks: plan.blocks,
        inputs: plan.inputs,
        bytes: plan.bytes,
        tokens: windows.total_tokens(),
        calibration: windows.source.description,
        text_digest: windows.digest,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Gathers the statistics that `recipe` is to use and that are not there yet, in the folder it names, as [`calibrate`]
/// does. Everything that would stop the job afterwards is looked at first.
///
/// # Errors
/// As [`calibrate`], and those of planning the job.
pub fn gather_statistics(
    recipe: &Recipe,
    observer: &dyn Observer,
    cancel: &AtomicBool,
) -> Result<Option<StatisticsReport>, JobError> {
    let Some(wanted) = recipe.stats.as_ref().filter(|wanted| wanted.awaited()) else { return Ok(None) };
    WorkDir::finish_published(&recipe.work_dir);
    WorkDir::check_named(recipe)?;
    let model = locate_model(recipe, observer, cancel)?;
    prepare(recipe, &Checkpoint::open(&model)?)?;
    let gathering = Recipe { work_dir: wanted.folder.clone(), overwrite: false, stats: None, ..recipe.clone() };
    let report = calibrate(&gathering, observer, cancel)?;
    let told = format!("statistics gathered in `{}`, for this job and all that name it", report.output.display());
    observer.event(Event::Note(&told));
    Ok(Some(report))
}

/// What the user is told before the run begins.
struct Words {
    notes: Vec<String>,
    warnings: Vec<String>,
}

fn plan(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    words: &mut Words,
) -> Result<StatisticsPlan, JobError> {
    if recipe.calib.samples < 1 {
        return Err(JobError::Usage(format!(
            "--calib-samples {}: give the number of windows to gather statistics on, at least 1",
            recipe.calib.samples
        )));
    }
    let (windows, seqlen) = calibration_shape(recipe, Some(spec), &mut words.notes)?;
    let batch = batch_size(recipe, seqlen)?.min(windows);
    let bytes = tensors(spec).iter().map(OutputTensor::bytes).sum();
    // Any scheme will do: only shapes matter here.
    let sites = crate::tensors::sites_of(spec, Scheme::new(8, -1, true, ScaleDtype::F16)?.into());
    let costs = Costs {
        sites: &sites,
        blocks: &spec.blocks,
        hidden: spec.hidden,
        vocab: spec.vocab,
        windows,
        seqlen,
        batch,
        eval_windows: 0,
        eval_seqlen: 0,
        search: false,
        grams: true,
        budget: recipe.max_memory.is_some(),
        at_once: true,
        solver: Solver::NEAREST,
        source_bytes_per_weight: (plain_dtype(checkpoint).bitsize() / 8) as u64,
    };
    let widest = sites.iter().map(|s| s.in_features as u64).max().unwrap_or(0);
    // Nothing is solved; the bytes of one Gram matrix are copied to be written.
    let estimate = |batch| MemoryEstimate { solve: widest * widest * 4, ..Costs { batch, ..costs }.memory() };
    let (memory, batch) = fit_memory(&estimate, batch, recipe, &mut words.warnings)?;
    let disk_bytes = bytes + if memory.spooled { memory.hidden } else { 0 } + (16 << 20);
    let disk_free = fit_disk(&recipe.work_dir, disk_bytes)?;
    WorkDir::check(&recipe.work_dir, Some(checkpoint.root()), recipe.overwrite)?;
    Ok(StatisticsPlan {
        arch: architecture(checkpoint.config()),
        blocks: spec.blocks.len(),
        inputs: spec.blocks.iter().map(|block| inputs(block).len()).sum(),
        bytes,
        windows,
        seqlen,
        batch,
        memory,
        disk_bytes,
        disk_free,
    })
}

fn load_windows(
    recipe: &Recipe,
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    plan: &StatisticsPlan,
    observer: &dyn Observer,
    cancel: &AtomicBool,
) -> Result<Windows, JobError> {
    let tokenizer = ModelTokenizer::from_dir(checkpoint.root(), spec.vocab)?;
    let fetcher = HubFetcher::new(recipe, observer, cancel)?;
    let windows = calibration_windows(&recipe.calib, plan.windows, plan.seqlen, &tokenizer, &fetcher)?;
    windows.notes.iter().for_each(|note| observer.event(Event::Note(note)));
    observer.event(Event::Calibration {
        windows: windows.tokens.len(),
        seqlen: plan.seqlen,
        source: &windows.source.description,
        digest: &windows.digest,
    });
    Ok(windows)
}

/// SHA-256 of what was written, by tensor.
type Digests = BTreeMap<String, [u8; 32]>;

struct Gatherer<'a> {
    recipe: &'a Recipe,
    plan: &'a StatisticsPlan,
    spec: &'a DecoderSpec,
    checkpoint: &'a Checkpoint,
    device: Device,
    observer: &'a dyn Observer,
    cancel: &'a AtomicBool,
    work: &'a WorkDir,
}

impl Gatherer<'_> {
    /// Writes and checks everything in the staging folder.
    fn produce(&self, windows: &Windows, facts: &Facts) -> Result<(), JobError> {
        let staging = self.work.staging();
        let writer = CheckpointWriter::create(&staging, tensors(self.spec), self.recipe.max_shard_bytes)?;
        let digests = self.gather(windows, &writer)?;
        writer.finish()?;
        atomic_write(&staging.join("config.json"), facts.text()?.as_bytes())?;
        let written = Statistics::open(&staging)?;
        written.check_tensors(self.spec)?;
        for (done, (name, digest)) in digests.iter().enumerate() {
            self.go_on()?;
            self.observer.event(Event::Checking { step: "tensors", done, of: digests.len() });
            if *digest != written.digest(name)? {
                return Err(JobError::Verification(format!(
                    "`{name}`: values read back from the output differ from what was written; the disk may be faulty: nothing was published"
                )));
            }
        }
        Ok(())
    }

    /// Block by block, each fed with the outputs of the float blocks before it.
    fn gather(&self, windows: &Windows, writer: &CheckpointWriter) -> Result<Digests, JobError> {
        let source = ModelSource::new(self.checkpoint, self.spec);
        let mut hidden = self.embedded(windows, &source)?;
        let rope = Rope::new(self.spec, self.plan.seqlen, &self.device)?;
        let mut clock = LayerClock::new(self.observer, self.spec.blocks.len());
        let mut digests = Digests::new();
        for block_spec in &self.spec.blocks {
            let index = block_spec.index;
            clock.started(index);
            let block = Block::load(self.spec, index, &source, &self.device)?;
            let names = self.spec.tensors().into_iter().filter(|t| t.block == Some(index));
            let names: Vec<String> = names.map(|t| t.name).collect();
            source.release(&names);
            clock.step(index, "calibrate");
            let mut tap = StatsTap::new(block_spec);
            for first in (0..hidden.windows()).step_by(self.plan.batch) {
                self.go_on()?;
                let count = self.plan.batch.min(hidden.windows() - first);
                let shape = [count, self.plan.seqlen, self.spec.hidden];
                let x = crate::fold::tensor(hidden.read(first, count)?, &shape, &self.device)?;
                let y = block.forward(&x, &rope, &mut tap)?;
                with_cpu_slice(&y, |values| hidden.write(first, values))??;
            }
            clock.step(index, "write");
            for (input, stats) in tap.finish()?.iter() {
                write_input(*input, stats, |name, data| {
                    digests.insert(name.to_owned(), Sha256::digest(data).into());
                    Ok(writer.write(name, data)?)
                })?;
            }
            clock.done(index, &[]);
        }
        Ok(digests)
    }

    /// The embedded windows, in memory or in a file.
    fn embedded(&self, windows: &Windows, source: &ModelSource<'_>) -> Result<HiddenStates, JobError> {
        let (count, values) = (windows.tokens.len(), self.plan.seqlen * self.spec.hidden);
        let mut hidden = if self.plan.memory.spooled {
            HiddenStates::in_file(&self.work.spool_file("hidden"), count, values)?
        } else {
            HiddenStates::in_memory(count, values)
        };
        for (i, window) in windows.tokens.iter().enumerate() {
            self.go_on()?;
            hidden.write(i, &lite_runtime::embed(self.spec, source, window)?)?;
        }
        self.checkpoint.release([self.spec.embed.weight.as_str()]);
        Ok(hidden)
    }

    fn go_on(&self) -> Result<(), JobError> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(JobError::Interrupted(self.recipe.work_dir.clone()));
        }
        Ok(())
    }
}
