//! Memory that an op needs beside its operands.

use super::super::BackendError;
use super::driver::Driver;

/// Zeroed when it is made; as large as the largest step needs from the first use on, so that later steps allocate nothing.
pub(super) struct Scratch<D: Driver> {
    what: &'static str,
    memory: Option<D::Memory>,
    bytes: usize,
}

impl<D: Driver> Scratch<D> {
    pub(super) fn new(what: &'static str) -> Self {
        Self {
            what,
            memory: None,
            bytes: 0,
        }
    }

    /// The address of at least `bytes`.
    pub(super) fn reserve(&mut self, driver: &D, bytes: usize) -> Result<u64, BackendError> {
        if let Some(memory) = self.memory.as_ref().filter(|_| bytes <= self.bytes) {
            return Ok(driver.address(memory));
        }
        let mut memory = driver.allocate(self.what, bytes)?;
        driver.zero(&mut memory)?;
        self.bytes = bytes;
        Ok(driver.address(self.memory.insert(memory)))
    }

    /// Copies `bytes` to the beginning and returns its address.
    pub(super) fn upload(&mut self, driver: &D, bytes: &[u8]) -> Result<u64, BackendError> {
        let address = self.reserve(driver, bytes.len())?;
        if let Some(memory) = &mut self.memory {
            driver.upload(memory, 0, bytes)?;
        }
        Ok(address)
    }

    /// What was reserved.
    pub(super) fn memory(&self) -> Option<&D::Memory> {
        self.memory.as_ref()
    }
}
