//! The pool of K/V blocks. Invariant: a block is free, or cached (named and found by its name, held by nobody), or held by at
//! least one sequence (named or not yet); never two of these. A name belongs to one block.

use std::collections::HashMap;

use super::prefix::BlockHash;
use crate::types::BlockId;

/// Who owns which block, and which contents are found where.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    names: HashMap<BlockHash, BlockId>,
    /// Cached blocks, least recently used first: a list linked through `blocks`.
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
    cached: usize,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    name: Option<BlockHash>,
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

/// Blocks by state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolCounts {
    /// Hold nothing.
    pub free: usize,
    /// Hold a prefix that nobody uses.
    pub cached: usize,
    /// Used.
    pub held: usize,
}

impl BlockPool {
    /// All `blocks` free.
    pub fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).unwrap_or(u32::MAX);
        let block = Block {
            holders: 0,
            name: None,
            older: None,
            newer: None,
        };
        Self {
            blocks: vec![block; count as usize],
            // Popped from the end: the first block goes first.
            free: (0..count).rev().map(BlockId::new).collect(),
            names: HashMap::new(),
            oldest: None,
            newest: None,
            cached: 0,
        }
    }

    /// Blocks there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are no blocks at all.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Blocks that an allocation may take: free ones, and cached ones, which it evicts.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached
    }

    /// Blocks by state.
    pub fn counts(&self) -> PoolCounts {
        PoolCounts {
            free: self.free.len(),
            cached: self.cached,
            held: self.blocks.len() - self.available(),
        }
    }

    /// `total` blocks for a new sequence: those named by the longest known prefix of `names`, then unnamed ones. Returns them
    /// and how many were known. `None` when fewer than `spare` blocks would be available afterwards: then nothing was taken.
    pub fn admit(
        &mut self,
        names: impl Iterator<Item = BlockHash>,
        total: usize,
        spare: usize,
    ) -> Option<(Vec<BlockId>, usize)> {
        let mut blocks: Vec<BlockId> = names
            .take(total)
            .map_while(|name| self.names.get(&name).copied())
            .collect();
        let known = blocks.len();
        let revived = blocks.iter().filter(|id| self.block(**id).holders == 0);
        let needed = total - known + revived.count();
        if needed + spare > self.available() {
            return None;
        }
        for id in &blocks {
            self.hold(*id);
        }
        for _ in known..total {
            blocks.extend(self.allocate());
        }
        debug_assert_eq!(blocks.len(), total);
        Some((blocks, known))
    }

    /// One unnamed block; evicts the least recently used cached one when none is free. `None`: all are held.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.evict()?,
        };
        self.block_mut(id).holders = 1;
        Some(id)
    }

    /// Names the contents of a held block, so that others may find it. Where the name is taken, the other block keeps it.
    pub fn publish(&mut self, id: BlockId, name: BlockHash) {
        let block = self.block(id);
        assert!(block.holders > 0, "only a held block can be named");
        if block.name.is_none() && !self.names.contains_key(&name) {
            self.names.insert(name, id);
            self.block_mut(id).name = Some(name);
        }
    }

    /// Gives up one hold on each of a sequence's blocks. The last ones are the first to be evicted: a prefix outlives what
    /// follows it, which nobody finds without it.
    pub fn release(&mut self, blocks: &[BlockId]) {
        for id in blocks.iter().rev() {
            let block = self.block_mut(*id);
            assert!(block.holders > 0, "a block is released by its holders only");
            block.holders -= 1;
            if block.holders > 0 {
                continue;
            }
            if block.name.is_some() {
                self.link(*id);
            } else {
                self.free.push(*id);
            }
        }
    }

    /// One more holder of a named block.
    fn hold(&mut self, id: BlockId) {
        if self.block(id).holders == 0 {
            self.unlink(id);
        }
        self.block_mut(id).holders += 1;
    }

    fn evict(&mut self) -> Option<BlockId> {
        let id = self.oldest?;
        self.unlink(id);
        if let Some(name) = self.block_mut(id).name.take() {
            self.names.remove(&name);
        }
        Some(id)
    }

    /// Puts a block at the young end of the cached ones.
    fn link(&mut self, id: BlockId) {
        let newest = self.newest.replace(id);
        let block = self.block_mut(id);
        (block.older, block.newer) = (newest, None);
        match newest {
            Some(newest) => self.block_mut(newest).newer = Some(id),
            None => self.oldest = Some(id),
        }
        self.cached += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let block = self.block_mut(id);
        let (older, newer) = (block.older.take(), block.newer.take());
        match older {
            Some(older) => self.block_mut(older).newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.block_mut(newer).older = older,
            None => self.newest = older,
        }
        self.cached -= 1;
    }

    fn block(&self, id: BlockId) -> Block {
        self.blocks[id.index()]
    }

    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        &mut self.blocks[id.index()]
    }

    /// Panics where the invariant is broken, given every hold that a sequence has. For tests.
    pub fn assert_invariants<'a>(&self, holds: impl Iterator<Item = &'a BlockId>) {
        let mut holders = vec![0u32; self.blocks.len()];
        for id in holds {
            holders[id.index()] += 1;
        }
        let mut state = vec![0u32; self.blocks.len()];
        for id in &self.free {
            assert!(self.block(*id).name.is_none(), "a free block has no name");
            state[id.index()] += 1;
        }
        let (mut cursor, mut before) = (self.oldest, None);
        while let Some(id) = cursor {
            assert_eq!(self.block(id).older, before, "the list is linked both ways");
            assert!(self.block(id).name.is_some(), "a cached block has a name");
            state[id.index()] += 1;
            (before, cursor) = (Some(id), self.block(id).newer);
        }
        assert_eq!(self.newest, before);
        for (index, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.holders, holders[index], "holders of block {index}");
            let held = u32::from(block.holders > 0);
            assert_eq!(state[index] + held, 1, "block {index} is in one state");
            if let Some(name) = block.name {
                let owner = self.names.get(&name).map(|id| id.index());
                assert_eq!(owner, Some(index), "a name belongs to one block");
            }
        }
        let named = self.blocks.iter().filter(|block| block.name.is_some());
        assert_eq!(named.count(), self.names.len());
        let counts = self.counts();
        assert_eq!(counts.free + counts.cached + counts.held, self.blocks.len());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::super::prefix::{PrefixRoot, Sharing};
    use super::*;
    use crate::types::{BLOCK_TOKENS, TokenId, Variant};

    fn names(count: u32) -> Vec<BlockHash> {
        let root = PrefixRoot {
            fingerprint: "",
            variant: Variant::Base,
            gates: Variant::Base.gates(),
            sharing: Sharing::Everyone,
        };
        let mut name = root.hash();
        (0..count)
            .map(|index| {
                name = name.next(&[TokenId(index); BLOCK_TOKENS]);
                name
            })
            .collect()
    }

    /// A pool of 4 whose first `named` blocks hold a known prefix that nobody uses.
    fn pool_with_prefix(named: u32) -> (BlockPool, Vec<BlockHash>) {
        let (mut pool, names) = (BlockPool::new(4), names(named));
        let (blocks, known) = pool.admit([].into_iter(), names.len(), 0).unwrap();
        assert_eq!(known, 0);
        for (block, name) in blocks.iter().zip(&names) {
            pool.publish(*block, *name);
        }
        pool.release(&blocks);
        pool.assert_invariants([].iter());
        (pool, names)
    }

    #[test]
    fn admit_when_blocks_run_out_takes_nothing() {
        for (total, spare, fits) in [
            (0, 0, true),
            (4, 0, true),
            (5, 0, false),
            (4, 1, false),
            (3, 1, true),
        ] {
            let mut pool = BlockPool::new(4);
            let got = pool.admit([].into_iter(), total, spare);
            assert_eq!(got.is_some(), fits, "{total} {spare}");
            let held = got.map_or(Vec::new(), |(blocks, _)| blocks);
            assert_eq!(pool.counts().held, held.len());
            pool.assert_invariants(held.iter());
        }
    }

    #[test]
    fn admit_finds_the_longest_known_prefix() {
        let (mut pool, names) = pool_with_prefix(3);
        let stranger = self::names(9)[8];
        let broken = [names[0], stranger, names[1]];
        let (blocks, known) = pool.admit(broken.into_iter(), 3, 0).unwrap();
        assert_eq!((blocks.len(), known), (3, 1));
        pool.assert_invariants(blocks.iter());
    }

    #[test]
    fn admit_counts_cached_blocks_that_it_revives() {
        let (mut pool, names) = pool_with_prefix(3);
        // 3 cached and 1 free: reviving 3 leaves 1.
        assert!(pool.admit(names.iter().copied(), 5, 0).is_none());
        assert!(pool.admit(names.iter().copied(), 4, 1).is_none());
        let (blocks, known) = pool.admit(names.iter().copied(), 4, 0).unwrap();
        assert_eq!(known, 3);
        pool.assert_invariants(blocks.iter());
    }

    #[test]
    fn held_blocks_are_shared_and_freed_by_the_last_holder() {
        let (mut pool, names) = pool_with_prefix(2);
        let (a, _) = pool.admit(names.iter().copied(), 2, 0).unwrap();
        let (b, _) = pool.admit(names.iter().copied(), 2, 0).unwrap();
        assert_eq!(a, b);
        assert_eq!(
            pool.counts(),
            PoolCounts {
                free: 2,
                cached: 0,
                held: 2
            }
        );
        pool.release(&a);
        assert_eq!(pool.counts().held, 2);
        pool.release(&b);
        assert_eq!(
            pool.counts(),
            PoolCounts {
                free: 2,
                cached: 2,
                held: 0
            }
        );
    }

    #[test]
    fn eviction_takes_the_end_of_the_least_recently_used_prefix() {
        let (mut pool, names) = pool_with_prefix(4);
        // Used again: the first two are now younger than the last two.
        let (blocks, _) = pool.admit(names.iter().take(2).copied(), 2, 0).unwrap();
        pool.release(&blocks);
        for left in [3, 2, 1, 0] {
            pool.allocate().unwrap();
            let known = names
                .iter()
                .filter(|name| pool.names.contains_key(*name))
                .count();
            assert_eq!(known, left);
            // What is left is always a prefix.
            let prefix = names.iter().take(left);
            assert!(prefix.clone().all(|name| pool.names.contains_key(name)));
        }
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn a_name_that_is_taken_stays_with_its_block() {
        let (mut pool, names) = pool_with_prefix(1);
        let (first, _) = pool.admit(names.iter().copied(), 1, 0).unwrap();
        let second = pool.allocate().unwrap();
        pool.publish(second, names[0]);
        pool.release(&[second]);
        assert_eq!(
            pool.counts(),
            PoolCounts {
                free: 3,
                cached: 0,
                held: 1
            }
        );
        pool.assert_invariants(first.iter());
    }
}
