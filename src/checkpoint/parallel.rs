//! The same work on many items over all cores; of several errors the one of the first item, whoever finds one first.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads at most: loading is bound by disk or memory long before.
const THREADS_MAX: usize = 16;

/// `work(0)`, ..., `work(count - 1)`, in this order, or the error of the smallest index that failed.
pub(crate) fn map<T: Send, E: Send>(
    count: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let threads = std::thread::available_parallelism()
        .map_or(1, NonZeroUsize::get)
        .min(THREADS_MAX)
        .min(count);
    let next = AtomicUsize::new(0);
    // Items are handed out in order: whatever lies before a failed one was handed out before it, and is finished.
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return done;
            }
            let result = work(index);
            if result.is_err() {
                next.fetch_max(count, Ordering::Relaxed);
            }
            done.push((index, result));
        }
    };
    let mut done = std::thread::scope(|scope| {
        // A thread that the system refuses is not missed: this one works too.
        let others: Vec<_> = (1..threads)
            .filter_map(|_| std::thread::Builder::new().spawn_scoped(scope, worker).ok())
            .collect();
        let mut done = worker();
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::map;

    #[test]
    fn map_when_items_fail_gives_the_first_error_else_all_in_order() {
        for (count, bad) in [(0, 9), (1, 9), (100, 999), (100, 0), (100, 37)] {
            let result = map(count, |i| if i >= bad { Err(i) } else { Ok(2 * i) });
            let want = if bad < count {
                Err(bad)
            } else {
                Ok((0..count).map(|i| 2 * i).collect())
            };
            assert_eq!(result, want);
        }
    }
}
