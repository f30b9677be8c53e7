//! How ranks that share a model meet: one sum over all of them after the attention and one after the MLP of each layer.

use super::shard::Shard;
use crate::backend::{Backend, BackendError};

/// Where ranks meet. NCCL's communicator fits behind it: the buffers of a call are one group of its collectives.
pub trait Collective<B: Backend>: Send {
    /// Which part is this rank's.
    fn shard(&self) -> Shard;

    /// Replaces the first `rows` rows of each of `buffers` (exact) by their sums over all ranks, which are the same bits on each: added in
    /// an order that depends on nothing but the number of ranks.
    ///
    /// # Errors
    /// A rank that asks for other sizes, one that has failed, or the device. No rank can go on afterwards.
    fn all_reduce(
        &mut self,
        backend: &mut B,
        rows: usize,
        buffers: &mut [&mut B::Buffer],
    ) -> Result<(), BackendError>;

    /// This rank has failed: nobody waits for it any more.
    fn abort(&mut self);
}

/// This rank among the others, or a model that is whole.
pub(super) struct Rank<B>(pub Option<Box<dyn Collective<B>>>);

impl<B: Backend> Rank<B> {
    pub(super) fn shard(&self) -> Shard {
        self.0.as_ref().map_or(Shard::WHOLE, |ranks| ranks.shard())
    }

    /// Whether products are added to the residual stream. One rank brings the stream to the sum, the others their products alone.
    pub(super) fn adds(&self) -> bool {
        self.shard().rank() == 0
    }

    pub(super) fn all_reduce(
        &mut self,
        backend: &mut B,
        rows: usize,
        buffers: &mut [&mut B::Buffer],
    ) -> Result<(), BackendError> {
        match &mut self.0 {
            Some(ranks) => ranks.all_reduce(backend, rows, buffers),
            None => Ok(()),
        }
    }

    pub(super) fn abort(&mut self) {
        if let Some(ranks) = &mut self.0 {
            ranks.abort();
        }
    }
}
