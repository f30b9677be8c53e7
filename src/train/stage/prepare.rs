//! From lines to examples: encoded on all threads, in the order of the file, with a count of all that is cut or left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::train::DataOptions;
use crate::text::TextError;
use crate::train::data::{BadLines, Cut, Encoder, Exchange, Lines, PairLine, common};
use crate::train::workers::Workers;
use crate::train::{Pair, ScorePair, Sequence, TrainError};

/// Tasks (lines, too) between two looks at whether to stop.
const BLOCK: usize = 512;

/// Examples of a file.
pub(super) struct Examples<I> {
    /// What is trained on.
    pub items: Vec<I>,
    /// Line of each, from 1.
    pub lines: Vec<usize>,
    /// Which of the lines that were read each is of.
    pub sources: Vec<usize>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    prompts_cut: usize,
    answers_cut: usize,
    dropped: BTreeMap<&'static str, usize>,
    bad: usize,
}

/// What becomes of a line.
pub(super) enum Outcome<I> {
    /// Examples, all alike in what was cut.
    Examples(Vec<I>, Cut),
    /// None, for this reason.
    Dropped(&'static str),
}

/// A line of a data file.
pub(super) trait Line: Sync {
    /// Its number, from 1.
    fn number(&self) -> usize;
}

impl Line for Exchange {
    fn number(&self) -> usize {
        self.line
    }
}

impl Line for PairLine {
    fn number(&self) -> usize {
        self.line
    }
}

/// Whether `options` skip bad lines.
pub(super) fn bad_lines(options: &DataOptions) -> BadLines {
    if options.skip_bad {
        BadLines::Skip
    } else {
        BadLines::Refuse
    }
}

/// Encodes `lines` of `file` until the limit is reached.
///
/// # Errors
/// [`TrainError::Line`] for a line that the chat template refuses, unless bad lines are skipped; [`TrainError::Stopped`].
pub(super) fn examples<L: Line, I: Send>(
    file: &Path,
    lines: &Lines<L>,
    options: &DataOptions,
    threads: &Threads<'_>,
    encode: impl Fn(&L) -> Result<Outcome<I>, TextError> + Sync,
) -> Result<Examples<I>, TrainError> {
    let limit = options.limit.unwrap_or(usize::MAX);
    let mut examples = Examples {
        items: Vec::new(),
        lines: Vec::new(),
        sources: Vec::new(),
        counts: Counts {
            bad: lines.bad,
            ..Counts::default()
        },
    };
    'file: for (block, lines) in lines.items.chunks(BLOCK).enumerate() {
        let outcomes = threads.map(lines, |line| Ok(encode(line)))?;
        for (index, (line, outcome)) in lines.iter().zip(outcomes).enumerate() {
            if examples.items.len() >= limit {
                break 'file;
            }
            match outcome {
                Ok(Outcome::Examples(items, cut)) => {
                    examples.push(items, cut, line.number(), block * BLOCK + index);
                }
                Ok(Outcome::Dropped(reason)) => {
                    *examples.counts.dropped.entry(reason).or_default() += 1;
                }
                Err(_) if options.skip_bad => examples.counts.bad += 1,
                Err(error) => {
                    return Err(TrainError::Line {
                        file: file.to_owned(),
                        line: line.number(),
                        field: String::new(),
                        expected: "a chat that the model's template takes".to_owned(),
                        found: error.to_string(),
                    });
                }
            }
        }
    }
    // A line may have given several.
    examples.items.truncate(limit);
    examples.lines.truncate(limit);
    examples.sources.truncate(limit);
    Ok(examples)
}

impl<I> Examples<I> {
    fn push(&mut self, items: Vec<I>, cut: Cut, line: usize, source: usize) {
        self.counts.prompts_cut += usize::from(cut.prompt);
        self.counts.answers_cut += usize::from(cut.answer);
        for item in items {
            self.items.push(item);
            self.lines.push(line);
            self.sources.push(source);
        }
    }

