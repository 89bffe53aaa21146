//! Quantizing without statistics: from the mapped source to the output, a panel of rows at a time.
//!
//! Three things happen at once: one thread touches the pages of the panels to come, so that the disk reads ahead; all
//! threads round the panel that is here; one thread writes the packed tensors of the linear before. Besides the panels
//! only the codes of one linear and the packed bytes of two are in memory, whatever the size of the checkpoint.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use lite_decoder::WeightSource;
use lite_model::{Checkpoint, CheckpointWriter, Dtype};
use lite_pack::PackedTensor;
use lite_quant::floats::{FloatLinear, FloatRange, FloatScheme, ScaleKind, nvfp4_global, quantize_float};
use lite_quant::{QuantError, QuantizedLinear, Range, RangeContext, WeightScheme, Weights, quantize_nearest};
use lite_runtime::FloatSource;
use rayon::prelude::*;

use crate::check::{Expected, Outcome, SiteReport};
use crate::run::{LayerClock, Runner};
use crate::source::source_f32;
use crate::{JobError, Plan, QuantSite};

/// Elements of a panel: 16 MiB in f32.
const PANEL: usize = 4 << 20;

/// Rows of a panel are a multiple of about this many, and of the rows of a block.
const ROWS: usize = 128;

/// Panels that are read ahead.
const AHEAD: usize = 4;

/// Largest magnitudes that several linears share, by fused group: engines keep one global scale of NVFP4 for all shards.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    absmax: BTreeMap<String, f32>,
}

impl Shared {
    /// Of linears that are all in memory.
    pub(crate) fn of<'s>(linears: impl Iterator<Item = (&'s QuantSite, &'s [f32])>) -> Self {
        let mut shared = Self::default();
        for (site, weight) in linears {
            if has_global(site) {
                shared.add(site, absmax(weight));
            }
        }
        shared
    }

    fn add(&mut self, site: &QuantSite, largest: f32) {
        let slot = self.absmax.entry(site.fused_group.clone()).or_insert(0.0);
        *slot = if *slot >= largest { *slot } else { largest };
    }

    fn global(&self, site: &QuantSite) -> Option<f64> {
        self.absmax.get(&site.fused_group).map(|largest| nvfp4_global(*largest))
    }
}

/// Whether one more scale covers the whole tensor.
fn has_global(site: &QuantSite) -> bool {
    matches!(site.scheme.weights, WeightScheme::Float(float) if float.scale == ScaleKind::E4M3WithGlobal)
}

/// Largest magnitude; NaN and Inf are found when codes are chosen.
fn absmax(weight: &[f32]) -> f32 {
    let largest = |part: &[f32]| part.iter().fold(0f32, |m, v| m.max(v.abs()));
    weight.par_chunks(1 << 16).map(largest).reduce(|| 0.0, f32::max)
}

/// Nearest codes of one weight `[N, K]`, or of whole rows of it.
///
/// # Errors
/// [`JobError::Tensor`] for NaN and Inf.
pub(crate) fn round(site: &QuantSite, weight: &[f32], plan: &Plan, shared: &Shared) -> Result<Weights, JobError> {
    let k = site.in_features;
    let n = weight.len() / k.max(1);
    let codes = match &site.scheme.weights {
        WeightScheme::Int(int) => {
            let context = RangeContext { weight, out_features: n, in_features: k, gram: None };
            quantize_nearest(&context, int, plan.range).map(Weights::Int)
        }
        WeightScheme::Float(float) => {
            let range = match plan.range {
                Range::MinMax => FloatRange::MinMax,
                Range::Search => FloatRange::Mse,
            };
            let powers = plan.power_of_two_scales && matches!(float.scale, ScaleKind::Float(_));
            let rounded = if powers { FloatScheme { scale: ScaleKind::E8M0, ..*float } } else { *float };
            quantize_float(weight, n, k, &rounded, range, shared.global(site)).map(|mut linear| {
                linear.scheme = *float;
                // E8M0 begins below the normal numbers.
                linear.scales.iter_mut().for_each(|scale| *scale = scale.max(f32::MIN_POSITIVE));
                Weights::Float(linear)
            })
        }
    };
    codes.map_err(tensor_error(site))
}

