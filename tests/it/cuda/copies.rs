//! Copies of the emulated device, as late as the contract of `Driver` allows: who does not wait for them finds other bytes.

use std::cell::RefCell;

/// What was asked for and not yet done.
#[derive(Default)]
pub(crate) struct Copies {
    back: RefCell<Vec<Back>>,
    pushed: RefCell<Pushed>,
}

/// What device memory held when it was fetched, and where it goes.
struct Back {
    bytes: Vec<u8>,
    into: *mut u8,
}

#[derive(Default)]
struct Pushed {
    /// Copies that were done before the first of `waiting`.
    done: usize,
    waiting: Vec<Push>,
}

struct Push {
    from: *const u8,
    to: *mut u8,
    bytes: usize,
}

// SAFETY: the pointers are followed where `Driver` says that what they point to is left alone; a driver is one thread's at a time.
unsafe impl Send for Copies {}

impl Copies {
    pub(super) fn fetch(&self, from: &[u8], into: &mut [u8]) {
        let bytes = from.to_vec();
        // Until somebody waits.
        into[..bytes.len()].fill(0xA5);
        let into = into.as_mut_ptr();
        self.back.borrow_mut().push(Back { bytes, into });
    }

    pub(super) fn wait(&self) {
        for Back { bytes, into } in self.back.take() {
            // SAFETY: `fetch` was given as many bytes, which nobody touches before this.
            unsafe { into.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }

    /// Returns how many copies were asked for with this one.
    pub(super) fn push(&self, to: &mut [u8], from: &[u8]) -> usize {
        let mut pushed = self.pushed.borrow_mut();
        pushed.waiting.push(Push {
            from: from.as_ptr(),
            to: to.as_mut_ptr(),
            bytes: from.len(),
        });
        pushed.done + pushed.waiting.len()
    }

    /// Does the first `count` of all copies that were ever asked for.
    pub(super) fn reach(&self, count: usize) {
        let mut pushed = self.pushed.borrow_mut();
        let due = count.saturating_sub(pushed.done).min(pushed.waiting.len());
        for Push { from, to, bytes } in pushed.waiting.drain(..due) {
            // SAFETY: `push` was given as many bytes; `from` is left as it is until its mark is reached, `to` lives until it is used.
            unsafe { to.copy_from_nonoverlapping(from, bytes) };
        }
        pushed.done += due;
    }
}
