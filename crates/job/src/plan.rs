//! Everything that can be known before the first multiplication.

use std::path::{Path, PathBuf};

use candle_core::Device;
use lite_decoder::{BATCH_TOKENS, DecoderError, DecoderSpec, Fold};
use lite_model::{Checkpoint, Dtype, OutputTensor, printable};
use lite_pack::targets::{Severity, Target, Verdict, check, engines_for};
use lite_pack::{ConfigFacts, KvCacheScheme, Layout};
use lite_quant::{LinearScheme, Range};
use lite_runtime::FloatSource;

use crate::estimate::Costs;
use crate::limits::{
    batch_size, calibration_shape, check_attention, check_groups, check_schemes, check_shape, check_solver, device,
    fit_disk, fit_memory,
};
use crate::rows::{
    architecture, check_described, check_towers, choose_layout, described_architecture, exact_folds, ignored_linears,
    output_dtype, plain_dtype, plan_tensors, rescaled_tensors, site_facts,
};
use crate::schemes::{common, layout_scale_dtype, needs_windows};
use crate::source::{holds_float_codes, stored_embedding};
use crate::statistics::{Statistics, to_be_gathered};
use crate::tensors::{guess_sites, sites_of};
use crate::workdir::WorkDir;
use crate::{Action, ExpertSettings, JobError, MemoryEstimate, Method, QuantSite, Recipe, Solver, TensorPlan, Work};

/// What a run will do: per tensor, and in all.
#[derive(Debug)]
pub struct Plan {
    /// The model's folder.
    pub model: PathBuf,
    /// `architectures[0]`.
    pub arch: String,
    /// The decoder, where it is known; without one there is no calibration and no forward check.
    pub spec: Option<DecoderSpec>,
    /// How linears are coded that no rule sets apart.
    pub scheme: LinearScheme,
    /// Powers of two as the scales of floats.
    pub power_of_two_scales: bool,
    /// How the engine's cache is quantized.
    pub kv_cache: Option<KvCacheScheme>,
    /// How ranges are chosen.
    pub range: Range,
    /// How scales are found.
    pub method: Method,
    /// How packed weights are laid out.
    pub layout: &'static dyn Layout,
    /// Linears to quantize, in the order of the blocks.
    pub sites: Vec<QuantSite>,
    /// Linears inside blocks that stay plain by a rule.
    pub plain_sites: Vec<QuantSite>,
    /// By block: the folds that the method uses.
    pub folds: Vec<Vec<Fold>>,
    /// How codes are chosen.
    pub solver: Solver,
    /// What happens to experts that few tokens reach.
    pub experts: ExpertSettings,
    /// One row for every source tensor.
    pub tensors: Vec<TensorPlan>,
    /// Tensors that no source tensor stands behind: scales of the cache.
    pub added: Vec<OutputTensor>,
    /// `quantization_config` of the output.
    pub quantization_config: serde_json::Value,
    /// Files that the layout wants beside the weights.
    pub layout_files: Vec<(&'static str, serde_json::Value)>,
    /// Type of plain tensors that are converted, and its name in `config.json`.
    pub dtype: Option<(Dtype, &'static str)>,
    /// Calibration windows; 0 without data.
    pub windows: usize,
    /// Tokens per calibration window.
    pub seqlen: usize,
    /// What stands for those windows, if they are not to be run.
    pub statistics: Option<Statistics>,
    /// Windows of the final check.
    pub eval_windows: usize,
    /// Tokens per window of the final check.
    pub eval_seqlen: usize,
    /// Calibration windows per forward pass.
    pub batch: usize,
    /// Where blocks run.
    pub device: Device,
    /// Bytes of the source's tensors.
    pub source_bytes: u64,
    /// Bytes of the output's tensors.
    pub output_bytes: u64,
    /// Bytes needed on disk while the run lasts.
    pub disk_bytes: u64,
    /// Free bytes where the work directory is, if known.
    pub disk_free: Option<u64>,
    /// Memory.
    pub memory: MemoryEstimate,
    /// Floating-point work.
    pub work: Work,
    /// Which engines load the result.
    pub engines: Vec<(Target, Verdict)>,
    /// Things the user should know.
    pub notes: Vec<String>,
    /// Things the user should worry about.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Average bits per weight over the quantized linears, with scales and zero points.
    pub fn bits_per_weight(&self) -> f64 {
        let weights: u64 = self.sites.iter().map(|s| s.out_features as u64 * s.in_features as u64).sum();
        let quantized = |row: &&TensorPlan| matches!(row.action, Action::Quantize { .. });
        let bytes: u64 =
            self.tensors.iter().filter(quantized).flat_map(|row| &row.outputs).map(OutputTensor::bytes).sum();
        bytes as f64 * 8.0 / weights.max(1) as f64
    }

    /// Windows of `seqlen` tokens that make one batch of the usual size.
    pub fn batch_for(&self, seqlen: usize) -> usize {
        (self.batch * self.seqlen.max(1)).max(BATCH_TOKENS).div_ceil(seqlen.max(1) * 2).max(1)
    }
}

/// Checks a recipe against a model and plans the run. Where statistics are yet to be gathered
/// ([`StatsSource::awaited`](crate::StatsSource::awaited)), the plan is that of a run that has them.
///
/// # Errors
/// Everything that can be known from `config.json` and the file headers: unknown decoders, tensors
/// that are missing or disagree with the config, group sizes that do not divide, a target that would
/// refuse the result, too little disk or memory.
pub fn prepare(recipe: &Recipe, checkpoint: &Checkpoint) -> Result<Plan, JobError> {
    let Some(wanted) = &recipe.stats else { return plan(recipe, checkpoint) };
    let statistics = if wanted.awaited() { None } else { Some(Statistics::open(&wanted.folder)?) };
    let spec = known_decoder(checkpoint).ok();
    if let Some(statistics) = &statistics {
        statistics.check_model(checkpoint, &described_architecture(checkpoint.config(), spec.as_ref()))?;
        statistics.check_wanted(wanted)?;
    }
    // Neither may be there yet.
    let place = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path)).ok();
    if place(&wanted.folder) == place(&recipe.work_dir) {
        return Err(JobError::Usage(format!(
            "the work directory `{}` is the folder of the statistics; choose another --work-dir",
            recipe.work_dir.display()
        )));
    }
    if spec.is_some_and(|spec| spec.blocks.iter().any(|block| block.moe().is_some())) {
        return Err(JobError::Unsupported(
            "--stats of a model with experts: their statistics are gathered expert by expert as the method runs; leave --stats out"
                .to_owned(),
        ));
    }
    let (recipe, notes) = match &statistics {
        Some(statistics) => statistics.adapt(recipe),
        None => to_be_gathered(recipe, &wanted.folder),
    };
    let mut plan = plan(&recipe, checkpoint)?;
    if let (Some(spec), Some(statistics)) = (&plan.spec, &statistics) {
        statistics.check_tensors(spec)?;
    }
    plan.notes.extend(notes);
    plan.statistics = statistics;
    Ok(plan)
}

