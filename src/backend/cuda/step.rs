//! A step's lists in device memory.

use std::cell::RefCell;

use super::super::step::HostStep;
use super::super::{BackendError, StepLayout, StepLimits};
use super::driver::Driver;
use super::graphs::{DecodeShape, Recordings};
use super::tiles::DECODE_SPLIT;
use crate::types::{BLOCK_TOKENS, GateRule};

/// In a list of slots or of single rows: nothing is read or written for this row (kernels/rope_kv_write.cu, attention_decode.cu).
const NO_ROW: u32 = u32::MAX;

/// A [`HostStep`] and its lists on the device: one piece of memory, filled by one copy a step, at places that no step changes.
pub struct DeviceStep<D: Driver> {
    host: HostStep,
    places: Places,
    words: Vec<u32>,
    memory: D::Memory,
    single_rows: usize,
    /// Positions of the longest sequence with one row.
    longest: usize,
    tiles: RefCell<TileList<D>>,
    recordings: Recordings<D>,
}

/// Where each list begins, in words.
struct Places {
    positions: usize,
    slots: usize,
    sequence_of: usize,
    logit_rows: usize,
    /// (s, 4): first row, rows, position of the first, place of its table in `blocks`.
    sequences: usize,
    /// (s, 6) f32: bias, floor and ceiling of both gates.
    rules: usize,
    /// (s, 4) of sequences with one row: that row, its position, place of its table in `blocks`, 0.
    single_rows: usize,
    blocks: usize,
    end: usize,
}

impl Places {
    fn new(limits: &StepLimits) -> Self {
        let sequences = limits.sequences_in_a_step();
        let mut end = 0;
        let mut place = |words: usize| {
            let at = end;
            // Lists begin at multiples of 16 bytes.
            end += words.next_multiple_of(4);
            at
        };
        place(limits.rows);
        Self {
            positions: place(limits.rows),
            slots: place(limits.rows),
            sequence_of: place(limits.rows),
            logit_rows: place(limits.logit_rows),
            sequences: place(4 * sequences),
            rules: place(6 * sequences),
            single_rows: place(4 * sequences),
            blocks: place(limits.blocks_in_a_step()),
            end: place(0),
        }
    }
}

/// Tiles of attention_prefill: (sequence, its first token of the tile), for the tokens that a tile holds of this model's heads.
struct TileList<D: Driver> {
    tokens: Option<usize>,
    count: usize,
    words: Vec<u32>,
    memory: D::Memory,
}

/// Tiles on the device.
pub(super) struct Tiles {
    pub(super) count: usize,
    pub(super) address: u64,
}

/// Sequences with one row.
pub(super) struct SingleRows {
    pub(super) count: usize,
    /// Positions of the longest.
    pub(super) longest: usize,
    pub(super) address: u64,
}

impl<D: Driver> DeviceStep<D> {
    /// What [`Self::new`] takes of the device.
    pub(super) fn bytes(driver: &D, limits: &StepLimits) -> usize {
        let lists = [list_bytes(&Places::new(limits)), tile_bytes(limits)];
        lists.map(|bytes| driver.occupied(bytes)).iter().sum()
    }

    pub(super) fn new(driver: &D, limits: StepLimits) -> Result<Self, BackendError> {
        let places = Places::new(&limits);
        Ok(Self {
            host: HostStep::new(limits),
            words: vec![0; places.end],
            memory: driver.allocate("the lists of a step", list_bytes(&places))?,
            places,
            single_rows: 0,
            longest: 0,
            tiles: RefCell::new(TileList {
                tokens: None,
                count: 0,
                words: Vec::with_capacity(2 * limits.rows),
                memory: driver.allocate("the tiles of a step", tile_bytes(&limits))?,
            }),
            recordings: Recordings::new(),
        })
    }

    /// Checks `layout`, keeps it and copies its lists. On an error the step before stays.
    pub(super) fn load(&mut self, driver: &D, layout: &StepLayout<'_>) -> Result<(), BackendError> {
        self.host.load(layout)?;
        self.tiles.get_mut().tokens = None;
        let used = self.fill();
        if let Some(rows) = self.recordings.pick(DecodeShape::of(&self.host)) {
            self.fill_padding(rows);
        }
        let bytes = bytemuck::cast_slice(&self.words[..used]);
        driver.upload(&mut self.memory, 0, bytes)
    }

    /// Becomes a decode step of this shape, all of it padding.
    pub(super) fn pad(&mut self, driver: &D, shape: DecodeShape) -> Result<(), BackendError> {
        self.host.pad(shape.rows)?;
        self.recordings.pick(None);
        self.tiles.get_mut().tokens = None;
        self.fill_padding(shape.rows);
        (self.single_rows, self.longest) = (shape.rows, shape.splits * DECODE_SPLIT);
        let bytes = bytemuck::cast_slice(&self.words[..self.places.blocks]);
        driver.upload(&mut self.memory, 0, bytes)
    }

