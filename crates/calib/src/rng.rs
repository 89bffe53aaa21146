//! The random draws of CPython's `random` module, so that windows fall where LMDeploy puts them.
//!
//! `random.seed(n)` is MT19937's `init_by_array` over the 32-bit words of `n`, and `random.randint`
//! is `getrandbits` with rejection (`_randbelow_with_getrandbits` in CPython's `Lib/random.py`).

use rand_mt::Mt;

/// CPython's `random.Random`, as far as datasets need it.
pub(crate) struct PythonRandom(Mt);

impl PythonRandom {
    /// `random.seed(seed)` of a non-negative integer.
    pub(crate) fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        // The words of the integer without leading zeros; zero itself is one word.
        let words = if high == 0 { 1 } else { 2 };
        Self(Mt::new_with_key([low, high].into_iter().take(words)))
    }

    /// A uniform integer in `0..bound`; 0 for `bound == 0`.
    ///
    /// Like CPython's, it draws even when `bound` is 1, so the stream stays in step.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        if bound == 0 {
            return 0;
        }
        let shift = bound.leading_zeros();
        loop {
            let value = self.0.next_u32() >> shift;
            if value < bound {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A seed, and for each upper end four draws.
    type Golden = (u64, &'static [(u32, [u32; 4])]);

    /// `random.seed(s); [random.randint(0, b) for _ in range(4)] for b in …`, CPython 3.11.
    #[test]
    fn draws_equal_cpython() {
        #[rustfmt::skip]
        let golden: [Golden; 4] = [
            (0, &[(0, [0; 4]), (1, [1; 4]), (9, [5, 9, 3, 8]), (255, [71, 144, 71, 48]), (256, [128, 75, 158, 50]),
                (999, [747, 75, 920, 870]), (356_316, [173_118, 247_538, 293_503, 52_796]),
                (2_147_483_647, [1_519_522_183, 1_864_753_826, 1_358_054_485, 878_225_224]),
                (4_294_967_294, [4_151_542_721, 2_373_071_108, 2_048_741_382, 1_901_353_491])]),
            (1, &[(0, [0; 4]), (1, [1; 4]), (9, [3, 1, 7, 0]), (255, [199, 221, 1, 228]), (256, [136, 117, 52, 162]),
                (999, [31, 22, 26, 665]), (356_316, [283_856, 4_826, 199_860, 113_560]),
                (2_147_483_647, [1_812_976_885, 124_729_223, 952_158_461, 1_880_712_864]),
                (4_294_967_294, [4_033_691_631, 2_129_497_364, 2_374_513_802, 1_001_090_105])]),
            (42, &[(0, [0; 4]), (1, [0; 4]), (9, [9, 6, 0, 0]), (255, [47, 111, 119, 13]), (256, [101, 214, 112, 229]),
                (999, [603, 284, 828, 890]), (356_316, [3_407, 83_707, 221_571, 178_389]),
                (2_147_483_647, [1_193_448_329, 667_779_376, 924_765_563, 1_445_662_585]),
                (4_294_967_294, [438_989_805, 398_340_369, 1_631_775_357, 415_393_687])]),
            ((1 << 40) + 7, &[(0, [0; 4]), (1, [1; 4]), (9, [5, 3, 7, 9]), (255, [92, 70, 83, 16]),
                (256, [129, 38, 188, 68]), (999, [133, 735, 591, 601]),
                (356_316, [16_188, 296_448, 79_101, 27_512])]),
        ];
        for (seed, rows) in golden {
            let mut rng = PythonRandom::new(seed);
            for (top, wanted) in rows {
                let got: [u32; 4] = std::array::from_fn(|_| rng.below(top + 1));
                assert_eq!(&got, wanted, "seed {seed}, randint(0, {top})");
            }
        }
    }
}
