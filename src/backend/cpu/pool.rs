//! A fork-join pool: the caller and its workers share the chunks of one task at a time.
//!
//! Invariant: a task is borrowed by workers only between the opening and the closing of its gate, and [`Pool::for_each`]
//! returns after the last of them has left. A worker that comes late finds the gate closed and goes back to waiting: a
//! thread that the system does not run delays nobody.

#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Turns of waiting before a worker parks: about 50 us, longer than the gap between two ops of a step.
const SPINS: u32 = 2_000;
/// Most threads: a bound on what a configuration may ask for.
const THREADS_MAX: usize = 1_024;

/// The gate's word: epoch (32 bits), open (1 bit), workers inside (31 bits).
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

/// What every chunk runs: (thread, chunk).
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    chunks: usize,
}

/// On its own cache line, so that a counter does not slow its neighbours.
#[repr(align(128))]
struct Line<T>(T);

struct Shared {
    gate: Line<AtomicU64>,
    next: Line<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    ended: AtomicBool,
    parked: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the one caller while the gate is closed and nobody is inside, and read by workers that are
// inside; the gate's release and acquire order the two. The task it points to is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// The pool. It belongs to one thread at a time (`!Sync`), so tasks never overlap.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    one_caller: PhantomData<Cell<()>>,
}

