//! Scales of an fp8 key/value cache, found while the calibration windows run.

use std::sync::{Mutex, PoisonError};

use lite_decoder::{Block, BlockSpec, DecoderError, KvPart, KvTransform};
use lite_model::{Dtype, OutputTensor};
use lite_pack::KvCacheScheme;
use lite_quant::floats::FloatFormat;
use lite_stats::StatsError;
use rayon::prelude::*;

use crate::JobError;
use crate::calibrate::{Pass, Sink};
use crate::hidden::HiddenStates;
use crate::run::Runner;

/// Tokens handled together by one thread.
const ROWS: usize = 64;

/// The tensors of the scales of one block: keys, values.
///
/// # Errors
/// Attention without key and value heads.
pub(crate) fn tensors(block: &BlockSpec, scheme: KvCacheScheme) -> Result<[OutputTensor; 2], DecoderError> {
    let module = lite_runtime::attention_module(block);
    let shape = match scheme {
        KvCacheScheme::Fp8Tensor => vec![1],
        KvCacheScheme::Fp8Head => vec![lite_runtime::kv_heads(block)?, 1, 1],
    };
    Ok(["k_scale", "v_scale"].map(|part| OutputTensor {
        name: format!("{module}.{part}"),
        dtype: Dtype::F32,
        shape: shape.clone(),
    }))
}

/// `max |x|` of every head of the keys (after the rotation) and the values. Changes nothing.
struct Largest {
    kv_heads: usize,
    /// Keys, values.
    heads: Mutex<[Vec<f32>; 2]>,
}

impl Largest {
    fn new(kv_heads: usize) -> Self {
        Self { kv_heads, heads: Mutex::new([vec![0.0; kv_heads], vec![0.0; kv_heads]]) }
    }
}

impl KvTransform for Largest {
    fn apply(&self, part: KvPart, heads: &mut [f32], head_dim: usize) {
        let token = (self.kv_heads * head_dim).max(1);
        let join = |mut a: Vec<f32>, b: Vec<f32>| {
            // NaN wins, so that it is seen.
            a.iter_mut().zip(b).for_each(|(a, b)| *a = if *a >= b || a.is_nan() { *a } else { b });
            a
        };
        let found = heads
            .par_chunks(ROWS * token)
            .map(|rows| {
                let mut largest = vec![0f32; self.kv_heads];
                for (i, head) in rows.chunks_exact(head_dim.max(1)).enumerate() {
                    let slot = &mut largest[i % self.kv_heads];
                    *slot = head.iter().fold(*slot, |m, v| if v.abs() <= m || m.is_nan() { m } else { v.abs() });
                }
                largest
            })
            .reduce(|| vec![0f32; self.kv_heads], join);
        // A panic elsewhere does not make these numbers wrong.
        let mut all = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut all[usize::from(part == KvPart::Values)];
        *slot = join(std::mem::take(slot), found);
    }
}

impl Runner<'_> {
    /// Runs `hidden` through the attention of `block` and writes the scales of its cache, if the plan has one.
    ///
    /// # Errors
    /// [`StatsError::NotFinite`] if a key or value is NaN or Inf.
    pub(crate) fn calibrate_cache(
        &self,
        pass: &Pass<'_>,
        block: &Block,
        hidden: &HiddenStates,
        sink: &mut Sink<'_>,
    ) -> Result<(), JobError> {
        let Some(scheme) = self.plan.kv_cache else { return Ok(()) };
        let spec = block.spec();
        let largest = Largest::new(lite_runtime::kv_heads(spec)?);
        for (first, count) in self.batches(hidden.windows()) {
            self.go_on()?;
            block.cached(&self.windows(hidden, first, count, pass.spec.hidden)?, &pass.rope, &largest)?;
        }
        let heads = largest.heads.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (tensor, heads) in tensors(spec, scheme)?.into_iter().zip(heads) {
            let channels = heads.iter().filter(|v| !v.is_finite()).count();
            if channels > 0 {
                let (input, total) = (tensor.name, heads.len());
                return Err(StatsError::NotFinite { block: spec.index, input, channels, total }.into());
            }
            let data: Vec<u8> = scales(&heads, scheme).iter().flat_map(|scale| scale.to_le_bytes()).collect();
            sink.expected.tensor(&tensor.name, &data);
            sink.writer.write(&tensor.name, &data)?;
            if let Some(journal) = &mut sink.journal {
                journal.record.cache(&tensor.name, &data);
            }
        }
        Ok(())
    }
}

/// `absmax / 448`, of all heads together or of each; 1 where nothing was ever stored, and never subnormal.
fn scales(heads: &[f32], scheme: KvCacheScheme) -> Vec<f32> {
    let scale = |largest: f32| {
        let scale = largest / FloatFormat::E4M3.largest();
        if scale > 0.0 { scale.max(f32::MIN_POSITIVE) } else { 1.0 }
    };
    match scheme {
        KvCacheScheme::Fp8Tensor => vec![scale(heads.iter().copied().fold(0.0, f32::max))],
        KvCacheScheme::Fp8Head => heads.iter().copied().map(scale).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_of_each_head_is_found() {
        let (tokens, kv_heads, dim) = (200, 3, 4);
        let mut x: Vec<f32> = (0..tokens * kv_heads * dim).map(|i| ((i * 31 % 97) as f32 - 48.0) / 48.0).collect();
        x[5 * kv_heads * dim + dim + 2] = -7.0;
        let before = x.clone();
        let largest = Largest::new(kv_heads);
        largest.apply(KvPart::Keys, &mut x, dim);
        assert_eq!(x, before, "nothing is changed");
        let [keys, values] = largest.heads.into_inner().unwrap();
        assert_eq!(keys[1], 7.0);
        assert!(keys[0] <= 1.0 && keys[2] <= 1.0 && keys[0] > 0.9);
        assert_eq!(values, [0.0; 3]);
        assert_eq!(scales(&keys, KvCacheScheme::Fp8Tensor), [7.0 / 448.0]);
        assert_eq!(scales(&keys, KvCacheScheme::Fp8Head)[1], 7.0 / 448.0);
        assert_eq!(scales(&values, KvCacheScheme::Fp8Tensor), [1.0], "never zero");
        assert!(scales(&[1e-40], KvCacheScheme::Fp8Head)[0].is_normal());
    }

    #[test]
    fn a_nan_is_not_lost() {
        let largest = Largest::new(1);
        for mut x in [[1.0, f32::NAN], [2.0, 3.0]] {
            largest.apply(KvPart::Values, &mut x, 2);
        }
        assert!(largest.heads.into_inner().unwrap()[1][0].is_nan());
    }
}
