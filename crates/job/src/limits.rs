//! What fits: windows, batches, memory, disk, device, and settings that cannot be.

use std::path::Path;

use candle_core::Device;
use lite_decoder::{AttnSpec, BATCH_TOKENS, DecoderSpec, LATENT_ATTENTION};
use lite_model::printable;
use lite_quant::WeightScheme;

use crate::schemes::{is_static, words};
use crate::{JobError, MemoryEstimate, Method, QuantSite, Recipe, Rounding, SmoothScales};

/// Longest window of the final check, unless asked for.
const CHECK_SEQLEN: usize = 512;

/// Calibration windows per forward pass.
pub(crate) fn batch_size(recipe: &Recipe, seqlen: usize) -> Result<usize, JobError> {
    match recipe.batch_size {
        Some(0) => Err(JobError::Usage("--batch-size 0: give at least one window per forward pass".to_owned())),
        Some(batch) => Ok(batch),
        None => Ok((BATCH_TOKENS / seqlen.max(1)).max(1)),
    }
}

/// What a run needs that is to fit: the estimate for `batch` windows per forward pass, hidden states in a file where memory
/// asks for it, and fewer windows per pass where that is not enough; with the windows it comes to. Refuses what does not
/// fit even so.
pub(crate) fn fit_memory(
    estimate: &dyn Fn(usize) -> MemoryEstimate,
    batch: usize,
    recipe: &Recipe,
    warnings: &mut Vec<String>,
) -> Result<(MemoryEstimate, usize), JobError> {
    let limit = recipe.max_memory.or_else(available_memory);
    // The estimate is good to 15 %.
    let tight = |memory: &MemoryEstimate| limit.is_some_and(|limit| memory.peak() + memory.peak() / 100 * 15 > limit);
    let (mut memory, mut batch) = (estimate(batch), batch);
    if tight(&memory) {
        memory.middle = 0;
    }
    if tight(&memory) && memory.hidden > 0 {
        memory.spooled = true;
    }
    // Passes over fewer windows sum in another order: this comes last, and only for a budget that was asked for, so that
    // what happens to be free does not decide the bytes of the result.
    let lowered = recipe.max_memory.is_some() && recipe.batch_size.is_none();
    while lowered && tight(&memory) && batch > 1 {
        batch /= 2;
        let fewer = estimate(batch);
        memory = MemoryEstimate { middle: 0, spooled: fewer.hidden > 0, ..fewer };
    }
    if let Some(limit) = recipe.max_memory.filter(|_| tight(&memory)) {
        return Err(JobError::Resources(format!(
            "this run needs about {}, give or take 15 %, of memory even with its hidden states on disk, --max-memory allows {}: lower --calib-seqlen, or raise the limit",
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
    Ok((memory, batch))
}

/// Memory that is free for this run, bytes: what the system has left, within the limit of its cgroup.
pub(crate) fn available_memory() -> Option<u64> {
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    let free = system.available_memory();
    let limit = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory.max(1));
    (free > 0).then_some(free.min(limit))
}

/// Bytes of the blocks that an interrupted run finished in `root`.
pub(crate) fn kept_bytes(root: &Path) -> u64 {
    let files = std::fs::read_dir(root.join(crate::workdir::JOB_FOLDER).join("blocks")).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum()
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

/// The device of a run; what there is to say of it goes to `notes`.
pub(crate) fn device(recipe: &Recipe, notes: &mut Vec<String>) -> Result<Device, JobError> {
    let (compute, note) = crate::open_device(recipe.device)?;
    notes.extend(note);
    Ok(compute.device().clone())
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Settings of the solver that cannot be.
pub(crate) fn check_solver(recipe: &Recipe, data_free: bool) -> Result<(), JobError> {
    let solver = &recipe.solver;
    // Written so that NaN fails.
    if !(solver.damp > 0.0 && solver.damp <= 1.0) {
        return Err(JobError::Usage(format!(
            "--damp-percent {}: give a fraction of the mean Gram diagonal above 0 and at most 1, such as 0.01",
            solver.damp
        )));
    }
    let nearest = solver.rounding == Rounding::Nearest;
    if data_free && !nearest {
        return Err(JobError::Usage(
            "--calib-samples 0 leaves nothing to solve with; use --rounding nearest (or --effort fast), or calibrate"
                .to_owned(),
        ));
    }
    if nearest && (solver.error_aware || solver.tune) {
        return Err(JobError::Usage(
            "--rounding nearest takes neither error-aware targets nor block tuning; use --rounding refine".to_owned(),
        ));
    }
    Ok(())
}

/// What latent attention does not take.
pub(crate) fn check_attention(recipe: &Recipe, spec: Option<&DecoderSpec>) -> Result<(), JobError> {
    let latent = |spec: &&DecoderSpec| spec.blocks.iter().any(|block| matches!(block.attn, AttnSpec::Mla(_)));
    let Some(spec) = spec.filter(latent) else { return Ok(()) };
    let refuse = |what: &str, instead: &str| {
        Err(JobError::Unsupported(format!(
            "{} has {LATENT_ATTENTION}, for which {what} not implemented: {instead}",
            spec.arch
        )))
    };
    if recipe.solver.tune {
        return refuse("tuning blocks (--effort best) is", "use --effort default");
    }
    if recipe.kv_cache.is_some() {
        return refuse("scales of a quantized cache (--kv-cache) are", "leave --kv-cache out");
    }
    Ok(())
}

/// Schemes that the chosen way of solving cannot give, or that need what is not there.
pub(crate) fn check_schemes(recipe: &Recipe, sites: &[QuantSite], data_free: bool) -> Result<(), JobError> {
    let smooth = matches!(recipe.method, Method::SmoothQuant { .. });
    if let Method::SmoothQuant { scales: SmoothScales::Alpha(alpha) } = recipe.method
        && !(0.0..=1.0).contains(&alpha)
    {
        return Err(JobError::Usage(format!(
            "--alpha {alpha}: give a number from 0 (scales even out the weights) to 1 (the activations), such as 0.5, or `auto`"
        )));
    }
    if data_free && smooth {
        return Err(JobError::Usage(
            "smoothing needs calibration windows: give --calib-samples, or quantize without data with `lite rtn`"
                .to_owned(),
        ));
    }
    let without = data_free || recipe.stats.is_some();
    if without && recipe.kv_cache.is_some() {
        return Err(JobError::Usage(
            "--kv-cache calibrates the cache's scales by running windows: give --calib-samples, and no --stats"
                .to_owned(),
        ));
    }
    if let Some(site) = sites.iter().find(|site| is_static(&site.scheme)).filter(|_| without) {
        return Err(JobError::Usage(format!(
            "`{}`: {} needs calibration windows: give --calib-samples, and no --stats, or choose a scheme with dynamic scales",
            printable(&site.module),
            words(&site.scheme)
        )));
    }
    let any = data_free || smooth || recipe.calib.if_needed;
    for site in sites {
        if !any && site.scheme.activations.is_some() {
            return Err(JobError::Unsupported(format!(
                "`{}`: {}: this method quantizes weights alone; use `lite smooth_quant` or `lite rtn`",
                printable(&site.module),
                words(&site.scheme)
            )));
        }
        if !any || recipe.solver.rounding != Rounding::Nearest {
            site.int()?;
        }
    }
    Ok(())
}

pub(crate) fn check_groups(sites: &[QuantSite]) -> Result<(), JobError> {
    let groups = |site: &QuantSite| match site.scheme.weights {
        WeightScheme::Int(int) => int.group_size.width(site.in_features).err(),
        WeightScheme::Float(float) => float.grain.grid(site.out_features, site.in_features).err(),
    };
    let bad: Vec<&QuantSite> = sites.iter().filter(|s| groups(s).is_some()).collect();
    let Some(first) = bad.first() else { return Ok(()) };
    let Some(int) = first.scheme.weights.int() else {
        return Err(JobError::Usage(format!(
            "`{}` ({} of {} linears): {}; leave such linears plain with --ignore, or choose a scheme without groups",
            printable(&first.module),
            bad.len(),
            sites.len(),
            groups(first).map_or(String::new(), |error| error.to_string())
        )));
    };
    let fits: Vec<String> = [256usize, 128, 64, 32, 16]
        .into_iter()
        .filter(|g| sites.iter().all(|s| s.in_features % g == 0))
        .map(|g| g.to_string())
        .chain(["-1".to_owned()])
        .collect();
    Err(JobError::Usage(format!(
        "group size {} does not divide the {} input features of `{}` ({} of {} linears); this model takes --w-group-size {}",
        int.group_size.to_flag(),
        first.in_features,
        printable(&first.module),
        bad.len(),
        sites.len(),
        fits.join(", ")
    )))
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
pub(crate) fn check_shape(
    recipe: &Recipe,
    spec: Option<&DecoderSpec>,
    seqlen: usize,
) -> Result<(usize, usize), JobError> {
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