/// The decoder that `config.json` describes, all of its tensors there.
pub(crate) fn known_decoder(checkpoint: &Checkpoint) -> Result<DecoderSpec, DecoderError> {
    let spec = DecoderSpec::of(checkpoint)?;
    let rename = stored_embedding(checkpoint, &spec);
    spec.check_tensors(&|name| {
        let stored = rename.as_ref().filter(|(asked, _)| asked == name).map_or(name, |(_, stored)| stored);
        checkpoint.info(stored).map(|info| info.shape.clone())
    })?;
    Ok(spec)
}

/// Refuses a model that holds codes and not weights. fp8 codes and MXFP4 with their scales pass: they are the weights, as
/// trained or published, and are read as the values they stand for.
pub(crate) fn refuse_quantized(checkpoint: &Checkpoint) -> Result<(), JobError> {
    if holds_float_codes(checkpoint)? {
        return Ok(());
    }
    let Some(found) = checkpoint.config().get("quantization_config").filter(|v| !v.is_null()) else { return Ok(()) };
    let method = found.get("quant_method").and_then(|m| m.as_str()).unwrap_or("unknown");
    Err(JobError::Unsupported(format!(
        "the model is already quantized (quant_method `{}`); its codes cannot be quantized again: give the original 16-bit checkpoint",
        printable(method)
    )))
}

/// The layout's config, with what only the run knows.
fn quantization_config(
    recipe: &Recipe,
    layout: &dyn Layout,
    facts: &ConfigFacts,
) -> Result<serde_json::Value, JobError> {
    let mut config = layout.quantization_config(facts)?;
    if recipe.power_of_two_scales
        && layout.name() == "fp8"
        && let Some(keys) = config.as_object_mut()
    {
        // DeepSeek's and LMDeploy's key: the engine's own scales of activations follow it.
        keys.insert("scale_fmt".to_owned(), "ue8m0".into());
    }
    Ok(config)
}

