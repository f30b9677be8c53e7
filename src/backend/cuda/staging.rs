//! The two ways between host and device that stop neither: weights going in, and what comes back behind a step.

use super::super::BackendError;
use super::driver::Driver;

/// Bytes of weights on their way at once, twice: while one piece is copied, the next one is read and converted.
pub(super) const PIECE_BYTES: usize = 8 << 20;

/// Memory of the host that the device reads and writes by itself.
struct Pinned<D: Driver> {
    memory: Option<D::HostMemory>,
    bytes: usize,
}

impl<D: Driver> Pinned<D> {
    const EMPTY: Self = Self {
        memory: None,
        bytes: 0,
    };

    /// At least `bytes`, of what was there or anew. No copy may be on its way.
    fn at_least(&mut self, driver: &D, bytes: usize) -> Result<&mut D::HostMemory, BackendError> {
        if bytes > self.bytes {
            self.memory = None;
            self.bytes = 0;
        }
        let memory = match self.memory.take() {
            Some(memory) => memory,
            None => driver.host_memory(bytes)?,
        };
        self.bytes = self.bytes.max(bytes);
        Ok(self.memory.insert(memory))
    }
}

/// Weights on their way to the device.
pub(super) struct Staging<D: Driver> {
    pieces: [Piece<D>; 2],
    turn: usize,
}

struct Piece<D: Driver> {
    pinned: Pinned<D>,
    /// Reached once this piece is on the device.
    sent: Option<D::Mark>,
}

impl<D: Driver> Piece<D> {
    const EMPTY: Self = Self {
        pinned: Pinned::EMPTY,
        sent: None,
    };
}

impl<D: Driver> Staging<D> {
    pub(super) const EMPTY: Self = Self {
        pieces: [Piece::EMPTY, Piece::EMPTY],
        turn: 0,
    };

    /// Has `fill` write all of `bytes` bytes, and starts their copy to `offset` of `to`, which nothing uses yet.
    pub(super) fn send(
        &mut self,
        driver: &D,
        (to, offset): (&mut D::Memory, usize),
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<(), BackendError> {
        let piece = &mut self.pieces[self.turn];
        self.turn = 1 - self.turn;
        if let Some(sent) = piece.sent.take() {
            driver.reached(&sent)?;
        }
        let memory = piece.pinned.at_least(driver, bytes.max(PIECE_BYTES))?;
        fill(&mut memory.as_mut()[..bytes]);
        // SAFETY: nobody touches the piece before its mark is reached.
        piece.sent = Some(unsafe { driver.push(to, offset, memory, bytes) }?);
        Ok(())
    }
}

/// Where a piece of device memory comes back to.
pub(super) struct Return<D: Driver> {
    pinned: Pinned<D>,
    /// Bytes whose copy was started, and that nobody has read.
    coming: Option<usize>,
}

impl<D: Driver> Return<D> {
    pub(super) const EMPTY: Self = Self {
        pinned: Pinned::EMPTY,
        coming: None,
    };

    /// Makes room for `bytes`, so that no step has to.
    pub(super) fn reserve(&mut self, driver: &D, bytes: usize) -> Result<(), BackendError> {
        if self.coming.take().is_some() {
            driver.wait()?;
        }
        self.pinned.at_least(driver, bytes).map(|_| ())
    }

    /// Starts the copy of the first `bytes` bytes of `from` behind all work asked for so far. Makes room for `most` where there is none.
    pub(super) fn fetch(
        &mut self,
        driver: &D,
        from: &D::Memory,
        bytes: usize,
        most: usize,
    ) -> Result<(), BackendError> {
        if self.pinned.bytes < bytes {
            self.reserve(driver, most.max(bytes))?;
        }
        let memory = self.pinned.at_least(driver, bytes)?;
        // SAFETY: nobody touches it before `read` or `reserve` has waited.
        unsafe { driver.fetch(from, memory, bytes) }?;
        self.coming = Some(bytes);
        Ok(())
    }

    /// Whether the copy of just so many bytes was started, and nobody has read it.
    pub(super) fn is_coming(&self, bytes: usize) -> bool {
        self.coming == Some(bytes)
    }

    /// What came, once it is there; `None`: no copy of so many bytes was started since the last one was read.
    pub(super) fn read(&mut self, driver: &D, bytes: usize) -> Result<Option<&[u8]>, BackendError> {
        let Some(coming) = self.coming.take() else {
            return Ok(None);
        };
        driver.wait()?;
        let came = self.pinned.memory.as_ref().map(AsRef::as_ref);
        Ok(came
            .and_then(|came| came.get(..bytes))
            .filter(|_| coming == bytes))
    }
}
