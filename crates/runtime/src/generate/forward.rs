//! The forward pass over new tokens.

use lite_decoder::{DecoderError, GqaSpec, MlpSpec, Role, RopeScaling, Stream};

use super::attention::attend;
use super::cache::BlockCache;
use super::linear::multiply;
use super::model::{ResidentBlock, gqa};
use super::ops::{Rotation, add, rms_norm, rms_norm_row, silu_mul, silu_mul_stacked};
use super::{KvCache, ResidentModel};
use crate::RuntimeError;

/// New tokens that run together; bounds the memory of a long prompt.
const CHUNK: usize = 512;

/// Of which tokens [`ResidentModel::forward`] gives logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The last new one: `(1, vocab)`.
    Last,
    /// All new ones: `(tokens, vocab)`.
    All,
}

impl ResidentModel {
    /// How many tokens the model attends over, prompt and answer together; `None` if its rotary embedding grows with the
    /// text (dynamic scaling), so that there is no such number.
    pub fn context(&self) -> Option<usize> {
        match self.spec.rope.scaling {
            RopeScaling::Dynamic { .. } => None,
            _ => Some(self.spec.max_positions),
        }
    }

    /// Logits of new `tokens` after those in `cache`, which they join.
    ///
    /// The rotary frequencies are those for the length after these tokens, as in transformers: with dynamic scaling keys
    /// keep the rotation of the call that made them, and with LongRoPE the whole cache is computed again when the text
    /// first grows past the original length.
    ///
    /// # Errors
    /// No tokens, tokens outside of the vocabulary, more than [`context`](Self::context) tokens, or NaN and Inf on the
    /// way. After an error the cache is empty.
    pub fn forward(&self, cache: &mut KvCache, tokens: &[u32], wanted: Wanted) -> Result<Vec<f32>, RuntimeError> {
        let result = self.check(cache, tokens).and_then(|total| {
            let past = cache.tokens.len();
            let crosses = matches!(self.spec.rope.scaling, RopeScaling::LongRope { original, .. }
                if (1..=original).contains(&past) && total > original);
            if !crosses {
                return self.run(cache, tokens, total, wanted);
            }
            let all = [&cache.tokens, tokens].concat();
            cache.clear();
            let logits = self.run(cache, &all, total, wanted)?;
            // Those of the new tokens only.
            let keep = if wanted == Wanted::Last { 1 } else { tokens.len() };
            Ok(logits[logits.len() - keep * self.spec.vocab..].to_vec())
        });
        if result.is_err() {
            cache.clear();
        }
        result
    }

    /// The number of tokens in the cache after `tokens`, if all is well.
    fn check(&self, cache: &KvCache, tokens: &[u32]) -> Result<usize, RuntimeError> {
        let fail = |reason| Err(RuntimeError::Generate { reason });
        let total = cache.tokens.len() + tokens.len();
        if tokens.is_empty() {
            return fail("there are no tokens to continue; give a prompt of at least one token".to_owned());
        }
        if cache.blocks.len() != self.blocks.len() {
            let (found, wanted) = (cache.blocks.len(), self.blocks.len());
            return fail(format!("the cache has {found} blocks, the model {wanted}; make a new one for this model"));
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= self.spec.vocab) {
            let vocab = self.spec.vocab;
            return fail(format!(
                "token {id} is outside of the vocabulary of {vocab}; does the tokenizer belong to this model?"
            ));
        }
        match self.context() {
            Some(context) if total > context => {
                fail(format!("{total} tokens do not fit the model's context of {context}; shorten the prompt"))
            }
            _ => Ok(total),
        }
    }

    fn run(&self, cache: &mut KvCache, tokens: &[u32], total: usize, wanted: Wanted) -> Result<Vec<f32>, RuntimeError> {
        let (frequencies, factor) = self.spec.rope.frequencies(total);
        let mut out = Vec::new();
        for chunk in tokens.chunks(CHUNK) {
            let past = cache.tokens.len();
            let rotation = Rotation::new(&frequencies, factor, past, chunk.len());
            let mut x = vec![0f32; chunk.len() * self.spec.hidden];
            for (id, row) in chunk.iter().zip(x.chunks_exact_mut(self.spec.hidden)) {
                self.embed.expand_rows(*id as usize, row);
            }
            for (index, block) in self.blocks.iter().enumerate() {
                self.block(index, block, cache, &rotation, past, &mut x)?;
            }
            cache.tokens.extend_from_slice(chunk);
            let last = cache.tokens.len() == total;
            match wanted {
                Wanted::Last if last => out = self.logits(&x[x.len() - self.spec.hidden..])?,
                Wanted::Last => {}
                Wanted::All => out.extend(self.logits(&x)?),
            }
        }
        Ok(out)
    }

    /// Final norm and head of `(rows, hidden)`.
    fn logits(&self, x: &[f32]) -> Result<Vec<f32>, RuntimeError> {
        let mut logits = multiply(self.head(), &rms_norm(x, &self.final_norm, self.spec.final_norm.eps));
        if let Some(bias) = &self.head_bias {
            for row in logits.chunks_exact_mut(bias.len()) {
                add(row, bias);
            }
        }
        if logits.iter().all(|v| v.is_finite()) {
            return Ok(logits);
        }
        Err(RuntimeError::LogitsNotFinite { which: "loaded" })
    }

