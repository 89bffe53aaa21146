//! The few operations of a block on tensors: fused kernels on the CPU, or composed candle operations on any device.

use candle_core::{DType, Device, Storage, Tensor};
use lite_linalg::{Mat, Threads, gemm};

use crate::{Activation, DecoderError, Glu, activations, kernels};

/// Calls `f` with the values of `x` (f32) in row-major order. Copies only what is not contiguous on the CPU.
///
/// # Errors
/// If `x` is not f32, or its device cannot be read.
pub fn with_cpu_slice<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R, DecoderError> {
    if x.dtype() != DType::F32 {
        return Err(DecoderError::input(format!("a tensor of type {:?} was given, wanted F32", x.dtype())));
    }
    let copy;
    let x = if x.device().is_cpu() && x.is_contiguous() {
        x
    } else {
        copy = x.to_device(&Device::Cpu)?.contiguous()?;
        &copy
    };
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(f(&storage.as_slice::<f32>()?[start..end])),
        _ => Err(DecoderError::input("a tensor could not be brought to the CPU as one slice")),
    }
}

/// `x · weightᵀ + bias`: `(rows, in)`, `[out, in]` and `[out]` to `(rows, out)`.
pub(crate) fn linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    composed: bool,
) -> Result<Tensor, DecoderError> {
    linear_on(Threads::All, x, weight, bias, composed)
}

/// [`linear`], on the CPU by the threads given: the values are the same.
pub(crate) fn linear_on(
    threads: Threads,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    composed: bool,
) -> Result<Tensor, DecoderError> {
    let ((rows, in_features), (out_features, columns)) = (x.dims2()?, weight.dims2()?);
    if in_features != columns {
        let reason = format!("an input of width {in_features} meets a weight of width {columns}");
        return Err(DecoderError::input(reason));
    }
    if composed {
        let out = x.matmul(&weight.t()?)?;
        return Ok(match bias {
            Some(bias) => out.broadcast_add(bias)?,
            None => out,
        });
    }
    let mut out = with_cpu_slice(x, |x| {
        with_cpu_slice(weight, |weight| {
            let (x, weight) = (Mat::new(x, rows, in_features), Mat::new(weight, out_features, in_features));
            gemm(x, weight.t(), threads)
        })
    })??;
    if let Some(bias) = bias {
        with_cpu_slice(bias, |bias| kernels::add_row(&mut out, bias))?;
    }
    Ok(Tensor::from_vec(out, (rows, out_features), x.device())?)
}

/// `x · factor`.
pub(crate) fn scaled(x: &Tensor, factor: f32, composed: bool) -> Result<Tensor, DecoderError> {
    if factor == 1.0 {
        return Ok(x.clone());
    }
    if composed {
        return Ok((x * f64::from(factor))?);
    }
    let out = with_cpu_slice(x, |x| kernels::scaled(x, factor))?;
    Ok(Tensor::from_vec(out, x.shape(), x.device())?)
}

/// `a + b`, of one shape.
pub(crate) fn add(a: &Tensor, b: &Tensor, composed: bool) -> Result<Tensor, DecoderError> {
    if composed {
        return Ok((a + b)?);
    }
    let out = with_cpu_slice(a, |a| with_cpu_slice(b, |b| kernels::add(a, b)))??;
    Ok(Tensor::from_vec(out, a.shape(), a.device())?)
}

/// Gate and up to one: from two tensors `(rows, width)`, or one `(rows, 2·width)` that holds the gate first.
pub(crate) fn gated(
    parts: &[Tensor],
    width: usize,
    glu: impl Into<Glu>,
    composed: bool,
) -> Result<Tensor, DecoderError> {
    let glu = glu.into();
    let (gate, up, start) = match parts {
        [both] => (both, both, width),
        [gate, up] => (gate, up, 0),
        _ => return Err(DecoderError::input(format!("{} gate and up projections, wanted 1 or 2", parts.len()))),
    };
    if composed {
        return gated_composed(gate, up, start, width, glu);
    }
    let (rows, stride) = gate.dims2()?;
    let out = with_cpu_slice(gate, |gate| {
        with_cpu_slice(up, |up| activations::gated(glu, gate, &up[start..], rows, width, stride))
    })??;
    Ok(Tensor::from_vec(out, (rows, width), parts[0].device())?)
}

