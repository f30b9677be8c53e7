//! An axis: which numbers it spans, and where its ticks stand.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// Ticks of a linear axis, about.
const TICKS: f64 = 5.0;
/// Decades at most that have ticks at 2 and 5 too.
const FINE_DECADES: f64 = 2.0;
/// Decades between two ticks grow so that there are at most so many.
const DECADE_TICKS: f64 = 8.0;
/// Categories at most that each have a label.
const LABELS_MAX: usize = 12;

/// What one side of a panel measures. It spans what is drawn unless a range is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    pub(super) label: String,
    scale: Scale,
    span: Option<(f64, f64)>,
}

#[derive(Clone, Debug, PartialEq)]
enum Scale {
    Linear,
    Log,
    Categories(Vec<String>),
}

impl Axis {
    /// Equal steps are equally far.
    pub fn linear(label: impl Into<String>) -> Self {
        Self::new(label, Scale::Linear)
    }

    /// Equal factors are equally far; only positive numbers are shown.
    pub fn log(label: impl Into<String>) -> Self {
        Self::new(label, Scale::Log)
    }

    /// The number n stands at the middle of the n-th category, from 0.
    pub fn categories(label: impl Into<String>, names: Vec<String>) -> Self {
        Self::new(label, Scale::Categories(names))
    }

    /// Spans `low..=high` at least, whatever is drawn.
    #[must_use]
    pub fn including(mut self, low: f64, high: f64) -> Self {
        self.span = Some((low, high));
        self
    }

    fn new(label: impl Into<String>, scale: Scale) -> Self {
        Self {
            label: label.into(),
            scale,
            span: None,
        }
    }

    /// Whether a number has a place on this axis.
    pub(super) fn shows(&self, value: f64) -> bool {
        value.is_finite() && (value > 0.0 || self.scale != Scale::Log)
    }

    /// The axis over `values`, with room for all that it shows.
    pub(super) fn over(&self, values: impl Iterator<Item = f64>) -> Coordinates {
        let asked = self.span.map_or([f64::NAN; 2], |(low, high)| [low, high]);
        let shown = values.chain(asked).filter(|value| self.shows(*value));
        let (low, high) = shown.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        match &self.scale {
            Scale::Linear if low > high => linear(0.0, 1.0),
            Scale::Linear if low == high => linear(low - 0.5, high + 0.5),
            Scale::Linear => linear(low, high),
            Scale::Log if low > high => log(1.0, 10.0),
            Scale::Log => log(low, high),
            Scale::Categories(names) => categories(names),
        }
    }
}

/// An axis with its numbers: maps them to pixels for the drawing library.
#[derive(Clone, Debug)]
pub(super) struct Coordinates {
    log: bool,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
}

/// Ends on whole steps.
fn linear(low: f64, high: f64) -> Coordinates {
    let step = nice_step((high - low) / TICKS);
    let (first, last) = ((low / step).floor(), (high / step).ceil());
    let count = (last - first).round() as usize;
    let ticks = (0..=count).map(|tick| {
        let value = (first + tick as f64) * step;
        (value, trimmed(value, step))
    });
    Coordinates {
        log: false,
        low: first * step,
        high: last * step,
        ticks: ticks.collect(),
    }
}

