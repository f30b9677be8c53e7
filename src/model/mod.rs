//! The routed Llama over any [`Backend`](crate::backend::Backend), written once.
