//! `kernels/sample.cu`.

use super::super::{BackendError, SampleFault, SampleRow, Sampled, Shaped};
use super::driver::{Driver, Kernel};
use super::memory::padded;
use super::staging::Return;
use super::tiles::{SAMPLE_BINS, SAMPLE_ROW_WORDS, SAMPLE_THREADS, SAMPLE_TOP, WARP};
use super::{Arg, Buffer, Cuda, Scratch, StepLimits, int, unsupported};
use crate::types::TokenId;

/// `sizeof(SampleShared)`: two histograms, sums of the warps and two more, three numbers, the most likely tokens; in 16 bytes.
const SHARED_BYTES: usize =
    (2 * SAMPLE_BINS * 4 + (SAMPLE_THREADS / WARP + 2) * 8 + 3 * 4 + SAMPLE_TOP * 8)
        .next_multiple_of(16);
/// Words of lists that there is room for, a row on average: 2048 biased or penalised tokens. What has longer ones is left to the host.
const LIST_WORDS: usize = 4096;
/// What the kernel writes instead of a token.
const NOT_FINITE: i32 = -1;
/// Numbers that come back for a row: the token, 1 + `SAMPLE_TOP` log-probabilities, `SAMPLE_TOP` tokens.
const RESULT_WORDS: usize = 2 + 2 * SAMPLE_TOP;

/// What sampling needs beside the logits, as large as its largest step.
pub(super) struct SampleScratch<D: Driver> {
    /// Words of rows, lists and bits that room was reserved for; without it, there is room for any.
    words_max: Option<usize>,
    words: Vec<u32>,
    wants: Scratch<D>,
    work: Scratch<D>,
    results: Scratch<D>,
    back: Return<D>,
}

impl<D: Driver> SampleScratch<D> {
    pub(super) fn new() -> Self {
        Self {
            words_max: None,
            words: Vec::new(),
            wants: Scratch::new("what rows are sampled with"),
            work: Scratch::new("logits with biases and penalties"),
            results: Scratch::new("sampled tokens"),
            back: Return::EMPTY,
        }
    }
}

/// Bytes beside the logits, for all steps within some limits.
pub(super) struct SampleRooms {
    words: usize,
    work: usize,
    results: usize,
}

impl SampleRooms {
    pub(super) fn new(limits: &StepLimits) -> Self {
        let rows = limits.logit_rows;
        Self {
            words: rows * (SAMPLE_ROW_WORDS + LIST_WORDS) * 4,
            work: rows * padded(limits.vocabulary) * 4,
            results: rows * RESULT_WORDS * 4,
        }
    }

    pub(super) fn all(&self) -> [usize; 3] {
        [self.words, self.work, self.results]
    }
}

impl<D: Driver> SampleScratch<D> {
    /// Makes that room, and keeps to it.
    pub(super) fn reserve(&mut self, driver: &D, rooms: &SampleRooms) -> Result<(), BackendError> {
        self.words_max = Some(rooms.words / 4);
        self.words.reserve_exact(rooms.words / 4);
        self.wants.reserve(driver, rooms.words)?;
        self.work.reserve(driver, rooms.work)?;
        self.results.reserve(driver, rooms.results)?;
        self.back.reserve(driver, rooms.results)
    }

    fn has_room(&self, rows: &[SampleRow]) -> bool {
        let words: usize = rows.iter().map(SampleRow::words).sum();
        self.words_max.is_none_or(|most| words <= most)
    }
}

