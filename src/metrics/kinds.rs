//! What is counted: counters, gauges, histograms, and families of them.

use std::marker::PhantomData;

use super::labels::Label;

/// Only goes up.
#[derive(Clone)]
pub struct Counter(pub(super) prometheus::IntCounter);

impl Counter {
    /// Adds 1.
    pub fn increment(&self) {
        self.0.inc();
    }

    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.inc_by(amount);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

/// A level.
#[derive(Clone)]
pub struct Gauge(pub(super) prometheus::IntGauge);

impl Gauge {
    /// Sets the level.
    pub fn set(&self, level: usize) {
        self.0.set(i64::try_from(level).unwrap_or(i64::MAX));
    }

    /// Adds 1 until the guard is dropped.
    pub fn hold(&self) -> GaugeGuard {
        self.0.inc();
        GaugeGuard(self.clone())
    }

    /// The level.
    pub fn get(&self) -> i64 {
        self.0.get()
    }
}

/// Keeps a [`Gauge`] one higher while it lives.
pub struct GaugeGuard(Gauge);

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.0.dec();
    }
}

/// A level that is not a whole number.
#[derive(Clone)]
pub struct RealGauge(pub(super) prometheus::Gauge);

impl RealGauge {
    /// Sets the level.
    pub fn set(&self, level: f64) {
        self.0.set(level);
    }

    /// The level.
    pub fn get(&self) -> f64 {
        self.0.get()
    }
}

/// Counts observations by size.
#[derive(Clone)]
pub struct Histogram(pub(super) prometheus::Histogram);

impl Histogram {
    /// Counts one observation.
    pub fn observe(&self, value: f64) {
        self.0.observe(value);
    }

    /// Observations so far.
    pub fn count(&self) -> u64 {
        self.0.get_sample_count()
    }

    /// Their sum.
    pub fn sum(&self) -> f64 {
        self.0.get_sample_sum()
    }
}

/// One `T` for each value of a label.
pub struct By<L, T> {
    children: Vec<T>,
    label: PhantomData<L>,
}

impl<L: Label, T> By<L, T> {
    pub(super) fn new(child: impl FnMut(L) -> T) -> Self {
        Self {
            children: L::ALL.iter().copied().map(child).collect(),
            label: PhantomData,
        }
    }

    /// The child of `value`.
    pub fn of(&self, value: L) -> &T {
        let index = L::ALL.iter().position(|known| *known == value);
        match index.and_then(|index| self.children.get(index)) {
            Some(child) => child,
            None => unreachable!("`{}` is not in the list of its own set", value.as_str()),
        }
    }

    /// All children, in the order of the label's values.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.children.iter()
    }
}
