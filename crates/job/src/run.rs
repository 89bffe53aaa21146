//! The run itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::Tensor;
use lite_calib::{CalibRequest, ModelTokenizer, Windows};
use lite_decoder::{Block, DecoderError, DecoderSpec, NoTap, Rope, Tap, with_cpu_slice};
use lite_model::{Checkpoint, CheckpointWriter, Dtype, atomic_write, edit_config};
use lite_quant::ScaleDtype;
use lite_runtime::QuantizedCheckpoint;
use lite_stats::StatsTap;

use crate::check::{Expected, check_tensors, compare_models, encode_edit, fingerprint};
use crate::fold::{missing, tensor, to_vec};
use crate::hidden::HiddenStates;
use crate::layer::{Folded, Solved, fold_block, folded_gram, solve};
use crate::passthrough::{count_not_finite, encode, not_finite};
use crate::source::ModelSource;
use crate::workdir::WorkDir;
use crate::{Action, CheckReport, Event, HubFetcher, JobError, Observer, Plan, Recipe, SiteReport, locate_model, prepare};

/// Largest change of a block's float output that folding may cause: f32 rounding, with room.
const FOLD_TOLERANCE: f64 = 1e-4;

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
    /// Where the text of the check came from.
    pub eval_source: Option<String>,
    /// Wall-clock seconds of the whole run.
    pub seconds: f64,
}

/// Plans, runs, checks and publishes.
///
/// `cancel` is looked at between batches; once set, the run ends with [`JobError::Interrupted`] and
/// leaves nothing that looks finished.
///
/// # Errors
/// See [`JobError`]; on any error the work directory holds no checkpoint of this run.
pub fn run(recipe: &Recipe, observer: &dyn Observer, cancel: &AtomicBool) -> Result<RunReport, JobError> {
    let start = Instant::now();
    WorkDir::check(&recipe.work_dir, None, recipe.overwrite)?;
    let model = locate_model(recipe, observer, cancel)?;
    let checkpoint = Checkpoint::open(&model)?;
    let plan = prepare(recipe, &checkpoint)?;
    for warning in &plan.warnings {
        observer.event(Event::Warning(warning));
    }
    for note in &plan.notes {
        observer.event(Event::Note(note));
    }
    observer.event(Event::Planned(&plan));
    let texts = Texts::load(recipe, &plan, observer, cancel)?;
    let (work, remains) = WorkDir::open(&recipe.work_dir, Some(checkpoint.root()), recipe.overwrite)?;
    if remains {
        observer.event(Event::Note("an earlier run did not finish here; its remains were cleared and the run starts over"));
    }
    let result = Runner { recipe, plan: &plan, checkpoint: &checkpoint, observer, cancel, work: &work }.produce(&texts);
    let (sites, check) = match result {
        Ok(done) => done,
        Err(error) => {
            work.abandon();
            return Err(error);
        }
    };
    work.commit()?;
    let report = RunReport {
        output: recipe.work_dir.clone(),
        layout: plan.layout.name(),
        source_bytes: plan.source_bytes,
        output_bytes: plan.output_bytes,
        bits_per_weight: plan.bits_per_weight(),
        sites,
        check,
        calibration: texts.calibration.map(|w| w.source.description),
        eval_source: texts.eval.map(|w| w.source.description),
        seconds: start.elapsed().as_secs_f64(),
    };
    observer.event(Event::Finished(&report));
    Ok(report)
}

/// Token windows for calibration and for the check.
struct Texts {
    calibration: Option<Windows>,
    eval: Option<Windows>,
}

