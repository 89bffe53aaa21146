//! The forward pass over new tokens.

use lite_decoder::{DecoderError, GqaSpec, InputId, InputTransform, KvPart, MlpSpec, Role, RopeScaling, Stream};

use super::attention::attend;
use super::cache::BlockCache;
use super::linear::multiply;
use super::mixture;
use super::model::{ResidentBlock, gqa};
use super::norm::Norm;
use super::ops::{Rotation, activate, add, gated, gated_stacked, scale};
use super::{KvCache, KvPrecision, ResidentModel};
use crate::{CacheScales, RuntimeError};

/// New tokens that run together; bounds the memory of a long prompt.
pub(super) const CHUNK: usize = 512;

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
        let mut out = Vec::new();
        for chunk in tokens.chunks(CHUNK) {
            let past = cache.tokens.len();
            let turn = |rope| Rotation::new(rope, total, past, chunk.len());
            let rotations = (turn(&self.spec.rope), self.spec.local_rope.as_ref().map(turn));
            let mut x = vec![0f32; chunk.len() * self.spec.hidden];
            for (id, row) in chunk.iter().zip(x.chunks_exact_mut(self.spec.hidden)) {
                self.embed.expand_rows(*id as usize, row);
                scale(row, self.spec.embed.scale);
            }
            for (index, block) in self.blocks.iter().enumerate() {
                self.block(index, block, cache, &rotations, past, &mut x)?;
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
        let mut x = x.to_vec();
        self.final_norm.rows(&mut x);
        let mut logits = multiply(self.head(), &x);
        if let Some(bias) = &self.head_bias {
            for row in logits.chunks_exact_mut(bias.len()) {
                add(row, bias);
            }
        }
        self.spec.head.finish(&mut logits);
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
        rotations: &(Rotation, Option<Rotation>),
        past: usize,
        x: &mut [f32],
    ) -> Result<(), RuntimeError> {
        let spec = &self.spec.blocks[index];
        let attn = gqa(spec)?;
        let seen = |stream, values: &mut [f32], width: usize| match &self.engine {
            Some(engine) => engine.apply(InputId { block: index, stream }, values, width),
            None => Ok(()),
        };
        let rotation = match (&rotations.1, attn.local_rope) {
            (Some(local), true) => local,
            (None, true) => return Err(no_part(index, "local rotary embedding")),
            (_, false) => &rotations.0,
        };
        let normed_by = |norm: &Option<Norm>, x: &[f32]| {
            let mut x = x.to_vec();
            if let Some(norm) = norm {
                norm.rows(&mut x);
            }
            x
        };
        let add_to = |x: &mut [f32], mut out: Vec<f32>, norm: &Option<Norm>| {
            if let Some(norm) = norm {
                norm.rows(&mut out);
            }
            scale(&mut out, spec.residual_scale);
            add(x, &out);
        };
        let mut normed = normed_by(&block.attn_norm, x);
        seen(Stream::AttnIn, &mut normed, self.spec.hidden)?;
        let parts: Vec<(Role, Vec<f32>)> =
            block.reading(Stream::AttnIn).map(|(role, linear)| (role, linear.forward(&normed))).collect();
        let rounding = match (cache.precision(), self.engine.as_ref().and_then(|engine| engine.cache(index))) {
            (KvPrecision::Float | KvPrecision::Fp8, Some(scales)) => Rounding::Scales(scales),
            (precision, _) => Rounding::Precision(precision),
        };
        let q = heads(attn, block, rounding, &mut cache.blocks[index], rotation, &parts)?;
        let mut out = attend(attn, block.sinks.as_deref(), &cache.blocks[index], &q, past);
        seen(Stream::AttnOut, &mut out, attn.heads * attn.head_dim)?;
        for (_, linear) in block.reading(Stream::AttnOut) {
            add_to(x, linear.forward(&out), &block.attn_out_norm);
        }
        let mut normed = normed_by(&block.mlp_norm, x);
        if spec.moe().is_some() {
            let engine = |stream, values: &mut [f32], width| Ok(seen(stream, values, width)?);
            add_to(x, mixture::forward(spec, block, &normed, self.spec.hidden, &engine)?, &block.mlp_out_norm);
            return finite(index, x);
        }
        seen(Stream::MlpIn, &mut normed, self.spec.hidden)?;
        let mut parts: Vec<Vec<f32>> =
            block.reading(Stream::MlpIn).map(|(_, linear)| linear.forward(&normed)).collect();
        let (mut middle, width) = match (&spec.mlp, parts.as_mut_slice()) {
            (MlpSpec::Gated(mlp), [both]) => (gated_stacked(mlp.activation, both, mlp.intermediate), mlp.intermediate),
            (MlpSpec::Gated(mlp), [gate, up]) => {
                gated(mlp.activation, gate, up);
                (std::mem::take(gate), mlp.intermediate)
            }
            (MlpSpec::Plain(mlp), [up]) => {
                activate(mlp.activation, up);
                (std::mem::take(up), mlp.intermediate)
            }
            _ => return Err(no_part(index, "feed-forward")),
        };
        seen(Stream::MlpMid, &mut middle, width)?;
        for (_, linear) in block.reading(Stream::MlpMid) {
            add_to(x, linear.forward(&middle), &block.mlp_out_norm);
        }
        finite(index, x)
    }
}

