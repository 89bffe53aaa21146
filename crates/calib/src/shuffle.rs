//! `datasets.Dataset.shuffle(seed)`: numpy's `default_rng(seed).permutation(n)`.
//!
//! Three published algorithms in a row: O'Neill's `seed_seq` as numpy's `SeedSequence` has it, PCG64
//! (XSL-RR 128/64), and Fisher–Yates from the end with draws masked to the next power of two and rejected (`random_interval`).

/// The order in which `Dataset.shuffle(seed)` visits `n` rows.
pub(crate) fn permutation(seed: u64, n: u32) -> Vec<u32> {
    let mut rng = Pcg64::new(seed);
    let mut order: Vec<u32> = (0..n).collect();
    for i in (1..order.len()).rev() {
        // `i` is below `n`, which is a u32.
        let j = rng.bounded(i as u32) as usize;
        order.swap(i, j);
    }
    order
}

struct Pcg64 {
    state: u128,
    increment: u128,
    /// The upper half of the last 64-bit output, if it is still unused.
    spare: Option<u32>,
}

impl Pcg64 {
    const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

    fn new(seed: u64) -> Self {
        let [a, b, c, d] = seed_words(seed);
        let initial = (u128::from(a) << 64) | u128::from(b);
        let sequence = (u128::from(c) << 64) | u128::from(d);
        let mut rng = Self { state: 0, increment: (sequence << 1) | 1, spare: None };
        rng.step();
        rng.state = rng.state.wrapping_add(initial);
        rng.step();
        rng
    }

    fn step(&mut self) {
        self.state = self.state.wrapping_mul(Self::MULTIPLIER).wrapping_add(self.increment);
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(high) = self.spare.take() {
            return high;
        }
        self.step();
        let folded = ((self.state >> 64) as u64) ^ (self.state as u64);
        let value = folded.rotate_right((self.state >> 122) as u32);
        self.spare = Some((value >> 32) as u32);
        value as u32
    }

    /// A uniform integer in `0..=top`.
    fn bounded(&mut self, top: u32) -> u32 {
        let mask = u32::MAX.checked_shr(top.leading_zeros()).unwrap_or(0);
        loop {
            let value = self.next_u32() & mask;
            if value <= top {
                return value;
            }
        }
    }
}

/// `SeedSequence(seed).generate_state(4, uint64)`.
fn seed_words(seed: u64) -> [u64; 4] {
    let mut constant = 0x43b0_d7e5_u32;
    let mut hash = |value: u32| {
        let value = value ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    };
    let mix = |x: u32, y: u32| {
        let value = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
        value ^ (value >> 16)
    };
    let mut pool = [seed as u32, (seed >> 32) as u32, 0, 0].map(&mut hash);
    for source in 0..4 {
        for target in 0..4 {
            if source != target {
                let hashed = hash(pool[source]);
                pool[target] = mix(pool[target], hashed);
            }
        }
    }
    let mut constant = 0x8b51_f9dd_u32;
    let words: [u32; 8] = std::array::from_fn(|i| {
        let value = pool[i % 4] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    });
    std::array::from_fn(|i| u64::from(words[2 * i]) | (u64::from(words[2 * i + 1]) << 32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sha2::{Digest, Sha256};

    /// `numpy.random.default_rng(seed).permutation(n)`, numpy 2.4; `datasets` 5.2 gives the same for (42, 20).
    #[test]
    fn orders_equal_numpy() {
        assert_eq!(permutation(0, 10), [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]);
        assert_eq!(permutation(1, 10), [8, 4, 7, 0, 1, 2, 5, 9, 6, 3]);
        assert_eq!(permutation(42, 20), [15, 9, 14, 7, 12, 10, 6, 19, 3, 0, 16, 5, 11, 18, 2, 4, 17, 1, 13, 8]);
        assert_eq!(permutation((1 << 40) + 7, 7), [6, 3, 4, 5, 1, 0, 2]);
        assert_eq!(permutation(0, 1), [0]);
        assert!(permutation(0, 0).is_empty());
    }

    #[test]
    fn a_long_order_equals_numpy() {
        let order = permutation(0, 30_000);
        assert_eq!(order[..8], [6333, 8988, 27311, 22285, 736, 25031, 15758, 20049]);
        assert_eq!(order[29_996..], [15864, 22305, 27599, 607]);
        let bytes: Vec<u8> = order.iter().flat_map(|i| i.to_le_bytes()).collect();
        let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(digest, "59ab0f89941f159b4339b86eafc83b233a233201b4490b9ba61071e30b026dc0");
    }

    proptest! {
        #[test]
        fn every_row_once(seed: u64, n in 0u32..500) {
            let mut order = permutation(seed, n);
            order.sort_unstable();
            prop_assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
    }
}
