//! A weight in tensors of its own: codes (a byte each, or fp4 in pairs), scales, zero points, a global scale, and
//! what static activations need. Layouts say how these tensors are called and shaped.

use lite_quant::floats::{FloatLinear, FloatScheme, ScaleKind};
use lite_quant::{
    ActivationFormat, ActivationScale, ActivationScheme, InputQuantization, LinearScheme, QuantizedLinear, ScaleDtype,
    Scheme, WeightScheme, Weights,
};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::floats::{
    check_codes, check_float, code_dtype, grid, pack_nibbles, read_scales, scale_bytes, unpack_nibbles,
};
use crate::tensors::{
    Dtypes, Reader, SCALE_DTYPES, check_symmetry, check_weight, decode_scales, dtype_of, encode_scales, groups, value,
};
use crate::{PackError, PackedTensor, TensorRef, TensorSpec, Unpacked};

/// One scale of a whole tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Single {
    /// The name after the module's.
    pub(crate) suffix: &'static str,
    /// Written with shape `[]` rather than `[1]`; both are read.
    pub(crate) scalar: bool,
    /// Stored as its reciprocal.
    pub(crate) divisor: bool,
}

/// How the tensors of one linear are called and shaped.
#[derive(Debug, Clone)]
pub(crate) struct Form {
    pub(crate) layout: &'static str,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// The codes. Fp4 codes are in pairs, all others a byte each, integers signed.
    pub(crate) codes: &'static str,
    pub(crate) scales: &'static str,
    /// The shape of the scales as it is written, then others that are read.
    pub(crate) shapes: Vec<Vec<usize>>,
    /// The type that all scales of the usual kind are written in, if it is always the same. It must hold the others.
    pub(crate) wide: Option<ScaleDtype>,
    /// Zero points of asymmetric integers, signed bytes in the shape of the scales.
    pub(crate) zeros: &'static str,
    /// The global scale of NVFP4.
    pub(crate) global: Single,
    /// The scale of static activations.
    pub(crate) input: Option<Single>,
    /// Their zero point, if they are asymmetric.
    pub(crate) input_zero: Option<&'static str>,
}

const E8M0_DTYPES: Dtypes = (&[Dtype::U8, Dtype::F8_E8M0], "U8 or F8_E8M0");
const E4M3_DTYPES: Dtypes = (&[Dtype::F8_E4M3], "F8_E4M3");
const SINGLE_DTYPES: Dtypes = SCALE_DTYPES;
const BYTES: Dtypes = (&[Dtype::I8], "I8");

impl Form {
    /// The tensors that [`pack`](Self::pack) makes.
    pub(crate) fn describe(&self, scheme: &LinearScheme) -> Vec<TensorSpec> {
        let spec = |suffix, dtype, shape: &[usize]| TensorSpec { suffix, dtype, shape: shape.to_vec() };
        let scale_shape = self.shapes.first().map_or(&[][..], Vec::as_slice);
        let mut specs = Vec::new();
        match &scheme.weights {
            WeightScheme::Int(int) => {
                specs.push(spec(self.codes, Dtype::I8, &[self.n, self.k]));
                specs.push(spec(self.scales, dtype_of(self.wide.unwrap_or(int.scale_dtype)), scale_shape));
                if !int.symmetric {
                    specs.push(spec(self.zeros, Dtype::I8, scale_shape));
                }
            }
            WeightScheme::Float(float) => {
                let row = self.k * usize::from(float.format.bits()) / 8;
                specs.push(spec(self.codes, code_dtype(float.format), &[self.n, row]));
                let dtype = match float.scale {
                    ScaleKind::Float(dtype) => dtype_of(self.wide.unwrap_or(dtype)),
                    ScaleKind::E8M0 => Dtype::U8,
                    ScaleKind::E4M3WithGlobal => Dtype::F8_E4M3,
                };
                specs.push(spec(self.scales, dtype, scale_shape));
                if float.scale == ScaleKind::E4M3WithGlobal {
                    specs.push(spec(self.global.suffix, Dtype::F32, single_shape(&self.global)));
                }
            }
        }
        if let Some(input) = &self.input {
            specs.push(spec(input.suffix, Dtype::F32, single_shape(input)));
            specs.extend(self.input_zero.map(|suffix| spec(suffix, Dtype::I8, &[1])));
        }
        specs
    }

