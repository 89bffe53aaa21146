//! Everything that can be known before the first multiplication.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::Device;
use lite_decoder::{DecoderError, DecoderSpec, Fold, Producer};
use lite_model::{Checkpoint, Dtype, OutputTensor, printable};
use lite_pack::{ConfigFacts, Layout};
use lite_pack::targets::{Severity, SiteFacts, Target, Verdict, check, engines_for};
use lite_quant::{Range, ScaleDtype, Scheme};

use crate::estimate::Costs;
use crate::source::stored_embedding;
use crate::statistics::Statistics;
use crate::tensors::{guess_sites, sites_of};
use crate::workdir::WorkDir;
use crate::{Action, DtypeChoice, JobError, MemoryEstimate, Method, QuantSite, Recipe, Solver, TensorPlan, Work};

/// Tokens of a default batch.
const BATCH_TOKENS: usize = 4096;

/// Longest window of the final check, unless asked for.
const CHECK_SEQLEN: usize = 512;

/// What a run will do: per tensor, and in all.
#[derive(Debug)]
pub struct Plan {
    /// The model's folder.
    pub model: PathBuf,
    /// `architectures[0]`.
    pub arch: String,
    /// The decoder, where it is known; without one there is no calibration and no forward check.
    pub spec: Option<DecoderSpec>,
    /// Bits, group size, symmetry, scale type.
    pub scheme: Scheme,
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
    /// One row for every source tensor.
    pub tensors: Vec<TensorPlan>,
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
        let bytes: u64 = self.tensors.iter().filter(quantized).flat_map(|row| &row.outputs).map(OutputTensor::bytes).sum();
        bytes as f64 * 8.0 / weights.max(1) as f64
    }

    /// Windows of `seqlen` tokens that make one batch of the usual size.
    pub fn batch_for(&self, seqlen: usize) -> usize {
        (self.batch * self.seqlen.max(1)).max(BATCH_TOKENS).div_ceil(seqlen.max(1) * 2).max(1)
    }
}

/// Checks a recipe against a model and plans the run.
///
/// # Errors
/// Everything that can be known from `config.json` and the file headers: unknown decoders, tensors
/// that are missing or disagree with the config, group sizes that do not divide, a target that would
/// refuse the result, too little disk or memory.
pub fn prepare(recipe: &Recipe, checkpoint: &Checkpoint) -> Result<Plan, JobError> {
    let Some(wanted) = &recipe.stats else { return plan(recipe, checkpoint) };
    let statistics = Statistics::open(&wanted.folder)?;
    statistics.check_model(checkpoint, &architecture(checkpoint.config()))?;
    statistics.check_wanted(wanted)?;
    let same = |a: &Path, b: &Path| a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    if same(&wanted.folder, &recipe.work_dir) {
        return Err(JobError::Usage(format!(
            "the work directory `{}` is the folder of the statistics; choose another --work-dir",
            recipe.work_dir.display()
        )));
    }
    let (recipe, notes) = statistics.adapt(recipe);
    let mut plan = plan(&recipe, checkpoint)?;
    if let Some(spec) = &plan.spec {
        statistics.check_tensors(spec)?;
    }
    plan.notes.extend(notes);
    plan.statistics = Some(statistics);
    Ok(plan)
}

/// The decoder that `config.json` describes, all of its tensors there.
pub(crate) fn known_decoder(checkpoint: &Checkpoint) -> Result<DecoderSpec, DecoderError> {
    let spec = DecoderSpec::from_config(checkpoint.config())?;
    let rename = stored_embedding(checkpoint, &spec);
    spec.check_tensors(&|name| {
        let stored = rename.as_ref().filter(|(asked, _)| asked == name).map_or(name, |(_, stored)| stored);
        checkpoint.info(stored).map(|info| info.shape.clone())
    })?;
    Ok(spec)
}