    /// Rows behind those of sequences, up to `rows`.
    fn fill_padding(&mut self, rows: usize) {
        let (at, words) = (&self.places, &mut self.words);
        for row in self.host.sequences().len()..rows {
            words[row] = 0;
            words[at.positions + row] = 0;
            words[at.slots + row] = NO_ROW;
            words[at.sequence_of + row] = 0;
            words[at.logit_rows + row] = row as u32;
            words[at.single_rows + 4 * row..][..4].copy_from_slice(&[NO_ROW, 0, 0, 0]);
        }
    }

    pub(super) fn recordings(&mut self) -> &mut Recordings<D> {
        &mut self.recordings
    }

    /// Does the loaded step as it was recorded; `false`: it was not.
    pub(super) fn replay(&self, driver: &D) -> Result<bool, BackendError> {
        self.recordings.replay(driver)
    }

    /// Writes the lists to `words` and returns how many of these are in use.
    fn fill(&mut self) -> usize {
        let (host, at, words) = (&self.host, &self.places, &mut self.words);
        for (word, token) in words.iter_mut().zip(host.tokens()) {
            *word = token.0;
        }
        for (word, row) in words[at.logit_rows..].iter_mut().zip(host.logit_rows()) {
            *word = *row as u32;
        }
        (self.single_rows, self.longest) = (0, 0);
        let mut blocks = at.blocks;
        for (i, sequence) in host.sequences().enumerate() {
            let table = blocks - at.blocks;
            let place = [sequence.first_row, sequence.rows, sequence.start, table];
            words[at.sequences + 4 * i..][..4].copy_from_slice(&place.map(|x| x as u32));
            words[at.rules + 6 * i..][..3].copy_from_slice(&rule(sequence.gates.safety));
            words[at.rules + 6 * i + 3..][..3].copy_from_slice(&rule(sequence.gates.helpfulness));
            for block in sequence.block_table {
                words[blocks] = block.index() as u32;
                blocks += 1;
            }
            for (row, position) in sequence.placed_rows() {
                let block = sequence.block_table[position / BLOCK_TOKENS].index();
                words[at.positions + row] = position as u32;
                words[at.slots + row] = (block * BLOCK_TOKENS + position % BLOCK_TOKENS) as u32;
                words[at.sequence_of + row] = i as u32;
            }
            if sequence.rows == 1 {
                let place = [sequence.first_row, sequence.start, table, 0];
                words[at.single_rows + 4 * self.single_rows..][..4]
                    .copy_from_slice(&place.map(|x| x as u32));
                self.single_rows += 1;
                self.longest = self.longest.max(sequence.start + 1);
            }
        }
        blocks
    }

    pub(super) fn host(&self) -> &HostStep {
        &self.host
    }

    fn place(&self, driver: &D, words: usize) -> u64 {
        driver.address(&self.memory) + 4 * words as u64
    }

    pub(super) fn tokens(&self, driver: &D) -> u64 {
        self.place(driver, 0)
    }

    pub(super) fn positions(&self, driver: &D) -> u64 {
        self.place(driver, self.places.positions)
    }

    pub(super) fn slots(&self, driver: &D) -> u64 {
        self.place(driver, self.places.slots)
    }

    pub(super) fn sequence_of(&self, driver: &D) -> u64 {
        self.place(driver, self.places.sequence_of)
    }

    pub(super) fn logit_rows(&self, driver: &D) -> u64 {
        self.place(driver, self.places.logit_rows)
    }

    pub(super) fn sequences(&self, driver: &D) -> u64 {
        self.place(driver, self.places.sequences)
    }

    pub(super) fn rules(&self, driver: &D) -> u64 {
        self.place(driver, self.places.rules)
    }

    pub(super) fn blocks(&self, driver: &D) -> u64 {
        self.place(driver, self.places.blocks)
    }

    pub(super) fn single_rows(&self, driver: &D) -> SingleRows {
        SingleRows {
            count: self.single_rows,
            longest: self.longest,
            address: self.place(driver, self.places.single_rows),
        }
    }

    /// The tiles of sequences with more than one row, `tokens` of a sequence in each. The first layer of a step makes them.
    pub(super) fn tiles(&self, driver: &D, tokens: usize) -> Result<Tiles, BackendError> {
        let mut tiles = self.tiles.borrow_mut();
        let tiles = &mut *tiles;
        if tiles.tokens != Some(tokens) {
            tiles.words.clear();
            for (i, sequence) in self.host.sequences().enumerate() {
                if sequence.rows > 1 {
                    let firsts = (0..sequence.rows).step_by(tokens);
                    tiles
                        .words
                        .extend(firsts.flat_map(|first| [i as u32, first as u32]));
                }
            }
            driver.upload(&mut tiles.memory, 0, bytemuck::cast_slice(&tiles.words))?;
            tiles.count = tiles.words.len() / 2;
            tiles.tokens = Some(tokens);
        }
        Ok(Tiles {
            count: tiles.count,
            address: driver.address(&tiles.memory),
        })
    }
}

fn list_bytes(places: &Places) -> usize {
    places.end * 4
}

/// Two words a tile, which holds at least one row.
fn tile_bytes(limits: &StepLimits) -> usize {
    2 * 4 * limits.rows
}

fn rule(rule: GateRule) -> [u32; 3] {
    [rule.bias(), rule.floor(), rule.ceiling()].map(f32::to_bits)
}