    /// Packs a weight of the scheme that the form was made for.
    pub(crate) fn pack(
        &self,
        weights: &Weights,
        activations: Option<&ActivationScheme>,
        input: Option<&InputQuantization>,
    ) -> Result<Vec<PackedTensor>, PackError> {
        let mut data = match weights {
            Weights::Int(weight) => self.integers(weight)?,
            Weights::Float(weight) => self.floats(weight)?,
        };
        if let (Some(single), Some(input)) = (&self.input, checked_input(activations, input)?) {
            data.push(single_bytes(single, f64::from(input.scale))?);
            if self.input_zero.is_some() {
                data.push(vec![input.zero_point as i8 as u8]);
            }
        }
        let scheme = LinearScheme { weights: weights.scheme(), activations: activations.copied() };
        let specs = self.describe(&scheme).into_iter().zip(data);
        Ok(specs
            .map(|(TensorSpec { suffix, dtype, shape }, data)| PackedTensor { suffix, dtype, shape, data })
            .collect())
    }

    fn integers(&self, weight: &QuantizedLinear) -> Result<Vec<Vec<u8>>, PackError> {
        check_weight(weight)?;
        let middle = weight.scheme.middle_code();
        let mut codes = weight.codes.clone();
        codes
            .par_chunks_mut(1 << 16)
            .for_each(|part| part.iter_mut().for_each(|code| *code = code.wrapping_sub(middle)));
        let dtype = self.wide.unwrap_or(weight.scheme.scale_dtype);
        let mut data = vec![codes, encode_scales(weight.scales.iter().copied(), dtype, weight.scales.len())];
        if !weight.scheme.symmetric {
            data.push(weight.zeros.iter().map(|zero| zero.wrapping_sub(middle)).collect());
        }
        Ok(data)
    }

    fn floats(&self, weight: &FloatLinear) -> Result<Vec<Vec<u8>>, PackError> {
        check_float(weight)?;
        let codes = match weight.scheme.format.bits() {
            4 => pack_nibbles(&weight.codes),
            _ => weight.codes.clone(),
        };
        let scales = match weight.scheme.scale {
            ScaleKind::Float(dtype) => {
                encode_scales(weight.scales.iter().copied(), self.wide.unwrap_or(dtype), weight.scales.len())
            }
            kind => scale_bytes(kind, &weight.scales),
        };
        let mut data = vec![codes, scales];
        if weight.scheme.scale == ScaleKind::E4M3WithGlobal {
            data.push(single_bytes(&self.global, weight.global_scale)?);
        }
        Ok(data)
    }

    /// Unpacks a weight of this scheme.
    pub(crate) fn unpack<'a>(
        &self,
        scheme: &LinearScheme,
        get: &dyn Fn(&str) -> Option<TensorRef<'a>>,
    ) -> Result<Unpacked, PackError> {
        let reader = Reader { layout: self.layout, get };
        let weights = match &scheme.weights {
            WeightScheme::Int(int) => Weights::Int(self.read_integers(int, &reader)?),
            WeightScheme::Float(float) => Weights::Float(self.read_floats(float, &reader)?),
        };
        let input = match &self.input {
            None => None,
            Some(single) => {
                let scale = read_single(single, &reader)? as f32;
                let zero_point = match self.input_zero {
                    None => 0,
                    Some(suffix) => {
                        let zero = reader.tensor_of(suffix, BYTES, &[vec![1], Vec::new()])?;
                        zero.data.first().map_or(0, |&zero| i32::from(zero as i8))
                    }
                };
                Some(InputQuantization { scale, zero_point })
            }
        };
        Ok(Unpacked { weights, input })
    }

    fn read_integers(&self, scheme: &Scheme, reader: &Reader<'_, '_>) -> Result<QuantizedLinear, PackError> {
        let (n, k) = (self.n, self.k);
        let g = groups(self.layout, scheme, n, k)?;
        let stored = reader.tensor(self.codes, BYTES, &[n, k])?;
        let codes = self.unsigned(self.codes, stored.data, scheme, k)?;
        let (scale_dtype, scales) =
            decode_scales(self.scales, reader.tensor_of(self.scales, SCALE_DTYPES, &self.shapes)?)?;
        let zeros = if scheme.symmetric {
            vec![scheme.middle_code(); n * g]
        } else {
            let zeros = reader.tensor_of(self.zeros, BYTES, &self.shapes)?;
            self.unsigned(self.zeros, zeros.data, scheme, g)?
        };
        check_symmetry(self.zeros, scheme, &zeros, g)?;
        let scheme = Scheme { scale_dtype, ..*scheme };
        Ok(QuantizedLinear { scheme, out_features: n, in_features: k, codes, scales, zeros })
    }

    /// Unsigned codes of signed bytes.
    fn unsigned(&self, what: &'static str, bytes: &[u8], scheme: &Scheme, width: usize) -> Result<Vec<u8>, PackError> {
        let (middle, max) = (scheme.middle_code(), scheme.max_code());
        let codes: Vec<u8> = bytes.par_iter().with_min_len(1 << 16).map(|&byte| byte.wrapping_add(middle)).collect();
        match codes.iter().position(|&code| code > max) {
            None => Ok(codes),
            Some(at) => {
                let wanted = format!("-{middle} to {}", middle - 1);
                Err(value(what, (bytes[at] as i8).to_string(), at, width.max(1), wanted))
            }
        }
    }

    fn read_floats(&self, scheme: &FloatScheme, reader: &Reader<'_, '_>) -> Result<FloatLinear, PackError> {
        let (n, k) = (self.n, self.k);
        grid(self.layout, scheme, n, k)?;
        let four = scheme.format.bits() == 4;
        let dtype = code_dtype(scheme.format);
        let wanted: Dtypes = match dtype {
            Dtype::F8_E4M3 => E4M3_DTYPES,
            Dtype::F8_E5M2 => (&[Dtype::F8_E5M2], "F8_E5M2"),
            _ => (&[Dtype::U8], "U8"),
        };
        let stored = reader.tensor(self.codes, wanted, &[n, if four { k / 2 } else { k }])?;
        let codes = if four { unpack_nibbles(stored.data) } else { stored.data.to_vec() };
        check_codes(self.codes, scheme.format, &codes, k)?;
        let dtypes = match scheme.scale {
            ScaleKind::Float(_) => SCALE_DTYPES,
            ScaleKind::E8M0 => E8M0_DTYPES,
            ScaleKind::E4M3WithGlobal => E4M3_DTYPES,
        };
        let scales = reader.tensor_of(self.scales, dtypes, &self.shapes)?;
        let (scale, scales) = read_scales(self.scales, scheme.scale, scales)?;
        let global_scale = if scale == ScaleKind::E4M3WithGlobal { read_single(&self.global, reader)? } else { 1.0 };
        let scheme = FloatScheme { scale, ..*scheme };
        Ok(FloatLinear { scheme, out_features: n, in_features: k, codes, scales, global_scale })
    }
}

