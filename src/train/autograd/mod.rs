//! The forward pass with gradients, and the optimiser: the only module that knows candle.