/// [`gated`] by candle operations: the gate from column 0, up from column `start`.
pub(crate) fn gated_composed(
    gate: &Tensor,
    up: &Tensor,
    start: usize,
    width: usize,
    glu: impl Into<Glu>,
) -> Result<Tensor, DecoderError> {
    let (gate, up) = (gate.narrow(1, 0, width)?, up.narrow(1, start, width)?);
    Ok(match glu.into() {
        Glu::Product(activation) => (activated_composed(&gate, activation)? * up)?.contiguous()?,
        Glu::Clamped { slope, limit } => {
            let limit = f64::from(limit);
            let gate = gate.minimum(limit)?;
            let up = (up.clamp(-limit, limit)? + 1.0)?;
            let sigmoid = ((&gate * -f64::from(slope))?.exp()? + 1.0)?.recip()?;
            ((gate * sigmoid)? * up)?.contiguous()?
        }
    })
}

/// `activation(x)`.
pub(crate) fn activated(x: &Tensor, activation: Activation, composed: bool) -> Result<Tensor, DecoderError> {
    if composed {
        return activated_composed(x, activation);
    }
    let out = with_cpu_slice(x, |x| activations::activated(activation, x))?;
    Ok(Tensor::from_vec(out, x.shape(), x.device())?)
}

/// [`activated`] by candle operations.
pub(crate) fn activated_composed(x: &Tensor, activation: Activation) -> Result<Tensor, DecoderError> {
    Ok(match activation {
        Activation::Silu => x.silu()?,
        // candle's `gelu` is the one with tanh.
        Activation::GeluTanh => x.gelu()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize) -> Tensor {
        Tensor::randn(0f32, 1.5, (rows, columns), &Device::Cpu).unwrap()
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn composed_operations_agree_with_the_kernels() {
        let x = random(7, 48);
        let parts = [0, 24].map(|start| x.narrow(1, start, 24).unwrap().contiguous().unwrap());
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let stacked = gated(std::slice::from_ref(&x), 24, activation, false).unwrap();
            assert_eq!(largest_difference(&stacked, &gated(&parts, 24, activation, false).unwrap()), 0.0);
            let composed = gated(std::slice::from_ref(&x), 24, activation, true).unwrap();
            assert!(largest_difference(&stacked, &composed) < 1e-5, "{activation:?}");
            let by_hand = (activated(&parts[0], activation, false).unwrap() * &parts[1]).unwrap();
            assert!(largest_difference(&stacked, &by_hand) < 1e-6, "{activation:?}");
        }
        let glu = Glu::Clamped { slope: 1.702, limit: 1.2 };
        let stacked = gated(std::slice::from_ref(&x), 24, glu, false).unwrap();
        assert_eq!(largest_difference(&stacked, &gated(&parts, 24, glu, false).unwrap()), 0.0);
        assert!(largest_difference(&stacked, &gated(&parts, 24, glu, true).unwrap()) < 1e-5);

        let w = random(5, 48);
        let bias = random(1, 5).squeeze(0).unwrap();
        let wanted = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
        assert!(largest_difference(&linear(&x, &w, Some(&bias), false).unwrap(), &wanted) < 1e-4);
        assert!(largest_difference(&linear(&x, &w, Some(&bias), true).unwrap(), &wanted) < 1e-4);
    }

    #[test]
    fn slices_follow_views() {
        let x = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        let turned = with_cpu_slice(&x.t().unwrap(), <[f32]>::to_vec).unwrap();
        assert_eq!(turned, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        let second = with_cpu_slice(&x.narrow(0, 1, 1).unwrap(), <[f32]>::to_vec).unwrap();
        assert_eq!(second, [3.0, 4.0, 5.0]);
        assert!(with_cpu_slice(&x.to_dtype(DType::F64).unwrap(), |_| ()).is_err());
    }
}
