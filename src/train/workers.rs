//! The threads that compute parts of a batch.

use std::sync::{Mutex, PoisonError};
use std::thread;

use super::TrainError;

/// So many threads, at least 1.
pub struct Workers(usize);

impl Workers {
    /// Started anew for each batch, which is long beside a start.
    pub fn new(threads: usize) -> Self {
        Self(threads.max(1))
    }

    /// `work` of every task, in the order of the tasks. Which thread computes a task is chance: `work` must not depend on it.
    ///
    /// # Errors
    /// The first error, in the order of the tasks; [`TrainError::Engine`] where the system gives no thread.
    pub fn map<T: Send, R: Send>(
        &self,
        tasks: impl IntoIterator<Item = T, IntoIter: Send>,
        work: impl Fn(T) -> Result<R, TrainError> + Sync,
    ) -> Result<Vec<R>, TrainError> {
        let left = Mutex::new(tasks.into_iter().enumerate());
        let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
        let take = || {
            let mut done = Vec::new();
            while let Some((index, task)) = next() {
                done.push((index, work(task)));
            }
            done
        };
        let joined = thread::scope(|scope| -> Result<Vec<_>, TrainError> {
            let start = |index| {
                let thread = thread::Builder::new().name(format!("train-{index}"));
                thread
                    .spawn_scoped(scope, take)
                    .map_err(|error| TrainError::Engine(format!("a thread: {error}")))
            };
            let started: Result<Vec<_>, _> = (0..self.0).map(start).collect();
            let results = started?.into_iter().flat_map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            Ok(results.collect())
        });
        let mut done = joined?;
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
        let workers = Workers::new(3);
        let tasks: Vec<usize> = (0..50).collect();
        let squares = workers.map(&tasks, |task| Ok(task * task)).unwrap();
        assert_eq!(squares, tasks.iter().map(|t| t * t).collect::<Vec<_>>());
        let error = workers.map(&tasks, |task| match task {
            0..7 => Ok(()),
            _ => Err(TrainError::Engine(task.to_string())),
        });
        assert_eq!(error.unwrap_err().to_string(), "autograd: 7");
    }
}
