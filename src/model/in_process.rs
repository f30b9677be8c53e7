//! Ranks that are threads of one process and meet in its memory, whatever the backend.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::collective::Collective;
use super::shard::Shard;
use crate::backend::{Backend, BackendError, Shaped};

/// One of several threads that share a model. A rank that is dropped has failed.
pub struct InProcess {
    shard: Shard,
    meeting: Arc<Meeting>,
    /// This rank's numbers on their way there and back.
    room: Vec<f32>,
}

#[derive(Default)]
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

/// Of the current sum.
#[derive(Default)]
struct State {
    /// What each rank brought.
    parts: Vec<Vec<f32>>,
    /// How many have.
    arrived: usize,
    /// How many have yet to take the sum, which is in `parts[0]`.
    leaving: usize,
    /// Why there will be no more sums.
    broken: Option<String>,
}

impl InProcess {
    /// All ranks of a model that `ranks` threads share.
    pub fn ranks(ranks: usize) -> Vec<Self> {
        let meeting = Arc::new(Meeting::default());
        let parts = vec![Vec::new(); ranks];
        meeting.lock().parts = parts;
        let shards = (0..ranks).filter_map(|rank| Shard::new(rank, ranks));
        let rank = |shard| Self {
            shard,
            meeting: Arc::clone(&meeting),
            room: Vec::new(),
        };
        shards.map(rank).collect()
    }

    /// Replaces `room` by the sum of all ranks' rooms.
    fn sum(&mut self) -> Result<(), BackendError> {
        let (rank, ranks) = (self.shard.rank(), self.shard.ranks());
        // The last sum is everyone's before the next begins.
        let mut state = self.meeting.wait_while(|state| state.leaving > 0)?;
        state.parts[rank].clone_from(&self.room);
        state.arrived += 1;
        if state.arrived == ranks {
            state.add()?;
            state.arrived = 0;
            state.leaving = ranks;
            self.meeting.changed.notify_all();
        } else {
            drop(state);
            state = self.meeting.wait_while(|state| state.leaving == 0)?;
        }
        self.room.copy_from_slice(&state.parts[0]);
        state.leaving -= 1;
        if state.leaving == 0 {
            self.meeting.changed.notify_all();
        }
        Ok(())
    }
}

impl State {
    fn add(&mut self) -> Result<(), BackendError> {
        let Some((sum, others)) = self.parts.split_first_mut() else {
            return Ok(());
        };
        for (rank, other) in others.iter().enumerate() {
            if other.len() != sum.len() {
                let (first, other) = (sum.len(), other.len());
                let reason = format!("rank {} brought {other} numbers, rank 0 {first}", rank + 1);
                self.broken = Some(reason.clone());
                return Err(failed(reason));
            }
            sum.iter_mut().zip(other).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }
}

impl Meeting {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error where `condition` can no longer change. A sum that is there is taken, whoever has left since.
    fn wait_while(
        &self,
        condition: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'_, State>, BackendError> {
        let waits = |state: &mut State| state.broken.is_none() && condition(state);
        let state = self.changed.wait_while(self.lock(), waits);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        match &state.broken {
            Some(reason) if condition(&state) => Err(failed(reason.clone())),
            _ => Ok(state),
        }
    }

    fn fail(&self, reason: String) {
        self.lock().broken.get_or_insert(reason);
        self.changed.notify_all();
    }
}

fn failed(reason: String) -> BackendError {
    BackendError::Unavailable {
        device: "ranks",
        reason,
    }
}

impl<B: Backend> Collective<B> for InProcess {
    fn shard(&self) -> Shard {
        self.shard
    }

    fn all_reduce(
        &mut self,
        backend: &mut B,
        rows: usize,
        buffers: &mut [&mut B::Buffer],
    ) -> Result<(), BackendError> {
        self.room.clear();
        for buffer in buffers.iter_mut() {
            self.room.extend_from_slice(backend.read(buffer, rows)?);
        }
        if let Err(error) = self.sum() {
            self.meeting.changed.notify_all();
            return Err(error);
        }
        let mut rest = self.room.as_slice();
        for buffer in buffers {
            let (values, behind) = rest.split_at(rows * buffer.width());
            backend.write(buffer, values)?;
            rest = behind;
        }
        Ok(())
    }

    fn abort(&mut self) {
        self.meeting
            .fail(format!("rank {} has failed", self.shard.rank()));
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.meeting
            .fail(format!("rank {} has left", self.shard.rank()));
    }
}