impl Texts {
    fn load(recipe: &Recipe, plan: &Plan, observer: &dyn Observer, cancel: &AtomicBool) -> Result<Self, JobError> {
        let Some(spec) = &plan.spec else { return Ok(Self { calibration: None, eval: None }) };
        if plan.windows == 0 && plan.eval_windows == 0 {
            return Ok(Self { calibration: None, eval: None });
        }
        // The tokenizer's tables are large; they live only as long as the text is cut.
        let tokenizer = ModelTokenizer::from_dir(&plan.model, spec.vocab)?;
        let fetcher = HubFetcher::new(recipe, observer, cancel)?;
        let calibration = if plan.windows == 0 {
            None
        } else {
            let request = CalibRequest {
                dataset: recipe.calib.dataset.clone().unwrap_or_else(|| "wikitext2".to_owned()),
                samples: plan.windows,
                seqlen: plan.seqlen,
                seed: recipe.calib.seed,
                explicit: recipe.calib.dataset.is_some(),
            };
            Some(lite_calib::load(&request, &tokenizer, &fetcher)?)
        };
        let eval = match (plan.eval_windows, &recipe.eval.dataset) {
            (0, _) => None,
            (windows, None) => Some(lite_calib::held_out(&tokenizer, windows, plan.eval_seqlen)?),
            (windows, Some(name)) => {
                Some(lite_calib::eval_windows(name, &tokenizer, windows, plan.eval_seqlen, &fetcher)?)
            }
        };
        for windows in calibration.iter().chain(&eval) {
            for note in &windows.notes {
                observer.event(Event::Note(note));
            }
        }
        if let Some(windows) = &calibration {
            observer.event(Event::Calibration {
                windows: windows.tokens.len(),
                seqlen: plan.seqlen,
                source: &windows.source.description,
                digest: &windows.digest,
            });
        }
        Ok(Self { calibration, eval })
    }
}

struct Runner<'a> {
    recipe: &'a Recipe,
    plan: &'a Plan,
    checkpoint: &'a Checkpoint,
    observer: &'a dyn Observer,
    cancel: &'a AtomicBool,
    work: &'a WorkDir,
}

