//! A rounded key/value cache between the projections and attention.

use lite_decoder::{KvPart, KvTransform};
use rayon::prelude::*;

use crate::generate::KvPrecision;

/// Heads rounded by one task.
const HEADS: usize = 256;

/// What the generation's cache rounds token by token, for whole windows: prefill reads what the cache gives back.
impl KvTransform for KvPrecision {
    fn apply(&self, _: KvPart, heads: &mut [f32], head_dim: usize) {
        // Heads are rounded one by one: the cut changes nothing.
        let task = (HEADS * head_dim).max(1);
        heads.par_chunks_mut(task).for_each(|heads| KvPrecision::apply(*self, heads, head_dim));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_head_has_its_own_range() {
        let mut found: Vec<f32> = (0..4 * HEADS * 8).map(|i| ((i * 37) % 101) as f32 * (1.0 + i as f32)).collect();
        let mut wanted = found.clone();
        wanted.chunks_mut(8).for_each(|head| KvPrecision::apply(KvPrecision::Int4, head, 8));
        KvTransform::apply(&KvPrecision::Int4, KvPart::Keys, &mut found, 8);
        assert_eq!(found, wanted);
    }
}
