//! Evaluation: variants x prompt sets through the engine, judged by the score models that `train` makes.
