//! What can go wrong on a device.

/// An op was called against its contract, or the device refused.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// An operand breaks the op's contract (`ops.rs`).
    #[error("op {op}: operand `{operand}`: expected {expected}, found {found}")]
    Contract {
        /// Name of the op.
        op: &'static str,
        /// Name of the operand in the contract.
        operand: &'static str,
        /// What the contract says.
        expected: String,
        /// What came.
        found: String,
    },
    /// Memory for `what` is not to be had.
    #[error("{what} needs {bytes} bytes, which the {device} device does not have")]
    OutOfMemory {
        /// What was to be stored.
        what: String,
        /// Size asked for.
        bytes: usize,
        /// Name of the backend.
        device: &'static str,
    },
    /// The device is not there or cannot be used.
    #[error("device {device}: {reason}")]
    Unavailable {
        /// Name of the backend.
        device: &'static str,
        /// Why, for an operator.
        reason: String,
    },
}