/// Whether calibration finds the scale of these activations.
pub(crate) fn is_static(activations: Option<&ActivationScheme>) -> bool {
    use ActivationScale::{StaticTensor, StaticTensorLocal};
    activations.is_some_and(|inputs| matches!(inputs.scale, StaticTensor | StaticTensorLocal(_)))
}

/// The input's scale where the activations are static, and none where they are not.
pub(crate) fn checked_input<'i>(
    activations: Option<&ActivationScheme>,
    input: Option<&'i InputQuantization>,
) -> Result<Option<&'i InputQuantization>, PackError> {
    match (activations, input) {
        (Some(inputs), None) if is_static(Some(inputs)) => {
            Err(PackError::Input { found: "no scale", wanted: "and its activations are static: calibrate them first" })
        }
        (inputs, Some(_)) if !is_static(inputs) => {
            Err(PackError::Input { found: "a static scale", wanted: "and its activations have none: leave it out" })
        }
        (Some(inputs), Some(input)) => {
            let wanted = match inputs.format {
                ActivationFormat::Int { bits, symmetric: false } => {
                    let middle = 1i32 << (bits.clamp(1, 8) - 1);
                    -middle..middle
                }
                _ => 0..1,
            };
            if wanted.contains(&input.zero_point) {
                return Ok(Some(input));
            }
            let wanted = format!("{} to {}", wanted.start, wanted.end - 1);
            Err(value("input_zero_point", input.zero_point.to_string(), 0, 1, wanted))
        }
        _ => Ok(None),
    }
}

fn single_shape(single: &Single) -> &'static [usize] {
    if single.scalar { &[] } else { &[1] }
}

/// A single scale as it is stored.
fn single_bytes(single: &Single, scale: f64) -> Result<Vec<u8>, PackError> {
    let stored = (if single.divisor { 1.0 / scale } else { scale }) as f32;
    if stored.is_normal() && stored > 0.0 {
        return Ok(stored.to_le_bytes().to_vec());
    }
    Err(value(single.suffix, stored.to_string(), 0, 1, "a positive, finite number".to_owned()))
}

/// A single scale, in whichever shape it is stored.
fn read_single(single: &Single, reader: &Reader<'_, '_>) -> Result<f64, PackError> {
    let tensor = reader.tensor_of(single.suffix, SINGLE_DTYPES, &[vec![1], Vec::new()])?;
    let stored = decode_scales(single.suffix, tensor)?.1.first().copied().unwrap_or(0.0);
    if !stored.is_normal() || stored < 0.0 {
        return Err(value(single.suffix, stored.to_string(), 0, 1, "a positive, finite number".to_owned()));
    }
    Ok(if single.divisor { 1.0 / f64::from(stored) } else { f64::from(stored) })
}
