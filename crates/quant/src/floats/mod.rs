//! Small floating-point weights: fp8 and fp4 codes, their scales, and what they stand for.
//!
//! `w ≈ value(code) · scale · global`, with one scale per tensor, output channel, group of input channels or
//! block. Sources: OCP FP8 (E4M3, E5M2) and MX (E2M1, E8M0) specifications; NVFP4 as compressed-tensors and ModelOpt
//! store it.

mod format;
mod kernel;
mod linear;
mod quantize;
mod scheme;

pub use format::{FloatFormat, e8m0};
pub use linear::FloatLinear;
pub use quantize::{FloatRange, mx_code, nvfp4_global, quantize_float};
pub use scheme::{FloatScheme, Grain, ScaleKind};