impl Runner<'_> {
    /// Writes and checks everything in the staging folder.
    fn produce(&self, texts: &Texts) -> Result<(Vec<SiteReport>, CheckReport), JobError> {
        let staging = self.work.staging();
        let outputs = self.plan.tensors.iter().flat_map(|row| row.outputs.iter().cloned()).collect();
        let writer = CheckpointWriter::create(&staging, outputs, self.recipe.max_shard_bytes)?;
        let mut expected = Expected::default();
        self.write_plain(&writer, &mut expected)?;
        let errors = match (&self.plan.spec, &texts.calibration) {
            (Some(spec), Some(windows)) => self.calibrated(spec, windows, &writer, &mut expected)?,
            _ => self.data_free(&writer, &mut expected)?,
        };
        writer.finish()?;
        self.checkpoint.copy_side_files(&staging)?;
        self.write_config(&staging)?;
        let check = self.check(&staging, texts, &expected)?;
        let report = |(site, error): (&crate::QuantSite, Option<f64>)| SiteReport {
            module: site.module.clone(),
            block: site.block,
            error,
        };
        Ok((self.plan.sites.iter().zip(errors).map(report).collect(), check))
    }

    fn go_on(&self) -> Result<(), JobError> {
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
                    let broken = count_not_finite(view.data, view.dtype);
                    if broken > 0 {
                        return Err(not_finite(&row.source, broken));
                    }
                    writer.write(&output.name, view.data)?;
                }
                Action::Convert => {
                    let values = self.checkpoint.tensor_f32(&row.source)?;
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
    fn write_linear(
        &self,
        module: &str,
        solved: &Solved,
        writer: &CheckpointWriter,
        expected: &mut Expected,
    ) -> Result<(), JobError> {
        if let Some(target) = self.recipe.target
            && let Some(violation) = lite_pack::targets::check_scales(target, module, &solved.quantized.scales)
        {
            return Err(JobError::Target { target: target.name().to_owned(), violations: vec![violation] });
        }
        for packed in self.plan.layout.pack(&solved.quantized)? {
            writer.write(&format!("{module}.{}", packed.suffix), &packed.data)?;
        }
        expected.linears.insert(module.to_owned(), fingerprint(&solved.quantized));
        Ok(())
    }

    /// Without data: linear by linear, nothing is run.
    fn data_free(&self, writer: &CheckpointWriter, expected: &mut Expected) -> Result<Vec<Option<f64>>, JobError> {
        let blocks = self.plan.sites.iter().map(|s| s.block + 1).max().unwrap_or(0);
        let mut clock = LayerClock::new(self.observer, blocks);
        for (i, site) in self.plan.sites.iter().enumerate() {
            self.go_on()?;
            if i == 0 || self.plan.sites[i - 1].block != site.block {
                clock.started(site.block);
            }
            let name = format!("{}.weight", site.module);
            let weight = self.checkpoint.tensor_f32(&name)?;
            let (n, k) = (site.out_features, site.in_features);
            let solved = solve(&site.module, &weight, n, k, None, &self.plan.scheme, self.plan.range)?;
            self.write_linear(&site.module, &solved, writer, expected)?;
            self.checkpoint.release([name.as_str()]);
            if self.plan.sites.get(i + 1).is_none_or(|next| next.block != site.block) {
                clock.done(site.block, &[]);
            }
        }
        Ok(vec![None; self.plan.sites.len()])
    }

    /// With data: block by block, each fed with the outputs of the quantized blocks before it.
    fn calibrated(
        &self,
        spec: &DecoderSpec,
        windows: &Windows,
        writer: &CheckpointWriter,
        expected: &mut Expected,
    ) -> Result<Vec<Option<f64>>, JobError> {
        let plan = self.plan;
        let source = ModelSource::new(self.checkpoint, spec);
        let (count, seqlen) = (windows.tokens.len(), plan.seqlen);
        let window_values = seqlen * spec.hidden;
        let mut hidden = if plan.memory.spooled {
            HiddenStates::in_file(&self.work.spool_file(), count, window_values)?
        } else {
            HiddenStates::in_memory(count, window_values)
        };
        for (i, window) in windows.tokens.iter().enumerate() {
            self.go_on()?;
            hidden.write(i, &lite_runtime::embed(spec, &source, window)?)?;
        }
        self.checkpoint.release([spec.embed.weight.as_str()]);
        let rope = Rope::new(spec, seqlen, &plan.device)?;
        let storage = storage_types(plan);
        let storage = |name: &str| storage.get(name).copied().unwrap_or(ScaleDtype::F32);
        let mut errors: BTreeMap<String, f64> = BTreeMap::new();
        let mut clock = LayerClock::new(self.observer, spec.blocks.len());
        for block_spec in &spec.blocks {
            let index = block_spec.index;
            clock.started(index);
            let mut block = Block::load(spec, index, &source, &plan.device)?;
            let needs: Vec<String> =
                spec.tensors().into_iter().filter(|t| t.block == Some(index)).map(|t| t.name).collect();
            self.checkpoint.release(needs.iter().map(String::as_str));

            clock.step(index, "calibrate");
            let mut tap = StatsTap::new(block_spec);
            let first = self.input(&hidden, 0, 1, spec)?;
            let before = block.forward(&first, &rope, &mut NoTap)?;
            self.each_batch(&mut hidden, spec, &block, &rope, &mut tap, false)?;
            let stats = tap.finish()?;

            clock.step(index, "search");
            let folded = fold_block(&mut block, block_spec, &stats, &plan.scheme, plan.range, plan.method, &storage)?;
            let after = block.forward(&first, &rope, &mut NoTap)?;
            check_fold(index, &first, &before, &after)?;

            clock.step(index, "round");
            for edit in &folded.edits {
                let data = encode_edit(plan, &edit.tensor, &edit.values)?;
                expected.tensor(&edit.tensor, &data);
                writer.write(&edit.tensor, &data)?;
            }
            let found = self.quantize_block(&mut block, block_spec, &stats, &folded, writer, expected)?;
            drop(stats);
            let layer_errors: Vec<f64> = found.iter().map(|(_, error)| *error).collect();
            errors.extend(found);

            // The last block's outputs feed nothing.
            if index + 1 < spec.blocks.len() {
                clock.step(index, "propagate");
                self.each_batch(&mut hidden, spec, &block, &rope, &mut NoTap, true)?;
            }
            clock.done(index, &layer_errors);
        }
        Ok(plan.sites.iter().map(|site| errors.get(&site.module).copied()).collect())
    }

    /// Quantizes and writes every linear of a folded block, and leaves the dequantized weights in it.
    fn quantize_block(
        &self,
        block: &mut Block,
        spec: &lite_decoder::BlockSpec,
        stats: &lite_stats::BlockStats,
        folded: &Folded,
        writer: &CheckpointWriter,
        expected: &mut Expected,
    ) -> Result<Vec<(String, f64)>, JobError> {
        let mut errors = Vec::new();
        let mut gram: Option<(lite_decoder::InputId, Vec<f32>)> = None;
        for site in &spec.sites {
            self.go_on()?;
            // Sites that share an input follow each other: one Gram matrix is at hand at a time.
            if gram.as_ref().is_none_or(|(input, _)| *input != site.input) {
                gram = folded_gram(stats, folded, site.input).map(|gram| (site.input, gram));
            }
            let weight = block.weight(site.id.role).ok_or_else(|| missing(site.id.role))?;
            let (shape, device, values) = (weight.dims().to_vec(), weight.device().clone(), to_vec(weight)?);
            let (n, k) = (site.out_features, site.in_features);
            let gram = gram.as_ref().map(|(_, gram)| gram.as_slice());
            let solved = solve(&site.module, &values, n, k, gram, &self.plan.scheme, self.plan.range)?;
            drop(values);
            self.write_linear(&site.module, &solved, writer, expected)?;
            block.set_weight(site.id.role, tensor(solved.quantized.dequantize(), &shape, &device)?)?;
            errors.extend(solved.error.map(|error| (site.module.clone(), error)));
        }
        Ok(errors)
    }

    fn input(&self, hidden: &HiddenStates, first: usize, count: usize, spec: &DecoderSpec) -> Result<Tensor, JobError> {
        let shape = [count, self.plan.seqlen, spec.hidden];
        tensor(hidden.read(first, count)?, &shape, &self.plan.device)
    }

    /// Runs all windows through `block`; `keep` replaces the hidden states by the outputs.
    fn each_batch<T: Tap>(
        &self,
        hidden: &mut HiddenStates,
        spec: &DecoderSpec,
        block: &Block,
        rope: &Rope,
        tap: &mut T,
        keep: bool,
    ) -> Result<(), JobError> {
        let windows = hidden.windows();
        let mut first = 0;
        while first < windows {
            self.go_on()?;
            let count = self.plan.batch.min(windows - first);
            let x = self.input(hidden, first, count, spec)?;
            let y = block.forward(&x, rope, tap)?;
            if keep {
                with_cpu_slice(&y, |values| hidden.write(first, values))??;
            }
            first += count;
        }
        Ok(())
    }

    fn write_config(&self, staging: &std::path::Path) -> Result<(), JobError> {
        let config = self.checkpoint.config();
        let mut set = Vec::new();
        if let Some((_, name)) = self.plan.dtype {
            let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            set.push((key, serde_json::Value::from(name)));
        }
        set.push(("quantization_config", self.plan.quantization_config.clone()));
        for (name, value) in &self.plan.layout_files {
            atomic_write(&staging.join(name), format!("{value:#}\n").as_bytes())?;
        }
        let text = edit_config(self.checkpoint.config_text(), &set)?;
        Ok(atomic_write(&staging.join("config.json"), text.as_bytes())?)
    }

    fn check(&self, staging: &std::path::Path, texts: &Texts, expected: &Expected) -> Result<CheckReport, JobError> {
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
                match compare_models(self.plan, spec, self.checkpoint, &written, windows, &progress) {
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

/// The float type of each tensor that is written.
fn storage_types(plan: &Plan) -> BTreeMap<&str, ScaleDtype> {
    let dtype = |dtype: Dtype| match dtype {
        Dtype::F16 => ScaleDtype::F16,
        Dtype::BF16 => ScaleDtype::BF16,
        _ => ScaleDtype::F32,
    };
    plan.tensors.iter().flat_map(|row| &row.outputs).map(|o| (o.name.as_str(), dtype(o.dtype))).collect()
}

/// A block's float output must not change by folding.
fn check_fold(block: usize, input: &Tensor, before: &Tensor, after: &Tensor) -> Result<(), JobError> {
    let norms = || -> Result<(f64, f64), candle_core::Error> {
        let square = |t: Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from);
        Ok((square((after - before)?)?, square((before - input)?)?))
    };
    let (change, size) = norms().map_err(DecoderError::from)?;
    let found = if size > 0.0 { (change / size).sqrt() } else { change.sqrt() };
    if found <= FOLD_TOLERANCE {
        return Ok(());
    }
    Err(JobError::Fold { block, found, allowed: FOLD_TOLERANCE })
}

/// Sends a block's events with the time it took.
struct LayerClock<'a> {
    observer: &'a dyn Observer,
    of: usize,
    start: Instant,
}

impl<'a> LayerClock<'a> {
    fn new(observer: &'a dyn Observer, of: usize) -> Self {
        Self { observer, of, start: Instant::now() }
    }

    fn started(&mut self, block: usize) {
        self.start = Instant::now();
        self.observer.event(Event::LayerStarted { block, of: self.of });
    }

    fn step(&self, block: usize, step: &'static str) {
        self.observer.event(Event::LayerStep { block, step });
    }

    /// `errors`: relative output error of each linear.
    fn done(&self, block: usize, errors: &[f64]) {
        let mean = errors.iter().map(|e| e * e).sum::<f64>() / errors.len().max(1) as f64;
        let error = (!errors.is_empty()).then(|| mean.sqrt());
        let seconds = self.start.elapsed().as_secs_f64();
        self.observer.event(Event::LayerDone { block, of: self.of, error, seconds });
    }
}