impl<D: Driver> Cuda<D> {
    /// [`super::Backend::sample`].
    pub(super) fn sample_rows(
        &mut self,
        logits: &Buffer<D>,
        rows: &[SampleRow],
    ) -> Result<bool, BackendError> {
        bind(logits, rows)?;
        let vocabulary = logits.width();
        let address = logits.exact(&self.driver, "sample", "logits")?;
        if !self.sample.has_room(rows) {
            return Ok(false);
        }
        if rows.is_empty() {
            return Ok(true);
        }
        let (lists, allowed) = self.sample.write(rows, vocabulary);
        let changed = rows.iter().any(SampleRow::changes_logits);
        let work_bytes = if changed {
            rows.len() * logits.stride() * 4
        } else {
            0
        };
        let driver = &self.driver;
        let scratch = &mut self.sample;
        let wants = scratch
            .wants
            .upload(driver, bytemuck::cast_slice(&scratch.words))?;
        let results = scratch
            .results
            .reserve(driver, rows.len() * RESULT_WORDS * 4)?;
        let place = |words: usize| Arg::Pointer(results + 4 * words as u64);
        let list = [
            place(0),
            place(rows.len()),
            place(rows.len() * (2 + SAMPLE_TOP)),
            Arg::Pointer(address),
            Arg::Pointer(scratch.work.reserve(driver, work_bytes)?),
            Arg::Pointer(wants),
            Arg::Pointer(wants + 4 * lists as u64),
            Arg::Pointer(wants + 4 * allowed as u64),
            int(vocabulary),
            int(logits.stride()),
        ];
        let grid = ([rows.len(), 1, 1], SAMPLE_THREADS);
        self.launch(Kernel::exact("sample"), grid, SHARED_BYTES, &list)?;
        self.sample.fetch(&self.driver, rows.len())?;
        Ok(true)
    }

    /// [`super::Backend::sampled`].
    pub(super) fn sampled_rows(
        &mut self,
        rows: &[SampleRow],
        sampled: &mut Sampled,
    ) -> Result<(), BackendError> {
        sampled.tokens.clear();
        sampled.logprobs.clear();
        sampled.top.clear();
        match rows {
            [] => Ok(()),
            _ => self.sample.read(&self.driver, rows, sampled),
        }
    }
}

fn bind<D: Driver>(logits: &Buffer<D>, rows: &[SampleRow]) -> Result<(), BackendError> {
    if rows.len() > logits.rows() {
        let expected = format!("at most {}", logits.rows());
        return Err(unsupported(
            "sample",
            "rows",
            &expected,
            rows.len().to_string(),
        ));
    }
    for row in rows {
        if row.top.unwrap_or(0) as usize > SAMPLE_TOP {
            let found = format!("{:?}", row.top);
            return Err(unsupported("sample", "top", "at most 20", found));
        }
        let bits = row.allowed.as_ref().map(|words| words.len() * 32);
        if bits.is_some_and(|bits| bits < logits.width()) {
            let expected = format!("at least {} bits", logits.width());
            return Err(unsupported(
                "sample",
                "allowed",
                &expected,
                format!("{bits:?}"),
            ));
        }
    }
    Ok(())
}

impl SampleRow {
    /// What it takes at most.
    fn words(&self) -> usize {
        let allowed = self.allowed.as_ref().map_or(0, Vec::len);
        let pairs = self.bias.len() + self.history.len();
        SAMPLE_ROW_WORDS + 2 * pairs + self.masked.len() + allowed
    }

    /// Whether the kernel draws from a changed copy of the row.
    fn changes_logits(&self) -> bool {
        let lists = self.bias.len() + self.masked.len() + self.history.len();
        lists > 0 || self.allowed.is_some()
    }
}

/// Where a row's lists lie: first word and length of biases, masked tokens and history.
type Ranges = [u32; 6];

impl<D: Driver> SampleScratch<D> {
    /// Rows, then lists, then bits, in `words`; returns where lists and bits begin.
    fn write(&mut self, rows: &[SampleRow], vocabulary: usize) -> (usize, usize) {
        let words = &mut self.words;
        let lists = rows.len() * SAMPLE_ROW_WORDS;
        words.clear();
        words.resize(lists, 0);
        let mut allowed = 0;
        for (i, row) in rows.iter().enumerate() {
            let ranges = push_lists(words, lists, row, vocabulary);
            // -1 where there is none.
            let mut allowed_first = u32::MAX;
            if let Some(bits) = &row.allowed {
                allowed_first = allowed as u32;
                allowed += bits.len();
            }
            write_row(
                &mut words[i * SAMPLE_ROW_WORDS..],
                row,
                ranges,
                allowed_first,
            );
        }
        let bits = words.len();
        let allowed = rows.iter().filter_map(|row| row.allowed.as_ref());
        allowed.for_each(|bits| words.extend(bits));
        (lists, bits)
    }

