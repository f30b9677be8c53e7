//! Text and token ids.
