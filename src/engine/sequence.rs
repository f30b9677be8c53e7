//! One sequence: its tokens, how many of them are computed, and the blocks that hold their K and V.
//!
//! Invariant: `computed <= tokens`, the blocks cover at least the computed positions, and the first `published` blocks are full,
//! computed and named.

use super::draft::Drafter;
use super::pool::BlockPool;
use super::prefix::BlockHash;
use crate::config::Speculation;
use crate::types::{BLOCK_TOKENS, BlockId, GateOverride, SeqId, TokenId};

/// A request in the engine, unique for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What a sequence starts from.
#[derive(Clone, Debug)]
pub struct NewSequence {
    /// Whose answer it is.
    pub request: RequestId,
    /// Which of the request's answers.
    pub choice: u32,
    /// At least 1 token.
    pub prompt: Vec<TokenId>,
    /// What the request does to its gates.
    pub gates: GateOverride,
    /// Start of its chain of blocks.
    pub root: BlockHash,
    /// Tokens of the answer at most. With 0, the last prompt token's logits are not wanted.
    pub max_tokens: usize,
    /// Whether the logits of all prompt tokens but the last are wanted.
    pub prompt_logits: bool,
    /// Whether the gates of all prompt tokens are wanted.
    pub prompt_gates: bool,
}

/// Where a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Until this sequence, which has the same prompt, has computed it.
    Following(SeqId),
    /// For blocks and a place in the batch.
    Waiting,
    /// Holds blocks for all its tokens.
    Running,
}

/// A sequence that has not ended.
#[derive(Debug)]
pub struct Sequence {
    request: RequestId,
    choice: u32,
    gates: GateOverride,
    max_tokens: usize,
    tokens: Vec<TokenId>,
    prompt_tokens: usize,
    /// Positions before this one whose logits were wanted have been delivered; `prompt_tokens - 1` where none were wanted.
    delivered: usize,
    /// Positions before this one whose gates were wanted have been delivered; `prompt_tokens` where none were wanted.
    gates_delivered: usize,
    computed: usize,
    prompt_done: bool,
    started: bool,
    blocks: Vec<BlockId>,
    published: usize,
    root: BlockHash,
    /// Names of the first full blocks of `tokens`, as far as anyone has asked.
    names: Vec<BlockHash>,
    drafter: Drafter,
    /// What the last draft guessed to follow `tokens` as they were then.
    drafted: Vec<TokenId>,
    pub(super) place: Place,
}

impl Sequence {
    pub(super) fn new(new: NewSequence, speculation: Speculation, place: Place) -> Self {
        let prompt_tokens = new.prompt.len();
        let last = prompt_tokens.saturating_sub(1);
        Self {
            request: new.request,
            choice: new.choice,
            gates: new.gates,
            max_tokens: new.max_tokens,
            tokens: new.prompt,
            prompt_tokens,
            delivered: if new.prompt_logits { 0 } else { last },
            gates_delivered: if new.prompt_gates { 0 } else { prompt_tokens },
            computed: 0,
            prompt_done: false,
            started: false,
            blocks: Vec::new(),
            published: 0,
            root: new.root,
            names: Vec::new(),
            drafter: Drafter::new(speculation),
            // Of full length at once: a step allocates nothing.
            drafted: Vec::with_capacity(speculation.speculative_tokens),
            place,
        }
    }

    /// Whose answer it is.
    pub fn request(&self) -> RequestId {
        self.request
    }

    /// Which of the request's answers.
    pub fn choice(&self) -> u32 {
        self.choice
    }

    /// What the request does to its gates.
    pub fn gates(&self) -> GateOverride {
        self.gates
    }

    /// Prompt and answer so far.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Length of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Tokens of the answer so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Tokens whose K and V are in the blocks.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Tokens whose K and V are not.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether the whole prompt has been computed once, and all its logits and gates that were wanted delivered.
    pub fn prompt_done(&self) -> bool {
        self.prompt_done
    }

    /// Blocks of positions from 0, in order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Positions whose logits are wanted still: the prompt's, where asked for, and the last token's.
    pub(super) fn wanted_logits(&self) -> std::ops::Range<usize> {
        let last = self.tokens.len() - 1;
        let start = if self.prompt_done {
            last
        } else {
            self.delivered
        };
        start..last + usize::from(self.max_tokens > 0)
    }

    /// Positions whose gates are wanted still.
    pub fn wanted_gates(&self) -> std::ops::Range<usize> {
        self.gates_delivered..self.prompt_tokens
    }