fn tensor_error(site: &QuantSite) -> impl FnOnce(QuantError) -> JobError {
    let tensor = format!("{}.weight", site.module);
    move |source| JobError::Tensor { tensor, source }
}

/// The error of a panel, with the row in the whole weight.
fn further_down(error: JobError, first: usize) -> JobError {
    match error {
        JobError::Tensor { tensor, source: QuantError::NotFinite { count, row, column } } => {
            JobError::Tensor { tensor, source: QuantError::NotFinite { count, row: row + first, column } }
        }
        other => other,
    }
}

/// Codes of a weight of which no row is there yet.
fn empty(site: &QuantSite) -> Weights {
    let k = site.in_features;
    match site.scheme.weights {
        WeightScheme::Int(scheme) => Weights::Int(QuantizedLinear {
            scheme,
            out_features: 0,
            in_features: k,
            codes: Vec::with_capacity(site.out_features * k),
            scales: Vec::new(),
            zeros: Vec::new(),
        }),
        WeightScheme::Float(scheme) => Weights::Float(FloatLinear {
            scheme,
            out_features: 0,
            in_features: k,
            codes: Vec::with_capacity(site.out_features * k),
            scales: Vec::new(),
            global_scale: 1.0,
        }),
    }
}

/// Puts the rows of `panel` under those of `whole`.
fn append(whole: &mut Weights, panel: Weights) {
    match (whole, panel) {
        (Weights::Int(whole), Weights::Int(panel)) => {
            whole.out_features += panel.out_features;
            whole.codes.extend(panel.codes);
            whole.scales.extend(panel.scales);
            whole.zeros.extend(panel.zeros);
        }
        (Weights::Float(whole), Weights::Float(panel)) => {
            whole.scales.extend(panel.scales);
            whole.out_features += panel.out_features;
            whole.codes.extend(panel.codes);
            whole.global_scale = panel.global_scale;
        }
        // A site has one scheme.
        _ => {}
    }
}

/// The panels of a linear: `(first row, rows)`. One where one scale is for all rows.
fn panels(site: &QuantSite) -> impl Iterator<Item = (usize, usize)> + use<> {
    let n = site.out_features;
    let unit = match site.scheme.weights {
        WeightScheme::Float(float) => float.grain.cover(n, site.in_features).0.max(1),
        WeightScheme::Int(_) => 1,
    };
    let unit = unit.max(ROWS.next_multiple_of(unit));
    let step = (PANEL / site.in_features.max(1) / unit).max(1) * unit;
    (0..n).step_by(step).map(move |first| (first, step.min(n - first)))
}

/// Whether the weight lies in the source as floats; fp8 codes are read as a whole.
fn is_plain(checkpoint: &Checkpoint, name: &str) -> bool {
    checkpoint.info(name).is_some_and(|info| matches!(info.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32))
}

/// Touches the pages of every panel, in order, [`AHEAD`] panels before they are needed.
fn read_ahead(checkpoint: &Checkpoint, sites: &[QuantSite], passed: &SyncSender<()>) {
    for site in sites {
        let name = format!("{}.weight", site.module);
        // Of codes of less than a byte too.
        let size = checkpoint.info(&name).map_or(0, |info| info.bytes as usize / site.out_features.max(1));
        for (first, rows) in panels(site) {
            checkpoint.read_ahead(&name, first * size..(first + rows) * size);
            // The other side is gone once the run failed.
            if passed.send(()).is_err() {
                return;
            }
        }
    }
}

/// Writes what comes; the first failure ends it, and the sender notices.
fn write_behind(
    writer: &CheckpointWriter,
    packed: &Receiver<(String, Vec<PackedTensor>)>,
) -> Result<(), lite_model::ModelError> {
    for (module, tensors) in packed {
        for tensor in tensors {
            writer.write(&format!("{module}.{}", tensor.suffix), &tensor.data)?;
        }
    }
    Ok(())
}

