//! Which windows a step sees.

/// SplitMix64 (Steele, Lea and Flood 2014): a full-period generator of one word of state.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`. The bias is below `bound / 2⁶⁴`.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

/// Deals windows like cards: each once, in a shuffled order, then a new shuffle.
pub(crate) struct Schedule {
    random: SplitMix,
    order: Vec<usize>,
    next: usize,
}

impl Schedule {
    /// Deals `0..windows`.
    pub(crate) fn new(windows: usize, seed: u64) -> Self {
        Self { random: SplitMix(seed), order: (0..windows).collect(), next: windows }
    }

    /// The next `count` windows, at most as many as there are, in rising order; none twice.
    pub(crate) fn deal(&mut self, count: usize) -> Vec<usize> {
        let count = count.min(self.order.len());
        if self.order.len() - self.next < count {
            for i in (1..self.order.len()).rev() {
                self.order.swap(i, self.random.below(i + 1));
            }
            self.next = 0;
        }
        let mut dealt = self.order[self.next..self.next + count].to_vec();
        self.next += count;
        dealt.sort_unstable();
        dealt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of the reference implementation for seed 1234567 (Rosetta Code).
    #[test]
    fn the_generator_equals_its_reference() {
        let mut random = SplitMix(1_234_567);
        let wanted = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(std::array::from_fn(|_| random.next()), wanted);
    }

    #[test]
    fn every_window_is_dealt_once_per_round() {
        let mut schedule = Schedule::new(12, 3);
        for _ in 0..5 {
            let mut round: Vec<usize> = (0..3).flat_map(|_| schedule.deal(4)).collect();
            round.sort_unstable();
            assert_eq!(round, (0..12).collect::<Vec<_>>());
        }
        assert_eq!(Schedule::new(3, 1).deal(8), [0, 1, 2]);
        assert!(Schedule::new(0, 1).deal(8).is_empty());
        let deal = |seed| Schedule::new(100, seed).deal(8);
        assert_eq!(deal(5), deal(5));
        assert_ne!(deal(5), deal(6));
    }
}
