//! The threads that compute parts of a batch.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::TrainError;

/// So many threads, each a rayon pool of its own: what candle hands to rayon stays on the thread that asked.
pub struct Workers(Vec<rayon::ThreadPool>);

impl Workers {
    /// # Errors
    /// [`TrainError::Engine`] where the system gives no thread.
    pub fn new(threads: usize) -> Result<Self, TrainError> {
        let pool = |index: usize| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(1)
                .thread_name(move |_| format!("train-{index}"))
                .build()
                .map_err(|error| TrainError::Engine(format!("a thread of the trainer: {error}")))
        };
        (0..threads.max(1))
            .map(pool)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// `work` of every task, in the order of the tasks. Which thread computes a task is chance: `work` must not depend on it.
    ///
    /// # Errors
    /// The first error, in the order of the tasks.
    pub fn map<T: Sync, R: Send>(
        &self,
        tasks: &[T],
        work: impl Fn(&T) -> Result<R, TrainError> + Sync,
    ) -> Result<Vec<R>, TrainError> {
        let next = AtomicUsize::new(0);
        let take = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(task) = tasks.get(index) else {
                    return done;
                };
                done.push((index, work(task)));
            }
        };
        let mut done = std::thread::scope(|scope| {
            let take = &take;
            let threads: Vec<_> = self
                .0
                .iter()
                .map(|pool| scope.spawn(move || pool.install(take)))
                .collect();
            let results = threads.into_iter().flat_map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            results.collect::<Vec<_>>()
        });
        done.sort_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, result)| result).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn map_keeps_the_order_of_the_tasks_and_gives_the_first_error() {
        let workers = Workers::new(3).unwrap();
        let tasks: Vec<usize> = (0..50).collect();
        let squares = workers.map(&tasks, |task| Ok(task * task)).unwrap();
        assert_eq!(squares, tasks.iter().map(|t| t * t).collect::<Vec<_>>());
        let error = workers.map(&tasks, |task| match task {
            0..7 => Ok(()),
            _ => Err(TrainError::Engine(task.to_string())),
        });
        assert_eq!(error.unwrap_err().to_string(), "autograd: 7");
    }

    #[test]
    fn rayon_stays_on_a_worker_of_its_own() {
        let workers = Workers::new(2).unwrap();
        let threads = workers.map(&[(), ()], |()| Ok(rayon::current_num_threads()));
        assert_eq!(threads.unwrap(), [1, 1]);
    }
}
