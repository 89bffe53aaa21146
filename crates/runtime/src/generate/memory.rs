//! How much memory a checkpoint needs for generation, from its headers alone.

use lite_decoder::{AttnSpec, DecoderSpec, Role};
use lite_kernels::{ElementType, Matrix};
use lite_model::Dtype;
use lite_quant::WeightScheme;

use super::forward::CHUNK;
use super::linear::PANEL;
use crate::eval::EvalModel;

/// Largest share of a growing vector that is not in use yet: it doubles.
const GROWTH: u64 = 2;

/// What [`ResidentModel`](super::ResidentModel) and its cache need, in bytes; an upper bound of what they touch, but
/// for mapped pages of files, which the system takes back when it has to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Weights as they are held: codes of 4 or 8 bits, bf16, f16 or f32. Values of fp8 and fp4 weights need f32.
    pub weights: u64,
    /// Beside the weights while they are read: the largest matrix as codes and f32.
    pub loading: u64,
    /// Keys and values of all tokens, f32.
    pub cache: u64,
    /// Activations and logits of the longest input.
    pub work: u64,
}

impl MemoryNeed {
    /// The need of `files` for a prompt of `prompt` tokens and a text of `total` tokens, prompt and answer.
    pub fn of(files: &EvalModel, prompt: usize, total: usize) -> Self {
        let spec = files.spec();
        let mut need = Self { weights: 0, loading: 0, cache: cache(spec, total), work: work(spec, prompt, total) };
        need.add(files, &spec.embed.weight, spec.vocab, spec.hidden);
        if spec.head.normalised {
            // Rows of length one fit no smaller type.
            need.hold(ElementType::F32, spec.vocab, spec.hidden, 1, 1 + 4);
        } else if !spec.head.tied {
            need.add(files, &spec.head.weight, spec.vocab, spec.hidden);
        }
        for site in spec.sites() {
            need.add(files, &format!("{}.weight", site.module), site.out_features, site.in_features);
        }
        for moe in spec.blocks.iter().filter_map(|block| block.moe()) {
            need.add(files, &moe.router.weight, moe.experts, spec.hidden);
            for gate in moe.shared.iter().filter_map(|shared| shared.gate.as_ref()) {
                need.add(files, gate, 1, spec.hidden);
            }
        }
        need
    }

    /// The most at one time.
    pub fn peak(&self) -> u64 {
        self.weights.saturating_add(self.loading.max(self.cache.saturating_add(self.work)))
    }

    fn add(&mut self, files: &EvalModel, name: &str, n: usize, k: usize) {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let (kind, groups, codes) = match (files.scheme(module), files.dtype(name)) {
            (Some(WeightScheme::Int(scheme)), _) => {
                let kind = if scheme.bits <= 4 { ElementType::Int4 } else { ElementType::Int8 };
                // A group that does not fit is an error when the linear is read.
                (kind, scheme.groups(k).unwrap_or(1), 1)
            }
            (Some(WeightScheme::Float(_)), _) => (ElementType::F32, 1, 1 + 4),
            (None, Some(Dtype::BF16)) => (ElementType::Bf16, 1, 4),
            (None, Some(Dtype::F16)) => (ElementType::F16, 1, 4),
            // Of f32 a smaller type may do; codes need it.
            (None, _) => (ElementType::F32, 1, 1 + 4),
        };
        self.hold(kind, n, k, groups, codes);
    }

    /// A matrix of this type, and bytes per value beside it while it is read.
    fn hold(&mut self, kind: ElementType, n: usize, k: usize, groups: usize, codes: u64) {
        self.weights = self.weights.saturating_add(Matrix::bytes_of(kind, n, k, groups));
        self.loading = self.loading.max(values(&[n, k]).saturating_mul(codes));
    }
}

/// Product of dimensions.
fn values(shape: &[usize]) -> u64 {
    shape.iter().fold(1, |product: u64, n| product.saturating_mul(*n as u64))
}

fn cache(spec: &DecoderSpec, tokens: usize) -> u64 {
    let heads = spec.blocks.iter().map(|block| match &block.attn {
        AttnSpec::Gqa(attn) => values(&[attn.kv_heads, attn.head_dim]),
        _ => 0,
    });
    let per_token = heads.fold(0, u64::saturating_add).saturating_mul(2 * 4 * GROWTH);
    per_token.saturating_mul(tokens as u64)
}

fn work(spec: &DecoderSpec, prompt: usize, total: usize) -> u64 {
    let tokens = prompt.clamp(1, CHUNK);
    // Outputs of all linears of the widest block stand for what is alive between them, and the residual beside them.
    let block = |block: &lite_decoder::BlockSpec| -> u64 {
        // Routed experts run one after the other.
        let alive = block.sites.iter().filter(|site| !matches!(site.id.role, Role::Expert(1.., _)));
        let widths = alive.map(|site| site.out_features as u64 + site.in_features as u64);
        widths.fold(2 * spec.hidden as u64, u64::saturating_add)
    };
    let widest = spec.blocks.iter().map(block).max().unwrap_or(0);
    // Scores of one tile of queries, on each thread.
    let heads = spec.blocks.iter().map(|block| match &block.attn {
        AttnSpec::Gqa(attn) => attn.heads / attn.kv_heads.max(1),
        _ => 0,
    });
    let scores = values(&[rayon::current_num_threads(), heads.max().unwrap_or(0), tokens.min(64), total]);
    let floats = widest.saturating_mul(tokens as u64).saturating_add(scores).saturating_add(2 * spec.vocab as u64);
    floats.saturating_add(PANEL as u64).saturating_mul(4)
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
