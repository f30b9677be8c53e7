//! Which items make a batch, and how a batch is cut into parts.
//!
//! Batches are cut from a shuffle of the whole epoch, so every item is equally likely to stand beside every other. Only within a
//! batch are the items sorted by length and cut into parts of like lengths: padding is paid within a part alone, and what a
//! step learns from does not depend on lengths.

use crate::random::SplitMix64;

/// The order in which items are seen: a function of (seed, step).
#[derive(Clone, Debug)]
pub struct Batches {
    items: usize,
    batch_size: usize,
    seed: u64,
    /// The epoch that `order` is of.
    epoch: Option<usize>,
    order: Vec<usize>,
}

impl Batches {
    /// Of `items` items, at least one, `batch_size` at a time, at least one; an epoch's last batch may be smaller.
    pub fn new(items: usize, batch_size: usize, seed: u64) -> Self {
        Self {
            items,
            batch_size: batch_size.max(1),
            seed,
            epoch: None,
            order: Vec::new(),
        }
    }

    /// Steps of one epoch.
    pub fn per_epoch(&self) -> usize {
        self.items.div_ceil(self.batch_size).max(1)
    }

    /// The items of the batch of `step`, counted from 0 over all epochs.
    pub fn at(&mut self, step: usize) -> &[usize] {
        let (epoch, position) = (step / self.per_epoch(), step % self.per_epoch());
        if self.epoch != Some(epoch) {
            self.order = (0..self.items).collect();
            SplitMix64::new(self.seed, epoch as u64).shuffle(&mut self.order);
            self.epoch = Some(epoch);
        }
        let start = (position * self.batch_size).min(self.items);
        let end = (start + self.batch_size).min(self.items);
        self.order.get(start..end).unwrap_or_default()
    }
}

/// `batch` cut into parts of at most `part_size` items, longest first: threads that take parts in turn then end at about the same time.
pub fn parts(
    batch: &[usize],
    part_size: usize,
    length: impl Fn(usize) -> usize,
) -> Vec<Vec<usize>> {
    let mut sorted = batch.to_vec();
    sorted.sort_by_key(|item| std::cmp::Reverse(length(*item)));
    sorted
        .chunks(part_size.max(1))
        .map(<[usize]>::to_vec)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_holds_every_item_once_in_another_order() {
        let mut batches = Batches::new(10, 4, 7);
        assert_eq!(batches.per_epoch(), 3);
        let mut epochs = Vec::new();
        for epoch in 0..2 {
            let mut seen = Vec::new();
            for step in 0..3 {
                seen.extend_from_slice(batches.at(epoch * 3 + step));
            }
            let mut sorted = seen.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
            epochs.push(seen);
        }
        assert_ne!(epochs[0], epochs[1]);
        // A run that starts in the middle sees what one from the start does.
        assert_eq!(Batches::new(10, 4, 7).at(4), batches.at(4));
    }

    #[test]
    fn parts_hold_items_of_like_length_longest_first() {
        let lengths = [5, 1, 4, 2, 3];
        let cut = parts(&[0, 1, 2, 3, 4], 2, |item| lengths[item]);
        assert_eq!(cut, [vec![0, 2], vec![4, 3], vec![1]]);
    }
}