/// Whether a calibrated run looks at the inputs of linears without making Gram matrices of them.
pub(crate) fn gathers_inputs_only(recipe: &Recipe) -> bool {
    let light = recipe.calib.if_needed || matches!(recipe.method, Method::SmoothQuant { .. });
    light && recipe.solver.rounding == crate::Rounding::Nearest
}

/// [`prepare`] of a recipe whose calibration settings are final.
fn plan(recipe: &Recipe, checkpoint: &Checkpoint) -> Result<Plan, JobError> {
    let data_free = recipe.calib.samples == 0 || (recipe.calib.if_needed && !needs_windows(recipe));
    if recipe.calib.samples < 0 {
        return Err(JobError::Usage(format!(
            "--calib-samples {}: give a number of windows, or 0 to quantize without data",
            recipe.calib.samples
        )));
    }
    refuse_quantized(checkpoint)?;
    let config = checkpoint.config();
    let mut notes = Vec::new();
    let mut warnings = checkpoint.warnings.clone();
    if config.get("auto_map").is_some_and(|map| !map.is_null()) {
        warnings.push(
            "config.json names Python code of the model's own (`auto_map`); it is copied along, and never run here"
                .to_owned(),
        );
    }
    if holds_float_codes(checkpoint)? {
        let kind = FloatSource::new(checkpoint).kind_of_codes();
        notes.push(format!("the source's weights are {kind} codes; they are read as the values they stand for"));
    }
    if checkpoint.fused_tensors() > 0 {
        notes.push("experts that the source stores in one tensor per layer are written one by one".to_owned());
    }
    let spec = match known_decoder(checkpoint) {
        Ok(spec) => Some(spec),
        Err(error) if data_free && error.kind() == lite_decoder::ErrorKind::Unsupported => {
            notes.push(format!("{error}; linears were found by name and shape, and the result is not run"));
            None
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(spec) = &spec {
        check_towers(checkpoint, spec)?;
        check_described(recipe, spec)?;
    }
    let arch = architecture(config);
    let plain = plain_dtype(checkpoint);
    let (scale_dtype, dtype) = output_dtype(recipe.dtype, plain);
    let layout = choose_layout(recipe, &common(recipe, scale_dtype)?)?;
    let scheme = common(recipe, layout_scale_dtype(layout, scale_dtype))?;
    let mut sites = match &spec {
        Some(spec) => sites_of(spec, scheme),
        None => guess_sites(checkpoint, scheme, &mut notes),
    };
    if sites.is_empty() {
        return Err(JobError::Unsupported(
            "no linear was found inside decoder blocks (two-dimensional `….layers.N.….weight` tensors)".to_owned(),
        ));
    }
    check_solver(recipe, data_free)?;
    check_attention(recipe, spec.as_ref())?;
    let plain_sites = crate::rules::apply(recipe, &mut sites)?;
    check_groups(&sites)?;
    check_schemes(recipe, &sites, data_free)?;
    for site in &sites {
        let held = layout.check(&site.scheme, site.out_features, site.in_features);
        held.map_err(|error| match recipe.target.filter(|_| recipe.layout.is_none()) {
            Some(target) => JobError::Unsupported(format!(
                "{} has no layout for {}: {error}",
                target.name(),
                crate::schemes::words(&site.scheme)
            )),
            None => error.into(),
        })?;
    }
    if recipe.solver.tune && spec.iter().flat_map(|spec| &spec.blocks).any(|block| block.moe().is_some()) {
        notes.push("blocks with experts are not tuned: their codes are solved and refined only".to_owned());
    }
    let folds = exact_folds(spec.as_ref(), &sites, recipe.method, data_free);
    let ignored = ignored_linears(checkpoint, spec.as_ref(), &sites);
    let facts = site_facts(checkpoint, &sites, &ignored);
    let architectures = [arch.clone()];
    if let Some(target) = recipe.target {
        let found = check(target, layout, &scheme, &facts, &architectures, recipe.tensor_parallel);
        let (refused, soft): (Vec<_>, Vec<_>) = found.into_iter().partition(|v| v.severity == Severity::Refused);
        if !refused.is_empty() {
            return Err(JobError::Target { target: target.name().to_owned(), violations: refused });
        }
        warnings.extend(soft.into_iter().map(|v| format!("{}: {} [{}]", target.name(), v.message, v.rule)));
    }
    let engines = engines_for(layout, &scheme, &facts, &architectures);

    let (windows, seqlen) = if data_free { (0, 0) } else { calibration_shape(recipe, spec.as_ref(), &mut notes)? };
    let (eval_windows, eval_seqlen) = check_shape(recipe, spec.as_ref(), seqlen)?;
    let batch = batch_size(recipe, seqlen)?.min(windows.max(1));
    let tensors = plan_tensors(
        checkpoint,
        spec.as_ref(),
        &sites,
        layout,
        dtype,
        &rescaled_tensors(spec.as_ref(), &folds),
        &mut notes,
    )?;
    let mut added = Vec::new();
    if let (Some(spec), Some(scheme)) = (&spec, recipe.kv_cache) {
        for block in &spec.blocks {
            added.extend(crate::cache::tensors(block, scheme)?);
        }
    }
    let outputs = tensors.iter().flat_map(|row| &row.outputs).chain(&added);
    let output_bytes: u64 = outputs.map(OutputTensor::bytes).sum();

    let no_blocks = Vec::new();
    let mut costs = Costs {
        sites: &sites,
        blocks: spec.as_ref().map_or(&no_blocks, |spec| &spec.blocks),
        hidden: spec.as_ref().map_or(0, |spec| spec.hidden),
        vocab: spec.as_ref().map_or(0, |spec| spec.vocab),
        // With statistics no window is run; the fold check takes less than one.
        windows: if recipe.stats.is_some() { 1 } else { windows },
        seqlen,
        batch,
        eval_windows,
        eval_seqlen,
        search: matches!(recipe.method, Method::Awq { search_scale: true }),
        grams: !gathers_inputs_only(recipe),
        budget: recipe.max_memory.is_some(),
        at_once: recipe.calib.if_needed || matches!(recipe.method, Method::SmoothQuant { .. }),
        solver: recipe.solver,
        source_bytes_per_weight: (plain.bitsize() / 8) as u64,
    };
    if let Some(limit) = recipe.eval.limit
        && costs.work().check > limit
    {
        notes.push(format!(
            "the result is not compared with the original by forward passes, which would take {:.0} Tflop; ask for it with --eval-samples",
            costs.work().check / 1e12
        ));
        costs.eval_windows = 0;
    }
    let eval_windows = costs.eval_windows;
    let (memory, batch) = fit_memory(&|batch| Costs { batch, ..costs }.memory(), costs.batch, recipe, &mut warnings)?;
    let records = if windows > 0 && recipe.stats.is_none() { costs.records().0 } else { 0 };
    let disk_bytes = output_bytes + records + if memory.spooled { memory.hidden } else { 0 } + (16 << 20);
    // Blocks of an interrupted run have their place already.
    let kept = records.min(crate::limits::kept_bytes(&recipe.work_dir));
    let disk_free = fit_disk(&recipe.work_dir, disk_bytes - kept)?;
    WorkDir::check(&recipe.work_dir, Some(checkpoint.root()), recipe.overwrite)?;
    let work = costs.work();
    let device = device(recipe, &mut notes)?;
    let config_facts = ConfigFacts {
        ignored,
        overrides: sites.iter().filter(|s| s.scheme != scheme).map(|s| (s.module.clone(), s.scheme)).collect(),
        act_order: recipe.solver.rounding != crate::Rounding::Nearest && recipe.solver.act_order,
        kv_cache: recipe.kv_cache,
        ..ConfigFacts::new(scheme)
    };
    Ok(Plan {
        model: checkpoint.root().to_owned(),
        arch,
        scheme,
        power_of_two_scales: recipe.power_of_two_scales,
        kv_cache: recipe.kv_cache,
        range: recipe.range,
        method: recipe.method,
        layout,
        quantization_config: quantization_config(recipe, layout, &config_facts)?,
        layout_files: layout.side_files(&config_facts)?,
        dtype,
        windows,
        seqlen,
        statistics: None,
        eval_windows,
        eval_seqlen,
        batch,
        device,
        source_bytes: checkpoint.total_bytes(),
        output_bytes,
        disk_bytes,
        disk_free,
        memory,
        work,
        engines,
        notes,
        warnings,
        tensors,
        added,
        sites,
        plain_sites,
        folds,
        experts: recipe.experts,
        solver: recipe.solver,
        spec,
    })
}