    /// One block, in place on `x` `(tokens, hidden)`.
    fn block(
        &self,
        index: usize,
        block: &ResidentBlock,
        cache: &mut KvCache,
        rotation: &Rotation,
        past: usize,
        x: &mut [f32],
    ) -> Result<(), RuntimeError> {
        let spec = &self.spec.blocks[index];
        let attn = gqa(spec)?;
        let normed = rms_norm(x, &block.attn_norm, spec.norms.attn.eps);
        let parts: Vec<(Role, Vec<f32>)> =
            block.reading(Stream::AttnIn).map(|(role, linear)| (role, linear.forward(&normed))).collect();
        let q = heads(attn, block, cache.precision(), &mut cache.blocks[index], rotation, &parts)?;
        let out = attend(attn, &cache.blocks[index], &q, past);
        for (_, linear) in block.reading(Stream::AttnOut) {
            add(x, &linear.forward(&out));
        }
        let normed = rms_norm(x, &block.mlp_norm, spec.norms.mlp.eps);
        let mut parts: Vec<Vec<f32>> =
            block.reading(Stream::MlpIn).map(|(_, linear)| linear.forward(&normed)).collect();
        let MlpSpec::Gated(mlp) = &spec.mlp else { return Err(no_part(index, "feed-forward")) };
        let middle = match parts.as_mut_slice() {
            [both] => silu_mul_stacked(both, mlp.intermediate),
            [gate, up] => {
                silu_mul(gate, up);
                std::mem::take(gate)
            }
            _ => return Err(no_part(index, "gate and up projections")),
        };
        for (_, linear) in block.reading(Stream::MlpMid) {
            add(x, &linear.forward(&middle));
        }
        if x.iter().all(|v| v.is_finite()) {
            return Ok(());
        }
        Err(RuntimeError::NotFinite { block: index, which: "loaded" })
    }
}

fn no_part(block: usize, what: &str) -> RuntimeError {
    DecoderError::Input { reason: format!("block {block} has no {what} that generation knows") }.into()
}

/// Normalises and rotates queries, which are returned `(tokens, heads·head_dim)`, and keys, and puts keys and values into
/// the cache.
fn heads(
    attn: &GqaSpec,
    block: &ResidentBlock,
    precision: super::KvPrecision,
    cache: &mut BlockCache,
    rotation: &Rotation,
    parts: &[(Role, Vec<f32>)],
) -> Result<Vec<f32>, RuntimeError> {
    let dim = attn.head_dim;
    let outputs = |role| match attn.qkv {
        lite_decoder::QkvLayout::Separate if role == Role::Q => attn.heads * dim,
        lite_decoder::QkvLayout::Separate => attn.kv_heads * dim,
        _ => (attn.heads + 2 * attn.kv_heads) * dim,
    };
    let projection = |role| {
        let found = parts.iter().find(|(r, _)| *r == role).map(|(_, values)| (values.as_slice(), outputs(role)));
        found.ok_or_else(|| DecoderError::Input { reason: format!("attention lacks its {role:?} projection") })
    };
    let [(q_role, q_columns), (k_role, k_columns), (v_role, v_columns)] = attn.columns();
    let turned = |row: usize, head: &mut [f32], norm: Option<(&Vec<f32>, f32)>| {
        if let Some((weight, eps)) = norm {
            rms_norm_row(head, weight, eps);
        }
        rotation.turn(row, head);
    };
    let (values, stride) = projection(q_role)?;
    let norm = block.q_norm.as_ref().zip(attn.q_norm.as_ref().map(|norm| norm.eps));
    let tokens = values.len() / stride;
    let mut q = vec![0f32; tokens * attn.heads * dim];
    for (row, out) in q.chunks_exact_mut(attn.heads * dim).enumerate() {
        for (out, column) in out.chunks_exact_mut(dim).zip(&q_columns) {
            out.copy_from_slice(&values[row * stride + column..][..dim]);
            turned(row, out, norm);
        }
    }
    let (values, stride) = projection(k_role)?;
    let norm = block.k_norm.as_ref().zip(attn.k_norm.as_ref().map(|norm| norm.eps));
    for (keys, column) in cache.keys.iter_mut().zip(&k_columns) {
        for (row, projected) in values.chunks_exact(stride).enumerate() {
            let start = keys.len();
            keys.extend_from_slice(&projected[*column..][..dim]);
            turned(row, &mut keys[start..], norm);
            precision.apply_scaled(&mut keys[start..], dim, block.kv_scales[0]);
        }
    }
    let (values, stride) = projection(v_role)?;
    for (cached, column) in cache.values.iter_mut().zip(&v_columns) {
        for projected in values.chunks_exact(stride) {
            let start = cached.len();
            cached.extend_from_slice(&projected[*column..][..dim]);
            precision.apply_scaled(&mut cached[start..], dim, block.kv_scales[1]);
        }
    }
    Ok(q)
}
