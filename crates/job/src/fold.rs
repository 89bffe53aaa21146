//! Applying scales to a block: consumers times `s`, the producer divided by `s`.
//!
//! The producer is rounded to its type in the file first, and the consumers are multiplied by what was
//! really divided out (`old / rounded(old / s)`), so the float function of the written checkpoint is
//! unchanged up to f32 rounding, and not up to bfloat16 rounding of every norm weight.

use candle_core::{Device, Tensor};
use lite_decoder::{Block, BlockSpec, Fold, NormKind, Producer, Role, with_cpu_slice};
use lite_linalg::scale_columns;
use lite_quant::ScaleDtype;

use crate::JobError;

/// A norm weight or bias that absorbed scales, as it is written.
#[derive(Debug, Clone)]
pub(crate) struct Edit {
    pub(crate) tensor: String,
    pub(crate) values: Vec<f32>,
}

/// What cannot be rescaled exactly keeps scale 1: channels that their norm multiplies by zero.
pub(crate) fn frozen_channels(block: &Block, fold: &Fold) -> Result<Option<Vec<bool>>, JobError> {
    match &fold.producer {
        Producer::Norm { weight, kind, .. } => {
            let frozen = |w: &f32| kind.factor(*w) == 0.0 || !w.is_finite();
            Ok(Some(vector(block, weight)?.iter().map(frozen).collect()))
        }
        Producer::Rows { .. } => Ok(None),
    }
}

/// Folds `scales` (`[K]`) into `block`, returning the scales that consumers really got and the vectors
/// that changed. `storage(tensor)` is the type a vector has in the output.
pub(crate) fn apply(
    block: &mut Block,
    spec: &BlockSpec,
    fold: &Fold,
    scales: &[f32],
    storage: &dyn Fn(&str) -> ScaleDtype,
) -> Result<(Vec<f32>, Vec<Edit>), JobError> {
    let (effective, edits) = match &fold.producer {
        Producer::Norm { weight, bias, kind } => {
            let old = vector(block, weight)?;
            let (new, effective) = divide(&old, scales, storage(weight), *kind);
            let mut edits = vec![Edit { tensor: weight.clone(), values: new }];
            if let Some(bias) = bias {
                let dtype = storage(bias);
                let values = vector(block, bias)?.iter().zip(&effective).map(|(b, s)| dtype.round(b / s)).collect();
                edits.push(Edit { tensor: bias.clone(), values });
            }
            (effective, edits)
        }
        Producer::Rows { site, rows } => {
            let producer = spec.sites.iter().find(|s| s.id == *site).ok_or_else(|| missing(site.role))?;
            let mut per_row = vec![1f32; producer.out_features];
            for (&row, &scale) in rows.iter().zip(scales) {
                per_row[row as usize] = scale;
            }
            let mut edits = Vec::new();
            if let Some(bias) = block.bias(site.role) {
                let name = format!("{}.bias", producer.module);
                let old = to_vec(bias)?;
                let (mut new, mut effective) = divide(&old, &per_row, storage(&name), NormKind::Rms);
                // Rows that nobody rescales (q and k beside v in one matrix) have no consumer that could make up for
                // what rounding their bias divides out.
                let mut rescaled = vec![false; producer.out_features];
                rows.iter().for_each(|&row| rescaled[row as usize] = true);
                for row in (0..rescaled.len()).filter(|&row| !rescaled[row]) {
                    (new[row], effective[row]) = (old[row], 1.0);
                }
                per_row = effective;
                edits.push(Edit { tensor: name, values: new });
            }
            let weight = block.weight(site.role).ok_or_else(|| missing(site.role))?;
            let k = producer.in_features;
            let mut values = to_vec(weight)?;
            for (row, scale) in values.chunks_exact_mut(k).zip(&per_row) {
                if *scale != 1.0 {
                    row.iter_mut().for_each(|w| *w /= scale);
                }
            }
            block.set_weight(site.role, tensor(values, &[producer.out_features, k], weight.device())?)?;
            (rows.iter().map(|&row| per_row[row as usize]).collect(), edits)
        }
    };
    let mut edits = edits;
    for name in &fold.plain_consumers {
        let values = scale_columns(&vector(block, name)?, &effective);
        let dtype = storage(name);
        edits.push(Edit { tensor: name.clone(), values: values.into_iter().map(|v| dtype.round(v)).collect() });
    }
    for edit in &edits {
        let device = block.device().clone();
        let shape = block.vector(&edit.tensor).map_or_else(|| vec![edit.values.len()], |old| old.dims().to_vec());
        let value = tensor(edit.values.clone(), &shape, &device)?;
        match spec.sites.iter().find(|s| edit.tensor.strip_suffix(".bias") == Some(&s.module)) {
            Some(site) => block.set_bias(site.id.role, value)?,
            None => block.set_vector(&edit.tensor, value)?,
        }
    }
    for consumer in &fold.consumers {
        let weight = block.weight(consumer.role).ok_or_else(|| missing(consumer.role))?;
        let (shape, device) = (weight.dims().to_vec(), weight.device().clone());
        let scaled = with_cpu_slice(weight, |values| scale_columns(values, &effective))?;
        block.set_weight(consumer.role, tensor(scaled, &shape, &device)?)?;
    }
    Ok((effective, edits))
}