    /// Whether blocks of earlier requests may stand in for some of its prompt.
    pub(super) fn uses_prefix_cache(&self) -> bool {
        let wants_nothing =
            self.delivered + 1 == self.prompt_tokens && self.wanted_gates().is_empty();
        self.prompt_done || wants_nothing
    }

    /// Positions before this one need not be computed where their blocks are known. The last token is computed in any case: its
    /// logits are wanted. Neither may a position be skipped of which something is still to be delivered.
    fn skippable(&self) -> usize {
        let gates = self.wanted_gates();
        let logits = self.wanted_logits().start;
        if gates.is_empty() {
            logits
        } else {
            logits.min(gates.start)
        }
    }

    /// Takes blocks for all tokens, or none. Returns the tokens that need not be computed, and whether this was the first time.
    pub(super) fn start(&mut self, pool: &mut BlockPool, spare: usize) -> Option<(usize, bool)> {
        let skippable = self.skippable() / BLOCK_TOKENS;
        self.name_blocks(skippable);
        let names = self.names.iter().take(skippable).copied();
        let total = self.tokens.len().div_ceil(BLOCK_TOKENS);
        let (blocks, known) = pool.admit(names, total, spare)?;
        self.blocks = blocks;
        self.published = known;
        self.computed = known * BLOCK_TOKENS;
        self.place = Place::Running;
        Some((self.computed, !std::mem::replace(&mut self.started, true)))
    }

    /// Whether the next decode step needs one more block.
    pub(super) fn lacks_block(&self) -> bool {
        self.tokens.len() > self.blocks.len() * BLOCK_TOKENS
    }

    pub(super) fn add_block(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    /// The last draft.
    pub fn drafted(&self) -> &[TokenId] {
        &self.drafted
    }

    /// Guesses at what follows, at most `most` tokens, and takes the blocks they need, but leaves `spare`: nobody shall lose
    /// a block to a guess. Returns how many there are.
    pub(super) fn draft(&mut self, most: usize, pool: &mut BlockPool, spare: usize) -> usize {
        // A step samples one token more than it guesses.
        let left = self.max_tokens.saturating_sub(self.generated() + 1);
        let most = most.min(left);
        self.drafter.draft(&self.tokens, most, &mut self.drafted);
        while self.tokens.len() + self.drafted.len() > self.blocks.len() * BLOCK_TOKENS {
            match (pool.available() > spare)
                .then(|| pool.allocate())
                .flatten()
            {
                Some(block) => self.blocks.push(block),
                None => {
                    let room = self.blocks.len() * BLOCK_TOKENS;
                    self.drafted
                        .truncate(room.saturating_sub(self.tokens.len()));
                    break;
                }
            }
        }
        self.drafted.len()
    }

    /// Of the last draft, the first `accepted` tokens were right.
    pub(super) fn verified(&mut self, drafted: usize, accepted: usize) {
        self.drafter.verified(drafted, accepted, self.tokens.len());
    }

    /// Gives all blocks back; everything will be computed again, but for what is found in the cache.
    pub(super) fn stop(&mut self, pool: &mut BlockPool) {
        pool.release(&self.blocks);
        self.blocks.clear();
        self.published = 0;
        self.computed = 0;
        self.place = Place::Waiting;
    }

    /// K and V of `rows` more tokens are in the blocks. Names the blocks that became full. Returns whether this completed the
    /// prompt for the first time.
    pub(super) fn advance(&mut self, rows: usize, pool: &mut BlockPool) -> bool {
        self.computed += rows;
        assert!(
            self.computed <= self.tokens.len(),
            "only tokens can be computed"
        );
        let full = self.computed / BLOCK_TOKENS;
        self.name_blocks(full);
        while self.published < full {
            pool.publish(self.blocks[self.published], self.names[self.published]);
            self.published += 1;
        }
        if self.prompt_done {
            return false;
        }
        let last = self.prompt_tokens - 1;
        self.delivered = self.delivered.max(self.computed.min(last));
        let gates = self.computed.min(self.prompt_tokens);
        self.gates_delivered = self.gates_delivered.max(gates);
        self.prompt_done = self.computed >= self.prompt_tokens;
        self.prompt_done
    }

    /// A token was sampled.
    pub(super) fn append(&mut self, token: TokenId) {
        self.tokens.push(token);
    }

    /// Names the first `count` blocks of tokens, which must be full.
    fn name_blocks(&mut self, count: usize) {
        let named = self.names.len();
        if named >= count {
            return;
        }
        let (blocks, _) = self.tokens.as_chunks::<BLOCK_TOKENS>();
        for block in &blocks[named..count] {
            let before = self.names.last().unwrap_or(&self.root);
            self.names.push(before.next(block));
        }
    }
}