/// Refuses a model that holds codes and not weights.
pub(crate) fn refuse_quantized(checkpoint: &Checkpoint) -> Result<(), JobError> {
    let Some(found) = checkpoint.config().get("quantization_config").filter(|v| !v.is_null()) else { return Ok(()) };
    let method = found.get("quant_method").and_then(|m| m.as_str()).unwrap_or("unknown");
    Err(JobError::Unsupported(format!(
        "the model is already quantized (quant_method `{}`); its codes cannot be quantized again: give the original 16-bit checkpoint",
        printable(method)
    )))
}

/// [`prepare`] of a recipe whose calibration settings are final.
fn plan(recipe: &Recipe, checkpoint: &Checkpoint) -> Result<Plan, JobError> {
    let data_free = recipe.calib.samples == 0;
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
    let spec = match known_decoder(checkpoint) {
        Ok(spec) => Some(spec),
        Err(error) if data_free && error.kind() == lite_decoder::ErrorKind::Unsupported => {
            notes.push(format!("{error}; linears were found by name and shape, and the result is not run"));
            None
        }
        Err(error) => return Err(error.into()),
    };
    let arch = architecture(config);
    let plain = plain_dtype(checkpoint);
    let (scale_dtype, dtype) = output_dtype(recipe.dtype, plain);
    let scheme = Scheme::new(recipe.bits, recipe.group_size, recipe.symmetric, scale_dtype)?;
    let mut sites = match &spec {
        Some(spec) => sites_of(spec, scheme),
        None => guess_sites(checkpoint, scheme),
    };
    if sites.is_empty() {
        return Err(JobError::Unsupported(
            "no linear was found inside decoder blocks (two-dimensional `….layers.N.….weight` tensors)".to_owned(),
        ));
    }
    check_solver(recipe)?;
    let plain_sites = crate::rules::apply(recipe, &mut sites)?;
    check_groups(&sites)?;
    let layout = choose_layout(recipe, &scheme)?;
    for site in &sites {
        layout.check(&site.scheme, site.out_features, site.in_features)?;
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

    let (windows, seqlen) = calibration_shape(recipe, spec.as_ref(), &mut notes)?;
    let (eval_windows, eval_seqlen) = check_shape(recipe, spec.as_ref(), seqlen)?;
    let batch = batch_size(recipe, seqlen)?;
    let tensors = plan_tensors(checkpoint, spec.as_ref(), &sites, layout, dtype, &rescaled_tensors(spec.as_ref(), &folds), &mut notes)?;
    let output_bytes: u64 = tensors.iter().flat_map(|row| &row.outputs).map(OutputTensor::bytes).sum();

    let no_blocks = Vec::new();
    let costs = Costs {
        sites: &sites,
        blocks: spec.as_ref().map_or(&no_blocks, |spec| &spec.blocks),
        hidden: spec.as_ref().map_or(0, |spec| spec.hidden),
        vocab: spec.as_ref().map_or(0, |spec| spec.vocab),
        // With statistics no window is run; the fold check takes less than one.
        windows: if recipe.stats.is_some() { 1 } else { windows },
        seqlen,
        batch: batch.min(windows.max(1)),
        eval_windows,
        eval_seqlen,
        search: matches!(recipe.method, Method::Awq { search_scale: true }),
        solver: recipe.solver,
        source_bytes_per_weight: (plain.bitsize() / 8) as u64,
    };
    let mut memory = costs.memory();
    fit_memory(&mut memory, recipe, &mut warnings)?;
    let disk_bytes = output_bytes + if memory.spooled { memory.hidden } else { 0 } + (16 << 20);
    let disk_free = fit_disk(&recipe.work_dir, disk_bytes)?;
    WorkDir::check(&recipe.work_dir, Some(checkpoint.root()), recipe.overwrite)?;
    let work = costs.work();
    let config_facts = ConfigFacts {
        ignored,
        overrides: sites.iter().filter(|s| s.scheme != scheme).map(|s| (s.module.clone(), s.scheme)).collect(),
        act_order: recipe.solver.rounding != crate::Rounding::Nearest && recipe.solver.act_order,
        ..ConfigFacts::new(scheme)
    };
    Ok(Plan {
        model: checkpoint.root().to_owned(),
        arch,
        scheme,
        range: recipe.range,
        method: recipe.method,
        layout,
        quantization_config: layout.quantization_config(&config_facts)?,
        layout_files: layout.side_files(&config_facts)?,
        dtype,
        windows,
        seqlen,
        statistics: None,
        eval_windows,
        eval_seqlen,
        batch,
        device: device(recipe)?,
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
        sites,
        plain_sites,
        folds,
        solver: recipe.solver,
        spec,
    })
}

/// Calibration windows per forward pass.
pub(crate) fn batch_size(recipe: &Recipe, seqlen: usize) -> Result<usize, JobError> {
    match recipe.batch_size {
        Some(0) => Err(JobError::Usage("--batch-size 0: give at least one window per forward pass".to_owned())),
        Some(batch) => Ok(batch),
        None => Ok((BATCH_TOKENS / seqlen.max(1)).max(1)),
    }
}

/// Moves hidden states to a file where memory asks for it, and refuses what does not fit even so.
pub(crate) fn fit_memory(memory: &mut MemoryEstimate, recipe: &Recipe, warnings: &mut Vec<String>) -> Result<(), JobError> {
    let limit = recipe.max_memory.or_else(crate::workdir::available_memory);
    if let Some(limit) = limit
        && memory.peak() > limit
        && memory.hidden > 0
    {
        memory.spooled = true;
    }
    if let Some(limit) = recipe.max_memory
        && memory.peak() > limit
    {
        return Err(JobError::Resources(format!(
            "this run needs about {} of memory even with its hidden states on disk, --max-memory allows {}: lower --batch-size or --calib-seqlen, or raise the limit",
            mib(memory.peak()),
            mib(limit)
        )));
    }
    if recipe.max_memory.is_none()
        && let Some(limit) = limit
        && memory.peak() > limit
    {
        warnings.push(format!("about {} of memory will be needed, {} are free", mib(memory.peak()), mib(limit)));
    }
    Ok(())
}

/// Free bytes on the disk of the work directory, if known; there must be `disk_bytes`.
pub(crate) fn fit_disk(work_dir: &Path, disk_bytes: u64) -> Result<Option<u64>, JobError> {
    let disk_free = crate::workdir::nearest_existing(work_dir).and_then(|path| lite_model::free_space(&path));
    if let Some(free) = disk_free
        && free < disk_bytes
    {
        return Err(JobError::Resources(format!(
            "the result needs about {} on the disk of `{}`, {} are free: free some space or choose another --work-dir",
            mib(disk_bytes),
            work_dir.display(),
            mib(free)
        )));
    }
    Ok(disk_free)
}

pub(crate) fn device(recipe: &Recipe) -> Result<Device, JobError> {
    match recipe.device {
        crate::DeviceChoice::Cpu | crate::DeviceChoice::Auto => Ok(Device::Cpu),
        crate::DeviceChoice::Cuda => Err(JobError::Resources(
            "--device cuda: this build has no CUDA support; use --device cpu, or --device auto to take whatever is there"
                .to_owned(),
        )),
    }
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

pub(crate) fn architecture(config: &serde_json::Map<String, serde_json::Value>) -> String {
    let first = config.get("architectures").and_then(|a| a.get(0)).and_then(|a| a.as_str());
    first.unwrap_or("unknown").to_owned()
}

/// The float type that most of the checkpoint's bytes have.
pub(crate) fn plain_dtype(checkpoint: &Checkpoint) -> Dtype {
    let mut bytes = [(Dtype::BF16, 0u64), (Dtype::F16, 0), (Dtype::F32, 0)];
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        if let Some(entry) = bytes.iter_mut().find(|(dtype, _)| *dtype == info.dtype) {
            entry.1 += info.bytes;
        }
    }
    bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(Dtype::BF16, |(dtype, _)| dtype)
}

/// Type of scales, and the type plain tensors are converted to (`None`: left as they are).
///
/// `auto` follows LMDeploy: bfloat16 stays bfloat16, float16 and float32 become float16.
fn output_dtype(choice: DtypeChoice, plain: Dtype) -> (ScaleDtype, Option<(Dtype, &'static str)>) {
    match (choice, plain) {
        (DtypeChoice::Auto, Dtype::BF16) => (ScaleDtype::BF16, None),
        (DtypeChoice::Auto, Dtype::F16) => (ScaleDtype::F16, None),
        (DtypeChoice::Auto | DtypeChoice::Float16, _) => (ScaleDtype::F16, Some((Dtype::F16, "float16"))),
        (DtypeChoice::Bfloat16, _) => (ScaleDtype::BF16, Some((Dtype::BF16, "bfloat16"))),
    }
}

/// Settings of the solver that cannot be.
fn check_solver(recipe: &Recipe) -> Result<(), JobError> {
    let solver = &recipe.solver;
    // Written so that NaN fails.
    if !(solver.damp > 0.0 && solver.damp <= 1.0) {
        return Err(JobError::Usage(format!(
            "--damp-percent {}: give a fraction of the mean Gram diagonal above 0 and at most 1, such as 0.01",
            solver.damp
        )));
    }
    let nearest = solver.rounding == crate::Rounding::Nearest;
    if recipe.calib.samples == 0 && !nearest {
        return Err(JobError::Usage(
            "--calib-samples 0 leaves nothing to solve with; use --rounding nearest (or --effort fast), or calibrate".to_owned(),
        ));
    }
    if nearest && (solver.error_aware || solver.tune) {
        return Err(JobError::Usage(
            "--rounding nearest takes neither error-aware targets nor block tuning; use --rounding refine".to_owned(),
        ));
    }
    Ok(())
}

/// Per block, the folds whose every linear is quantized: a plain one could not absorb scales exactly.
fn exact_folds(spec: Option<&DecoderSpec>, sites: &[QuantSite], method: Method, data_free: bool) -> Vec<Vec<Fold>> {
    let Some(spec) = spec else { return Vec::new() };
    let quantized: BTreeSet<_> = sites.iter().filter_map(|s| s.site).collect();
    let exact = |fold: &&Fold| {
        let producer = match &fold.producer {
            Producer::Norm { .. } => true,
            Producer::Rows { site, .. } => quantized.contains(site),
        };
        producer && fold.consumers.iter().all(|id| quantized.contains(id))
    };
    let none = data_free || method == Method::Plain;
    spec.blocks
        .iter()
        .map(|block| if none { Vec::new() } else { block.folds.iter().filter(exact).cloned().collect() })
        .collect()
}

fn check_groups(sites: &[QuantSite]) -> Result<(), JobError> {
    let bad: Vec<&QuantSite> = sites.iter().filter(|s| s.scheme.group_size.width(s.in_features).is_err()).collect();
    let Some(first) = bad.first() else { return Ok(()) };
    let fits: Vec<String> = [256usize, 128, 64, 32, 16]
        .into_iter()
        .filter(|g| sites.iter().all(|s| s.in_features % g == 0))
        .map(|g| g.to_string())
        .chain(["-1".to_owned()])
        .collect();
    Err(JobError::Usage(format!(
        "group size {} does not divide the {} input features of `{}` ({} of {} linears); this model takes --w-group-size {}",
        first.scheme.group_size.to_flag(),
        first.in_features,
        printable(&first.module),
        bad.len(),
        sites.len(),
        fits.join(", ")
    )))
}

fn choose_layout(recipe: &Recipe, scheme: &Scheme) -> Result<&'static dyn Layout, JobError> {
    let name = match (&recipe.layout, recipe.target) {
        (Some(name), _) => name.as_str(),
        (None, Some(target)) => target.default_layout(scheme),
        (None, None) => lite_pack::default_layout(scheme),
    };
    lite_pack::layout(name).ok_or_else(|| {
        let known: Vec<&str> = lite_pack::all().iter().map(|l| l.name()).collect();
        JobError::Usage(format!("layout `{}` is not known; use {}", printable(name), known.join(" or ")))
    })
}

/// Every linear, quantized or not, as the engines' rules see it.
fn site_facts(checkpoint: &Checkpoint, sites: &[QuantSite], ignored: &[String]) -> Vec<SiteFacts> {
    let quantized = sites.iter().map(|s| SiteFacts {
        name: s.module.clone(),
        fused_group: Some(s.fused_group.clone()),
        n: s.out_features,
        k: s.in_features,
        quantized: true,
        scheme: Some(s.scheme),
    });
    let plain = ignored.iter().filter_map(|module| {
        let [n, k] = checkpoint.info(&format!("{module}.weight"))?.shape[..] else { return None };
        Some(SiteFacts { name: module.clone(), fused_group: None, n, k, quantized: false, scheme: None })
    });
    quantized.chain(plain).collect()
}

/// Every linear that stays plain: the head, and two-dimensional weights that are neither embeddings nor
/// quantized.
fn ignored_linears(checkpoint: &Checkpoint, spec: Option<&DecoderSpec>, sites: &[QuantSite]) -> Vec<String> {
    let quantized: BTreeSet<&str> = sites.iter().map(|s| s.module.as_str()).collect();
    let mut ignored: BTreeSet<String> = BTreeSet::new();
    if let Some(spec) = spec {
        // A tied head is a linear too, even though it has no tensor of its own.
        ignored.insert(spec.head.module.clone());
    }
    for info in checkpoint.names().filter_map(|name| checkpoint.info(name)) {
        let Some(module) = info.name.strip_suffix(".weight") else { continue };
        let is_embedding = match spec {
            Some(spec) => info.name == spec.embed.weight,
            None => module.contains("embed") || module.ends_with("wte") || module.ends_with("wpe"),
        };
        if info.shape.len() == 2 && !quantized.contains(module) && !is_embedding {
            ignored.insert(module.to_owned());
        }
    }
    ignored.into_iter().collect()
}

/// Number and length of the calibration windows.
pub(crate) fn calibration_shape(
    recipe: &Recipe,
    spec: Option<&DecoderSpec>,
    notes: &mut Vec<String>,
) -> Result<(usize, usize), JobError> {
    const DEFAULT: usize = 2048;
    if recipe.calib.samples == 0 {
        return Ok((0, 0));
    }
    let longest = spec.map_or(usize::MAX, |spec| spec.max_positions);
    let seqlen = match recipe.calib.seqlen {
        None if longest < DEFAULT => {
            notes.push(format!("windows of {longest} tokens, the model's maximum (the default is {DEFAULT})"));
            longest
        }
        None => DEFAULT,
        Some(asked) => match usize::try_from(asked) {
            Ok(seqlen) if (8..=longest).contains(&seqlen) => seqlen,
            _ => {
                return Err(JobError::Usage(format!(
                    "--calib-seqlen {asked}: this model takes 8 to {longest} tokens (max_position_embeddings)"
                )));
            }
        },
    };
    Ok((recipe.calib.samples as usize, seqlen))
}

/// Number and length of the windows of the final check.
fn check_shape(recipe: &Recipe, spec: Option<&DecoderSpec>, seqlen: usize) -> Result<(usize, usize), JobError> {
    let Some(spec) = spec else { return Ok((0, 0)) };
    match recipe.eval.seqlen {
        Some(asked) if !(8..=spec.max_positions).contains(&asked) => Err(JobError::Usage(format!(
            "--eval-seqlen {asked}: this model takes 8 to {} tokens (max_position_embeddings)",
            spec.max_positions
        ))),
        Some(asked) => Ok((recipe.eval.windows, asked)),
        None => {
            let usual = if seqlen == 0 { CHECK_SEQLEN } else { seqlen.min(CHECK_SEQLEN) };
            Ok((recipe.eval.windows, usual.min(spec.max_positions)))
        }
    }
}

/// One row per source tensor, in the order of the source.
fn plan_tensors(
    checkpoint: &Checkpoint,
    spec: Option<&DecoderSpec>,
    sites: &[QuantSite],
    layout: &dyn Layout,
    dtype: Option<(Dtype, &'static str)>,
    rescaled: &BTreeSet<String>,
    notes: &mut Vec<String>,
) -> Result<Vec<TensorPlan>, JobError> {
    let by_weight: BTreeMap<String, usize> =
        sites.iter().enumerate().map(|(i, s)| (format!("{}.weight", s.module), i)).collect();
    let rename = spec.and_then(|spec| stored_embedding(checkpoint, spec));
    let mut rows = Vec::new();
    for name in checkpoint.names() {
        let Some(info) = checkpoint.info(name) else { continue };
        let plain = |target: &str| {
            let is_float = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
            let dtype = match dtype {
                Some((dtype, _)) if is_float => dtype,
                _ => info.dtype,
            };
            OutputTensor { name: target.to_owned(), dtype, shape: info.shape.clone() }
        };
        let row = |action, outputs| TensorPlan { source: name.to_owned(), action, outputs };
        if let Some(&site) = by_weight.get(name) {
            let site_plan = &sites[site];
            let outputs = layout
                .describe(&site_plan.scheme, site_plan.out_features, site_plan.in_features)?
                .into_iter()
                .map(|t| OutputTensor { name: format!("{}.{}", site_plan.module, t.suffix), dtype: t.dtype, shape: t.shape })
                .collect();
            rows.push(row(Action::Quantize { site }, outputs));
            continue;
        }
        if let Some((embed, head)) = &rename
            && head == name
        {
            notes.push(format!("`{head}` is written as `{embed}`, where loaders of tied embeddings look for it"));
            let output = plain(embed);
            let action = if output.dtype == info.dtype { Action::Copy } else { Action::Convert };
            rows.push(row(action, vec![output]));
            continue;
        }
        if let Some(spec) = spec
            && spec.head.tied
            && name == format!("{}.weight", spec.head.module)
        {
            if is_copy_of_embedding(checkpoint, spec, name)? {
                rows.push(row(Action::Drop { reason: "the head is tied to the embedding and holds the same values" }, vec![]));
                continue;
            }
            notes.push(format!(
                "config.json ties `{name}` to the embedding, but their values differ; both are kept, engines use the embedding"
            ));
        }
        let output = plain(name);
        let action = if rescaled.contains(name) {
            Action::Rescale
        } else if output.dtype == info.dtype {
            Action::Copy
        } else {
            Action::Convert
        };
        rows.push(row(action, vec![output]));
    }
    Ok(rows)
}

fn is_copy_of_embedding(checkpoint: &Checkpoint, spec: &DecoderSpec, head: &str) -> Result<bool, JobError> {
    if checkpoint.info(&spec.embed.weight).is_none() {
        return Ok(false);
    }
    let (embed, head) = (checkpoint.tensor(&spec.embed.weight)?, checkpoint.tensor(head)?);
    Ok(embed.dtype == head.dtype && embed.data == head.data)
}

/// Norm weights and biases that absorb scales.
fn rescaled_tensors(spec: Option<&DecoderSpec>, folds: &[Vec<Fold>]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for fold in folds.iter().flatten() {
        match &fold.producer {
            Producer::Norm { weight, bias } => {
                names.insert(weight.clone());
                names.extend(bias.clone());
            }
            Producer::Rows { site, .. } => {
                let producer = spec.and_then(|spec| spec.site(*site)).filter(|s| s.bias);
                names.extend(producer.map(|s| format!("{}.bias", s.module)));
            }
        }
    }
    names
}