    /// Starts the way back of the results of so many rows.
    fn fetch(&mut self, driver: &D, rows: usize) -> Result<(), BackendError> {
        let bytes = rows * RESULT_WORDS * 4;
        match self.results.memory() {
            Some(results) => self.back.fetch(driver, results, bytes, bytes),
            None => Ok(()),
        }
    }

    fn read(
        &mut self,
        driver: &D,
        rows: &[SampleRow],
        sampled: &mut Sampled,
    ) -> Result<(), BackendError> {
        let came = self.back.read(driver, rows.len() * RESULT_WORDS * 4)?;
        let Some(bytes) = came else {
            let expected = "as many as the last `sample` was given";
            return Err(unsupported(
                "sampled",
                "rows",
                expected,
                rows.len().to_string(),
            ));
        };
        let words = bytes.as_chunks::<4>().0;
        let word = |at: usize| i32::from_le_bytes(words[at]);
        let n = rows.len();
        for (i, row) in rows.iter().enumerate() {
            let token = match word(i) {
                NOT_FINITE => Err(SampleFault::NotFinite),
                token => u32::try_from(token)
                    .map(TokenId)
                    .map_err(|_| SampleFault::NoToken),
            };
            let (logprobs, tops) = (
                n + i * (1 + SAMPLE_TOP),
                n * (2 + SAMPLE_TOP) + i * SAMPLE_TOP,
            );
            let logprob = |at: usize| f32::from_le_bytes(words[at]);
            let told = token.is_ok() && row.top.is_some();
            let top = if told {
                row.top.unwrap_or(0) as usize
            } else {
                0
            };
            let top = (0..top).filter_map(|j| {
                let token = u32::try_from(word(tops + j)).ok()?;
                Some((TokenId(token), logprob(logprobs + 1 + j)))
            });
            sampled.top.push(top.collect());
            sampled.logprobs.push(told.then(|| logprob(logprobs)));
            sampled.tokens.push(token);
        }
        Ok(())
    }
}

/// Appends the lists of `row` to those that begin at `lists`.
fn push_lists(words: &mut Vec<u32>, lists: usize, row: &SampleRow, vocabulary: usize) -> Ranges {
    let known = |token: TokenId| token.index() < vocabulary;
    let first = words.len();
    let biases = row.bias.iter().filter(|(token, _)| known(*token));
    words.extend(biases.flat_map(|(token, bias)| [token.0, bias.to_bits()]));
    let masked_first = words.len();
    let masked = row.masked.iter().filter(|token| known(**token));
    words.extend(masked.map(|token| token.0));
    let history_first = words.len();
    let history = row.history.iter().filter(|(token, _)| known(*token));
    words.extend(history.flat_map(|(token, count)| [token.0, *count]));
    let range = |first: usize, end: usize, size: usize| [first - lists, (end - first) / size];
    let ranges = [
        range(first, masked_first, 2),
        range(masked_first, history_first, 1),
        range(history_first, words.len(), 2),
    ];
    let [[a, b], [c, d], [e, f]] = ranges;
    [a, b, c, d, e, f].map(|word| word as u32)
}

/// `SampleRow` of the kernel.
fn write_row(words: &mut [u32], row: &SampleRow, ranges: Ranges, allowed_first: u32) {
    let random = row.random.to_bits();
    let numbers = [
        row.scale,
        row.least,
        row.top_p,
        row.repetition_penalty,
        row.presence_penalty,
        row.frequency_penalty,
    ];
    let parts: [&[u32]; 5] = [
        &[random as u32, (random >> 32) as u32],
        &numbers.map(f32::to_bits),
        &[row.top_k],
        &ranges,
        &[allowed_first, row.top.unwrap_or(u32::MAX)],
    ];
    let places = words.iter_mut().zip(parts.into_iter().flatten());
    places.for_each(|(word, part)| *word = *part);
}
