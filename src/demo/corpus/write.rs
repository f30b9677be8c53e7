//! The corpus as files.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Corpus, CorpusError, HeldOutPrompt, PairSet};
use crate::random::SplitMix64;

/// Lines of each file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Prompts with answers, for the base.
    pub sft: usize,
    /// Pairs for reward and cost.
    pub scores: usize,
    /// Pairs for the safety expert.
    pub safety: usize,
    /// Pairs for the helpfulness expert.
    pub helpfulness: usize,
    /// Pairs for the router, before they are filtered.
    pub dual: usize,
    /// Held-out prompts of each kind of act in each part.
    pub held_out: usize,
    /// Held-out facts, and as many unknown things and words to repeat.
    pub held_out_chat: usize,
}

impl Default for Sizes {
    /// Those of the demo.
    fn default() -> Self {
        Self {
            sft: 110_480,
            scores: 3_000,
            safety: 1_280,
            helpfulness: 1_000,
            dual: 4_480,
            held_out: 200,
            held_out_chat: 100,
        }
    }
}

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Which.
    pub path: PathBuf,
    /// Its lines.
    pub rows: usize,
}

/// A stream of random numbers for each file: none moves another.
const STREAM_SFT: u64 = 1;
const STREAM_HELD_OUT: u64 = 2;
const STREAM_PAIRS: u64 = 3;

/// Writes `sft.jsonl`, `scores.jsonl`, `safety.jsonl`, `helpfulness.jsonl`, `dual.jsonl` and `held_out.jsonl` into `directory`.
///
/// # Errors
/// [`CorpusError::File`] where one cannot be written.
pub fn write(
    corpus: &Corpus,
    seed: u64,
    sizes: &Sizes,
    directory: &Path,
) -> Result<Vec<Written>, CorpusError> {
    fs::create_dir_all(directory).map_err(failed(directory))?;
    let mut random = SplitMix64::new(seed, STREAM_SFT);
    let sft = (0..sizes.sft).map(|_| corpus.sft(&mut random));
    let mut written = vec![lines(directory.join("sft.jsonl"), sft)?];
    for (stream, (set, name, count)) in [
        (PairSet::Scores, "scores.jsonl", sizes.scores),
        (PairSet::Safety, "safety.jsonl", sizes.safety),
        (PairSet::Helpfulness, "helpfulness.jsonl", sizes.helpfulness),
        (PairSet::Dual, "dual.jsonl", sizes.dual),
    ]
    .into_iter()
    .enumerate()
    {
        let mut random = SplitMix64::new(seed, STREAM_PAIRS + stream as u64);
        let pairs = corpus.pairs(set, count, &mut random)?;
        written.push(lines(directory.join(name), pairs.into_iter().map(Ok))?);
    }
    let held_out = held_out_of(corpus, seed, sizes);
    written.push(lines(
        directory.join("held_out.jsonl"),
        held_out.into_iter().map(Ok),
    )?);
    Ok(written)
}

/// The lines of `held_out.jsonl`.
pub fn held_out_of(corpus: &Corpus, seed: u64, sizes: &Sizes) -> Vec<HeldOutPrompt> {
    let mut random = SplitMix64::new(seed, STREAM_HELD_OUT);
    corpus.held_out(sizes.held_out, sizes.held_out_chat, &mut random)
}

fn lines<T: Serialize>(
    path: PathBuf,
    rows: impl Iterator<Item = Result<T, CorpusError>>,
) -> Result<Written, CorpusError> {
    let mut file = BufWriter::new(File::create(&path).map_err(failed(&path))?);
    let mut count = 0;
    for row in rows {
        serde_json::to_writer(&mut file, &row?)
            .map_err(std::io::Error::from)
            .and_then(|()| file.write_all(b"\n"))
            .map_err(failed(&path))?;
        count += 1;
    }
    file.flush().map_err(failed(&path))?;
    Ok(Written { path, rows: count })
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> CorpusError {
    let path = path.to_owned();
    move |source| CorpusError::File { path, source }
}