    /// In words, `what` being examples or pairs.
    pub(super) fn summary(&self, what: &str, file: &Path) -> String {
        let counts = &self.counts;
        let mut text = format!(
            "{} {what} from {}; prompts cut at their beginning: {}; answers cut at their end: {}; dropped: {}; bad lines: {}",
            self.items.len(),
            file.display(),
            counts.prompts_cut,
            counts.answers_cut,
            counts.dropped.values().sum::<usize>(),
            counts.bad
        );
        for (reason, count) in &counts.dropped {
            // Writing to a string cannot fail.
            let _ = write!(text, "\n  dropped, {reason}: {count}");
        }
        text
    }
}

/// The threads of a stage, and whether to stop.
pub(super) struct Threads<'a> {
    stage: &'static str,
    workers: Workers,
    stop: &'a AtomicBool,
}

impl<'a> Threads<'a> {
    /// So many.
    pub(super) fn new(stage: &'static str, count: usize, stop: &'a AtomicBool) -> Self {
        Self {
            stage,
            workers: Workers::new(count),
            stop,
        }
    }

    /// `work` of every task, in the order of the tasks.
    ///
    /// # Errors
    /// The first of the tasks' errors; [`TrainError::Stopped`].
    pub(super) fn map<T: Sync, R: Send>(
        &self,
        tasks: &[T],
        work: impl Fn(&T) -> Result<R, TrainError> + Sync,
    ) -> Result<Vec<R>, TrainError> {
        let mut done = Vec::with_capacity(tasks.len());
        for block in tasks.chunks(BLOCK) {
            if self.stop.load(Ordering::Relaxed) {
                let stage = self.stage.to_owned();
                return Err(TrainError::Stopped { stage });
            }
            done.extend(self.workers.map(block, &work)?);
        }
        Ok(done)
    }
}

/// Both responses of a line as token ids, y_w first; `None` where they are the same.
fn sides(
    encoder: &Encoder,
    line: &PairLine,
    winner: usize,
) -> Result<Option<([Sequence; 2], Cut)>, TextError> {
    let [first, second] = &line.responses;
    let (mut sequences, cut) = encoder.pair(&line.prompt, [first, second])?;
    if winner == 1 {
        sequences.swap(0, 1);
    }
    let [better, worse] = &sequences;
    Ok((better.ids != worse.ids).then_some((sequences, cut)))
}

/// Why a pair whose responses are the same tokens is of no use.
const ALIKE: &str = "both responses are the same tokens";

/// A pair for a score model, `winner` being the preferred response.
pub(super) fn score_pair(
    encoder: &Encoder,
    line: &PairLine,
    winner: usize,
) -> Result<Outcome<ScorePair>, TextError> {
    let Some(([better, worse], cut)) = sides(encoder, line, winner)? else {
        return Ok(Outcome::Dropped(ALIKE));
    };
    let safe = |index: usize| line.safe.get(index).copied();
    let pair = ScorePair {
        better,
        worse,
        better_safe: safe(winner),
        worse_safe: safe(1 - winner),
    };
    Ok(Outcome::Examples(vec![pair], cut))
}

/// A pair for SPE-DPO or the router, once for each of `winners`; margin and pi_ref are still to come.
pub(super) fn preference_pairs(
    encoder: &Encoder,
    line: &PairLine,
    winners: &[usize],
) -> Result<Outcome<Pair>, TextError> {
    let mut pairs = Vec::with_capacity(winners.len());
    let mut cuts = Cut::default();
    for winner in winners {
        let Some(([better, worse], cut)) = sides(encoder, line, *winner)? else {
            return Ok(Outcome::Dropped(ALIKE));
        };
        cuts = cut;
        let same = common(&better.ids, &worse.ids);
        pairs.push(Pair {
            better,
            worse,
            first_difference: same.max(1),
            margin: 0.0,
            reference: None,
            line: line.line,
        });
    }
    Ok(Outcome::Examples(pairs, cuts))
}
