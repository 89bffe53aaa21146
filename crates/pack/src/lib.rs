//! Checkpoint layouts, both ways, and the rules of the engines that read them.
//!
//! A [`Layout`] turns one [`lite_quant::Weights`] into the tensors of a checkpoint and back,
//! and writes the matching `quantization_config`. A layout knows no quantization method and no file:
//! it maps integers to bytes. [`targets`] knows which of those checkpoints an engine loads, so that a
//! plan can be refused before the first weight is read.
//!
//! The tensors of one linear `[N, K]` with G groups per row and b bits:
//!
//! | layout | codes | scales | zero points |
//! |---|---|---|---|
//! | `awq` | `qweight` I32 `[K, N/8]` | `scales` `[G, N]` | `qzeros` I32 `[G, N/8]` |
//! |`compressed-tensors`|`weight_packed` I32 `[N, ⌈K·b/32⌉]`|`weight_scale` `[N, G]`|`weight_zero_point` I32 `[⌈N·b/32⌉, G]`|
//! | `gptq` | `qweight` I32 `[K·b/32, N]` | `scales` `[G, N]` | `qzeros` I32 `[G, N·b/32]` |
//!
//! | other formats of it | `weight` I8 or F8 `[N, K]`, `weight_packed` U8 `[N, K/2]` (fp4) | `weight_scale` | `weight_zero_point` I8 |
//! | `lmdeploy-w8a8` | `weight` I8 or F8 `[N, K]` | `scale` F32 `[N, 1]` | |
//! | `fp8` | `weight` F8 `[N, K]` | `weight_scale_inv` F32 per block, or `weight_scale` F32 `[1]` | |
//! | `modelopt` | `weight` F8 `[N, K]` or U8 `[N, K/2]` | `weight_scale`, with fp4 `weight_scale_2` F32 `[]` | |
//!
//! compressed-tensors adds `weight_shape` I64 `[2]` and drops the zero points of symmetric schemes; gptq
//! adds `g_idx` I32 `[K]`, the group of every input channel.
#![forbid(unsafe_code)]

mod awq;
mod bits;
mod compressed_tensors;
mod config;
mod error;
mod floats;
mod form;
mod formed;
mod fp8;
mod gptq;
mod layout;
mod lmdeploy_w8a8;
mod modelopt;
mod presets;
mod schemes;
pub mod targets;
mod tensors;

pub use config::{ConfigFacts, KvCacheScheme, ParsedConfig, detect};
pub use error::{ErrorKind, PackError};
pub use layout::{Layout, PackedTensor, TensorRef, TensorSpec, Unpacked, all, default_layout, layout};
pub use presets::{PRESETS, near_presets, preset};
