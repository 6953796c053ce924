//! Work on all processors whose results come out in the order of the input.
//!
//! One thread makes jobs, the workers do them, and the caller takes the results.
//! At most two jobs a worker are under way or waiting to be taken, so memory is
//! bounded however slow the taker is.

use crossbeam_channel::{Receiver, Sender, bounded};

/// Number of processors that this process may use.
#[must_use]
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A job with the place for its result.
type Job<T, R> = (T, Sender<R>);

/// Where the maker of jobs puts them.
#[derive(Debug)]
pub struct Jobs<T, R> {
    jobs: Sender<Job<T, R>>,
    order: Sender<Receiver<R>>,
}

/// Nobody wants more jobs: the taker failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

impl<T, R> Jobs<T, R> {
    /// Hands over a job; waits while too many are under way.
    ///
    /// # Errors
    /// [`Closed`]: stop making jobs.
    pub fn send(&self, job: T) -> Result<(), Closed> {
        let (result, taken) = bounded(1);
        self.order.send(taken).map_err(|_unsent| Closed)?;
        self.jobs.send((job, result)).map_err(|_unsent| Closed)
    }
}

/// Runs `work` on every job that `make` sends, on `threads` threads, and hands the
/// results to `take` in the order of the jobs.
///
/// * `state`: makes what a worker keeps between jobs.
///
/// # Errors
/// The first error of `take`, or else the one of `make`.
pub fn run<T: Send, R: Send, S, E: Send>(
    threads: usize,
    make: impl FnOnce(&Jobs<T, R>) -> Result<(), E> + Send,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> R + Sync,
    mut take: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let threads = threads.max(1);
    let (jobs, queue) = bounded::<Job<T, R>>(threads);
    let (order, results) = bounded::<Receiver<R>>(threads + 1);
    std::thread::scope(|scope| {
        let maker = scope.spawn(move || make(&Jobs { jobs, order }));
        for _ in 0..threads {
            let queue = queue.clone();
            let (state, work) = (&state, &work);
            scope.spawn(move || {
                let mut state = state();
                for (job, result) in queue {
                    // Nobody waits for it after a failure.
                    let _ = result.send(work(&mut state, job));
                }
            });
        }
        drop(queue);
        // A worker that panicked closes its result; joining the scope reports it.
        let taken = results
            .iter()
            .map_while(|result| result.recv().ok())
            .try_for_each(&mut take);
        drop(results);
        match maker.join() {
            Ok(made) => taken.and(made),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squares(threads: usize, end: u64, stop_at: u64) -> (Result<(), &'static str>, Vec<u64>) {
        let mut taken = Vec::new();
        let make = |jobs: &Jobs<u64, u64>| {
            for number in 0..end {
                if jobs.send(number).is_err() {
                    return Err("stopped");
                }
            }
            Ok(())
        };
        let work = |(): &mut (), number: u64| {
            // Later jobs end earlier.
            std::thread::sleep(std::time::Duration::from_micros(500 / (number % 7 + 1)));
            number * number
        };
        let result = run(
            threads,
            make,
            || (),
            work,
            |square| {
                if taken.len() as u64 == stop_at {
                    return Err("enough");
                }
                taken.push(square);
                Ok(())
            },
        );
        (result, taken)
    }

    #[test]
    fn results_keep_the_order() {
        for threads in [1, 2, 5] {
            let (result, taken) = squares(threads, 200, u64::MAX);
            assert_eq!(result, Ok(()));
            assert!(taken.into_iter().eq((0..200).map(|n| n * n)));
        }
    }

    #[test]
    fn a_taker_that_fails_stops_everything() {
        let (result, taken) = squares(3, 1_000_000, 10);
        assert_eq!(result, Err("enough"));
        assert_eq!(taken.len(), 10);
    }
}