/// Ends on decades where there are many, on 1, 2 or 5 times a power of ten where there are few.
fn log(low: f64, high: f64) -> Coordinates {
    let (first, last) = (low.log10().floor(), high.log10().ceil());
    let last = last.max(first + 1.0);
    let fine = last - first <= FINE_DECADES;
    let every = ((last - first) / DECADE_TICKS).ceil().max(1.0) as usize;
    let factors: &[f64] = if fine { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let mut ticks = Vec::new();
    for decade in (0..=(last - first) as usize).step_by(every) {
        let power = 10f64.powf(first + decade as f64);
        ticks.extend(factors.iter().map(|factor| factor * power));
    }
    // A tick of 10^last and more is the upper end; floating point needs a little slack to find it.
    let below = ticks
        .iter()
        .copied()
        .filter(|tick| *tick <= low * (1.0 + 1e-9));
    let low = below.fold(10f64.powf(first), f64::max);
    let above = ticks
        .iter()
        .copied()
        .filter(|tick| *tick >= high * (1.0 - 1e-9) && *tick > low);
    let high = above.fold(10f64.powf(last), f64::min);
    ticks.retain(|tick| (low..=high).contains(tick));
    Coordinates {
        log: true,
        low,
        high,
        ticks: ticks
            .into_iter()
            .map(|tick| (tick, trimmed(tick, tick)))
            .collect(),
    }
}

fn categories(names: &[String]) -> Coordinates {
    let every = names.len().div_ceil(LABELS_MAX).max(1);
    let ticks = names.iter().enumerate().step_by(every);
    Coordinates {
        log: false,
        low: -0.5,
        high: names.len().max(1) as f64 - 0.5,
        ticks: ticks.map(|(at, name)| (at as f64, name.clone())).collect(),
    }
}

/// The least of 1, 2, 5 times a power of ten that is at least `wanted`; 1 where nothing is wanted.
fn nice_step(wanted: f64) -> f64 {
    if !(wanted.is_normal() && wanted > 0.0) {
        return 1.0;
    }
    let power = 10f64.powf(wanted.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|step| step * power >= wanted * (1.0 - 1e-9));
    step.unwrap_or(10.0) * power
}

/// A tick with as many decimals as its `step` needs, and powers of ten where digits would be many.
fn trimmed(value: f64, step: f64) -> String {
    let magnitude = value.abs().max(step.abs());
    if value != 0.0 && !(1e-4..1e6).contains(&magnitude) {
        return format!("{value:.0e}");
    }
    let decimals = (-step.abs().log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.trim_matches(['-', '0', '.']).is_empty() {
        "0".to_owned()
    } else {
        text
    }
}

impl Coordinates {
    /// Where a value is: 0 at the lower end, 1 at the upper.
    fn part(&self, value: f64) -> f64 {
        let at = |x: f64| if self.log { x.log10() } else { x };
        let part = (at(value) - at(self.low)) / (at(self.high) - at(self.low));
        if part.is_finite() {
            part.clamp(0.0, 1.0)
        } else {
            0.0
        }
    }
}

impl Ranged for Coordinates {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        first + (self.part(*value) * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.ticks.iter().map(|(value, _)| *value).collect()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Coordinates {
    fn format(value: &f64) -> String {
        trimmed(*value, *value)
    }

    fn format_ext(&self, value: &f64) -> String {
        let tick = self.ticks.iter().find(|(tick, _)| tick == value);
        tick.map_or_else(|| Self::format(value), |(_, label)| label.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis, values: &[f64]) -> String {
        let coordinates = axis.over(values.iter().copied());
        let labels: Vec<_> = coordinates
            .ticks
            .into_iter()
            .map(|(_, label)| label)
            .collect();
        labels.join(" ")
    }

    #[test]
    fn ticks_are_round_and_enclose_what_is_shown() {
        let (linear, log) = (Axis::linear(""), Axis::log(""));
        for (axis, values, want) in [
            (&linear, vec![0.0, 0.93], "0 0.2 0.4 0.6 0.8 1.0"),
            (&linear, vec![-3.0, 7.0], "-4 -2 0 2 4 6 8"),
            (&linear, vec![], "0 0.2 0.4 0.6 0.8 1.0"),
            (&log, vec![0.11, 0.7], "0.1 0.2 0.5 1"),
            (&log, vec![3.0, 40_000.0], "1 10 100 1000 10000 100000"),
            (&log, vec![], "1 2 5 10"),
        ] {
            assert_eq!(labels(axis, &values), want, "{values:?}");
        }
    }

    #[test]
    fn every_value_that_is_shown_has_a_place_in_order() {
        for axis in [Axis::linear(""), Axis::log("")] {
            for values in [
                vec![1e-9, 1e9],
                vec![0.3, 0.31, 0.32],
                vec![5.0, 5.0],
                vec![1.0, 2.0, 10.0],
            ] {
                let coordinates = axis.over(values.iter().copied());
                let places: Vec<i32> = values
                    .iter()
                    .map(|value| coordinates.map(value, (0, 1000)))
                    .collect();
                assert!(places.is_sorted(), "{values:?} {places:?}");
                assert!(
                    coordinates.low <= values[0] && values[values.len() - 1] <= coordinates.high,
                    "{coordinates:?}"
                );
                assert!(coordinates.ticks.len() <= 12, "{coordinates:?}");
            }
        }
    }

    #[test]
    fn a_log_axis_shows_positive_numbers_only() {
        let axis = Axis::log("");
        for (value, shown) in [
            (1e-30, true),
            (0.0, false),
            (-1.0, false),
            (f64::NAN, false),
            (f64::INFINITY, false),
        ] {
            assert_eq!(axis.shows(value), shown, "{value}");
        }
        assert!(Axis::linear("").shows(-1.0));
    }

    #[test]
    fn including_widens_and_never_narrows() {
        let axis = Axis::linear("").including(0.0, 1.0);
        for (values, low, high) in [(vec![0.5], 0.0, 1.0), (vec![3.0], 0.0, 3.0)] {
            let coordinates = axis.over(values.into_iter());
            assert_eq!((coordinates.low, coordinates.high), (low, high));
        }
    }

    #[test]
    fn many_categories_do_not_all_have_labels() {
        for (count, want) in [(0, 0), (3, 3), (100, 12)] {
            let names = (0..count).map(|name| name.to_string()).collect();
            let coordinates = Axis::categories("", names).over([].into_iter());
            assert_eq!(coordinates.ticks.len(), want);
        }
    }
}
