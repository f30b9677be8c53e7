//! Subcommands: each builds the objects it needs and joins them.
