//! Decode steps that are recorded once and then replayed: one call of the driver instead of one a kernel. A recording holds grids, addresses
//! and numbers; what changes from step to step is in memory. It is made for a shape, which smaller steps fill up with rows that read and
//! write no K or V.

use super::super::step::HostStep;
use super::super::{BackendError, RecordedPass, StepLimits, Workload};
use super::Cuda;
use super::driver::Driver;
use super::step::DeviceStep;
use super::tiles::DECODE_SPLIT;

/// Of a recorded step: with more, the device is busy with a kernel for longer than the host with starting it.
const ROWS_MAX: usize = 256;
/// Of the device's memory for each recorded kernel: its arguments, and room to spare. An estimate, on the safe side.
const NODE_BYTES: usize = 4 << 10;
/// Kernels of a layer (attention's merge too), and of a step beside its layers.
const NODES: (usize, usize) = (10, 4);

/// What a decode step's grids depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DecodeShape {
    /// Sequences, of one row each.
    pub(super) rows: usize,
    /// Splits of the longest one's positions.
    pub(super) splits: usize,
}

impl DecodeShape {
    /// Of a loaded step; `None` where not every sequence has one row, in their order, with logits of all.
    pub(super) fn of(host: &HostStep) -> Option<Self> {
        let wanted = host.logit_rows().iter().copied();
        let rows = host.rows();
        let fits = host.sequences().len() == rows && wanted.eq(0..rows);
        fits.then(|| Self {
            rows,
            splits: host.positions_end().div_ceil(DECODE_SPLIT),
        })
    }

    fn fits(self, step: Self) -> bool {
        step.rows <= self.rows && step.splits <= self.splits
    }
}

/// Shapes that are recorded, such that the first one that fits a step wastes least.
fn shapes(limits: &StepLimits) -> impl Iterator<Item = DecodeShape> {
    let rows = limits.sequences_in_a_step().min(limits.logit_rows);
    let splits = limits.positions.div_ceil(DECODE_SPLIT);
    let of_rows = steps_to(rows.min(ROWS_MAX), |rows| match rows {
        0..8 => rows * 2,
        _ => rows + (1 << (rows.ilog2() - 1)).max(8),
    });
    of_rows.flat_map(move |rows| {
        steps_to(splits, |splits| splits * 2).map(move |splits| DecodeShape { rows, splits })
    })
}

/// From 1 on, each `next` of the one before, up to and with `most`; none up to 0.
fn steps_to(most: usize, next: impl Fn(usize) -> usize) -> impl Iterator<Item = usize> {
    let first = (most > 0).then_some(1);
    std::iter::successors(first, move |value| {
        (*value < most).then(|| next(*value).min(most))
    })
}

/// What all recordings take of the device.
pub(super) fn bytes(work: &Workload) -> usize {
    let (of_a_layer, beside) = NODES;
    let nodes = work.layers * of_a_layer + beside;
    shapes(&work.limits).count() * nodes * NODE_BYTES
}

/// The recordings of one step's memory.
pub(super) struct Recordings<D: Driver> {
    all: Vec<(DecodeShape, D::Graph)>,
    /// The one that the loaded step is replayed with.
    current: Option<usize>,
}

impl<D: Driver> Recordings<D> {
    pub(super) fn new() -> Self {
        Self {
            all: Vec::new(),
            current: None,
        }
    }

    /// Picks the one for a step of this shape, and returns its rows.
    pub(super) fn pick(&mut self, step: Option<DecodeShape>) -> Option<usize> {
        let fitting = |step| self.all.iter().position(|(shape, _)| shape.fits(step));
        self.current = step.and_then(fitting);
        self.current.map(|at| self.all[at].0.rows)
    }

    /// Starts what was picked. `false`: nothing was.
    pub(super) fn replay(&self, driver: &D) -> Result<bool, BackendError> {
        let Some((_, graph)) = self.current.and_then(|at| self.all.get(at)) else {
            return Ok(false);
        };
        // SAFETY: the step owns its lists, and whoever loads it keeps the buffers (Backend::record).
        unsafe { driver.replay(graph) }.map(|()| true)
    }
}

/// [`super::Backend::record`].
pub(super) fn record<D: Driver>(
    cuda: &mut Cuda<D>,
    step: &mut DeviceStep<D>,
    pass: &mut RecordedPass<'_, Cuda<D>>,
) -> Result<usize, BackendError> {
    *step.recordings() = Recordings::new();
    let limits = *step.host().limits();
    let mut all = Vec::with_capacity(shapes(&limits).count());
    for shape in shapes(&limits) {
        step.pad(&cuda.driver, shape)?;
        // Once for real: what is looked up or made at first use cannot be while it is recorded.
        pass(cuda, step, shape.rows)?;
        match capture(cuda, step, shape.rows, pass) {
            Ok(graph) => all.push((shape, graph)),
            Err(error) => {
                tracing::warn!(%error, "the GPU records no decode steps: each kernel is started by itself, which is slower");
                return Ok(0);
            }
        }
    }
    let recorded = all.len();
    step.recordings().all = all;
    Ok(recorded)
}

fn capture<D: Driver>(
    cuda: &mut Cuda<D>,
    step: &DeviceStep<D>,
    rows: usize,
    pass: &mut RecordedPass<'_, Cuda<D>>,
) -> Result<D::Graph, BackendError> {
    cuda.driver.begin_recording()?;
    let asked = pass(cuda, step, rows);
    let recorded = cuda.driver.end_recording();
    asked.and(recorded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(sequences: usize, positions: usize) -> StepLimits {
        StepLimits {
            rows: 512,
            logit_rows: sequences,
            sequences,
            positions,
            blocks: 1 << 16,
            vocabulary: 10,
        }
    }

    #[test]
    fn shapes_waste_less_than_half_and_reach_the_limits() {
        for (sequences, positions) in [(1, 1), (5, 600), (64, 4096), (256, 2048), (300, 700)] {
            let limits = limits(sequences, positions);
            let all: Vec<_> = shapes(&limits).collect();
            let (most, splits) = (sequences.min(ROWS_MAX), positions.div_ceil(DECODE_SPLIT));
            assert!(all.contains(&DecodeShape { rows: most, splits }));
            for rows in 1..=most {
                for splits in 1..=splits {
                    let step = DecodeShape { rows, splits };
                    let Some(shape) = all.iter().find(|shape| shape.fits(step)) else {
                        panic!("no shape for {step:?}");
                    };
                    assert!(shape.rows < 2 * rows && shape.splits < 2 * splits);
                    assert!(shape.rows <= most && shape.rows - rows < 8.max(rows / 2));
                }
            }
            let beyond = DecodeShape {
                rows: most + 1,
                splits,
            };
            assert!(!all.iter().any(|shape| shape.fits(beyond)));
        }
        assert_eq!(shapes(&limits(64, 4096)).count(), 9 * 5);
    }
}