impl Pool {
    /// `threads` including the caller; `None`: as many as this process may use (affinity and cgroup quota).
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub fn new(threads: Option<usize>) -> std::io::Result<Self> {
        let usable = || thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.unwrap_or_else(usable).clamp(1, THREADS_MAX);
        let shared = Arc::new(Shared {
            gate: Line(AtomicU64::new(0)),
            next: Line(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            ended: AtomicBool::new(false),
            parked: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(threads - 1),
            one_caller: PhantomData,
        };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new()
                .name(format!("midpo-cpu-{index}"))
                .spawn(move || shared.work(index))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads, the caller among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(thread, chunk)` for every chunk below `chunks`, in any order, on threads `0..self.threads()`. One chunk
    /// runs on the caller without a fork.
    ///
    /// # Panics
    /// With the first panic of a task, after all threads have left it.
    pub fn for_each(&self, chunks: usize, task: &Task<'_>) {
        if chunks <= 1 || self.workers.is_empty() {
            (0..chunks).for_each(|chunk| task(0, chunk));
            return;
        }
        self.open(chunks, task);
        self.shared.run(0);
        self.close();
        let panic = self.shared.panic.lock();
        if let Some(panic) = panic.unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    fn open(&self, chunks: usize, task: &Task<'_>) {
        let shared = &*self.shared;
        let task = std::ptr::from_ref(task);
        // SAFETY: only the lifetime changes; `for_each` closes the gate and waits before the borrow ends.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: the gate is closed and nobody is inside (`close`), and there is one caller (`!Sync`).
        unsafe { *shared.job.get() = Some(Job { task, chunks }) };
        shared.next.0.store(0, Ordering::Relaxed);
        let epoch = (shared.gate.0.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        shared.gate.0.store(epoch << 32 | OPEN, Ordering::SeqCst);
        // A parking worker raises its flag, then looks at the gate; here the gate is opened, then the flags are read. In
        // sequentially consistent order one of the two sees the other.
        for (worker, parked) in self
            .workers
            .iter()
            .zip(&shared.parked[1..])
            .take(chunks - 1)
        {
            if parked.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }

    fn close(&self) {
        let gate = &self.shared.gate.0;
        gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut turns = 0;
        while gate.load(Ordering::Acquire) & INSIDE != 0 {
            wait(&mut turns);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks; there is nothing else to hear from it.
            let _ = worker.join();
        }
    }
}

/// Spins at first, then lets others run.
fn wait(turns: &mut u32) {
    *turns = turns.saturating_add(1);
    if *turns < SPINS {
        std::hint::spin_loop();
    } else {
        thread::yield_now();
    }
}

impl Shared {
    fn work(&self, index: usize) {
        let mut seen = 0;
        while let Some(epoch) = self.next_epoch(index, seen) {
            seen = epoch;
            if self.enter(epoch) {
                self.run(index);
                self.gate.0.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// Waits for another epoch than `seen`; `None` when the pool ends.
    fn next_epoch(&self, index: usize, seen: u64) -> Option<u64> {
        let mut turns = 0;
        loop {
            let epoch = self.gate.0.load(Ordering::SeqCst) >> 32;
            if self.ended.load(Ordering::SeqCst) {
                return None;
            }
            if epoch != seen {
                self.parked[index].store(false, Ordering::Relaxed);
                return Some(epoch);
            }
            turns += 1;
            if turns < SPINS {
                std::hint::spin_loop();
            } else if !self.parked[index].swap(true, Ordering::SeqCst) {
                // The flag is up: look once more before sleeping.
            } else {
                thread::park();
            }
        }
    }

    /// Counts this worker in, if the gate of `epoch` is still open.
    fn enter(&self, epoch: u64) -> bool {
        let open = |gate: u64| (gate >> 32 == epoch && gate & OPEN != 0).then_some(gate + 1);
        let entered = self
            .gate
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, open);
        entered.is_ok()
    }

    /// Takes chunks until none is left.
    fn run(&self, thread: usize) {
        // SAFETY: the caller has opened the gate, or this worker is inside it: `job` is not written until it has left.
        let Some(Job { task, chunks }) = (unsafe { *self.job.get() }) else {
            return;
        };
        // SAFETY: as above, and the task outlives the closing of the gate.
        let task = unsafe { &*task };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let chunk = self.next.0.fetch_add(1, Ordering::Relaxed);
                if chunk >= chunks {
                    break;
                }
                task(thread, chunk);
            }
        }));
        if let Err(panic) = outcome {
            self.next.0.store(chunks, Ordering::Relaxed);
            let first = self.panic.lock();
            first
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(panic);
        }
    }
}

/// A mutable slice whose parts are handed to the chunks of one task.
pub struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out disjoint parts (the contract of `slice`), as `&mut [T]` would be split.
unsafe impl<T: Send> Send for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    /// Borrows `slice` for as long as parts of it are in use.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            slice: PhantomData,
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// No two parts in use at one time may overlap.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: in bounds by the assertion; disjoint by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// For kernels that write a part which is no slice, such as a tile of columns.
    #[inline]
    pub fn as_ptr(&self) -> *mut T {
        self.start
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn every_chunk_runs_once_whatever_the_threads() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(Some(threads)).unwrap();
            assert_eq!(pool.threads(), threads);
            for round in 0..500 {
                for chunks in [0, 1, 2, round % 40] {
                    let counts: Vec<_> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                    pool.for_each(chunks, &|thread, chunk| {
                        assert!(thread < threads);
                        counts[chunk].fetch_add(1, Ordering::Relaxed);
                    });
                    let once = counts.iter().all(|n| n.load(Ordering::Relaxed) == 1);
                    assert!(once, "{threads} threads, {chunks} chunks");
                }
            }
        }
    }

    #[test]
    fn parked_workers_wake_for_the_next_task() {
        let pool = Pool::new(Some(3)).unwrap();
        for _ in 0..20 {
            while !pool.shared.parked[1..]
                .iter()
                .all(|p| p.load(Ordering::SeqCst))
            {
                thread::yield_now();
            }
            // Each chunk waits for the others: it ends only if three threads run at once.
            let barrier = std::sync::Barrier::new(3);
            pool.for_each(3, &|_, _| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(Some(2)).unwrap();
        for bad in 0..8 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each(8, &|_, chunk| assert_ne!(chunk, bad));
            }));
            assert!(caught.is_err());
            let done = AtomicUsize::new(0);
            pool.for_each(8, &|_, _| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.load(Ordering::Relaxed), 8);
        }
    }
}
