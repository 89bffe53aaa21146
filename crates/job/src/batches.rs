//! Batches of windows: several in flight, results in order.

use rayon::prelude::*;

use crate::JobError;

/// Batches in flight. A constant, so that the memory of a run is known before it starts; two are enough for one batch to
/// be copied, zeroed and normed while the other multiplies.
pub(crate) const IN_FLIGHT: usize = 2;

/// First window and number of windows of a batch.
pub(crate) type Batch = (usize, usize);

/// Runs `work` on a few batches side by side, then `take` on each result, one after the other in the order of the
/// batches: sums that `take` forms do not depend on the number of threads. `work` reads the state that `take` changes, so
/// the work on one batch must not depend on what is taken of another.
pub(crate) fn in_order<S: Sync, R: Send>(
    state: &mut S,
    batches: impl Iterator<Item = Batch>,
    work: impl Fn(&S, Batch) -> Result<R, JobError> + Sync,
    mut take: impl FnMut(&mut S, Batch, R) -> Result<(), JobError>,
) -> Result<(), JobError> {
    let batches: Vec<Batch> = batches.collect();
    for some in batches.chunks(IN_FLIGHT) {
        let shared = &*state;
        let done: Vec<Result<R, JobError>> =
            some.par_iter().with_max_len(1).map(|batch| work(shared, *batch)).collect();
        for (batch, result) in some.iter().zip(done) {
            take(state, *batch, result?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_batches() {
        let mut seen = Vec::new();
        let take = |seen: &mut Vec<_>, (i, _): Batch, square: usize| {
            seen.push((i, square));
            Ok(())
        };
        in_order(&mut seen, (0..7).map(|i| (i, 1)), |_, (i, _)| Ok(i * i), take).unwrap();
        assert_eq!(seen, (0..7).map(|i| (i, i * i)).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_failure_ends_the_loop() {
        let mut taken = 0;
        let work = |_: &i32, (i, _): Batch| if i == 3 { Err(JobError::Input("broken".to_owned())) } else { Ok(()) };
        let take = |taken: &mut i32, _: Batch, ()| {
            *taken += 1;
            Ok(())
        };
        let result = in_order(&mut taken, (0..9).map(|i| (i, 1)), work, take);
        assert!(matches!(result, Err(JobError::Input(_))));
        assert_eq!(taken, 3);
    }
}
