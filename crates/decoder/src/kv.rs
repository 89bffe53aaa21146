/// What keys and values become on their way through a cache that does not store them in f32.
///
/// Attention reads what comes back, for every token, the newest included: that is what engines with a quantized
/// cache do, in prefill and in decoding.
pub trait KvTransform: Sync {
    /// Replaces keys (after the rotation) or values by what the cache gives back. `heads` holds whole tokens, each with
    /// all of its heads of `head_dim` values in order.
    fn apply(&self, part: KvPart, heads: &mut [f32], head_dim: usize);
}

/// Which half of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvPart {
    /// Keys, after the rotation.
    Keys,
    /// Values.
    Values,
}