fn finite(block: usize, x: &[f32]) -> Result<(), RuntimeError> {
    if x.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(RuntimeError::NotFinite { block, which: "loaded" })
}

pub(super) fn no_part(block: usize, what: &str) -> RuntimeError {
    DecoderError::Input { reason: format!("block {block} has no {what} that generation knows") }.into()
}

/// What becomes of keys and values on their way into a block's cache.
#[derive(Clone, Copy)]
enum Rounding<'a> {
    Precision(KvPrecision),
    /// e4m3 in units of the checkpoint's scales.
    Scales(&'a CacheScales),
}

impl Rounding<'_> {
    /// Rounds head `head` of one token in place.
    fn apply(self, part: KvPart, head: usize, values: &mut [f32]) {
        match self {
            Self::Precision(precision) => precision.apply(values, values.len()),
            Self::Scales(scales) => scales.apply_to_head(part, head, values),
        }
    }
}

/// Normalises and rotates queries, which are returned `(tokens, heads·head_dim)`, and keys, and puts keys and values into
/// the cache.
fn heads(
    attn: &GqaSpec,
    block: &ResidentBlock,
    rounding: Rounding<'_>,
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
    // A norm over all heads of a token goes before the heads are taken apart.
    let whole = |values: &[f32], norm: &Option<Norm>| {
        let norm = norm.as_ref().filter(|_| attn.norm_all_heads)?;
        let mut values = values.to_vec();
        norm.rows(&mut values);
        Some(values)
    };
    let [(q_role, q_columns), (k_role, k_columns), (v_role, v_columns)] = attn.columns();
    let turned = |row: usize, head: &mut [f32], norm: &Option<Norm>| {
        if let Some(norm) = norm.as_ref().filter(|_| !attn.norm_all_heads) {
            norm.row(head);
        }
        rotation.turn(row, head);
    };
    let (values, stride) = projection(q_role)?;
    let normed = whole(values, &block.q_norm);
    let values = normed.as_deref().unwrap_or(values);
    let tokens = values.len() / stride;
    let mut q = vec![0f32; tokens * attn.heads * dim];
    for (row, out) in q.chunks_exact_mut(attn.heads * dim).enumerate() {
        for (out, column) in out.chunks_exact_mut(dim).zip(&q_columns) {
            out.copy_from_slice(&values[row * stride + column..][..dim]);
            turned(row, out, &block.q_norm);
        }
    }
    let (values, stride) = projection(k_role)?;
    let normed = whole(values, &block.k_norm);
    let values = normed.as_deref().unwrap_or(values);
    for (head, (keys, column)) in cache.keys.iter_mut().zip(&k_columns).enumerate() {
        for (row, projected) in values.chunks_exact(stride).enumerate() {
            let start = keys.len();
            keys.extend_from_slice(&projected[*column..][..dim]);
            turned(row, &mut keys[start..], &block.k_norm);
            rounding.apply(KvPart::Keys, head, &mut keys[start..]);
        }
    }
    let (values, stride) = projection(v_role)?;
    for (head, (cached, column)) in cache.values.iter_mut().zip(&v_columns).enumerate() {
        for projected in values.chunks_exact(stride) {
            let start = cached.len();
            cached.extend_from_slice(&projected[*column..][..dim]);
            rounding.apply(KvPart::Values, head, &mut cached[start..]);
        }
    }
    Ok(q)
}