impl Runner<'_> {
    /// Linear by linear; nothing is run.
    pub(crate) fn data_free(
        &self,
        writer: &CheckpointWriter,
        expected: &mut Expected,
    ) -> Result<Vec<SiteReport>, JobError> {
        let sites = &self.plan.sites;
        let shared = self.shared()?;
        std::thread::scope(|scope| {
            let (passed, ready) = sync_channel(AHEAD);
            let (packed, queue) = sync_channel(1);
            let checkpoint = self.checkpoint;
            scope.spawn(move || read_ahead(checkpoint, sites, &passed));
            let writing = scope.spawn(move || write_behind(writer, &queue));
            let result = self.round_all(&shared, &ready, &packed, expected);
            drop((packed, ready));
            let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // A failure to write is why the other side could not go on.
            written.map_err(JobError::from).and(result)
        })?;
        Ok(sites.iter().map(|site| SiteReport::new(site, Outcome::default())).collect())
    }

    fn round_all(
        &self,
        shared: &Shared,
        ready: &Receiver<()>,
        packed: &SyncSender<(String, Vec<PackedTensor>)>,
        expected: &mut Expected,
    ) -> Result<(), JobError> {
        let sites = &self.plan.sites;
        let blocks = sites.iter().map(|s| s.block + 1).max().unwrap_or(0);
        let mut clock = LayerClock::new(self.observer, blocks);
        for (i, site) in sites.iter().enumerate() {
            if i == 0 || sites[i - 1].block != site.block {
                clock.started(site.block);
            }
            let weights = self.round_streamed(site, shared, ready)?;
            let tensors = self.pack_linear(site, &weights, None, expected)?;
            if packed.send((site.module.clone(), tensors)).is_err() {
                // The writer says why.
                return Ok(());
            }
            if sites.get(i + 1).is_none_or(|next| next.block != site.block) {
                clock.done(site.block, &[]);
            }
        }
        Ok(())
    }

    /// Nearest codes of a weight, panel by panel.
    fn round_streamed(&self, site: &QuantSite, shared: &Shared, ready: &Receiver<()>) -> Result<Weights, JobError> {
        let name = format!("{}.weight", site.module);
        let k = site.in_features;
        let mut whole = empty(site);
        let coded = if is_plain(self.checkpoint, &name) { None } else { Some(source_f32(self.checkpoint, &name)?) };
        let mut buffer = Vec::new();
        for (first, rows) in panels(site) {
            self.go_on()?;
            // Only the pace is at stake if the reader is gone.
            let _ = ready.recv();
            let panel = match &coded {
                Some(values) => &values[first * k..(first + rows) * k],
                None => self.panel(&name, first * k, rows * k, &mut buffer)?,
            };
            append(&mut whole, round(site, panel, self.plan, shared).map_err(|error| further_down(error, first))?);
        }
        FloatSource::new(self.checkpoint).release(&[name]);
        Ok(whole)
    }

    /// Elements of a plain tensor; their pages are let go.
    fn panel<'b>(
        &self,
        name: &str,
        first: usize,
        count: usize,
        buffer: &'b mut Vec<f32>,
    ) -> Result<&'b [f32], JobError> {
        buffer.resize(count, 0.0);
        self.checkpoint.tensor_f32_part(name, first, buffer)?;
        if let Some(info) = self.checkpoint.info(name) {
            let size = info.dtype.bitsize() / 8;
            self.checkpoint.release_part(name, first * size..(first + count) * size);
        }
        Ok(buffer)
    }

    /// The largest magnitudes that global scales need, found before the first code is chosen.
    fn shared(&self) -> Result<Shared, JobError> {
        let mut shared = Shared::default();
        let mut buffer = Vec::new();
        for site in self.plan.sites.iter().filter(|site| has_global(site)) {
            let name = format!("{}.weight", site.module);
            if !is_plain(self.checkpoint, &name) {
                shared.add(site, absmax(&source_f32(self.checkpoint, &name)?));
                continue;
            }
            for (first, rows) in panels(site) {
                self.go_on()?;
                let k = site.in_features;
                shared.add(site, absmax(self.panel(&name, first * k, rows * k, &mut buffer)?));
            }
        }
        Ok(shared)
    }
}
