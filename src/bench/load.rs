//! The load: who sends when. Closed loop: a fixed number of clients, each sending again when its answer is complete. Open loop:
//! requests arrive as a Poisson process, whether or not the server keeps up.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use indicatif::ProgressBar;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::arrivals::poisson;
use super::client::{Failure, RequestRecord, RequestShape, Target};
use crate::types::Variant;

/// Requests of an open loop under way at once; one more is counted as a failure, not sent.
pub const IN_FLIGHT_MAX: usize = 4096;

/// Who sends when.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Load {
    /// Closed loop of this many clients.
    Concurrency(usize),
    /// Open loop of this many requests a second.
    Rate(f64),
}

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// One a request.
    pub prompts: &'a [String],
    /// The same for all.
    pub shape: &'a RequestShape,
    /// Taken in turn; none: the field is not sent.
    pub variants: &'a [Variant],
    /// Of the arrivals.
    pub seed: u64,
}

/// One level of load, done.
#[derive(Clone, Debug)]
pub struct Run {
    /// What was asked.
    pub load: Load,
    /// One a prompt, in the order in which they ended in a closed loop's clients, or were due.
    pub records: Vec<RequestRecord>,
    /// From the first request to the last byte of the last.
    pub wall: Duration,
}

/// Sends every prompt of `job` once. `progress` moves by one a request.
pub async fn run(target: &Target, job: Job<'_>, load: Load, progress: &ProgressBar) -> Run {
    let epoch = Instant::now();
    let records = match load {
        Load::Concurrency(clients) => closed(target, job, clients.max(1), epoch, progress).await,
        Load::Rate(rate) => open(target, job, rate, epoch, progress).await,
    };
    Run {
        load,
        records,
        wall: epoch.elapsed(),
    }
}

impl Job<'_> {
    fn variant(&self, index: usize) -> Option<Variant> {
        let turn = index.checked_rem(self.variants.len())?;
        self.variants.get(turn).copied()
    }
}

async fn closed(
    target: &Target,
    job: Job<'_>,
    clients: usize,
    epoch: Instant,
    progress: &ProgressBar,
) -> Vec<RequestRecord> {
    let next = &AtomicUsize::new(0);
    let client = |_| async move {
        let mut records = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(prompt) = job.prompts.get(index) else {
                return records;
            };
            let (variant, due) = (job.variant(index), epoch.elapsed());
            records.push(target.stream(prompt, job.shape, variant, epoch, due).await);
            progress.inc(1);
        }
    };
    join_all((0..clients).map(client)).await.concat()
}

async fn open<'a>(
    target: &Target,
    job: Job<'a>,
    rate: f64,
    epoch: Instant,
    progress: &ProgressBar,
) -> Vec<RequestRecord> {
    let in_flight = &Semaphore::new(IN_FLIGHT_MAX);
    let arrivals = poisson(rate, job.prompts.len(), job.seed);
    let request = |(index, (prompt, due)): (usize, (&'a String, Duration))| {
        let variant = job.variant(index);
        async move {
            tokio::time::sleep_until((epoch + due).into()).await;
            let record = match in_flight.try_acquire() {
                Ok(_permit) => target.stream(prompt, job.shape, variant, epoch, due).await,
                Err(_) => RequestRecord {
                    outcome: Err(Failure::Overload {
                        limit: IN_FLIGHT_MAX,
                    }),
                    ..RequestRecord::new(variant, due)
                },
            };
            progress.inc(1);
            record
        }
    };
    let requests = job.prompts.iter().zip(arrivals).enumerate();
    join_all(requests.map(request)).await
}
