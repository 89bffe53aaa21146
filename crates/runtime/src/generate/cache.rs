//! Keys and values of the tokens so far.

use lite_decoder::{AttnSpec, DecoderSpec};

use super::KvPrecision;

/// Keys and values of one block, rounded as [`KvPrecision`] says.
#[derive(Debug, Clone, Default)]
pub(super) struct BlockCache {
    /// Per key and value head, `(tokens, head_dim)`; keys are rotated.
    pub(super) keys: Vec<Vec<f32>>,
    pub(super) values: Vec<Vec<f32>>,
}

/// The state of one conversation: keys and values of its tokens in every block.
///
/// Values are kept in f32 whatever the precision: it is the numbers of an engine's cache that are reproduced, not its
/// memory.
#[derive(Debug, Clone)]
pub struct KvCache {
    precision: KvPrecision,
    pub(super) tokens: Vec<u32>,
    pub(super) blocks: Vec<BlockCache>,
}

impl KvCache {
    /// An empty cache for a model of this shape.
    pub fn new(spec: &DecoderSpec, precision: KvPrecision) -> Self {
        let empty = |block: &lite_decoder::BlockSpec| {
            let heads = match &block.attn {
                AttnSpec::Gqa(attn) => attn.kv_heads,
                _ => 0,
            };
            BlockCache { keys: vec![Vec::new(); heads], values: vec![Vec::new(); heads] }
        };
        Self { precision, tokens: Vec::new(), blocks: spec.blocks.iter().map(empty).collect() }
    }

    /// How keys and values are rounded.
    pub fn precision(&self) -> KvPrecision {
        self.precision
    }

    /// The tokens whose keys and values are held.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.tokens.clear();
        for head in self.blocks.iter_mut().flat_map(|block| block.keys.iter_mut().chain(&mut block.values)) {
            head.clear();
        }
    }
}