/// The powers of two nearest to `scales`, where something reads the input that is stored in 16 bits and is not quantized
/// (a router): times a power of two it stays what it is, so that every token goes where it went. The same where a norm has
/// a bias: no other scale leaves both weight and bias what they are in 16 bits.
pub(crate) fn storable(fold: &Fold, mut scales: Vec<f32>) -> Vec<f32> {
    let biased = matches!(fold.producer, Producer::Norm { bias: Some(_), .. });
    if biased || !fold.plain_consumers.is_empty() {
        scales.iter_mut().for_each(|s| *s = s.log2().round().exp2());
    }
    scales
}

/// Rounds weight and bias of norms with a bias to their types in the output, as writing them will: what is lost there no
/// scale can make up for, and powers of two ([`storable`]) then lose nothing more.
pub(crate) fn round_biased_norms(block: &mut Block, storage: &dyn Fn(&str) -> ScaleDtype) -> Result<(), JobError> {
    let biased = block.spec().norms.all().filter(|norm| norm.bias.is_some());
    let names: Vec<String> = biased.flat_map(|norm| norm.tensors().cloned()).collect();
    for name in names {
        let dtype = storage(&name);
        let rounded: Vec<f32> = vector(block, &name)?.into_iter().map(|v| dtype.round(v)).collect();
        let (shape, device) = ([rounded.len()], block.device().clone());
        block.set_vector(&name, tensor(rounded, &shape, &device)?)?;
    }
    Ok(())
}

/// Notes for every linear that reads what `fold` rescales by how much its input was divided.
pub(crate) fn note_scales(
    noted: &mut std::collections::BTreeMap<lite_decoder::InputId, Vec<f32>>,
    spec: &BlockSpec,
    fold: &Fold,
    effective: &[f32],
) {
    let inputs = fold.consumers.iter().filter_map(|id| spec.site(id.role)).map(|site| site.input);
    for input in inputs.chain([fold.input]) {
        noted.entry(input).or_insert_with(|| effective.to_vec());
    }
}

/// Weights whose factors (`kind`) are `old`'s over `s`, in their storage type, and the `s` that this division really
/// was. A value that would round to zero, or is zero, keeps `s` as it is only if that loses nothing.
fn divide(old: &[f32], scales: &[f32], dtype: ScaleDtype, kind: NormKind) -> (Vec<f32>, Vec<f32>) {
    old.iter()
        .zip(scales)
        .map(|(&old, &scale)| {
            if kind.factor(old) == 0.0 {
                return (old, scale);
            }
            let new = dtype.round(kind.rescaled(old, scale));
            let effective = kind.factor(old) / kind.factor(new);
            if new.is_finite() && effective.is_normal() && effective > 0.0 { (new, effective) } else { (old, 1.0) }
        })
        .unzip()
}

fn vector(block: &Block, name: &str) -> Result<Vec<f32>, JobError> {
    let found = block.vector(name).ok_or_else(|| JobError::Input(format!("the decoder block lacks `{name}`")))?;
    to_vec(found)
}

pub(crate) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>, JobError> {
    Ok(with_cpu_slice(tensor, <[f32]>::to_vec)?)
}

pub(crate) fn tensor(values: Vec<f32>, shape: &[usize], device: &Device) -> Result<Tensor, JobError> {
    Ok(Tensor::from_vec(values, shape, device).map_err(lite_decoder::DecoderError::from)?)
}

pub(crate) fn missing(role: Role) -> JobError {
    JobError::Input(format!("the decoder block lacks its {role:?} linear"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_is_exact_for_what_is_stored() {
        let old = [0.731f32, -1.5, 0.0, 3e-39, 1e30];
        let scales = [1.37f32, 0.003, 2.0, 1e5, 1e-30];
        for dtype in [ScaleDtype::F16, ScaleDtype::BF16] {
            let (new, effective) = divide(&old, &scales, dtype, NormKind::Rms);
            for i in 0..old.len() {
                let unchanged = new[i] == old[i];
                assert!(unchanged || dtype.round(new[i]) == new[i]);
                assert!((new[i] * effective[i] - old[i]).abs() <= old[i].abs() * 1e-6 || old[i] == 0.0);
                assert!(effective[i] > 0.0);
            }
            assert_eq!(effective[2], 2.0, "a zero stays zero under any scale");
        }
    }

    #[test]
    fn distances_from_one_are_divided_as_factors() {
        let old = [0.731f32, -0.5, 0.0, -1.0, 3.0, -0.9961];
        let scales = [1.37f32, 0.003, 2.0, 7.0, 40.0, 1e6];
        for dtype in [ScaleDtype::F16, ScaleDtype::BF16] {
            let (new, effective) = divide(&old, &scales, dtype, NormKind::RmsPlusOne);
            for i in 0..old.len() {
                assert!(new[i] == old[i] || dtype.round(new[i]) == new[i]);
                let (found, wanted) = ((1.0 + new[i]) * effective[i], 1.0 + old[i]);
                assert!((found - wanted).abs() <= wanted.abs() * 1e-6, "{i}: {found} {wanted}");
                assert!(effective[i] > 0.0);
            }
            assert_eq!((new[3], effective[3]), (-1.0, 7.0), "what is multiplied by zero bears any scale");
            // (1 − 0.9961) / 10⁶ − 1 is −1 in sixteen bits: the channel would be lost.
            assert_eq!((new[5], effective[5]), (old[5], 1.0));
        }
    }
}
